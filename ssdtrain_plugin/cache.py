"""TensorCache: the only owner of the state of saved tensors.

``put`` is autograd's pack hook and ``get`` its unpack hook. Both are called by
the threads that compute; transfers end in worker threads. One lock guards all
state; it is never held while waiting or while bytes move. Lock order: cache,
then queue or tier.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from ssdtrain_plugin.errors import QueueClosedError, StorageError
from ssdtrain_plugin.frames import without_frames
from ssdtrain_plugin.identity import ResidentStorages, TensorView, is_parameter, is_plain, version_probe
from ssdtrain_plugin.ledger import Ledger
from ssdtrain_plugin.migration import Migrator
from ssdtrain_plugin.observing import StepObserver
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.records import KeptTensor, Lease, Record, SavedTensor, State, freed_meanwhile
from ssdtrain_plugin.reload import Reloader, lane_of
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import Streams
from ssdtrain_plugin.table import RecordTable
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue, TransferState

__all__ = ["TensorCache"]


class TensorCache:
    """Decides nothing and moves nothing itself: asks the policy, tells the queue.

    Args:
        placer: Asks the policy where each storage goes, and knows the tiers.
        queue: Runs the transfers.
        streams: Of ``device``.
        device: Tensors elsewhere are kept and not counted.
        allocate_target: Gives (n,) uint8 memory on ``device`` for a load.
        prefetch_bytes: Bound on bytes loaded or held for a backward that has not asked yet.
        rank: Global rank of the process.
    """

    def __init__(
        self,
        *,
        placer: Placer,
        queue: TransferQueue,
        streams: Streams,
        device: torch.device,
        allocate_target: Callable[[int], Tensor],
        prefetch_bytes: int,
        rank: int,
    ) -> None:
        """Start empty."""
        self._placer = placer
        self._queue = queue
        self._streams = streams
        self._device = device
        self._rank = rank
        self._lock = threading.Lock()
        self._resident = ResidentStorages()
        self._table = RecordTable()
        self._ledger = Ledger()
        self._reloader = Reloader(
            lock=self._lock,
            queue=queue,
            streams=streams,
            table=self._table,
            ledger=self._ledger,
            failures=placer.failures,
            allocate_target=allocate_target,
            prefetch_bytes=prefetch_bytes,
        )
        self._migrator = (
            None
            if len(placer.tiers) < 2
            else Migrator(
                lock=self._lock,
                queue=queue,
                table=self._table,
                ledger=self._ledger,
                schedule=self._reloader.schedule,
                placer=placer,
                promote_bytes=prefetch_bytes,
            )
        )
        self._reloader.observer = self._migrator
        self._observer = StepObserver(placer.tiers, time.perf_counter, streams.mark, is_on=placer.policy.is_learning)
        self._microbatch = self._backward_microbatch = -1

    def keep_resident(self, tensors: Iterable[Tensor]) -> None:
        """Never move these storages: parameters and buffers of the model.

        Args:
            tensors: Held weakly.
        """
        with self._lock:
            self._resident.add(tensors)

    def begin_forward(self) -> int:
        """Open the log of the next micro-batch; return its number."""
        with self._lock:
            self._microbatch += 1
            self._ledger.begin_forward()
            self._placer.begin_forward()
            self._observer.profiler.begin_forward(self._microbatch)
            return self._microbatch

    def end_forward(self, seconds: float, *, is_whole: bool = True) -> None:
        """Close the log of the present micro-batch.

        Args:
            seconds: How long its forward took.
            is_whole: It did not raise, so its size is that of the next one too.
        """
        with self._lock:
            self._ledger.counter.forward_seconds += seconds
            self._observer.profiler.end_forward()
            if is_whole:
                self._placer.end_forward()

    def expect_backward(self, microbatch: int) -> None:
        """Start to load what backward of a micro-batch will ask for first.

        Args:
            microbatch: As returned by :meth:`begin_forward`.
        """
        with self._lock:
            self._begin_backward(microbatch)

    def announce_backward(self, microbatch: int) -> None:
        """Load ahead for the backward after the present pass, when that needs no more.

        Args:
            microbatch: As returned by :meth:`begin_forward`; its forward has ended.
        """
        with self._lock:
            self._drain()
            self._reloader.announce(microbatch, self._placer.policy.load_bounds())

    def end_backward(self, seconds: float) -> None:
        """Take the host's own time of a backward instead of first to last unpack.

        Args:
            seconds: How long it took.
        """
        with self._lock:
            self._ledger.end_backward(seconds)
            self._observer.profiler.end_backward()

    def is_idle(self) -> bool:
        """Tell whether no graph holds anything any more."""
        with self._lock:
            self._drain()
            return not len(self._table)

    @property
    def num_microbatches(self) -> int:
        """Forwards that ran in this step."""
        return self._ledger.counter.microbatches

    @property
    def live_bytes(self) -> int:
        """Saved bytes in device memory now."""
        with self._lock:
            self._drain()
            self._ledger.account.settle(is_thorough=True)
            return self._ledger.account.live_bytes

    def end_step(self) -> StepStats:
        """Close the account of the step and let the policy learn."""
        self._queue.give_up_overdue()
        with self._lock:
            self._drain()
            for tier in self._placer.tiers.values():  # of loads above all: after a store they were taken then
                self._count_survived(tier)
            self._placer.end_step(self._ledger.counter.failures)
            plan, is_idle = self._placer.policy.explain(), not len(self._table)
            stats = self._ledger.end_step(rank=self._rank, plan=plan, is_idle=is_idle)
            self._reloader.forget_kept()
            self._placer.policy.observe(self._observer.end_step(stats))
        self._placer.failures.say()
        return stats

    def take_remark(self) -> str | None:
        """Take what the policy has to say to the user, once."""
        with self._lock:
            return self._placer.policy.take_remark()

    def put(self, tensor: Tensor, *, is_offered: bool = True) -> SavedTensor | KeptTensor:
        """Take a tensor that autograd saves; autograd's pack hook.

        Args:
            tensor: Any. Not changed, not held: see Note [The graph owns the lifetime].
            is_offered: Whether the policy decides; else it is kept.

        Returns:
            What the graph holds in its place.

        Threads:
            Any that computes. Waits only while the bytes in flight are over budget.
        """
        version = tensor._version
        if is_parameter(tensor):
            # The weight itself, not its bytes of today: ZeRO-3 swaps them.
            return KeptTensor(tensor if isinstance(tensor, Parameter) else tensor.detach(), version)
        if tensor.numel() == 0:
            return KeptTensor(tensor.detach(), version)
        if not is_plain(tensor) or tensor.device != self._device or self._streams.is_capturing():
            with self._lock:
                self._ledger.counter.kept_bytes += tensor.nbytes if tensor.layout is torch.strided else 0
            return KeptTensor(tensor.detach(), version)
        if (storage := tensor.untyped_storage()) in self._resident or self._resident.has_cast(tensor):
            return KeptTensor(tensor.detach(), version)
        with self._lock:
            self._drain()
            lease = self._share(storage, tensor, version)
            is_new = lease is None
            if lease is None:
                lease = self._admit(storage, tensor, version, is_offered)
            record = lease.record
            if record.tier is None and record.storage is None:
                return KeptTensor(tensor.detach(), version, lease, self._microbatch)
            saved = SavedTensor(lease, TensorView.of(tensor), version_probe(tensor), version, self._microbatch)
        if is_new and record.tier is not None:
            self._submit_store(record, storage)
        return saved

    def _share(self, storage: torch.UntypedStorage, tensor: Tensor, version: int) -> Lease | None:
        """Find the same bytes among those that are known."""
        lease = self._table.find(storage, tensor, version)
        if lease is not None:
            self._ledger.counter.deduplicated_bytes += min(tensor.nbytes, lease.record.span.nbytes)
            if lease.record.extent is not None:
                self._reloader.schedule.record(self._microbatch, lease.record.serial, lease.record.span.nbytes)
        return lease

    def _admit(self, storage: torch.UntypedStorage, tensor: Tensor, version: int, is_offered: bool) -> Lease:
        """Make a record for bytes not seen before, and ask the policy where they go."""
        lease = self._table.add(storage, tensor, version)
        record, storage_bytes = lease.record, storage.nbytes()
        span = record.span
        is_movable = is_offered and self._placer.is_movable(storage, span.nbytes)
        self._observer.profiler.saved(record.serial, span.nbytes, is_movable=is_movable)
        record.tier = self._placer.choose(
            span.nbytes, self._ledger.step, is_movable=is_movable, inflight_bytes=self._queue.inflight_bytes
        )
        # Several records of one storage pin it only once.
        record.held_bytes = record.would_be_bytes
        if record.tier is not None:
            record.storage = storage
            record.original = StorageWeakRef(storage)
            record.dead_handles = []
        else:
            self._ledger.counter.kept_bytes += span.nbytes
            self._reloader.keep(record, self._microbatch)
            if self._placer.pins_more_than_it_saves(span.nbytes, storage_bytes):
                record.hold(span.bytes_of(storage).clone().untyped_storage(), span.first_byte, span.nbytes)
                record.is_copy = True
                record.original = StorageWeakRef(storage)
        self._ledger.account.admit(record.would_be_bytes, record.held_bytes, record.address)
        return lease

    def _submit_store(self, record: Record, storage: torch.UntypedStorage) -> None:
        """Send a new record's bytes to its tier; on failure they stay."""
        nbytes = record.span.nbytes
        if (place := self._reserve(record, nbytes)) is None:
            return
        tier, extent = place
        record.data_pointer = storage.data_ptr()
        work = partial(record.write, tier, extent, storage, self._streams.record())
        finish, lane = partial(self._on_stored, record, tier), lane_of(tier, extent)
        transfer = Transfer(Direction.STORE, nbytes, work, finish, lane, tier.path_of(extent), record.serial)
        with self._lock:
            try:
                self._queue.submit(transfer)  # its end waits for the lock
            except QueueClosedError as error:
                tier.free(extent)
                self._store_failed(record, tier, error)
                return
            record.move("store", State.STORING)
            chosen = record.tier
            record.tier, record.extent, record.store = tier, extent, transfer
            self._reloader.offload(record, self._microbatch)
            if self._migrator is not None:
                self._migrator.make_room(record, chosen, self._microbatch)

    def _reserve(self, record: Record, nbytes: int) -> tuple[Tier, Extent] | None:
        """Wait for room in the queue; find room on the chosen tier, or else on another; None if there is none."""
        waited = self._queue.wait_for_room(nbytes)
        failed: list[tuple[Tier, Exception]] = []
        place: tuple[Tier, Extent] | None = None
        with self._lock:
            self._ledger.counter.stall_seconds += waited
            tiers = self._placer.candidates(record.tier, self._ledger.step)
        for tier in tiers:
            try:
                place = tier, tier.allocate(nbytes)
                break
            except (StorageError, OSError) as error:
                failed.append((tier, without_frames(error)))
        with self._lock:
            for tier, cause in failed:
                # A budget that is used up is no failure if the next tier has room.
                if place is None or getattr(cause, "errno", None) is not None:
                    self._count_failure(tier, cause)
            self._ledger.counter.kept_bytes += nbytes if place is None else 0
        self._placer.failures.say()
        return place

    def _on_stored(self, record: Record, tier: Tier, transfer: Transfer) -> None:
        """Take note in a worker that a store ended."""
        with self._lock:
            self._ledger.count_store(tier.name, transfer)
            self._count_survived(tier)
            if transfer.error is None and record.storage is not None and record.has_moved(record.storage):
                # Freed under the store (`resize_(0)`, to recompute it): what was written is not what was saved.
                transfer.error = freed_meanwhile()
            if transfer.is_given_up:
                record.leave_to(transfer)
                self._placer.hangs(tier, record.extent, transfer)
            if transfer.error is not None:
                self._store_failed(record, tier, transfer.error)
            else:
                self._placer.failures.succeeded(tier.name, self._ledger.step)
            if record.state is State.FREED:
                record.end_transfer()
            elif transfer.error is not None or record.is_forwarded:
                self._reloader.stay_resident(record)
            else:
                record.move("finish the store", State.STORED)
                if record.original is not None:
                    self._ledger.account.release(record.original, record.let_go())
        self._placer.failures.say()

    def _store_failed(self, record: Record, tier: Tier, error: BaseException) -> None:
        self._ledger.counter.kept_bytes += record.span.nbytes
        self._count_failure(tier, error)

    def _count_survived(self, tier: Tier) -> None:
        for survived in tier.take_survived():
            self._placer.failures.survived(tier.name, survived, self._ledger.counter.failures)

    def _count_failure(self, tier: Tier, error: BaseException) -> None:
        self._placer.failures.failed(tier.name, error, self._ledger.step, self._ledger.counter.failures)

    def get(self, saved: SavedTensor | KeptTensor) -> Tensor:
        """Give a saved tensor back; autograd's unpack hook.

        Args:
            saved: As returned by :meth:`put`.

        Returns:
            A tensor with the same dtype, shape, strides and bytes.

        Raises:
            SavedTensorMutatedError: It was changed in place since it was saved.
            LoadError: Its bytes are lost.

        Threads:
            Any that computes. Waits for a load if the bytes are not in memory yet.
        """
        with self._lock:
            self._ledger.note_unpack()
            if saved.microbatch not in (self._backward_microbatch, -1):
                # No schedule has announced this backward: what it asks for first is loaded on demand.
                self._begin_backward(saved.microbatch)
                is_late = saved.lease is not None and saved.lease.record.state is State.LOADING
                self._ledger.counter.num_loads_on_demand += is_late
            if saved.lease is not None:
                self._observer.profiler.needed(saved.lease.record.serial, saved.microbatch)
            if isinstance(saved, KeptTensor):
                self._pass_by(saved)
                return saved.get()
            saved.check_version()
        record = saved.lease.record
        waited = 0.0
        while True:
            with self._lock:
                self._drain()
                storage = self._reloader.find(record)
                if storage is not None:
                    self._ledger.counter.stall_seconds += waited
                    self._observer.profiler.stalled(waited)
                    tensor = self._reloader.hand_out(saved, storage)
                    self._reloader.prefetch(saved.microbatch)
                    if self._migrator is not None:
                        self._migrator.promote()
                    return tensor
                try:
                    transfer = self._reloader.demand(record, saved.microbatch)
                except (QueueClosedError, StorageError) as error:  # detached, or no memory to load into
                    raise saved.lost(error) from error
            waited += self._queue.wait(transfer)
            if transfer.error is not None:
                raise saved.lost(transfer.error) from transfer.error

    def _pass_by(self, saved: KeptTensor) -> None:
        """Backward has come to what was kept: loads may run ahead by as much more."""
        if saved.lease is not None and saved.lease.record.is_ahead:
            self._drain()
            self._reloader.arrive(saved.lease.record)
            self._reloader.prefetch(saved.microbatch)

    def _begin_backward(self, microbatch: int) -> None:
        self._drain()
        self._backward_microbatch = microbatch
        self._reloader.begin_backward(microbatch, self._placer.policy.load_bounds())
        if self._migrator is not None:
            self._migrator.begin_backward(microbatch)

    def _drain(self) -> None:
        """Free records whose last handle died, and take off the account what has really gone."""
        while self._table.ended:
            self._free(self._table.pop_ended())
        self._ledger.account.settle()

    def _free(self, record: Record) -> None:
        account, state = self._ledger.account, record.state
        record.move("free", State.FREED)
        account.dismiss(record.would_be_bytes)
        pending = record.store if state is State.STORING else record.load if state is State.LOADING else None
        is_pending = pending is not None and pending.state is not TransferState.DONE and not self._queue.cancel(pending)
        # The last transfer that runs frees the extent when it ends.
        record.num_transfers = is_pending + record.is_moving
        if not record.num_transfers:
            record.free_extent()
        record.storage = None
        self._reloader.arrive(record)
        # What pins the saved storage itself may have an heir: another record of it.
        heir = self._table.find_heir(record) if state is State.RESIDENT and not record.is_copy else None
        if heir is not None:
            heir.held_bytes += record.held_bytes
        elif (state is State.STORING or record.hanging) and record.original is not None:
            account.release(record.original, record.held_bytes)
        else:
            account.drop(record.held_bytes)
        if record.tier is not None:
            self._reloader.schedule.forget(record.serial)
        if state is State.LOADING and not is_pending:
            self._reloader.load_ended(record.tier)
