"""Two processes under torchrun: the same parameters, and those of one process with both shares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from image_cases import write_mnist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from two_processes import torchrun

from pyroflow.inference.processes import Processes, processes
from pyroflow.seeds import seeded
from pyroflow.transforms import ConditionalPlanar
from rezende_mohamed_2015 import dlgm_objective, dlgm_training
from rezende_mohamed_2015.dlgm import DLGM
from rezende_mohamed_2015.dlgm_training import Schedule

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

SCHEDULE = Schedule(6, lr=0.01, flow_lr=0.02, warm_up=2, cool_down=2, annealing=3, batch_size=10)


def images() -> Tensor:
    return (torch.rand(40, 6, generator=torch.Generator().manual_seed(5)) < 0.5).to(torch.uint8)


def small(seed: int) -> DLGM:
    with seeded(seed):
        flow = ConditionalPlanar(2, 8, 3, hidden_dims=())
        return DLGM(6, [flow], latent_dim=2, hidden_dim=8)


def parameters(dlgm: DLGM) -> Tensor:
    return torch.cat([p.detach().flatten() for p in dlgm.parameters()])


def worker(folder: Path) -> None:
    """What each of the processes does; they start from different parameters."""
    torch.set_num_threads(1)
    ours = processes()
    dlgm = small(seed=ours.rank)
    start = ours.gather(parameters(dlgm))
    checkpoint, quiet = folder / "run.pt", {"processes": ours, "progress": False}
    dlgm_training.train(dlgm, images(), SCHEDULE, checkpoint=checkpoint, every=4, **quiet)
    found = {"start": start, "end": ours.gather(parameters(dlgm)), "rank": ours.rank}
    torch.save(found, folder / f"rank{ours.rank}.pt")


def by_one_process() -> DLGM:
    """The mean of both shares' gradients, with the noise that each process has."""
    dlgm = small(seed=0)
    optimiser = torch.optim.Adam(dlgm_training._groups(dlgm, SCHEDULE), fused=True)
    shares = [dlgm_objective.batches(images(), 10, 0, Processes(rank, 2))(0) for rank in range(2)]
    for t in range(SCHEDULE.updates):
        for group in optimiser.param_groups:
            group["lr"] = SCHEDULE.rate(t) * group["peak"]
        optimiser.zero_grad()
        for rank, share in enumerate(shares):
            x = next(share).to(dlgm.centre)
            torch.manual_seed(dlgm_objective.noise_seed(0, rank, t))
            (dlgm(x).bound(SCHEDULE.beta(t)).mean() / 2).backward()
        clip_grad_norm_(dlgm.parameters(), SCHEDULE.max_norm)
        optimiser.step()
        torch.autograd.graph.increment_version(list(dlgm.parameters()))
    return dlgm


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
def test_two_processes_have_the_parameters_of_one_with_both_shares(tmp_path: Path) -> None:
    torchrun(__file__, str(tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    start, end = found[0]["start"], found[0]["end"]
    assert not torch.equal(start[0], start[1])
    assert torch.equal(end[0], end[1])
    assert (end[0] - start[0]).abs().max() > 0.01
    torch.testing.assert_close(end[0], parameters(by_one_process()), rtol=1e-4, atol=1e-5)
    kept = torch.load(tmp_path / "run.pt")
    assert kept["state"]["step"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank0.pt", "rank1.pt", "run.pt"]


@pytest.mark.slow
def test_the_command_runs_on_two_processes(tmp_path: Path) -> None:
    data = write_mnist(tmp_path / "data", 1000, 100)
    out = tmp_path / "out"
    arguments = ["mnist", "--quick", "--only", "planar K=10"]
    torchrun("-m", "rezende_mohamed_2015", *arguments, "--data", str(data), "--out", str(out))
    (run,) = json.loads((out / "mnist.json").read_text())["runs"]
    assert (run["processes"], run["updates"], run["images"]) == (2, 50, 100)
    assert run["nll"] <= run["free_energy"] < 600
    assert (out / "mnist.png").stat().st_size > 10_000


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
