"""Small posteriors with exact answers, by name."""

from . import curved, edges, gaussians, hierarchies, modes, regressions, tails
from .target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (gaussians, modes, tails, curved, edges, hierarchies, regressions)
    for target in module.TARGETS
}
SEVEN = (  # those that the first trial was made of
    "eight_schools-centred_10",
    "funnel-3_10",
    "modes-60_40_5",
    "modes-90_10_5",
    "wide-1_percent_5",
    "groups-uneven_42",
    "poisson-60_62",
)
THOUSAND = "groups-thousand_1002"
