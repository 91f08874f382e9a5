"""Names of dimensions, labels, arguments and predictions in what ArviZ gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_groups import rows, variables
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.targets import (
    eight_schools_noncentered,
)


def model_with_labels(
    x: Tensor, y: Tensor, parts: dict[str, Any], *more: Tensor, **rest: Any
) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    pyro.deterministic("centred", weights - weights.mean())
    with pyro.plate("groups", 4, dim=-2), pyro.plate("rows", 5, dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        pyro.deterministic("doubled", 2 * level)
        both = pyro.sample("both", dist.Normal(level[..., None], 1.0).expand((4, 5, 2)).to_event(1))
        pyro.deterministic("total", both.sum(-1), event_dim=0)
        loc = torch.stack([level, level, level], -1)
        pyro.sample(
            "y", dist.MultivariateNormal(loc, torch.eye(3)), obs=y, infer={"event_dims": ["axis"]}
        )


def label_arguments() -> tuple[tuple, dict[str, Any]]:
    y = torch.arange(60.0).reshape(4, 5, 3) / 60
    args = torch.ones(4, 2), y, {"size": torch.tensor(7), "name": "n"}, torch.zeros(1)
    return args, {"extra": np.ones(2), "flag": True}


def test_names_of_plates_event_dims_and_arguments() -> None:
    args, kwargs = label_arguments()
    idata = pf.to_arviz(
        model_with_labels, AutoNormal(model_with_labels), args, kwargs, num_samples=20
    )
    dims = {name: array.dims[2:] for name, array in variables(idata, "posterior").items()}
    assert dims == {
        "weights": ("weights_dim_0",),
        "centred": ("centred_dim_0",),
        "level": ("groups", "rows"),
        "doubled": ("groups", "rows"),
        "both": ("groups", "rows", "both_dim_0"),
        "total": ("groups", "rows"),
    }
    assert idata["observed_data"]["y"].dims == ("groups", "rows", "axis")
    assert idata["posterior_predictive"]["y"].dims == ("chain", "draw", "groups", "rows", "axis")
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "groups", "rows")
    level, y = rows(idata, "posterior", "level"), args[1]
    expected = dist.Normal(level[..., None], 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(rows(idata, "log_likelihood", "y"), expected)
    constants = variables(idata, "constant_data")
    assert {name: array.dims for name, array in constants.items()} == {
        "x": ("x_dim_0", "x_dim_1"),
        "size": (),
        "more_0": ("more_0_dim_0",),
        "extra": ("extra_dim_0",),
    }


def test_own_names_and_labels() -> None:
    args, kwargs = label_arguments()
    idata = pf.to_arviz(
        model_with_labels,
        AutoNormal(model_with_labels),
        args,
        kwargs,
        num_samples=10,
        dims={"weights": ["kind"], "y": ["groups", "rows", "side"], "x": ["groups", "column"]},
        coords={"groups": list("abcd"), "kind": ["u", "v", "w"]},
    )
    assert idata["posterior"]["weights"].sel(kind="v").shape == (1, 10)
    assert idata["posterior"]["both"].sel(groups="d").shape == (1, 10, 5, 2)
    assert idata["constant_data"]["x"].sel(groups="a").shape == (2,)
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "groups", "rows")
    assert idata["observed_data"]["y"].dims == ("groups", "rows", "side")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be an integer of at least 1, got 0"),
        ({"dims": {"thetas": ["a"]}}, ValueError, r"dims has an entry 'thetas', expected some of"),
        ({"dims": {"theta": ["a", "b"]}}, ValueError, r"dims\['theta'\] must name 1 dimensions"),
        ({"dims": {"theta": "school"}}, TypeError, r"dims\['theta'\] must be a list of names"),
        ({"coords": {"school": range(8)}}, ValueError, "coords has an entry 'school', expected"),
        ({"coords": {"schools": "abc"}}, ValueError, r"coords\['schools'\] must be a list of 8"),
        (
            {"predictions_coords": {"schools": range(8)}},
            ValueError,
            "predictions_coords has an entry 'schools'",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    guide = AutoNormal(eight_schools_noncentered)
    with pytest.raises(error, match=message):
        pf.to_arviz(eight_schools_noncentered, guide, **{"num_samples": 5, **options})


@pytest.mark.parametrize(("outer", "inner"), [("draw", "chain"), ("chain", "draw")])
def test_a_plate_named_like_a_sample_dimension(outer: str, inner: str) -> None:
    def model() -> None:
        with pyro.plate(outer, 2, dim=-2), pyro.plate(inner, 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(2, 3))

    idata = pf.to_arviz(model, AutoNormal(model), num_samples=4)
    plates = (f"{outer}_plate", f"{inner}_plate")
    assert idata["posterior"]["loc"].dims == ("chain", "draw", *plates)
    assert idata["observed_data"]["y"].dims == plates


def regression(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        pyro.sample("y", dist.Normal(mean, 0.01), obs=y)


def test_predictions_for_new_arguments() -> None:
    x, new = torch.linspace(-1, 1, 6), torch.tensor([10.0, 20.0])
    idata = pf.to_arviz(
        regression,
        AutoNormal(regression),
        (x,),
        {"y": 2 * x},
        num_samples=40,
        coords={"rows": list("abcdef")},
        predictions_args=(new,),
    )
    slope = rows(idata, "posterior", "slope")
    assert idata["predictions"]["y"].dims == ("chain", "draw", "rows")
    np.testing.assert_array_equal(idata["predictions"]["rows"], [0, 1])
    torch.testing.assert_close(rows(idata, "predictions", "mean"), slope[:, None] * new)
    assert (rows(idata, "predictions", "y") - slope[:, None] * new).abs().max() < 0.05
    np.testing.assert_array_equal(idata["predictions_constant_data"]["x"], new)
    assert list(idata["constant_data"].data_vars) == ["x"]
    np.testing.assert_array_equal(idata["posterior"]["rows"], list("abcdef"))


def test_predictions_that_would_need_other_latents_are_refused() -> None:
    guide = AutoNormal(eight_schools_noncentered)
    two = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match=r"site 'theta_trans' has shape \(8,\).* and \(2,\)"):
        pf.to_arviz(eight_schools_noncentered, guide, num_samples=5, predictions_args=two)


def test_modules_and_handlers_keep_the_names_of_their_arguments() -> None:
    class Module(pyro.nn.PyroModule):
        def forward(self, x: Tensor, y: Tensor) -> None:
            regression(x, y)

    x = torch.linspace(-1, 1, 3)
    for model in (Module(), poutine.scale(regression, 2.0), poutine.mask(Module(), mask=True)):
        idata = pf.to_arviz(model, AutoNormal(model), (x, 2 * x), num_samples=5)
        assert list(idata["constant_data"].data_vars) == ["x"]


def test_float32_stays(float32: None) -> None:
    x = torch.linspace(-1, 1, 3)
    idata = pf.to_arviz(regression, AutoNormal(regression), (x, 2 * x), num_samples=20)
    assert idata["posterior"]["slope"].dtype == np.float32
    assert idata["constant_data"]["x"].dtype == np.float32


def test_groups_do_not_share_memory_with_the_arguments() -> None:
    x = torch.linspace(-1, 1, 3)
    idata = pf.to_arviz(regression, AutoNormal(regression), (x, 2 * x), num_samples=5)
    x.zero_()
    assert idata["constant_data"]["x"].values[0] == -1
