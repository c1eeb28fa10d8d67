"""What the cache keeps of one storage, and what the autograd graph holds instead of a tensor.

Note [The graph owns the lifetime]. ``pack`` returns a handle. The handles of one
storage share a lease, and nothing but handles holds a lease. When the last one
dies (backward has used it, the graph was dropped, forward raised) the lease dies
and says so. A finalizer may run at any allocation, in any thread, so it takes no
lock: it lets go of the bytes and appends to a deque that the cache drains.
"""

from __future__ import annotations

import enum
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.errors import (
    LoadError,
    OffloadError,
    SavedTensorMutatedError,
    StateError,
    StorageError,
    StoreError,
)
from ssdtrain_plugin.identity import Span, TensorView, revive
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import DeviceEvent
from ssdtrain_plugin.transfer import Transfer

__all__ = ["KeptTensor", "Lease", "Record", "SavedTensor", "State", "freed_meanwhile"]


class State(enum.Enum):
    """Where the bytes of one storage are."""

    RESIDENT = "resident"
    STORING = "storing"
    STORED = "stored"
    LOADING = "loading"
    LOADED = "loaded"
    FREED = "freed"

    # Members are singletons, and Enum's own hash runs Python code on the hot path.
    __hash__ = object.__hash__


_LEGAL: dict[State, frozenset[State]] = {
    State.RESIDENT: frozenset({State.STORING, State.FREED}),
    State.STORING: frozenset({State.STORED, State.RESIDENT, State.FREED}),
    State.STORED: frozenset({State.LOADING, State.FREED}),
    State.LOADING: frozenset({State.LOADED, State.STORED, State.FREED}),
    State.LOADED: frozenset({State.STORED, State.FREED}),
    State.FREED: frozenset(),
}


class Lease:
    """Alive as long as a handle of the record is.

    Args:
        record: Whose bytes the handles need.
        ended: Gets the record when the lease has died.
    """

    __slots__ = ("__weakref__", "record")

    def __init__(self, record: Record, ended: deque[Record]) -> None:
        """Bind the record and the deque."""
        self.record = record
        # Not `__del__`: while that runs a weak reference still finds its object, and another
        # thread could give new handles to a record that is about to be freed.
        record.lease = weakref.ref(self, partial(_let_go, record, ended))


def _let_go(record: Record, ended: deque[Record], _: object) -> None:
    """Let go of the bytes and report; takes no lock, see the note of this module."""
    record.storage = None
    ended.append(record)


class Record:
    """One storage, or a span of it, that autograd saved at one version.

    Everything here is guarded by the lock of ``TensorCache``, but for what
    happens when its :class:`Lease` dies.

    Attributes:
        serial: Number of the record, never reused.
        span: Which bytes of the storage.
        version: Of the saved tensors when their bytes were taken.
        address: Of its storage object: Note [Identity].
        owner: Of the version counter of the first save: :func:`ssdtrain_plugin.identity.owner_of`.
        original: Weak reference of the storage that was saved; None if it is kept
            as it is, because then the graph itself holds it.
        held_bytes: Device bytes that the record pins now.
        would_be_bytes: Device bytes that it would pin without the plugin.
        storage: The bytes in memory, if the cache holds them.
        first_byte: Where in the original storage ``storage`` begins.
        loaded: Weak reference of the bytes loaded last, or None.
        store: The transfer that stores it, or None.
        load: The last transfer that loads it, or None.
        is_copy: ``storage`` is a copy of a small span of a large storage.
        is_forwarded: Handed back from memory although it was offloaded.
        is_ahead: Loaded or held for a backward that has not asked yet.
        ahead_of: The micro-batch of that backward.
        is_moving: A transfer copies its bytes from its tier to another.
        hanging: Transfers that were given up, and may still use its bytes and its extent.
        num_transfers: Once freed: how many transfers must end before its extent may be.
        num_handles: How many are alive, as far as :meth:`all_unpacked` has counted.
        num_unpacked: How many of them were unpacked in this pass over the graph.
        pass_number: Grows when all handles have been unpacked.
        data_pointer: Where the bytes were when their store was queued.
        dead_handles: The last pass of each handle that died since.
    """

    # Class attributes are the defaults: a record is made for every storage that
    # autograd saves, and most of these are never set.
    state = State.RESIDENT
    original: StorageWeakRef | None = None
    data_pointer = 0
    dead_handles: list[int] | None = None
    storage: torch.UntypedStorage | None = None
    first_byte = 0
    held_bytes = 0
    would_be_bytes = 0
    loaded: StorageWeakRef | None = None
    tier: Tier | None = None
    extent: Extent | None = None
    store: Transfer | None = None
    load: Transfer | None = None
    lease: weakref.ref[Lease] | None = None
    is_copy = False
    is_forwarded = False
    is_ahead = False
    ahead_of = -1
    is_moving = False
    hanging: tuple[Transfer, ...] = ()
    num_transfers = 0
    num_handles = 0
    num_unpacked = 0
    pass_number = 0

    def __init__(self, serial: int, address: int, span: Span, version: int, owner: weakref.ref[Tensor]) -> None:
        """Start resident, with no bytes held yet."""
        self.serial = serial
        self.address = address
        self.span = span
        self.version = version
        self.owner = owner

    def all_unpacked(self, saved: SavedTensor) -> bool:
        """Count an unpack; tell whether every handle alive has had the bytes in this pass.

        A retained graph keeps its handles, so without this rule all that backward
        has just brought back would stay in memory.

        Args:
            saved: The handle that is unpacked.
        """
        while self.dead_handles:
            self.num_handles -= 1
            self.num_unpacked -= self.dead_handles.pop() == self.pass_number
        if saved.pass_number != self.pass_number:
            saved.pass_number = self.pass_number
            self.num_unpacked += 1
        if self.num_unpacked < self.num_handles:
            return False
        self.pass_number += 1
        self.num_unpacked = 0
        return True

    def move(self, operation: str, to: State) -> None:
        """Change the state.

        Args:
            operation: What is being done, for the message.
            to: The new state.

        Raises:
            StateError: The move is not legal from the present state.
        """
        if to not in _LEGAL[self.state]:
            allowed = ", ".join(sorted(state.value for state in _LEGAL[self.state])) or "nothing"
            raise StateError(
                f"cannot {operation}: record {self.serial} of {self.span.nbytes} bytes "
                f"({self.state.value} to {to.value}, expected {allowed})",
                hint="this is a defect of ssdtrain_plugin; please report it with the traceback",
            )
        self.state = to

    def hold(self, storage: torch.UntypedStorage, first_byte: int, held_bytes: int) -> None:
        """Hold bytes in memory.

        Args:
            storage: Has the bytes of the original storage from ``first_byte`` on.
            first_byte: Where in the original storage it begins.
            held_bytes: What it pins.
        """
        self.storage = storage
        self.first_byte = first_byte
        self.held_bytes = held_bytes

    def let_go(self) -> int:
        """Hold nothing any more; return the bytes that were pinned."""
        held_bytes, self.held_bytes = self.held_bytes, 0
        self.storage = None
        return held_bytes

    def is_original_gone(self) -> bool:
        """Tell whether the saved storage is dead; one that is alive but freed may be filled again before backward."""
        return self.original is None or self.original.expired()

    def place(self) -> tuple[Tier, Extent]:
        """Get where the bytes are stored.

        Raises:
            StateError: Nowhere, although they should be.
        """
        if self.tier is None or self.extent is None:
            raise StateError(f"cannot load: record {self.serial} has no extent ({self.state.value}, expected one)")
        return self.tier, self.extent

    def free_extent(self) -> None:
        """Give the place on the tier back, if there is one; when all that hang on it have returned."""
        if self.tier is not None and self.extent is not None:
            _call_after(self.hanging, partial(self.tier.free, self.extent))
        self.extent = None

    def leave_to(self, transfer: Transfer) -> None:
        """Leave the place on the tier to a transfer that was given up, until it returns.

        Args:
            transfer: Holds what else it uses.
        """
        self.hanging = (*(other for other in self.hanging if not other.has_returned), transfer)

    def end_transfer(self) -> None:
        """Note that a transfer of a freed record has ended; the last one gives the place on the tier back."""
        self.num_transfers -= 1
        if self.num_transfers == 0:
            self.free_extent()

    def has_moved(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether the bytes of the saved storage are not where they were.

        Args:
            storage: The one that was saved.
        """
        return storage.data_ptr() != self.data_pointer or storage.nbytes() < self.span.first_byte + self.span.nbytes

    def write(self, tier: Tier, extent: Extent, storage: torch.UntypedStorage, ready: DeviceEvent) -> None:
        """Write the bytes to a tier, unless somebody has freed them since; runs in a worker.

        Args:
            tier: Of the extent.
            extent: Where to.
            storage: The one that was saved.
            ready: Reached when it holds its values.

        Raises:
            StorageError: They were freed, or the tier failed.
        """
        if self.has_moved(storage):
            raise freed_meanwhile()
        tier.write(extent, self.span.bytes_of(storage), ready)

    def find_original(self) -> torch.UntypedStorage | None:
        """Get the saved storage while something else still holds it, unshrunk."""
        storage = None if self.original is None else revive(self.original)
        end = self.span.first_byte + self.span.nbytes
        return storage if storage is not None and storage.nbytes() >= end else None

    def find_loaded(self) -> torch.UntypedStorage | None:
        """Get the bytes loaded last while an operator still holds them."""
        return None if self.loaded is None else revive(self.loaded)

    def lives(self) -> Lease | None:
        """Get the lease while a handle is alive."""
        return None if self.lease is None else self.lease()


def _call_after(hanging: tuple[Transfer, ...], callback: Callable[[], None]) -> None:
    """Call ``callback`` when every transfer has returned, in the worker of the last one, or now."""
    if hanging:
        hanging[-1].when_returned(partial(_call_after, hanging[:-1], callback))
    else:
        callback()


def freed_meanwhile() -> StoreError:
    """Make the error for a storage that was freed under its store."""
    return StoreError("cannot store activation: its storage was freed or moved meanwhile")


def _mutated(tensor: Tensor, shape: torch.Size, dtype: torch.dtype, saved_version: int) -> SavedTensorMutatedError:
    return SavedTensorMutatedError(
        f"a tensor saved for backward was modified in place: {tuple(shape)} {dtype} on {tensor.device} "
        f"(version {tensor._version}, expected {saved_version})",
        hint="move the in-place operation before the save, or use its out-of-place form",
    )


class KeptTensor:
    """Held by the graph for a tensor that stays in device memory.

    Args:
        tensor: The weight itself, so that a swapped ``data`` is seen; else ``t.detach()``.
        version: Of the tensor when it was saved.
        lease: Of its record; None if it is not the cache's business: a weight, a subclass.
        microbatch: Whose forward saved it.
    """

    __slots__ = ("_tensor", "_version", "lease", "microbatch")

    def __init__(self, tensor: Tensor, version: int, lease: Lease | None = None, microbatch: int = -1) -> None:
        """Keep all four."""
        self._tensor = tensor
        self._version = version
        self.lease = lease
        self.microbatch = microbatch

    def get(self) -> Tensor:
        """Give the tensor back.

        Raises:
            SavedTensorMutatedError: It was changed in place since.
        """
        if self._tensor._version != self._version:
            raise _mutated(self._tensor, self._tensor.shape, self._tensor.dtype, self._version)
        return self._tensor


class SavedTensor:
    """Held by the graph for a tensor whose bytes may leave device memory.

    Args:
        lease: Keeps the record alive.
        view: How the tensor looks at its storage.
        probe: Shares the tensor's version counter and holds none of its bytes.
        version: Of the tensor when it was saved.
        microbatch: Whose forward saved it.
    """

    __slots__ = ("lease", "microbatch", "pass_number", "probe", "version", "view")

    def __init__(self, lease: Lease, view: TensorView, probe: Tensor, version: int, microbatch: int) -> None:
        """Bind the view to the record."""
        self.lease = lease
        self.view = view
        self.probe = probe
        self.version = version
        self.microbatch = microbatch
        self.pass_number = -1
        lease.record.num_handles += 1

    def __del__(self) -> None:
        """Leave a note for the next count; takes no lock, see the note of this module."""
        dead_handles = self.lease.record.dead_handles
        if dead_handles is not None:
            dead_handles.append(self.pass_number)

    def check_version(self) -> None:
        """Compare versions, as autograd itself would have done.

        Raises:
            SavedTensorMutatedError: The tensor was changed in place since.
        """
        if self.probe._version != self.version:
            raise _mutated(self.probe, self.view.shape, self.view.dtype, self.version)

    def rebuild(self, storage: torch.UntypedStorage, first_byte: int) -> Tensor:
        """Build the saved tensor on bytes that are back.

        What a backward writes into it moves the version counter of the save, so
        another handle of the same tensor sees it, as with autograd's own variables.

        Args:
            storage: Holds the bytes of the saved storage from ``first_byte`` on.
            first_byte: A multiple of the element size.

        Raises:
            LoadError: Somebody freed the storage.
        """
        span = self.lease.record.span
        if storage.nbytes() < span.first_byte + span.nbytes - first_byte:
            raise LoadError(
                f"cannot give back the activation {tuple(self.view.shape)} {self.view.dtype}: its storage was freed "
                f"({storage.nbytes()} bytes, expected {span.first_byte + span.nbytes - first_byte})",
                hint="whoever called resize_(0) on a saved tensor must fill it again before backward",
            )
        tensor = self.probe.detach()
        tensor.data = self.view.apply(storage, first_byte)
        return tensor

    def lost(self, cause: BaseException) -> LoadError:
        """Make the error for the line of user code that needed the tensor.

        Args:
            cause: Why its load failed.
        """
        what = f"cannot load the activation {tuple(self.view.shape)} {self.view.dtype}"
        if isinstance(cause, OffloadError) and not isinstance(cause, StorageError):
            return LoadError(f"{what}: {cause.message}", hint=cause.hint)
        if not isinstance(cause, StorageError):
            return LoadError(f"{what}: {cause!r}", hint="the bytes are lost; restart from the last checkpoint")
        return LoadError(
            f"{what}: {cause.message}",
            errno=cause.errno,
            path=cause.path,
            offset=cause.offset,
            nbytes=cause.nbytes,
            hint=cause.hint,
        )
