"""Host memory that is huge-page-backed, pinned where there is a device, and recycled.

A fresh buffer per transfer costs a page fault storm, and buffers on 4 KiB pages
halve the bandwidth of the drive; so memory is mapped in slabs, kept, and handed
out in blocks. It knows nothing of files or of what the bytes mean.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ssdtrain_plugin.errors import CapacityError, StateError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.extents import ExtentAllocator, round_down, round_up
from ssdtrain_plugin.streams import Streams
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["BLOCK_ALIGNMENT", "HostArena", "memory_at"]

logger = logging.getLogger(__name__)

BLOCK_ALIGNMENT = 4096
"""Blocks start at, and reach to, multiples of this many bytes."""

_HUGE_PAGE_BYTES = 2 * MIB
# Left of what the process may still take: a process at the limit of its control group is killed, not refused.
_SPARE_BYTES = 256 * MIB
_ENDLESS = 1 << 62


@lru_cache(maxsize=1024)
def _array_type(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    # ctypes keeps array types weakly; without this each call would build, and
    # leave to the garbage collector, a new class.
    return ctypes.c_char * nbytes


def memory_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """View raw memory as a buffer that ``os.pwritev`` and ``os.preadv`` accept.

    Args:
        address: Start of the memory, which the caller keeps alive.
        nbytes: Its length.
    """
    return _array_type(nbytes).from_address(address)


class _Slab:
    """One mapping. It is unmapped when the last block on it has died, and never before."""

    __slots__ = ("address", "allocator", "is_pinned", "memory", "nbytes", "skip_bytes")

    def __init__(self, nbytes: int) -> None:
        # MAP_PRIVATE: shared anonymous memory gets no huge pages by madvise.
        self.memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            # open(2): a fork during direct I/O into private memory may send the bytes to the child's copy.
            self.memory.madvise(mmap.MADV_DONTFORK)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self.memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:  # a kernel without transparent huge pages
                logger.debug("no huge pages for host memory: %s", error)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.skip_bytes = -start % _HUGE_PAGE_BYTES
        self.address = start + self.skip_bytes
        self.nbytes = nbytes
        self.allocator = ExtentAllocator(BLOCK_ALIGNMENT)
        self.is_pinned = False


class _Block(NamedTuple):
    slab: _Slab
    extent: Extent

    @property
    def address(self) -> int:
        return self.slab.address + self.extent.offset


class HostArena:
    """Hands out CPU tensors on recycled blocks; a block comes back when its tensor dies.

    Note [Blocks come back by themselves]. A block is a ctypes array on the slab, and
    the storage of the tensor holds that array. When the last tensor on the storage
    dies, on whatever thread, a finalizer appends the block to a deque. It takes no
    lock, because it may run in the middle of anything, this class included; the next
    call that holds the lock drains the deque.

    Args:
        streams: Pin the slabs for their device.
        slab_bytes: Memory is mapped in pieces of this size, or of one block if that is
            larger. A block never spans two slabs.
        limit_bytes: Bound on the memory mapped, or None.
        available: Bytes that the process may still take, asked before more is mapped; or
            None. A part of them is left alone, see :data:`_SPARE_BYTES`.

    Threads:
        Any.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        slab_bytes: int = 64 * MIB,
        limit_bytes: int | None = None,
        available: Callable[[], int] | None = None,
    ) -> None:
        """Map nothing yet."""
        self._streams = streams
        self._slab_bytes = round_up(max(slab_bytes, 1), BLOCK_ALIGNMENT)
        self._limit_bytes = limit_bytes
        self._available = available
        # Both hold until the next trim. What could be mapped at the last refusal: each answer reads files.
        self._room_bytes: int | None = None
        # What is left by our own account: the system does not count pages that nobody has touched yet.
        self._left_bytes: int | None = None
        # Reentrant: a collection inside a locked region may run the finalizer that closes the arena.
        self._lock = threading.RLock()
        self._slabs: list[_Slab] = []
        self._live: dict[int, int] = {}  # address of a block -> bytes asked for
        self._returned: deque[_Block] = deque()
        self._reserved_bytes = 0
        self._used_bytes = 0
        self._peak_bytes = 0
        self._is_closed = False
        self._has_warned = False
        self._has_warned_of_memory = False

    @property
    def used_bytes(self) -> int:
        """Bytes in live blocks, each rounded up to :data:`BLOCK_ALIGNMENT`."""
        with self._lock:
            self._drain()
            return self._used_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes mapped now, in use or not."""
        with self._lock:
            return self._reserved_bytes

    @property
    def bound_bytes(self) -> int | None:
        """Bytes that may be mapped: ``limit_bytes``, or less while the system has no more; None: no bound."""
        with self._lock:
            if self._room_bytes is None:
                return self._limit_bytes
            bound_bytes = self._reserved_bytes + self._room_bytes
            return bound_bytes if self._limit_bytes is None else min(bound_bytes, self._limit_bytes)

    def tensor(self, nbytes: int) -> Tensor:
        """Give a tensor on a block of its own. Its values are not initialised.

        Args:
            nbytes: Bytes needed, at least 1.

        Returns:
            (nbytes,), uint8, CPU, contiguous, address a multiple of
            :data:`BLOCK_ALIGNMENT`; pinned if the streams' device wants it. The memory up
            to the next multiple belongs to the block too; see :meth:`is_block`.

        Raises:
            CapacityError: ``limit_bytes`` would be exceeded, or the system, or a control group, has no memory.
            StateError: The arena is closed.
            ValueError: ``nbytes`` is not positive.
        """
        with self._lock:
            if self._is_closed:
                raise StateError(f"cannot reserve host memory: {format_bytes(nbytes)} (the arena is closed)")
            self._drain()
            block = self._take(nbytes)
            array = _array_type(block.extent.reserved_bytes).from_buffer(
                block.slab.memory, block.slab.skip_bytes + block.extent.offset
            )
            self._live[block.address] = nbytes
            self._used_bytes += block.extent.reserved_bytes
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
            finalizer = weakref.finalize(array, self._returned.append, block)
            finalizer.atexit = False
        return torch.frombuffer(array, dtype=torch.uint8, count=nbytes)

    def is_block(self, tensor: Tensor) -> bool:
        """Tell whether ``tensor`` is all of one live block.

        Then the bytes after its end, up to the next multiple of
        :data:`BLOCK_ALIGNMENT`, hold nothing, and a transfer may run over them.

        Args:
            tensor: (n,), uint8, CPU, contiguous.
        """
        with self._lock:
            # A block that has died may have left its address to a stranger.
            self._drain()
            return self._live.get(tensor.data_ptr()) == tensor.numel()

    def trim(self) -> int:
        """Give free slabs back to the system, down to what was in use at once since the last call.

        Returns:
            Bytes given back.
        """
        with self._lock:
            self._drain()
            self._room_bytes = self._left_bytes = None
            peak_bytes, self._peak_bytes = self._peak_bytes, self._used_bytes
            return self._trim(peak_bytes)

    def close(self) -> None:
        """Unpin the slabs and let them go. Calling it twice does nothing.

        Live tensors stay valid: each keeps its mapping until it dies.

        Ordering:
            No copy between a device and this memory is under way.
        """
        with self._lock:
            self._drain()
            self._is_closed = True
            for slab in self._slabs:
                self._unpin(slab)
            self._slabs.clear()
            self._reserved_bytes = 0

    def _drain(self) -> None:
        while True:
            try:
                block = self._returned.popleft()
            except IndexError:
                return
            del self._live[block.address]
            self._used_bytes -= block.extent.reserved_bytes
            block.slab.allocator.free(block.extent)

    def _take(self, nbytes: int) -> _Block:
        for slab in self._slabs:
            if slab.nbytes - slab.allocator.used_bytes >= nbytes:
                extent = slab.allocator.allocate(nbytes, slab.nbytes)
                if extent is not None:
                    return _Block(slab, extent)
        slab = self._grow(nbytes)
        extent = slab.allocator.allocate(nbytes, slab.nbytes)
        if extent is None:
            raise StateError(f"a new slab of {slab.nbytes} bytes has no room for {nbytes}")
        return _Block(slab, extent)

    def _grow(self, nbytes: int) -> _Slab:
        need_bytes = round_up(nbytes, BLOCK_ALIGNMENT)
        slab_bytes = max(self._slab_bytes, round_up(need_bytes, _HUGE_PAGE_BYTES))
        if self._limit_bytes is not None:
            if self._reserved_bytes + slab_bytes > self._limit_bytes:
                self._trim(0)  # free slabs, each too small, may make room for one that fits
            left_bytes = round_down(max(self._limit_bytes - self._reserved_bytes, 0), BLOCK_ALIGNMENT)
            if left_bytes < need_bytes:
                raise CapacityError(
                    f"cannot reserve host memory: {format_bytes(nbytes)} "
                    f"({format_bytes(left_bytes)} left of {format_bytes(self._limit_bytes)})",
                    nbytes=nbytes,
                    hint="raise `host_bytes`",
                )
            slab_bytes = min(slab_bytes, left_bytes)
        if self._available is not None:
            slab_bytes = min(slab_bytes, self._room_for(nbytes, need_bytes, self._available))
        try:
            slab = _Slab(slab_bytes)
        except OSError as error:
            raise CapacityError(
                f"cannot reserve host memory: {format_bytes(slab_bytes)} ({error.strerror})",
                errno=error.errno,
                nbytes=nbytes,
                hint="lower `host_bytes`, or raise the memory limit of the process",
            ) from error
        self._pin(slab)
        self._slabs.append(slab)
        self._reserved_bytes += slab.nbytes
        if self._left_bytes is not None:
            self._left_bytes -= slab.nbytes
        if self._room_bytes is not None:
            self._room_bytes = max(self._room_bytes - slab.nbytes, 0)
        return slab

    def _room_for(self, nbytes: int, need_bytes: int, available: Callable[[], int]) -> int:
        """Ask how much may be mapped without getting the process killed.

        Raises:
            CapacityError: Less than is needed; without an error number, as for a budget that is used up.
        """
        if self._room_bytes is None or need_bytes <= self._room_bytes:
            left_bytes = min(available(), _ENDLESS if self._left_bytes is None else self._left_bytes)
            # The process grows meanwhile: half is left to it.
            room_bytes = round_down(max(left_bytes - _SPARE_BYTES, 0) // 2, BLOCK_ALIGNMENT)
            if room_bytes >= need_bytes:
                self._left_bytes = left_bytes
                return room_bytes
            self._room_bytes = room_bytes
            if not self._has_warned_of_memory:
                self._has_warned_of_memory = True
                logger.warning(
                    "host memory is short: %s wanted, %s left on this machine or in the control group, of which half "
                    "and %s are left alone; the drive or device memory takes what does not fit. hint: lower "
                    "`host_bytes`, or raise the memory limit of the job; said once",
                    format_bytes(nbytes),
                    format_bytes(left_bytes),
                    format_bytes(_SPARE_BYTES),
                )
        raise CapacityError(
            f"cannot reserve host memory: {format_bytes(nbytes)} (too little left for the process)",
            nbytes=nbytes,
            hint="lower `host_bytes`, or raise the memory limit of the job",
        )

    def _trim(self, keep_bytes: int) -> int:
        before_bytes = self._reserved_bytes
        for slab in [slab for slab in self._slabs if not len(slab.allocator)]:
            if self._reserved_bytes - slab.nbytes >= keep_bytes:
                self._unpin(slab)
                self._slabs.remove(slab)
                self._reserved_bytes -= slab.nbytes
        return before_bytes - self._reserved_bytes

    def _pin(self, slab: _Slab) -> None:
        try:
            self._streams.pin(slab.address, slab.nbytes)
        except RuntimeError as error:
            # Pageable memory is slower and as right: copies from it are ordered the same.
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "cannot page-lock host memory: %s (%s); transfers are slower. hint: raise `ulimit -l`",
                    format_bytes(slab.nbytes),
                    " ".join(str(error).split()),
                )
            return
        slab.is_pinned = True

    def _unpin(self, slab: _Slab) -> None:
        if slab.is_pinned:
            slab.is_pinned = False
            self._streams.unpin(slab.address)
