"""Forward and backward passes in the order of a pipeline schedule that is known ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from ssdtrain_plugin.hooks import SavedTensorHooks

__all__ = ["Pass", "ScheduledPasses"]


class Pass(NamedTuple):
    """One forward or backward of one micro-batch on one rank.

    Attributes:
        slot: How the host names a micro-batch in flight.
        is_backward: Which of the two.
    """

    slot: Hashable
    is_backward: bool


class ScheduledPasses:
    """Runs passes under the hooks, and prefetches for the backward that comes next.

    Without a schedule, or when something else runs than was scheduled, there is no
    look-ahead: a backward is announced when it begins, and the log does the rest.

    Args:
        hooks: Entered around each forward.
    """

    def __init__(self, hooks: SavedTensorHooks) -> None:
        """Start without a schedule."""
        self._hooks = hooks
        self._passes: list[Pass] = []
        self._position = 0
        self._microbatches: dict[Hashable, int] = {}

    def start(self, passes: Iterable[Pass]) -> None:
        """Begin a step.

        Args:
            passes: All of this rank, in order; none if they are not known.
        """
        self._passes = list(passes)
        self._position = 0
        self._microbatches.clear()

    def forget_order(self) -> None:
        """Go on without a schedule."""
        self._passes = []

    @contextlib.contextmanager
    def forward(self, slot: Hashable, *, offers_all: bool = True) -> Iterator[None]:
        """Run a forward inside.

        Args:
            slot: Its micro-batch; the name may have belonged to another one before.
            offers_all: See :meth:`SavedTensorHooks.forward`.
        """
        self._check(Pass(slot, is_backward=False))
        self._microbatches.pop(slot, None)
        self._announce()
        with self._hooks.forward(offers_all=offers_all) as microbatch:
            yield
        if microbatch is not None:
            self._microbatches[slot] = microbatch
        self._expect()

    @contextlib.contextmanager
    def backward(self, slot: Hashable) -> Iterator[None]:
        """Run a backward inside.

        Args:
            slot: Its micro-batch.
        """
        self._check(Pass(slot, is_backward=True))
        with self._hooks.backward(self._microbatches.get(slot)):
            self._announce()
            yield
        self._expect()

    def _check(self, present: Pass) -> None:
        """Give the schedule up if it says something else; tell the trace the name of what runs."""
        if self._hooks.trace is not None:
            self._hooks.trace.name_pass(present.slot)
        if self._passes[self._position : self._position + 1] != [present]:
            self.forget_order()

    def _following(self) -> int | None:
        """Get the micro-batch if the pass after the present one is its backward, and its forward has run."""
        if self._position + 1 < len(self._passes):
            following = self._passes[self._position + 1]
            if following.is_backward:
                return self._microbatches.get(following.slot)
        return None

    def _announce(self) -> None:
        """Prefetch during this pass, as far as it leaves room, for the backward after it."""
        microbatch = self._following()
        if microbatch is not None:
            self._hooks.cache.announce_backward(microbatch)

    def _expect(self) -> None:
        """Prefetch while the pipeline waits for its neighbours, if a backward is next."""
        microbatch = self._following()
        self._position += 1
        if microbatch is not None:
            self._hooks.cache.expect_backward(microbatch)
