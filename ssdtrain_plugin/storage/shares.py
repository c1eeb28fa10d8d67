"""Which share of the bytes each of several drives should have. Numbers only."""

from __future__ import annotations

import operator
from collections.abc import Sequence

__all__ = ["owed_rates"]

_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def owed_rates(writes: Sequence[float], reads: Sequence[float]) -> list[float]:
    """Find the shares with which storing and loading, each as long as its slowest drive, take the least time.

    Shares by read rates make loading shortest, shares by write rates storing; between
    the two lies what is best for both.

    Args:
        writes: Bytes per second of each drive, more than 0.
        reads: Bytes per second of each drive, more than 0.

    Returns:
        Rates in proportion to the shares; they add up to those of ``reads``.
    """
    best_seconds, best_shares = float("inf"), list(reads)
    for weight in _WEIGHTS:
        mixed = [write**weight * read ** (1 - weight) for write, read in zip(writes, reads, strict=True)]
        shares = [each / sum(mixed) for each in mixed]
        seconds = sum(max(map(operator.truediv, shares, rates)) for rates in (writes, reads))
        if seconds < best_seconds * (1 - 1e-9):
            best_seconds, best_shares = seconds, shares
    return [share * sum(reads) for share in best_shares]
