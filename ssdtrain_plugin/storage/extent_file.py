"""One file without a name that grows in steps, and who has which part of it. Moves no bytes.

The file is as nameless as the file system allows, so its space returns to the drive when the process
ends, however it ends. Rewriting allocated blocks is twice as fast as writing new
ones, so space that is freed is used again first and goes back to the drive only
when a long time has shown that it is not needed.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

from ssdtrain_plugin.errors import CapacityError, StateError, StorageError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.extents import ExtentAllocator, round_down, round_up
from ssdtrain_plugin.storage.impatience import Impatience
from ssdtrain_plugin.storage.probe import DirectoryReport
from ssdtrain_plugin.storage.scratch import open_scratch
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["FULL", "ExtentFile"]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers that say: no room, and nothing is broken."""

_EXTENT_ALIGNMENT = 4096  # file systems serialise writes of parts of their blocks
_GROWTH_BYTES = 256 * MIB
_MIN_PIECE_BYTES = MIB  # a drive moves pieces of this size about as fast as larger ones
_DEFAULT_FREE_FRACTION = 0.95
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class ExtentFile:
    """The file of one directory and its allocator.

    Args:
        report: Of the directory.
        disk_bytes: Bound on the file, or None for the space free now minus 5 %.

    Raises:
        StorageError: No file can be created in the directory.

    Threads:
        Any. Changing its size takes system calls; the lock that transfers need is not held
        meanwhile. A call that hangs is left to its thread, and keeps the descriptor open.

    Attributes:
        fd: Open for reading and writing, with O_DIRECT where it works.
        path: The directory.
        limit_bytes: Bound on the file.
    """

    def __init__(self, report: DirectoryReport, disk_bytes: int | None) -> None:
        """Open the file, empty."""
        self.path = report.path
        try:
            scratch = open_scratch(self.path, direct=report.supports_direct)
        except OSError as error:
            raise cannot_create(self.path, error) from error
        self.fd = scratch.fd
        self._remove_name = scratch.remove_name
        self._close_fd = weakref.finalize(self, scratch.close)
        self._close_fd.atexit = False  # worker threads may still run then; the kernel closes it
        alignment = max(report.alignment_bytes, _EXTENT_ALIGNMENT)
        self._allocator = ExtentAllocator(alignment, min_piece_bytes=_MIN_PIECE_BYTES)
        if disk_bytes is None:
            disk_bytes = int(report.free_bytes * _DEFAULT_FREE_FRACTION)
        self.limit_bytes = round_down(disk_bytes, self._allocator.alignment)
        self._file_bytes = 0
        self._peak_bytes = 0
        # Reentrant: a collection inside a locked region may run a finalizer that closes the tier.
        self._growing = threading.RLock()
        self._lock = threading.RLock()
        self._num_active = 0
        self._is_closed = False
        self._calls = Impatience(math.inf)
        self._hanging: set[Extent] = set()

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now."""
        with self._lock:
            return self._allocator.used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes left of the bound; the drive may have less."""
        with self._lock:
            return 0 if self._is_closed else self.limit_bytes - self._allocator.used_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self._file_bytes

    def allocate(self, nbytes: int) -> Extent:
        """Reserve room, growing the file if need be.

        Args:
            nbytes: At least 1.

        Raises:
            CapacityError: The bound or the drive has no room.
        """
        with self._growing:
            extent = self._allocate(nbytes)
            if extent is None:
                self._grow(nbytes)
                extent = self._allocate(nbytes)
            if extent is None:
                raise StateError(f"a file grown to {self._file_bytes} bytes has no room for {nbytes}")
            return extent

    def free(self, extent: Extent) -> None:
        """Give an extent back; its bytes in the file are used again.

        Raises:
            StateError: It was freed before, or is not from here.
        """
        with self._lock:
            self._hanging.discard(extent)
            if not self._is_closed:
                self._allocator.free(extent)

    def give_up_after(self, timeout_seconds: float) -> None:
        """Bound how long the system may take to change the size of the file; else it may take for ever.

        Args:
            timeout_seconds: See :class:`Impatience`.
        """
        with self._growing:
            self._calls = Impatience(timeout_seconds)

    def hangs(self, extent: Extent) -> None:
        """Note that a transfer does not return: until its extent is freed, the file is not made shorter.

        Args:
            extent: Live.
        """
        with self._lock:
            self._hanging.add(extent)

    @contextlib.contextmanager
    def transfer(self, extent: Extent) -> Iterator[bool]:
        """Hold the file open while bytes of an extent move.

        Gives False if the file is closed: then nothing may be moved.

        Raises:
            StateError: The extent is not live.
        """
        with self._lock:
            is_open = not self._is_closed
            if is_open and extent not in self._allocator:
                raise StateError(f"a transfer at {extent.offset} uses an extent that is not allocated")
            self._num_active += is_open
        try:
            yield is_open
        finally:
            with self._lock:
                self._num_active -= is_open
                self._close_if_unused()

    def live_extents(self) -> list[Extent]:
        """List the extents that are not freed; also when it is closed."""
        with self._lock:
            return self._allocator.live()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the descriptor open although it is closed; for who has something to do at the end."""
        with self._lock:
            self._num_active += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_active -= 1
                self._close_if_unused()

    def trim(self) -> int:
        """Give back to the drive what has not been in use since the last call, but for a reserve.

        Returns:
            Bytes given back.

        Raises:
            StorageError: The drive did not take them. The file is as it was, and its space is used on.
        """
        with self._growing:  # so nothing is allocated meanwhile
            with self._lock:
                if self._is_closed or self._hanging or self._calls.is_stuck:
                    return 0  # a call to a drive that hangs would hang too
                peak_bytes, self._peak_bytes = self._peak_bytes, self._allocator.high_water_bytes
                keep_bytes = round_up(peak_bytes, _GROWTH_BYTES) + _GROWTH_BYTES
                before_bytes = self._file_bytes
                surplus_bytes = before_bytes - keep_bytes
                if surplus_bytes < _GROWTH_BYTES:
                    return 0
                self._file_bytes = keep_bytes
            try:
                self._call(partial(os.ftruncate, self.fd, keep_bytes), 0)  # it moves no bytes
            except OSError as error:
                if error.errno != errno.ETIMEDOUT:  # else it may cut them off at any time
                    self._file_bytes = before_bytes
                raise StorageError(
                    f"cannot give space back: {format_bytes(surplus_bytes)} to the drive of `{self.path}` "
                    f"({error.strerror or error})",
                    errno=error.errno,
                    path=self.path,
                    nbytes=surplus_bytes,
                    hint="look for drive errors in `dmesg`; the space is used on meanwhile",
                ) from error
            return surplus_bytes

    def close(self) -> None:
        """Let the file and its space go, at once or with the end of the last transfer under way.

        It never waits: a transfer may hang in the kernel, and the collector may call
        this in the very thread that transfers.
        """
        with self._lock:
            if not self._is_closed:
                self._remove_name()  # now: a transfer that hangs would keep it for ever
            self._is_closed = True
            self._close_if_unused()

    @property
    def is_unused(self) -> bool:
        """It is closed and no transfer is under way."""
        with self._lock:
            return self._is_closed and self._num_active == 0

    def free_words(self) -> str:
        """Say how much the file system has free, for messages about errors; it may fail as they did."""
        try:
            return f"{format_bytes(self.drive_free_bytes())} free"
        except OSError as error:
            return f"free space unknown: {error.strerror or error}"

    def drive_free_bytes(self) -> int:
        """Ask the file system how much is free for this user.

        Raises:
            OSError: It does not say.
        """
        space = os.statvfs(self.path) if self._is_closed else os.fstatvfs(self.fd)
        return space.f_bavail * space.f_frsize

    def _close_if_unused(self) -> None:
        # A closed descriptor's number is reused: a late write would hit another file.
        if self._is_closed and self._num_active == 0:
            with contextlib.suppress(OSError):  # late write errors: nobody needs the bytes
                self._close_fd()

    def _allocate(self, nbytes: int) -> Extent | None:
        with self._lock:
            if self._is_closed:
                raise self._no_room(nbytes, "the tier is closed", None, "close it after the last store")
            extent = self._allocator.allocate(nbytes, self._file_bytes)
            self._peak_bytes = max(self._peak_bytes, self._allocator.high_water_bytes)
            return extent

    def _grow(self, nbytes: int) -> None:
        """Make room for one extent of ``nbytes`` at the end of the file.

        Raises:
            CapacityError: The bound or the drive has no room.
        """
        with self._lock:
            need_bytes = self._allocator.high_water_bytes + round_up(nbytes, self._allocator.alignment)
            left_bytes = self.limit_bytes - self._allocator.used_bytes
        if need_bytes > self.limit_bytes:
            pieces = "in pieces, " if left_bytes >= nbytes else ""
            reason = f"{format_bytes(left_bytes)} left {pieces}of {format_bytes(self.limit_bytes)}"
            raise self._no_room(nbytes, reason, None, "raise `disk_bytes` or lower `offload_fraction`")
        step_bytes = min(max(need_bytes, self._file_bytes + _GROWTH_BYTES), self.limit_bytes)
        try:
            self._call(partial(self._extend, need_bytes, step_bytes), step_bytes - self._file_bytes)
        except OSError as error:
            reason, hint = error.strerror or str(error), "look for drive errors in `dmesg`"
            if error.errno == errno.ETIMEDOUT:
                hint += ", or raise `io_timeout_seconds` for a slow drive"
            elif error.errno in FULL:
                reason = f"{reason}, {self.free_words()}"
                hint = f"lower `offload_fraction` or free space in `{self.path}`"
            raise self._no_room(nbytes, reason, error.errno, hint) from error

    def _call(self, call: Callable[[], None], nbytes: int) -> None:
        """Have the size changed, with the descriptor held open until the call returns, however late.

        Raises:
            OSError: The system refused, or did not answer in time.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(self.hold())
            if self._is_closed:
                raise OSError(errno.EBADF, "the tier is closed")
            self._calls.run(call, nbytes, at_end=held.pop_all().close)

    def _extend(self, need_bytes: int, step_bytes: int) -> None:
        """Grow the file to ``step_bytes``, or to what is needed if there is no room for more."""
        if step_bytes - self._file_bytes > self.drive_free_bytes():
            # A call that fails has held all that was left for a moment, and another rank's store fails of it.
            step_bytes = need_bytes
        try:
            self._resize(step_bytes)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._resize(need_bytes)

    def _resize(self, nbytes: int) -> None:
        try:
            os.posix_fallocate(self.fd, self._file_bytes, nbytes - self._file_bytes)
        except OSError as error:
            # What was allocated before it failed goes back.
            os.ftruncate(self.fd, self._file_bytes)
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(self.fd, nbytes)  # sparse: a full drive shows at the write
        self._file_bytes = nbytes

    def _no_room(self, nbytes: int, reason: str, error_number: int | None, hint: str) -> CapacityError:
        offset = self._allocator.high_water_bytes
        return CapacityError(
            f"cannot store activation: {format_bytes(nbytes)} to `{self.path}` at {offset} ({reason})",
            errno=error_number,
            path=self.path,
            offset=offset,
            nbytes=nbytes,
            hint=f"{hint}; the tensor stays in memory meanwhile",
        )


def cannot_create(path: str, error: OSError) -> StorageError:
    """Make the error for a directory in which no file can be created.

    Args:
        path: The directory.
        error: What the system said.
    """
    return StorageError(
        f"cannot create the extent file: in `{path}` ({error.strerror})",
        errno=error.errno,
        path=path,
        hint=f"ask `ssdtrain doctor {path}` what is wrong with the directory",
    )
