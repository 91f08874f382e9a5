"""The bijections: each maps base to data and runs both ways."""

from pyroflow.transforms.affine import Affine, ConditionalAffine, ConditionedAffine
from pyroflow.transforms.bijection import Bijection
from pyroflow.transforms.planar import ConditionalPlanar, ConditionedPlanar, Planar
from pyroflow.transforms.radial import ConditionalRadial, ConditionedRadial, Radial
from pyroflow.transforms.sylvester import ConditionalSylvester, ConditionedSylvester, Sylvester

__all__ = [
    "Affine",
    "Bijection",
    "ConditionalAffine",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalSylvester",
    "ConditionedAffine",
    "ConditionedPlanar",
    "ConditionedRadial",
    "ConditionedSylvester",
    "Planar",
    "Radial",
    "Sylvester",
]
