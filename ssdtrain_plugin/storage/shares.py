"""Which share of the bytes each of several drives should have, by speeds known or assumed. Numbers only."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from ssdtrain_plugin.storage.meter import Meter

__all__ = ["assumed_rates", "owed_rates"]

_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ASSUMED_BYTES_PER_SECOND = 1e9  # while nothing is known all drives have it, so any number does


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


def assumed_rates(meters: Sequence[Meter]) -> list[float]:
    """Get speeds; for a drive that is not measured the best of the others, or less if it is seen to be slower.

    Args:
        meters: Of each drive, in one direction.

    Returns:
        Bytes per second of each, more than 0.
    """
    rates = [meter.bytes_per_second for meter in meters]
    best = max((rate for rate in rates if rate is not None), default=_ASSUMED_BYTES_PER_SECOND)
    return [
        min(best, meter.limit_bytes_per_second) if rate is None else rate
        for meter, rate in zip(meters, rates, strict=True)
    ]
