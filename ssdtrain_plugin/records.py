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

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.errors import LoadError, SavedTensorMutatedError, StateError, StorageError
from ssdtrain_plugin.identity import Span, StorageKey, TensorView, revive
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.transfer import Transfer

__all__ = ["KeptTensor", "Lease", "Record", "SavedTensor", "State"]


class State(enum.Enum):
    """Where the bytes of one storage are."""

    RESIDENT = "resident"
    STORING = "storing"
    STORED = "stored"
    LOADING = "loading"
    LOADED = "loaded"
    FREED = "freed"


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
        ended: Gets the record when the lease dies.
    """

    __slots__ = ("__weakref__", "_ended", "record")

    def __init__(self, record: Record, ended: deque[Record]) -> None:
        """Bind the record and the deque."""
        self.record = record
        self._ended = ended

    def __del__(self) -> None:
        """Let go of the bytes and report; takes no lock, see the note of this module."""
        self.record.storage = None
        self._ended.append(self.record)


class Record:
    """One storage, or a span of it, that autograd saved at one version.

    Everything here is guarded by the lock of ``TensorCache``, but for what
    :class:`Lease` does when it dies.

    Attributes:
        serial: Number of the record, never reused.
        key: Of its storage.
        span: Which bytes of the storage.
        version: Of the saved tensors when their bytes were taken.
        probe: Follows the version counter of the first save.
        original: Weak reference of the storage that was saved.
        held_bytes: Device bytes that the record pins now.
        would_be_bytes: Device bytes that it would pin without the plugin.
        storage: The bytes in memory, if the cache holds them.
        first_byte: Where in the original storage ``storage`` begins.
        loaded: Weak reference of the bytes loaded last, or None.
        store: The transfer that stores it, or None.
        load: The last transfer that loads it, or None.
        is_forwarded: Handed back from memory although it was offloaded.
        is_ahead: Loaded or held for a backward that has not asked yet.
        num_handles: How many are alive, as far as :meth:`all_unpacked` has counted.
        num_unpacked: How many of them were unpacked in this pass over the graph.
        pass_number: Grows when all handles have been unpacked.
        dead_handles: The last pass of each handle that died since.
    """

    __slots__ = (
        "dead_handles",
        "extent",
        "first_byte",
        "held_bytes",
        "is_ahead",
        "is_forwarded",
        "key",
        "lease",
        "load",
        "loaded",
        "num_handles",
        "num_unpacked",
        "original",
        "pass_number",
        "probe",
        "serial",
        "span",
        "state",
        "storage",
        "store",
        "tier",
        "version",
        "would_be_bytes",
    )

    def __init__(
        self, serial: int, key: StorageKey, span: Span, probe: Tensor, version: int, original: StorageWeakRef
    ) -> None:
        """Start resident, with no bytes held yet."""
        self.serial = serial
        self.key = key
        self.span = span
        self.probe = probe
        self.version = version
        self.original = original
        self.state = State.RESIDENT
        self.storage: torch.UntypedStorage | None = None
        self.first_byte = 0
        self.held_bytes = 0
        self.would_be_bytes = 0
        self.loaded: StorageWeakRef | None = None
        self.tier: Tier | None = None
        self.extent: Extent | None = None
        self.store: Transfer | None = None
        self.load: Transfer | None = None
        self.lease: weakref.ref[Lease] | None = None
        self.is_forwarded = False
        self.is_ahead = False
        self.num_handles = 0
        self.num_unpacked = 0
        self.pass_number = 0
        self.dead_handles: list[int] = []

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

    def place(self) -> tuple[Tier, Extent]:
        """Get where the bytes are stored.

        Raises:
            StateError: Nowhere, although they should be.
        """
        if self.tier is None or self.extent is None:
            raise StateError(f"cannot load: record {self.serial} has no extent ({self.state.value}, expected one)")
        return self.tier, self.extent

    def free_extent(self) -> None:
        """Give the place on the tier back, if there is one."""
        if self.tier is not None and self.extent is not None:
            self.tier.free(self.extent)
        self.extent = None

    def find_original(self) -> torch.UntypedStorage | None:
        """Get the saved storage while something else still holds it, unshrunk."""
        storage = revive(self.original)
        end = self.span.first_byte + self.span.nbytes
        return storage if storage is not None and storage.nbytes() >= end else None

    def find_loaded(self) -> torch.UntypedStorage | None:
        """Get the bytes loaded last while an operator still holds them."""
        return None if self.loaded is None else revive(self.loaded)

    def lives(self) -> Lease | None:
        """Get the lease while a handle is alive."""
        return None if self.lease is None else self.lease()


def _mutated(tensor: Tensor, shape: torch.Size, dtype: torch.dtype, saved_version: int) -> SavedTensorMutatedError:
    return SavedTensorMutatedError(
        f"a tensor saved for backward was modified in place: {tuple(shape)} {dtype} on {tensor.device} "
        f"(version {tensor._version}, expected {saved_version})",
        hint="move the in-place operation before the save, or use its out-of-place form",
    )


class KeptTensor:
    """Held by the graph for a tensor that is not the cache's business: a weight, a subclass.

    Args:
        tensor: The weight itself, so that a swapped ``data`` is seen; else ``t.detach()``.
        version: Of the tensor when it was saved.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor, version: int) -> None:
        """Keep both."""
        self._tensor = tensor
        self._version = version

    def get(self) -> Tensor:
        """Give the tensor back.

        Raises:
            SavedTensorMutatedError: It was changed in place since.
        """
        if self._tensor._version != self._version:
            raise _mutated(self._tensor, self._tensor.shape, self._tensor.dtype, self._version)
        return self._tensor


class SavedTensor:
    """Held by the graph for a tensor that the cache knows.

    Args:
        lease: Keeps the record alive.
        view: How the tensor looks at its storage.
        probe: Shares the tensor's version counter. For a kept tensor it is the
            tensor's alias and holds the bytes; else it holds none.
        version: Of the tensor when it was saved.
        microbatch: Whose forward saved it.
        is_kept: Whether ``probe`` is the alias.
    """

    __slots__ = ("is_kept", "lease", "microbatch", "pass_number", "probe", "version", "view")

    def __init__(
        self, lease: Lease, view: TensorView, probe: Tensor, version: int, microbatch: int, is_kept: bool
    ) -> None:
        """Bind the view to the record."""
        self.lease = lease
        self.view = view
        self.probe = probe
        self.version = version
        self.microbatch = microbatch
        self.is_kept = is_kept
        self.pass_number = -1

    def __del__(self) -> None:
        """Leave a note for the next count; takes no lock, see the note of this module."""
        self.lease.record.dead_handles.append(self.pass_number)

    def check_version(self) -> None:
        """Compare versions, as autograd itself would have done.

        Raises:
            SavedTensorMutatedError: The tensor was changed in place since.
        """
        if self.probe._version != self.version:
            raise _mutated(self.probe, self.view.shape, self.view.dtype, self.version)

    def lost(self, cause: BaseException) -> LoadError:
        """Make the error for the line of user code that needed the tensor.

        Args:
            cause: Why its load failed.
        """
        what = f"cannot load the activation {tuple(self.view.shape)} {self.view.dtype}"
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
