"""The drive through plain system calls: one unlinked extent file, O_DIRECT, no threads of its own.

Every byte count is checked and every ``OSError`` is mapped here, once. It knows
bytes and offsets; when to move them is the transfer queue's business.

Note [Aligned or staged]. O_DIRECT wants memory, offset and length aligned. Extents
are padded, so offset and length always can be. Where the memory of a CPU tensor is
aligned too, the drive reads and writes it in place; else, and for the last bytes of
an odd length, and for device memory, the bytes go through a staging block of the
arena. Padding never runs over memory that may belong to somebody else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from ssdtrain_plugin.errors import CapacityError, LoadError, StateError, StorageError, StoreError
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.storage.extents import ExtentAllocator, round_down, round_up
from ssdtrain_plugin.storage.memory import BLOCK_ALIGNMENT, HostArena, memory_at
from ssdtrain_plugin.storage.probe import DirectoryReport, open_unlinked, probe_directory
from ssdtrain_plugin.streams import DeviceEvent, Streams
from ssdtrain_plugin.units import GIB, MIB, format_bytes

__all__ = ["PosixTier"]

logger = logging.getLogger(__name__)

_EXTENT_ALIGNMENT = 4096  # file systems serialise writes of parts of their blocks
_GROWTH_BYTES = 256 * MIB
_CHUNK_BYTES = 8 * MIB
_SYSCALL_BYTES = GIB
_DEFAULT_FREE_FRACTION = 0.95
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def _text(error: OSError) -> str:
    return error.strerror or str(error)


class PosixTier(Tier):
    """One extent file in one directory.

    The file is never given a name, so its space returns to the drive when the process
    ends, however it ends. It grows in steps and never shrinks: rewriting allocated
    blocks is twice as fast as writing new ones.

    Args:
        path: A directory on the drive.
        streams: Copy between device and staging memory.
        arena: Gives staging memory; shared with whoever wants loads without staging.
        disk_bytes: Bound on the file, or None for the space free now minus 5 %.
        device: The training device; tensors of :meth:`write` and :meth:`read` are on it.

    Raises:
        StorageError: No file can be created in the directory.
    """

    name = "ssd"

    def __init__(
        self, path: str, *, streams: Streams, arena: HostArena, disk_bytes: int | None, device: torch.device
    ) -> None:
        """Probe the directory and open the extent file, empty."""
        self._path = path
        self._streams = streams
        self._arena = arena
        self._is_host = device.type == "cpu"
        try:
            self._report = probe_directory(path)
            self._fd, _ = open_unlinked(path, direct=self._report.supports_direct)
        except OSError as error:
            raise StorageError(
                f"cannot create the extent file: in `{path}` ({error.strerror})",
                errno=error.errno,
                path=path,
                hint=f"ask `ssdtrain doctor {path}` what is wrong with the directory",
            ) from error
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self._close_fd.atexit = False  # worker threads may still run then; the kernel closes it
        if not self._report.supports_direct:
            logger.warning(
                "`%s` is used through the page cache (O_DIRECT %s); hint: choose a directory on ext4 or xfs on a drive",
                path,
                self._report.direct_reason,
            )
        self._memory_alignment = self._report.alignment_bytes
        self._length_alignment = max(self._memory_alignment, _EXTENT_ALIGNMENT) if self.is_direct else 1
        self._allocator = ExtentAllocator(max(self._memory_alignment, _EXTENT_ALIGNMENT))
        if disk_bytes is None:
            disk_bytes = int(self._report.free_bytes * _DEFAULT_FREE_FRACTION)
        self._limit_bytes = round_down(disk_bytes, self._allocator.alignment)
        self._file_bytes = 0
        self._lock = threading.RLock()
        self._num_active = 0
        self._is_closed = False

    @property
    def report(self) -> DirectoryReport:
        """What the directory can do."""
        return self._report

    @property
    def is_direct(self) -> bool:
        """The page cache is bypassed."""
        return self._report.supports_direct

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now."""
        with self._lock:
            return self._allocator.used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes left of the budget; the drive may have less."""
        with self._lock:
            return 0 if self._is_closed else self._limit_bytes - self._allocator.used_bytes

    def describe(self) -> str:
        """Name directory, file system, access and capacity in one line."""
        access = f"O_DIRECT ({self._memory_alignment}-byte alignment)" if self.is_direct else "buffered I/O"
        limit = format_bytes(self._limit_bytes)
        return f"ssd: `{self._path}` ({self._report.file_system}), {access}, up to {limit}"

    def allocate(self, nbytes: int) -> Extent:
        """Reserve room, growing the file if need be; see :meth:`Tier.allocate`."""
        with self._lock:
            if self._is_closed:
                raise self._no_room(nbytes, "the tier is closed", None, "close it after the last store")
            extent = self._allocator.allocate(nbytes, self._file_bytes)
            if extent is None:
                self._grow(nbytes)
                extent = self._allocator.allocate(nbytes, self._file_bytes)
            if extent is None:
                raise StateError(f"a file grown to {self._file_bytes} bytes has no room for {nbytes}")
            return extent

    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        """Write all of ``source``; see :meth:`Tier.write`."""
        with self._transfer(extent, source, StoreError):
            begin = self._in_place_bytes(extent, source)
            self._write_at(extent, source.data_ptr(), 0, begin)
            if begin < extent.nbytes:
                self._write_staged(extent, source, begin, ready)

    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        """Read all of ``extent``; see :meth:`Tier.read`."""
        with self._transfer(extent, target, LoadError):
            begin = self._in_place_bytes(extent, target)
            self._read_at(extent, target.data_ptr(), 0, begin)
            if begin < extent.nbytes:
                return self._read_staged(extent, target, begin, ready)
            return DeviceEvent()  # only CPU tensors are read in place

    def free(self, extent: Extent) -> None:
        """Give an extent back; its bytes in the file are used again."""
        with self._lock:
            if not self._is_closed:
                self._allocator.free(extent)

    def close(self) -> None:
        """Let the file and its space go, at once or with the end of the last transfer under way.

        It never waits: a transfer may hang in the kernel, and the collector may call
        this in the very thread that transfers.
        """
        with self._lock:
            self._is_closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        # A closed descriptor's number is reused: a late write would hit another file.
        if self._is_closed and self._num_active == 0:
            with contextlib.suppress(OSError):  # late write errors: nobody needs the bytes
                self._close_fd()

    # Growth

    def _grow(self, nbytes: int) -> None:
        """Make room for one extent of ``nbytes`` at the end of the file.

        Raises:
            CapacityError: The budget or the drive has no room.
        """
        need_bytes = self._allocator.high_water_bytes + round_up(nbytes, self._allocator.alignment)
        if need_bytes > self._limit_bytes:
            left_bytes = self._limit_bytes - self._allocator.used_bytes
            pieces = "in pieces, " if left_bytes >= nbytes else ""
            reason = f"{format_bytes(left_bytes)} left {pieces}of {format_bytes(self._limit_bytes)}"
            raise self._no_room(nbytes, reason, None, "raise `disk_bytes` or lower `offload_fraction`")
        step_bytes = min(max(need_bytes, self._file_bytes + _GROWTH_BYTES), self._limit_bytes)
        try:
            self._resize(step_bytes)
        except OSError as error:
            if error.errno not in _FULL:
                hint = "look for drive errors in `dmesg`"
                raise self._no_room(nbytes, _text(error), error.errno, hint) from error
            try:
                self._resize(need_bytes)
            except OSError as final:
                reason = f"{_text(final)}, {format_bytes(self._drive_free_bytes())} free"
                hint = f"lower `offload_fraction` or free space in `{self._path}`"
                raise self._no_room(nbytes, reason, final.errno, hint) from final

    def _resize(self, nbytes: int) -> None:
        try:
            os.posix_fallocate(self._fd, self._file_bytes, nbytes - self._file_bytes)
        except OSError as error:
            # What was allocated before it failed goes back.
            os.ftruncate(self._fd, self._file_bytes)
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(self._fd, nbytes)  # sparse: a full drive shows at the write
        self._file_bytes = nbytes

    def _drive_free_bytes(self) -> int:
        space = os.fstatvfs(self._fd)
        return space.f_bavail * space.f_frsize

    def _no_room(self, nbytes: int, reason: str, error_number: int | None, hint: str) -> CapacityError:
        offset = self._allocator.high_water_bytes
        return CapacityError(
            f"cannot store activation: {format_bytes(nbytes)} to `{self._path}` at {offset} ({reason})",
            errno=error_number,
            path=self._path,
            offset=offset,
            nbytes=nbytes,
            hint=f"{hint}; the tensor stays in memory meanwhile",
        )

    # Transfers

    @contextlib.contextmanager
    def _transfer(self, extent: Extent, tensor: Tensor, kind: type[StorageError]) -> Iterator[None]:
        """Hold the file open for one transfer, and map the lack of staging memory."""
        if tensor.numel() != extent.nbytes or tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            raise StateError(
                f"a transfer of {extent.nbytes} bytes was given a tensor of {tensor.numel()} {tensor.dtype} "
                "(expected as many, uint8, contiguous)"
            )
        with self._lock:
            if self._is_closed:
                raise self._failure(kind, extent, extent.offset, extent.nbytes, "the tier is closed", None)
            if extent not in self._allocator:
                raise StateError(f"a transfer at {extent.offset} uses an extent that is not allocated")
            self._num_active += 1
        try:
            yield
        except CapacityError as error:
            reason = f"no staging memory: {error.message}"
            raise self._failure(kind, extent, extent.offset, extent.nbytes, reason, error.errno) from error
        finally:
            with self._lock:
                self._num_active -= 1
                self._close_if_unused()

    def _in_place_bytes(self, extent: Extent, tensor: Tensor) -> int:
        """Count the bytes, from the first, that the drive may move without staging."""
        if not self._is_host or tensor.data_ptr() % self._memory_alignment:
            return 0
        whole_bytes = round_down(extent.nbytes, self._length_alignment)
        if whole_bytes < extent.nbytes and self._length_alignment == BLOCK_ALIGNMENT and self._arena.is_block(tensor):
            return round_up(extent.nbytes, BLOCK_ALIGNMENT)
        return whole_bytes

    @contextlib.contextmanager
    def _staging(self, count: int, nbytes: int) -> Iterator[list[Tensor]]:
        """Lend ``count`` blocks of (nbytes rounded up,) host memory, aligned as the drive wants.

        The list is emptied at the end: the frames that an exception keeps alive would
        keep the blocks too. So no local variable may name one.
        """
        nbytes = round_up(nbytes, self._length_alignment)
        blocks: list[Tensor] = []
        try:
            for _ in range(count):
                blocks.append(self._staging_block(nbytes))
            yield blocks
        finally:
            blocks.clear()

    def _staging_block(self, nbytes: int) -> Tensor:
        if self._memory_alignment <= BLOCK_ALIGNMENT:
            return self._arena.tensor(nbytes)
        block = self._arena.tensor(nbytes + self._memory_alignment)
        skip_bytes = -block.data_ptr() % self._memory_alignment
        return block[skip_bytes : skip_bytes + nbytes]

    def _chunks(self, extent: Extent, begin: int) -> list[tuple[int, int]]:
        """Cut ``begin`` to the end of the extent in pieces of one staging block."""
        starts = range(begin, extent.nbytes, _CHUNK_BYTES)
        return [(start, min(start + _CHUNK_BYTES, extent.nbytes)) for start in starts]

    def _write_staged(self, extent: Extent, source: Tensor, begin: int, ready: DeviceEvent) -> None:
        """Copy one chunk while the one before it is written."""
        chunks = self._chunks(extent, begin)
        with self._staging(min(len(chunks), 2), min(extent.nbytes - begin, _CHUNK_BYTES)) as blocks:
            copied: list[DeviceEvent] = []
            try:
                for index, (start, end) in enumerate(chunks):
                    # This block's last write has returned: two writes ago.
                    block = blocks[index % 2][: end - start]
                    copied.append(self._streams.copy_to_host(block, source[start:end], ready))
                    del block
                    if index > 0:
                        self._write_chunk(extent, chunks[index - 1], blocks[(index - 1) % 2], copied[index - 1])
                self._write_chunk(extent, chunks[-1], blocks[(len(chunks) - 1) % 2], copied[-1])
            finally:
                # Staging may be given to another thread only after the copies into it.
                for event in copied[-2:]:
                    event.synchronize()

    def _write_chunk(self, extent: Extent, chunk: tuple[int, int], block: Tensor, copied: DeviceEvent) -> None:
        start, end = chunk
        address = block.data_ptr()
        del block  # see _staging
        copied.synchronize()
        self._write_at(extent, address, start, round_up(end - start, self._length_alignment))

    def _read_staged(self, extent: Extent, target: Tensor, begin: int, ready: DeviceEvent) -> DeviceEvent:
        """Read one chunk while the one before it is copied; return with all copies done."""
        chunks = self._chunks(extent, begin)
        with self._staging(min(len(chunks), 2), min(extent.nbytes - begin, _CHUNK_BYTES)) as blocks:
            copied: list[DeviceEvent] = []
            try:
                for index, (start, end) in enumerate(chunks):
                    if index >= 2:
                        copied[index - 2].synchronize()
                    size = round_up(end - start, self._length_alignment)
                    self._read_at(extent, blocks[index % 2].data_ptr(), start, size)
                    block = blocks[index % 2][: end - start]
                    copied.append(self._streams.copy_to_device(target[start:end], block, ready))
                    del block
            finally:
                # Staging may be given to another thread only after the copies out of it.
                for event in copied[-2:]:
                    event.synchronize()
            return copied[-1]

    def _write_at(self, extent: Extent, address: int, start: int, nbytes: int) -> None:
        """Write memory to ``extent`` from its byte ``start`` on, or raise."""
        for skip in range(0, nbytes, _SYSCALL_BYTES):
            size, offset = min(_SYSCALL_BYTES, nbytes - skip), extent.offset + start + skip
            try:
                count = os.pwritev(self._fd, [memory_at(address + skip, size)], offset)
            except OSError as error:
                raise self._failure(StoreError, extent, offset, size, _text(error), error.errno) from error
            if count != size:
                reason = f"wrote {count} bytes, expected {size}"
                raise self._failure(StoreError, extent, offset, size, reason, None)

    def _read_at(self, extent: Extent, address: int, start: int, nbytes: int) -> None:
        """Read from ``extent`` from its byte ``start`` on to memory, or raise."""
        for skip in range(0, nbytes, _SYSCALL_BYTES):
            size, offset = min(_SYSCALL_BYTES, nbytes - skip), extent.offset + start + skip
            try:
                count = os.preadv(self._fd, [memory_at(address + skip, size)], offset)
            except OSError as error:
                raise self._failure(LoadError, extent, offset, size, _text(error), error.errno) from error
            if count != size:
                reason = f"read {count} bytes, expected {size}"
                raise self._failure(LoadError, extent, offset, size, reason, None)

    def _failure(
        self,
        kind: type[StorageError],
        extent: Extent,
        offset: int,
        nbytes: int,
        reason: str,
        error_number: int | None,
    ) -> StorageError:
        is_store = kind is StoreError
        outcome = "the tensor stays in memory" if is_store else "the bytes are lost: resume from a checkpoint"
        if error_number in _FULL:
            reason = f"{reason}, {format_bytes(self._drive_free_bytes())} free"
        return kind(
            f"cannot {'store' if is_store else 'load'} activation: {format_bytes(extent.nbytes)} "
            f"{'to' if is_store else 'from'} `{self._path}` at {offset} ({reason})",
            errno=error_number,
            path=self._path,
            offset=offset,
            nbytes=nbytes,
            hint=f"look for drive errors in `dmesg`; {outcome}",
        )
