"""What objects show of themselves: as text, in notebooks, and to ``help`` and ``dir``."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow

import pyroflow as pf
from pyroflow.guides.mixture import MixtureGuide

Y = torch.linspace(-1, 1, 4)


def model(y: torch.Tensor = Y) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def fitted() -> pf.Flow:
    flow = pf.planar_flow(2, 4, direction="base_to_data").double()
    flow.initialize(torch.randn(9, 2))
    return flow


def mixture() -> MixtureGuide:
    parts = [pf.AutoPlanarFlow(model, 1).setup() for _ in range(2)]
    return MixtureGuide(model, parts, torch.tensor([0.25, 0.75]))


def amortised() -> pf.AmortizedPlanarGuide:
    return pf.AmortizedPlanarGuide(model, "rows", num_layers=1).setup()


def fit() -> pf.Fit:
    options = {"steps": 5, "polish": 0, "seed": 0, "progress": False}
    return pf.fit_density(pf.planar_flow(2, 1), torch.randn(50, 2), **options)


def report() -> pf.Report:
    return pf.diagnose(model, pf.AutoPlanarFlow(model, 1).setup(), num_samples=200, max_sets=1)


def chains() -> pf.Chains:
    guide = pf.AutoPlanarFlow(model, 0).setup()
    options = {"num_chains": 4, "method": "independence", "progress": False}
    return pf.mcmc(model, guide, num_samples=20, **options)


def calibration() -> pf.Calibration:
    options = {"num_simulations": 2, "num_samples": 9, "steps": 2, "seed": 0, "progress": False}
    return pf.calibrate(model, pf.AutoPlanarFlow, **options)


def posterior() -> pf.Posterior:
    return pf.posterior(model, num_samples=1000, progress=False)


FLOW = "layers Planar(2, num_layers=4), Affine(2) direction base to data, in closed form"
SITES = "latents 5 numbers: mu (), z (4,)"
SHOWN: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "flow": (lambda: pf.planar_flow(2, 4), ["Planar(2, num_layers=4).inv", "the first fit may"]),
    "fitted flow": (fitted, ["numbers 2 ", FLOW, "28 float64 on cpu", "fitted yes"]),
    "conditional": (lambda: pf.planar_flow(2, context_dim=3), ["numbers 2, given a context of 3"]),
    "Planar": (lambda: pf.Planar(2, 3), ["Planar(2, num_layers=3)"]),
    "Affine": (lambda: pf.Affine(2), ["Affine(2)"]),
    "Radial": (lambda: pf.Radial(2), ["Radial(2, num_layers=1)"]),
    "SinhArcsinh": (lambda: pf.SinhArcsinh(2), ["SinhArcsinh(2)"]),
    "Sylvester": (lambda: pf.Sylvester(5, 3, 2), ["Sylvester(5, num_units=3, num_layers=2)"]),
    "ConditionalSylvester": (
        lambda: pf.ConditionalSylvester(5, 3, 2),
        ["ConditionalSylvester(5, context_dim=3, num_units=2, num_layers=1)"],
    ),
    "new guide": (
        lambda: pf.AutoPlanarFlow(model),
        ["AutoPlanarFlow of model", "not known before"],
    ),
    "guide": (
        lambda: pf.AutoPlanarFlow(model, 2).setup(),
        [SITES, "Planar(5, ", "by no fit_ function"],
    ),
    "structured": (
        lambda: pf.AutoStructuredFlow(model).setup(),
        [
            SITES,
            "Leading(Sylvester(1, num_units=1, num_layers=4), 5), SinhArcsinh(5), Arrowhead(5)",
        ],
    ),
    "amortised": (amortised, [SITES, "rows of rows fitted no"]),
    "mixture": (mixture, [SITES, "2, by weight: AutoPlanarFlow 0.25, AutoPlanarFlow 0.75"]),
    "fit": (fit, ["best loss", " nats", "all 5 steps done"]),
    "report": (report, ["verdict ", "ELBO ", " nats ", "try next"]),
    "chains": (chains, ["4 chains of 20", "by independence"]),
    "calibration": (calibration, ["2 data sets are too few", "mu "]),
    "posterior": (posterior, ["verdict", " sd, the largest", "tried"]),
}


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "name", [slow(n) if n in ("calibration", "posterior") else n for n in SHOWN]
)
def test_text_and_html_say_the_same(name: str) -> None:
    make, expected = SHOWN[name]
    shown = make()
    text = " ".join(repr(shown).split())
    for words in expected:
        assert words in text + " "
    assert str(shown) == repr(shown)
    cells = _Cells()
    cells.feed(shown._repr_html_())
    assert cells.open == []
    assert " ".join(cells.text.split()) == text
    assert inspect.getdoc(shown) == inspect.cleandoc(vars(type(shown))["__doc__"])
    assert pydoc.render_doc(shown).count(type(shown).__name__)


def test_a_guide_out_of_a_file_names_no_model(tmp_path: Path) -> None:
    for guide in (pf.AutoPlanarFlow(model, 1).setup(), mixture()):
        pf.save(guide, tmp_path / "guide.pt")
        assert repr(pf.load(tmp_path / "guide.pt")).startswith(f"{type(guide).__name__}\nlatents")


def test_names_are_escaped() -> None:
    fit = pf.Fit([], [], 1234567.89, 3, "<b>&", 0.0)
    assert "&lt;b&gt;&amp;" in fit._repr_html_()
    assert "1.23457e+06 nats" in repr(fit)


def test_dir_has_the_public_names_and_plots_come_when_asked_for() -> None:
    assert dir(pf) == sorted(pf.__all__)
    with pytest.raises(AttributeError, match="No pyroflow attribute plot"):
        pf.plot  # noqa: B018
    code = (
        "import sys, pyroflow as pf; pf.Flow; assert 'matplotlib' not in sys.modules; "
        "assert callable(pf.plots.plot_losses) and 'matplotlib' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
