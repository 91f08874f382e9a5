"""The table of all that a file can describe: flows, bases, transforms, networks, supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pyro.nn
import torch.distributions as torch_dist
from pyro.distributions import constraints
from torch import nn
from torch.distributions import transforms as torch_transforms

from pyroflow.flows import Flow, StandardNormal
from pyroflow.guides.autoflow import StandardStudentT
from pyroflow.saving.description import Descriptions, Recipe
from pyroflow.transforms import (
    Affine,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSylvester,
    Planar,
    Radial,
    Sylvester,
)

Arguments = Mapping[str, str | Callable[[Any], Any]]


def _same(*names: str) -> Arguments:
    """Arguments that are kept in attributes of the same name."""
    return {name: name for name in names}


def _within(attribute: str, arguments: Arguments) -> Arguments:
    """The arguments of the transform that a conditional one starts from, and of its network."""
    inner = {
        name: f"{attribute}.{at}"
        if isinstance(at, str)
        else lambda t, at=at: at(getattr(t, attribute))
        for name, at in arguments.items()
    }
    return inner | {"context_dim": "nn.context_dim", "hidden_dims": "nn.hidden_dims"}


def _flow(base: Any, transforms: list, order: list[int]) -> Flow:
    return Flow(base, [transforms[index] for index in order])


def _distinct(flow: Flow) -> list:
    """Each transform once, so that layers which share parameters share them again."""
    return list({id(t): t for t, _ in flow.steps}.values())


def _order(flow: Flow) -> list[int]:
    ids = [id(t) for t in _distinct(flow)]
    return [ids.index(id(t)) for t, _ in flow.steps]


_PLANAR: Arguments = {
    "input_dim": lambda t: t.w.shape[-1],
    "num_layers": lambda t: t.w.shape[0],
    "nonlinearity": lambda t: "leaky_relu" if hasattr(t.activation, "negative_slope") else "tanh",
    "negative_slope": lambda t: getattr(t.activation, "negative_slope", 0.2),
}
_RADIAL: Arguments = {
    "input_dim": lambda t: t.x0.shape[-1],
    "num_layers": lambda t: t.x0.shape[0],
}
_SYLVESTER: Arguments = {
    "input_dim": lambda t: t.frame.shape[-1],
    "num_units": lambda t: t.frame.shape[-2],
    "num_layers": lambda t: t.frame.shape[0],
    "orthogonal": "orthogonal",
}
_AFFINE: Arguments = {
    "input_dim": lambda t: t.offset.shape[-1],
    "kind": lambda t: "diagonal" if t.diagonal else "full",
}

_OURS: dict[type, Arguments] = {
    StandardNormal: {"input_dim": lambda base: len(base.loc)},
    StandardStudentT: {
        "input_dim": lambda base: len(base.loc),
        "df": lambda base: base.df[0].item(),
    },
    Planar: _PLANAR,
    Radial: _RADIAL,
    Sylvester: _SYLVESTER,
    Affine: _AFFINE,
    ConditionalPlanar: _within("planar", _PLANAR),
    ConditionalRadial: _within("radial", _RADIAL),
    ConditionalSylvester: _within("sylvester", _SYLVESTER),
    ConditionalAffine: _within("affine", _AFFINE),
}

_SPLINE = _same("count_bins", "bound", "order")
_PYRO: dict[type, Arguments] = {
    pyro_transforms.AffineAutoregressive: {"autoregressive_nn": "arn"}
    | _same("log_scale_min_clip", "log_scale_max_clip", "sigmoid_bias", "stable"),
    pyro_transforms.AffineCoupling: {"hypernet": "nn"}
    | _same("split_dim", "dim", "log_scale_min_clip", "log_scale_max_clip"),
    pyro_transforms.BatchNorm: {"input_dim": lambda t: len(t.beta)} | _same("momentum", "epsilon"),
    pyro_transforms.ELUTransform: {},
    pyro_transforms.Householder: {
        "input_dim": "input_dim",
        "count_transforms": lambda t: len(t.u_unnormed),
    },
    pyro_transforms.LeakyReLUTransform: {},
    pyro_transforms.LowerCholeskyAffine: _same("loc", "scale_tril"),
    pyro_transforms.Permute: _same("permutation", "dim"),
    pyro_transforms.Planar: {"input_dim": lambda t: len(t.w)},
    pyro_transforms.Radial: {"input_dim": lambda t: len(t.x0)},
    pyro_transforms.Spline: {"input_dim": "input_dim"} | _SPLINE,
    pyro_transforms.SplineAutoregressive: {
        "input_dim": "spline.input_dim",
        "autoregressive_nn": "arn",
        **{name: f"spline.{name}" for name in _SPLINE},
    },
    pyro.nn.DenseNN: _same("input_dim", "hidden_dims", "param_dims") | {"nonlinearity": "f"},
    pyro.nn.AutoRegressiveNN: _same("input_dim", "hidden_dims", "param_dims", "permutation")
    | {"skip_connections": lambda network: network.skip_layer is not None, "nonlinearity": "f"},
}

_TORCH: dict[type, Arguments] = {
    torch_transforms.AffineTransform: _same("loc", "scale", "event_dim"),
    torch_transforms.ComposeTransform: _same("parts"),
    torch_transforms.ExpTransform: {},
    torch_transforms.IndependentTransform: _same("base_transform", "reinterpreted_batch_ndims"),
    torch_transforms.PowerTransform: _same("exponent"),
    torch_transforms.ReshapeTransform: _same("in_shape", "out_shape"),
    torch_transforms.SigmoidTransform: {},
    torch_transforms.SoftplusTransform: {},
    torch_transforms.TanhTransform: {},
    nn.ELU: _same("alpha"),
    nn.GELU: _same("approximate"),
    nn.LeakyReLU: _same("negative_slope"),
    nn.ReLU: {},
    nn.Sigmoid: {},
    nn.SiLU: {},
    nn.Softplus: _same("beta", "threshold"),
    nn.Tanh: {},
}

_BASES: dict[str, Arguments] = {
    "Cauchy": _same("loc", "scale"),
    "Independent": _same("reinterpreted_batch_ndims") | {"base_distribution": "base_dist"},
    "Laplace": _same("loc", "scale"),
    "MultivariateNormal": _same("loc", "scale_tril"),
    "Normal": _same("loc", "scale"),
    "StudentT": _same("df", "loc", "scale"),
    "Uniform": _same("low", "high"),
}

# All that Pyro and torch know a bijection for. A user's own support is refused.
_SUPPORTS: dict[str, Arguments] = {
    "cat": _same("cseq", "dim", "lengths"),
    "corr_cholesky": {},
    "corr_matrix": {},
    "greater_than": _same("lower_bound"),
    "greater_than_eq": _same("lower_bound"),
    "half_open_interval": _same("lower_bound", "upper_bound"),
    "independent": _same("base_constraint", "reinterpreted_batch_ndims"),
    "interval": _same("lower_bound", "upper_bound"),
    "less_than": _same("upper_bound"),
    "ordered_vector": {},
    "positive_ordered_vector": {},
    "real": {},
    "simplex": {},
    "softplus_positive": {},
    "stack": _same("cseq", "dim"),
}


def _made_by_class(prefix: str, table: dict[type, Arguments]) -> dict[str, Recipe]:
    return {f"{prefix}.{made.__name__}": Recipe(made, made, at) for made, at in table.items()}


def _bases(prefix: str, module: Any) -> dict[str, Recipe]:
    return _made_by_class(prefix, {getattr(module, name): at for name, at in _BASES.items()})


def _support(name: str, arguments: Arguments) -> Recipe:
    """Supports with arguments are classes, the others single objects, known by their types."""
    support = getattr(constraints, name)
    if arguments:
        return Recipe(support, support, arguments)
    return Recipe(type(support), lambda: support, {})


_Inverse = torch_transforms._InverseTransform

DESCRIPTIONS = Descriptions(
    {
        "pyroflow.Flow": Recipe(
            Flow, _flow, {"base": "base", "transforms": _distinct, "order": _order}
        ),
        **_made_by_class("pyroflow", _OURS),
        **_made_by_class("pyro", _PYRO),
        **_made_by_class("torch", _TORCH),
        "torch.inverse": Recipe(_Inverse, lambda upright: upright.inv, {"upright": "inv"}),
        **_bases("pyro", dist),
        **_bases("torch", torch_dist),
        **{f"support.{name}": _support(name, at) for name, at in _SUPPORTS.items()},
    }
)
