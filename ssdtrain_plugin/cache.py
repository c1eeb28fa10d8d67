"""TensorCache: the only owner of the state of saved tensors.

``put`` is autograd's pack hook and ``get`` its unpack hook. Both are called by
the threads that compute; transfers end in worker threads. One lock guards all
state; it is never held while waiting or while bytes move. Lock order: cache,
then queue or tier.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from ssdtrain_plugin.account import ActivationAccount
from ssdtrain_plugin.errors import CapacityError, LoadError, StorageError
from ssdtrain_plugin.identity import (
    Span,
    StorageKey,
    StorageRegistry,
    TensorView,
    is_parameter,
    is_plain,
    revive,
    span_of,
    version_probe,
)
from ssdtrain_plugin.policy.base import OffloadPolicy, PackRequest, Placement, TierHealth
from ssdtrain_plugin.records import KeptTensor, Lease, Record, SavedTensor, State
from ssdtrain_plugin.schedule import ReloadSchedule
from ssdtrain_plugin.stats import StepCounter, StepStats
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import Streams
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue

__all__ = ["TensorCache"]

logger = logging.getLogger(__name__)

# torch aligns its own allocations to this. Foreign memory (numpy, files) may not
# be, and a kernel's last bit may depend on it: such storages are kept.
_TORCH_ALIGNMENT_BYTES = 64


class TensorCache:
    """Decides nothing and moves nothing itself: asks the policy, tells the queue.

    Args:
        policy: Says where each storage goes.
        queue: Runs the transfers.
        streams: Of ``device``.
        device: Tensors elsewhere are kept and not counted.
        tiers: At most one per placement.
        allocate_target: Gives (n,) uint8 memory on ``device`` for a load.
        min_tensor_bytes: Smaller storages are kept.
        prefetch_bytes: Bound on bytes loaded or held for a backward that has not asked yet.
    """

    def __init__(
        self,
        *,
        policy: OffloadPolicy,
        queue: TransferQueue,
        streams: Streams,
        device: torch.device,
        tiers: Mapping[Placement, Tier],
        allocate_target: Callable[[int], Tensor],
        min_tensor_bytes: int,
        prefetch_bytes: int,
    ) -> None:
        """Start empty."""
        self._policy = policy
        self._queue = queue
        self._streams = streams
        self._device = device
        self._tiers = dict(tiers)
        self._health = {tier.name: TierHealth() for tier in self._tiers.values()}
        self._allocate_target = allocate_target
        self._min_tensor_bytes = min_tensor_bytes
        self._prefetch_bytes = prefetch_bytes
        self._lock = threading.Lock()
        self._registry = StorageRegistry()
        self._schedule = ReloadSchedule()
        self._account = ActivationAccount()
        self._serials = itertools.count()
        self._records: dict[int, Record] = {}
        self._records_of: dict[StorageKey, list[Record]] = {}
        self._ended: deque[Record] = deque()
        self._ahead_bytes = 0
        self._step = 0
        self._microbatch = -1
        self._backward_microbatch = -1
        self._seen_bytes = 0
        self._microbatch_bytes: int | None = None
        self._counter = StepCounter()
        self._warned: set[str] = set()
        self._backward_span: tuple[float, float] | None = None

    # ------------------------------------------------------------------ what hosts call

    def keep_resident(self, tensors: Iterable[Tensor]) -> None:
        """Never move these storages: parameters and buffers of the model.

        Args:
            tensors: Held weakly.
        """
        with self._lock:
            self._registry.keep_resident(tensors)

    def begin_forward(self) -> int:
        """Open the log of the next micro-batch.

        Returns:
            Its number, for :meth:`expect_backward`.
        """
        with self._lock:
            self._fold_backward_time()
            self._microbatch += 1
            self._seen_bytes = 0
            self._counter.microbatches += 1
            return self._microbatch

    def end_forward(self, seconds: float) -> None:
        """Close the log of the present micro-batch.

        Args:
            seconds: How long its forward took.
        """
        with self._lock:
            self._counter.forward_seconds += seconds
            self._microbatch_bytes = self._seen_bytes

    def expect_backward(self, microbatch: int) -> None:
        """Start to load what backward of a micro-batch will ask for first.

        Args:
            microbatch: As returned by :meth:`begin_forward`.
        """
        with self._lock:
            self._drain()
            self._backward_microbatch = microbatch
            self._prefetch(microbatch)

    def end_backward(self, seconds: float) -> None:
        """Take the host's own time of a backward instead of first to last unpack.

        Args:
            seconds: How long it took.
        """
        with self._lock:
            self._backward_span = None
            self._counter.backward_seconds += seconds

    def is_idle(self) -> bool:
        """Tell whether no graph holds anything any more."""
        with self._lock:
            self._drain()
            return not self._records

    def has_counted(self) -> bool:
        """Tell whether a forward ran since the last :meth:`end_step`."""
        return self._counter.microbatches > 0

    @property
    def live_bytes(self) -> int:
        """Saved bytes in device memory now."""
        with self._lock:
            self._drain()
            self._account.settle(is_thorough=True)
            return self._account.live_bytes

    def end_step(self, rank: int) -> StepStats:
        """Close the account of the step and let the policy learn.

        Args:
            rank: Global rank of the process.
        """
        with self._lock:
            self._drain()
            self._fold_backward_time()
            if not self._records:
                self._account.forgive()
            self._account.settle(is_thorough=True)
            self._counter.peak_activation_bytes = self._account.peak_live_bytes
            self._counter.saved_bytes = self._account.peak_would_be_bytes
            stats = self._counter.freeze(step=self._step, rank=rank, plan=self._policy.explain())
            self._policy.observe(stats)
            self._counter = StepCounter()
            self._account.start_step()
            self._step += 1
        return stats

    # ------------------------------------------------------------------ pack

    def put(self, tensor: Tensor) -> SavedTensor | KeptTensor:
        """Take a tensor that autograd saves; autograd's pack hook.

        Args:
            tensor: Any. Not changed, and not held itself: see Note [The graph owns
                the lifetime].

        Returns:
            What the graph holds in its place.

        Threads:
            Any that computes. Waits only while the bytes in flight are over budget.
        """
        version = tensor._version
        if is_parameter(tensor):
            # The weight itself, not its bytes of today: ZeRO-3 swaps them.
            return KeptTensor(tensor if isinstance(tensor, Parameter) else tensor.detach(), version)
        if not is_plain(tensor) or tensor.device != self._device or tensor.numel() == 0:
            return KeptTensor(tensor.detach(), version)
        storage = tensor.untyped_storage()
        if self._registry.is_resident(storage):
            return KeptTensor(tensor.detach(), version)
        view = TensorView.of(tensor)
        with self._lock:
            self._drain()
            lease = self._share(storage, tensor, version)
            is_new = lease is None
            if lease is None:
                lease = self._admit(storage, tensor, version)
            record = lease.record
            is_kept = record.tier is None and record.storage is None
            probe = tensor.detach() if is_kept else record.probe if is_new else version_probe(tensor)
            saved = SavedTensor(lease, view, probe, version, self._microbatch, is_kept)
            record.num_handles += 1
        if is_new and record.tier is not None:
            self._submit_store(record, record.tier, storage)
        return saved

    def _share(self, storage: torch.UntypedStorage, tensor: Tensor, version: int) -> Lease | None:
        """Find a live record that holds the same bytes at the same version."""
        key = self._registry.find(storage)
        if key is None:
            return None
        for record in self._records_of[key]:
            lease = record.lives()
            # The second comparison sees a change made through another alias since.
            if lease is None or record.version != version or record.probe._version != version:
                continue
            is_whole = record.span.nbytes == storage.nbytes()
            if not is_whole and not record.span.covers(span_of(tensor, storage.nbytes())):
                continue
            self._counter.deduplicated_bytes += tensor.nbytes
            if record.extent is not None:
                self._schedule.record(self._microbatch, record.serial, record.span.nbytes)
            return lease
        return None

    def _admit(self, storage: torch.UntypedStorage, tensor: Tensor, version: int) -> Lease:
        """Make a record for bytes not seen before, and ask the policy where they go."""
        key = self._registry.find(storage)
        if key is None:
            key, original = self._registry.add(storage)
        else:
            original = self._registry.reference(storage)
        storage_bytes = storage.nbytes()
        span = span_of(tensor, storage_bytes)
        record = Record(next(self._serials), key, span, version_probe(tensor), version, original)
        lease = Lease(record, self._ended)
        record.lease = weakref.ref(lease)
        self._records[record.serial] = record
        self._records_of.setdefault(key, []).append(record)
        record.tier = self._choose_tier(span, storage)
        record.held_bytes = storage_bytes
        # Saved at two versions or in two spans, a storage is still there only once.
        record.would_be_bytes = storage_bytes if len(self._records_of[key]) == 1 else 0
        if record.tier is not None:
            record.storage = storage
        elif span.nbytes < min(storage_bytes, self._min_tensor_bytes) and storage_bytes >= self._min_tensor_bytes:
            # Keeping the view would keep the whole storage: keep a copy of its span.
            record.storage = span.bytes_of(storage).clone().untyped_storage()
            record.first_byte = span.first_byte
            record.held_bytes = span.nbytes
        self._account.admit(record.would_be_bytes, record.held_bytes)
        return lease

    def _choose_tier(self, span: Span, storage: torch.UntypedStorage) -> Tier | None:
        seen_bytes = self._seen_bytes
        self._seen_bytes += span.nbytes
        placement = Placement.KEEP
        if span.nbytes >= self._min_tensor_bytes and storage.data_ptr() % _TORCH_ALIGNMENT_BYTES == 0:
            host, ssd = self._usable(Placement.HOST), self._usable(Placement.SSD)
            placement = self._policy.decide(
                PackRequest(
                    nbytes=span.nbytes,
                    seen_bytes=seen_bytes,
                    microbatch_bytes=self._microbatch_bytes,
                    host_free_bytes=0 if host is None else host.free_bytes,
                    has_ssd=ssd is not None,
                )
            )
        if placement is Placement.KEEP:
            self._counter.kept_bytes += span.nbytes
            return None
        return self._tiers[placement]

    def _usable(self, placement: Placement) -> Tier | None:
        tier = self._tiers.get(placement)
        return tier if tier is not None and self._health[tier.name].is_usable(self._step) else None

    def _submit_store(self, record: Record, tier: Tier, storage: torch.UntypedStorage) -> None:
        """Send a new record's bytes to its tier; on failure they stay."""
        nbytes = record.span.nbytes
        waited = self._queue.wait_for_room(nbytes)
        try:
            extent = tier.allocate(nbytes)
        except CapacityError as error:
            with self._lock:
                self._counter.stall_seconds += waited
                warning = self._store_failed(record, tier, error)
            self._warn(warning)
            return
        source = record.span.bytes_of(storage)
        work = partial(tier.write, extent, source, self._streams.record())
        transfer = Transfer(Direction.STORE, nbytes, work, partial(self._on_stored, record, tier, extent))
        with self._lock:
            self._counter.stall_seconds += waited
            record.move("store", State.STORING)
            record.extent = extent
            record.store = transfer
            self._schedule.record(self._microbatch, record.serial, nbytes)
            self._queue.submit(transfer)

    def _on_stored(self, record: Record, tier: Tier, extent: Extent, transfer: Transfer) -> None:
        """Take note in a worker that a store ended."""
        warning = None
        with self._lock:
            self._counter.store_seconds += transfer.seconds
            if transfer.error is not None:
                warning = self._store_failed(record, tier, transfer.error)
            else:
                self._health[tier.name].succeeded()
                if tier.name == "host":
                    self._counter.host_bytes += transfer.nbytes
                else:
                    self._counter.stored_bytes += transfer.nbytes
            if record.state is State.FREED:
                tier.free(extent)
            elif transfer.error is not None or record.is_forwarded:
                self._stay_resident(record)
            else:
                record.move("finish the store", State.STORED)
                record.storage = None
                self._account.release(record.original, record.held_bytes)
                record.held_bytes = 0
        self._warn(warning)

    def _stay_resident(self, record: Record) -> None:
        """Give up the place on the tier: the bytes are in memory and stay there."""
        record.move("keep in memory", State.RESIDENT)
        record.store = None
        if record.tier is not None and record.extent is not None:
            record.tier.free(record.extent)
        record.extent = None
        self._schedule.forget(record.serial)

    def _store_failed(self, record: Record, tier: Tier, error: BaseException) -> str | None:
        """Count a failed store; return a warning the first time a cause is seen."""
        number = error.errno if isinstance(error, StorageError | OSError) else None
        cause = f"{tier.name}: {errno.errorcode.get(number, str(number)) if number else _name_of(error)}"
        self._counter.failures[cause] += 1
        self._counter.kept_bytes += record.span.nbytes
        if not isinstance(error, CapacityError) or number is not None:
            # A budget that is used up frees itself; a drive that fails is left alone for a while.
            self._health[tier.name].failed(self._step)
        if cause in self._warned:
            return None
        self._warned.add(cause)
        return f"{error}\n\nThe tensor stays in device memory and gradients are not affected; said once per cause."

    def _warn(self, message: str | None) -> None:
        if message is not None:
            logger.warning("%s", message)

    # ------------------------------------------------------------------ unpack

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
        if isinstance(saved, KeptTensor):
            return saved.get()
        saved.check_version()
        now = time.perf_counter()
        span = self._backward_span
        self._backward_span = (now if span is None else span[0], now)
        if saved.microbatch != self._backward_microbatch:
            # The first unpack of a backward that no schedule announced.
            self.expect_backward(saved.microbatch)
        if saved.is_kept:
            return saved.probe
        record = saved.lease.record
        waited = 0.0
        while True:
            with self._lock:
                self._drain()
                storage = self._in_memory(record)
                if storage is not None:
                    self._counter.stall_seconds += waited
                    tensor = self._hand_out(saved, record, storage)
                    self._prefetch(saved.microbatch)
                    return tensor
                transfer = self._awaited_load(record, saved.microbatch)
            waited += self._queue.wait(transfer)
            if transfer.error is not None:
                raise saved.lost(transfer.error) from transfer.error

    def _in_memory(self, record: Record) -> torch.UntypedStorage | None:
        """Find the bytes in memory; forward them if they were on their way out."""
        state = record.state
        if state is State.STORING:
            self._forward(record)
            return record.storage
        if state is State.STORED:
            # Something else may still hold the storage: the running operator, the
            # pipeline's buffers, the user. Then no read is needed.
            storage = revive(record.original)
            if storage is not None and storage.nbytes() >= record.span.first_byte + record.span.nbytes:
                self._count_forwarded(record)
                record.first_byte = 0
                return storage
            storage = None if record.loaded is None else revive(record.loaded)
            record.first_byte = record.span.first_byte
            return storage
        if state is State.LOADING:
            return None
        return record.storage

    def _forward(self, record: Record) -> None:
        """Keep bytes whose store has not ended: cancel it, or let it run for nothing."""
        self._count_forwarded(record)
        if record.store is not None and self._queue.cancel(record.store):
            self._stay_resident(record)

    def _count_forwarded(self, record: Record) -> None:
        if not record.is_forwarded:
            record.is_forwarded = True
            self._counter.forwarded_bytes += record.span.nbytes

    def _hand_out(self, saved: SavedTensor, record: Record, storage: torch.UntypedStorage) -> Tensor:
        """Build the tensor, and let go of loaded bytes once all handles have had them.

        A retained graph keeps its handles, so without this rule all that backward
        has just brought back would stay in memory (see the design, section 5.5).
        """
        if record.load is not None and record.load.event is not None:
            record.load.event.wait()
        tensor = saved.view.apply(storage, record.first_byte)
        self._arrive(record)
        if saved.pass_number != record.pass_number:
            saved.pass_number = record.pass_number
            record.num_unpacked += 1
        if record.num_unpacked >= record.num_handles:
            record.pass_number += 1
            record.num_unpacked = 0
            if record.state is State.LOADED:
                record.move("let go of loaded bytes", State.STORED)
                record.loaded = StorageWeakRef(storage)
                record.storage = None
                self._account.release(record.loaded, record.held_bytes)
                record.held_bytes = 0
        return tensor

    def _awaited_load(self, record: Record, microbatch: int) -> Transfer:
        if record.state is State.STORED:
            self._counter.num_loads_on_demand += 1
            self._schedule.demand(microbatch, record.serial)
            return self._start_load(record, is_urgent=True)
        if record.load is None:
            raise LoadError(f"cannot load activation: record {record.serial} has no transfer (expected one)")
        return record.load

    def _start_load(self, record: Record, *, is_urgent: bool) -> Transfer:
        tier, extent = record.tier, record.extent
        if tier is None or extent is None:
            raise LoadError(f"cannot load activation: record {record.serial} has no extent (expected one)")
        record.move("load", State.LOADING)
        target = self._allocate_target(extent.nbytes)
        record.storage = target.untyped_storage()
        record.first_byte = record.span.first_byte
        record.held_bytes = extent.nbytes
        self._account.hold(record.held_bytes)
        work = partial(tier.read, extent, target, self._streams.record())
        transfer = Transfer(Direction.LOAD, extent.nbytes, work, partial(self._on_loaded, record, tier, extent))
        record.load = transfer
        self._queue.submit(transfer, is_urgent=is_urgent)
        return transfer

    def _on_loaded(self, record: Record, tier: Tier, extent: Extent, transfer: Transfer) -> None:
        """Take note in a worker that a load ended."""
        with self._lock:
            self._counter.load_seconds += transfer.seconds
            if record.state is State.FREED:
                tier.free(extent)
            elif transfer.error is None:
                record.move("finish the load", State.LOADED)
                self._counter.loaded_bytes += transfer.nbytes

    # ------------------------------------------------------------------ prefetch

    def _prefetch(self, microbatch: int) -> None:
        """Bring back what backward asks for next, within the budget."""
        room_bytes = self._prefetch_bytes - self._ahead_bytes
        for serial in self._schedule.upcoming(microbatch, room_bytes, at_least_one=self._ahead_bytes == 0):
            record = self._records[serial]
            if record.lives() is None:
                continue
            record.is_ahead = True
            self._ahead_bytes += record.span.nbytes
            if record.state is State.STORING:
                self._forward(record)
            elif record.state is State.STORED:
                self._bring_ahead(record)

    def _bring_ahead(self, record: Record) -> None:
        storage = revive(record.original)
        if storage is None or storage.nbytes() < record.span.first_byte + record.span.nbytes:
            self._start_load(record, is_urgent=False)
            return
        # Still held by something else: hold it too, so that it cannot go before backward asks.
        self._count_forwarded(record)
        record.move("hold again", State.LOADING)
        record.move("hold again", State.LOADED)
        record.storage = storage
        record.first_byte = 0
        record.held_bytes = storage.nbytes()
        self._account.hold(record.held_bytes)

    def _arrive(self, record: Record) -> None:
        """Stop counting a record as ahead of backward."""
        if record.is_ahead:
            record.is_ahead = False
            self._ahead_bytes -= record.span.nbytes

    # ------------------------------------------------------------------ release

    def _drain(self) -> None:
        """Free records whose last handle died, and take off the account what has really gone."""
        while self._ended:
            self._free(self._ended.popleft())
        self._account.settle()

    def _free(self, record: Record) -> None:
        state = record.state
        record.move("free", State.FREED)
        pending = record.store if state is State.STORING else record.load if state is State.LOADING else None
        # A transfer that runs frees the extent when it ends.
        if record.extent is not None and record.tier is not None and (pending is None or self._queue.cancel(pending)):
            record.tier.free(record.extent)
        record.storage = None
        self._arrive(record)
        if pending is None:
            self._account.drop(record.held_bytes)
        else:
            self._account.release(record.original, record.held_bytes)
        self._account.dismiss(record.would_be_bytes)
        self._schedule.forget(record.serial)
        del self._records[record.serial]
        siblings = self._records_of[record.key]
        siblings.remove(record)
        if not siblings:
            del self._records_of[record.key]
            self._registry.forget(record.original)

    def _fold_backward_time(self) -> None:
        if self._backward_span is not None:
            self._counter.backward_seconds += self._backward_span[1] - self._backward_span[0]
            self._backward_span = None


def _name_of(error: BaseException) -> str:
    return "budget used up" if isinstance(error, CapacityError) else type(error).__name__
