"""What the measurement of many rows says of guides whose divergence is known."""

from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from benchmarks import scale
from cases import slow


@pytest.mark.parametrize("off", [slow(0.0), 0.5])
def test_divergence_of_a_shifted_guide(off: float) -> None:
    x, y = scale.data("normal", 500)
    precision = torch.eye(scale.COEFFICIENTS) + x.mT @ x
    loc = torch.linalg.solve(precision, x.mT @ y)
    shift = torch.zeros_like(loc)
    shift[0] = (2 * off / precision[0, 0]).sqrt()
    q = dist.MultivariateNormal(loc + shift, precision_matrix=precision)
    w = q.sample((20_000,))
    draws = SimpleNamespace(sites={"w": w}, log_q=q.log_prob(w))
    found = scale.judge("normal", x, y, SimpleNamespace(draws=draws))
    assert found["KL"] == pytest.approx(off, abs=1e-8 + 0.1 * off)
    assert found["effective"] == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["logistic", "Poisson", "Student t"])
def test_newton_ends_where_the_gradient_vanishes(family: str) -> None:
    x, y = scale.data(family, 500)
    loc, precision = scale.newton(family, x, y)
    loc.requires_grad_()
    (gradient,) = torch.autograd.grad(scale.log_joint(family, x, y, loc[None]).sum(), loc)
    assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-8)
    assert torch.linalg.eigvalsh(precision).min() > 1.0
