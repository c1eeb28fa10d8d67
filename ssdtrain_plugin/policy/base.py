"""The question put to a policy, its answer, and when a tier that failed is tried again."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from ssdtrain_plugin.stats import StepStats

__all__ = ["OffloadPolicy", "PackRequest", "Placement", "TierHealth"]

_LONGEST_PAUSE_STEPS = 64


class Placement(enum.Enum):
    """Where a saved storage goes."""

    KEEP = "keep"
    HOST = "host"
    SSD = "ssd"

    # Members are singletons, and Enum's own hash runs Python code on the hot path.
    __hash__ = object.__hash__


@dataclass(slots=True)
class PackRequest:
    """One storage that autograd saved, in integers.

    Attributes:
        nbytes: Its size.
        seen_bytes: Bytes that this micro-batch saved before it, each storage once.
        microbatch_bytes: What a micro-batch saves: the largest of the last ones, or None before the first.
        host_free_bytes: Room in the host tier; 0 if there is none or it failed.
        has_ssd: Whether there is a drive, and it works.
    """

    nbytes: int
    seen_bytes: int
    microbatch_bytes: int | None
    host_free_bytes: int
    has_ssd: bool


class OffloadPolicy(Protocol):
    """Decides; the cache moves.

    Threads:
        Called under the cache's lock: no I/O, no waiting, no device work.
    """

    def decide(self, request: PackRequest) -> Placement:
        """Say where one storage goes.

        Args:
            request: What is known of it.
        """

    def observe(self, step: StepStats) -> None:
        """Learn from a finished step.

        Args:
            step: Its numbers.
        """

    def explain(self) -> str:
        """Say in one line what is done and why, for the log and ``StepStats.plan``."""


class TierHealth:
    """After a failed store, leave the tier alone for a while: 1 step, then 2, 4, up to 64.

    One success ends the pause for good, so a drive that recovered is used again.
    """

    def __init__(self) -> None:
        """Start healthy."""
        self._pause_steps = 0
        self._retry_at_step = 0

    def is_usable(self, step: int) -> bool:
        """Tell whether a store may be tried.

        Args:
            step: Number of the present step.
        """
        return step >= self._retry_at_step

    def failed(self, step: int) -> None:
        """Note a failed store.

        Args:
            step: Number of the present step.
        """
        if self.is_usable(step):
            self._pause_steps = min(max(1, 2 * self._pause_steps), _LONGEST_PAUSE_STEPS)
            self._retry_at_step = step + self._pause_steps

    def succeeded(self) -> None:
        """Note a store that worked after the pause."""
        self._pause_steps = 0
