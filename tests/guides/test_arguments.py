"""A model's arguments by position, as in Pyro's ``svi.step``, and mistakes told in a line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.targets import energy

FIT = {"steps": 3, "num_particles": 8, "seed": 0, "progress": False}
X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([0.3, -0.4, 0.1, 1.2], dtype=torch.float64)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def own_guide(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros(2))
    pyro.sample("w", dist.Normal(loc, 0.5).to_event(1))


def made(model: Callable = regression, num_layers: int = 1) -> pf.AutoPlanarFlow:
    pyro.set_rng_seed(0)
    return pf.AutoPlanarFlow(model, num_layers)


class SeenError(Exception):
    """Raised by a model in its first run, with the arguments that it got."""


def seen(function: Callable, *data: object, **options: object) -> tuple[tuple, dict]:
    """The arguments that a function hands to the model."""

    def model(*args: object, **kwargs: object) -> None:
        raise SeenError(args, kwargs)

    guide = () if function is pf.posterior else (made().setup(X, Y),)
    with pytest.raises(SeenError) as caught:
        function(model, *guide, *data, **options)
    return caught.value.args


FUNCTIONS = [pf.fit_guide, pf.diagnose, pf.mcmc, pf.to_arviz, pf.posterior]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        ((), {}, ((), {})),
        ((X,), {}, ((X,), {})),
        ((X, Y), {}, ((X, Y), {})),
        ((X, {"y": Y}), {}, ((X, {"y": Y}), {})),
        ((X, (1, 2)), {"seed": 1}, ((X, (1, 2)), {})),
        ((None, X), {}, ((None, X), {})),
        (({"x": X},), {}, (({"x": X},), {})),
        ((X,), {"kwargs": {"y": Y}}, ((X,), {"y": Y})),
        (((X, Y),), {}, ((X, Y), {})),
        (([X, Y],), {}, ((X, Y), {})),
        ((Pair(X, Y),), {}, ((X, Y), {})),
        (((Pair(X, Y),),), {}, ((Pair(X, Y),), {})),
        (((X,), {"y": Y}), {"seed": 1}, ((X,), {"y": Y})),
        (((X,), None), {}, ((X,), {})),
        (((), {"x": X}), {}, ((), {"x": X})),
        (((X,),), {"kwargs": {"y": Y}}, ((X,), {"y": Y})),
        ((), {"args": (X, Y)}, ((X, Y), {})),
        ((), {"args": [X], "kwargs": {"y": Y}}, ((X,), {"y": Y})),
        ((), {"args": (Pair(X, Y), 1)}, ((Pair(X, Y), 1), {})),
    ],
)
def test_the_model_gets_its_arguments(
    function: Callable, data: tuple, options: dict, expected: tuple
) -> None:
    got = seen(function, *data, **options)
    assert [type(v) for v in got[0]] == [type(v) for v in expected[0]]
    assert str(got) == str(expected)


def test_options_may_follow_args_and_kwargs() -> None:
    guide = made().setup(X, Y)
    given = (regression, guide, (X, Y), None)
    report = pf.diagnose(*given, 200, 3, 1)
    named = pf.diagnose(*given[:2], X, Y, num_samples=200, seed=3, max_sets=1)
    assert len(report.draws) == 200
    assert report.elbo == named.elbo != pf.diagnose(*given, 200, 4, 1).elbo
    options = {"warmup": 2, "method": "independence", "progress": False}
    chains = pf.mcmc(*given, 5, 3, 7, **options)
    named = pf.mcmc(*given[:2], X, Y, num_samples=5, num_chains=3, seed=7, **options)
    assert chains.draws["w"].shape == (15, 2)
    assert torch.equal(chains.draws["w"], named.draws["w"])
    assert pf.to_arviz(*given, 30)["posterior"]["w"].shape == (1, 30, 2)


def test_fit_guide_takes_what_svi_takes() -> None:
    """The same call trains the same guide by Pyro; the mean is that of the exact posterior."""
    guide = pf.AutoPlanarFlow(regression, 0)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert svi.step(X, Y) > 0
    pf.fit_guide(regression, guide, X, Y, steps=300, seed=0, progress=False)
    precision = X.T @ X / 0.25 + torch.eye(2)
    mean = torch.linalg.solve(precision, X.T @ Y / 0.25)
    torch.testing.assert_close(guide.median()["w"].detach(), mean, atol=0.02, rtol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures_show_all_arguments(function: Callable) -> None:
    parameters = inspect.signature(function).parameters
    names = ["model", "guide", "data", "args", "kwargs"]
    expected = [name for name in names if name != "guide" or function is not pf.posterior]
    assert list(parameters)[: len(expected)] == expected
    assert parameters["data"].kind is inspect.Parameter.VAR_POSITIONAL
    assert parameters["args"].default == ()
    assert parameters["kwargs"].default is None


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ((X,), {"args": (X, Y)}, "args= and arguments by position"),
        (((X, Y),), {"args": (X, Y)}, "args= and arguments by position"),
        (((X,), {}), {"kwargs": {"y": Y}}, "got kwargs by position and by keyword"),
        ((), {"args": X}, r"args must be a tuple, as in args=\(y,\), got Tensor"),
        (((X,), Y), {}, r"kwargs must be a dict or None, got Tensor .*args=\(it, \.\.\.\)"),
        (((X,), {}, 1, 2, 3, 4), {}, "by position, got 6 arguments"),
        ((X, Y), {"y": Y}, "has no option 'y': it is an argument of the model: give kwargs="),
        ((pyro.optim.Adam({}), Trace_ELBO()), {}, "arguments here, got PyroOptim: .* SVI"),
    ],
)
def test_arguments_given_wrongly(function: Callable, data: tuple, options: dict, said: str) -> None:
    guide = () if function is pf.posterior else (made(),)
    with pytest.raises(TypeError, match=said):
        function(regression, *guide, *data, **options)


PAIRS = {  # model and guide: what is said
    "swapped": (made(), regression, "swapped: the first is the guide AutoPlanarFlow"),
    "swapped functions": (own_guide, regression, "swapped: the second has data at site 'y'"),
    "a flow": (regression, pf.planar_flow(2), r"got a Flow, .* AutoPlanarFlow\(model\)"),
    "a class": (regression, pf.AutoPlanarFlow, r"give AutoPlanarFlow\(model\)"),
    "no model": (None, made(), "model must be a Pyro model, a callable, got NoneType"),
    "no guide": (regression, X, "guide must be a callable made for the model, got Tensor"),
}
WITH_GUIDE = [pf.fit_guide, pf.diagnose, pf.mcmc, pf.to_arviz]


@pytest.mark.parametrize("function", WITH_GUIDE)
@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_no_model_or_guide_is_refused(function: Callable, pair: str) -> None:
    model, guide, said = PAIRS[pair]
    if pair == "swapped functions" and function is pf.mcmc:
        said = "guide must be of the AutoFlow family"
    with pytest.raises((TypeError, ValueError), match=said):
        function(model, guide, X, Y)


MISTAKES = {
    "a guide for posterior": (
        lambda: pf.posterior(regression, made(), X, Y),
        "got the guide AutoPlanarFlow: posterior makes its own",
    ),
    "an optimiser": (
        lambda: pf.fit_guide(regression, made(), X, Y, optim=pyro.optim.Adam({})),
        "fit_guide has no option 'optim': its optimiser and loss are its own: set lr= and",
    ),
    "a made guide": (
        lambda: pf.calibrate(regression, made(), (X, Y)),
        "make_guide must make a new guide .* got AutoPlanarFlow, made already",
    ),
    "a guide that makes none": (
        lambda: pf.calibrate(regression, lambda model: None, (X, Y), progress=False),
        "make_guide must return a guide .* got NoneType",
    ),
    "no guide": (lambda: pf.calibrate(regression, None, (X, Y)), "make_guide must .* NoneType"),
    **{
        f"{function.__name__}({option}=)": (
            lambda function=function, given=given, option=option: function(*given, **{option: 1}),
            f"{function.__name__} has no option '{option}': did you mean {meant}",
        )
        for function, given, option, meant in [
            (pf.fit_guide, (regression, made(), X, Y), "step", r"steps\?"),
            (pf.diagnose, (regression, made(), X, Y), "n_samples", r"num_samples\?"),
            (pf.mcmc, (regression, made(), X, Y), "chains", r"num_chains\?"),
            (pf.to_arviz, (regression, made(), X, Y), "resampled", r"resample\?"),
            (pf.posterior, (regression, X, Y), "seeds", r"seed\?"),
            (pf.calibrate, (regression, pf.AutoPlanarFlow, (X, Y)), "simulations", "num_simul"),
            (pf.fit_density, (pf.planar_flow(2), X), "bach_size", r"batch_size\?"),
            (pf.fit_energy, (pf.planar_flow(2), energy(1)), "anealing", r"annealing\?"),
        ]
    },
    "an option of another library": (
        lambda: pf.fit_density(pf.planar_flow(2), X, momentum=0.9),
        "fit_density has no option 'momentum': it takes flow, data, context, dequantize, steps",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_a_line(mistake: str) -> None:
    call, said = MISTAKES[mistake]
    with pytest.raises(TypeError, match=said):
        call()


def test_warnings_point_at_the_call() -> None:
    def improper() -> None:
        pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=Y[:2])

    guide = made(improper, 0).setup()
    for call, said in (
        (lambda: pf.to_arviz(improper, guide, num_samples=10), "the model cannot be sampled"),
        (lambda: pf.fit_energy(pf.planar_flow(2, 1), lambda z: z[:, 0] ** 2, **FIT), "not rise"),
    ):
        with pytest.warns(UserWarning, match=said) as caught:
            call()
        assert {w.filename for w in caught} == {__file__}


def test_a_device_that_torch_does_not_know(tmp_path) -> None:  # noqa: ANN001
    path, flow = tmp_path / "flow.pt", pf.planar_flow(2)
    pf.save(flow, path)
    for call in (
        lambda: pf.fit_guide(regression, made(), X, Y, device="gpu", **FIT),
        lambda: pf.fit_density(flow, X, device="gpu"),
        lambda: pf.fit_energy(flow, energy(1), device="gpu"),
        lambda: pf.load(path, device="gpu"),
    ):
        with pytest.raises(ValueError, match=r"device of torch, such as 'cpu', 'cuda' .* 'gpu'$"):
            call()


def test_arguments_that_are_no_tuple_are_refused_wherever_a_model_is_run() -> None:
    """A tensor would be taken apart, row by row."""
    guide = made().setup(X, Y)
    for call in (
        lambda: pf.calibrate(regression, pf.AutoPlanarFlow, X, progress=False),
        lambda: pf.diagnose(regression, guide, args=X),
        lambda: BoundModel(regression, guide, X),
    ):
        with pytest.raises(TypeError, match="args must be a tuple, as in args=.y,., got Tensor"):
            call()
