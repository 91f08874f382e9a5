"""AmortizedPlanarGuide of two plates side by side, against exact answers."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import raw
from cases import slow
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn

import pyroflow as pf
from pyroflow.inference.amortized_start import amortized_start
from pyroflow.model.at_hand import Rows, places_at_hand
from pyroflow.model.bound import BoundModel
from pyroflow.model.draws import draw
from pyroflow.model.log_joint_at_hand import LogJointAtHand, LogJointInFull

Batch = tuple[int | None, int | None]
PLATES, WHOLE = ["persons", "items"], (None, None)
BY_DATA = {"persons": "x", "items": "y"}
X = 1.5 + torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = 2 * torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1.5
OF_X, OF_Y = 1.25, 2.25 + 0.64  # the variances of the data given mu
WEIGHT, SPREAD = 2.25 / OF_Y, (2.25 * 0.64 / OF_Y) ** 0.5  # b_j | y_j, mu


def beside(x: Tensor, y: Tensor, batch: Batch = WHOLE) -> None:
    """mu ~ N(0, 2²); a_i ~ N(mu, 1), x_i ~ N(a_i, 0.5²); b_j ~ N(-mu, 1.5²), y_j ~ N(b_j, 0.8²)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("persons", len(x), subsample_size=batch[0]) as rows:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(a, 0.5), obs=x[rows])
    with pyro.plate("items", len(y), subsample_size=batch[1]) as rows:
        b = pyro.sample("b", dist.Normal(-mu, 1.5))
        pyro.sample("y", dist.Normal(b, 0.8), obs=y[rows])


def crossed(y: Tensor, batch: Batch = WHOLE) -> None:
    """y_ij ~ N(a_i + b_j + c, 1), rows of two numbers and of one, in two dimensions."""
    c = pyro.sample("c", dist.Gamma(3.0, 3.0))
    persons = pyro.plate("persons", y.shape[0], subsample_size=batch[0], dim=-2)
    items = pyro.plate("items", y.shape[1], subsample_size=batch[1], dim=-1)
    with persons:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with items:
        b = pyro.sample("b", dist.Normal(c, 1.0))
    with persons as i, items as j:
        pyro.sample("y", dist.Normal(a + b + c, s), obs=y[i][:, j])


def log_evidence(x: Tensor = X, y: Tensor = Y) -> float:
    signs = torch.cat([torch.ones(len(x)), -torch.ones(len(y))])
    own = torch.cat([torch.full((len(x),), OF_X), torch.full((len(y),), OF_Y)])
    covariance = 4 * torch.outer(signs, signs) + own.diag()
    data = torch.cat([x, y])
    return dist.MultivariateNormal(torch.zeros_like(data), covariance).log_prob(data).item()


def posterior_of_mu() -> tuple[float, float]:
    precision = 0.25 + len(X) / OF_X + len(Y) / OF_Y
    return (X.sum() / OF_X - Y.sum() / OF_Y).item() / precision, precision**-0.5


@torch.no_grad()
def exact_guide() -> pf.AmortizedPlanarGuide:
    """That of depth 0 which is the posterior of ``beside``."""
    guide = pf.AmortizedPlanarGuide(beside, PLATES, BY_DATA, num_layers=0, global_layers=0)
    guide.setup(X, Y)
    loc, sd = posterior_of_mu()
    guide.global_guide.affine.offset.fill_(loc)
    guide.global_guide.affine.raw_scale.fill_(raw(sd))
    # Given mu: a_i ~ N((4 x_i + mu) / 5, 1 / 5), b_j ~ N(WEIGHT y_j - (1 - WEIGHT) mu, SPREAD²).
    found = [(0.8, 0.2, 0.2**0.5), (WEIGHT, WEIGHT - 1, SPREAD)]
    for part, (own, above, scale) in zip(guide.parts, found, strict=True):
        part.flow.affine.raw_scale.fill_(raw(scale))
        part.flow.affine.offset.copy_(own * part.context.loc + above * loc)
        part.flow.linear.nn.weight.copy_(own * part.context.scale)
        part.flow.shift.fill_(above * sd)
    return guide


CASES = {
    "beside": (beside, BY_DATA, (X[:5], Y[:4])),
    "tables": (beside, None, (X[:5], Y[:4])),
    "one table": (beside, {"items": "y"}, (X[:5], Y[:4])),
    "crossed": (
        crossed,
        {"persons": "y", "items": lambda y, *_: y.mT},
        (torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64),),
    ),
}


def scattered(case: str, batch: Batch = WHOLE, **options: object) -> BoundModel:
    """A guide at random parameters."""
    model, context, args = CASES[case]
    guide = pf.AmortizedPlanarGuide(model, PLATES, context, num_layers=2, **options)
    problem = BoundModel(model, guide, (*args, batch))
    with pf.seeds.seeded(1), torch.no_grad():
        for p in guide.parameters():
            p += 0.1 * torch.randn_like(p)
    return problem


def test_the_evidence_is_exact_in_each_draw_and_in_parts_on_average() -> None:
    guide = exact_guide()
    for _ in range(3):
        assert Trace_ELBO().loss(beside, guide, X, Y) == pytest.approx(-log_evidence(), abs=1e-9)
    weights = draw(BoundModel(beside, guide, (X, Y)), 50).log_weights
    torch.testing.assert_close(weights, torch.full((50,), log_evidence(), dtype=weights.dtype))
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([elbo.loss(beside, guide, X, Y, (4, 3)) for _ in range(100)])
    error = (losses.std() / 10).item()
    assert losses.mean().item() == pytest.approx(-log_evidence(), abs=4 * error)
    assert error < 1.0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"affine": "diagonal", "condition_on_globals": False}])
def test_the_density_is_that_of_the_globals_and_of_each_plate(case: str, options: dict) -> None:
    """At the rows that the model draws, as the density that Pyro's trace has."""
    problem = scattered(case, (3, 2), **options)
    guide = problem.guide
    rows = Rows({"persons": torch.tensor([4, 0, 2]), "items": torch.tensor([3, 1])}, {})
    q = guide.over_coordinates(*problem.args)
    z = q.sample((5,))
    values, _ = guide.latents.constrain(z)
    above = guide.global_guide
    g = above.latents.unconstrain({n: values[n] for n in above.latents.sites}, z)[0]
    shared = above.affine.inv(g)[:, None] if guide._conditioned else None
    total = above.flow().log_prob(g)
    at_hand = total.clone()
    for part in guide.parts:
        dim = part.rows.trailing
        sites = {n: values[n].flatten(-1 - dim) for n in part.rows.latents.sites}
        parts = [site.unconstrain(sites[n])[0] for n, site in part.rows.latents.sites.items()]
        data = None if part.context is None else part.context.rows(problem.args, {})
        each = part.posterior(torch.arange(part.rows.size), data, shared, 0)
        found = each.log_prob(torch.stack(parts, -1))
        total = total + found.sum(-1)
        at_hand = at_hand + found[:, rows.index[part.plate]].sum(-1)
    torch.testing.assert_close(q.log_prob(z.clone()), total)
    some = Rows(rows.index, {n: torch.ones(len(i)) for n, i in rows.index.items()})
    part = guide.at_hand(some, *problem.args)
    own = z[:, places_at_hand(guide.latents, rows.index)]
    torch.testing.assert_close(part.log_prob(own), at_hand)


@pytest.mark.parametrize("case", CASES)
def test_the_bound_has_that_of_all_rows_as_the_mean_over_all_subsamples(case: str) -> None:
    """Its gradients too, where both plates subsample and neither is a whole number of parts."""
    problem = scattered(case, (3, 3))
    guide, args = problem.guide, problem.args
    guide.sparse = False
    part = LogJointAtHand(problem, guide, 3)
    q = guide.over_coordinates(*args)
    z = q.rsample((3,)).detach()
    parameters = list(guide.parameters())
    grads = lambda value: torch.autograd.grad(value, parameters, allow_unused=True)  # noqa: E731
    whole = (LogJointInFull(part).values(z) - q.log_prob(z.clone())).mean()
    expected, found, count = grads(whole), [0.0 for _ in parameters], 0
    mean = 0.0
    plates = [(n, N, B) for n, (N, B) in part.subsampling.plates.items()]
    for chosen in itertools.product(*(itertools.combinations(range(N), B) for _, N, B in plates)):
        index = {n: torch.tensor(i) for (n, _, _), i in zip(plates, chosen, strict=True)}
        weights = {n: torch.full((B,), N / B) for n, N, B in plates}
        part.rows = Rows(index, weights).to(z)
        own = z[:, places_at_hand(guide.latents, index)]
        value = (part.values(own) - guide.at_hand(part.rows, *args).log_prob(own)).mean()
        slopes = grads(value)
        found = [f if g is None else f + g for f, g in zip(found, slopes, strict=True)]
        mean, count = mean + value.detach(), count + 1
    assert count == math.prod(math.comb(N, B) for _, N, B in plates)
    torch.testing.assert_close(mean / count, whole.detach())
    for f, g in zip(found, expected, strict=True):
        if g is not None:
            torch.testing.assert_close(f / count, g)


@pytest.mark.parametrize(
    ("context", "batch"),
    [
        slow(BY_DATA, (6, 4)),
        (None, WHOLE),
        slow(BY_DATA, WHOLE),
        slow({"persons": "x"}, (6, None)),
    ],
)
def test_the_start_is_the_posterior_where_it_is_normal(context: dict | None, batch: Batch) -> None:
    guide = pf.AmortizedPlanarGuide(beside, PLATES, context, num_layers=2, global_layers=2)
    problem = BoundModel(beside, guide, (X, Y, batch))
    with pf.seeds.seeded(0):
        assert amortized_start(problem, guide, 16)
    in_full = BoundModel(beside, guide, (X, Y))
    weights = draw(in_full, 2000).log_weights
    assert weights.mean().item() == pytest.approx(log_evidence(), abs=0.05)


@pytest.mark.slow
def test_a_fit_of_two_plates_that_subsample_finds_the_evidence() -> None:
    guide = pf.AmortizedPlanarGuide(beside, PLATES, BY_DATA, num_layers=2, global_layers=2)
    fit = pf.fit_guide(beside, guide, (X, Y, (6, 4)), steps=40, seed=0, progress=False)
    assert fit.best_loss == pytest.approx(-log_evidence(), abs=0.1)
    loc, sd = posterior_of_mu()
    found = guide.quantiles([0.1587, 0.5, 0.8413], X, Y)
    assert found["mu"][1].item() == pytest.approx(loc, abs=0.1 * sd)
    assert found["a"].shape == (3, 12)
    torch.testing.assert_close(found["a"][1], (4 * X + loc) / 5, atol=0.05, rtol=0)
    torch.testing.assert_close(found["b"][1], WEIGHT * Y + (WEIGHT - 1) * loc, atol=0.1, rtol=0)
    width = (SPREAD**2 + ((1 - WEIGHT) * sd) ** 2) ** 0.5
    torch.testing.assert_close(
        found["b"][2] - found["b"][1], torch.full_like(Y, width), atol=0, rtol=0.1
    )


@pytest.mark.slow
def test_plates_that_cross_end_at_the_best_factorised_gaussian() -> None:
    """Its KL from the posterior is ½ (Σ log Λ_kk - log |Λ|), for the precision Λ given y."""

    def model(y: Tensor) -> None:
        persons, items = (
            pyro.plate(n, s, dim=d) for n, s, d in zip(PLATES, y.shape, (-2, -1), strict=True)
        )
        with persons:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with items:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with persons, items:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    design = torch.cat([torch.eye(5).repeat_interleave(4, 0), torch.eye(4).repeat(5, 1)], 1)
    precision = torch.eye(9) + design.mT @ design
    context = {"persons": "y", "items": lambda y: y.mT}
    guide = pf.AmortizedPlanarGuide(model, PLATES, context, num_layers=0)
    pf.fit_guide(model, guide, (y,), steps=400, seed=0, progress=False)
    z = torch.stack([torch.zeros(9), torch.ones(9)])
    for t in guide.over_coordinates(y).transforms:
        z = t(z)
    q = dist.MultivariateNormal(z[0], scale_tril=(z[1] - z[0]).diag())
    posterior = dist.MultivariateNormal(
        torch.linalg.solve(precision, design.mT @ y.flatten()), precision_matrix=precision
    )
    least = (precision.diag().log().sum() - precision.logdet()).item() / 2
    found = torch.distributions.kl_divergence(q, posterior).item()
    assert least <= found < least + 0.01
    marginal = dist.MultivariateNormal(torch.zeros(20), torch.eye(20) + design @ design.mT)
    evidence = marginal.log_prob(y.flatten()).item()
    report = pf.diagnose(model, guide, (y,), num_samples=4000, max_sets=1)
    assert report.elbo == pytest.approx(evidence - found, abs=0.1)
    assert report.log_evidence == pytest.approx(evidence, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(3, 2), slow((1, 4))])
def test_plates_that_cross_are_fitted_where_both_subsample(batch: Batch) -> None:
    """Without the start, which has no rows that interact, nor one row at a time."""
    model, context, (y,) = CASES["crossed"]
    guide = pf.AmortizedPlanarGuide(model, PLATES, context, num_layers=1, global_layers=1)
    before = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=2)
    before = before.loss(model, guide, y)
    fit = pf.fit_guide(model, guide, (y, batch), steps=60, seed=0, progress=False)
    assert fit.best_loss < before - 3
    report = pf.diagnose(model, guide, (y, batch), num_samples=1000, max_sets=1)
    assert report.elbo == pytest.approx(-fit.best_loss, abs=0.5)


def test_its_report_is_of_all_rows_of_both_plates() -> None:
    report = pf.diagnose(beside, exact_guide(), (X, Y, (5, 3)), num_samples=1000)
    assert report.log_evidence == pytest.approx(log_evidence(), abs=1e-6)
    assert report.level == "good"


def test_new_rows_are_predicted_without_a_fit() -> None:
    guide, x, y = exact_guide(), torch.tensor([-3.0, 0.0, 8.0]), torch.tensor([1.0, 4.0])
    loc, _ = posterior_of_mu()
    draws = Predictive(beside, guide=guide, num_samples=20_000, parallel=True)(x, y)
    for found in ({n: draws[n].mean(0) for n in ("a", "b")}, guide.median(x, y)):
        torch.testing.assert_close(found["a"], (4 * x + loc) / 5, atol=0.02, rtol=0)
        torch.testing.assert_close(found["b"], WEIGHT * y + (WEIGHT - 1) * loc, atol=0.03, rtol=0)
    table = pf.AmortizedPlanarGuide(beside, PLATES, {"persons": "x"}).setup(X, Y)
    assert table(x, Y)["a"].shape == (3,)
    with pytest.raises(ValueError, match=r"plate 'items' has 2 rows.* learned those of 7"):
        table(x, y)


@pytest.mark.parametrize(
    "make",
    [lambda model: pf.AmortizedPlanarGuide(model, PLATES, BY_DATA), pf.AutoStructuredFlow],
    ids=["amortized", "structured"],
)
def test_rows_that_the_model_picks_by_those_of_the_other_plate(make: Callable) -> None:
    """The second plate takes rows that depend on those which the first drew in the same run."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("persons", 12, subsample_size=3) as rows:
            pyro.sample("a", dist.Normal(x[rows], 1.0))
        with pyro.plate("items", 7, subsample=rows % 7) as rows:
            pyro.sample("b", dist.Normal(y[rows], 1.0))

    guide = make(model)
    for _ in range(3):
        nodes = pyro.poutine.trace(guide).get_trace(X, Y).nodes
        assert torch.equal(nodes["items"]["value"], nodes["persons"]["value"] % 7)


@pytest.mark.parametrize("context", [BY_DATA, {"persons": "x"}])
def test_copies_pickles_and_state_dicts_say_the_same(context: dict) -> None:
    options = {"num_layers": 1, "encoder": {"persons": nn.Sequential(nn.Unflatten(0, (-1, 1)))}}
    guide = scattered("beside").guide
    made = [
        pf.AmortizedPlanarGuide(beside, PLATES, context, **options).setup(X, Y) for _ in range(2)
    ]
    with torch.no_grad():
        for p in made[0].parameters():
            p += 0.1 * torch.randn_like(p)
    made[1].load_state_dict(made[0].state_dict())
    copies = [copy.deepcopy(made[0]), pickle.loads(pickle.dumps(made[0])), made[1]]
    expected = made[0].median(X, Y)
    for other in copies:
        for name, value in other.median(X, Y).items():
            assert torch.equal(value, expected[name])
        assert {n: v.shape for n, v in other(X, Y).items()} == {"mu": (), "a": (12,), "b": (7,)}
    with pytest.raises(RuntimeError, match="local_flow"):
        guide.load_state_dict(made[0].state_dict())


def test_all_parts_are_trained_by_traces() -> None:
    encoders = {name: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2)) for name in PLATES}
    guide = pf.AmortizedPlanarGuide(beside, PLATES, BY_DATA, num_layers=1, encoder=encoders)
    guide.setup(X, Y)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi = pyro.infer.SVI(beside, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(X, Y, (5, 3))
    moved = {name for name, p in guide.named_parameters() if not torch.equal(p, before[name])}
    for k in range(2):
        assert {f"local_flow.{k}.shift", f"local_flow.{k}.affine.offset"} <= moved
        assert f"context.{k}.encoder.1.weight" in moved


def in_both(x: Tensor, y: Tensor) -> None:
    with pyro.plate("persons", 12, dim=-1), pyro.plate("items", 7, dim=-2):
        pyro.sample("ability", dist.Normal(0.0, 1.0))


def classes_in_schools(x: Tensor, y: Tensor) -> None:
    with pyro.plate("persons", 12, dim=-2):
        pyro.sample("school", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 7, dim=-1):
            pyro.sample("class", dist.Normal(0.0, 1.0))


def third(x: Tensor, y: Tensor) -> None:
    beside(x, y)
    with pyro.plate("others", 9, subsample_size=4):
        pyro.sample("c", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (in_both, r"'ability' lies in plate 'items' as well as in 'persons'.*AutoStructuredFlow"),
        (classes_in_schools, r"'class' lies in plate 'items' as well.*AutoStructuredFlow"),
        (third, r"'c'.*'others', which subsamples 4 of 9.*plate=\['persons', 'items', 'others'\]"),
    ],
)
def test_what_it_cannot_treat_is_refused(model: Callable, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        pf.AmortizedPlanarGuide(model, PLATES, BY_DATA)(X, Y)


@pytest.mark.parametrize(
    ("plate", "options", "error", "expected"),
    [
        ([], {}, ValueError, "one plate or several different ones"),
        (["items", "items"], {}, ValueError, "several different ones"),
        (["items", 3], {}, TypeError, "a list of names"),
        (PLATES, {"context": "x"}, ValueError, r"context must be a mapping.*'persons': \.\.\."),
        (PLATES, {"context": {"person": "x"}}, ValueError, r"context must be a mapping.*'person'"),
        (PLATES, {"context": BY_DATA, "encoder": nn.Identity()}, ValueError, "encoder must be a"),
        (
            PLATES,
            {"context": {"items": "y"}, "encoder": {"persons": nn.Identity()}},
            ValueError,
            "encoder needs.*plate 'persons'",
        ),
    ],
)
def test_bad_arguments_are_refused(plate: list, options: dict, error: type, expected: str) -> None:
    with pytest.raises(error, match=expected):
        pf.AmortizedPlanarGuide(beside, plate, **options)
