"""The books of the present step: its counters, its memory account, its times."""

from __future__ import annotations

import time

from ssdtrain_plugin.account import ActivationAccount
from ssdtrain_plugin.stats import StepCounter, StepStats
from ssdtrain_plugin.transfer import Transfer

__all__ = ["Ledger"]


class Ledger:
    """What happened since the last :meth:`end_step`.

    Threads:
        Not safe; its owner locks.

    Attributes:
        step: Number of the present step, from 0.
        counter: Its running numbers.
        account: Bytes of activations, live and as they would be.
    """

    def __init__(self) -> None:
        """Start with step 0."""
        self.step = 0
        self.counter = StepCounter()
        self.account = ActivationAccount()
        self._unpacks: tuple[float, float] | None = None

    def begin_forward(self) -> None:
        """Count a micro-batch."""
        self._fold_unpacks()
        self.counter.microbatches += 1

    def note_unpack(self) -> None:
        """Note the time of an unpack; the first and the last one bound a backward."""
        now = time.perf_counter()
        unpacks = self._unpacks
        self._unpacks = (now if unpacks is None else unpacks[0], now)

    def end_backward(self, seconds: float) -> None:
        """Take the host's own time of a backward instead of first to last unpack.

        Args:
            seconds: How long it took.
        """
        self._unpacks = None
        self.counter.backward_seconds += seconds

    def count_store(self, tier_name: str, transfer: Transfer) -> None:
        """Count a store that ended.

        Args:
            tier_name: ``host`` or the name of a drive's tier.
            transfer: Done.
        """
        self.counter.store_seconds += transfer.seconds
        if transfer.error is None and tier_name == "host":
            self.counter.host_bytes += transfer.nbytes
        elif transfer.error is None:
            self.counter.stored_bytes += transfer.nbytes

    def count_spill(self, transfer: Transfer, nbytes: int) -> None:
        """Count bytes that were copied from the host tier to the drive.

        They wear the drive as stores do, also if the copy was not needed in the end.

        Args:
            transfer: Done; its own size is 0, since it holds no device memory.
            nbytes: Bytes written.
        """
        self.counter.store_seconds += transfer.seconds
        self.counter.stored_bytes += nbytes

    def count_load(self, transfer: Transfer) -> None:
        """Count a load that ended.

        Args:
            transfer: Done.
        """
        self.counter.load_seconds += transfer.seconds
        if transfer.error is None:
            self.counter.loaded_bytes += transfer.nbytes

    def _fold_unpacks(self) -> None:
        if self._unpacks is not None:
            self.end_backward(self._unpacks[1] - self._unpacks[0])

    def end_step(self, *, rank: int, plan: str, is_idle: bool) -> StepStats:
        """Close the step and open the next.

        Args:
            rank: Global rank of the process.
            plan: The policy's one line.
            is_idle: No graph holds anything, so nothing is an activation any more.
        """
        self._fold_unpacks()
        if is_idle:
            self.account.forgive()
        self.account.settle(is_thorough=True)
        self.counter.peak_activation_bytes = self.account.peak_live_bytes
        self.counter.saved_bytes = self.account.peak_would_be_bytes
        stats = self.counter.freeze(step=self.step, rank=rank, plan=plan)
        self.counter = StepCounter()
        self.account.start_step()
        self.step += 1
        return stats
