"""The ports of posteriordb against its stored log densities."""

from __future__ import annotations

import functools
import math

import pyro
import pytest
import torch
from benchmarks.posteriordb.lotka_volterra import log_populations
from benchmarks.posteriordb.models import FOLDER, NAMES, Posterior, load
from benchmarks.posteriordb.ports import accumulate, gp_values
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

ODE = "hudson_lynx_hare-lotka_volterra"
OFFSETS = {  # log 2 for each half-normal or half-Cauchy prior; a flat Dirichlet is log 2 as well
    "mesquite-logmesquite_logvolume": 0,
    "low_dim_gauss_mix-low_dim_gauss_mix": 2,
    "arK-arK": 1,
    "kidiq-kidscore_interaction": 1,
    "earnings-earn_height": 0,
    "garch-garch11": 1,
    ODE: 0,
    "eight_schools-eight_schools_noncentered": 1,
    "eight_schools-eight_schools_centered": 1,
    "gp_pois_regr-gp_pois_regr": 1,
}

needs_data = pytest.mark.skipif(
    not FOLDER.exists(), reason=f"the posteriors of posteriordb are not in {FOLDER}"
)
each = pytest.mark.parametrize("name", NAMES)
posterior = functools.cache(load)


def some(found: Posterior, num: int) -> dict[str, Tensor]:
    """Every n-th of the reference draws."""
    return {site: value[:: len(value) // num] for site, value in found.draws.items()}


@needs_data
@each
def test_log_joint_is_the_stored_one_and_a_constant(name: str) -> None:
    found = posterior(name)
    num = 1000 if name == "low_dim_gauss_mix-low_dim_gauss_mix" else 10_000
    off = found.log_joint(some(found, num)) - found.log_density[:: 10_000 // num]
    tolerance = 1e-3 if name == ODE else 1e-6
    assert off.max() - off.min() < tolerance
    assert found.offset == pytest.approx(OFFSETS[name] * math.log(2), abs=tolerance)


@needs_data
@each
def test_vectorised_is_one_by_one(name: str) -> None:
    found = posterior(name)
    draws = some(found, 5)
    together = found.log_joint(draws)
    for i, expected in enumerate(together):
        one = {site: value[i] for site, value in draws.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(found.model, data=one))
        alone = trace.get_trace(*found.args).log_prob_sum()
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)


@needs_data
@each
def test_draws_and_columns_agree(name: str) -> None:
    found = posterior(name)
    assert found.reference.shape == (10_000, len(found.names))
    off = (found.columns(found.draws) - found.reference) / found.reference.std(0)
    assert off.abs().max() < 1e-6


@needs_data
@each
def test_guides_draw_in_the_columns(name: str) -> None:
    found = posterior(name)
    guide = AutoNormal(found.model, init_loc_fn=init_to_value(values=first(found)), init_scale=1e-9)
    with torch.no_grad(), pyro.plate("particles", 7, dim=-1 - nesting(found)):
        columns = found.columns(guide(*found.args))
    assert columns.dtype == torch.float64
    torch.testing.assert_close(columns, found.reference[:1].expand(7, -1), rtol=1e-5, atol=1e-5)


def first(found: Posterior) -> dict[str, Tensor]:
    return {site: value[0] for site, value in found.draws.items()}


def nesting(found: Posterior) -> int:
    return max(len(s["fn"].batch_shape) for s in observed(found))


def observed(found: Posterior) -> list[dict]:
    trace = pyro.poutine.trace(found.model).get_trace(*found.args)
    return [trace.nodes[name] for name in trace.observation_nodes]


@needs_data
@each
def test_models_run_in_nuts_and_predictive(name: str) -> None:
    found = posterior(name)
    draws = Predictive(found.model, num_samples=3, parallel=True)(*found.args)
    assert set(found.draws) <= set(draws)
    start = init_to_value(values=first(found))
    still = {"step_size": 1e-6, "adapt_step_size": False, "max_tree_depth": 1}
    kernel = NUTS(found.model, **still, init_strategy=start)
    mcmc = MCMC(kernel, num_samples=1, warmup_steps=0, disable_progbar=True)
    mcmc.run(*found.args)
    for site, value in mcmc.get_samples().items():
        torch.testing.assert_close(value[0], found.draws[site][0], rtol=0.01, atol=0.01)


def test_garch_recursion_is_the_loop() -> None:
    c, beta = torch.rand(3, 1, 13), torch.tensor([0.0, 0.3, 0.99])[:, None, None]
    v, course = torch.zeros(3, 1), []
    for t in range(13):
        v = c[..., t] + beta[..., 0] * v
        course.append(v)
    torch.testing.assert_close(accumulate(c, beta), torch.stack(course, -1), rtol=1e-14, atol=0)


def test_populations_are_those_of_small_steps() -> None:
    theta = torch.tensor([[0.55, 0.028, 0.8, 0.024], [0.4, 0.02, 1.0, 0.03]])[:, None]
    z_init = torch.tensor([[30.0, 6.0], [20.0, 10.0]])[:, None]
    found = log_populations(theta, z_init, years=4)
    assert found.shape == (2, 1, 2, 5)
    log_z, expected = z_init.log(), [z_init.log()]
    sign, order = torch.tensor([-1.0, 1.0]), [1, 3]
    linear, coupling = theta[..., [0, 2]] * -sign, theta[..., order] * sign

    def slope(log_z: Tensor) -> Tensor:
        return linear + coupling * log_z.flip(-1).exp()

    h = 0.02
    for step in range(200):  # the classical method of Runge and Kutta
        a = slope(log_z)
        b = slope(log_z + h / 2 * a)
        c = slope(log_z + h / 2 * b)
        log_z = log_z + h / 6 * (a + 2 * b + 2 * c + slope(log_z + h * c))
        if (step + 1) % 50 == 0:
            expected.append(log_z)
    torch.testing.assert_close(found, torch.stack(expected, -1), rtol=0, atol=2e-5)
    assert (found - torch.stack(expected, -1)).abs().max() > 0


def test_unknown_posterior_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="name must be one of mesquite.*; got 'mesquite'"):
        load("mesquite")
    with pytest.raises(ValueError, match="set PYROFLOW_POSTERIORDB"):
        load("arK-arK", "no such folder")


def test_gaussian_process_is_nan_where_its_covariance_breaks_down() -> None:
    x, rho = torch.arange(-10.0, 11.0, 2.0), torch.tensor([5.0, 1000.0])
    f = gp_values(x, rho, torch.tensor([3.0, 1000.0]), torch.ones(2, 11))
    assert f[0].isfinite().all()
    assert f[1].isnan().all()
