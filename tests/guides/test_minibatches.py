"""Structured guides where plates subsample, against the same model with its plates in full."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

import pyroflow as pf
from pyroflow.inference.minibatches import MinibatchBound
from pyroflow.inference.row_adam import RowAdam
from pyroflow.model.at_hand import Subsampling, places_at_hand
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.model.log_joint_at_hand import LogJointAtHand, LogJointInFull
from pyroflow.saving.guides import describe_guide, restore_guide


def groups(num: int, seed: int = 0) -> tuple[Callable, Tensor, Tensor]:
    """Normal groups with uneven noise; a grid of log tau, and the log evidence at each point."""
    draw = torch.Generator().manual_seed(seed)
    sd = torch.logspace(-1, 1, num)[torch.randperm(num, generator=draw)]
    y = 1 + 0.7 * torch.randn(num, generator=draw) + sd * torch.randn(num, generator=draw)

    def model(batch: int | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", num, subsample_size=batch) as rows:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sd[rows]), obs=y[rows])

    t = torch.linspace(-6, 3, 3000)
    precision = 1 / (t.exp().square().unsqueeze(1) + sd.square())  # given tau, mu is normal
    total = precision.sum(1) + 1 / 9
    mean = (precision * y).sum(1) / total
    log_p = precision.log().sum(1) - (precision * y.square()).sum(1) - num * math.log(2 * math.pi)
    log_p = log_p / 2 - math.log(3) - total.log() / 2 + total * mean.square() / 2
    log_p = log_p + dist.HalfNormal(2.0).log_prob(t.exp()) + t
    return model, t, log_p + math.log(t[1] - t[0])


def beside(batch: tuple[int, int] | None = None) -> None:
    """Two plates side by side, the rows of one with a positive and a plain number."""
    cats, dogs = batch or (None, None)
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("cats", 7, subsample_size=cats) as rows:
        a = pyro.sample("a", dist.Normal(0.0, scale))
        w = pyro.sample("w", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Normal(a, w), obs=torch.linspace(-2, 2, 7)[rows])
    with pyro.plate("dogs", 5, subsample_size=dogs) as rows:
        b = pyro.sample("b", dist.Normal(scale, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.linspace(-1, 3, 5)[rows])


def nested(batch: int | None = None) -> None:
    """Schools inside districts that subsample; data by a plate that takes the districts' rows."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("districts", 7, subsample_size=batch, dim=-2) as rows:
        a = pyro.sample("a", dist.Normal(top, 1.0))
        with pyro.plate("schools", 4, dim=-1):
            pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("data", 7, subsample=rows, dim=-1):
        pyro.sample("y", dist.Normal(a.squeeze(-1), 0.5), obs=torch.linspace(-2, 2, 7)[rows])


def slopes(batch: int | None = None) -> None:
    """Vectors of two numbers with a correlation."""
    x, y = torch.linspace(-1, 1, 3), torch.linspace(-2, 2, 18).reshape(6, 3).roll(2, 0)
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", 6, subsample_size=batch) as rows:
        b = pyro.sample(
            "b", dist.MultivariateNormal(torch.zeros(2), scale_tril=sd.diag_embed() @ L)
        )
        mean = b[..., :1] + b[..., 1:] * x
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y[rows])


CASES = {
    "groups": (groups(23)[0], 5),
    "beside": (beside, (3, 2)),
    "nested": (nested, 3),
    "slopes": (slopes, 4),
}


def scattered(case: str, **options: object) -> tuple[pf.AutoStructuredFlow, BoundModel]:
    """A guide with coordinates, at random parameters."""
    model, batch = CASES[case]
    guide = pf.AutoStructuredFlow(model, **options)
    problem = BoundModel(model, guide, (batch,))
    guide.find_coordinates((batch,), {})
    assert guide.coordinates is not None
    with pf.seeds.seeded(1):
        start = guide._init_loc()
        z = start + 0.5 * torch.randn_like(start)
        guide.coordinates.set(torch.rand_like(z), z)
        for name, p in guide.flow.named_parameters():
            p.data += 0.1 * torch.randn_like(p) * (1.0 if "lower" not in name else 0.5)
    return guide, problem


@pytest.mark.parametrize("case", ["groups", slow("beside"), "nested", slow("slopes")])
def test_all_rows_in_parts_are_the_model_in_full(case: str) -> None:
    guide, problem = scattered(case)
    model, _ = CASES[case]
    whole = pf.AutoStructuredFlow(model)
    in_full = BoundModel(model, whole, (None,))
    whole.find_coordinates((None,), {})
    whole.coordinates.set(guide.coordinates.c, guide._init_loc())
    guide.coordinates.set(guide.coordinates.c, guide._init_loc())
    x = torch.randn(6, guide.latent_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide.coordinates(x), whole.coordinates(x))
    found = LogJointInFull(LogJointAtHand(problem, guide, 4)).values_and_gradients(x)
    expected = LogJoint(in_full, whole, 4).values_and_gradients(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("case", "path", "tails"),
    [
        ("groups", True, False),
        slow("beside", True, False),
        ("nested", True, False),
        slow("slopes", True, False),
        ("beside", False, True),
        ("slopes", True, True),
    ],
)
def test_bound_and_gradients_of_rows_have_those_of_all_as_mean(
    case: str, path: bool, tails: bool
) -> None:
    guide, problem = scattered(case, tails=tails)
    guide.path_derivative = path
    part = LogJointAtHand(problem, guide, 4)
    q = guide.over_coordinates()
    eps = torch.randn(4, guide.latent_dim, generator=torch.Generator().manual_seed(0))
    z = eps
    for t in q.transforms:
        z = t(z)
    whole = (LogJointInFull(part)(z) - q.log_prob(z)).mean()
    parameters = guide.flow.parameters
    expected = torch.autograd.grad(whole, list(parameters()), allow_unused=True)
    cover, total = part.subsampling.cover(), 0.0
    for rows in cover:
        part.rows = rows.to(z)
        q = guide.at_hand(part.rows)
        x = eps[:, guide.affine.place[places_at_hand(guide.latents, rows.index)]]
        x = x[:, q.transforms[-1].family.order]  # in the order of the base of these rows
        for t in q.transforms:
            x = t(x)
        same = z[:, places_at_hand(guide.latents, rows.index)]
        torch.testing.assert_close(x, same)
        total = total + (part(x) - q.log_prob(x)).mean() / len(cover)
    torch.testing.assert_close(total, whole)
    found = torch.autograd.grad(total, list(parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b)


@pytest.mark.slow
def test_random_rows_are_unbiased() -> None:
    guide, problem = scattered("beside")
    part = LogJointAtHand(problem, guide, 4)
    z = guide.over_coordinates().sample((4,))
    whole = LogJointInFull(part).values(z) - guide.over_coordinates().log_prob(z)
    found = []
    with pf.seeds.seeded(0):
        for _ in range(80):
            part.rows = part.subsampling.draw().to(z)
            x = z[:, places_at_hand(guide.latents, part.rows.index)]
            found.append(part.values_and_gradients(x)[0] - guide.at_hand(part.rows).log_prob(x))
    found = torch.stack(found).detach()
    assert ((found.mean(0) - whole).abs() < 4 * found.std(0) / 80**0.5).all()


@pytest.mark.parametrize(
    ("num", "batch", "seed"), [(50, 20, 0), *(slow(1000, 100, seed) for seed in range(3))]
)
def test_groups_in_parts_have_their_evidence(num: int, batch: int, seed: int) -> None:
    model, t, log_p = groups(num, seed)
    guide = pf.AutoStructuredFlow(model)
    fit = pf.fit_guide(model, guide, (batch,), steps=100, seed=seed, progress=False)
    assert -0.02 < fit.best_loss + log_p.logsumexp(0).item() < 0.02
    weights, tau = log_p.softmax(0), guide.constrain(guide.flow().sample((4000,)))[0]["tau"].log()
    mean = (weights * t).sum()
    sd = (weights * (t - mean).square()).sum().sqrt()
    assert (tau.mean() - mean).abs() < 0.1 * sd
    assert tau.std() == pytest.approx(sd.item(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["beside", "nested", "slopes"])
def test_it_is_as_good_as_with_plates_in_full(case: str) -> None:
    model, batch = CASES[case]
    losses = []
    for args in ((batch,), (None,)):
        guide = pf.AutoStructuredFlow(model)
        options = {"steps": 200, "seed": 0, "progress": False}
        losses.append(pf.fit_guide(model, guide, args, **options).best_loss)
    assert losses[0] < losses[1] + 0.05


def test_rows_that_are_not_at_hand_stay() -> None:
    guide, problem = scattered("groups")
    bound = MinibatchBound(problem, "elbo", 1, 8, seed=0)
    adam = RowAdam(bound.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in guide.affine.named_parameters()}
    for _ in range(2):
        adam.zero_grad()
        bound.loss(1.0).backward()
        assert adam.clip(math.inf).isfinite()
        rows = bound.part.rows.index["groups"]
        adam.step()
        away = torch.ones(23, dtype=torch.bool).index_fill(0, rows, False)
        moved = [
            (p - before[n]).flatten(1).any(1)
            for n, p in guide.affine.named_parameters()
            if n in ("lower_0", "coupling_0")
        ]
        assert not any(bool(m[away].any()) for m in moved)
        assert moved[1][~away].all()
        before = {name: p.detach().clone() for name, p in guide.affine.named_parameters()}


def test_dense_gradients_are_stepped_as_by_adam() -> None:
    """A table of which all rows are at hand, and a clipped norm."""
    found = []
    for sparse in (True, False):
        table = torch.arange(6.0).reshape(3, 2).requires_grad_()
        adam = (RowAdam if sparse else torch.optim.Adam)([table], lr=0.1)
        for step in range(3):
            adam.zero_grad()
            index = torch.tensor([2, 0, 1])
            rows = torch.nn.functional.embedding(index, table, sparse=sparse)
            ((1 + step) * rows.square()).sum().backward()
            if sparse:
                norm = adam.clip(0.5)
            else:
                expected = torch.nn.utils.clip_grad_norm_([table], 0.5)
            adam.step()
        found.append(table.detach())
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(*found)


def test_pyro_runs_it_on_the_rows_that_the_model_draws() -> None:
    model, _, _ = groups(23)
    guide, _ = scattered("groups")
    assert guide(5)["theta"].shape == (5,)
    assert guide.median(5)["theta"].shape == (23,)
    assert guide(None)["theta"].shape == (23,)
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad(), pf.seeds.seeded(0):
        parts = torch.tensor([elbo.loss(model, guide, 5) for _ in range(40)])
        whole = torch.tensor([elbo.loss(model, guide, None) for _ in range(40)])
    error = (parts.var() / 40 + whole.var() / 40).sqrt()
    assert (parts.mean() - whole.mean()).abs() < 4 * error
    draws = Predictive(model, guide=guide, num_samples=6, parallel=True)(5)
    assert draws["theta"].shape == (6, 5)


def test_files_and_copies(tmp_path: Path) -> None:
    guide, _ = scattered("groups")
    with pf.seeds.seeded(0):
        draws = guide.constrain(guide.flow().sample((5,)))[0]
    pf.save(guide, tmp_path / "guide.pt")
    for other in (pf.load(tmp_path / "guide.pt"), copy.deepcopy(guide)):
        torch.testing.assert_close(other.log_prob(draws), guide.log_prob(draws))
    assert pf.load(tmp_path / "guide.pt")()["theta"].shape == (23,)  # without a model all rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "beside"])
def test_a_loaded_guide_goes_on(name: str, tmp_path: Path) -> None:
    """As the one that was saved does, to the same state."""
    guide, problem = scattered(name)
    pf.save(guide, tmp_path / "guide.pt")
    other = pf.load(tmp_path / "guide.pt", model=problem.given)
    assert (other.kinds, other.subsampling) == (guide.kinds, guide.subsampling)
    assert {n: t.shape for n, t in other(*problem.args).items()} == {
        n: t.shape for n, t in guide(*problem.args).items()
    }
    options = {"steps": 10, "warm_start": False, "seed": 0, "progress": False}
    losses = [
        pf.fit_guide(problem.given, each, problem.args, **options).losses for each in (guide, other)
    ]
    torch.testing.assert_close(*map(torch.tensor, losses))
    pf.save(other, tmp_path / "again.pt")
    assert pf.load(tmp_path / "again.pt").subsampling == guide.subsampling


def test_a_file_with_other_rows_is_damaged(tmp_path: Path) -> None:
    guide, problem = scattered("groups")
    description = describe_guide(guide)
    for sizes in ([23, 23], [22, 5], [23, 0]):
        damaged = description | {"subsampling": {"groups": sizes}}
        with pytest.raises(ValueError, match="'groups' cannot have drawn"):
            restore_guide(damaged, None)
    pf.save(guide, tmp_path / "guide.pt")
    model, _, _ = groups(22)
    other = pf.load(tmp_path / "guide.pt", model=model)
    with pytest.raises(ValueError, match="does not fit the guide in the file.*'theta'"):
        other(5)


def inner(batch: int) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("districts", 7, dim=-2):
        a = pyro.sample("a", dist.Normal(top, 1.0))
        with pyro.plate("schools", 4, subsample_size=batch, dim=-1):
            pyro.sample("b", dist.Normal(a, 1.0))


def summed(batch: int) -> None:
    with pyro.plate("rows", 9, subsample_size=batch):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize(
    ("model", "expected"), [(inner, "'b'.*'schools'.* 2 of 4"), (summed, "'z'.*'rows'.* 2 of 9")]
)
def test_rows_that_are_not_apart_are_refused(model: Callable, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        pf.AutoStructuredFlow(model)(2)


def test_one_row_does_not_show_whether_rows_interact() -> None:
    with pytest.raises(ValueError, match=r"'theta'.* 1 of 23 rows.*draw two or more"):
        pf.AutoStructuredFlow(groups(23)[0])(1)


def test_rows_that_the_model_picks_are_fitted_by_traces() -> None:
    def model(index: Tensor) -> None:
        with pyro.plate("rows", 9, subsample_size=3, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.linspace(-1, 1, 9)[index])

    guide, index = pf.AutoStructuredFlow(model), torch.tensor([1, 4, 7])
    problem = BoundModel(model, guide, (index,))
    with pytest.raises(ValueError, match="recorded with its rows"):
        LogJointAtHand(problem, guide, 4)
    with pytest.warns(
        UserWarning, match="Pyro's traces.* picks the rows .*'rows'.* subsample_size="
    ):
        assert pf.fit_guide(model, guide, (index,), steps=5, seed=0, progress=False).steps == 5


def test_the_cover_has_each_row_once() -> None:
    sizes = Subsampling({"a": (7, 3), "b": (4, 2)})
    cover, total = sizes.cover(), torch.zeros(7, 4)
    for rows in cover:
        weights = torch.outer(rows.weights["a"], rows.weights["b"]) / len(cover)
        total[rows.index["a"][:, None], rows.index["b"]] += weights
    torch.testing.assert_close(total, torch.ones(7, 4))
    assert len(cover) == sizes.parts == 6


@pytest.mark.slow
def test_a_report_is_of_all_rows() -> None:
    model, _, log_p = groups(300)
    evidence = log_p.logsumexp(0).item()
    guide = pf.AutoStructuredFlow(model)
    pf.fit_guide(model, guide, (60,), steps=10, seed=0, progress=False)
    report = pf.diagnose(model, guide, (60,), num_samples=1000)
    assert report.log_evidence == pytest.approx(evidence, abs=0.03)
    assert report.level in ("good", "resample")
    assert "all 300 rows of 'groups', 60 at a time" in str(report)
    assert report.resample(5, seed=0)["theta"].shape == (5, 300)
    with torch.no_grad():  # too narrow, and a report on the rows at hand alone might not see it
        guide.affine.raw_scale -= 1.0
    report = pf.diagnose(model, guide, (60,), num_samples=1000)
    assert report.level == "bad"
