"""The way back: find the bytes in memory, load them, and load ahead of backward.

Part of :class:`ssdtrain_plugin.cache.TensorCache`, which calls it under its lock.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.errors import CapacityError, QueueClosedError, StateError
from ssdtrain_plugin.failures import FailureLog
from ssdtrain_plugin.ledger import Ledger
from ssdtrain_plugin.policy.base import LoadBounds
from ssdtrain_plugin.records import Record, SavedTensor, State
from ssdtrain_plugin.schedule import ReloadSchedule
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import Streams
from ssdtrain_plugin.table import RecordTable
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue

__all__ = ["LoadObserver", "Reloader", "lane_of"]

_UNBOUNDED = 1 << 62


def lane_of(tier: Tier, extent: Extent) -> tuple[str, int]:
    """Name the lane of the transfer queue for the drive, or the memory, that has an extent.

    Args:
        tier: Of the extent.
        extent: Live.
    """
    return tier.name, extent.drive


def _subtract(counter: Counter[int], microbatch: int, amount: int) -> None:
    """Take off what one micro-batch has, and forget micro-batches that have nothing."""
    counter[microbatch] -= amount
    if not counter[microbatch]:
        del counter[microbatch]


class LoadObserver(Protocol):
    """Is told of the loads under way; called under the lock of the cache, also in workers."""

    def load_begins(self, tier: Tier) -> None:
        """Note that a load was queued.

        Args:
            tier: That has the bytes.
        """

    def load_ended(self, tier: Tier) -> None:
        """Note that a load is done, failed or cancelled.

        Args:
            tier: As given to :meth:`load_begins`.
        """


class Reloader:
    """Brings stored bytes back.

    Args:
        lock: Of the cache; taken by the workers' call-back alone, held by all other callers.
        queue: Runs the loads.
        streams: Of the training device.
        table: Of the cache.
        ledger: Of the cache.
        failures: Of the tiers.
        allocate_target: Gives (n,) uint8 memory on the training device for a load.
        prefetch_bytes: Bound on bytes loaded or held for a backward that has not asked yet.

    Attributes:
        schedule: What was offloaded, in forward order.
        observer: Of the loads, or None.
    """

    def __init__(
        self,
        *,
        lock: contextlib.AbstractContextManager[object],
        queue: TransferQueue,
        streams: Streams,
        table: RecordTable,
        ledger: Ledger,
        failures: FailureLog,
        allocate_target: Callable[[int], Tensor],
        prefetch_bytes: int,
    ) -> None:
        """Start with nothing to bring back."""
        self.schedule = ReloadSchedule()
        self.observer: LoadObserver | None = None
        self._lock = lock
        self._failures = failures
        self._queue = queue
        self._streams = streams
        self._table = table
        self._ledger = ledger
        self._allocate_target = allocate_target
        self._prefetch_bytes = prefetch_bytes
        self._bounds = LoadBounds(prefetch_bytes, prefetch_bytes + _UNBOUNDED)
        self._ahead_bytes = 0
        self._num_ahead: Counter[int] = Counter()
        self._kept_bytes: Counter[int] = Counter()
        self._kept: dict[int, list[Record]] = {}
        self._present: int | None = None
        self._announced: int | None = None

    def find(self, record: Record) -> torch.UntypedStorage | None:
        """Find the bytes in memory; forward them if they were on their way out.

        Args:
            record: Offloaded, or kept as a copy of a span.

        Returns:
            A storage that begins at ``record.first_byte`` of the saved one, or None.
        """
        state = record.state
        if state is State.STORING:
            self._forward(record)
            return record.storage
        if state is State.STORED:
            # Something else may still hold the storage: the running operator, the
            # pipeline's buffers, the user. Then no read is needed.
            storage = record.find_original()
            if storage is not None:
                self._count_forwarded(record)
                record.first_byte = 0
                return storage
            record.first_byte = record.span.first_byte
            return record.find_loaded()
        return None if state is State.LOADING else record.storage

    def hand_out(self, saved: SavedTensor, storage: torch.UntypedStorage) -> Tensor:
        """Build the tensor, and let go of loaded bytes once all handles have had them.

        Args:
            saved: The handle that is unpacked.
            storage: From :meth:`find`.
        """
        record = saved.lease.record
        if record.load is not None and record.load.event is not None:
            record.load.event.wait()
        tensor = saved.rebuild(storage, record.first_byte)
        self.arrive(record)
        if record.all_unpacked(saved) and record.state is State.LOADED:
            record.move("let go of loaded bytes", State.STORED)
            record.loaded = StorageWeakRef(storage)
            self._ledger.account.release(record.loaded, record.let_go())
        return tensor

    def demand(self, record: Record, microbatch: int) -> Transfer:
        """Get the load to wait for; start it, before all others, if there is none.

        Args:
            record: Not in memory.
            microbatch: Whose backward asks.

        Raises:
            QueueClosedError: The offloader was detached.
        """
        if record.state is State.LOADING and record.load is not None:
            return record.load
        self._queue.check_open()
        self._ledger.counter.num_loads_on_demand += 1
        self.schedule.demand(microbatch, record.serial)
        return self._start_load(record, is_urgent=True)

    def prefetch(self, microbatch: int) -> None:
        """Bring back what backward asks for next, within the budget; then what is announced after it.

        Args:
            microbatch: Whose backward is next or running.
        """
        self._prefetch(microbatch, self._kept_bytes[microbatch], self._num_ahead[microbatch])
        # What is asked for first is loaded first: the one after it gets what this one leaves.
        if self._announced not in (None, microbatch) and self.schedule.is_read(microbatch):
            self._prefetch(self._announced, self._kept_bytes.total(), self._ahead_bytes)

    def _prefetch(self, microbatch: int, kept_bytes: int, is_ahead: int) -> None:
        if self._queue.is_closed():
            return
        room_bytes = min(
            self._bounds.prefetch_bytes - self._ahead_bytes,
            self._bounds.window_bytes - self._ahead_bytes - kept_bytes,
        )
        for serial in self.schedule.upcoming(microbatch, room_bytes, at_least_one=not is_ahead):
            record = self._table[serial]
            if record.lives() is None:
                continue
            if not record.is_ahead:
                record.is_ahead, record.ahead_of = True, microbatch
                self._num_ahead[microbatch] += 1
                self._ahead_bytes += record.span.nbytes
            if record.state is State.STORING:
                self._forward(record)
            elif record.state is State.STORED:
                # No memory for a load ahead of time is no error: it is tried again on demand.
                # A closed queue or arena is reported where bytes are really missing.
                try:
                    self._bring_ahead(record)
                except (torch.OutOfMemoryError, CapacityError, MemoryError, OSError):
                    continue
                except (QueueClosedError, StateError):
                    if not self._queue.is_closed():
                        raise
                    return

    def keep(self, record: Record, microbatch: int) -> None:
        """Note a record that stays in device memory by decision.

        Args:
            record: Just made.
            microbatch: Whose forward saved it.
        """
        self._kept.setdefault(microbatch, []).append(record)

    def offload(self, record: Record, microbatch: int) -> None:
        """Note a record that goes to a tier.

        Args:
            record: Just made.
            microbatch: Whose forward saved it.
        """
        # Backward comes to what was kept before this only after it: that is no reason to load later.
        self._kept.pop(microbatch, None)
        self.schedule.record(microbatch, record.serial, record.span.nbytes)

    def begin_backward(self, microbatch: int, bounds: LoadBounds | None) -> None:
        """Count what a micro-batch has kept as ahead of its backward, and bring back what it asks for first.

        Args:
            microbatch: Whose backward is next.
            bounds: Of the policy, or None for the option.
        """
        self._present = microbatch
        if microbatch == self._announced:
            self._announced = None
        self._count_kept(microbatch, bounds)
        self.prefetch(microbatch)

    def announce(self, microbatch: int, bounds: LoadBounds | None) -> None:
        """Load for a backward as well, once the present one needs no more.

        Args:
            microbatch: Whose backward comes after the present pass.
            bounds: Of the policy, or None for the option.
        """
        self._announced = microbatch
        self._count_kept(microbatch, bounds)
        self.prefetch(microbatch if self._present is None else self._present)

    def _count_kept(self, microbatch: int, bounds: LoadBounds | None) -> None:
        self._bounds = bounds or LoadBounds(self._prefetch_bytes, self._prefetch_bytes + _UNBOUNDED)
        for record in self._kept.pop(microbatch, ()):
            if record.state is State.RESIDENT and record.lives() is not None:
                record.is_ahead, record.ahead_of = True, microbatch
                self._kept_bytes[microbatch] += record.span.nbytes

    def forget_kept(self) -> None:
        """Forget what was kept for backwards that never came."""
        self._kept.clear()
        self._present = self._announced = None

    def arrive(self, record: Record) -> None:
        """Stop counting a record as ahead of backward.

        Args:
            record: Unpacked, or freed.
        """
        if not record.is_ahead:
            return
        record.is_ahead = False
        if record.tier is None:
            _subtract(self._kept_bytes, record.ahead_of, record.span.nbytes)
        else:
            self._ahead_bytes -= record.span.nbytes
            _subtract(self._num_ahead, record.ahead_of, 1)

    def stay_resident(self, record: Record) -> None:
        """Give up the place on the tier: the bytes are in memory and stay there.

        Args:
            record: Storing.
        """
        record.move("keep in memory", State.RESIDENT)
        record.store = None
        record.free_extent()
        self.schedule.forget(record.serial)

    def _forward(self, record: Record) -> None:
        """Keep bytes whose store has not ended: cancel it, or let it run for nothing."""
        self._count_forwarded(record)
        if record.store is not None and self._queue.cancel(record.store):
            self.stay_resident(record)

    def _count_forwarded(self, record: Record) -> None:
        if not record.is_forwarded:
            record.is_forwarded = True
            self._ledger.counter.forwarded_bytes += record.span.nbytes

    def _bring_ahead(self, record: Record) -> None:
        storage, first_byte = record.find_original(), 0
        if storage is None:
            if not record.is_original_gone():
                return
            storage, first_byte = record.find_loaded(), record.span.first_byte
        if storage is None:
            self._start_load(record, is_urgent=False)
            return
        # Still held by something else: hold it too, so that it cannot go before backward asks.
        self._count_forwarded(record)
        record.move("hold again", State.LOADING)
        record.move("hold again", State.LOADED)
        # It still counts as live since it was let go, so it is not counted again.
        record.hold(storage, first_byte, 0)

    def _start_load(self, record: Record, *, is_urgent: bool) -> Transfer:
        tier, extent = record.place()
        target = self._allocate_target(extent.nbytes)
        record.move("load", State.LOADING)
        record.hold(target.untyped_storage(), record.span.first_byte, extent.nbytes)
        self._ledger.account.hold(extent.nbytes)
        work = partial(tier.read, extent, target, self._streams.record())
        finish = partial(self._on_loaded, record)
        lane, path = lane_of(tier, extent), tier.path_of(extent)
        transfer = Transfer(Direction.LOAD, extent.nbytes, work, finish, lane, path, record.serial)
        record.load = transfer
        try:
            self._queue.submit(transfer, is_urgent=is_urgent)
        except QueueClosedError:
            self._give_up_load(record)
            raise
        if self.observer is not None:
            self.observer.load_begins(tier)
        return transfer

    def _on_loaded(self, record: Record, transfer: Transfer) -> None:
        """Take note in a worker that a load ended."""
        with self._lock:
            self._ledger.count_load(transfer)
            tier = record.tier  # the same as at its beginning: only what is STORED moves
            if transfer.is_given_up and tier is not None and record.extent is not None:
                record.leave_to(transfer)
                tier.hangs(record.extent)
            if record.state is State.FREED:
                record.end_transfer()
            elif transfer.error is None:
                record.move("finish the load", State.LOADED)
            else:
                self._give_up_load(record)
            if transfer.error is not None and tier is not None:
                self._failures.unread(tier.name, "load", transfer.error, self._ledger.counter.failures)
            self.load_ended(tier)
        self._failures.say()

    def load_ended(self, tier: Tier | None) -> None:
        """Tell the observer that a load is done, failed or cancelled.

        Args:
            tier: Of the record.
        """
        if self.observer is not None and tier is not None:
            self.observer.load_ended(tier)

    def _give_up_load(self, record: Record) -> None:
        """Go back to stored; whoever waits raises the error of the transfer."""
        record.move("give up the load", State.STORED)
        self._ledger.account.drop(record.let_go())
