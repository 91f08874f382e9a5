"""Log joints of data with many rows, some rows at a time, against Pyro's own of single draws."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyroflow as pf
from pyroflow.model import by_rows
from pyroflow.model.bound import BoundModel
from pyroflow.model.by_rows import ByRows
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.program import CHEAP
from pyroflow.model.recorded import Recorded

ROWS, COLUMNS = CHEAP + 1007, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, the last one smaller."""
    monkeypatch.setattr(by_rows, "AT_ONCE", 2**12)


def regression(family: Callable[..., dist.Distribution], *, scaled: bool = False) -> Callable:
    """Of counts, zeros and ones or numbers, which are those that the design gives."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        args = (pyro.sample("sd", dist.HalfNormal(1.0)),) if scaled else ()
        y = (x[:, 0].exp().round() % 2) if family in ODD else x[:, 1].exp().round()
        with pyro.plate("rows", len(x)):
            pyro.sample("y", family(x @ w, *args), obs=y)

    return model


def bernoulli(eta: Tensor) -> dist.Distribution:
    return dist.Bernoulli(logits=eta)


ODD = (bernoulli,)


def intercept(x: Tensor) -> None:
    """No design: all rows have one location and one scale."""
    loc, sd = pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(loc, sd), obs=x[:, 0])


def columns(x: Tensor) -> None:
    """The predictor by columns, with weights of the rows."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
    eta = w[..., 0] + w[..., 1] * x[:, 1] + (w[..., 2] * x[:, 2]).tanh()
    with pyro.plate("rows", len(x)), poutine.scale(scale=0.5):
        pyro.sample("y", dist.Laplace(eta, 1.0), obs=x[:, 0])


def groups(x: Tensor) -> None:
    """A level for each of seven groups."""
    with pyro.plate("groups", 7):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(level[..., torch.arange(len(x)) % 7], 1.0), obs=x[:, 0])


def mixture(x: Tensor) -> None:
    """Two parts."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    parts = dist.Categorical(probs=torch.tensor([0.3, 0.7]))
    with pyro.plate("rows", len(x)):
        part = dist.Normal(loc.unsqueeze(-2), 1.0)
        pyro.sample("y", dist.MixtureSameFamily(parts, part), obs=x[:, 0])


def masked(x: Tensor) -> None:
    """Rows without an observation."""
    rate = pyro.sample("rate", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 1] > 0):
        pyro.sample("y", dist.Exponential(rate * x[:, 2].exp()), obs=x[:, 1].abs())


APART = {
    "Bernoulli": regression(bernoulli),
    "normal": regression(lambda eta, sd: dist.Normal(eta, sd), scaled=True),
    "Poisson": regression(lambda eta: dist.Poisson(eta.exp())),
    "Student t": regression(lambda eta, sd: dist.StudentT(4.0, eta, sd), scaled=True),
    "negative binomial": regression(
        lambda eta, size: dist.NegativeBinomial(size, logits=eta), scaled=True
    ),
    "intercept": intercept,
    "columns": columns,
    "groups": groups,
    "mixture": mixture,
    "masked": masked,
}


def centred(x: Tensor) -> None:
    """Each row depends on the mean of all."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
    eta = (x @ w).tanh()
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(eta - eta.mean(-1, keepdim=True), 1.0), obs=x[:, 0])


def walk(x: Tensor) -> None:
    """Each row depends on those before it."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(0.01 * (x @ w).cumsum(-1), 1.0), obs=x[:, 0])


def neighbours(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
    eta = x @ w
    pyro.factor("smooth", -(eta[..., 1:] - eta[..., :-1]).square().sum(-1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(eta, 1.0), obs=x[:, 0])


def shuffled(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
    eta = (x @ w)[..., torch.arange(len(x) - 1, -1, -1)]
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(eta, 1.0), obs=x[:, 0])


TOGETHER = {"centred": centred, "walk": walk, "neighbours": neighbours, "shuffled": shuffled}


def log_joint_of(model: Callable, x: Tensor) -> LogJoint:
    guide = pf.AutoPlanarFlow(model, 0)
    return LogJoint(BoundModel(model, guide, (x,)), guide, 5)


def expected_at(log_joint: LogJoint, model: Callable, x: Tensor, z: Tensor) -> tuple:
    z = z.detach().requires_grad_()
    total = []
    for point in z:
        values, log_det = log_joint.guide.constrain(point[None])
        data = {name: value[0] for name, value in values.items()}
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(x)
        total.append(trace.log_prob_sum() + log_det[0])
    value = torch.stack(total)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("name", [*APART, *TOGETHER])
def test_values_and_gradients_are_those_of_the_model(name: str, x: Tensor) -> None:
    model = (APART | TOGETHER)[name]
    log_joint = log_joint_of(model, x)
    assert isinstance(log_joint._graph, ByRows) == (name in APART)
    z = 0.3 * torch.randn(7, log_joint.guide.latent_dim)
    expected, slope = expected_at(log_joint, model, x, z)
    value, gradient = log_joint.values_and_gradients(z)
    assert torch.allclose(value, expected, rtol=1e-10)
    assert torch.allclose(gradient, slope, rtol=1e-8, atol=1e-8 * slope.abs().max())
    assert torch.allclose(log_joint.values(z), expected, rtol=1e-10)


def test_few_rows_are_taken_at_once(x: Tensor) -> None:
    log_joint = log_joint_of(APART["normal"], x[:100])
    assert log_joint.traced
    assert not isinstance(log_joint._graph, ByRows)


def test_a_point_off_the_support_has_no_density(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Exponential(2.0 + 0.1 * (x @ w)), obs=x[:, 0].exp())

    log_joint = log_joint_of(model, x)
    assert isinstance(log_joint._graph, ByRows)
    value = log_joint.values(torch.tensor([[0.0, 0.0, 0.0], [20.0, 0.0, 0.0]]))
    assert value.isneginf().tolist() == [False, True]


put = torch.ops.aten.index_put


@pytest.mark.parametrize(
    "function",
    [
        lambda w, t: (t - t.mean()).square().sum() * w.sum(-1),
        lambda w, t: (w[:, :1] * t).softmax(-1).square().sum(-1),
        lambda w, t: (w[:, :1] * t).amax(-1),
        lambda w, t: (w[:, :1] * t).flip(-1).mul(t).sum(-1),
        lambda w, t: (w[:, :1] * t)[:, :10].sum(-1),
        lambda w, t: (w[:, :1, None] * t[:, None] * t[:100]).sum((-1, -2)),
        lambda w, t: (w[:, :1] * t).prod(-1),
        lambda w, t: (w[:, :1] * t)[:, torch.arange(len(t) - 1, -1, -1)].mul(t).sum(-1),
        lambda w, t: put(w, [None, (t > 0).long()], w[:, :1] * t).sum(-1),
        lambda w, t: put(w, [None, (t > 0).long()], w[:, :1] * t, True).sum(-1),
        lambda w, t: put(0 * w, [None, (t > 0).long()], w[:, :1] * t, True).sum(-1),
        lambda w, t: (w[:, :1] * t).mean(-1),
    ],
)
def test_what_mixes_rows_is_refused_or_right(function: Callable, x: Tensor) -> None:
    w = torch.randn(4, 2)
    recorded = Recorded.of(lambda w: (function(w, x[:, 0]),), w)
    try:
        found = ByRows(recorded, (w,))(w)[0]
    except (ValueError, RuntimeError):
        return
    assert torch.allclose(found, function(w, x[:, 0]))


def test_as_many_latents_as_rows_are_refused(x: Tensor) -> None:
    z = torch.randn(2, ROWS)
    recorded = Recorded.of(lambda z: ((z * x[:, 0]).sum(-1),), z)
    with pytest.raises(ValueError, match="as many latents"):
        ByRows(recorded, (z,))
