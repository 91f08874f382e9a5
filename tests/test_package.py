"""What is installed: the files of the wheel and of the source archive, and what it is called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typed_user

import pyroflow as pf
from pyroflow.distribution import warn_of_another

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(next(built.glob("pyroflow_ppl-*.whl"))) as archive:
        yield archive


def test_the_wheel_holds_the_package_alone(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    info = f"pyroflow_ppl-{pf.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"pyroflow", info}
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "pyroflow").rglob("*.py")}
    typed = {"pyroflow/__init__.pyi", "pyroflow/py.typed"}
    assert {name for name in names if name.startswith("pyroflow/")} == modules | typed
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"pyroflow_ppl-{pf.__version__}.dist-info/METADATA").decode()
    assert "\nName: pyroflow-ppl\n" in metadata
    assert f"\nVersion: {pf.__version__}\n" in metadata
    assert {"sklearn", "docs"} <= set(re.findall("^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    description = metadata.partition("\n\n")[2]
    for link in re.findall(r"\]\(([^)]*)\)", description):  # an index page has no files beside it
        assert link.startswith(("https://", "#")), link


def test_an_unpacked_wheel_is_imported(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import pyroflow as pf, importlib.metadata as m, torch;"
        "pf.planar_flow(2, num_layers=2)().log_prob(torch.zeros(2));"
        "print(pf.__file__, pf.__version__, m.version('pyroflow-ppl'))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "pyroflow" / "__init__.py"
    assert done.stdout.split() == [str(file), pf.__version__, pf.__version__]


def test_the_source_archive_is_without_outputs(built: Path) -> None:
    (file,) = built.glob("pyroflow_ppl-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert {"pyroflow/py.typed", "tests/conftest.py", "docs/architecture.md"} <= names
    assert not [name for name in names if name.endswith((".ipynb", ".png", ".pt"))]
    assert file.stat().st_size < MEGABYTE


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {pf.__version__}\n" in citation
    assert f"\n## {pf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
def test_what_a_typed_user_writes_runs(tmp_path: Path) -> None:
    typed_user.main(tmp_path)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata of a distribution pyroflow 9.1, first on the path."""
    info = tmp_path / "pyroflow-9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pyroflow\nVersion: 9.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return info


@pytest.mark.parametrize(
    "record", ["pyroflow/__init__.py,,\npyroflow-9.1.dist-info/RECORD,,\n", ""]
)
def test_another_library_of_that_name_is_told(other: Path, record: str) -> None:
    if record:
        (other / "RECORD").write_text(record)
    told = rf"pyroflow-ppl {pf.__version__}, .* pyroflow 9\.1, .*{other.parent}.*pip uninstall"
    with pytest.warns(UserWarning, match=told):
        warn_of_another()


def test_one_without_modules_of_that_name_is_not(other: Path) -> None:
    (other / "RECORD").write_text("__editable__.pyroflow.pth,,\npyroflow-9.1.dist-info/RECORD,,\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another()
