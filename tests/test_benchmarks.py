"""The speed benchmarks measure what they say: same numbers everywhere, right sums on the times."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.remote import connect
from benchmarks.speed import memory, timing
from benchmarks.speed.__main__ import app
from benchmarks.speed.accuracy import check_agreement
from benchmarks.speed.contenders import FLOOR, OURS, PYRO, Contender, Floor, Ours, contenders
from benchmarks.speed.growth import TERMS, fit, terms
from benchmarks.speed.operations import RATIOS, Batched, operations, ratios
from benchmarks.speed.problem import Problem, Shape, constrained, reference
from benchmarks.speed.remote import Flowjax, flowjax_parameters
from typer.testing import CliRunner

SHAPE = Shape(5, 3, 4)


@pytest.fixture
def problem() -> Problem:
    return Problem.draw(SHAPE, torch.float64)


def rivals(problem: Problem) -> dict[str, Contender]:
    return {name: stack for name, stack in contenders(problem).items() if name != FLOOR}


def test_all_compute_the_same_function(problem: Problem) -> None:
    exact = reference(*problem.parameters, problem.x)
    for name, stack in rivals(problem).items():
        y, log_det = stack.forward(problem.x)
        torch.testing.assert_close(y, exact.y, rtol=0, atol=1e-12, msg=name)
        torch.testing.assert_close(log_det, exact.log_det, rtol=0, atol=1e-12, msg=name)


def test_all_compute_the_same_gradients(problem: Problem) -> None:
    ours = rivals(problem)[OURS].train(problem.x)
    for name, stack in rivals(problem).items():
        found = stack.train(problem.x)
        stacked = [torch.stack([g.reshape(-1) for g in found[i::3]]) for i in range(3)]
        for gradient, expected in zip(stacked if name != OURS else found, ours, strict=True):
            torch.testing.assert_close(gradient.reshape(expected.shape), expected, msg=name)


def test_flowjax_gets_the_same_layers(problem: Problem) -> None:
    w, u, b = flowjax_parameters(problem).split([3, 3, 1], dim=-1)
    v = (w * u).sum(-1, keepdim=True)
    # flowjax.bijections.Planar.get_act_scale, in torch
    shift = torch.log(1 + torch.nn.functional.softplus(v, threshold=40)) - 1 - v
    u_hat = u + shift * w / w.norm(dim=-1, keepdim=True) ** 2
    torch.testing.assert_close(u_hat, constrained(problem.w, problem.u))
    torch.testing.assert_close(b.squeeze(-1), problem.b)


def test_floor_is_a_planar_layer_where_nothing_couples() -> None:
    problem = Problem.draw(Shape(5, 3, 1), torch.float64)
    exact = reference(*problem.parameters, problem.x)
    y, log_det = Floor(problem).forward(problem.x)
    torch.testing.assert_close(y, exact.y)
    torch.testing.assert_close(log_det, exact.log_det)


def test_data_are_inverted(problem: Problem) -> None:
    ours = Ours(problem)
    ours.forward(problem.x)
    x, log_det = ours.inverse(problem.y)
    back = reference(*problem.parameters, x)
    torch.testing.assert_close(back.y, problem.y)
    torch.testing.assert_close(log_det, back.log_det)


def test_gradients_of_the_inverse_are_those_of_the_likelihood(problem: Problem) -> None:
    ours = Ours(problem)

    def loss() -> torch.Tensor:
        x, log_det = ours.inverse(problem.y)
        return (x.square().sum(-1) / 2 + log_det).mean()

    gradients, step = ours.train_inverse(problem.y), 1e-6
    for parameter, gradient in zip(ours.parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        slope = (above - below) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_batched_parameters_are_the_same_layers(problem: Problem) -> None:
    shared, batched = Ours(problem).train(problem.x), Batched(problem).call()
    for expected, rows in zip(shared, batched, strict=True):
        torch.testing.assert_close(rows.sum(0), expected)


def test_another_function_is_refused(problem: Problem) -> None:
    exact = reference(*problem.parameters, problem.x)
    check_agreement("right", exact.y, exact.log_det, exact)
    with pytest.raises(ValueError, match="wrong computes another function"):
        check_agreement("wrong", exact.y + 1e-9, exact.log_det, exact)
    with pytest.raises(ValueError, match="wrong computes another function"):
        check_agreement("wrong", exact.y, exact.log_det + 0.1, exact)
    with pytest.raises(ValueError, match="wrong computes another function"):
        check_agreement("wrong", exact.y * torch.nan, exact.log_det, exact)


def test_every_ratio_has_both_sides(problem: Problem) -> None:
    timed = operations(problem, contenders(problem))
    for operation in timed.values():
        assert operation.slice(1e-6) > 0
    missing = {name for name, found in ratios({key: [1.0] for key in timed}).items() if not found}
    assert {name for name in missing if "normflows" not in name} == {
        "flowjax / ours, train",
        "flowjax / ours, forward",
    }
    assert len(RATIOS) == 13


class Clock:
    """A clock that only moves when a contender works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, ""
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def worker(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def work() -> None:
            self.now += next(seconds)
            self.order += name

        return work


def test_slices_take_turns_and_are_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    fast, slow = (
        timing.Local(clock.worker(name, itertools.repeat(seconds)))
        for name, seconds in (("f", 0.125), ("s", 2.0))
    )
    taken = timing.interleave({"fast": fast, "slow": slow}, rounds=2, seconds=0.5)
    assert taken == {"fast": [0.125, 0.125], "slow": [2.0, 2.0]}
    rounds = "fffffs" * 2  # one untimed and four timed calls; a single one of the slow
    assert clock.order.endswith(rounds)


def test_rounds_end_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow = timing.Local(clock.worker("s", itertools.repeat(2.0)))
    assert len(timing.interleave({"slow": slow}, 9, 0.5, most=7.0)["slow"]) == 4
    assert len(timing.interleave({"slow": slow}, 9, 0.5, most=1.0)["slow"]) == 3


def test_ratio_is_that_of_the_medians() -> None:
    found = timing.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert found == {"median": 2.0, "q25": 1.5, "q75": 2.5, "least": 2.0}
    assert timing.spread([3.0], 2.0) == {"median": 6.0, "q25": 6.0, "q75": 6.0, "least": 6.0}


def test_peak_counts_what_is_held_at_once() -> None:
    x = torch.zeros(1000)
    assert memory.peak_bytes(lambda: x.neg().neg().neg()) == 2 * 8000
    assert memory.peak_bytes(lambda: [x.neg(), x.neg(), x.neg()]) == 3 * 8000
    found = memory.memory(Shape(1000, 50, 4))
    ends = 2 * 50_000 + 1000
    assert found["allowed"] == ends + 5 * 4000
    assert ends < found[OURS] < found[PYRO]
    assert found["Pyro chain, beside"] == pytest.approx((found[PYRO] - ends) / 4000)


def test_model_of_growth_recovers_its_costs() -> None:
    shapes = [Shape(N, D, K) for N in (1, 50, 900) for D in (2, 70) for K in (1, 8, 90)]
    costs = (2e5, 3e3, 1.5, 4.0, 0.1, 0.2)
    times = [sum(c * t for c, t in zip(costs, terms(s), strict=True)) for s in shapes]
    found = fit(shapes, times)
    assert found["nanoseconds"] == pytest.approx(dict(zip(TERMS, costs, strict=True)), rel=1e-6)
    assert found["model / measured"] == pytest.approx([1, 1])


def invoke(*options: str) -> Any:
    return CliRunner().invoke(app, list(options))


@pytest.mark.usefixtures("float32")
def test_a_short_run_from_end_to_end(tmp_path: Path) -> None:
    out, missing = tmp_path / "new" / "b.json", tmp_path / "python"
    short = ("--rounds", "1", "--seconds", "0.0001", "--threads", "1", "--quick")
    ran = invoke(
        "run", "--out", str(out), "--shapes", "5,3,4", "--jax-python", str(missing), *short
    )
    assert ran.exit_code == 0, ran.output
    assert f"flowjax is left out: there is no {missing}" in " ".join(ran.output.split())
    results = json.loads(out.read_text())
    (found,) = results["shapes"]
    assert found["shape"] == [5, 3, 4]
    assert found["ratios"]["flowjax / ours, train"] is None
    assert found["ratios"]["Pyro chain / ours, train"]["median"] > 0
    assert found["errors"]["pyroflow, float32"]["y, units"] < 100
    assert found["errors"]["pyroflow, float64, inverse"]["y"] < 1e-12
    assert (out.parent / "growth.png").stat().st_size > 1000
    shown = invoke("table", str(out)).output
    assert shown.strip() in ran.output
    assert shown.count("| 5, 3, 4 |") == 4
    assert "– |" in shown


def test_flowjax_computes_the_same_function() -> None:
    remote, note = connect(Flowjax)
    if remote is None:
        pytest.skip(note)
    problem = Problem.draw(SHAPE, torch.float32)
    forms, y, log_det = remote.load(problem)
    check_agreement("flowjax", y, log_det, reference(*problem.parameters, problem.x))
    assert set(forms) == {"train", "forward"}
    assert remote.timed("train").slice(1e-3) > 0
    remote.close()


def test_flowjax_is_left_out_where_it_cannot_run() -> None:
    if connect(Flowjax, Path(sys.executable))[0] is not None:
        pytest.skip("this environment has flowjax")
    assert connect(Flowjax, Path(sys.executable))[1].endswith("cannot run it")


@pytest.mark.parametrize("shapes", ["5,3", "5,3,x", "5,0,4"])
def test_shapes_must_be_three_sizes(shapes: str) -> None:
    ran = invoke("run", "--shapes", shapes)
    assert ran.exit_code == 2
    assert "--shapes must be" in ran.output
