"""pf.mcmc: exact draws by every method, their shapes and numbers, and the verdict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from cases import slow
from chains_cases import FACTOR, MEAN, gaussian, poor_guide, student
from pyro import poutine
from torch import Tensor

import pyroflow as pf
from pyroflow.chains.hmc import HMC
from pyroflow.chains.independence import Independence
from pyroflow.chains.pilot import Pilot
from pyroflow.chains.result import judge
from pyroflow.chains.sampler import Sampler
from pyroflow.chains.target import Points
from pyroflow.guides.mixture import MixtureGuide
from pyroflow.targets import (
    eight_schools_centered,
    eight_schools_exact,
    eight_schools_noncentered,
)

QUICK = {"num_samples": 200, "num_chains": 32, "progress": False}


def kinds() -> None:
    """Sites on several supports, in plates and out of them."""
    pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("outer", 2, dim=-2):
        pyro.sample("u", dist.Uniform(-1.0, 3.0))
        with pyro.plate("inner", 3, dim=-1):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
            pyro.deterministic("first", p[..., 0])
    pyro.sample("y", dist.Normal(torch.tensor(0.0), 1.0), obs=torch.tensor(0.3))


def within(found: Tensor, expected: Tensor, chains: pf.Chains, site: str) -> bool:
    return bool(((found - expected).abs() < 4.5 * chains.by_site[site]["mcse"]).all())


class TestExactness:
    @pytest.mark.parametrize("method", ["independence and HMC", "HMC"])
    def test_a_gaussian_over_a_poor_guide(self, method: str) -> None:
        guide = poor_guide(gaussian, 0.4)
        options = {"num_samples": 250, "num_chains": 48, "warmup": 100, "progress": False}
        chains = pf.mcmc(gaussian, guide, method=method, **options)
        z = chains.draws["z"].double()
        assert (chains.method, z.shape) == (method, (48 * 250, 3))
        assert chains.rhat < 1.03
        assert chains.ess > 1500
        assert within(z.mean(0), MEAN, chains, "z")
        assert torch.allclose(z.T.cov(), FACTOR @ FACTOR.T, atol=0.06)
        assert scipy.stats.kstest(z[::10, 1].numpy(), scipy.stats.norm(-1, 1).cdf).pvalue > 1e-3
        exact = dist.MultivariateNormal(MEAN, scale_tril=FACTOR).log_prob(z)
        assert torch.allclose(chains.log_p, exact, atol=1e-8)

    @pytest.mark.slow
    def test_heavy_tails_and_a_positive_site(self) -> None:
        guide = poor_guide(student, 1.5)
        options = {"num_samples": 200, "num_chains": 64, "warmup": 80, "progress": False}
        chains = pf.mcmc(student, guide, **options)
        assert chains.method == "independence and HMC"
        t, s = chains.draws["t"], chains.draws["s"]
        assert within(t.mean(), torch.tensor(1.0), chains, "t")
        assert within(s.mean(), torch.tensor(1.5), chains, "s")
        for q in (0.02, 0.1, 0.5, 0.9, 0.98):
            below = (t < 1 + 2 * scipy.stats.t(5).ppf(q)).double().mean().item()
            assert below == pytest.approx(q, abs=0.015)
        assert s.log().std().item() == pytest.approx(
            math.sqrt(scipy.special.polygamma(1, 3)), rel=0.03
        )

    @pytest.mark.slow
    def test_eight_schools(self) -> None:
        """In float32, where draws go in turns or by independence alone, as the fit came out."""
        torch.set_default_dtype(torch.float32)
        model = eight_schools_noncentered
        guide = pf.AutoSylvesterFlow(model, num_layers=4)
        pf.fit_guide(model, guide, steps=150, seed=0, progress=False)
        chains = pf.mcmc(model, guide, num_samples=800, num_chains=48, progress=False)
        torch.set_default_dtype(torch.float64)
        exact, _ = eight_schools_exact(200_000)
        log_tau, expected = chains.draws["tau"].double().log(), exact["tau"].log()
        assert "independence" in chains.method
        assert chains.level == "good", chains.verdict
        assert log_tau.mean().item() == pytest.approx(expected.mean().item(), abs=0.05)
        assert log_tau.std().item() == pytest.approx(expected.std().item(), rel=0.08)
        mu = chains.draws["mu"].double()
        assert within(mu.mean(), exact["mu"].mean(), chains, "mu")
        assert mu.dtype == torch.float64
        assert chains.draws["mu"].dtype == torch.float32
        assert chains.log_p.dtype == torch.float64

    @pytest.mark.slow
    def test_coordinates_of_a_hierarchy(self) -> None:
        """Draws and their log joint are those of the sites as they are written."""
        guide = pf.AutoPlanarFlow(eight_schools_centered, 0)
        pf.fit_guide(eight_schools_centered, guide, steps=1, seed=0, progress=False)
        assert "theta" in guide.centring
        options = {"num_samples": 300, "num_chains": 48, "warmup": 60, "progress": False}
        chains = pf.mcmc(eight_schools_centered, guide, **options)
        exact, _ = eight_schools_exact(200_000)
        theta, expected = chains.draws["theta"], exact["theta"]
        assert within(theta.mean(0), expected.mean(0), chains, "theta")
        assert torch.allclose(theta.std(0), expected.std(0), rtol=0.08)
        given = {name: value[:50] for name, value in chains.draws.items()}
        for row in range(3):
            data = {name: value[row] for name, value in given.items()}
            model = poutine.condition(eight_schools_centered, data=data)
            expected_log_p = poutine.trace(model).get_trace().log_prob_sum()
            assert torch.allclose(chains.log_p[row], expected_log_p)

    def test_an_exact_guide_needs_no_gradient(self) -> None:
        """Every proposal is accepted, save those of the wider part."""

        def model() -> None:
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

        guide = pf.AutoPlanarFlow(model, 0).setup()
        guide.affine.start_from(torch.zeros(4), torch.eye(4))
        chains = pf.mcmc(model, guide, wide=0.0, **QUICK)
        assert (chains.method, chains.acceptance, chains.longest_rejection) == (
            "independence",
            1,
            0,
        )
        assert chains.level == "good"
        assert chains.ess > 4000
        assert 0.9 < pf.mcmc(model, guide, **QUICK).acceptance < 1

    def test_simulation_based_calibration(self) -> None:
        """Of 120 rates, each with its own datum, ranks among draws of the posterior are uniform."""
        num = 120
        rates = dist.Gamma(torch.full((num,), 2.0), 1.0).sample()
        counts = dist.Poisson(rates).sample()

        def model() -> None:
            with pyro.plate("rows", num):
                rate = pyro.sample("rate", dist.Gamma(torch.full((num,), 2.0), 1.0))
                pyro.sample("n", dist.Poisson(rate), obs=counts)

        guide = pf.AutoPlanarFlow(model, 0, "diagonal", init_scale=0.7).setup()
        chains = pf.mcmc(model, guide, num_samples=80, num_chains=24, warmup=100, progress=False)
        assert chains.method == "HMC"
        draws = chains.draws["rate"].double()
        ranks = (draws < rates).double().mean(0)
        assert scipy.stats.kstest(ranks.numpy(), "uniform").pvalue > 1e-3
        posterior = scipy.stats.gamma(2 + counts.double().numpy(), scale=0.5)
        z = (draws.mean(0) - torch.as_tensor(posterior.mean())) / chains.by_site["rate"]["mcse"]
        assert 0.7 < z.std() < 1.4
        spread = draws.std(0) / torch.as_tensor(posterior.std())
        assert spread.mean().item() == pytest.approx(1, abs=0.02)


def test_shapes_supports_and_numbers_by_site() -> None:
    guide = pf.AutoPlanarFlow(kinds, 1, init_scale=0.4).setup()
    chains = pf.mcmc(kinds, guide, warmup=80, **QUICK)
    num = 32 * 200
    shapes = {"scale": (), "u": (2, 1), "p": (2, 3, 3)}
    assert {name: v.shape for name, v in chains.draws.items()} == {
        name: (num, *shape) for name, shape in shapes.items()
    }
    draws = chains.draws
    assert (draws["scale"] > 0).all()
    assert ((draws["u"] > -1) & (draws["u"] < 3)).all()
    assert torch.allclose(draws["p"].sum(-1), torch.tensor(1.0))
    assert torch.allclose(draws["p"].mean((0, 1, 2)), torch.tensor([2.0, 3.0, 4.0]) / 9, atol=0.01)
    names = ["rhat", "ess_bulk", "ess_tail", "mean", "sd", "mcse"]
    for name, numbers in chains.by_site.items():
        assert list(numbers) == names
        assert all(number.shape == shapes[name] for number in numbers.values())
    assert chains.rhat == max(numbers["rhat"].max() for numbers in chains.by_site.values())
    assert chains.ess == min(
        torch.minimum(numbers["ess_bulk"], numbers["ess_tail"]).min()
        for numbers in chains.by_site.values()
    )
    by_chain = draws["scale"].reshape(32, 200)
    still = ~chains.moved.reshape(32, 200)
    assert (by_chain[:, 1:] == by_chain[:, :-1]).equal(still[:, 1:])
    assert "verdict" in str(chains)
    assert chains.verdict in str(chains)


def test_arviz_has_chains_and_draws() -> None:
    guide = pf.AutoPlanarFlow(kinds, 1, init_scale=0.4).setup()
    chains = pf.mcmc(kinds, guide, method="independence", **QUICK)
    idata = chains.to_arviz(coords={"inner": ["a", "b", "c"]})
    posterior = idata["posterior"]
    assert set(posterior.data_vars) == {"scale", "u", "p", "first"}
    assert posterior["scale"].dims == ("chain", "draw")
    assert posterior["p"].dims == ("chain", "draw", "outer", "inner", "p_dim_0")
    assert posterior["p"].shape == (32, 200, 2, 3, 3)
    assert list(posterior["inner"].values) == ["a", "b", "c"]
    expected = chains.draws["p"].reshape(32, 200, 2, 3, 3).numpy()
    assert (posterior["p"].values == expected).all()
    assert (posterior["first"].values == expected[..., 0]).all()
    stats = idata["sample_stats"]
    assert (stats["lp"].values == chains.log_p.reshape(32, 200).numpy()).all()
    assert (stats["accepted"].values == chains.moved.reshape(32, 200).numpy()).all()
    assert float(idata["observed_data"]["y"]) == pytest.approx(0.3)


def test_seeds() -> None:
    guide = poor_guide(gaussian)
    options = QUICK | {"method": "independence and HMC", "warmup": 10, "num_samples": 20}
    before = torch.get_rng_state()
    first = pf.mcmc(gaussian, guide, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    again = pf.mcmc(gaussian, guide, seed=3, **options)
    other = pf.mcmc(gaussian, guide, seed=4, **options)
    assert torch.equal(first.draws["z"], again.draws["z"])
    assert not torch.equal(first.draws["z"], other.draws["z"])
    pyro.set_rng_seed(1)
    free = pf.mcmc(gaussian, guide, seed=None, **options)
    assert not torch.equal(
        free.draws["z"], pf.mcmc(gaussian, guide, seed=None, **options).draws["z"]
    )


@pytest.mark.parametrize(
    ("scale", "method"), [(1.0, "independence"), (0.02, "HMC"), (3.5, "independence and HMC")]
)
def test_the_guide_says_which_method(scale: float, method: str) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = pf.AutoPlanarFlow(model, 0).setup()
    guide.affine.start_from(torch.zeros(2), scale * torch.eye(2))
    chains = pf.mcmc(model, guide, warmup=50, **QUICK)
    assert chains.method == method
    assert ("by HMC alone" in chains.verdict) == (method == "HMC")


def test_a_student_base() -> None:
    guide = pf.AutoPlanarFlow(student, 1, base_df=4.0, init_scale=1.2).setup()
    chains = pf.mcmc(student, guide, **QUICK | {"num_samples": 300, "warmup": 50})
    assert chains.expected_acceptance > 0.3
    assert within(chains.draws["t"].mean(), torch.tensor(1.0), chains, "t")
    below = (chains.draws["t"] < 1 + 2 * scipy.stats.t(5).ppf(0.02)).double().mean().item()
    assert below == pytest.approx(0.02, abs=0.006)


def test_a_model_that_runs_one_by_one() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if z.item() > 0 else z / 2, 1.0), obs=torch.tensor(1.0))

    guide = pf.AutoPlanarFlow(model, 0, init_scale=0.8).setup()
    chains = pf.mcmc(model, guide, num_samples=40, warmup=10, progress=False, method="independence")
    assert (chains.num_chains, chains.one_by_one) == (8, True)
    assert "each point took a run of the model" in chains.verdict
    grid = torch.linspace(-6.0, 6.0, 4001)
    mean = grid.where(grid > 0, grid / 2)
    log_density = -(grid**2) / 2 - (1 - mean) ** 2 / 2
    weights = log_density.softmax(0)
    assert within(chains.draws["z"].mean(), (weights * grid).sum(), chains, "z")


def test_a_short_chain_is_not_good() -> None:
    guide = poor_guide(gaussian)
    for method in ("independence", "HMC"):
        options = {"num_samples": 4, "num_chains": 1, "warmup": 3, "progress": False}
        chains = pf.mcmc(gaussian, guide, method=method, **options)
        assert chains.level == "bad"
        assert copy.deepcopy(chains).draws["z"].shape == (4, 3)


class TestGoingOn:
    @staticmethod
    def sampler(method: str, num: int) -> Sampler:
        torch.manual_seed(0)
        return Sampler(gaussian, poor_guide(gaussian), (), None, num, 32, method=method)

    @classmethod
    @cache
    def sampled(cls) -> tuple[Sampler, pf.Chains]:
        sampler = cls.sampler("HMC", 20)
        return sampler, sampler.run(20)

    @pytest.mark.parametrize("method", ["independence", slow("independence and HMC"), "HMC"])
    def test_chains_go_on_from_where_they_are_as_they_are(self, method: str) -> None:
        sampler = self.sampler(method, 50)
        first, left = sampler.run(50), sampler.points
        assert torch.equal(first.draws["z"][49::50], left.x)
        adapted = sampler.hmc and (sampler.hmc.step_size, sampler.hmc.length)
        starts: list[Tensor] = []
        kernel = Independence if method != "HMC" else HMC
        with pytest.MonkeyPatch.context() as patch:
            step = kernel.step
            patch.setattr(kernel, "step", lambda k, p: (starts.append(p.u), step(k, p))[1])
            second = sampler.run(150, thin=2)
        assert torch.equal(starts[0], left.u)
        assert len(starts) == 300  # without a second warm-up
        assert adapted == (sampler.hmc and (sampler.hmc.step_size, sampler.hmc.length))
        assert within(second.draws["z"].mean(0), MEAN, second, "z")
        torch.testing.assert_close(second.draws["z"].T.cov(), FACTOR @ FACTOR.T, atol=0.25, rtol=0)

    @pytest.mark.slow
    def test_short_chains_are_settled(self) -> None:
        sampler = self.sampler("HMC", 100)
        short = sampler.run(100)
        assert 1.01 < short.rhat < 1.05
        assert short.level == "bad"
        sampler = self.sampler("HMC", 100)
        settled = sampler.run_on(100)
        assert settled.level == "good", settled.verdict
        assert len(settled.log_p) == 100 * 32

    @pytest.mark.parametrize(
        ("period", "rhats", "thins"),
        [
            (8, [1.005], [1]),
            (8, [1.03, 1.005], [1, 1]),
            (8, [1.05, 1.02, 1.02], [1, 1, 3]),
            (8, [1.2], [1]),
            (1, [1.015, 1.004], [1, 2]),
            (1, [1.04], [1]),
            (1, [math.nan], [1]),
            (8, [math.inf], [1]),
        ],
    )
    def test_how_long_they_go_on_follows_from_rhat(
        self, monkeypatch: pytest.MonkeyPatch, period: int, rhats: list[float], thins: list[int]
    ) -> None:
        sampler, made = self.sampled()
        left, runs = iter(rhats), []

        def run(num: int, *, thin: int = 1) -> pf.Chains:
            runs.append((thin, sampler.period))
            return replace(made, rhat=next(left), ess=900.0, longest_rejection=0)

        monkeypatch.setattr(sampler, "period", period)
        monkeypatch.setattr(sampler, "run", run)
        assert sampler.run_on(20).rhat == pytest.approx(rhats[-1], nan_ok=True)
        assert runs == [(thin, 1 if i else period) for i, thin in enumerate(thins)]


def test_a_model_with_parameters_and_arguments() -> None:
    """They stay as they are, and the draws are of the model with these."""

    def model(y: Tensor, sd: float) -> None:
        scale = pyro.param("scale", torch.tensor(2.0))
        z = pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, sd), obs=y)

    arguments = {"args": (torch.tensor([1.0, 2.0, 3.0]),), "kwargs": {"sd": 1.5}}
    guide = pf.AutoPlanarFlow(model, 0, init_scale=0.6).setup(*arguments["args"], sd=1.5)
    chains = pf.mcmc(model, guide, **arguments, **QUICK)
    precision = 1 / 4 + 3 / 1.5**2
    assert within(chains.draws["z"].mean(), torch.tensor(6 / 1.5**2 / precision), chains, "z")
    assert chains.draws["z"].std().item() == pytest.approx(precision**-0.5, rel=0.05)
    assert chains.to_arviz()["observed_data"]["y"].dims == ("rows",)


class TestVerdict:
    def chains(self) -> pf.Chains:
        guide = pf.AutoPlanarFlow(gaussian, 0, init_scale=0.9).setup()
        return pf.mcmc(gaussian, guide, **QUICK)

    def test_each_failure_is_named(self) -> None:
        good = replace(
            self.chains(), rhat=1.005, ess=900.0, longest_rejection=5, disagreements=[], khat=0.3
        )
        judge(good)
        assert good.level == "good"
        assert "a region where the guide has no draws stays unseen" in good.verdict
        changes = {
            "R-hat 1.020 is above 1.01": {"rhat": 1.02},
            "R-hat nan is above 1.01": {"rhat": math.nan},
            "only 399 draws are effective": {"ess": 399.0},
            "stayed where it was for 20 of 200": {"longest_rejection": 20},
            "at 'z'": {"disagreements": ["z"]},
            r"no number at 2.0% of the guide's draws": {"nonfinite": 0.02},
            "not finite at all draws": {"log_p": good.log_p.clone().fill_(math.nan)},
        }
        for words, change in changes.items():
            bad = replace(good, **change)
            judge(bad)
            assert bad.level == "bad"
            assert words in bad.verdict

    def test_a_bad_guide_alone_is_not_good(self) -> None:
        chains = pf.mcmc(gaussian, poor_guide(gaussian, 0.2), method="independence", **QUICK)
        assert chains.level == "bad"
        assert "stayed where it was" in chains.verdict

    @staticmethod
    def pilot(x: Tensor, log_weights: Tensor, khat: float = 0.3) -> Pilot:
        zero = torch.zeros(len(x))
        points = Points(x, x, zero, zero)
        smoothed = log_weights - log_weights.logsumexp(0)
        return Pilot(points, smoothed, khat, log_weights, 0.0)

    def test_means_that_differ_are_found(self) -> None:
        x, chains = torch.randn(2000, 3), torch.randn(8, 250, 3)
        pilot = self.pilot(x, torch.zeros(2000))
        assert pilot.disagreements(chains) == []
        moved = chains + torch.tensor([0.0, 0.2, 0.0])
        assert pilot.disagreements(moved) == [1]
        assert replace(pilot, khat=0.9).disagreements(moved) == []
        heavy = x.clone()
        heavy[:, 1] = torch.tan(math.pi * (torch.rand(2000) - 0.5)).abs() ** 1.5
        assert self.pilot(heavy, torch.zeros(2000)).disagreements(moved) == []

    def test_many_means_raise_no_false_alarm(self) -> None:
        alarms = 0
        for _ in range(20):
            pilot = self.pilot(torch.randn(1000, 60), 0.3 * torch.randn(1000))
            alarms += bool(pilot.disagreements(torch.randn(4, 100, 60)))
        assert alarms <= 1  # were it three errors for each, one time in seven


def model_with_subsampling() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=5) as rows:
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(10)[rows])


def two_sites() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("w", dist.Normal(0.0, 1.0))


def nowhere() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", z.sum() * math.nan)


def quietly_set_up(model: Callable) -> pf.AutoPlanarFlow:
    with pyro.validation_enabled(False):
        return pf.AutoPlanarFlow(model, 0).setup()


def mixture(model: Callable) -> MixtureGuide:
    return MixtureGuide(model, [poor_guide(model), poor_guide(model)], torch.ones(2))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_samples": 3}, "num_samples must be an integer of at least 4, got 3"),
            ({"num_chains": 2.5}, "num_chains must be an integer of at least 1, got 2.5"),
            ({"warmup": -1}, "warmup must be an integer of at least 0"),
            ({"method": "nuts"}, "method must be one of 'auto', 'independence'"),
            ({"wide": 1.0}, "wide must be a number from 0 to below 1, got 1.0"),
            ({"wide": True}, "wide must be a number from 0 to below 1, got True"),
        ],
    )
    def test_options(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pf.mcmc(gaussian, poor_guide(gaussian), progress=False, **options)

    @pytest.mark.parametrize(
        ("model", "make", "error", "message"),
        [
            (gaussian, pyro.infer.autoguide.AutoNormal, TypeError, "of the AutoFlow family"),
            (gaussian, mixture, TypeError, "a mixture has no such map, its parts have"),
            (gaussian, pf.AutoPlanarFlow, ValueError, "the guide was never set up"),
            (two_sites, lambda _: poor_guide(gaussian), ValueError, "samples site 'w', which was"),
            (gaussian, lambda _: poor_guide(two_sites), ValueError, "samples site 'w', which the"),
            (student, lambda _: poor_guide(gaussian), ValueError, "samples site 't'"),
            (
                model_with_subsampling,
                lambda m: pf.AutoPlanarFlow(m, 0).setup(),
                ValueError,
                "plate 'rows' takes 5 of 10",
            ),
            (nowhere, quietly_set_up, ValueError, "site 'f' is NaN or infinite for all"),
        ],
    )
    def test_guides_and_models(
        self, model: Callable, make: Callable, error: type, message: str
    ) -> None:
        guide = make(model)
        with pytest.raises(error, match=message):
            pf.mcmc(model, guide, **QUICK)
