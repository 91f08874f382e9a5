"""Flows: a base distribution and transforms as one trainable module."""

from pyroflow.flows.families import make_flow, planar_flow, radial_flow, sylvester_flow
from pyroflow.flows.flow import Direction, Flow, FlowDistribution, StandardNormal
from pyroflow.flows.path import AlongPath, CountedNormal, draw_from, log_prob_at_fixed

__all__ = [
    "AlongPath",
    "CountedNormal",
    "Direction",
    "Flow",
    "FlowDistribution",
    "StandardNormal",
    "draw_from",
    "log_prob_at_fixed",
    "make_flow",
    "planar_flow",
    "radial_flow",
    "sylvester_flow",
]
