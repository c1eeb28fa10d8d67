"""What a policy learns from: the profile of a step and the speeds of the tiers, put together when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ssdtrain_plugin.policy.base import Observation, Placement
from ssdtrain_plugin.profile import StepProfiler
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.storage.base import Rates, Tier
from ssdtrain_plugin.streams import Mark

__all__ = ["StepObserver"]

_NOTHING = Rates(None, None)


class StepObserver:
    """Collects one step.

    Args:
        tiers: At most one per placement.
        clock: Host seconds.
        mark: Marks the present end of the compute stream.
        is_on: The policy learns; else no profile is made.

    Threads:
        Not safe; its owner locks.

    Attributes:
        profiler: Of the present step.
    """

    def __init__(
        self, tiers: Mapping[Placement, Tier], clock: Callable[[], float], mark: Callable[[], Mark], *, is_on: bool
    ) -> None:
        """Start with an empty step."""
        self.profiler = StepProfiler(clock, mark, is_on=is_on)
        self._tiers = dict(tiers)

    def end_step(self, stats: StepStats) -> Observation:
        """Close the step and open the next.

        Args:
            stats: Of the step.
        """
        rates = {placement: tier.take_rates() for placement, tier in self._tiers.items()}
        drive, host = rates.get(Placement.SSD, _NOTHING), rates.get(Placement.HOST, _NOTHING)
        return Observation(
            stats=stats,
            profile=self.profiler.take(),
            write_bytes_per_second=drive.write_bytes_per_second,
            read_bytes_per_second=drive.read_bytes_per_second,
            host_bytes_per_second=min((rate for rate in host if rate is not None), default=None),
        )
