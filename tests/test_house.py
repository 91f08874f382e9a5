"""The structure of the package: how large it is, that imports go one way, how often models run.

``python tests/test_house.py`` prints the counts.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

import pyroflow as pf
from pyroflow.targets import eight_schools_centered, eight_schools_noncentered

PACKAGE = Path(__file__).parents[1] / "pyroflow"

# With minibatches, checks and chains of many groups, several processes, launches, kernels of a GPU,
# fits side by side, a line for each mistake in a call, rows of several plates, callbacks, tables of
# what is shown, densities of tables and a shell for them, figures of any number of columns, files
# of amortised guides, natural gradients: 112 before.
MAX_LINES, MAX_FILES = 27_895, 159
LONGEST_FILE, LONGEST_CLASS, MOST_ARGUMENTS = 300, 150, 12
MODELS = [eight_schools_noncentered, eight_schools_centered]
MOST_RUNS = {  # of a model; a run of many draws side by side counts once
    # Two of them record the coordinates, one looks for data forgotten where an argument is None.
    "fit_guide, before its first step": 9,
    "to_arviz, 50 draws": 8,
    "diagnose": 5,
    # Two more where the guide is not good: to look for funnels, and whether a richer one can be.
    "diagnose, with advice": 7,
}
KERNEL = "what a kernel of a GPU reads and writes, and its sizes"
MANY_ARGUMENTS = {
    **dict.fromkeys(
        ["fit", "fit_density", "fit_guide", "to_arviz", "FlowDensity.__init__"],
        "options of a user, by keyword",
    ),
    **dict.fromkeys(["_evaluate", "_backward", "_solve"], KERNEL),
}

# What each part may import. A part is a folder or a module at the top of the package.
BASE = {"checks", "distribution", "frames", "io", "progress", "seeds", "shown"}
DENSITIES = BASE | {"transforms", "flows"}
GUIDES = DENSITIES | {"model", "guides"}
CHECKED = GUIDES | {"inference", "diagnostics"}
ALL = CHECKED | {
    "arviz",
    "calibration",
    "ladder",
    "chains",
    "datasets",
    "plots",
    "saving",
    "targets",
}
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "transforms": BASE,
    "flows": DENSITIES,
    "model": BASE,
    "guides": GUIDES,
    "inference": GUIDES,
    "estimator": DENSITIES | {"inference"},
    "saving": GUIDES,
    "diagnostics": CHECKED,
    "arviz": CHECKED,
    "calibration": CHECKED,
    "chains": CHECKED | {"arviz"},
    "ladder": CHECKED | {"arviz", "chains"},
    "datasets": BASE,
    "targets": BASE,
    "plots": GUIDES | {"inference"},
    "demo": ALL,
    "commands": ALL,
    "cli": {"commands", "demo", "distribution"},
    "__init__": {"distribution"},
    "__main__": {"cli"},
}
EXCEPTIONS = {  # (file, part that it imports all the same): why
    ("calibration/result.py", "plots"): "Calibration.plot draws, and imports it when it does",
}


class Source(NamedTuple):
    """A file of the package: its path in it, the part it belongs to, and its code."""

    path: Path
    part: str
    lines: int
    tree: ast.Module


class Import(NamedTuple):
    """A module that a file imports, and whether it does so wherever the file is read."""

    module: str
    at_top: bool


@cache
def sources() -> list[Source]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        path, text = file.relative_to(PACKAGE), file.read_text(encoding="utf-8")
        part = path.parts[0].removesuffix(".py")
        found.append(Source(path, part, len(text.splitlines()), ast.parse(text)))
    return found


def imports(source: Source) -> Iterator[Import]:
    """All imports of a file; those of names from a package as of the modules they may be."""
    top = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno} imports by a relative name"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in modules]
        else:
            continue
        yield from (Import(name, node in top) for name in names)


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def parts_imported(source: Source) -> set[str]:
    """Other parts of the package that a file imports, inside functions too."""
    names = [f"{module}.__init__".split(".") for module, _ in imports(source)]
    return {name[1] for name in names if name[0] == "pyroflow"} - {source.part}


def import_graph() -> dict[str, set[str]]:
    graph = {source.part: set() for source in sources()}
    for source in sources():
        graph[source.part] |= parts_imported(source)
    return graph


def long_classes(longest: int = LONGEST_CLASS) -> dict[str, int]:
    """Lines of the classes that have more than so many."""
    nodes = [node for source in sources() for node in ast.walk(source.tree)]
    sizes = [(n.name, n.end_lineno - n.lineno + 1) for n in nodes if isinstance(n, ast.ClassDef)]
    return {name: size for name, size in sorted(sizes, key=itemgetter(1)) if size > longest}


def many_arguments() -> dict[str, int]:
    """Functions that take more than a few arguments, without ``self`` and ``cls``."""
    found = {}
    for source in sources():
        nodes = list(ast.walk(source.tree))
        owners = {id(m): c.name for c in nodes if isinstance(c, ast.ClassDef) for m in c.body}
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
                num = sum(arg is not None and arg.arg not in ("self", "cls") for arg in every)
                if num > MOST_ARGUMENTS:
                    owner = owners.get(id(node))
                    found[f"{owner}.{node.name}" if owner else node.name] = num
    return found


class Counted:
    """A model, and how often it ran."""

    def __init__(self, model: Callable) -> None:
        self.model, self.runs = model, 0
        functools.update_wrapper(self, model)

    def __call__(self) -> None:
        self.runs += 1
        self.model()


class FirstStepError(Exception):
    """Raised in place of the first step of a fit."""


def runs_of(model: Callable) -> dict[str, int]:
    """How often a model runs, by what is done with it."""
    found, counted = {}, Counted(model)
    with patch("torch.optim.Adam.step", side_effect=FirstStepError), pytest.raises(FirstStepError):
        pf.fit_guide(counted, pf.AutoPlanarFlow(counted), seed=0, progress=False)
    found["fit_guide, before its first step"] = counted.runs
    guide = pf.AutoPlanarFlow(counted).setup()
    options = {"num_samples": 500, "max_sets": 1}
    calls = {
        "to_arviz, 50 draws": lambda: pf.to_arviz(counted, guide, num_samples=50),
        "diagnose, with advice": lambda: pf.diagnose(counted, guide, **options),
    }
    for name, call in calls.items():
        counted.runs = 0
        call()
        found[name] = counted.runs
    counted.runs = 0
    advice = {"find_funnels": lambda *_: {}, "advice_on_fit": lambda *_: []}
    with patch.multiple("pyroflow.diagnostics.diagnose", **advice):
        pf.diagnose(counted, guide, **options)
    found["diagnose"] = counted.runs
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_model_runs_seldom(model: Callable) -> None:
    found = runs_of(model)
    assert found.keys() == MOST_RUNS.keys()
    assert {name: runs for name, runs in found.items() if runs > MOST_RUNS[name]} == {}


def test_size() -> None:
    assert sum(source.lines for source in sources()) <= MAX_LINES
    assert len(sources()) <= MAX_FILES


def test_no_file_is_long() -> None:
    assert [str(s.path) for s in sources() if s.lines > LONGEST_FILE] == []


def test_no_class_is_long() -> None:
    assert long_classes() == {}


def test_no_function_takes_many_arguments() -> None:
    assert many_arguments().keys() <= MANY_ARGUMENTS.keys()


def test_imports_go_one_way() -> None:
    for source in sources():
        assert source.part in MAY_IMPORT, f"say in MAY_IMPORT what {source.part!r} may import"
        for part in parts_imported(source) - MAY_IMPORT[source.part]:
            assert (str(source.path), part) in EXCEPTIONS, f"{source.path} imports {part}"
    TopologicalSorter(import_graph()).prepare()  # raises CycleError


def test_modules_do_not_import_each_other() -> None:
    graph = {}
    for source in sources():
        name = ".".join(("pyroflow", *source.path.with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = {i.module for i in imports(source) if i.at_top}
    TopologicalSorter(graph).prepare()  # raises CycleError


def report() -> str:
    """The counts, and what each part imports, from the ones that import nothing upwards."""
    lines = sum(source.lines for source in sources())
    longest_file = max(sources(), key=lambda source: source.lines)
    longest_class, size = list(long_classes(0).items())[-1]
    many = many_arguments()
    rows = {
        "lines": f"{lines:,} (at most {MAX_LINES:,})",
        "files": f"{len(sources())} (at most {MAX_FILES})",
        "longest file": f"{longest_file.path}, {longest_file.lines} (at most {LONGEST_FILE})",
        "longest class": f"{longest_class}, {size} (at most {LONGEST_CLASS})",
        f"more than {MOST_ARGUMENTS} arguments": ", ".join(f"{n} {k}" for n, k in many.items()),
    }
    found = [runs_of(model) for model in MODELS]
    for name, most in MOST_RUNS.items():
        runs = " and ".join(str(counts[name]) for counts in found)
        rows[f"runs of eight schools: {name}"] = f"{runs} (at most {most})"
    text = [f"{label:<56} {value}".rstrip() for label, value in rows.items()]
    text += ["", f"{'part':<12} {'files':>5} {'lines':>6}  imports"]
    graph = import_graph()
    for part in TopologicalSorter(graph).static_order():
        sizes = [source.lines for source in sources() if source.part == part]
        names = ", ".join(sorted(graph[part]))
        text.append(f"{part:<12} {len(sizes):>5} {sum(sizes):>6,}  {names}".rstrip())
    return "\n".join(text)


if __name__ == "__main__":
    print(report())
