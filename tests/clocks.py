"""A clock that a test moves by hand, so that nothing sleeps and no time is measured."""

import threading

TIMEOUT_SECONDS = 20.0
_ROUNDING_SECONDS = 1e-9  # 0.199 + 0.001 is not quite 0.2


class ManualClock:
    """Stands still until told. Threads in ``sleep_until`` wait for the test, but not for ever.

    Calling it reads it, so it serves where a function such as ``time.monotonic`` is wanted too.
    """

    def __init__(self, now=0.0):
        self._now = now
        self._changed = threading.Condition()
        self._sleepers = []  # the instants that threads wait for

    def now(self):
        with self._changed:
            return self._now

    __call__ = now

    def sleep_until(self, instant):
        with self._changed:
            self._sleepers.append(instant)
            self._changed.notify_all()
            try:
                if not self._changed.wait_for(lambda: self._has_come(instant), TIMEOUT_SECONDS):
                    raise TimeoutError(f"nobody moved the clock to {instant}")
            finally:
                self._sleepers.remove(instant)

    def advance(self, seconds):
        """Let time pass; who waits for an instant up to the new one goes on."""
        with self._changed:
            self._now += seconds
            self._changed.notify_all()

    def wait_for_sleepers(self, count):
        """Return when exactly ``count`` threads wait for an instant that has not come."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._num_asleep() == count, TIMEOUT_SECONDS)
            assert there, f"{self._num_asleep()} threads sleep, expected {count}"

    def _num_asleep(self):
        return sum(not self._has_come(instant) for instant in self._sleepers)

    def _has_come(self, instant):
        return self._now >= instant - _ROUNDING_SECONDS
