"""How fast a tier was since somebody last asked: bytes for each second in which it worked.

Unlike :class:`ssdtrain_plugin.storage.meter.Meter`, which smooths for whoever decides
with every transfer, this gives each period's own figure to whoever decides once a step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Tally"]


class Tally:
    """One direction of one tier. Time with several transfers under way counts once.

    Args:
        clock: Seconds, never going back.

    Threads:
        Any.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with nothing moved."""
        self._clock = clock
        # Reentrant: a collection inside may run a finalizer that comes here again.
        self._lock = threading.RLock()
        self._num_active = 0
        self._since = 0.0
        self._busy_seconds = 0.0
        self._moved_bytes = 0

    @contextlib.contextmanager
    def count(self, nbytes: int) -> Iterator[None]:
        """Count a transfer; one that raises counts its time and no bytes.

        Args:
            nbytes: Its size.
        """
        with self._lock:
            if self._num_active == 0:
                self._since = self._clock()
            self._num_active += 1
        moved_bytes = 0
        try:
            yield
            moved_bytes = nbytes
        finally:
            with self._lock:
                self._num_active -= 1
                self._moved_bytes += moved_bytes
                if self._num_active == 0:
                    self._busy_seconds += self._clock() - self._since

    def take(self) -> float | None:
        """Return bytes per second since the last call; None if nothing was moved."""
        with self._lock:
            if self._num_active:
                now = self._clock()
                self._busy_seconds += now - self._since
                self._since = now
            rate = self._moved_bytes / self._busy_seconds if self._moved_bytes and self._busy_seconds > 0 else None
            if rate is not None:
                self._busy_seconds, self._moved_bytes = 0.0, 0
            return rate
