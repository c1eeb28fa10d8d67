"""How fast one direction of one drive is, measured while it works. Integers and a clock; no I/O.

Note [Busy time]. Transfers overlap, so the speed of one of them says little: four at
once take four times as long each, and the drive is as fast as before. What counts is
the bytes completed for each second in which at least one transfer was under way.
Pauses between transfers say nothing about the drive and are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ssdtrain_plugin.units import MIB

__all__ = ["Meter"]


class Meter:
    """Bytes for each second of busy time, with old measurements fading out.

    Completed transfers are gathered in windows. A window ends after ``window_bytes`` or
    ``window_transfers``, and not before twice as many transfers as were under way at
    once: transfers that run side by side end side by side, and a window of nothing but
    such ends would show a drive of infinite speed.

    Bytes and seconds of the windows fade out alike and are divided at the end. That
    averages seconds for each byte, which is what a forecast of time needs, and a short
    window weighs as little as it should.

    Args:
        window_bytes: A window is full with so many bytes, at least 1.
        window_transfers: Or with so many transfers, at least 1.
        fading: Share of the earlier windows' weight that each new window takes away, over 0 and up to 1.
        clock: Seconds, never going back.

    Raises:
        ValueError: An argument is outside of its range.

    Threads:
        One at a time; the owner locks.
    """

    def __init__(
        self,
        *,
        window_bytes: int = 256 * MIB,
        window_transfers: int = 8,
        fading: float = 0.5,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start with nothing measured."""
        if window_bytes < 1 or window_transfers < 1:
            raise ValueError(f"window: {window_bytes} bytes or {window_transfers} transfers (expected at least 1)")
        if not 0 < fading <= 1:
            raise ValueError(f"fading: {fading} (expected more than 0 and at most 1)")
        self._wanted_bytes = window_bytes
        self._wanted_transfers = window_transfers
        self._kept_share = 1 - fading
        self._clock = clock
        self._faded_bytes = 0.0
        self._faded_seconds = 0.0
        self._active_bytes = 0
        self._num_active = 0
        self._counted_until = 0.0
        self._is_outdated = False
        self._window_bytes = 0
        self._window_transfers = 0
        self._window_seconds = 0.0
        self._most_active = 0

    @property
    def bytes_per_second(self) -> float | None:
        """The speed, more than 0, or None before the first window has ended.

        While transfers are under way it is at most what it would be if all of them ended
        now. So a drive that hangs becomes slower by the second, before anything returns.
        """
        if self._faded_seconds <= 0:
            return None
        measured = self._faded_bytes / self._faded_seconds
        return min(measured, self.limit_bytes_per_second) if self._num_active else measured

    @property
    def limit_bytes_per_second(self) -> float:
        """What the speed would be if all transfers under way ended now; infinite while no byte was seen to move.

        It tells of a slow drive within its first window.
        """
        seconds = self._faded_seconds + self._busy_seconds()
        nbytes = self._faded_bytes + self._window_bytes + self._active_bytes
        return nbytes / seconds if nbytes > 0 and seconds > 0 else math.inf

    def begin(self, nbytes: int) -> None:
        """Note that a transfer starts.

        Args:
            nbytes: Its size.
        """
        if self._num_active == 0:
            self._counted_until = self._clock()
        self._num_active += 1
        self._active_bytes += nbytes
        self._most_active = max(self._most_active, self._num_active)

    def end(self, nbytes: int, *, has_moved: bool = True) -> None:
        """Note that a transfer has ended.

        Args:
            nbytes: Its size, as given to :meth:`begin`.
            has_moved: False if it failed. Its time counts then, and its bytes do not.
        """
        now = self._clock()
        self._window_seconds += now - self._counted_until
        self._counted_until = now
        self._num_active -= 1
        self._active_bytes -= nbytes
        if not has_moved:
            return
        self._window_bytes += nbytes
        self._window_transfers += 1
        if self._is_window_full():
            self._end_window()

    def expire(self) -> None:
        """Let the next transfer that ends replace what was measured, which is of another time.

        Until then the old value stands. For a drive that has rested.
        """
        self._is_outdated = True
        self._start_window()

    def _start_window(self) -> None:
        self._window_bytes = 0
        self._window_transfers = 0
        self._window_seconds = 0.0
        self._most_active = self._num_active

    def _busy_seconds(self) -> float:
        """Busy seconds of the window so far."""
        return self._window_seconds + (self._clock() - self._counted_until if self._num_active else 0.0)

    def _is_window_full(self) -> bool:
        if self._window_seconds <= 0:
            return False  # too short for the clock
        if self._is_outdated:
            return True
        is_large = self._window_bytes >= self._wanted_bytes or self._window_transfers >= self._wanted_transfers
        return is_large and self._window_transfers >= 2 * self._most_active

    def _end_window(self) -> None:
        kept_share = 0.0 if self._is_outdated else self._kept_share
        self._faded_bytes = kept_share * self._faded_bytes + self._window_bytes
        self._faded_seconds = kept_share * self._faded_seconds + self._window_seconds
        self._is_outdated = False
        self._start_window()
