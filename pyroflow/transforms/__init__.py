"""The bijections: each maps base to data and runs both ways."""

from pyroflow.transforms.affine import Affine, ConditionalAffine, ConditionedAffine
from pyroflow.transforms.bijection import Bijection
from pyroflow.transforms.planar import ConditionalPlanar, ConditionedPlanar, Planar

__all__ = [
    "Affine",
    "Bijection",
    "ConditionalAffine",
    "ConditionalPlanar",
    "ConditionedAffine",
    "ConditionedPlanar",
    "Planar",
]
