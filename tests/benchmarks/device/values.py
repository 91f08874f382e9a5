"""Whether a device computes what the CPU does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyroflow as pf
from pyroflow.model.bound import BoundModel
from pyroflow.model.log_joint import LogJoint
from pyroflow.targets import eight_schools_noncentered as schools

from .models import schools_data
from .parts import Cases, Record

POINTS = 128
TRANSFORMS = {
    "planar": pf.Planar,
    "radial": pf.Radial,
    "Sylvester": partial(pf.Sylvester, num_units=2),
}


def values(device: str, quick: bool) -> Cases:
    """How far values are from the CPU's in float64, beside the CPU's own in the same dtype."""
    for dtype in (torch.float32, torch.float64):
        short = str(dtype).removeprefix("torch.")
        for name, kind in TRANSFORMS.items():
            yield f"{name}, {short}", partial(of_transform, kind, device, dtype)
        yield f"log joint, {short}", partial(of_log_joint, device, dtype)


def of_transform(kind: Callable, device: str, dtype: torch.dtype) -> Record:
    """Both directions and log |det| of eight layers, and the density that they make."""
    pyro.set_rng_seed(0)
    t = kind(5, num_layers=8).double()
    with torch.no_grad():
        for p in t.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(1000, 5).double()

    def evaluate(t: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        base = dist.Normal(x.new_zeros(5), 1.0).to_event(1)
        found = {"forward": t(x), "inverse": t.inv(y), "log det": t.log_abs_det_jacobian(x, y)}
        return found | {"density": dist.TransformedDistribution(base, [t]).log_prob(y)}

    with torch.no_grad():
        return compared(evaluate, t, (x, t(x).clone()), device, dtype)


def of_log_joint(device: str, dtype: torch.dtype) -> Record:
    """The log joint of eight schools and its gradient, in a guide's coordinates."""
    x = torch.randn(POINTS, 10, generator=torch.Generator().manual_seed(0)).double()

    def evaluate(_: nn.Module, x: Tensor) -> dict[str, Tensor]:
        pyro.set_rng_seed(0)
        at = {"device": x.device, "dtype": x.dtype}
        guide = pf.AutoPlanarFlow(schools, 2).setup(*schools_data(**at)).to(**at)
        bound = BoundModel(schools, guide, schools_data(**at))
        log_joint = LogJoint(bound, guide, POINTS)
        if not log_joint.traced:
            raise ValueError("the log joint was not recorded as a graph")
        value, gradient = log_joint.values_and_gradients(x)
        return {"value": value, "gradient": gradient}

    return compared(evaluate, nn.Identity(), (x,), device, dtype)


def compared(
    evaluate: Callable, module: nn.Module, inputs: tuple, device: str, dtype: torch.dtype
) -> Record:
    """The largest error of each value relative to 1 + |value|, there and on the CPU."""
    exact, found = evaluate(module, *inputs), {}
    for suffix, place in (("", device), (", CPU", "cpu")):
        moved = copy.deepcopy(module).to(place, dtype)
        there = evaluate(moved, *(t.to(place, dtype) for t in inputs))
        for name, value in there.items():
            if value.device.type != torch.device(place).type or value.dtype != dtype:
                raise ValueError(f"{name} is in {value.dtype} on {value.device}")
            off = (value.double().cpu() - exact[name]).abs() / (1 + exact[name].abs())
            found[name + suffix] = off.max().item()
    return found
