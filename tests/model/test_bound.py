"""What one run of a model and its guide says of both."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw


def grouped(y: Tensor, rows: int | None = None) -> None:
    shift = pyro.param("shift", torch.tensor(0.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -loc.square())
    with pyro.plate("groups", 2, dim=-2), pyro.plate("rows", len(y), subsample_size=rows) as index:
        effect = pyro.sample("effect", dist.Normal(loc + shift, 1.0))
        pyro.deterministic("twice", 2 * effect)
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y[index].expand(2, -1))


def plain() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


def test_structure_is_read_off_one_run() -> None:
    y = torch.arange(3.0)
    bound = BoundModel(grouped, AutoNormal(grouped), (y,))
    assert (bound.latents, bound.observed) == (["loc", "effect"], ["y"])
    assert {name: frame.dim for name, frame in bound.plates.items()} == {"groups": -2, "rows": -1}
    assert bound.depth == bound.max_plate_nesting == 2
    assert bound.learns
    assert not bound.subsampled


def test_rows_that_are_drawn_are_seen_and_refused_for_weights() -> None:
    y = torch.arange(3.0)
    assert BoundModel(grouped, AutoNormal(grouped), (y, 2)).subsampled == ["rows"]
    with pytest.raises(ValueError, match="plate 'rows' takes 2 of 3 rows a run"):
        BoundModel.for_weights(grouped, AutoNormal(grouped), (y, 2))


def test_fingerprint_is_of_the_model_and_its_arguments() -> None:
    y = torch.arange(3.0)
    first = BoundModel(grouped, args=(y,)).fingerprint
    pyro.get_param_store()["shift"] = torch.tensor(5.0)  # as a fit moves it
    assert BoundModel(grouped, args=(y,)).fingerprint == first
    assert BoundModel(grouped, args=(y + 1,)).fingerprint != first


def test_the_inspected_draw_is_compared_only_where_later_runs_repeat_it() -> None:
    bound = BoundModel(plain, AutoNormal(plain))
    (slope,) = bound.runs.inspected.slopes.values()
    loc = bound.guide_trace.nodes["loc"]["value"]
    assert torch.allclose(slope, 1 - 2 * loc)
    assert BoundModel(grouped, AutoNormal(grouped), (torch.ones(3),)).runs.inspected is None


def test_parameters_that_moved_since_do_not_make_draws_run_one_by_one() -> None:
    bound = BoundModel(grouped, AutoNormal(grouped), (torch.ones(3),))
    pyro.get_param_store()["shift"] = torch.tensor(5.0)
    draws = draw(bound, 20, seed=0)
    assert not bound.sequential
    effect = draws.sites["effect"]
    expected = dist.Normal(draws.sites["loc"][:, None, None] + 5, 1.0).log_prob(effect).sum((1, 2))
    expected = expected + dist.Normal(0.0, 1.0).log_prob(draws.sites["loc"])
    expected = expected - draws.sites["loc"].square()
    expected = expected + dist.Normal(effect, 1.0).log_prob(torch.tensor(1.0)).sum((1, 2))
    assert torch.allclose(draws.log_p, expected)


def test_a_model_that_cannot_be_differentiated_is_inspected_all_the_same() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.tensor(z.numpy() * 2), 1.0), obs=torch.tensor(1.0))

    bound = BoundModel(model, AutoNormal(model))
    draws = draw(bound, 5, seed=0)
    assert bound.runs.inspected is None
    assert bound.sequential
    z = draws.sites["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(2 * z, 1.0).log_prob(torch.ones(()))
    assert torch.allclose(draws.log_p, expected)
