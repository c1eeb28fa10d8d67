"""What a directory can do, found by trying; no table of file systems to go stale.

Access bits do not decide: root passes them on a file system that refuses it, and a
container may refuse what they allow. Every question is asked with an unlinked file,
so nothing is left behind whatever happens.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import stat
from dataclasses import dataclass

from ssdtrain_plugin.storage.scratch import file_system_of, open_scratch
from ssdtrain_plugin.units import KIB, MIB, format_bytes

__all__ = ["MIN_FREE_BYTES", "DirectoryReport", "directory_problem", "probe_directory", "stranger_problem"]

MIN_FREE_BYTES = 64 * MIB
"""A directory with less free space is not worth using."""

_ALIGNMENTS = tuple(512 << shift for shift in range(8))  # 512 B to 64 KiB
_BLOCK_BYTES = 4 * KIB


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """What a directory can do.

    Attributes:
        path: As given.
        file_system: Type, for example ``ext4``; ``unknown`` if the system does not say.
        is_writable: A file can be created in it and written.
        supports_tmpfile: Files can be created without a name.
        supports_direct: O_DIRECT reads and writes work.
        direct_reason: What was found out about O_DIRECT, in words that follow its name.
        alignment_bytes: Smallest alignment of memory, offset and length that O_DIRECT
            accepts; 1 where it does not work.
        free_bytes: Space left for this user.
        total_bytes: Size of the file system.
    """

    path: str
    file_system: str
    is_writable: bool
    supports_tmpfile: bool
    supports_direct: bool
    direct_reason: str
    alignment_bytes: int
    free_bytes: int
    total_bytes: int


def probe_directory(path: str) -> DirectoryReport:
    """Find out what a directory can do. Leaves nothing behind.

    Args:
        path: An existing directory, relative or absolute.

    Raises:
        OSError: It does not exist or cannot be looked at.
    """
    space = os.statvfs(path)
    try:
        scratch = open_scratch(path, direct=False)
    except OSError as error:
        is_writable, how, alignment_bytes, reason = False, "", 1, f"no file can be created: {error.strerror}"
    else:
        how = scratch.how
        try:
            os.pwrite(scratch.fd, bytes(_BLOCK_BYTES), 0)
            is_writable = True
        except OSError:
            is_writable = False
        finally:
            scratch.close()
        alignment_bytes, reason = _find_alignment(path)
    return DirectoryReport(
        path=path,
        file_system=file_system_of(path),
        is_writable=is_writable,
        supports_tmpfile=how == "O_TMPFILE",
        supports_direct=alignment_bytes > 1,
        direct_reason=reason,
        alignment_bytes=alignment_bytes,
        free_bytes=space.f_bavail * space.f_frsize,
        total_bytes=space.f_blocks * space.f_frsize,
    )


def directory_problem(path: str) -> str | None:
    """Say in one line why a directory cannot hold activations.

    Args:
        path: Relative or absolute.

    Returns:
        ``<path>: <got> (expected <want>)``, or None if nothing is wrong.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            return f"`{path}`: not a directory (expected a writable directory on the drive)"
        stranger = stranger_problem(mode)
        if stranger is not None:
            return f"`{path}`: {stranger}"
        scratch = open_scratch(path, direct=False)
        try:
            if os.pwrite(scratch.fd, bytes(_BLOCK_BYTES), 0) != _BLOCK_BYTES:
                return f"`{path}`: a write of {_BLOCK_BYTES} bytes was cut short (expected room for it)"
            os.fdatasync(scratch.fd)  # network file systems refuse late
            space = os.fstatvfs(scratch.fd)
            free_bytes = space.f_bavail * space.f_frsize
        finally:
            scratch.close()
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.isdir(path):
            return f"`{path}`: takes no new files (expected a writable directory on the drive)"
        return f"`{path}`: {_refusal(error)}"
    except ValueError as error:  # a null character in the path
        return f"`{path!r}`: {error} (expected a path)"
    if free_bytes < MIN_FREE_BYTES:
        want = f"expected at least {format_bytes(MIN_FREE_BYTES)}"
        return f"`{path}`: only {format_bytes(free_bytes)} free ({want})"
    return None


def stranger_problem(mode: int) -> str | None:
    """Say why nothing in a directory is safe from other users.

    Args:
        mode: Of the directory.

    Returns:
        ``<got> (expected <want>)``, or None if nothing is wrong.
    """
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        got = f"mode {stat.S_IMODE(mode):04o}, every user may rename and remove what is in it"
        return f"{got} (expected the sticky bit, `chmod +t`, or nobody else to write, `chmod o-w`)"
    return None


def _refusal(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "no such directory (expected a writable directory on the drive)"
        case errno.ENOTDIR:
            return "not a directory (expected a writable directory on the drive)"
        case errno.EACCES | errno.EPERM:
            return f"not writable by user {os.geteuid()} (expected permission to create files)"
        case errno.EROFS:
            return "read-only file system (expected one mounted read-write)"
        case errno.ENOSPC:
            return f"file system is full (expected at least {format_bytes(MIN_FREE_BYTES)} free)"
        case errno.EDQUOT:
            return f"disk quota is used up (expected at least {format_bytes(MIN_FREE_BYTES)} left)"
    return f"cannot create a file: {error.strerror} (expected a writable directory on the drive)"


def _find_alignment(path: str) -> tuple[int, str]:
    """Return the smallest alignment that O_DIRECT accepts (1: none), and the reason in words."""
    try:
        scratch = open_scratch(path, direct=True)
    except OSError as error:
        return 1, f"refused by the file system: {error.strerror}"
    refusal = "no alignment was tried"
    try:
        for alignment in _ALIGNMENTS:
            try:
                if _moves_block(scratch.fd, alignment):
                    return alignment, f"works with {alignment}-byte alignment"
                refusal = "bytes came back short or changed"
            except OSError as error:
                refusal = error.strerror or str(error)
                if error.errno != errno.EINVAL:
                    break
    finally:
        scratch.close()
    return 1, f"a file opens but transfers fail: {refusal}"


def _moves_block(fd: int, alignment: int) -> bool:
    """Write and read back one block whose memory and offset are aligned to ``alignment`` and no better."""
    memory = mmap.mmap(-1, 6 * alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # From a multiple of twice the alignment, odd multiples are aligned no better.
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % (2 * alignment)
    source = memoryview(memory)[begin + alignment : begin + 2 * alignment]
    target = memoryview(memory)[begin + 3 * alignment : begin + 4 * alignment]
    source[:] = secrets.token_bytes(alignment)
    if os.pwritev(fd, [source], alignment) != alignment:
        return False
    return os.preadv(fd, [target], alignment) == alignment and target == source
