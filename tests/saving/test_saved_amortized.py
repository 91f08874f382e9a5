"""Files of amortised guides: what comes back draws, knows new rows, and trains on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

import pyroflow as pf
from pyroflow.io import read_data
from tests.saved_cases import assert_same, moved, returned

X = torch.linspace(-2, 2, 24).reshape(12, 2)


def model(x: Tensor, batch: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x[index])


def rows_alone(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)


def two_plates(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    for name, data in (("rows", x), ("columns", x.T)):
        with pyro.plate(name, len(data)):
            z = pyro.sample(f"z_{name}", dist.Normal(0.0, scale))
            pyro.sample(f"x_{name}", dist.Normal(z[..., None], 0.5).to_event(1), obs=data)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False), nn.GELU(), nn.Linear(3, 5))


def made(of: Callable = model, plate: Any = "rows", **options: Any) -> pf.AmortizedPlanarGuide:
    guide = pf.AmortizedPlanarGuide(of, plate, **options)
    torch.manual_seed(0)
    return moved(guide.setup(X))


GUIDES: dict[str, Callable[[], pf.AmortizedPlanarGuide]] = {
    "network": lambda: made(context="x", num_layers=3, global_layers=2, hidden_dims=(8,)),
    "table": lambda: made(affine="diagonal", init_scale=0.3),
    "encoder": lambda: made(context=["x"], encoder=encoder()),
    "no globals": lambda: made(rows_alone, context="x"),
    "rows alone": lambda: made(context="x", condition_on_globals=False, num_layers=0),
    "float64": lambda: made(context="x").double(),
    "two plates": lambda: made(two_plates, ["rows", "columns"], context={"rows": "x"}),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("with_model", [False, True])
def test_it_draws_as_before(name: str, with_model: bool, tmp_path: Path) -> None:
    guide = GUIDES[name]()
    loaded = returned(guide, tmp_path, model=guide._model[1] if with_model else None)
    x = X.to(next(guide.parameters()).dtype)
    pyro.set_rng_seed(3)
    expected = guide(x)
    pyro.set_rng_seed(3)
    assert_same(expected, loaded(x))
    assert_same(guide.median(x), loaded.median(x))
    assert (loaded._local, loaded._both) == (guide._local, guide._both)


def test_new_rows_need_no_model(tmp_path: Path) -> None:
    guide, new = GUIDES["encoder"](), torch.randn(30, 2)
    loaded = returned(guide, tmp_path)
    assert loaded(new)["z"].shape == (30,)
    assert_same(guide.median(new), loaded.median(new))
    assert_same(guide.median(x=new), loaded.median(x=new))  # by name, as in the model's call


def test_it_trains_on_as_before_and_rows_are_drawn_again(tmp_path: Path) -> None:
    guide = pf.AmortizedPlanarGuide(model, "rows", context="x").setup(X, 5)
    loaded, losses = returned(guide, tmp_path, model=model), []
    for one in (guide, loaded):
        svi = SVI(model, one, Adam({"lr": 0.01}), Trace_ELBO())
        pyro.set_rng_seed(1)
        losses.append([svi.step(X, 5) for _ in range(3)])
    assert losses[0] == losses[1]
    assert returned(guide, tmp_path)(X)["z"].shape == (12,)  # no model draws rows, so all are


def test_a_plate_may_draw_other_numbers_of_rows(tmp_path: Path) -> None:
    guide = pf.AmortizedPlanarGuide(model, "rows", context="x").setup(X, 5)
    for of in (guide, pf.AutoStructuredFlow(model).setup(X, 5)):
        for batch in (3, None):
            assert returned(of, tmp_path, model=model)(X, batch)["z"].shape == (batch or 12,)
    assert returned(guide, tmp_path, model=model)(torch.randn(30, 2))["z"].shape == (30,)
    table = returned(pf.AmortizedPlanarGuide(model, "rows").setup(X), tmp_path, model=model)
    with pytest.raises(ValueError, match=r"site 'z' has batch shape \[12\] in the file and \[30\]"):
        table(torch.randn(30, 2))


def by_other_name(data: Tensor) -> None:
    model(data)


def of_vectors(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    pf.save(GUIDES["network"](), tmp_path / "guide.pt")
    with pytest.raises(ValueError, match="arguments of the model, got 'x'; it has 'data'"):
        pf.load(tmp_path / "guide.pt", by_other_name)
    loaded = pf.load(tmp_path / "guide.pt", of_vectors)
    with pytest.raises(ValueError, match="site 'mu' of the file is no latent of the model"):
        loaded(X)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": lambda x: x}, "a function as context.*name the model's arguments"),
        ({"context": "x", "encoder": Doubled()}, "Doubled, which a file cannot describe"),
    ],
)
def test_code_is_refused_and_no_file_is_left(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        pf.save(made(**options), tmp_path / "guide.pt")
    assert not (tmp_path / "guide.pt").exists()


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layers": lambda c: c["options"].update(num_layers=100_000),
    "hidden": lambda c: c["options"].update(hidden_dims=[40_000, 40_000]),
    "features": lambda c: c["rows"][0].update(features=10**9),
    "globals": lambda c: c["rows"][0].update(shared=10**9),
    "a table of rows": lambda c: c["rows"][0].update(context=None),
    "another plate": lambda c: c.update(plates="columns"),
    "a tensor less": lambda c: c["state"].popitem(),
    "a tensor more": lambda c: c["state"].update(more=torch.zeros(3)),
    "no globals": lambda c: c.update({"globals": None}),
    "a position": lambda c: c["rows"][0]["context"].update(positions={"x": "first"}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_the_tensors_do_not_bear_out_is_refused(claim: str, tmp_path: Path) -> None:
    path = tmp_path / "guide.pt"
    pf.save(GUIDES["network"](), path)
    content = read_data(path)
    CLAIMS[claim](content["content"])
    torch.save(content, path)
    with pytest.raises(ValueError, match="damaged file of pyroflow"):
        pf.load(path)
