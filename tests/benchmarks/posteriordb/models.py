"""The ten posteriors: Pyro model, data, reference draws and log normaliser."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyroflow.targets import eight_schools_centered, eight_schools_noncentered

from . import ports
from .lotka_volterra import lotka_volterra

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("PYROFLOW_POSTERIORDB", ROOT.parent / "shared/data/posteriordb"))
CHUNK = 1000  # draws that are evaluated at once

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Port:
    """A Pyro model, its arguments, and how its sites and Stan's parameters become each other."""

    model: Callable
    arguments: Callable[[Mapping[str, Any]], tuple]
    sites: Callable[[Values], Values] = lambda parameters: parameters
    parameters: Callable[[Values, tuple], Values] = lambda sites, args: sites


@dataclass(frozen=True)
class Posterior:
    """A posterior with its reference.

    Attributes:
        name: as in posteriordb.
        port: the Pyro model, and how its sites become columns.
        args: the model's data, in float64.
        names: columns of the reference draws.
        reference: reference draws in those columns, shape (10000, C).
        draws: the same as values of the model's sample sites, each of shape (10000, ...).
        log_density: the stored log density at the reference draws, shape (10000,).
        offset: the constant c by which the port's log density is above it.
        log_normalizer: log Z of the port: KL(guide || posterior) is log Z - ELBO.
        log_normalizer_se: standard error of log Z.
    """

    name: str
    port: Port
    args: tuple
    names: tuple[str, ...]
    reference: Tensor
    draws: Values
    log_density: Tensor
    offset: float
    log_normalizer: float
    log_normalizer_se: float

    @property
    def model(self) -> Callable:
        """The Pyro model, called as ``model(*args)``."""
        return self.port.model

    def columns(self, draws: Values) -> Tensor:
        """Draws of a guide, {site: (S, ...)}, in the reference's columns, shape (S, C)."""
        sites = {}
        for name, known in self.draws.items():
            value = draws[name]
            sites[name] = value.reshape(len(value), *known.shape[1:])
        parameters = self.port.parameters(sites, self.args)
        by_name = {}
        for name, value in parameters.items():
            labels = _names(name, value.shape[1:])
            by_name |= dict(zip(labels, value.reshape(len(value), -1).T, strict=True))
        return torch.stack([by_name[name] for name in self.names], -1)

    def log_joint(self, draws: Values) -> Tensor:
        """Log density of model and data at draws {site: (S, ...)}, constrained; shape (S,)."""
        return log_joint(self.model, self.args, draws)


def load(name: str, folder: str | Path | None = None) -> Posterior:
    """One of the posteriors ``NAMES`` from its files.

    Args:
        name: as in posteriordb.
        folder: where the files are; by default ``FOLDER``, which the environment variable
            PYROFLOW_POSTERIORDB sets.

    Raises:
        ValueError: an unknown name, or no such files.
    """
    if name not in PORTS:
        raise ValueError(f"name must be one of {', '.join(PORTS)}; got {name!r}")
    path = Path(folder or FOLDER) / f"{name}.json"
    if not path.exists():
        raise ValueError(f"there is no {path}: set PYROFLOW_POSTERIORDB to the folder it is in")
    port, stored = PORTS[name], json.loads(path.read_text())
    with np.load(path.with_name(f"{name}.draws.npz")) as arrays:
        columns = _by_parameter(arrays["names"], arrays["draws"])
        if "derived" in arrays:
            columns |= _by_parameter(arrays["derived_names"], arrays["derived"])
        names, reference = tuple(arrays["names"].tolist()), torch.from_numpy(arrays["draws"])
        log_density = torch.from_numpy(arrays["log_density"])
    args, draws = port.arguments(stored["data"]), port.sites(columns)
    some = {site: value[:100] for site, value in draws.items()}
    offset = (log_joint(port.model, args, some) - log_density[:100]).mean().item()
    normalizer = stored["log_normalizer"]
    return Posterior(
        name,
        port,
        args,
        names,
        reference,
        draws,
        log_density,
        offset,
        normalizer["value"] + offset,
        normalizer["se"],
    )


@torch.no_grad()
def log_joint(model: Callable, args: tuple, draws: Values) -> Tensor:
    """Log density of all sites at draws {site: (S, ...)}, many at a time; shape (S,)."""
    single = poutine.trace(model).get_trace(*args)
    depth = _plate_depth(single)
    apart = {name: value.split(CHUNK) for name, value in draws.items()}
    return torch.cat(
        [
            _log_joint(model, args, single, depth, dict(zip(apart, part, strict=True)))
            for part in zip(*apart.values(), strict=True)
        ]
    )


def _log_joint(model: Callable, args: tuple, single: Trace, depth: int, draws: Values) -> Tensor:
    data = {}
    for name, value in draws.items():
        missing = depth - len(single.nodes[name]["fn"].batch_shape)
        data[name] = value.reshape(len(value), *[1] * missing, *value.shape[1:])
    num = len(value)
    particles = pyro.plate("particles", num, dim=-1 - depth)
    trace = poutine.trace(particles(poutine.condition(model, data=data))).get_trace(*args)
    trace.compute_log_prob()
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    terms = [site["log_prob"] for site in sites if not poutine.util.site_is_subsample(site)]
    return torch.stack([term.reshape(num, -1).sum(1) for term in terms]).sum(0)


def _plate_depth(trace: Trace) -> int:
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    return max((-frame.dim for site in sites for frame in site["cond_indep_stack"]), default=0)


def _by_parameter(names: np.ndarray, columns: np.ndarray) -> Values:
    """Columns "beta[1]", "beta[2]" as one tensor of shape (S, 2), "sigma" as one of shape (S,)."""
    found: dict[str, Any] = {}
    for name, column in zip(names.tolist(), torch.from_numpy(columns).T, strict=True):
        parameter, bracket, _ = name.partition("[")
        if bracket:
            found.setdefault(parameter, []).append(column)
        else:
            found[parameter] = column
    return {k: torch.stack(v, -1) if isinstance(v, list) else v for k, v in found.items()}


def _names(parameter: str, shape: torch.Size) -> list[str]:
    return [f"{parameter}[{i + 1}]" for i in range(shape[0])] if shape else [parameter]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _mesquite(data: Mapping[str, Any]) -> tuple:
    volume = _tensor(data["diam1"]) * _tensor(data["diam2"]) * _tensor(data["canopy_height"])
    return volume.log(), _tensor(data["weight"]).log()


def _earnings(data: Mapping[str, Any]) -> tuple:
    return _tensor(data["height"]), _tensor(data["earn"])


def _kidiq(data: Mapping[str, Any]) -> tuple:
    hs, iq = _tensor(data["mom_hs"]), _tensor(data["mom_iq"])
    return torch.stack([torch.ones_like(hs), hs, iq, hs * iq], -1), _tensor(data["kid_score"])


def _autoregression(data: Mapping[str, Any]) -> tuple:
    y, K = _tensor(data["y"]), data["K"]
    return y.unfold(0, K, 1)[:-1].flip(-1), y[K:]


def _lotka_volterra(data: Mapping[str, Any]) -> tuple:
    if data["ts"] != list(range(1, 1 + data["N"])):
        raise ValueError(f"the port measures once a year from year 1 on, got times {data['ts']}")
    return (_tensor([data["y_init"], *data["y"]]).T.contiguous(),)


def _schools(data: Mapping[str, Any]) -> tuple:
    return _tensor(data["y"]), _tensor(data["sigma"])


def _share_to_sites(parameters: Values) -> Values:
    alpha1, beta1 = parameters.pop("alpha1"), parameters.pop("beta1")
    return parameters | {"share": torch.stack([alpha1, beta1, 1 - alpha1 - beta1], -1)}


def _share_to_parameters(sites: Values, args: tuple) -> Values:
    return sites | {"alpha1": sites["share"][:, 0], "beta1": sites["share"][:, 1]}


def _effects(sites: Values, args: tuple) -> Values:
    return sites | {"theta": sites["mu"][:, None] + sites["tau"][:, None] * sites["theta_trans"]}


def _gp_values(sites: Values, args: tuple) -> Values:
    return sites | {"f": ports.gp_values(args[0], sites["rho"], sites["alpha"], sites["f_tilde"])}


def _without(name: str) -> Callable[[Values], Values]:
    return lambda parameters: {key: value for key, value in parameters.items() if key != name}


PORTS = {
    "mesquite-logmesquite_logvolume": Port(ports.line, _mesquite),
    "low_dim_gauss_mix-low_dim_gauss_mix": Port(ports.mixture, lambda d: (_tensor(d["y"]),)),
    "arK-arK": Port(ports.autoregression, _autoregression),
    "kidiq-kidscore_interaction": Port(ports.kidscore, _kidiq),
    "earnings-earn_height": Port(ports.line, _earnings),
    "garch-garch11": Port(
        ports.garch,
        lambda data: (_tensor(data["y"]), _tensor(data["sigma1"])),
        _share_to_sites,
        _share_to_parameters,
    ),
    "hudson_lynx_hare-lotka_volterra": Port(lotka_volterra, _lotka_volterra),
    "eight_schools-eight_schools_noncentered": Port(
        eight_schools_noncentered, _schools, _without("theta"), _effects
    ),
    "eight_schools-eight_schools_centered": Port(eight_schools_centered, _schools),
    "gp_pois_regr-gp_pois_regr": Port(
        ports.gp_poisson,
        lambda data: (_tensor(data["x"]), _tensor(data["k"])),
        _without("f"),
        _gp_values,
    ),
}
NAMES = tuple(PORTS)
