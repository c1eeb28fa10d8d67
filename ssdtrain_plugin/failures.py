"""What to do about a store that failed: count it, say it once, leave the tier alone for a while.

Note [A failed store costs memory]. The tensor is still in device memory, so it
stays there and the gradient is not affected. Only bytes really lost stop training.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable

from ssdtrain_plugin.errors import CapacityError, StorageError
from ssdtrain_plugin.policy.base import TierHealth

__all__ = ["FailureLog"]

logger = logging.getLogger(__name__)


class FailureLog:
    """Failed stores of all tiers, by cause.

    Args:
        tier_names: Of the tiers there are.

    Threads:
        Not safe; its owner locks.
    """

    def __init__(self, tier_names: Iterable[str]) -> None:
        """Start with healthy tiers."""
        self._health = {name: TierHealth() for name in tier_names}
        self._known_causes: set[str] = set()
        self._unsaid: deque[str] = deque()
        self._hanging: list[tuple[str, Callable[[], bool]]] = []

    def is_usable(self, tier_name: str, step: int) -> bool:
        """Tell whether a store to the tier may be tried.

        Args:
            tier_name: Of a tier.
            step: Number of the present step.
        """
        if self._hanging:
            self._hanging = [(name, has_returned) for name, has_returned in self._hanging if not has_returned()]
            if any(name == tier_name for name, _ in self._hanging):
                return False
        return self._health[tier_name].is_usable(step)

    def leave_alone(self, tier_name: str, has_returned: Callable[[], bool]) -> None:
        """Let no store be tried on a tier while a transfer hangs there, however long that is.

        Args:
            tier_name: Of the tier.
            has_returned: Whether the transfer has returned.
        """
        self._hanging.append((tier_name, has_returned))

    def succeeded(self, tier_name: str) -> None:
        """Note a store that worked.

        Args:
            tier_name: Of the tier.
        """
        self._health[tier_name].succeeded()

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
        self._count(cause, str(error), "the tensor stays in memory", counts)

    def survived(self, tier_name: str, error: StorageError, counts: Counter[str]) -> None:
        """Note a failure that a tier has made good: another attempt, or another drive, has moved the bytes.

        Args:
            tier_name: Of the tier.
            error: Of the first attempt, or drive.
            counts: Failures of this step by cause; one is added.
        """
        cause, _ = _cause(tier_name, error)
        place = f"{cause} at {error.path}" if error.path else cause
        # Without the hint, which says what to do when the bytes are lost.
        self._count(place, error.message, "another attempt, or another drive, has moved the bytes", counts)

    def _count(self, cause: str, problem: str, outcome: str, counts: Counter[str]) -> None:
        counts[cause] += 1
        if cause not in self._known_causes:
            self._known_causes.add(cause)
            self._unsaid.append(f"{problem}\n\n{outcome}, gradients are not affected; said once per cause")

    def say(self) -> None:
        """Log what :meth:`failed` prepared.

        Threads:
            Any, with no lock held: a log handler may be slow.
        """
        while self._unsaid:
            logger.warning("%s", self._unsaid.popleft())


def _cause(tier_name: str, error: BaseException) -> tuple[str, bool]:
    """Name the cause of a failure, and tell whether only a budget is used up."""
    number = error.errno if isinstance(error, StorageError | OSError) else None
    is_budget = isinstance(error, CapacityError) and number is None
    reason = "budget used up" if is_budget else type(error).__name__
    if number == errno.ETIMEDOUT:
        return f"{tier_name}: timeout", is_budget
    return f"{tier_name}: {errno.errorcode.get(number, str(number)) if number else reason}", is_budget
