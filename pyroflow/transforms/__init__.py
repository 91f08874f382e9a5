"""The bijections: each maps base to data and runs both ways."""

from pyroflow.transforms.affine import Affine
from pyroflow.transforms.arrowhead import Arrowhead, Leading
from pyroflow.transforms.bijection import Bijection, Conditioned
from pyroflow.transforms.conditional import (
    Conditional,
    ConditionalAffine,
    ConditionalPlanar,
    ConditionalRadial,
    ConditionalSinhArcsinh,
    ConditionalSylvester,
)
from pyroflow.transforms.planar import Planar
from pyroflow.transforms.radial import Radial
from pyroflow.transforms.sinh_arcsinh import SinhArcsinh
from pyroflow.transforms.support import Support
from pyroflow.transforms.sylvester import Sylvester

# Named as Pyro names the functions that make a transform.
planar, conditional_planar = Planar, ConditionalPlanar
radial, conditional_radial = Radial, ConditionalRadial
sinh_arcsinh, conditional_sinh_arcsinh = SinhArcsinh, ConditionalSinhArcsinh
sylvester, conditional_sylvester = Sylvester, ConditionalSylvester

__all__ = [
    "Affine",
    "Arrowhead",
    "Bijection",
    "Conditional",
    "ConditionalAffine",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalSinhArcsinh",
    "ConditionalSylvester",
    "Conditioned",
    "Leading",
    "Planar",
    "Radial",
    "SinhArcsinh",
    "Support",
    "Sylvester",
    "conditional_planar",
    "conditional_radial",
    "conditional_sinh_arcsinh",
    "conditional_sylvester",
    "planar",
    "radial",
    "sinh_arcsinh",
    "sylvester",
]
