"""README's code runs as it stands; only the fits are cut short."""

import re
from pathlib import Path

import pytest

from pyroflow.inference.loop import Loop

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.usefixtures("float32")
def test_code_in_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "run", lambda self: None)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_first_screen_names_the_commands() -> None:
    first_screen = "\n".join(README.read_text().splitlines()[:20])
    for command in ("make demo", "make test", "pip install"):
        assert command in first_screen
