"""How often a call of an engine that failed is made again, and after which pause.

Note [Which failure is tried again]. An interrupted call (EINTR, EAGAIN) is made again at
once. A load is worth some patience, because the bytes are nowhere else: whatever went
wrong, it is tried again after pauses that grow. A store is not, because the tensor
stays in memory: only a short write, after which the rest may well go through, and calls
that are interrupted again and again, get some pauses. All pauses of one call together
take less than a second, so that a job whose bytes are lost ends within seconds.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Attempts", "Retries", "ShortTransferError"]

_INTERRUPTED = frozenset({errno.EINTR, errno.EAGAIN})
_NUM_AT_ONCE = 4


class ShortTransferError(OSError):
    """An engine has moved fewer, or more, bytes than it was asked to. It has no error number."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How patient a drive is.

    Attributes:
        load_pauses_seconds: Before each further attempt of a load.
        store_pauses_seconds: Before each further attempt of a store.
        checksum_pauses_seconds: Before bytes with a wrong checksum are read again.
        wait: Lets that many seconds pass. Tests bring one that does not.
    """

    load_pauses_seconds: tuple[float, ...] = (0.01, 0.05, 0.25)
    store_pauses_seconds: tuple[float, ...] = (0.01, 0.05)
    checksum_pauses_seconds: tuple[float, ...] = (0.0, 0.05)
    wait: Callable[[float], None] = time.sleep


class Attempts:
    """The failures of one call; see Note [Which failure is tried again].

    Args:
        retries: How patient to be.
        is_store: Which direction.

    Threads:
        One.
    """

    __slots__ = ("_is_store", "_num_at_once", "_num_pauses", "_pauses", "_wait")

    def __init__(self, retries: Retries, *, is_store: bool) -> None:
        """Start with no failure."""
        self._is_store = is_store
        self._pauses = retries.store_pauses_seconds if is_store else retries.load_pauses_seconds
        self._wait = retries.wait
        self._num_at_once = 0
        self._num_pauses = 0

    @property
    def has_paused(self) -> bool:
        """A failure was more than an interruption."""
        return self._num_pauses > 0

    def again(self, error: OSError) -> bool:
        """Wait as long as is due; tell whether to try once more.

        Args:
            error: What went wrong this time.
        """
        is_interrupted = error.errno in _INTERRUPTED
        if is_interrupted and self._num_at_once < _NUM_AT_ONCE:
            self._num_at_once += 1
            return True
        is_lasting = self._is_store and not is_interrupted and not isinstance(error, ShortTransferError)
        if is_lasting or self._num_pauses == len(self._pauses):
            return False
        self._wait(self._pauses[self._num_pauses])
        self._num_pauses += 1
        return True
