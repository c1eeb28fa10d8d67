"""What a directory can do, found by trying; no table of file systems to go stale.

Access bits do not decide: root passes them on a file system that refuses it, and a
container may refuse what they allow. Every question is asked with an unlinked file,
so nothing is left behind whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from ssdtrain_plugin.units import KIB, MIB, format_bytes

__all__ = ["MIN_FREE_BYTES", "DirectoryReport", "directory_problem", "open_unlinked", "probe_directory"]

MIN_FREE_BYTES = 64 * MIB
"""A directory with less free space is not worth using."""

_ALIGNMENTS = tuple(512 << shift for shift in range(8))  # 512 B to 64 KiB
_BLOCK_BYTES = 4 * KIB
# O_TMPFILE is refused so by file systems without it, and by kernels that read it as a directory.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.ENOSYS})


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


def open_unlinked(directory: str, *, direct: bool) -> tuple[int, str]:
    """Open a new file that has no name, mode 0600, for reading and writing.

    The kernel frees its space when the last descriptor closes, also after SIGKILL.

    Args:
        directory: Where the space comes from.
        direct: With O_DIRECT.

    Returns:
        The descriptor and how it was made: ``O_TMPFILE``, or ``unlinked`` where the
        file system has none and the file had a name for a moment.

    Raises:
        OSError: It cannot be created, or O_DIRECT is refused (``EINVAL``).
    """
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600), "O_TMPFILE"
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    name = os.path.join(directory, f".ssdtrain-{secrets.token_hex(16)}")
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise
    except OSError:
        # A refused O_DIRECT may leave behind the file that O_CREAT has just made.
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    try:
        os.unlink(name)
    except OSError:
        os.close(fd)
        raise
    return fd, "unlinked"


def probe_directory(path: str) -> DirectoryReport:
    """Find out what a directory can do. Leaves nothing behind.

    Args:
        path: An existing directory, relative or absolute.

    Raises:
        OSError: It does not exist or cannot be looked at.
    """
    space = os.statvfs(path)
    try:
        fd, how = open_unlinked(path, direct=False)
    except OSError as error:
        is_writable, how, alignment_bytes, reason = False, "", 1, f"no file can be created: {error.strerror}"
    else:
        try:
            os.pwrite(fd, bytes(_BLOCK_BYTES), 0)
            is_writable = True
        except OSError:
            is_writable = False
        finally:
            os.close(fd)
        alignment_bytes, reason = _find_alignment(path)
    return DirectoryReport(
        path=path,
        file_system=_file_system(path),
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
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return f"`{path}`: not a directory (expected a writable directory on the drive)"
        fd, _ = open_unlinked(path, direct=False)
        try:
            if os.pwrite(fd, bytes(_BLOCK_BYTES), 0) != _BLOCK_BYTES:
                return f"`{path}`: a write of {_BLOCK_BYTES} bytes was cut short (expected room for it)"
            os.fdatasync(fd)  # network file systems refuse late
            free_bytes = os.fstatvfs(fd).f_bavail * os.fstatvfs(fd).f_frsize
        finally:
            os.close(fd)
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
        fd, _ = open_unlinked(path, direct=True)
    except OSError as error:
        return 1, f"refused by the file system: {error.strerror}"
    refusal = "no alignment was tried"
    try:
        for alignment in _ALIGNMENTS:
            try:
                if _moves_block(fd, alignment):
                    return alignment, f"works with {alignment}-byte alignment"
                refusal = "bytes came back short or changed"
            except OSError as error:
                refusal = error.strerror or str(error)
                if error.errno != errno.EINVAL:
                    break
    finally:
        os.close(fd)
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


def _file_system(path: str) -> str:
    """Return the type of the mount that holds ``path``: the longest mount point, the last of equals."""
    real = os.path.realpath(path)
    best_point, best_type = "", "unknown"
    try:
        lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return best_type
    for line in lines:
        fields, _, tail = line.partition(" - ")
        point = fields.split(" ")[4]
        for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(code, character)
        is_parent = point == "/" or real == point or real.startswith(point + "/")
        if is_parent and len(point) >= len(best_point):
            best_point, best_type = point, tail.split(" ")[0]
    return best_type
