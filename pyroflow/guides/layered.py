"""Guides made of one stack of layers that can grow: planar and Sylvester."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform

from pyroflow.checks import check_choice, check_count
from pyroflow.flows import Flow
from pyroflow.guides.autoflow import AutoFlow
from pyroflow.guides.refusals import Centring
from pyroflow.transforms import Planar, SinhArcsinh, Sylvester
from pyroflow.transforms.affine import AffineKind
from pyroflow.transforms.sylvester import KINDS, Orthogonal, orthonormal

FIRST_LAYERS = 4  # of a guide that is to grow
WIDEST = 32  # units of a Sylvester layer, where their number is not given

Depth = int | Literal["auto"]
Rotation = Orthogonal | Literal["random"]


class _LayeredGuide(AutoFlow):
    """A guide with K layers of one kind, which start at the identity, as do its tails."""

    def __init__(
        self,
        model: Callable,
        num_layers: Depth = 16,
        affine: AffineKind | None = "full",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        *,
        base_df: float | None = None,
        centring: Centring = "auto",
        tails: bool = False,
    ) -> None:
        check_choice("tails", tails, (False, True))
        self.tails = tails
        self.grows = num_layers == "auto"
        self.num_layers = FIRST_LAYERS if self.grows else check_count("num_layers", num_layers, 0)
        options = {"init_loc_fn": init_loc_fn, "init_scale": init_scale, "base_df": base_df}
        super().__init__(model, (), affine=affine, centring=centring, **options)

    @property
    def stack(self) -> Planar | Sylvester | None:
        """The layers, if there are any."""
        return self.flow.parts[0] if self.num_layers else None

    def grow(self, num_layers: int) -> None:
        """Add layers behind the ones there are; they start at the identity.

        The distribution does not change. The parameters are new tensors, for a new optimiser.

        Args:
            num_layers: how many to add.

        Raises:
            ValueError: If num_layers < 1.
            RuntimeError: If the guide is not set up.
        """
        check_count("num_layers", num_layers, 1)
        if self.prototype_trace is None:
            raise RuntimeError("the guide has no layers yet: call setup(*args) before grow")
        old, before = self.stack, self.flow
        rest = before.transforms()[1 if old else 0 :]
        self.num_layers += num_layers
        with before.base.loc.device:
            grown = self._make_stack(torch.zeros_like(before.base.loc))
        if old is not None:
            _copy_layers(old, grown)
        self.flow = Flow(before.base, [grown, *rest]).train(before.training)
        self.flow.fitted = before.fitted

    def _transforms(self, init_loc: Tensor) -> list[Transform]:
        stack = [self._make_stack(init_loc)] if self.num_layers else []
        return [*stack, SinhArcsinh(len(init_loc)).to(init_loc)] if self.tails else stack

    def _make_stack(self, init_loc: Tensor) -> Planar | Sylvester:
        """K layers at the identity, with the size, dtype and device of ``init_loc``."""
        raise NotImplementedError


@torch.no_grad()
def _copy_layers(old: Planar | Sylvester, grown: Planar | Sylvester) -> None:
    """Make the first layers those of a smaller stack."""
    theirs = dict(old.named_parameters()) | dict(old.named_buffers())
    for name, value in (dict(grown.named_parameters()) | dict(grown.named_buffers())).items():
        value[: len(theirs[name])] = theirs[name]
        value.requires_grad_(theirs[name].requires_grad)


class AutoPlanarFlow(_LayeredGuide):
    """A planar flow as guide for any Pyro model with continuous latents.

    :class:`AutoFlow` with K planar layers: they start at the identity, so the guide starts as the
    Gaussian that ``init_loc_fn`` and ``init_scale`` say. With K = 0 and no tails it stays one and
    is, step by step, Pyro's ``AutoDiagonalNormal`` (affine "diagonal") or
    ``AutoMultivariateNormal`` ("full").

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        num_layers: K; "auto" starts with 4, and :func:`~pyroflow.fit_guide` adds more while the
            bound gains by them.
        affine: as in :class:`AutoFlow`, like init_loc_fn, init_scale, base_df and centring.
        tails: whether a :class:`~pyroflow.SinhArcsinh` layer follows the planar ones, last
            before the affine layer, for K = 0 too. Planar layers leave the tails of their base as
            they are; it gives each coordinate skew and tails of its own. It is the identity at
            the start. Train it by :func:`~pyroflow.fit_guide`, which places the Gaussian first:
            in Pyro's SVI the skew also moves what starts far off, and takes longer to return.

    Attributes:
        num_layers: the present K.
        grows: whether it was "auto".
        planar: after the first call, the :class:`~pyroflow.Planar` stack; None if K = 0.

    Raises:
        ValueError: If num_layers < 0, and as :class:`AutoFlow` does.
        RuntimeError: If the model has no latents, at the first call.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoPlanarFlow(model, num_layers=4)
        >>> guide()["scale"].shape, guide.median()["scale"].shape
        (torch.Size([3]), torch.Size([3]))
        >>> guide.grow(2)
        >>> guide.planar.w.shape
        torch.Size([6, 3])
    """

    @property
    def planar(self) -> Planar | None:
        """The planar stack, if there is one."""
        return self.stack

    def _make_stack(self, init_loc: Tensor) -> Planar:
        return Planar(len(init_loc), self.num_layers).to(init_loc)


class AutoSylvesterFlow(_LayeredGuide):
    """A Sylvester flow as guide for any Pyro model with continuous latents.

    :class:`AutoFlow` with L Sylvester layers of M units. They start at the identity, as in
    :class:`AutoPlanarFlow`, and bend the base in M directions at once: worth their price where
    many latents depend on each other, as in hierarchies and Gaussian processes.

    References:
        van den Berg, Hasenclever, Tomczak and Welling, Sylvester normalizing flows for
        variational inference, 2018, https://arxiv.org/abs/1803.05649.

    Args:
        model: a Pyro model. Discrete latents must be enumerated or blocked.
        num_units: M, from 1 to D; by default D, but no more than 32.
        num_layers: L; "auto" as in :class:`AutoPlanarFlow`.
        affine: as in :class:`AutoFlow`, like init_loc_fn, init_scale, base_df and centring.
        orthogonal: how the M orthonormal directions of each layer are made, as in
            :class:`~pyroflow.Sylvester`; or "random": rotations that are drawn once and not
            trained, which costs less a step and takes more of them.
        tails: as in :class:`AutoPlanarFlow`.

    Attributes:
        num_layers: the present L.
        grows: whether it was "auto".
        sylvester: after the first call, the :class:`~pyroflow.Sylvester` stack; None if L = 0.

    Raises:
        ValueError: If num_units < 1, num_layers < 0 or ``orthogonal`` is unknown, and as
            :class:`AutoFlow` does; at the first call, if num_units > D.
        RuntimeError: If the model has no latents, at the first call.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoSylvesterFlow(model, num_layers=2).setup()
        >>> guide()["scale"].shape, guide.sylvester.b.shape
        (torch.Size([3]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        model: Callable,
        num_units: int | None = None,
        num_layers: Depth = 8,
        affine: AffineKind | None = "full",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        *,
        orthogonal: Rotation = "householder",
        base_df: float | None = None,
        centring: Centring = "auto",
        tails: bool = False,
    ) -> None:
        check_choice("orthogonal", orthogonal, ("random", *KINDS))
        self.num_units = None if num_units is None else check_count("num_units", num_units, 1)
        self.orthogonal = orthogonal
        options = {"base_df": base_df, "centring": centring, "tails": tails}
        super().__init__(model, num_layers, affine, init_loc_fn, init_scale, **options)

    @property
    def sylvester(self) -> Sylvester | None:
        """The Sylvester stack, if there is one."""
        return self.stack

    def _make_stack(self, init_loc: Tensor) -> Sylvester:
        D = len(init_loc)
        random = self.orthogonal == "random"
        # In one dimension there is nothing to rotate, and a frame would have no gradient.
        kind = "triangular" if random or D == 1 else self.orthogonal
        M = min(D, WIDEST) if self.num_units is None else self.num_units
        stack = Sylvester(D, M, self.num_layers, kind).to(init_loc)
        if random:  # drawn in float64, so that they are orthonormal to the last digit of any dtype
            draws = torch.randn(stack.frame.shape, dtype=torch.float64, device="cpu")
            stack.frame.copy_(orthonormal(draws, "householder"))
        return stack
