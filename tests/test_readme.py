"""README's code runs as it stands; only the fits are cut short."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pyroflow as pf
from pyroflow.inference.loop import Loop

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.usefixtures("float32")
def test_code_in_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = Loop.__init__

    def short(self: Loop, *args: Any, steps: int, polish: int = 0, **options: Any) -> None:
        whole(self, *args, steps=min(steps, 1), polish=min(polish, 1), **options)

    monkeypatch.setattr(Loop, "__init__", short)
    monkeypatch.setattr(pf, "calibrate", partial(pf.calibrate, num_simulations=2))
    monkeypatch.chdir(tmp_path)  # for the files that the code writes
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_first_screen_names_the_commands() -> None:
    first_screen = "\n".join(README.read_text().splitlines()[:20])
    for command in ("make demo", "make test", "pip install"):
        assert command in first_screen
