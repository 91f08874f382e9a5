"""What AmortizedPlanarGuide refuses."""

import math
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import Y, effects_model, exact_guide, rows_model
from torch import Tensor, nn

import pyroflow as pf


def in_two_plates(y: Tensor) -> None:
    with pyro.plate("rows", 20, dim=-1), pyro.plate("times", 3, dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def other_subsampled(y: Tensor) -> None:
    with pyro.plate("rows", 20, subsample_size=5):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 8, subsample_size=2):
        pyro.sample("c", dist.Normal(0.0, 1.0))


def discrete(y: Tensor) -> None:
    with pyro.plate("rows", 20):
        pyro.sample("k", dist.Bernoulli(0.5))


def varying_support(y: Tensor) -> None:
    with pyro.plate("rows", 20, subsample_size=5) as index:
        pyro.sample("z", dist.Uniform(-1.0, 1.0 + y[index]))


def nothing(y: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    ("model", "plate", "error", "expected"),
    [
        (rows_model, "row", ValueError, "'row'; those of the model are in: 'rows'"),
        (in_two_plates, "rows", ValueError, r"'z' lies in plate 'times'.*to_event"),
        (other_subsampled, "rows", ValueError, r"'c'.*'columns'.* 2 of 8 .*in full"),
        (discrete, "rows", ValueError, r"'k'.*hide"),
        (varying_support, "rows", ValueError, "'z' has a support that differs"),
        (nothing, "rows", RuntimeError, "no latent"),
    ],
)
def test_models_that_it_cannot_treat_are_refused(
    model: Callable, plate: str, error: type, expected: str
) -> None:
    guide = pf.AmortizedPlanarGuide(model, plate, "y")
    for _ in range(2):
        with pytest.raises(error, match=expected):
            guide(Y)


def test_bad_contexts_are_refused() -> None:
    make = pf.AmortizedPlanarGuide
    with pytest.raises(ValueError, match=r"got 'x'; it has 'y', 'batch', 'index'"):
        make(rows_model, "rows", "x")
    with pytest.raises(TypeError, match="context must be the name"):
        make(rows_model, "rows", 3)
    with pytest.raises(TypeError, match="plate must be the name"):
        make(rows_model, pyro.plate("rows", 20))
    with pytest.raises(ValueError, match="encoder needs"):
        make(rows_model, "rows", encoder=nn.Identity())
    with pytest.raises(ValueError, match="needs the model's argument 'index'"):
        make(rows_model, "rows", "index")(Y)
    with pytest.raises(ValueError, match="all 20 rows of the plate, or the 5 drawn ones, got 7"):
        make(rows_model, "rows", lambda y, *rest: y[:7])(Y)
    with pytest.raises(ValueError, match="NaN or inf"):
        make(rows_model, "rows", "y")(torch.where(Y == 3, math.nan, Y))
    with pytest.raises(ValueError, match="encoder must return one feature vector a row"):
        make(rows_model, "rows", "y", encoder=nn.Identity())(Y)
    guide = make(rows_model, "rows", lambda y, *rest: y[:, None] * torch.ones(len(rest) + 1))
    guide(Y)
    with pytest.raises(ValueError, match=r"must have 1 numbers a row.*got rows of shape \(2,\)"):
        guide(Y, 5)


def test_table_has_no_place_for_new_rows() -> None:
    guide = pf.AmortizedPlanarGuide(effects_model, "rows").setup(Y)
    with pytest.raises(ValueError, match=r"has 7 rows.* learned those of 20.*context"):
        guide(Y[:7])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", -1),
        ("global_layers", 1.5),
        ("affine", None),
        ("init_scale", 0.0),
        ("hidden_dims", 64),
        ("hidden_dims", (64, 0)),
    ],
)
def test_bad_options_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        pf.AmortizedPlanarGuide(rows_model, "rows", **{name: value})


def test_state_dict_before_setup_and_pickle_before_setup_say_what_to_do() -> None:
    guide = pf.AmortizedPlanarGuide(rows_model, "rows", "y")
    with pytest.raises(RuntimeError, match="setup"):
        guide.load_state_dict(exact_guide().state_dict())
    with pytest.raises(RuntimeError, match="pickled before"):
        pickle.loads(pickle.dumps(guide))(Y)
