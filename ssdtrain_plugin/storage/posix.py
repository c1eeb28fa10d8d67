"""The engine of plain system calls: no threads of its own, no library, no copy.

Workers of the transfer queue call it several at once; that keeps a drive busy, and
the calls leave the interpreter's lock. Measured beside an asynchronous interface of
the kernel in docs/results.
"""

from __future__ import annotations

import os

from torch import Tensor

from ssdtrain_plugin.storage.base import Engine
from ssdtrain_plugin.storage.extents import round_down, round_up
from ssdtrain_plugin.storage.memory import BLOCK_ALIGNMENT, HostArena, memory_at
from ssdtrain_plugin.storage.probe import DirectoryReport

__all__ = ["PosixEngine"]


class PosixEngine(Engine):
    """``pwritev`` and ``preadv`` on one descriptor.

    Args:
        fd: Of the file; owned by someone else, who outlives the engine.
        report: Of the file's directory.
        arena: Gives staging memory.
    """

    name = "posix"

    def __init__(self, fd: int, *, report: DirectoryReport, arena: HostArena) -> None:
        """Remember what O_DIRECT wants."""
        self._fd = fd
        self._arena = arena
        self._is_direct = report.supports_direct
        self._memory_alignment = report.alignment_bytes
        self._length_alignment = length_alignment(report)

    def in_place_bytes(self, tensor: Tensor) -> int:
        """Count what lies aligned in host memory; see :meth:`Engine.in_place_bytes`."""
        if not tensor.is_cpu or tensor.data_ptr() % self._memory_alignment:
            return 0
        nbytes = tensor.numel()
        whole_bytes = round_down(nbytes, self._length_alignment)
        if whole_bytes < nbytes and self._length_alignment == BLOCK_ALIGNMENT and self._arena.is_block(tensor):
            return round_up(nbytes, BLOCK_ALIGNMENT)
        return whole_bytes

    def staging(self, nbytes: int) -> Tensor:
        """Lend a block of the arena, aligned as the drive wants; see :meth:`Engine.staging`."""
        nbytes = round_up(nbytes, self._length_alignment)
        if self._memory_alignment <= BLOCK_ALIGNMENT:
            return self._arena.tensor(nbytes)
        block = self._arena.tensor(nbytes + self._memory_alignment)
        skip_bytes = -block.data_ptr() % self._memory_alignment
        return block[skip_bytes : skip_bytes + nbytes]

    def write(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Write in one system call; see :meth:`Engine.write`."""
        return os.pwritev(self._fd, [memory_at(memory.data_ptr(), nbytes)], offset)

    def read(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Read in one system call; see :meth:`Engine.read`."""
        return os.preadv(self._fd, [memory_at(memory.data_ptr(), nbytes)], offset)

    def describe(self) -> str:
        """Name the access."""
        if not self._is_direct:
            return "posix, buffered I/O"
        return f"posix, O_DIRECT ({self._memory_alignment}-byte alignment)"

    def close(self) -> None:
        """Hold nothing, so do nothing."""


def length_alignment(report: DirectoryReport) -> int:
    """Return what the length of a transfer must be a multiple of: 1 through the page cache.

    Args:
        report: Of the directory.
    """
    return max(report.alignment_bytes, BLOCK_ALIGNMENT) if report.supports_direct else 1
