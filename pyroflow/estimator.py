"""A flow as an estimator of scikit-learn, which is an extra."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyroflow.checks import check_count
from pyroflow.flows import make_flow
from pyroflow.flows.cells import Dequantize
from pyroflow.flows.families import Depth
from pyroflow.inference import fit_density
from pyroflow.transforms.affine import AffineKind
from pyroflow.transforms.support import SupportLike

if TYPE_CHECKING:
    from numpy.random import RandomState
try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:  # the name is there all the same, for help(pyroflow) and import *

    class DensityMixin:
        """Stands in for scikit-learn's."""

    class BaseEstimator:
        """Stands in for scikit-learn's, and refuses to be made."""

        def __new__(cls, *args: Any, **options: Any) -> BaseEstimator:
            """Raise ``ImportError`` with the way out."""
            raise ImportError(
                f"pyroflow.{cls.__name__} needs scikit-learn 1.6 or later: pip install "
                '"pyroflow-ppl[sklearn]"; pyroflow.fit_density fits the same flows without it'
            )


class FlowDensity(DensityMixin, BaseEstimator):
    """A flow fitted by maximum likelihood, as a density estimator of scikit-learn.

    It is used as scikit-learn's ``KernelDensity`` is: in pipelines, cross-validation and searches
    over its parameters. ``fit`` builds a flow and gives it to :func:`~pyroflow.fit_density`; it
    computes in float32 if X is float32, else in float64. Needs scikit-learn 1.6 or later,
    ``pip install "pyroflow-ppl[sklearn]"``.

    Args:
        kind: the family: "planar", "sylvester" or "radial".
        num_layers: K; "auto" finds it on held-out rows, at the cost of some fits; None is the
            family's default.
        num_units: of Sylvester layers; by default min(D, 8).
        affine: "full", "diagonal" or None, as in :func:`~pyroflow.planar_flow`.
        tails: whether there is a layer for heavy tails.
        support: of the columns, by position or name, as in :func:`~pyroflow.planar_flow`.
        dequantize: columns of few values, as in :func:`~pyroflow.fit_density`, as are all that
            follow.
        steps: Adam's steps.
        polish: evaluations of L-BFGS.
        batch_size: rows a step.
        lr: highest learning rate.
        holdout: fraction of the rows held out, by which ``fit`` stops and chooses.
        device: where to fit, and to score and sample after it.
        random_state: an integer, the seed of ``fit_density``; a ``numpy.random.RandomState`` or
            None, NumPy's global one, which a seed is drawn from.
        verbose: show progress bars.

    Attributes:
        flow_: the fitted :class:`~pyroflow.Flow`.
        fit_: its :class:`~pyroflow.Fit`; ``print(d.fit_)`` says what the score is worth.
        n_features_in_: D.
        feature_names_in_: the names of the columns (D,), if X had some that are all strings.

    Raises:
        ImportError: If scikit-learn is missing.

    Example:
        >>> from pyroflow import FlowDensity, datasets
        >>> X = datasets.sine(300).numpy()
        >>> density = FlowDensity(num_layers=4, steps=20, polish=0, random_state=0).fit(X)
        >>> density.score_samples(X).shape, density.sample(5, random_state=0).shape
        ((300,), (5, 2))
    """

    def __init__(
        self,
        *,
        kind: str = "planar",
        num_layers: Depth | None = "auto",
        num_units: int | None = None,
        affine: AffineKind | None = "full",
        tails: bool = False,
        support: SupportLike | None = None,
        dequantize: Dequantize = False,
        steps: int | None = None,
        polish: int | None = None,
        batch_size: int = 512,
        lr: float | None = None,
        holdout: float = 0.1,
        device: str | torch.device | None = None,
        random_state: int | RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.kind = kind
        self.num_layers = num_layers
        self.num_units = num_units
        self.affine = affine
        self.tails = tails
        self.support = support
        self.dequantize = dequantize
        self.steps = steps
        self.polish = polish
        self.batch_size = batch_size
        self.lr = lr
        self.holdout = holdout
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> FlowDensity:  # noqa: N803
        """Build a new flow and fit it.

        Args:
            X: shape (N, D), an array or a frame.
            y: ignored.

        Raises:
            ValueError: If X or a parameter is refused, by scikit-learn or by
                :func:`~pyroflow.fit_density`.
        """
        values = self._read(X, reset=True, ensure_min_samples=2)
        flow = make_flow(
            self.kind,
            values.shape[1],
            num_layers=self.num_layers,
            num_units=self.num_units,
            affine=self.affine,
            tails=self.tails,
            support=self.support,
        )
        names = getattr(self, "feature_names_in_", None)
        self.fit_ = fit_density(
            flow.to(getattr(torch, values.dtype.name)),
            values if names is None else pd.DataFrame(values, columns=names),
            dequantize=self.dequantize,
            steps=self.steps,
            polish=self.polish,
            batch_size=self.batch_size,
            lr=self.lr,
            holdout=self.holdout,
            device=self.device,
            seed=_seed(self.random_state),
            progress=self.verbose,
        )
        self.flow_ = flow
        return self

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        """Log density of each row of X (N, D): shape (N,), in nats.

        Of dequantized columns it is the log probability of their values.
        """
        check_is_fitted(self)
        return self.flow_.log_prob(self._read(X, reset=False)).cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:  # noqa: N803
        """The mean log density of the rows of X (N, D), in nats.

        The mean as of ``GaussianMixture``; that of ``KernelDensity`` is the sum. y is ignored.
        """
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | RandomState | None = None
    ) -> np.ndarray:
        """Draws, an array (n_samples, D), as of ``KernelDensity``."""
        check_is_fitted(self)
        draws = self.flow_.sample(check_count("n_samples", n_samples, 1), _seed(random_state))
        return np.asarray(draws.cpu() if isinstance(draws, torch.Tensor) else draws)

    def _read(self, X: Any, **options: Any) -> np.ndarray:  # noqa: N803
        """The numbers of X after scikit-learn's checks, float32 as they are and others float64."""
        return validate_data(self, X, dtype=[np.float64, np.float32], **options)


def _seed(random_state: int | RandomState | None) -> int:
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))
