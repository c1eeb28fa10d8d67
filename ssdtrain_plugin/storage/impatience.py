"""System calls that may never return, waited for up to a deadline. Knows no files.

A call that hangs in the kernel cannot be taken back. It stays with its thread, and who asked for it goes on.
"""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable

from ssdtrain_plugin.deadlines import allowed_seconds
from ssdtrain_plugin.errors import StateError

__all__ = ["Impatience"]


class Impatience:
    """Runs one call at a time, in a thread that does not keep the process from ending.

    Args:
        timeout_seconds: See :func:`ssdtrain_plugin.deadlines.allowed_seconds`. Infinite: calls run in the thread
            that asks.

    Threads:
        One at a time; the owner locks.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Start with nothing under way."""
        self._timeout_seconds = timeout_seconds
        self._thread: threading.Thread | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether a call that was given up has not returned."""
        return self._thread is not None and self._thread.is_alive()

    def run(self, call: Callable[[], None], nbytes: int, *, at_end: Callable[[], None]) -> None:
        """Make a call, and wait for it until the deadline.

        Args:
            call: Fails with an ``OSError``. What it does after the deadline must be right for its owner at any time.
            nbytes: How much it is about.
            at_end: Called once, when the call has returned or will never begin, by who ran it.

        Raises:
            OSError: Of the call; ETIMEDOUT if it has not returned in time, or an earlier one has not yet.
        """
        if self.is_stuck:
            at_end()
            raise OSError(errno.ETIMEDOUT, "an earlier call has not returned yet")
        if math.isinf(self._timeout_seconds):
            try:
                call()
            finally:
                at_end()
            return
        outcome: list[OSError | None] = []

        def work() -> None:
            try:
                call()
                outcome.append(None)
            except OSError as error:
                outcome.append(error)
            finally:
                at_end()

        thread = threading.Thread(target=work, name="ssdtrain-call", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter ends
            at_end()
            raise OSError(errno.EAGAIN, str(error)) from error
        self._thread = thread
        seconds = allowed_seconds(self._timeout_seconds, nbytes)
        thread.join(seconds)
        if thread.is_alive():
            raise OSError(errno.ETIMEDOUT, f"no answer within {seconds:.4g} s")
        self._thread = None
        if not outcome:
            raise StateError("a system call has ended with neither a result nor an error of the system")
        failure = outcome.pop()
        if failure is not None:
            raise failure
