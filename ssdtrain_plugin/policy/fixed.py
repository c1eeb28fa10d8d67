"""Policies that do not measure: keep all, offload all, or the first part of a micro-batch."""

from __future__ import annotations

from ssdtrain_plugin.policy.base import KEEPS_EVERYTHING, Observation, PackRequest, Placement

__all__ = ["FractionPolicy"]


class FractionPolicy:
    """Offload the first part, in forward order, of the bytes of each micro-batch.

    The last part stays because its backward comes first (SSDTrain, section III-C,
    keeps the tail as well). 1.0 is the option ``all`` and 0.0 is ``none``.

    Args:
        fraction: Share of the bytes, 0 to 1.
    """

    is_learning = False

    def __init__(self, fraction: float) -> None:
        """Fix the share."""
        self._fraction = fraction

    def decide(self, request: PackRequest) -> Placement:
        """Offload until the share is reached; the host tier is filled first.

        Args:
            request: What is known of the storage.
        """
        if self._fraction <= 0.0:
            return Placement.KEEP
        # Before the first micro-batch has ended its size is unknown. Offloading
        # it whole is the choice that cannot run out of memory.
        is_known = request.microbatch_bytes is not None
        if self._fraction < 1.0 and is_known and request.seen_bytes >= self._fraction * (request.microbatch_bytes or 0):
            return Placement.KEEP
        if request.nbytes <= request.host_free_bytes:
            return Placement.HOST
        return Placement.SSD if request.has_ssd else Placement.KEEP

    def observe(self, observation: Observation) -> None:
        """Learn nothing: the share is fixed.

        Args:
            observation: Not used.
        """

    def load_bounds(self) -> None:
        """Leave it to the option."""

    def take_remark(self) -> None:
        """Have nothing to say."""

    def explain(self) -> str:
        """Say the share."""
        if self._fraction <= 0.0:
            return KEEPS_EVERYTHING
        if self._fraction >= 1.0:
            return "offload everything"
        return f"offload the first {self._fraction:.0%} of each micro-batch"
