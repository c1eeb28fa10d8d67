"""The cache, its queue and its account, telling a trace what they do. Built in their place when steps are recorded.

They are classes of their own so that nothing is paid, and nothing stands in the way of a
reader, when nothing is recorded.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.account import ActivationAccount
from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.errors import QueueClosedError
from ssdtrain_plugin.events import TransferEvent
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.records import KeptTensor, Record, SavedTensor
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.trace import Trace
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue

__all__ = ["TracedAccount", "TracedCache", "TracedQueue"]


class TracedAccount(ActivationAccount):
    """Tells every change of what is live.

    Args:
        trace: Gets it.
    """

    __slots__ = ("_trace",)

    def __init__(self, trace: Trace) -> None:
        """Start at zero."""
        super().__init__()
        self._trace = trace

    def _tell(self) -> None:
        self._trace.memory(device_bytes=self.live_bytes, would_be_bytes=self.would_be_bytes)

    def dismiss(self, would_be_bytes: int) -> None:
        """See the base class."""
        super().dismiss(would_be_bytes)
        self._tell()

    def hold(self, nbytes: int) -> None:
        """See the base class; what is admitted comes here as well."""
        super().hold(nbytes)
        self._tell()

    def drop(self, nbytes: int) -> None:
        """See the base class."""
        super().drop(nbytes)
        self._tell()

    def release(self, reference: StorageWeakRef, nbytes: int) -> None:
        """See the base class."""
        super().release(reference, nbytes)
        self._tell()

    def settle(self, *, is_thorough: bool = False) -> None:
        """See the base class."""
        super().settle(is_thorough=is_thorough)
        self._tell()

    def forgive(self) -> None:
        """See the base class."""
        super().forgive()
        self._tell()


class TracedQueue(TransferQueue):
    """Tells every transfer that has ended, and every wait.

    Args:
        trace: Gets them; closed with the queue.
        **options: Of the base class.
    """

    def __init__(self, trace: Trace, **options: Any) -> None:
        """Prepare the queues."""
        super().__init__(**options)
        self._trace = trace
        self._queued: dict[Transfer, tuple[float, bool]] = {}

    def submit(self, transfer: Transfer, *, is_urgent: bool = False) -> None:
        """See the base class."""
        if self._trace.is_on:
            self._queued[transfer] = self._trace.clock(), is_urgent
        try:
            super().submit(transfer, is_urgent=is_urgent)
        except QueueClosedError:
            self._queued.pop(transfer, None)
            raise

    def cancel(self, transfer: Transfer) -> bool:
        """See the base class."""
        is_cancelled = super().cancel(transfer)
        if is_cancelled:
            self._tell(transfer, 0.0, "cancelled")
        return is_cancelled

    def wait(self, transfer: Transfer) -> float:
        """See the base class."""
        seconds = super().wait(transfer)
        if self._trace.is_on:
            self._trace.waited(transfer.serial, seconds)
        return seconds

    def wait_for_room(self, nbytes: int) -> float:
        """See the base class."""
        seconds = super().wait_for_room(nbytes)
        if self._trace.is_on:
            self._trace.waited(None, seconds)
        return seconds

    def close(self) -> None:
        """See the base class; then close the trace."""
        super().close()
        self._queued.clear()
        self._trace.close()

    def _finish(self, transfer: Transfer) -> None:
        # Before whoever waits for it goes on, or the event would come after the end of the step.
        outcome: Literal["given up", "failed", "done"] = "done"
        if transfer.error is not None:
            outcome = "given up" if transfer.is_given_up else "failed"
        self._tell(transfer, transfer.seconds, outcome)
        super()._finish(transfer)

    def _tell(
        self, transfer: Transfer, seconds: float, outcome: Literal["done", "failed", "given up", "cancelled"]
    ) -> None:
        noted, trace = self._queued.pop(transfer, None), self._trace
        if noted is None or not trace.is_on:
            return
        queued, is_urgent = noted
        is_store, end = transfer.direction is Direction.STORE, trace.clock()
        direction: Literal["store", "load", "spill", "promote"] = "store" if is_store else "load"
        tier, drive, nbytes = "ssd", 0, transfer.nbytes
        if isinstance(transfer.lane, tuple):
            tier, drive = transfer.lane
        elif transfer.event is None and transfer.error is None:
            return  # a move between tiers that came to nothing
        else:  # it has a lane of its own and no size, see `Migrator`
            direction, nbytes = "spill" if is_store else "promote", trace.size_of(transfer.serial)
        trace.add(
            TransferEvent(
                step=trace.step,
                direction=direction,
                tier=tier,
                drive=drive,
                path=transfer.path,
                serial=transfer.serial,
                nbytes=nbytes,
                queued=queued,
                begin=max(queued, end - seconds),
                end=end,
                is_on_demand=is_urgent,
                outcome=outcome,
            )
        )


class TracedCache(TensorCache):
    """Tells passes, saves and steps.

    Args:
        trace: Gets them.
        placer: Of the base class.
        **parts: Of the base class.
    """

    def __init__(self, trace: Trace, *, placer: Placer, **parts: Any) -> None:
        """Start empty."""
        super().__init__(placer=placer, **parts)
        self._trace = trace
        self._host, self._drive = map(placer.tiers.get, (Placement.HOST, Placement.SSD))
        self._ledger.account = TracedAccount(trace)

    def begin_forward(self) -> int:
        """See the base class."""
        with self._lock:
            self._trace.fold_unpacks()
        return super().begin_forward()

    def end_forward(self, seconds: float, *, is_whole: bool = True) -> None:
        """See the base class."""
        self._trace.passed("forward", self._microbatch, seconds)
        super().end_forward(seconds, is_whole=is_whole)

    def end_backward(self, seconds: float) -> None:
        """See the base class."""
        self._trace.passed("backward", self._backward_microbatch, seconds)
        super().end_backward(seconds)

    def end_step(self) -> StepStats:
        """See the base class."""
        stats = super().end_step()
        self._trace.end_step(stats.step, stats.plan)  # writes to a file, so not under the lock
        return stats

    def put(self, tensor: Tensor, *, is_offered: bool = True) -> SavedTensor | KeptTensor:
        """See the base class."""
        saved = super().put(tensor, is_offered=is_offered)
        if self._trace.is_on and saved.lease is not None:
            record = saved.lease.record
            self._trace.saved(record.serial, record.span.nbytes, saved.microbatch)
        return saved

    def get(self, saved: SavedTensor | KeptTensor) -> Tensor:
        """See the base class."""
        if not self._trace.is_on or saved.microbatch < 0:
            return super().get(saved)
        begin = self._trace.clock()
        tensor = super().get(saved)
        with self._lock:
            self._trace.unpacked(saved.microbatch, begin)
        return tensor

    def _reserve(self, record: Record, nbytes: int) -> tuple[Tier, Extent] | None:
        place = super()._reserve(record, nbytes)
        self._tell_tiers()
        return place

    def _on_stored(self, record: Record, tier: Tier, transfer: Transfer) -> None:
        super()._on_stored(record, tier, transfer)
        self._tell_tiers()

    def _free(self, record: Record) -> None:
        super()._free(record)
        self._tell_tiers()

    def _tell_tiers(self) -> None:
        if self._trace.is_on:
            self._trace.memory(
                host_bytes=0 if self._host is None else self._host.used_bytes,
                drive_bytes=0 if self._drive is None else self._drive.used_bytes,
            )
