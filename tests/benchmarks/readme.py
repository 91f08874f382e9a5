"""Write the tables of README.md, the pages and notebooks/results/README.md from stored results.

``make tables`` fills what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from pyroflow.io import write_whole
from rezende_mohamed_2015 import figure3, mnist_drawing
from rezende_mohamed_2015 import tables as paper
from rezende_mohamed_2015.__main__ import EXPERIMENTS

from . import densities, family, group_scale, posteriors, scale, trust
from .device import __main__ as device
from .posteriordb import table as posteriordb
from .runs import POSTERIOR, RIGHT, within
from .speed import table as speed
from .tables import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results"
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("index", "which_guide", "trust"))
FILES = (ROOT / "README.md", RESULTS / "README.md", *PAGES)
REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FORMS = ("non-centred", "centred")
GAUSSIANS = ("AutoNormal", "AutoMultivariateNormal")


def stored(name: str) -> dict[str, Any]:
    """The numbers of ``notebooks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def filled(text: str) -> str:
    """A Markdown text with its tables as the stored results have them.

    Raises:
        KeyError: If the text names a table that is not in ``TABLES``.
    """
    return REGION.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def accuracy() -> str:
    """Three seeds of each fit with the defaults."""
    rows = [
        {
            "": f"{case}: {'KL(q‖p)' if case.startswith('toy') else 'NLL above the floor'}, nats",
            "seeds 0 / 1 / 2": " / ".join(
                f"{run.get('gap', run.get('KL')):.4f}" for run in seeds.values()
            ),
            "exact": "0",
            "seconds": paper.span([run["seconds"] for run in seeds.values()]),
        }
        for case, seeds in stored("accuracy").items()
        if case != "threads"
    ]
    return markdown(pd.DataFrame(rows))


def demo() -> str:
    """The three targets of the demo beside Gaussian guides."""
    stages = stored("demo")["stages"]
    sine, toy, schools = (stages[name] for name in ("sine", "toy", "eight_schools"))
    rows = [
        ("sine density: NLL above the floor, nats", f"{sine['gap_nats']:.4f}", "0",
         f"full Gaussian {sine['gap_of_full_gaussian_nats']:.4f}"),
        ("sine density: sd of x1 − sin x2 in samples", f"{sine['sd_of_noise_in_samples']:.4f}",
         "0.1", f"full Gaussian {sine['rows'][1]['rival']:.4f}"),
        ("toy posterior: KL, nats", f"{toy['planar']['kl']:.4f}", "0",
         ", ".join(f"{name} {toy[name]['kl']:.4f}" for name in ("mean field", "full Gaussian"))),
    ]  # fmt: skip
    for form in FORMS:
        for label, cell, exact in (
            ("ELBO, nats", _elbo, f"{schools['log_evidence']:.3f}"),
            ("worst error of a mean, in sds / of an sd", _errors, "0"),
        ):
            rivals = ", ".join(f"`{name}` {cell(schools[form][name])}" for name in GAUSSIANS)
            name = f"eight schools, {form}: {label}"
            rows.append((name, cell(schools[form]["planar"]), exact, rivals))
    columns = ["", "pyroflow, K = 32", "exact", "rivals in the same run"]
    return markdown(pd.DataFrame(rows, columns=columns))


def _elbo(run: dict[str, Any]) -> str:
    return f"{run['elbo']:.3f}"


def _errors(run: dict[str, Any]) -> str:
    return f"{run['worst_mean_error_sd']:.4f} / {run['worst_sd_error']:.1%}"


def direction() -> str:
    """Each direction of a flow on a density and on an energy."""
    rows = [
        {
            "": case,
            "data to base": f"{found['data_to_base']:.3f}",
            "base to data": f"{found['base_to_data']:.3f}",
            "seconds, base to data / data to base": f"{list(found.values())[2]:.2f}",
        }
        for case, found in stored("direction").items()
    ]
    return markdown(pd.DataFrame(rows))


def steps() -> str:
    """Milliseconds of a step of ours, and of Pyro's SVI; few latents, then many."""
    found = stored("steps")
    parts = {n: v for n, v in found.items() if isinstance(v, dict) and "times ours" in v}
    parts = {"eight schools": found} | parts
    rows = [
        {
            "model": model,
            "a step with": name,
            "milliseconds": f"{milliseconds:.2f}",
            "times ours": f"{part['times ours'][name]:.2f}",
        }
        for model, part in parts.items()
        for name, milliseconds in part["milliseconds a step"].items()
    ]
    return markdown(pd.DataFrame(rows))


def experiment(name: str) -> str:
    """An experiment of the paper, below its command and the machines that it was run on."""
    report = paper.load(name, RESULTS)
    where = "; ".join(sorted({run["machine"] for run in report["runs"]}))
    table = markdown(paper.frame(name, report))
    data = " --data DIR" * ("--data" in EXPERIMENTS[name])
    return f"`python -m rezende_mohamed_2015 {name}{data}` ({where})\n\n{table}"


def summary() -> str:
    """README's rows: what each command found, beside what is known or a rival's."""
    stages = stored("demo")["stages"]
    sine, toy, schools = (stages[name] for name in ("sine", "toy", "eight_schools"))
    rivals = (sine["gap_of_full_gaussian_nats"], toy["full Gaussian"]["kl"])
    rows = [
        ("sine density, K = 32: NLL above the floor, nats", sine["gap_nats"], rivals[0]),
        ("toy posterior, K = 32: KL, nats", toy["planar"]["kl"], rivals[1]),
    ]
    rows = [(name, f"{ours:.3f}", f"exact 0; full Gaussian {g:.3f}") for name, ours, g in rows]
    for form in FORMS:
        exact = f"exact {schools['log_evidence']:.3f}"
        rival = f"`AutoMultivariateNormal` {_elbo(schools[form]['AutoMultivariateNormal'])}"
        ours = _elbo(schools[form]["planar"])
        rows.append((f"eight schools, {form}, K = 32: ELBO, nats", ours, f"{exact}; {rival}"))
    rows = [(*row, "`make demo`") for row in rows]
    rows += _rows_of_one_call()
    rows += [*_rows_of_the_paper(), _speed([10000, 40, 32]), _speed([1000, 2, 32])]
    return markdown(pd.DataFrame(rows, columns=["", "pyroflow", "beside it", "made by"]))


def _rows_of_one_call() -> list[tuple[str, ...]]:
    """How often ``posterior`` is right, and how often its verdict is not."""
    found = stored("trust")["results"][POSTERIOR].values()
    records = [record for seeds in found for record in seeds.values()]
    wrong, alarms, _ = (line.partition(": ")[2] for line in trust.rates(records))
    beside = f"{len(found)} posteriors with exact answers"
    rows = [
        ("`posterior`: called good or usable, and wrong", wrong, beside, "`make trust`"),
        ("`posterior`: right, and called bad", alarms, beside, "`make trust`"),
    ]
    found = stored("posteriors")["results"][POSTERIOR].values()
    records = [record for seeds in found for record in seeds.values()]
    right = sum(within(record, RIGHT) for record in records)
    beside = f"seconds, median and worst: {_seconds(records)}"
    text = "`posterior`: means within 0.1 sd, sds within 10 %"
    return [*rows, (text, f"{right} of {len(records)}", beside, "`make posteriors`")]


def _seconds(records: list[dict[str, Any]]) -> str:
    seconds = [record["seconds"] for record in records]
    return f"{median(seconds):.0f} and {max(seconds):.0f}"


def _rows_of_the_paper() -> list[tuple[str, ...]]:
    cells = figure3.summarise(paper.load("figure3", RESULTS)["runs"])
    kl = cells[(cells.energy == "U1") & (cells.K == 32)].set_index("kind")["median"]
    draws, runs = next(iter(mnist_drawing.by_draws(paper.load("mnist", RESULTS)["runs"]).items()))
    nll = mnist_drawing.curves(runs, "planar", "nll")
    theirs = mnist_drawing.PAPER["planar"]["nll"][-1]
    energy, images = (
        "Figure 3 of the paper, U1, K = 32: KL, nats",
        f"MNIST, {draws} draws, K = 80: −ln p, nats",
    )
    nice = f"NICE {kl['NICE orthogonal']:.3f}"
    return [
        (energy, f"{kl['planar']:.3f}", nice, "`make paper`"),
        (images, f"{nll[80]:.2f}", f"the paper {theirs:.2f}", "`make paper`"),
    ]


def _speed(shape: list[int]) -> tuple[str, ...]:
    (found,) = [found for found in stored("benchmarks")["shapes"] if found["shape"] == shape]
    ours = found["milliseconds"]["train"]["pyroflow"]["median"]
    rivals = ("Pyro chain", "normflows", "flowjax")
    ratios = [found["ratios"][f"{rival} / ours, train"]["median"] for rival in rivals]
    times = ", ".join(
        f"{rival} {speed.number(t)} times" for rival, t in zip(rivals, ratios, strict=True)
    )
    name = f"values and gradients, N, D, K = {', '.join(map(str, shape))}"
    return name, f"{speed.number(ours)} ms", times, "`make bench`"


def part(name: str, *starts: str) -> str:
    """The head of another table, and the rows that start so."""
    lines = TABLES[name]().splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("| --- "))
    rows = list(takewhile(lambda line: line.startswith("|"), lines[rule + 1 :]))
    found = [row for start in starts for row in rows if row.startswith(f"| {start}")]
    return "\n".join([*lines[rule - 1 : rule + 1], *found])


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "accuracy": accuracy,
    "demo": demo,
    "direction": direction,
    "steps": steps,
    "posteriordb": lambda: posteriordb.markdown(stored("posteriordb")),
    "posteriors": lambda: posteriors.markdown(stored("posteriors")),
    "trust": lambda: trust.markdown(stored("trust")),
    "scale": lambda: scale.markdown(stored("scale")),
    "densities": lambda: densities.markdown(stored("densities")),
    "device": lambda: device.markdown(stored("device")),
    "groups": lambda: group_scale.markdown(stored("scale")),
    "speed": lambda: speed.markdown(stored("benchmarks")),
    "family": lambda: markdown(family.frame(stored("family"))),
    **{name: partial(experiment, name) for name in paper.TABLES},
    "verdicts": partial(part, "summary", "`posterior`"),
    "chains": partial(
        part,
        "posteriors",
        "modes-60_40_5",
        "eight_schools-eight_schools_centered",
        "hudson_lynx_hare",
        "irt-2pl",
        "groups-thousand_1002",
    ),
    "rivals": partial(
        part,
        "posteriordb",
        "hudson_lynx_hare",
        "gp_pois_regr",
        "eight_schools-eight_schools_centered",
    ),
}


if __name__ == "__main__":
    for file in FILES:
        write_whole(file, filled(file.read_text(encoding="utf-8")).encode())
