"""Objects as plain data, kinds and arguments, and back: no code travels in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from numbers import Integral, Real
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Of the numbers in a file, what the start values of its modules may take, which it then replaces.
TIMES, SPARE = 32, 10_000


class Recipe(NamedTuple):
    """How the objects of one type are made again: ``make(**arguments)``.

    An argument's value is read from the object, by an attribute's name or by a function.
    """

    made: type
    make: Callable
    arguments: Mapping[str, str | Callable[[Any], Any]]


class Bounded(TorchDispatchMode):
    """Inside, what would take far more memory than a file's numbers is refused before it is done.

    What an operation makes is asked of torch's "meta" device, which makes nothing.

    Args:
        held: how many numbers the file holds.
    """

    def __init__(self, held: int) -> None:
        super().__init__()
        self.held, self.left = held, SPARE + TIMES * held

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler first, for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do the operation if it may be done."""
        kwargs = dict(kwargs or {})
        if _at_most(args, kwargs) > self.left and _wanted(func, args, kwargs) > self.left:
            raise ValueError(f"it claims sizes far beyond the {self.held} numbers that it holds")
        made = func(*args, **kwargs)
        if all(returned.alias_info is None for returned in func._schema.returns):
            self.left -= _size(made)
        return made


def _at_most(args: tuple, kwargs: dict[str, Any]) -> int:
    """A quick bound on the numbers that an operation makes."""
    leaves = tree_leaves((args, kwargs))
    sizes = (value.numel() if isinstance(value, Tensor) else value for value in leaves)
    return prod(max(1, abs(size)) for size in sizes if isinstance(size, int))


def _wanted(func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """The numbers that an operation makes."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = kwargs | {"device": "meta"}
    try:
        return _size(func(*args, **kwargs))
    except NotImplementedError:  # what depends on values makes no more than it is given
        return 0


def _size(made: Any) -> int:
    return sum(value.numel() for value in tree_leaves(made) if isinstance(value, Tensor))


class UndescribedError(TypeError):
    """There is no recipe for a type."""


class Descriptions:
    """Translates objects into plain data and back, by a table of recipes."""

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(recipes)
        self._kinds = {recipe.made: kind for kind, recipe in recipes.items()}

    def describe(self, value: Any) -> Any:
        """Numbers, strings, tensors on the CPU, lists of such, or a dict of kind and arguments.

        Raises:
            UndescribedError: a type without a recipe; only the very type counts, as a subclass
                may behave in any way.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Integral | Real):  # of numpy as well, which a safe file cannot hold
            return int(value) if isinstance(value, Integral) else float(value)
        if isinstance(value, Tensor):
            return stored(value)
        if isinstance(value, list | tuple):
            return [self.describe(member) for member in value]
        kind = self._kinds.get(type(value))
        if kind is None:
            raise UndescribedError(_name(value))
        reading = self._recipes[kind].arguments.items()
        arguments = {name: self.describe(_read(value, at)) for name, at in reading}
        return {"kind": kind, "arguments": arguments}

    def build(self, description: Any) -> Any:
        """The object that :meth:`describe` was given.

        Raises:
            ValueError: a kind that is not in the table.
        """
        if isinstance(description, list):
            return [self.build(member) for member in description]
        if not isinstance(description, dict):
            return description
        recipe = self._recipes.get(description["kind"])
        if recipe is None:
            raise ValueError(f"there is no {description['kind']!r} in this version of pyroflow")
        arguments = description["arguments"].items()
        return recipe.make(**{name: self.build(value) for name, value in arguments})


def stored(value: Tensor) -> Tensor:
    """The numbers alone, on the CPU: a view would take its whole storage into the file."""
    return value.detach().cpu().clone().contiguous()


def _read(value: Any, at: str | Callable[[Any], Any]) -> Any:
    return attrgetter(at)(value) if isinstance(at, str) else at(value)


def _name(value: Any) -> str:
    kind = type(value)
    if kind.__name__ == "function":
        return f"the function {value.__module__}.{value.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"
