"""Simulation-based calibration of guides that are exact, biased, too narrow and too wide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib.figure
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from cases import slow
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyroflow as pf
from pyroflow.calibration.result import dispersion_test, needed_for, summarise, symmetry_test

ROWS = 3


def model(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("twice", 2 * loc)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)


def posterior(shift: float, ratio: float, _: Callable) -> Callable:
    """Makes the exact guide N(Σy/(n + 1), 1/(n + 1)), moved in units of its sd, and widened."""
    sd = (1 + ROWS) ** -0.5

    def guide(y: Tensor) -> None:
        mean = y.sum(-2) / (ROWS + 1) + torch.tensor([shift * sd, 0.0])
        pyro.sample("loc", dist.Normal(mean, ratio * sd).to_event(1))

    return guide


def no_fit(*_: Any) -> None:
    pass


def calibrated(shift: float = 0.0, ratio: float = 1.0, **options: Any) -> pf.Calibration:
    settings = {"num_simulations": 100, "num_samples": 200, "seed": 0, "progress": False} | options
    args = (torch.zeros(ROWS, 2),)
    make = partial(posterior, shift, ratio)
    return pf.calibrate(model, make, args, data={"y": "y"}, fit=no_fit, **settings)


class TestGuides:
    def test_an_exact_guide_is_calibrated(self) -> None:
        result = calibrated(seed=1)
        assert result.calibrated
        assert result.verdicts == {"loc": "no sign of miscalibration"}
        p = result.probabilities["loc"]
        assert p.shape == (100, 2)
        assert scipy.stats.kstest(p.flatten().numpy(), "uniform").pvalue > 0.001

    @pytest.mark.parametrize(("shift", "side"), [slow(-0.8, "low"), (0.8, "high")])
    def test_a_bias_is_found_where_it_is(self, shift: float, side: str) -> None:
        result = calibrated(shift=shift)
        assert result.verdicts == {"loc": f"biased, its draws lie too {side} at (0,)"}
        assert result.symmetry_p_values["loc"][0] < 0.001 < result.symmetry_p_values["loc"][1]
        assert not result.calibrated

    @pytest.mark.slow
    @pytest.mark.parametrize(("ratio", "word"), [(0.5, "narrow"), (2.0, "wide")])
    def test_a_wrong_width_is_found(self, ratio: float, word: str) -> None:
        result = calibrated(ratio=ratio)
        assert result.verdicts == {"loc": f"too {word} at (0,), (1,)"}
        assert (result.symmetry_p_values["loc"] > 0.01).all()

    def test_a_fit_of_ones_own_and_the_callers_parameters(self) -> None:
        """Each guide starts anew, and the parameter store is left as it was."""
        pyro.param("kept", torch.tensor(3.0))
        starts = []

        def fit(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
            starts.append((list(pyro.get_param_store()), svi.step(*args, **kwargs)))
            for _ in range(5):
                svi.step(*args, **kwargs)

        options = {"num_simulations": 4, "num_samples": 50, "seed": 0, "progress": False}
        pf.calibrate(model, AutoNormal, (torch.zeros(ROWS, 2),), fit=fit, **options)
        assert [names for names, _ in starts] == [[]] * 4
        assert list(pyro.get_param_store()) == ["kept"]

    def test_the_default_fit_is_reproducible(self) -> None:
        options = {"num_simulations": 2, "steps": 5, "num_samples": 100, "progress": False}
        make, args = partial(pf.AutoPlanarFlow, num_layers=1), (torch.zeros(ROWS, 2),)
        one, two = (pf.calibrate(model, make, args, seed=1, **options) for _ in range(2))
        assert torch.equal(one.probabilities["loc"], two.probabilities["loc"])


class TestData:
    def test_a_model_that_is_called_without_its_data(self) -> None:
        def free(y: Tensor | None = None) -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

        def make(observed: Callable) -> Callable:
            return lambda y: pyro.sample("z", dist.Normal(y / 1.01, (0.01 / 1.01) ** 0.5))

        options = {"num_simulations": 30, "num_samples": 100, "progress": False, "fit": no_fit}
        result = pf.calibrate(free, make, data={"y": "y"}, **options)
        p = result.probabilities["z"]
        assert (p.min() < 0.3) & (p.max() > 0.7)
        with pytest.raises(ValueError, match=r"data: the model observes nothing.*'z', 'y'"):
            pf.calibrate(free, make, **options)

    def test_a_handler_around_the_model_hides_no_argument(self) -> None:
        options = {"num_simulations": 2, "num_samples": 10, "seed": 0, "progress": False}
        make, args = partial(posterior, 0.0, 1.0), (torch.zeros(ROWS, 2),)
        plain, scaled = (
            pf.calibrate(m, make, args, data={"y": "y"}, fit=no_fit, **options)
            for m in (model, poutine.scale(model, 1.0))
        )
        assert torch.equal(plain.probabilities["loc"], scaled.probabilities["loc"])

    def test_what_cannot_be_simulated_is_refused(self) -> None:
        args, options = (torch.zeros(ROWS, 2),), {"fit": no_fit, "progress": False}
        make = partial(posterior, 0.0, 1.0)
        with pytest.raises(ValueError, match=r"data must name sample sites .* got 'x'"):
            pf.calibrate(model, make, args, data=["x"], **options)
        with pytest.raises(ValueError, match=r"argument 'x', and the model takes \['y'\]"):
            pf.calibrate(model, make, args, data={"y": "x"}, **options)

        def factor(y: Tensor) -> None:
            model(y)
            pyro.factor("penalty", torch.tensor(-1.0))

        with pytest.raises(ValueError, match="site 'penalty' is a pyro.factor"):
            pf.calibrate(factor, make, args, **options)

        def improper(y: Tensor) -> None:
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(z, 1.0).expand([ROWS, 2]).to_event(2), obs=y)

        with pytest.raises(ValueError, match="site 'z' cannot be drawn from"):
            pf.calibrate(improper, make, args, **options)

    @pytest.mark.parametrize(
        "options", [{"num_simulations": 1}, {"num_samples": 0}, {"steps": 0}, {"level": 1.0}]
    )
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            calibrated(**options)


class TestTests:
    def test_the_statistic_is_that_of_kolmogorov_and_smirnov(self) -> None:
        p = torch.rand(40, 3) ** torch.tensor([1.0, 1.3, 2.0])
        found, _ = symmetry_test(p)
        for column, statistic in zip(p.unbind(1), found, strict=True):
            expected = scipy.stats.ks_2samp(column.numpy(), (1 - column).numpy()).statistic
            assert statistic.item() == pytest.approx(expected)

    def test_its_p_values_keep_their_level_with_any_width(self) -> None:
        p = torch.distributions.Beta(0.5, 0.5).sample((30, 60))
        p_values = symmetry_test(p)[1]
        assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 0.001
        assert (p_values < 0.2).double().mean().item() == pytest.approx(0.2, abs=0.15)

    def test_dispersion_keeps_its_level_and_has_power(self) -> None:
        p_values = dispersion_test(torch.rand(100, 4000))
        assert (p_values < 0.05).double().mean().item() == pytest.approx(0.05, abs=0.015)
        assert dispersion_test(torch.distributions.Beta(0.5, 0.5).sample((100,))) < 0.01


def test_plot_and_table() -> None:
    result = calibrated(shift=1.0, num_simulations=20)
    figure = result.plot(bins=5)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert [ax.get_title() for ax in figure.axes] == ["loc[0]", "loc[1]"]
    for ax, values in zip(figure.axes, result.probabilities["loc"].unbind(1), strict=True):
        heights = [bar.get_height() for bar in ax.containers[0]]
        assert heights == torch.histc(values, 5, 0.0, 1.0).tolist()
    assert repr(result).startswith("20 simulated data sets\nloc")


def test_how_many_data_sets_it_takes() -> None:
    """By simulation, of a guide whose sd is half of the right one, and of a right one."""
    z = torch.randn(needed_for(0.05, 3), 4000, generator=torch.Generator().manual_seed(0))
    for factor, expected in ((0.5, 0.8), (1.0, 0.05 / 6)):
        seen = dispersion_test(torch.special.ndtr(z / factor)) <= 0.05 / 6
        assert seen.double().mean().item() == pytest.approx(expected, abs=0.03)
    assert symmetry_test(torch.ones(needed_for(0.05, 3), 1))[1] <= 0.05 / 6


def test_too_few_data_sets_are_no_judgement() -> None:
    with pytest.warns(UserWarning, match="2 data sets are too few to judge by: it takes 17 to see"):
        few = calibrated(num_simulations=2)
    assert str(few).startswith("2 data sets are too few to judge by")
    enough = summarise({"z": torch.rand(15)}, 0.05, "together")
    assert str(enough).startswith("15 simulated data sets\n")
    assert enough.too_few == ""
