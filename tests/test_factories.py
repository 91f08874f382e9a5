"""No tensor of the package is made on torch's default device but what a user makes there.

A GPU as default device would put it there, whatever it belongs to. The modules themselves, and
models without data, are on the default device, as torch's own modules are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from cases import slow
from pyro.infer.autoguide import AutoNormal
from test_devices import QUICK, TASKS, amortised_guide, guides, model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import pyroflow as pf

PACKAGE = Path(pf.__file__).parent
FACTORIES = _device_constructors()
NAMES = {factory.__name__ for factory in FACTORIES}
OWN = "__init__"  # of a module, whose tensors are where torch's default says, until it is moved
INNER = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")
ALLOWED = {
    "targets/models.py": "models without data",
    "model/latents.py": "the start of a site whose improper prior has no draw that says where",
}


class Placed(TorchFunctionMode):
    """Refuses what the package makes without saying where."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FACTORIES and (kwargs or {}).get("device") is None:
            self.check(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def check(self, frame: Any) -> None:
        """Fail for a caller in the package that has no right to the default device."""
        while frame.f_code.co_name == "__torch_function__":  # of another mode
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE) or path.relative_to(PACKAGE).as_posix() in ALLOWED:
            return
        while frame.f_code.co_name in INNER:
            frame = frame.f_back
        if frame.f_code.co_name != OWN:
            raise AssertionError(f"{path.name}, line {frame.f_lineno}: a tensor without a device")


def without_device(tree: ast.AST) -> Iterator[int]:
    """The lines of calls of torch's factories that do not say where, outside of modules."""
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == OWN]
    own = {id(node) for function in inside for node in ast.walk(function)}
    for node in ast.walk(tree):
        call = isinstance(node, ast.Call) and id(node) not in own and _is_factory(node.func)
        if call and not {"device", None} & {keyword.arg for keyword in node.keywords}:
            yield node.lineno


def _is_factory(function: ast.expr) -> bool:
    named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    return named and function.value.id == "torch" and function.attr in NAMES


def chains(y: Tensor) -> list[Tensor]:
    guide = pf.AutoPlanarFlow(model, 1)
    pf.fit_guide(model, guide, (y,), steps=4, **QUICK)
    found = pf.mcmc(model, guide, (y,), num_samples=20, num_chains=4, **QUICK)
    found.to_arviz()
    return list(found.draws.values())


def one_call(y: Tensor) -> list[Tensor]:
    found = pf.posterior(model, (y,), num_samples=1000, progress=False)
    found.to_arviz()
    return list(found.draws.values())


def by_traces(y: Tensor) -> list[Tensor]:
    guide = AutoNormal(model)
    pf.fit_guide(model, guide, (y,), steps=4, **QUICK)
    return list(guide.parameters())


@pytest.mark.parametrize(
    "task",
    [
        *(task for task in TASKS if task not in (guides, amortised_guide)),
        chains,
        by_traces,
        *(slow(task) for task in (guides, one_call, amortised_guide)),
    ],
)
def test_all_that_is_made_says_where(
    task: Callable[[Tensor], list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    y = torch.tensor([0.3, -1.2, 0.8, 2.0], device="cpu")
    with Placed():
        task(y)


def test_all_of_the_source_says_where() -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        lines = list(without_device(ast.parse(file.read_text(encoding="utf-8"))))
        if lines and name not in ALLOWED:
            found[name] = lines
    assert found == {}


def test_what_does_not_say_where_is_found() -> None:
    assert list(without_device(ast.parse("x = torch.zeros(3)\ny = torch.ones(2, device=d)"))) == [1]
    made = compile("made = torch.zeros(3)", str(PACKAGE / "made.py"), "exec")
    with Placed(), pytest.raises(AssertionError, match=r"made.py, line 1: a tensor without"):
        exec(made, {"torch": torch})
    with Placed():
        pyro.sample("z", pyro.distributions.Normal(torch.zeros(3), 1.0))
        pf.Planar(2)
