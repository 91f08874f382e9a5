"""README's code runs as it stands, with fits cut short; tables and links are those of the files."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
from benchmarks import readme
from cases import slow

import pyroflow as pf
from pyroflow.inference.schedule import LearningRateSchedule
from pyroflow.inference.trainer import Trainer

README = Path(__file__).resolve().parents[1] / "README.md"
HOST = re.compile(  # README stands on the package index too, where links must be whole
    r"https://(?:github\.com/pyroflow/pyroflow/(?:blob|tree)"
    r"|raw\.githubusercontent\.com/pyroflow/pyroflow)/main/"
)


PAGES = sorted(README.parent.glob("docs/*.md"))
# The page on processes has one block, which tests/test_lightning.py runs.
WITH_CODE = [page for page in PAGES if "```python" in page.read_text() and page.stem != "processes"]


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, float32: None) -> None:
    """Short fits, a few simulations, and a folder for the files that the code writes.

    Not so short that ``posterior`` has much to mend, and chains far to go, which takes longer.
    """
    whole = Trainer.__init__

    def short(self: Trainer, *args: Any, polish: int = 0, **options: Any) -> None:
        objective, schedule = args
        short_schedule = LearningRateSchedule(min(schedule.steps, 300), schedule.rule)
        whole(self, objective, short_schedule, polish=min(polish, 1), **options)

    monkeypatch.setattr(Trainer, "__init__", short)
    monkeypatch.setattr(pf, "calibrate", partial(pf.calibrate, num_simulations=2))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("short_fits")
@pytest.mark.parametrize(
    "page",
    [README, *(slow(page) for page in WITH_CODE)],
    ids=lambda page: page.stem,
)
def test_code_runs(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        pyro.clear_param_store()
        exec(compile(block, str(page), "exec"), {})


def test_first_screen_names_the_commands() -> None:
    first_screen = "\n".join(README.read_text().splitlines()[:20])
    for command in ("make demo", "make test", "pip install"):
        assert command in first_screen


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 110


@pytest.mark.parametrize("file", readme.FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_tables_are_those_of_the_stored_results(file: Path) -> None:
    text = file.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert readme.filled(text) == text, "run make tables"


def test_a_table_that_was_edited_by_hand_is_written_anew() -> None:
    text = "before\n<!-- table: steps -->\n5.43 ms\n<!-- end -->\nafter"
    filled = readme.filled(text)
    assert filled.startswith("before\n<!-- table: steps -->\n")
    assert "5.43 ms" not in filled
    ours = readme.stored("steps")["milliseconds a step"]["pyroflow"]
    assert f"| eight schools | pyroflow | {ours:.2f} | 1.00 |" in filled
    assert filled.endswith("<!-- end -->\nafter")
    with pytest.raises(KeyError, match="prices"):
        readme.filled("<!-- table: prices -->\n<!-- end -->")


@pytest.mark.parametrize(
    "page",
    [
        page.relative_to(README.parent).as_posix()
        for page in (README, README.parent / "CONTRIBUTING.md", readme.FILES[1], *PAGES)
        if re.search(r"\]\((?!https?:)", HOST.sub("/", page.read_text()))
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    file = README.parent / page
    text = HOST.sub("/", file.read_text())
    links = [link for link in re.findall(r"\]\(([^)]*)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        path = README.parent / path[1:] if path.startswith("/") else file.parent / path
        assert path.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], link


def test_architecture_names_files_that_exist() -> None:
    text = (README.parent / "docs" / "architecture.md").read_text()
    assert len(text.splitlines()) <= 60
    files = re.findall(r"`((?:pyroflow|tests|notebooks)/[\w./]+)`", text)
    files += [f"pyroflow/{name}" for name in re.findall(r"`(\w+\.py|\w+/)`", text)]
    assert len(files) > 30
    for file in files:
        assert (README.parent / file).exists(), file


def test_every_public_name_is_in_the_reference() -> None:
    text = (README.parent / "docs" / "api.md").read_text()
    named = set(re.findall(r"auto(?:function|class|module):: pyroflow\.(\w+)", text))
    lower = {name for name in pf.__all__ if name.capitalize().startswith("Conditional_")}
    lower |= {"planar", "radial", "sinh_arcsinh", "sylvester"}  # a second name of a layer
    assert named == set(pf.__all__) - lower
