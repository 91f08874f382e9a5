"""Pyro's own samplers in the coordinates of a guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyroflow.chains.sampler import check_guide
from pyroflow.checks import check_shape
from pyroflow.guides import AutoFlow


class NeuTra:
    """A model whose latents are those of a guide's base space, and the way back.

    Attributes:
        model: The model to sample, for Pyro's ``NUTS`` and ``HMC``; its one latent site is the
            vector of D numbers in base space.
        reparam: Pyro's ``NeuTraReparam`` behind it.
    """

    def __init__(self, model: Callable, guide: AutoFlow) -> None:
        # Not trained here: its gradients would cost time, and torch.jit cannot record them.
        self.guide = guide = copy.deepcopy(guide).requires_grad_(False)
        self.reparam = NeuTraReparam(guide)
        self.model = self.reparam.reparam(model)

    @torch.no_grad()
    def transform(self, draws: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """Draws of the model's own sites, on their supports.

        Args:
            draws: what ``MCMC.get_samples()`` gives, by chain or not; or the draws of the one
                latent alone, shape (S, D) or (chains, S, D).

        Returns:
            By name, shape (S, *shape of the site) or (chains, S, *shape of the site); plates are
            where they are in a run of the model.

        Raises:
            ValueError: If there is not one site, or its draws have another size than D.
        """
        if isinstance(draws, Mapping):
            if len(draws) != 1:
                raise ValueError(
                    f"draws must be those of the one latent in base space, got {sorted(draws)}: "
                    "give what get_samples() returns after sampling neutra.model"
                )
            (draws,) = draws.values()
        dim = self.guide.latent_dim
        check_shape(
            draws.reshape(-1, draws.shape[-1]) if draws.dim() > 1 else draws, dim, "draws", 1
        )
        x = draws
        for t in self.guide.flow.transforms():
            x = t(x)
        values, _ = self.guide.constrain(x)
        return {name: value.detach() for name, value in values.items()}  # without their latents


def neutra(model: Callable, guide: AutoFlow) -> NeuTra:
    """A model in the base space of a guide, for Pyro's own NUTS and HMC.

    There the posterior is nearly a standard normal one if the guide is good, so that few leapfrog
    steps go far. One chain at a time and Pyro's handlers make it much slower than
    :func:`~pyroflow.mcmc`; it is for what Pyro's kernels have of their own.

    The guide is taken as it is now: training it further changes nothing here. As it is a copy that
    is not trained, ``jit_compile=True`` works too and saves time, where it fails in Pyro with
    ``NeuTraReparam`` around a guide whose parameters want gradients.

    References:
        Hoffman et al., NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural
        transport, 2019, https://arxiv.org/abs/1903.03704.

    Args:
        model: A Pyro model.
        guide: A guide of the :class:`~pyroflow.AutoFlow` family, fitted to it.

    Returns:
        An object with ``model``, to be sampled, and ``transform``, from these draws to the model's
        own sites.

    Raises:
        TypeError: If the guide is of another family.
        ValueError: If the guide was never fitted or set up.

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> import pyroflow as pf
        >>> from pyroflow.targets import eight_schools_noncentered as model
        >>> guide = pf.AutoPlanarFlow(model, num_layers=0).setup()
        >>> base = pf.neutra(model, guide)
        >>> run = MCMC(NUTS(base.model, max_tree_depth=2), 5, 5, disable_progbar=True)
        >>> run.run()
        >>> base.transform(run.get_samples())["theta_trans"].shape
        torch.Size([5, 8])
    """
    check_guide(guide)
    return NeuTra(model, guide)
