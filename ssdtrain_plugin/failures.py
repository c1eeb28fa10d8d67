"""What to do about a transfer that failed: count it, say it once, leave a tier that stores fail on alone for a while.

Note [A failed store costs memory]. The tensor is still in device memory, so it
stays there and the gradient is not affected. Only bytes really lost stop training.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable

from ssdtrain_plugin.errors import CapacityError, LoadError, StorageError, StoreError
from ssdtrain_plugin.policy.base import TierHealth

__all__ = ["FailureLog"]

logger = logging.getLogger(__name__)

_STAYS = "the tensor stays in memory"
_HARMLESS = "gradients are not affected"


class FailureLog:
    """What failed at all tiers, by cause.

    Args:
        tier_names: Of the tiers there are.
        rank: Global rank of the process, for the log.

    Threads:
        Not safe; its owner locks.
    """

    def __init__(self, tier_names: Iterable[str], rank: int) -> None:
        """Start with healthy tiers."""
        self._rank = rank
        self._health = {name: TierHealth() for name in tier_names}
        self._known_causes: set[str] = set()
        self._have_recovered: set[str] = set()
        self._unsaid: deque[tuple[int, str]] = deque()
        self._hanging: list[tuple[str, Callable[[], bool]]] = []

    def obstacle(self, tier_name: str, step: int) -> str | None:
        """Say why no store to the tier may be tried; None if one may.

        Args:
            tier_name: Of a tier.
            step: Number of the present step.
        """
        if self._hanging:
            self._hanging = [(name, has_returned) for name, has_returned in self._hanging if not has_returned()]
            if any(name == tier_name for name, _ in self._hanging):
                return "left alone while a transfer hangs"
        return None if self._health[tier_name].is_usable(step) else "left alone after a failure"

    def leave_alone(self, tier_name: str, has_returned: Callable[[], bool]) -> None:
        """Let no store be tried on a tier while a transfer hangs there, however long that is.

        Args:
            tier_name: Of the tier.
            has_returned: Whether the transfer has returned.
        """
        self._hanging.append((tier_name, has_returned))

    def succeeded(self, tier_name: str, step: int) -> None:
        """Note a store that worked; the first time that it ends a pause, prepare a line for the log.

        Args:
            tier_name: Of the tier.
            step: Number of the present step.
        """
        if self._health[tier_name].succeeded(step) and tier_name not in self._have_recovered:
            self._have_recovered.add(tier_name)
            text = f"`{tier_name}` takes activations again: a store after its pause worked; said once"
            self._unsaid.append((logging.INFO, text))

    def failed(self, tier_name: str, error: BaseException, step: int, counts: Counter[str]) -> None:
        """Note a store that did not work; prepare a warning the first time a cause is seen.

        Args:
            tier_name: Of the tier.
            error: Why.
            step: Number of the present step.
            counts: Failures of this step by cause; one is added.
        """
        cause, is_budget = _cause(tier_name, error)
        if not is_budget:
            # A budget that is used up frees itself; a drive that fails needs time.
            self._health[tier_name].failed(step)
        problem = str(error)
        outcome = _HARMLESS if _STAYS in problem else f"{_STAYS}, {_HARMLESS}"
        self._count(_place(cause, error), problem, outcome, counts)

    def survived(self, tier_name: str, error: StorageError, counts: Counter[str]) -> None:
        """Note a failure that a tier has made good: another attempt, or another drive, has moved the bytes.

        Args:
            tier_name: Of the tier.
            error: Of the first attempt, or drive. What is of no transfer has moved no bytes, and needs none moved.
            counts: Failures of this step by cause; one is added.
        """
        is_transfer = isinstance(error, StoreError | LoadError | CapacityError)
        outcome = "another attempt, or another drive, has moved the bytes" if is_transfer else "no bytes are lost"
        # Without the hint, which says what to do when the bytes are lost.
        self._count(_place(_cause(tier_name, error)[0], error), error.message, f"{outcome}, {_HARMLESS}", counts)

    def unread(self, tier_name: str, what: str, error: BaseException, counts: Counter[str]) -> None:
        """Note that bytes were not brought back; whether they are lost is for backward to find out.

        Args:
            tier_name: Of the tier.
            what: ``load`` or ``promotion``.
            error: Why.
            counts: Failures of this step by cause; one is added.
        """
        outcome = "read again if backward needs it; what then cannot be read ends training with a `LoadError`"
        message = error.message if isinstance(error, StorageError) else repr(error)
        self._count(f"{_place(_cause(tier_name, error)[0], error)}, {what}", message, outcome, counts)

    def _count(self, cause: str, problem: str, outcome: str, counts: Counter[str]) -> None:
        counts[cause] += 1
        if cause not in self._known_causes:
            self._known_causes.add(cause)
            self._unsaid.append((logging.WARNING, f"{problem}\n\n{outcome}; said once per cause"))

    def say(self) -> None:
        """Log what the others prepared.

        Threads:
            Any, with no lock held: a log handler may be slow.
        """
        while True:
            try:
                level, text = self._unsaid.popleft()
            except IndexError:  # asked first, another thread could take the last one in between
                return
            logger.log(level, "rank %d: %s", self._rank, text)


def _place(cause: str, error: BaseException) -> str:
    path = getattr(error, "path", None)
    return f"{cause} at {path}" if path else cause


def _cause(tier_name: str, error: BaseException) -> tuple[str, bool]:
    """Name the cause of a failure, and tell whether only a budget is used up."""
    number = error.errno if isinstance(error, StorageError | OSError) else None
    is_budget = isinstance(error, CapacityError) and number is None
    reason = "budget used up" if is_budget else type(error).__name__
    if number == errno.ETIMEDOUT:
        return f"{tier_name}: timeout", is_budget
    return f"{tier_name}: {errno.errorcode.get(number, str(number)) if number else reason}", is_budget
