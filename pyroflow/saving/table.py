"""Objects as plain data, kinds and arguments, and back, by a table of all that a file can describe.

No code travels in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from operator import attrgetter
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pyro.nn
import torch.distributions as torch_dist
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transforms as torch_transforms

from pyroflow import flows, transforms
from pyroflow.flows import Flow
from pyroflow.guides import autoflow

Description = dict[str, Any]
# How each argument is read from an object: by an attribute's name or by a function.
Arguments = Mapping[str, str | Callable[[Any], Any]]


class Recipe(NamedTuple):
    """How the objects of one type are made again: ``make(**arguments)``."""

    made: type
    make: Callable
    arguments: Arguments


class UndescribedError(TypeError):
    """There is no recipe for a type."""


def describe(value: Any) -> Any:
    """Numbers, strings, tensors on the CPU, lists of such, or a dict of kind and arguments.

    Raises:
        UndescribedError: If a type has no recipe; only the very type counts, as a subclass may
            behave in any way.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral | Real):  # of numpy as well, which a safe file cannot hold
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Tensor):
        return stored(value)
    if isinstance(value, list | tuple):
        return [describe(member) for member in value]
    kind = _KINDS.get(type(value))
    if kind is None:
        named = value if type(value).__name__ == "function" else type(value)
        prefix = "the function " if named is value else ""
        raise UndescribedError(f"{prefix}{named.__module__}.{named.__qualname__}")
    arguments = _RECIPES[kind].arguments.items()
    return {"kind": kind, "arguments": {name: describe(_read(value, at)) for name, at in arguments}}


def build(description: Any) -> Any:
    """The object that :func:`describe` was given.

    Raises:
        ValueError: If a kind is not in the table.
    """
    if isinstance(description, list):
        return [build(member) for member in description]
    if not isinstance(description, dict):
        return description
    recipe = _RECIPES.get(description["kind"])
    if recipe is None:
        raise ValueError(f"there is no {description['kind']!r} in this version of pyroflow")
    return recipe.make(**{name: build(value) for name, value in description["arguments"].items()})


def stored(value: Tensor) -> Tensor:
    """The numbers alone, on the CPU: a view would take its whole storage into the file."""
    return value.detach().cpu().clone().contiguous()


def _read(value: Any, at: str | Callable[[Any], Any]) -> Any:
    return attrgetter(at)(value) if isinstance(at, str) else at(value)


def _same(*names: str, **others: str | Callable[[Any], Any]) -> Arguments:
    """Arguments that are kept in attributes of the same name, and others."""
    return dict(zip(names, names, strict=True)) | others


def _conditional(attribute: str, arguments: Arguments) -> Arguments:
    """The arguments of the transform that a conditional one starts from, and of its network."""
    inner = {
        name: lambda t, at=at: _read(getattr(t, attribute), at) for name, at in arguments.items()
    }
    return inner | {n: f"nn.{n}" for n in ("context_dim", "hidden_dims", "bound")}


_PLANAR = {
    "input_dim": lambda t: t.w.shape[-1],
    "num_layers": lambda t: t.w.shape[0],
    "nonlinearity": lambda t: "leaky_relu" if hasattr(t.activation, "negative_slope") else "tanh",
    "negative_slope": lambda t: getattr(t.activation, "negative_slope", 0.2),
}
_RADIAL = {
    "input_dim": lambda t: t.x0.shape[-1],
    "num_layers": lambda t: t.x0.shape[0],
}
_SINH_ARCSINH = {"input_dim": lambda t: t.skew.shape[-1]}
_SYLVESTER = {
    "input_dim": lambda t: t.frame.shape[-1],
    "num_units": lambda t: t.frame.shape[-2],
    "num_layers": lambda t: t.frame.shape[0],
    "orthogonal": "orthogonal",
}
_AFFINE = {
    "input_dim": lambda t: t.offset.shape[-1],
    "kind": lambda t: "diagonal" if t.diagonal else "full",
}


def _bounds_of(t: transforms.Support) -> list:
    if t.named:
        raise UndescribedError(f"a support of columns by name, {list(t.named)}, before its fit")
    return t.bounds


_BASES = {
    "Cauchy": _same("loc", "scale"),
    "Independent": _same("reinterpreted_batch_ndims", base_distribution="base_dist"),
    "Laplace": _same("loc", "scale"),
    "MultivariateNormal": _same("loc", "scale_tril"),
    "Normal": _same("loc", "scale"),
    "StudentT": _same("df", "loc", "scale"),
    "Uniform": _same("low", "high"),
}
_CLIPS = ("log_scale_min_clip", "log_scale_max_clip")
_NETWORK = ("input_dim", "hidden_dims", "param_dims")
_SPLINE = ("count_bins", "bound", "order")


def _distinct(flow: Flow) -> list:
    """Each transform once, so that layers which share parameters share them again."""
    return list({id(t): t for t, _ in flow.steps}.values())


def _order(flow: Flow) -> list[int]:
    ids = [id(t) for t in _distinct(flow)]
    return [ids.index(id(t)) for t, _ in flow.steps]


def _flow(base: Any, transforms: list, order: list[int]) -> Flow:
    return Flow(base, [transforms[index] for index in order])


def _recipes(
    prefix: str, module: Any, *bare: str, **given: Mapping[str, str | Callable]
) -> dict[str, Recipe]:
    """Of classes in a module, and of single objects, which are known by their types.

    Args:
        prefix: Of the kinds in a file.
        module: Where they are.
        bare: Names of those without arguments.
        given: The arguments of the others.
    """
    recipes = {}
    for name, arguments in (dict.fromkeys(bare, {}) | given).items():
        made = getattr(module, name)
        if isinstance(made, type):
            recipes[f"{prefix}.{name}"] = Recipe(made, made, arguments)
        else:
            recipes[f"{prefix}.{name}"] = Recipe(type(made), lambda made=made: made, arguments)
    return recipes


_RECIPES: dict[str, Recipe] = {
    "pyroflow.Flow": Recipe(
        Flow, _flow, {"base": "base", "transforms": _distinct, "order": _order}
    ),
    **_recipes("pyroflow", flows, StandardNormal={"input_dim": lambda base: len(base.loc)}),
    **_recipes(
        "pyroflow",
        autoflow,
        StandardStudentT={
            "input_dim": lambda base: len(base.loc),
            "df": lambda base: base.df[0].item(),
        },
    ),
    **_recipes(
        "pyroflow",
        transforms,
        Planar=_PLANAR,
        Radial=_RADIAL,
        SinhArcsinh=_SINH_ARCSINH,
        Sylvester=_SYLVESTER,
        Affine=_AFFINE,
        Arrowhead={"leading": lambda t: t.leading(), "rows": lambda t: t.rows()},
        Leading=_same("inner", "input_dim"),
        Support={"input_dim": lambda t: len(t.bounds), "support": _bounds_of},
        ConditionalPlanar=_conditional("planar", _PLANAR),
        ConditionalRadial=_conditional("radial", _RADIAL),
        ConditionalSinhArcsinh=_conditional("sinharcsinh", _SINH_ARCSINH),
        ConditionalSylvester=_conditional("sylvester", _SYLVESTER),
        ConditionalAffine=_conditional("affine", _AFFINE),
    ),
    **_recipes("pyro", dist, **_BASES),
    **_recipes("torch", torch_dist, **_BASES),
    **_recipes("pyro", pyro_transforms, "ELUTransform", "LeakyReLUTransform"),
    **_recipes(
        "pyro",
        pyro_transforms,
        AffineAutoregressive=_same(*_CLIPS, "sigmoid_bias", "stable", autoregressive_nn="arn"),
        AffineCoupling=_same(*_CLIPS, "split_dim", "dim", hypernet="nn"),
        BatchNorm=_same("momentum", "epsilon", input_dim=lambda t: len(t.beta)),
        Householder=_same("input_dim", count_transforms=lambda t: len(t.u_unnormed)),
        LowerCholeskyAffine=_same("loc", "scale_tril"),
        Permute=_same("permutation", "dim"),
        Planar={"input_dim": lambda t: len(t.w)},
        Radial={"input_dim": lambda t: len(t.x0)},
        Spline=_same("input_dim", *_SPLINE),
        SplineAutoregressive={"input_dim": "spline.input_dim", "autoregressive_nn": "arn"}
        | {name: f"spline.{name}" for name in _SPLINE},
    ),
    **_recipes(
        "pyro",
        pyro.nn,
        DenseNN=_same(*_NETWORK, nonlinearity="f"),
        AutoRegressiveNN=_same(*_NETWORK, "permutation", nonlinearity="f")
        | {"skip_connections": lambda network: network.skip_layer is not None},
    ),
    "torch.inverse": Recipe(
        torch_transforms._InverseTransform, lambda upright: upright.inv, {"upright": "inv"}
    ),
    **_recipes("torch", torch_transforms, "ExpTransform", "SigmoidTransform"),
    **_recipes("torch", torch_transforms, "SoftplusTransform", "TanhTransform"),
    **_recipes(
        "torch",
        torch_transforms,
        AffineTransform=_same("loc", "scale", "event_dim"),
        ComposeTransform=_same("parts"),
        IndependentTransform=_same("base_transform", "reinterpreted_batch_ndims"),
        PowerTransform=_same("exponent"),
        ReshapeTransform=_same("in_shape", "out_shape"),
    ),
    "torch.Sequential": Recipe(
        nn.Sequential, lambda modules: nn.Sequential(*modules), {"modules": list}
    ),
    **_recipes(
        "torch",
        nn,
        Flatten=_same("start_dim", "end_dim"),
        Linear=_same("in_features", "out_features", bias=lambda layer: layer.bias is not None),
    ),
    **_recipes("torch", nn, "ReLU", "Sigmoid", "SiLU", "Tanh"),
    **_recipes("torch", nn, ELU=_same("alpha"), GELU=_same("approximate")),
    **_recipes("torch", nn, LeakyReLU=_same("negative_slope"), Softplus=_same("beta", "threshold")),
    # All supports that Pyro and torch know a bijection for; a user's own is refused.
    **_recipes("support", constraints, "corr_cholesky", "corr_matrix", "real", "simplex"),
    **_recipes("support", constraints, "ordered_vector", "positive_ordered_vector"),
    **_recipes(
        "support",
        constraints,
        "softplus_positive",
        cat=_same("cseq", "dim", "lengths"),
        greater_than=_same("lower_bound"),
        greater_than_eq=_same("lower_bound"),
        half_open_interval=_same("lower_bound", "upper_bound"),
        independent=_same("base_constraint", "reinterpreted_batch_ndims"),
        interval=_same("lower_bound", "upper_bound"),
        less_than=_same("upper_bound"),
        stack=_same("cseq", "dim"),
    ),
}
_KINDS = {recipe.made: kind for kind, recipe in _RECIPES.items()}
