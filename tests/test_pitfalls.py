"""Mistakes made with this paper before: the wrong number, and that ours is the right one.

Both come from formulas of the test's own and differ by far more than ours is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import pyroflow as pf

LN_2PI = math.log(2 * math.pi)
DRAWS = 20_000
QUIET = {"seed": 0, "progress": False}

Layers = Sequence[Tensor]  # w, u, b


def layers(*parameters: list) -> Layers:
    """In float64 at import, too."""
    return [torch.tensor(p, dtype=torch.float64) for p in parameters]


BENT = layers(
    [[1.2, -0.5], [0.4, 1.5], [-0.9, 0.8]],
    [[1.5, 0.8], [-0.7, 1.6], [1.1, 1.9]],
    [0.3, -0.6, 0.2],
)
FOLDING = layers([[1.0]], [[-2.5]], [0.0])  # but for û


def planar_by_hand(z: Tensor, wub: Layers, norm: Callable = torch.square) -> tuple[Tensor, Tensor]:
    """z_K, and the log-det of each layer, shape (K, N): equations 10 to 13, letter by letter."""
    log_dets = []
    for w, u, b in zip(*wub, strict=True):
        u_hat = u + (-1 + torch.log(1 + (w @ u).exp()) - w @ u) * w / norm(w.norm())
        h = torch.tanh(z @ w + b)
        log_dets.append(torch.log(torch.abs(1 + (1 - h**2) * (w @ u_hat))))
        z = z + h[:, None] * u_hat
    return z, torch.stack(log_dets)


def set_layers(planar: pf.Planar, wub: Layers) -> None:
    with torch.no_grad():
        for p, value in zip((planar.w, planar.u, planar.b), wub, strict=True):
            p.copy_(value)


def flow_of(wub: Layers, direction: str = "base_to_data") -> pf.Flow:
    """A planar flow with these layers and nothing else."""
    flow = pf.planar_flow(*wub[0].T.shape, affine=None, direction=direction)
    set_layers(flow.parts[0], wub)
    return flow


def base_grid(dim: int = 2, reach: float = 7.0, n: int = 281) -> tuple[Tensor, Tensor]:
    """Points z_0, and weights that make a sum over them the mean over q_0 = N(0, I)."""
    axis = torch.linspace(-reach, reach, n)
    z = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return z, (2 * reach / (n - 1)) ** dim * gaussian(z).exp()


def gaussian(z: Tensor, loc: Tensor | float = 0.0, sd: float = 1.0) -> Tensor:
    """ln N(z | loc, sd² I) over the last dimension."""
    squares = ((z - loc) / sd).square().sum(-1)
    return -squares / 2 - z.shape[-1] * (LN_2PI / 2 + math.log(sd))


def assert_right(ours: float, right: Tensor | float, *wrong: Tensor | float, error: float) -> None:
    assert ours == pytest.approx(float(right), abs=error)
    for number in wrong:
        assert abs(float(number) - float(right)) > 4 * error


# A model whose every number is known: z ~ N(0, I), x ~ N(z, 1/4 I).
X, NOISE = torch.tensor([1.5, -0.7], dtype=torch.float64), 0.5
LOG_EVIDENCE = float(gaussian(X, sd=math.sqrt(1 + NOISE**2)))


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=X)


def planar_guide() -> pf.AutoPlanarFlow:
    guide = pf.AutoPlanarFlow(model, num_layers=3, affine=None)
    guide()
    set_layers(guide.planar, BENT)
    return guide


def terms_of_the_bound() -> dict[str, Tensor]:
    """E[ln q_K(z_K)], E[ln p(z)] at z_K and z_0, E[ln p(x|z_K)] over q_0, by quadrature."""
    z_0, weight = base_grid()
    z, log_dets = planar_by_hand(z_0, BENT)
    values = {
        "log q": gaussian(z_0) - log_dets.sum(0),
        "prior": gaussian(z),
        "prior at z_0": gaussian(z_0),
        "likelihood": gaussian(X - z, sd=NOISE),
    }
    return {name: weight @ value for name, value in values.items()}


def elbo_by_pyro(guide: Callable, beta: float = 1.0) -> float:
    elbo = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True)
    with torch.no_grad():
        return elbo.loss(poutine.scale(model, scale=beta), guide)


def elbo_by_fit(guide: Callable, beta: float = 1.0) -> float:
    """The first loss of a fit, before its first step."""
    options = {"annealing": lambda step: beta, "num_particles": DRAWS}
    return pf.fit_guide(model, guide, steps=1, **options, **QUIET).losses[0]


def elbo_by_report(guide: Callable) -> float:
    return -pf.diagnose(model, guide, num_samples=DRAWS, seed=0).elbo


@pytest.mark.parametrize("bound", [elbo_by_pyro, elbo_by_fit, elbo_by_report])
def test_the_prior_is_evaluated_at_z_k(bound: Callable) -> None:
    """Equation 15; evaluated at z_0 the prior does not see the flow."""
    term = terms_of_the_bound()
    right = term["log q"] - term["prior"] - term["likelihood"]
    wrong = term["log q"] - term["prior at z_0"] - term["likelihood"]
    assert right > -LOG_EVIDENCE
    assert_right(bound(planar_guide()), right, wrong, error=0.3)


@pytest.mark.parametrize("bound", [elbo_by_pyro, elbo_by_fit])
@pytest.mark.parametrize("beta", [pf.paper_annealing(0), pf.paper_annealing(3900)])
def test_beta_weighs_the_joint_and_nothing_else(bound: Callable, beta: float) -> None:
    """Equation 20; the wrong ones weigh KL(q ‖ prior), the likelihood, or all of the bound."""
    log_q, prior, _, likelihood = terms_of_the_bound().values()
    right = log_q - beta * (prior + likelihood)
    wrong = [
        beta * (log_q - prior) - likelihood,
        log_q - prior - beta * likelihood,
        beta * (log_q - prior - likelihood),
    ]
    assert_right(bound(planar_guide(), beta), right, *wrong, error=0.15)


def test_beta_weighs_the_joint_for_pyros_guides_too() -> None:
    loc, sd, beta = torch.ones(2), 0.6, 0.4
    start = init_to_value(values={"z": loc})
    guide = AutoDiagonalNormal(model, init_loc_fn=start, init_scale=sd)
    log_q = -2 * (math.log(sd) + (LN_2PI + 1) / 2)
    prior = gaussian(loc) - sd**2
    likelihood = gaussian(X, loc, NOISE) - (sd / NOISE) ** 2
    right = log_q - beta * (prior + likelihood)
    wrong = beta * (log_q - prior) - likelihood, beta * (log_q - prior - likelihood)
    assert_right(elbo_by_fit(guide, beta), right, *wrong, error=0.1)


def test_an_energy_is_annealed_and_its_bound_is_not() -> None:
    """U = ½‖z‖² + 3 and q = N(0, I): E_q[ln q] = −1 − ln 2π and E_q[U] = 4."""
    betas = {0: pf.paper_annealing(0), 1: 1.0}
    identity = pf.planar_flow(2, num_layers=1, affine=None)
    options = {"annealing": betas.get, "steps": 2, "num_particles": DRAWS, "lr": 1e-9}
    fit = pf.fit_energy(identity, lambda z: z.square().sum(-1) / 2 + 3, **options, **QUIET)
    right, annealed = 3 - LN_2PI, betas[0] * 4 - 1 - LN_2PI
    assert_right(fit.losses[0], annealed, betas[0] * right, right, error=0.05)
    assert_right(fit.losses[1], right, annealed, error=0.05)
    assert_right(fit.best_loss, right, annealed, error=1e-6)


def test_minus_elbo_is_not_minus_log_evidence() -> None:
    """For q = N(loc, sd² I) they differ by KL(q ‖ p(z|x)), which is in closed form here."""
    loc, sd = torch.tensor([1.0, 0.0]), 0.7
    precision = 1 + NOISE**-2
    posterior = dist.Normal(X / NOISE**2 / precision, precision**-0.5)
    kl = torch.distributions.kl_divergence(dist.Normal(loc, sd), posterior).sum()
    start = init_to_value(values={"z": loc})
    guide = pf.AutoPlanarFlow(model, num_layers=0, init_loc_fn=start, init_scale=sd)
    report = pf.diagnose(model, guide, num_samples=DRAWS, seed=0)
    assert_right(-report.elbo, kl - LOG_EVIDENCE, -LOG_EVIDENCE, error=0.15)
    assert_right(-report.log_evidence, -LOG_EVIDENCE, kl - LOG_EVIDENCE, error=0.15)


@pytest.mark.parametrize("dim", [1, 2, 40])
def test_densities_keep_the_constant_of_their_base(dim: int) -> None:
    """Without (D/2) ln 2π a flow at the identity would have log density 0 at the origin."""
    flow = pf.planar_flow(dim, num_layers=4, affine=None)
    right = -dim * LN_2PI / 2
    assert_right(flow().log_prob(torch.zeros(dim)).item(), right, 0.0, error=1e-10)
    fit = pf.fit_energy(flow, lambda z: z.square().sum(-1) / 2, steps=1, lr=1e-9, **QUIET)
    assert_right(fit.best_loss, right, 0.0, error=1e-6)
    data = torch.randn(5000, dim)
    fit = pf.fit_density(flow, data, steps=1, polish=0, lr=1e-9, **QUIET)
    loss = -gaussian(data).mean()  # of all rows: the fit's is that of the held-out ones
    assert_right(fit.best_loss, loss, loss + right, error=0.2 * dim**0.5)


def test_log_dets_of_all_layers_are_summed() -> None:
    z_0 = torch.randn(50, 2)
    z, log_dets = planar_by_hand(z_0, BENT)
    right, last = gaussian(z_0) - log_dets.sum(0), gaussian(z_0) - log_dets[-1]
    chain = pf.Flow(dist.Normal(torch.zeros(2), 1.0).to_event(1), [pf.Planar(2) for _ in range(3)])
    for k, layer in enumerate(chain.parts):
        set_layers(layer, [p[k : k + 1] for p in BENT])
    for ours in (flow_of(BENT)().log_prob(z), chain().log_prob(z)):
        assert (ours - right).abs().max() < 1e-9
    assert (last - right).abs().min() > 1e-3


@pytest.mark.parametrize("size", [5.0, 0.5])
def test_u_hat_has_the_squared_norm(size: float) -> None:
    """On the hyperplane det = 1 + wᵀû = ln(1 + e^(wᵀu)), whatever the size of w."""
    w, dot = size * torch.tensor([[0.6, 0.8]]), -2.0
    wub = w, dot / size**2 * w, torch.zeros(1)
    right = math.log(math.log(1 + math.exp(dot)))
    origin = torch.zeros(1, 2)
    wrong = planar_by_hand(origin, wub, norm=torch.abs)[1]
    t = pf.Planar(2)
    set_layers(t, wub)
    ours = t.log_abs_det_jacobian(origin, t(origin)).item()
    assert_right(ours, right, wrong, error=1e-12)
    density = flow_of(wub, "data_to_base")().log_prob(origin)
    assert_right(density.item(), right - LN_2PI, wrong - LN_2PI, error=1e-12)


def test_no_layer_folds_and_every_density_integrates_to_one() -> None:
    """With u for û, the map is three to one in places, and the mass of its "density" above 2."""
    w, u, b = FOLDING
    y = torch.linspace(-12, 12, 24_001)[:, None]
    h = torch.tanh(y @ w + b)
    folded = gaussian(y + h @ u).exp() @ (1 + (1 - h**2) * (w @ u)).abs()
    ours = flow_of(FOLDING, "data_to_base")().log_prob(y).exp().sum()
    assert_right(ours.item() / 1000, 1.0, folded.item() / 1000, error=1e-6)


def test_no_flow_is_better_than_its_target() -> None:
    """F ≥ −ln Z; with u for û a folded q claims 0.12 nats less for p ∝ exp(−z⁸)."""
    z_0, weight = base_grid(1, reach=9.0, n=40_001)
    w, u, b = FOLDING
    h = torch.tanh(z_0 @ w + b)
    log_det = torch.log((1 + (1 - h**2) * (w @ u)).abs()).squeeze(-1)
    folded = weight @ (gaussian(z_0) - log_det + (z_0 + h @ u).squeeze(-1) ** 8)
    z, log_dets = planar_by_hand(z_0, FOLDING)
    right = weight @ (gaussian(z_0) - log_dets.sum(0) + z.squeeze(-1) ** 8)
    ours = weight @ (flow_of(FOLDING)().log_prob(z) + z.squeeze(-1) ** 8)
    assert folded + 0.1 < -math.log(2 * math.gamma(1 + 1 / 8)) < right
    assert_right(ours.item(), right, folded, error=1e-8)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_energies_are_proper_unless_asked_otherwise(number: int) -> None:
    """Bare, they do not grow along z1: a Gaussian of width s there has F ≈ C − ln s."""
    bare, ours = pf.targets.energy(number, containment=None), pf.targets.energy(number)
    (z, weight), free_energy = base_grid(n=141), {}
    for width in (1e2, 1e4):
        spread = z * torch.tensor([width, 0.5])
        q = gaussian(z) - math.log(width * 0.5)
        free_energy[width] = [float(weight @ (q + target(spread))) for target in (bare, ours)]
    assert bare.log_normalizer == math.inf
    assert free_energy[1e4][0] < min(free_energy[1e2][0] - 4, -ours.log_normalizer - 4)
    assert free_energy[1e4][1] > free_energy[1e2][1] > -ours.log_normalizer


def test_flow_parameters_are_amortised() -> None:
    """Each context has layers of its own; the first row's for all rows is another density."""
    flow = pf.planar_flow(2, num_layers=3, context_dim=4, affine=None, direction="base_to_data")
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.5)
    h, z_0 = torch.randn(6, 4), torch.randn(6, 2)
    rows = flow.parts[0].condition(h)
    wub = rows.w, rows.u, rows.b
    assert all((p[0] - p[1]).abs().min() > 1e-6 for p in wub)
    for n in range(6):
        z, log_dets = planar_by_hand(z_0[n : n + 1], [p[n].detach() for p in wub])
        ours = flow(h).log_prob(z.expand(6, 2))
        right = gaussian(z_0[n]) - log_dets.sum()
        assert_right(ours[n].item(), right, error=1e-9)
        assert n == 0 or (ours[0] - right).abs() > 1e-3
