"""The bound of a guide whose model draws a part of its rows, from the rows at hand."""

from __future__ import annotations

from pyro.distributions import TransformedDistribution
from torch import Tensor

from pyroflow.guides import AmortizedPlanarGuide
from pyroflow.inference.objectives import LogJointBound
from pyroflow.model.at_hand import Subsampling
from pyroflow.model.log_joint_at_hand import LogJointAtHand, LogJointInFull
from pyroflow.seeds import drawing

FEWEST = 16  # points side by side, at which the plates are covered
LAYERED = 2**14  # rows times draws of a step, where each row has layers of its own
SLOWEST = 30  # times as slow as with all rows
SCORED_LEAST = 256  # fixed draws on which states are compared


class MinibatchBound(LogJointBound):
    """The bound by the log joint of the rows at hand, each counted as often as it stands for.

    A step draws rows and evaluates those alone; its expectation is the bound of the plates in
    full, on which states are compared.
    """

    def _sizes(self) -> tuple[int, int]:
        """Fewer where it takes many parts to cover the rows, or each row has layers of its own."""
        (draws, scored), guide = super()._sizes(), self.guide
        sizes = Subsampling.of(self.problem.model_trace)
        if not isinstance(guide, AmortizedPlanarGuide):
            return draws, max(SCORED_LEAST, scored // sizes.parts)
        at_hand = [sizes.plates.get(p.plate, (0, p.rows.size)) for p in guide.parts]
        rows = sum(B for _, B in at_hand)
        return min(draws, max(FEWEST, LAYERED // rows)), min(scored, SCORED_LEAST)

    def _make_log_joint(self, num: int) -> LogJointInFull:
        """That of all rows, and of the rows at hand.

        Raises:
            ValueError: If it cannot be recorded, or the guide's context is of some rows alone.
        """
        self.guide.sparse = self.processes.count == 1  # which torch.distributed does not sum
        self.part = LogJointAtHand(self.problem, self.guide, num)
        parts, self.like = self.part.subsampling.parts, self.guide.start()
        self.slower = float(min(SLOWEST, parts))
        few = max(FEWEST, round(self.num_particles / parts))
        return LogJointInFull(LogJointAtHand(self.problem, self.guide, few))

    def _step(self) -> tuple[TransformedDistribution, Tensor, Tensor]:
        with drawing():
            self.part.rows = self.part.subsampling.draw().to(self.like)
        q = self.guide.at_hand(self.part.rows, *self.problem.args, **self.problem.kwargs)
        z = self._drawn(q, self.num_particles)
        return q, z, self.part(z)
