"""A tier made as slow as wanted, for experiments and tests: bytes a second each way, latency, jitter.

It moves nothing itself: the tier inside does, and this one answers later. It never
touches the bytes of a tensor.

Note [Time owed]. Each direction is a pipe through which the bytes of all threads go
one after the other, at the pipe's rate, in the order in which the transfers began. A
transfer is over when its last byte has left the pipe and the latency has passed.
Latencies of several transfers overlap, as on a drive. The time that the tier inside
takes passes while the bytes are in the pipe, so only the remainder is waited for.
"""

from __future__ import annotations

import math
import random
import threading
import time
from typing import Protocol

from torch import Tensor

from ssdtrain_plugin.errors import StorageError
from ssdtrain_plugin.storage.base import Extent, Rates, Tier
from ssdtrain_plugin.storage.tally import Tally
from ssdtrain_plugin.streams import DeviceEvent
from ssdtrain_plugin.units import format_rate, format_seconds

__all__ = ["Clock", "RealClock", "ThrottledTier"]

# A thread that waits looks up so often, for another rate or the end of the tier.
_LONGEST_SLEEP_SECONDS = 0.05
# Less is not slept: sums of floats end a little beside the instant that was meant.
_SHORTEST_SLEEP_SECONDS = 1e-6


class Clock(Protocol):
    """Tells the time and waits for a time. Tests bring one that they move by hand."""

    def now(self) -> float:
        """Return seconds since some fixed instant, never going back."""

    def sleep_until(self, instant: float) -> None:
        """Return when :meth:`now` has reached ``instant``, at once if it has.

        Args:
            instant: Seconds, as :meth:`now` counts them.
        """


class RealClock:
    """The time of the machine."""

    def now(self) -> float:
        """Return the seconds of the monotonic clock."""
        return time.monotonic()

    def sleep_until(self, instant: float) -> None:
        """Sleep; see :meth:`Clock.sleep_until`."""
        time.sleep(max(0.0, instant - time.monotonic()))


class _Pipe:
    """One direction: bytes leave in the order in which they came, at a rate that may change. Its owner locks."""

    def __init__(self, bytes_per_second: float, now: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._left_bytes = 0.0  # of all that ever came, so much has left by `_left_at`
        self._left_at = now
        self._entered_bytes = 0.0

    @property
    def bytes_per_second(self) -> float:
        return self._bytes_per_second

    def enter(self, nbytes: float, now: float) -> float:
        """Add bytes at the end; return the mark at which the last of them leaves."""
        self._advance(now)
        self._entered_bytes += nbytes
        return self._entered_bytes

    def seconds_until(self, mark: float, now: float) -> float:
        """How long until what has left reaches ``mark``, if the rate stays; 0 if it has."""
        self._advance(now)
        return max(0.0, (mark - self._left_bytes) / self._bytes_per_second)

    def set_rate(self, bytes_per_second: float, now: float) -> None:
        self._advance(now)
        self._bytes_per_second = bytes_per_second

    def _advance(self, now: float) -> None:
        if now > self._left_at:  # no bound times no time would not be a number
            # An empty pipe saves nothing up: what comes next takes its full time.
            left_bytes = self._left_bytes + self._bytes_per_second * (now - self._left_at)
            self._left_bytes = min(self._entered_bytes, left_bytes)
            self._left_at = now


class _Owed:
    """The time of one transfer that is not over yet. Its owner locks."""

    __slots__ = ("_due", "_latency_seconds", "_mark", "_pipe")

    def __init__(self, pipe: _Pipe, nbytes: float, latency_seconds: float, now: float) -> None:
        self._pipe = pipe
        self._mark = pipe.enter(nbytes, now)
        self._latency_seconds = latency_seconds
        self._due = now + pipe.seconds_until(self._mark, now) + latency_seconds

    def due_at(self, now: float) -> float:
        """When the transfer is over, as far as the present rate tells."""
        left_seconds = self._pipe.seconds_until(self._mark, now)
        if left_seconds > 0:
            self._due = now + left_seconds + self._latency_seconds
        else:
            # The last byte left some time ago: as expected, or earlier because the rate rose.
            self._due = min(self._due, now + self._latency_seconds)
        return self._due


class ThrottledTier(Tier):
    """Behaves like a slower drive, with the bytes in another tier; see Note [Time owed].

    A transfer that fails inside raises at once, and the pipe keeps the time it had for it.

    Args:
        inner: Moves the bytes. It belongs to this tier, which closes it.
        write_bytes_per_second: Of all writing threads together, more than 0; ``math.inf`` for no bound.
        read_bytes_per_second: Of all reading threads together, more than 0.
        latency_seconds: Added to each transfer, at least 0.
        jitter: The time of a transfer is multiplied by a random number from ``1 - jitter``
            to ``1 + jitter``; 0 to 1.
        seed: Of the random numbers, which are drawn in the order in which transfers begin.
        clock: None for the machine's.

    Raises:
        ValueError: An argument is outside of its range.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        write_bytes_per_second: float,
        read_bytes_per_second: float,
        latency_seconds: float = 0.0,
        jitter: float = 0.0,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        """Start with empty pipes."""
        _check_rate("write_bytes_per_second", write_bytes_per_second)
        _check_rate("read_bytes_per_second", read_bytes_per_second)
        if not 0 <= latency_seconds < math.inf:
            raise ValueError(f"latency_seconds: {latency_seconds} (expected at least 0)")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter: {jitter} (expected 0 to 1)")
        self.name = inner.name
        self._inner = inner
        self._clock: Clock = RealClock() if clock is None else clock
        now = self._clock.now()
        self._writes = _Pipe(write_bytes_per_second, now)
        self._reads = _Pipe(read_bytes_per_second, now)
        self._latency_seconds = latency_seconds
        self._jitter = jitter
        self._random = random.Random(seed)
        # Reentrant: a collection inside a locked region may run the finalizer that closes the tier.
        self._lock = threading.RLock()
        self._is_closed = False
        self._write_tally, self._read_tally = Tally(self._clock.now), Tally(self._clock.now)

    def set_rates(
        self, *, write_bytes_per_second: float | None = None, read_bytes_per_second: float | None = None
    ) -> None:
        """Change the speed now, also for the bytes that are under way.

        Args:
            write_bytes_per_second: More than 0, or None to leave it.
            read_bytes_per_second: More than 0, or None to leave it.

        Raises:
            ValueError: A rate is not positive; then nothing has changed.

        Threads:
            Any.
        """
        for name, rate in (("write", write_bytes_per_second), ("read", read_bytes_per_second)):
            if rate is not None:
                _check_rate(f"{name}_bytes_per_second", rate)
        with self._lock:
            now = self._clock.now()
            if write_bytes_per_second is not None:
                self._writes.set_rate(write_bytes_per_second, now)
            if read_bytes_per_second is not None:
                self._reads.set_rate(read_bytes_per_second, now)

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now in the tier inside."""
        return self._inner.used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes left in the tier inside."""
        return self._inner.free_bytes

    def allocate(self, nbytes: int) -> Extent:
        """Reserve room in the tier inside, without delay; see :meth:`Tier.allocate`."""
        return self._inner.allocate(nbytes)

    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        """Write through the tier inside; return when a drive of this speed would."""
        ready.synchronize()  # a drive cannot begin before there are bytes
        with self._write_tally.count(extent.nbytes):
            transfer = self._begin(self._writes, extent.nbytes)
            self._inner.write(extent, source, ready)
            self._wait_for(transfer)

    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        """Read through the tier inside; return its event when a drive of this speed would."""
        with self._read_tally.count(extent.nbytes):
            transfer = self._begin(self._reads, extent.nbytes)
            event = self._inner.read(extent, target, ready)
            self._wait_for(transfer)
            return event

    def free(self, extent: Extent) -> None:
        """Give an extent back to the tier inside."""
        self._inner.free(extent)

    def take_survived(self) -> list[StorageError]:
        """Take the failures that the tier inside has made good."""
        return self._inner.take_survived()

    def memory_of(self, extent: Extent) -> Tensor | None:
        """Get the memory that an extent of the tier inside lies in; copies of it are not slowed down."""
        return self._inner.memory_of(extent)

    def path_of(self, extent: Extent) -> str | None:
        """Name the directory that the tier inside names."""
        return self._inner.path_of(extent)

    def hangs(self, extent: Extent) -> bool:
        """Tell the tier inside."""
        return self._inner.hangs(extent)

    def take_rates(self) -> Rates:
        """Tell how fast transfers were, waits included."""
        return Rates(self._write_tally.take(), self._read_tally.take())

    @property
    def is_at_write_limit(self) -> bool:
        """Ask the tier inside."""
        return self._inner.is_at_write_limit

    def trim(self) -> None:
        """Let the tier inside give back what it has not needed."""
        self._inner.trim()

    def describe(self) -> str:
        """Add the bounds to the line of the tier inside."""
        with self._lock:
            write, read = self._writes.bytes_per_second, self._reads.bytes_per_second
        return (
            f"{self._inner.describe()}, throttled to {_rate_text(write)} write and {_rate_text(read)} read, "
            f"latency {format_seconds(self._latency_seconds)}, jitter {self._jitter:.0%}"
        )

    def close(self) -> None:
        """Close the tier inside. What is still owed for transfers under way is let off."""
        with self._lock:
            self._is_closed = True
        self._inner.close()

    def _begin(self, pipe: _Pipe, nbytes: int) -> _Owed:
        with self._lock:
            factor = 1 + self._jitter * self._random.uniform(-1, 1)
            return _Owed(pipe, nbytes * factor, self._latency_seconds * factor, self._clock.now())

    def _wait_for(self, owed: _Owed) -> None:
        while True:
            with self._lock:
                now = self._clock.now()
                due = owed.due_at(now)
                is_over = self._is_closed or due - now < _SHORTEST_SLEEP_SECONDS
            if is_over:
                return
            self._clock.sleep_until(min(due, now + _LONGEST_SLEEP_SECONDS))


def _check_rate(name: str, bytes_per_second: float) -> None:
    if not bytes_per_second > 0:
        raise ValueError(f"{name}: {bytes_per_second} (expected more than 0)")


def _rate_text(bytes_per_second: float) -> str:
    return "no bound" if bytes_per_second == math.inf else format_rate(bytes_per_second)
