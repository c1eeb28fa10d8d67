"""Host memory that DeepNVMe has locked: any other it would copy, in the calling thread.

As in storage/memory.py it is kept in slabs, lent in blocks and recycled, by the way of
Note [Blocks come back by themselves]; the slabs differ, since the library maps them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ssdtrain_plugin.errors import CapacityError, StateError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.extents import ExtentAllocator, round_up
from ssdtrain_plugin.storage.memory import memory_at
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["LockedPool"]

logger = logging.getLogger(__name__)

_SLAB_BYTES = 64 * MIB
_HUGE_PAGE_BYTES = 2 * MIB
_MADV_COLLAPSE = 25  # since Linux 6.1; the module mmap does not name it yet
_LIBC = ctypes.CDLL(None, use_errno=True)


def _advise(address: int, nbytes: int, advice: int) -> None:
    """Call madvise(2); what the kernel cannot do stays undone."""
    if _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice)) != 0:
        logger.debug("madvise(%d) of %d bytes: %s", advice, nbytes, os.strerror(ctypes.get_errno()))


def _check_lockable(nbytes: int) -> None:
    """Lock as much memory for a moment; the library would end the process where that fails.

    Raises:
        OSError: It cannot be had, or not be locked.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = ctypes.c_char.from_buffer(memory)
        try:
            if _LIBC.mlock(ctypes.byref(view), ctypes.c_size_t(nbytes)) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            del view  # or the mapping could not be closed


class _Slab:
    """Memory of the library, in huge pages if the kernel can; freed when the last block on it has died."""

    __slots__ = ("__weakref__", "address", "allocator", "nbytes", "returned")

    def __init__(self, owner: Any, nbytes: int, alignment: int) -> None:
        whole = owner.new_cpu_locked_tensor(nbytes + _HUGE_PAGE_BYTES, torch.empty(0, dtype=torch.uint8))
        self.address = round_up(whole.data_ptr(), _HUGE_PAGE_BYTES)
        self.nbytes = nbytes
        self.allocator = ExtentAllocator(alignment)
        self.returned: deque[Extent] = deque()
        # Small pages halve the bandwidth of the drive, as in storage/memory.py, and the library has no others.
        _advise(self.address, nbytes, _MADV_COLLAPSE)
        _advise(self.address, nbytes, mmap.MADV_DONTFORK)
        release = weakref.finalize(self, _free_locked, owner, whole, self.address, nbytes, os.getpid())
        release.atexit = False


def _free_locked(owner: Any, whole: Tensor, address: int, nbytes: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child has not got this memory
    _advise(address, nbytes, mmap.MADV_DOFORK)  # whoever gets this memory next may need it after a fork
    owner.free_cpu_locked_tensor(whole)


def _return_block(slab: _Slab, extent: Extent) -> None:
    # A finalizer: it takes no lock, see Note [Blocks come back by themselves]. It is also
    # what keeps the slab alive while the block is.
    slab.returned.append(extent)


class LockedPool:
    """Lends locked memory.

    Args:
        owner: A handle of the library that is used for nothing else: one in use makes others wait.
        alignment: Of addresses and sizes (bytes).

    Threads:
        Any.
    """

    def __init__(self, owner: Any, alignment: int) -> None:
        """Lock nothing yet."""
        self._owner = owner
        self._alignment = alignment
        self._lock = threading.RLock()
        self._slabs: list[_Slab] = []

    def tensor(self, nbytes: int) -> Tensor:
        """Lend a block; it comes back when the last tensor on its storage has died.

        Args:
            nbytes: At least 1.

        Returns:
            (m,), uint8, CPU, contiguous; m is ``nbytes`` rounded up to the alignment.

        Raises:
            CapacityError: No memory can be locked.
        """
        nbytes = round_up(nbytes, self._alignment)
        with self._lock:
            slab, extent = self._take(nbytes)
            array = memory_at(slab.address + extent.offset, nbytes)
            weakref.finalize(array, _return_block, slab, extent).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8)

    def _take(self, nbytes: int) -> tuple[_Slab, Extent]:
        for slab in self._slabs:
            while slab.returned:
                slab.allocator.free(slab.returned.popleft())
            extent = slab.allocator.allocate(nbytes, slab.nbytes)
            if extent is not None:
                return slab, extent
        slab_bytes = max(_SLAB_BYTES, round_up(nbytes, _HUGE_PAGE_BYTES))
        try:
            _check_lockable(slab_bytes + _HUGE_PAGE_BYTES)
        except OSError as error:
            raise CapacityError(
                f"cannot lock host memory: {format_bytes(slab_bytes)} ({error.strerror})",
                errno=error.errno,
                nbytes=nbytes,
                hint="raise `ulimit -l`, or set `io_engine` to `posix`",
            ) from error
        slab = _Slab(self._owner, slab_bytes, self._alignment)
        extent = slab.allocator.allocate(nbytes, slab_bytes)
        if extent is None:
            raise StateError(f"a new slab of {slab_bytes} bytes has no room for {nbytes}")
        self._slabs.append(slab)
        return slab, extent

    def close(self) -> None:
        """Let the slabs go; one with a live block stays until that dies."""
        with self._lock:
            self._slabs.clear()
