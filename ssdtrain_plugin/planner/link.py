"""A place with one queue for stores and one for loads, on a clock that somebody else moves."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

__all__ = ["Job", "Link"]


@dataclass(eq=False, slots=True)
class Job:
    """One transfer.

    Attributes:
        microbatch: Whose.
        index: Of the save in its profile.
        nbytes: Its size.
        is_load: The direction.
        seconds: What is left of it, if nothing else runs.
    """

    microbatch: int
    index: int
    nbytes: int
    is_load: bool
    seconds: float


class Link:
    """Runs one store and one load at a time, first come first served in each direction.

    Args:
        mixed_share: Share of its own rate that each direction has while both run.

    Attributes:
        busy_seconds: How long a store ran, and how long a load ran.
        moved_bytes: Bytes stored and bytes loaded, of what has ended.
    """

    def __init__(self, mixed_share: float = 1.0) -> None:
        """Start idle."""
        self._mixed_share = mixed_share
        # Index 0 is the direction of stores, 1 that of loads, throughout.
        self._queues: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self.busy_seconds = [0.0, 0.0]
        self.moved_bytes = [0, 0]

    def submit(self, job: Job, *, is_urgent: bool = False) -> None:
        """Queue a transfer.

        Args:
            job: New.
            is_urgent: Go before all that has not started.
        """
        queue = self._queues[job.is_load]
        if is_urgent and queue:
            queue.insert(1, job)
        else:
            queue.append(job)

    def cancel(self, job: Job) -> bool:
        """Take back a transfer; False if it has started."""
        queue = self._queues[job.is_load]
        if queue[0] is job:
            return False
        queue.remove(job)
        return True

    def seconds_to_next_end(self) -> float:
        """How long until a transfer ends; infinite when idle."""
        left = min((queue[0].seconds for queue in self._queues if queue), default=math.inf)
        return left / self._speed()

    def _speed(self) -> float:
        return self._mixed_share if self._queues[0] and self._queues[1] else 1.0

    def advance(self, seconds: float, tolerance_seconds: float) -> list[Job]:
        """Let time pass, at most until the next transfer ends.

        Args:
            seconds: At most :meth:`seconds_to_next_end`, up to the tolerance.
            tolerance_seconds: A transfer with no more than this left has ended.

        Returns:
            What ended, stores first.
        """
        progress = seconds * self._speed()
        ended = []
        for direction, queue in enumerate(self._queues):
            if not queue:
                continue
            self.busy_seconds[direction] += seconds
            queue[0].seconds -= progress
            if queue[0].seconds <= tolerance_seconds:
                self.moved_bytes[direction] += queue[0].nbytes
                ended.append(queue.popleft())
        return ended
