"""Pinned host memory as a tier: the first place to offload to, bounded and fast."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssdtrain_plugin.errors import CapacityError, LoadError, StateError, StorageError, StoreError
from ssdtrain_plugin.storage.base import Extent, Rates, Tier
from ssdtrain_plugin.storage.extents import round_up
from ssdtrain_plugin.storage.memory import BLOCK_ALIGNMENT, HostArena
from ssdtrain_plugin.storage.memory_limit import available_host_bytes
from ssdtrain_plugin.storage.tally import Tally
from ssdtrain_plugin.streams import DeviceEvent, Streams
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["HostTier"]

# A block does not span slabs: large ones waste less of the budget at their ends.
_SLAB_BYTES = 256 * MIB


class HostTier(Tier):
    """Keeps bytes in an arena of its own; ``Extent.offset`` is the address of the block.

    Args:
        host_bytes: Bound on the memory mapped, and so pinned.
        streams: Copy between device and host memory, and pin.
        available: Bytes that the process may still take, on the machine and in its control
            groups. Asked before more is mapped: what was free at the start may be gone.
    """

    name = "host"

    def __init__(
        self, host_bytes: int, *, streams: Streams, available: Callable[[], int] = available_host_bytes
    ) -> None:
        """Map nothing yet."""
        self._host_bytes = host_bytes
        self._streams = streams
        self._arena = HostArena(streams, slab_bytes=_SLAB_BYTES, limit_bytes=host_bytes, available=available)
        self._blocks: dict[int, tuple[Extent, Tensor]] = {}
        self._used_bytes = 0
        self._lock = threading.RLock()
        self._num_active = 0
        self._is_closed = False
        self._writes, self._reads = Tally(), Tally()

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now."""
        with self._lock:
            return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes left of the budget, or of what is mapped while the system has no more; not necessarily in one piece."""
        with self._lock:
            bound_bytes = self._arena.bound_bytes
            bound_bytes = self._host_bytes if bound_bytes is None else min(self._host_bytes, bound_bytes)
            return 0 if self._is_closed else max(bound_bytes - self._used_bytes, 0)

    def describe(self) -> str:
        """Name the budget in one line."""
        return f"host: memory of this process, up to {format_bytes(self._host_bytes)}"

    def allocate(self, nbytes: int) -> Extent:
        """Reserve a block; see :meth:`Tier.allocate`."""
        with self._lock:
            if self._is_closed:
                raise self._no_room(nbytes, "the tier is closed", None)
            try:
                block = self._arena.tensor(nbytes)
            except CapacityError as error:
                left_bytes = self.free_bytes
                pieces = "in pieces, " if left_bytes >= nbytes else ""
                reason = f"{format_bytes(left_bytes)} left {pieces}of {format_bytes(self._host_bytes)}"
                raise self._no_room(nbytes, reason, error.errno) from error
            extent = Extent(block.data_ptr(), nbytes, round_up(nbytes, BLOCK_ALIGNMENT))
            self._blocks[extent.offset] = (extent, block)
            self._used_bytes += extent.reserved_bytes
            return extent

    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        """Copy ``source`` to its block; see :meth:`Tier.write`."""
        ready.synchronize()  # the copy is not slow because kernels are
        with self._block(extent, source, StoreError) as block, self._writes.count(extent.nbytes):
            self._streams.copy_to_host(block, source, ready).synchronize()

    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        """Copy the block to ``target``; see :meth:`Tier.read`."""
        ready.synchronize()
        with self._block(extent, target, LoadError) as block, self._reads.count(extent.nbytes):
            event = self._streams.copy_to_device(target, block, ready)
            # The extent may be freed, and its block reused, as soon as this returns.
            event.synchronize()
            return event

    def memory_of(self, extent: Extent) -> Tensor | None:
        """Get the block of an extent; see :meth:`Tier.memory_of`."""
        with self._lock:
            live, block = self._blocks.get(extent.offset, (None, None))
            return block if live == extent and not self._is_closed else None

    def free(self, extent: Extent) -> None:
        """Give a block back to the arena.

        Raises:
            StateError: It was freed before, or is not from here.
        """
        with self._lock:
            if self._is_closed:
                return
            if self._blocks.get(extent.offset, (None,))[0] != extent:
                raise StateError(
                    f"cannot free extent: {extent.reserved_bytes} bytes at {extent.offset} "
                    "(not allocated, expected a live extent)"
                )
            del self._blocks[extent.offset]
            self._used_bytes -= extent.reserved_bytes

    def take_rates(self) -> Rates:
        """Tell how fast copies were."""
        return Rates(self._writes.take(), self._reads.take())

    def trim(self) -> None:
        """Give memory back that was not in use for long; see :meth:`Tier.trim`."""
        self._arena.trim()

    def close(self) -> None:
        """Give the memory back, at once or with the end of the last copy under way; never waits."""
        with self._lock:
            self._is_closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closed and self._num_active == 0:
            self._blocks.clear()
            self._used_bytes = 0
            self._arena.close()

    @contextlib.contextmanager
    def _block(self, extent: Extent, tensor: Tensor, kind: type[StorageError]) -> Iterator[Tensor]:
        """Look up the block of an extent and keep the memory mapped for one copy."""
        if tensor.numel() != extent.nbytes or tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            raise StateError(
                f"a transfer of {extent.nbytes} bytes was given a tensor of {tensor.numel()} {tensor.dtype} "
                "(expected as many, uint8, contiguous)"
            )
        with self._lock:
            if self._is_closed:
                is_store = kind is StoreError
                raise kind(
                    f"cannot {'store' if is_store else 'load'} activation: {format_bytes(extent.nbytes)} "
                    f"{'to' if is_store else 'from'} host memory (the tier is closed)",
                    offset=extent.offset,
                    nbytes=extent.nbytes,
                )
            live, block = self._blocks.get(extent.offset, (None, None))
            if live != extent or block is None:
                raise StateError(f"a transfer at {extent.offset} uses an extent that is not allocated")
            self._num_active += 1
        try:
            yield block
        finally:
            with self._lock:
                self._num_active -= 1
                self._close_if_unused()

    def _no_room(self, nbytes: int, reason: str, error_number: int | None) -> CapacityError:
        return CapacityError(
            f"cannot store activation: {format_bytes(nbytes)} to host memory ({reason})",
            errno=error_number,
            nbytes=nbytes,
            hint="raise `host_bytes` or lower `offload_fraction`; the tensor stays in memory meanwhile",
        )
