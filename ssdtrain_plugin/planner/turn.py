"""One micro-batch of a plan: when it turns from forward to backward, and what is chosen for it."""

from __future__ import annotations

import math

from ssdtrain_plugin.planner.curve import Curve
from ssdtrain_plugin.planner.timeline import Phase, Schedule

__all__ = ["Turn"]


class Turn:
    """One micro-batch in time.

    Args:
        schedule: Of the step.
        microbatch: Which.
        curve: Of its log.

    Attributes:
        forward_seconds: When its forward begins.
        backward_seconds: When its backward begins.
        announced_seconds: When its loads may begin.
        forward_ends: Ends of its own forward and of those between it and its backward.
        curve: As given.
        stored_curve: The same without the saves that are expected to find the queue full. Stores are
            judged by it; loads by ``curve``, since a load that was not expected could stall.
        cap: The prefix may not reach further.
        end: Of the prefix for the drive, as a position in the log.
        host_end: Of what goes to the host.
        free_seconds: When the drive has done the stores of the micro-batches before, from the begin of forward.
        done_by_seconds: When its loads must have ended, from the begin of backward.
        host_free_seconds: As ``free_seconds``, for the host.
        host_done_by_seconds: As ``done_by_seconds``, for the host.
    """

    __slots__ = (
        "announced_seconds",
        "backward_seconds",
        "cap",
        "curve",
        "done_by_seconds",
        "end",
        "forward_ends",
        "forward_seconds",
        "free_seconds",
        "host_done_by_seconds",
        "host_end",
        "host_free_seconds",
        "stored_curve",
    )

    def __init__(self, schedule: Schedule, microbatch: int, curve: Curve) -> None:
        """Read the times off the schedule; nothing is chosen yet."""
        forward = schedule.positions[Phase.FORWARD, microbatch]
        backward = schedule.positions[Phase.BACKWARD, microbatch]
        self.forward_seconds = schedule.begins[forward]
        self.backward_seconds = schedule.begins[backward]
        self.announced_seconds = schedule.begins[schedule.announcements[microbatch]]
        self.forward_ends = [
            schedule.begins[position + 1]
            for position in range(forward, backward)
            if schedule.events[position].phase is Phase.FORWARD
        ]
        self.reset(curve)

    def reset(self, curve: Curve) -> None:
        """Choose nothing.

        Args:
            curve: Of the log.
        """
        self.curve = self.stored_curve = curve
        self.cap = len(curve)
        self.end = self.host_end = 0
        self.free_seconds = self.host_free_seconds = 0.0
        self.done_by_seconds = self.host_done_by_seconds = math.inf

    @property
    def stored_seconds(self) -> float:
        """When the stores of the prefix have ended."""
        return self.forward_seconds + self.stored_curve.store_end(self.end, self.free_seconds)

    def latest_load_seconds(self, end: int) -> float:
        """When the loads of a prefix must begin."""
        back_by_seconds = min(self.curve.slack[end], self.done_by_seconds)
        return self.backward_seconds + back_by_seconds - self.curve.load_seconds[end]

    def fits(self, end: int, deadline_seconds: float) -> bool:
        """Tell whether a prefix is stored and loaded in time.

        Args:
            end: Of the prefix.
            deadline_seconds: When its last store must have begun.
        """
        curve = self.stored_curve
        stored_seconds = self.forward_seconds + curve.store_end(end, self.free_seconds)
        if stored_seconds - curve.last_store_seconds[end] > deadline_seconds:
            return False
        return self.latest_load_seconds(end) >= max(self.announced_seconds, stored_seconds)

    def host_stored_seconds(self, host_end: int) -> float:
        """When the stores to the host have ended."""
        return self.forward_seconds + self.curve.host_store_end(self.end, host_end, self.host_free_seconds)

    def latest_host_load_seconds(self, host_end: int) -> float:
        """When the loads from the host must begin."""
        return self.backward_seconds + self.curve.host_load_begin(self.end, host_end, self.host_done_by_seconds)

    def fits_host(self, host_end: int) -> bool:
        """Tell whether the log from the prefix on can go to the host and come back in time.

        Args:
            host_end: Up to there.
        """
        stored_seconds = self.host_stored_seconds(host_end)
        if stored_seconds > self.forward_ends[-1]:
            return False
        return self.latest_host_load_seconds(host_end) >= max(self.announced_seconds, stored_seconds)

    def waiting_bytes(self, seconds: float) -> int:
        """Bytes of the prefix that are not stored at a time.

        Args:
            seconds: After its forward.
        """
        curve = self.stored_curve
        done = curve.stored(self.end, self.free_seconds, seconds - self.forward_seconds)
        return curve.moved_bytes[self.end] - curve.moved_bytes[done]

    @property
    def ssd_bytes(self) -> int:
        """Bytes that go to the drive."""
        return self.stored_curve.moved_bytes[self.end]

    @property
    def host_bytes(self) -> int:
        """Bytes that go to the host."""
        return self.curve.moved_bytes[self.host_end] - self.curve.moved_bytes[self.end]

    def out_bytes(self, seconds: float) -> int:
        """Bytes that are out of device memory, if nothing is loaded yet.

        Args:
            seconds: The time, after its forward.
        """
        return self.ssd_bytes + self.host_bytes - self.waiting_bytes(seconds)

    def unasked(self, seconds: float) -> tuple[int, int]:
        """How many bytes backward has not asked for at a time.

        Args:
            seconds: The time.

        Returns:
            Bytes that were offloaded, and bytes with those that were kept.
        """
        curve = self.curve
        position = curve.unasked(len(curve), seconds - self.backward_seconds)
        return curve.moved_bytes[min(position, self.host_end)], curve.profile.logged_bytes[position]
