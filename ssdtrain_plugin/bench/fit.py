"""The largest micro-batch whose measured peak fits a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Fit", "largest_that_fits"]


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found.

    Attributes:
        microbatch: Sequences; 0 if not even one fits.
        peak_bytes: As measured at it; 0 if none fits.
        is_limited: The search ended at its limit, and more might fit.
        num_measured: How many sizes were tried.
    """

    microbatch: int
    peak_bytes: int
    is_limited: bool
    num_measured: int


def largest_that_fits(
    measure: Callable[[int], int], *, budget_bytes: float, limit: int, known: tuple[int, int] | None = None
) -> Fit:
    """Search by halving, and by proportion where that is likely to be nearer.

    A peak grows with the micro-batch, nearly in proportion. So two guesses of three are where
    the line through the last measurement meets the budget; the third halves what is left, so
    that the search ends soon also if the line is a bad guess.

    Args:
        measure: Gives the peak in bytes of a micro-batch of so many sequences, 1 and more.
        budget_bytes: What fits is at most this.
        limit: The largest micro-batch to try, in sequences.
        known: A micro-batch and its peak in bytes, measured already.
    """
    fits, fits_not = (0, 0), limit + 1
    last = known
    if known is not None:
        fits, fits_not = (known, fits_not) if known[1] <= budget_bytes else (fits, min(known[0], fits_not))
    if fits[0] >= limit:
        return Fit(*fits, is_limited=True, num_measured=0)
    num_measured = 0
    while fits_not - fits[0] > 1:
        guess = (fits[0] + fits_not) // 2
        if last is not None and last[1] > 0 and num_measured % 3 < 2:
            guess = int(budget_bytes * last[0] / last[1])
        guess = min(max(guess, fits[0] + 1), fits_not - 1)
        last = (guess, measure(guess))
        num_measured += 1
        if last[1] <= budget_bytes:
            fits = last
        else:
            fits_not = guess
    return Fit(*fits, is_limited=fits[0] == limit, num_measured=num_measured)
