"""Two processes under torchrun do one fit, as one process does it: results, files, failures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import amortized_cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow
from torch import Tensor, nn
from two_processes import torchrun

import pyroflow as pf
from pyroflow.inference.processes import Processes, processes
from pyroflow.inference.trainer import Trainer
from pyroflow.targets import toy_model as toy

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

QUIET = {"seed": 3, "progress": False}
Found = dict[str, Any]


def rows(num: int = 61) -> Tensor:
    x = torch.randn(num, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x @ torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)).tanh()


def found_by(fit: pf.Fit, module: nn.Module) -> Found:
    tensors = [t.detach().flatten() for t in module.state_dict().values() if isinstance(t, Tensor)]
    scores = [score for _, score in fit.scores]
    values = {"losses": fit.losses, "scores": scores, "best": fit.best_loss}
    values |= {"skipped": fit.skipped_particles, "parameters": torch.cat(tensors)}
    return {name: torch.as_tensor(value) for name, value in values.items()}


def density(**options: Any) -> Found:
    flow = pf.planar_flow(2, 3)
    options = {"steps": 12, "polish": 30, "batch_size": 10} | QUIET | options
    return found_by(pf.fit_density(flow, rows(), **options), flow)


def conditional(**options: Any) -> Found:
    """A batch and held-out rows of which the two have unequal shares."""
    flow, data = pf.planar_flow(1, 2, context_dim=1, hidden_dims=(4,)), rows()
    options = {"steps": 12, "polish": 5, "batch_size": 7, "holdout": 0.01} | QUIET | options
    return found_by(pf.fit_density(flow, data[:, :1], context=data[:, 1:], **options), flow)


def energy(**options: Any) -> Found:
    flow = pf.planar_flow(2, 2)
    options = {"steps": 12, "num_particles": 8} | QUIET | options
    return found_by(pf.fit_energy(flow, pf.targets.energy(1), **options), flow)


def guide(model: Callable, **options: Any) -> Found:
    made = pf.AutoPlanarFlow(model, 2)
    options = {"steps": 30, "num_particles": 12} | QUIET | options
    return found_by(pf.fit_guide(model, made, **options), made)


def half(z_scale: float = 1.0) -> None:
    """A density of zero below 0, where a guide on the whole line loses some draws."""
    z = pyro.sample("z", dist.Normal(0.0, z_scale).expand([2]).to_event(1))
    pyro.factor("edge", torch.where(z[..., 0] > 0, 0.0, -torch.inf))


def lost(**options: Any) -> Found:
    made = pf.AutoPlanarFlow(half, 1, init_scale=1.0)
    options = {"steps": 6, "num_particles": 40, "warm_start": False} | QUIET | options
    return found_by(pf.fit_guide(half, made, **options), made)


def annealed(**options: Any) -> Found:
    return guide(toy, annealing=pf.AdaptiveAnnealing(max_steps=15), warm_start=False, **options)


def amortised(**options: Any) -> Found:
    """On 5 of 20 rows at a time, far from the posterior, where the start would end the fit."""
    made = pf.AmortizedPlanarGuide(amortized_cases.rows_model, "rows", "y", num_layers=1)
    options = {"steps": 20, "num_particles": 8, "warm_start": False} | QUIET | options
    options["args"] = (amortized_cases.Y,)
    return found_by(pf.fit_guide(amortized_cases.rows_model, made, **options), made)


def learned(**options: Any) -> Found:
    """A parameter of the model's own, which is no ``nn.Parameter``."""

    def model() -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(loc, 1.0)), 1.0), obs=Y)

    made = pf.AutoPlanarFlow(model, 1)
    found = found_by(pf.fit_guide(model, made, steps=10, num_particles=8, **QUIET, **options), made)
    return found | {"loc": pyro.param("loc").detach()}


Y = torch.tensor(2.0)
ALIKE = {  # fits that are those of one process with the same draws
    "density": density,
    "conditional": conditional,
    "energy": energy,
    "elbo": partial(guide, toy),
    "iwae": partial(guide, toy, objective="iwae", warm_start=False),
    "dreg": partial(guide, toy, objective="dreg", group_size=3, warm_start=False),
    "annealed": annealed,
}
OTHERS = {"lost": lost, "amortised": amortised, "learned": learned}  # that draw apart, or cut
QUICK = ("density", "iwae", "lost")  # which two processes of their own do; two more do the others


def fitted(name: str, start: int = 0, **options: Any) -> Found:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(start)
    return (ALIKE | OTHERS)[name](**options)


def refusal(fit: Callable[[], Any]) -> str:
    try:
        fit()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


def cut_off(name: str, step: int, **options: Any) -> None:
    """Interrupt a fit after a step."""

    def show(trainer: Trainer, bar: Any) -> None:
        if trainer.state.step == step:
            raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_show", show)
        with pytest.raises(SystemExit):
            fitted(name, **options)


def dropout() -> None:
    flow = pf.planar_flow(1, 2, context_dim=1, hidden_dims=(4,))
    net = next(m for m in flow.modules() if isinstance(m, nn.Linear))
    net.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.3))
    options = {"steps": 6, "batch_size": 7} | QUIET
    pf.fit_density(flow, rows()[:, :1], context=rows()[:, 1:], **options)


def worker(folder: Path) -> None:
    """What each of the two does; they start from different parameters."""
    torch.set_num_threads(1)
    ours = processes()
    names = [name for name in ALIKE | OTHERS if (name in QUICK) == (folder.name == "quick")]
    found: dict[str, Any] = {name: fitted(name, ours.rank) for name in names}
    calls: list[int] = []
    asks = lambda p: calls.append(p.step) or p.step == 5  # noqa: E731
    found["left"] = fitted("density", callbacks=asks if ours.writes else None, batch_size=12)
    found["calls"] = calls
    found["unseeded"] = fitted("density", ours.rank, seed=None)
    for name in {"density", "amortised"} & {*names}:
        files = {"checkpoint": folder / f"{name}.pt"}
        cut_off(name, 9, **files)
        ours.agree(None)
        found[f"{name}, files"] = sorted(file.name for file in folder.iterdir())
        if name == "density" and ours.writes:
            (folder / "kept.pt").write_bytes((folder / "density.pt").read_bytes())
        found[f"{name}, resumed"] = fitted(name, **files)
    found["other lr"] = refusal(lambda: fitted("density", lr=0.1 * (ours.rank + 1)))
    found["other data"] = refusal(lambda: pf.fit_density(pf.planar_flow(2), rows(50 + ours.rank)))
    model, data = amortized_cases.effects_model, amortized_cases.Y[: 10 + ours.rank]
    other = pf.AmortizedPlanarGuide(model, "rows", "y")
    found["other arguments"] = refusal(lambda: pf.fit_guide(model, other, (data,), **QUIET))
    found["few"] = refusal(lambda: fitted("density", batch_size=1))
    found["dropout"] = refusal(dropout)
    torch.distributed.destroy_process_group()
    found["alone again"] = processes().count
    torch.save(found, folder / f"rank{ours.rank}")


def both(folder: Path, name: str = "density") -> list[dict[str, Any]]:
    """What the two have found that do the fit of this name."""
    return found_in(folder / ("quick" if name in {*QUICK, "unseeded"} else "others"))


@cache
def found_in(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    torchrun(__file__, "worker", str(folder))
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in ALIKE])
def test_two_processes_do_the_fit_of_one(folder: Path, name: str) -> None:
    for found in both(folder, name):
        torch.testing.assert_close(found[name], fitted(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lost", slow("amortised"), slow("learned"), "unseeded"])
def test_both_have_one_result(folder: Path, name: str) -> None:
    first, second = (found[name] for found in both(folder, name))
    assert first["losses"].isfinite().all()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len(set(first["losses"].tolist())) > 1


def test_rank_0_alone_calls_and_both_end(folder: Path) -> None:
    first, second = both(folder)
    assert (first["calls"], second["calls"]) == ([1, 2, 3, 4, 5], [])
    assert len(first["left"]["losses"]) == 5
    torch.testing.assert_close(first["left"], second["left"], rtol=0, atol=0)


def test_lost_draws_are_counted_once(folder: Path) -> None:
    """About half of 40 in each of the first steps: more than one process has."""
    found = both(folder)[0]["lost"]
    assert 40 < found["skipped"] <= 6 * 40
    assert found["skipped"] == pytest.approx(fitted("lost")["skipped"].item(), rel=0.3)


@pytest.mark.parametrize("name", ["density", slow("amortised")])
def test_a_fit_goes_on_where_it_was_cut_off(folder: Path, name: str) -> None:
    first, second = both(folder, name)
    assert f"{name}.pt" in first[f"{name}, files"]
    for found in (first, second):
        torch.testing.assert_close(found[f"{name}, resumed"], first[name], rtol=0, atol=0)


def test_one_process_goes_on_where_two_were_cut_off(folder: Path) -> None:
    expected = both(folder)[0]["density"]
    found = fitted("density", checkpoint=folder / "quick" / "kept.pt")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["density", slow("amortised")])
def test_rank_0_alone_writes(folder: Path, name: str) -> None:
    assert both(folder, name)[0][f"{name}, files"] == [f"{name}.pt"]


def test_what_both_refuse(folder: Path) -> None:
    for found in both(folder):
        assert "process 1 fits with lr=0.2 (0: 0.1)" in found["other lr"]
        assert "process 1 fits with data=" in found["other data"]
        assert "process 1 fits with log joint of a draw=" in found["other arguments"]
        assert "2 processes cannot share 1 in a step: raise batch_size" in found["few"]
        assert "random numbers of process 1 are no longer those of process 0" in found["dropout"]


def test_a_group_that_was_destroyed_is_not_made_again(folder: Path) -> None:
    assert [found["alone again"] for found in both(folder)] == [1, 1]


def failing(_: Path) -> None:
    """A loss that fails in process 1, in a step after the first."""
    rank = processes().rank

    def broken(z: Tensor) -> Tensor:
        calls.append(0)
        if rank == 1 and len(calls) > 9:
            raise ZeroDivisionError("in process 1")
        return z.square().sum(-1)

    calls: list[int] = []
    pf.fit_energy(pf.planar_flow(2, 1), broken, steps=1000, **QUIET)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match="in process 1"):
        torchrun(__file__, "failing", "", timeout=120)


def test_shares() -> None:
    for count, num, unit in ((3, 8, 1), (2, 12, 4), (3, 4, 1), (1, 7, 1)):
        ours = [Processes(rank, count) for rank in range(count)]
        parts = [range(num)[p.share(num, unit)] for p in ours]
        assert [i for part in parts for i in part] == list(range(num))
        assert all(len(part) % unit == 0 for part in parts)
        assert max(map(len, parts)) == ours[0].most(num, unit)
    with pytest.raises(ValueError, match="3 processes cannot share 2 in a step: raise batch_size"):
        Processes(0, 3).share(5, 2)


def test_alone(folder: Path) -> None:
    ours = processes()
    assert (ours.rank, ours.count, ours.writes) == (0, 1, True)
    assert ours.agree("value") == "value"
    assert ours.gather(3) == [3]
    assert ours.options(None, folder, True) == (None, folder, True)
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    {"worker": worker, "failing": failing}[sys.argv[1]](Path(sys.argv[2]))
