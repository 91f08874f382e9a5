"""Guides in files: they sample without model and data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyroflow as pf
from tests.saved_cases import Y, assert_same, draws, made, moved, returned, schools

GUIDES = {
    "planar": lambda: pf.AutoPlanarFlow(schools, 3),
    "planar-diagonal": lambda: pf.AutoPlanarFlow(schools, 3, affine="diagonal", init_scale=0.5),
    "planar-bare": lambda: pf.AutoPlanarFlow(schools, 3, affine=None),
    "planar-K0": lambda: pf.AutoPlanarFlow(schools, 0),
    "planar-student": lambda: pf.AutoPlanarFlow(schools, 3, base_df=7.0),
    "planar-tails": lambda: pf.AutoPlanarFlow(schools, 3, tails=True),
    "planar-K0-tails": lambda: pf.AutoPlanarFlow(schools, 0, tails=True),
    "planar-auto": lambda: pf.AutoPlanarFlow(schools, "auto"),
    "sylvester": lambda: pf.AutoSylvesterFlow(schools, num_layers=2),
    "sylvester-tails": lambda: pf.AutoSylvesterFlow(schools, num_layers=2, tails=True),
    "sylvester-qr": lambda: pf.AutoSylvesterFlow(schools, 3, 2, orthogonal="qr"),
    "flow": lambda: pf.AutoFlow(schools, lambda dim: [pf.Radial(dim, 2), pf.Planar(dim, 2).inv]),
    "flow-foreign": lambda: pf.AutoFlow(
        schools, lambda dim: [dist.transforms.affine_autoregressive(dim), pf.Sylvester(dim, 2)]
    ),
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_samples_without_its_model(name: str, tmp_path: Path) -> None:
    guide = GUIDES[name]()
    guide(Y)
    loaded = returned(moved(guide), tmp_path)
    assert type(loaded) is type(guide)
    assert_same(draws(guide, Y), here := draws(loaded))
    assert here["mu"].shape == (5, 1)
    assert here["theta"].shape == (5, 8)
    assert_same(guide.median(), loaded.median())
    assert_same(guide.quantiles([0.1, 0.9]), loaded.quantiles([0.1, 0.9]))
    assert torch.equal(guide.log_prob(here), loaded.log_prob(here))
    assert (loaded.affine is None) == (guide.affine is None)
    options = ["affine_kind", "init_scale", "base_df", "num_layers", "grows", "num_units", "tails"]
    for option in options:
        assert getattr(loaded, option, None) == getattr(guide, option, None)


def test_a_guide_that_has_grown_comes_back_grown(tmp_path: Path) -> None:
    guide = made(num_layers="auto")
    guide.grow(2)
    loaded = returned(moved(guide), tmp_path)
    assert loaded.num_layers == 6
    assert loaded.grows
    assert_same(draws(guide, Y), draws(loaded))
    loaded.grow(1)
    guide.grow(1)
    assert loaded.planar.w.shape == (7, 10)


def test_a_guide_without_latents_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never set up.*call it once with the model's arguments"):
        pf.save(pf.AutoPlanarFlow(schools), tmp_path / "guide.pt")


def test_other_guides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="one of the guides AutoFlow.* got AutoNormal"):
        pf.save(AutoNormal(schools), tmp_path / "guide.pt")


def bounded() -> None:
    pyro.sample("a", dist.Uniform(torch.zeros(3), 2.0).to_event(1))
    pyro.sample("b", dist.Dirichlet(torch.ones(3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_guide_changes_device(tmp_path: Path) -> None:
    guide = made(bounded, ())
    there = draws(guide)
    pf.save(guide.to("cuda"), tmp_path / "guide.pt")
    assert_same(draws(pf.load(tmp_path / "guide.pt")), there)
    moved_to = draws(pf.load(tmp_path / "guide.pt", device="cuda"))
    assert {value.device.type for value in moved_to.values()} == {"cuda"}


FRESH = """
import sys, torch, pyro, pyroflow as pf
guide = pf.load(sys.argv[1])
pyro.set_rng_seed(5)
with torch.no_grad(), pyro.plate("draws", 5, dim=-2):
    draws = guide()
torch.save({name: value.clone() for name, value in draws.items()}, sys.argv[2])
"""


def test_a_fresh_process_has_the_same_draws(tmp_path: Path) -> None:
    guide = made()
    pf.save(guide, tmp_path / "guide.pt")
    files = [str(tmp_path / "guide.pt"), str(tmp_path / "draws.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, timeout=120)
    assert_same(draws(guide, Y), torch.load(tmp_path / "draws.pt", weights_only=True))


def test_data_do_not_travel(tmp_path: Path) -> None:
    secret = 123456.789 + torch.arange(8.0)
    guide = made(args=(secret,))
    with torch.no_grad():
        for p in guide.parameters():
            p.zero_()
    pf.save(guide, tmp_path / "guide.pt")
    content = (tmp_path / "guide.pt").read_bytes()
    assert not any(value.numpy().tobytes() in content for value in secret)
