"""Until when each piece of work must have ended, the error for one that has not, and how long an end may wait for it.

Note [One allowance for the end]. What hangs in the kernel cannot be ended, so whoever closes something waits for
its threads a while and then leaves them behind. A queue, the erasers of all drives and the engines are closed
one after another; if each had seconds of its own, these would add up. So they share one allowance: each may spend
half of what is left on what does not get on, and so the last one has a chance too. What ends, or gets on,
costs nothing. All that ends with the interpreter shares one allowance as well, whoever owns it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

from ssdtrain_plugin.errors import LoadError, StorageError, StoreError
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["Abandonable", "Allowance", "Deadlines", "allowed_seconds", "ending", "hangs"]

# Work on many bytes may take longer than the timeout: a drive shares its speed among its threads.
_SLOWEST_BYTES_PER_SECOND = 16 * MIB

_END_SECONDS = 4.0  # a process must end within 5 s, whatever hangs


def allowed_seconds(timeout_seconds: float, nbytes: int) -> float:
    """Tell how long a piece of work may take before it is given up.

    Args:
        timeout_seconds: As set by the user.
        nbytes: What it moves, or makes room for.
    """
    return max(timeout_seconds, nbytes / _SLOWEST_BYTES_PER_SECOND)


class Abandonable:
    """Work that may be given up while it runs, and what is left to it until it returns.

    Attributes:
        is_given_up: Nobody waits for it any longer. It may run for ever.
        has_returned: It was given up, and has returned since or will never begin.
    """

    __slots__ = ("_left_behind", "has_returned", "is_given_up")

    def __init__(self) -> None:
        """Start with nothing left behind."""
        self.is_given_up = False
        self.has_returned = False
        self._left_behind: deque[Callable[[], None]] | None = None

    def when_returned(self, callback: Callable[[], None]) -> None:
        """Have something done when work that was given up returns; at once if it has.

        Args:
            callback: Called once, by who ran the work or here; takes no lock that the caller holds.
        """
        if self._left_behind is None:
            self._left_behind = deque()
        self._left_behind.append(callback)
        if self.has_returned:
            self._clean_up()

    def returned(self) -> None:
        """Note that work that was given up has returned, or will never begin."""
        self.has_returned = True
        self._clean_up()

    def _clean_up(self) -> None:
        # The worker and whoever calls `when_returned` may both be here; each callback is popped by one of them.
        while self._left_behind:
            try:
                callback = self._left_behind.popleft()
            except IndexError:
                return
            callback()


Item = TypeVar("Item", bound=Hashable)
Owner = TypeVar("Owner")


class Deadlines(Generic[Item, Owner]):
    """Watches work that has begun.

    Args:
        timeout_seconds: Work that takes longer is overdue, unless it moves so many bytes
            that 16 MiB a second would take longer.
        clock: Seconds, never going back.

    Threads:
        One at a time, the owner locks; but for :meth:`is_due`, which any may call.
    """

    def __init__(self, timeout_seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        """Watch nothing yet."""
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._runs: dict[Item, tuple[Owner, float, float]] = {}
        self._look_at = math.inf  # nothing is overdue before this instant

    def is_due(self) -> bool:
        """Tell, at the price of reading the clock, whether :meth:`take_overdue` may find something."""
        return self._clock() >= self._look_at

    @property
    def left_seconds(self) -> float:
        """How long until something may be overdue; infinite if nothing has begun."""
        return self._look_at - self._clock()

    def begin(self, item: Item, owner: Owner, nbytes: int) -> bool:
        """Note that work begins; tell whether who waits must look earlier than it knew.

        Args:
            item: Names the work.
            owner: Given back by :meth:`take_overdue`.
            nbytes: Its size.
        """
        now = self._clock()
        deadline = now + allowed_seconds(self._timeout_seconds, nbytes)
        self._runs[item] = owner, now, deadline
        is_earlier = deadline < self._look_at
        if is_earlier:
            self._look_at = deadline
        return is_earlier

    def end(self, item: Item) -> bool:
        """Note that work has ended; tell whether it was in time, that is, not taken as overdue.

        Args:
            item: As given to :meth:`begin`.
        """
        return self._runs.pop(item, None) is not None

    def look_now(self) -> None:
        """Make :meth:`is_due` true until the next :meth:`take_overdue`."""
        self._look_at = -math.inf

    def take_overdue(self) -> list[tuple[Item, Owner, float]]:
        """Stop watching what is overdue; return it with its owner and the seconds since it began."""
        now = self._clock()
        overdue = [(item, owner, now - began) for item, (owner, began, end) in self._runs.items() if end <= now]
        for item, _, _ in overdue:
            del self._runs[item]
        self._look_at = min((end for _, _, end in self._runs.values()), default=math.inf)
        return overdue


def hangs(*, is_store: bool, nbytes: int, path: str | None, reason: str) -> StorageError:
    """Make the error for a transfer that was given up.

    Args:
        is_store: Its direction.
        nbytes: Its size.
        path: Of the drive, or None.
        reason: In a few words.
    """
    place = f" {'to' if is_store else 'from'} `{path}`" if path else ""
    outcome = "the tensor stays in memory" if is_store else "the bytes cannot be had: resume from a checkpoint"
    return (StoreError if is_store else LoadError)(
        f"cannot {'store' if is_store else 'load'} activation: {format_bytes(nbytes)}{place} ({reason})",
        errno=errno.ETIMEDOUT,
        path=path,
        nbytes=nbytes,
        hint=f"look for drive errors in `dmesg`, or raise `io_timeout_seconds` for a slow drive; {outcome}",
    )


class Allowance:
    """What may be waited in vain while something ends: Note [One allowance for the end].

    Attributes:
        left_seconds: Of all that it began with.
    """

    def __init__(self, seconds: float = _END_SECONDS) -> None:
        """Begin with some seconds."""
        self.left_seconds = seconds

    def wait(self, get_on: Callable[[float], bool]) -> bool:
        """Wait once, for no more than half of what is left.

        Args:
            get_on: Waits for as many seconds as it is given, and tells whether something ended or got on.

        Returns:
            What it said. If False, the seconds are spent.
        """
        seconds = self.left_seconds / 2
        is_well = get_on(seconds)
        if not is_well:
            self.left_seconds -= seconds
        return is_well


_present: ContextVar[Allowance | None] = ContextVar("_present", default=None)  # of this thread
_of_interpreter: list[Allowance] = []  # one, once its end has begun


@contextlib.contextmanager
def ending() -> Iterator[Allowance]:
    """Get the allowance of the end that is under way in this thread; begin an end if there is none."""
    allowance = _present.get() or next(iter(_of_interpreter), None) or Allowance()
    token = _present.set(allowance)
    try:
        yield allowance
    finally:
        _present.reset(token)


# The handler that was registered last is called first. This one must be called before that of all finalizers, which
# weakref registers with the first of them.
weakref.finalize(Allowance, int).detach()
atexit.register(lambda: _of_interpreter.append(Allowance()))
