"""The question put to a policy, its answer, and when a tier that failed is tried again."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ssdtrain_plugin.profile import StepProfile
from ssdtrain_plugin.stats import StepStats

__all__ = ["KEEPS_EVERYTHING", "LoadBounds", "Observation", "OffloadPolicy", "PackRequest", "Placement", "TierHealth"]

KEEPS_EVERYTHING = "keep everything and count it"
"""The plan of the policy ``none``, in whose run nothing can move."""

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
        slot: Number of the micro-batch in its step, from 0.
        is_first: It is the first of its micro-batch that the policy is asked about.
        inflight_bytes: Of stores that are queued or running.
    """

    nbytes: int
    seen_bytes: int
    microbatch_bytes: int | None
    host_free_bytes: int
    has_ssd: bool
    slot: int = 0
    is_first: bool = False
    inflight_bytes: int = 0


class LoadBounds(NamedTuple):
    """How far loads may run ahead of backward.

    Attributes:
        prefetch_bytes: Loaded, or held, for a backward that has not asked yet.
        window_bytes: The same with the kept saves that it has not asked for: no load
            begins while what was kept is enough to go on with.
    """

    prefetch_bytes: int
    window_bytes: int


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known after a step.

    Attributes:
        stats: Its numbers.
        profile: When it saved and needed what; None if it could not be measured.
        write_bytes_per_second: Of the drive, while it wrote; None before the first stores.
        read_bytes_per_second: Of the drive, while it read; None before the first loads.
        host_bytes_per_second: Of the host tier, the slower direction; None before it was used.
    """

    stats: StepStats
    profile: StepProfile | None = None
    write_bytes_per_second: float | None = None
    read_bytes_per_second: float | None = None
    host_bytes_per_second: float | None = None


class OffloadPolicy(Protocol):
    """Decides; the cache moves.

    Threads:
        Called under the cache's lock: no I/O, no waiting, no device work.

    Attributes:
        is_learning: It wants observations with a profile, which costs a little to collect.
    """

    is_learning: bool

    def decide(self, request: PackRequest) -> Placement:
        """Say where one storage goes.

        Args:
            request: What is known of it.
        """

    def observe(self, observation: Observation) -> None:
        """Learn from a finished step.

        Args:
            observation: What is known of it.
        """

    def load_bounds(self) -> LoadBounds | None:
        """Bound what is ahead of a backward that has not asked yet; None leaves it to the option."""

    def take_remark(self) -> str | None:
        """Take what a user should read once, such as why nothing is offloaded."""

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
        self._is_out = False

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
            self._is_out = True

    def succeeded(self, step: int) -> bool:
        """Note a store that worked; tell whether it is the first one after a pause.

        Args:
            step: Number of the present step.
        """
        self._pause_steps = 0
        has_recovered = self._is_out and self.is_usable(step)  # not one that was under way when another failed
        self._is_out &= not has_recovered
        return has_recovered
