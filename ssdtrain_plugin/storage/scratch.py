"""A file for bytes that nobody may find: without a name if the file system can do that.

Note [Names]. ``O_TMPFILE`` makes a file that never has a name. Where it is refused (overlayfs
of older kernels, NFS, some FUSE), a file is created with a name, and the name is taken away
at once; where even that fails (some FUSE and SMB), it stays until the file is closed. Such names
are made in a directory of our own below the given one: mode 0700, its name not to be
foreseen, ours by its owner. So nobody can put a link in our way, nor see what we create. The name
tells which process it belongs to, and whoever makes the next file removes those of
processes that are certainly dead. The directory goes with the last file in it.

Every step goes by descriptors of directories, never along a path twice, and follows no link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path

from ssdtrain_plugin.storage.owners import is_dead, new_name, owner_of, this_process

__all__ = ["LOCAL_FILE_SYSTEMS", "ScratchFile", "file_system_of", "open_scratch"]

LOCAL_FILE_SYSTEMS = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
"""Serve one machine. On others a file may be of a process that runs elsewhere, and is left alone."""

# O_TMPFILE is refused so by file systems without it, and by kernels that read it as a directory.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.ENOSYS})
_FOLDER = re.compile(r"\.ssdtrain-(\d+)-[0-9a-f]{32}")
_ATTEMPTS = 16
_BLOCK_BYTES = 4096


class _Folder:
    """Our own directory inside another one, by descriptors."""

    def __init__(self, parent: int, name: str, fd: int) -> None:
        self._parent = parent
        self._name = name
        self.fd = fd

    def close(self) -> None:
        """Let go of it; it disappears if it is empty."""
        with contextlib.suppress(OSError):  # not empty: somebody else of this user has a file in it
            os.rmdir(self._name, dir_fd=self._parent)
        os.close(self.fd)
        os.close(self._parent)


class ScratchFile:
    """An open file, mode 0600 from birth, that goes when it is closed or its process ends.

    Args:
        fd: For reading and writing; belongs to this object.
        how: ``O_TMPFILE``, ``unlinked`` or ``named``: Note [Names].
        folder: Where its name is, for ``named``.
        name: Its name, for ``named``.

    Attributes:
        fd: As given.
        how: As given.
    """

    def __init__(self, fd: int, how: str, folder: _Folder | None = None, name: str = "") -> None:
        """Take the descriptor over."""
        self.fd = fd
        self.how = how
        self._folder = folder
        self._name = name
        self._owner_pid = os.getpid()

    def remove_name(self) -> None:
        """Take its name away if it has one; what still moves its bytes may fail then.

        A forked child does nothing: the name is its parent's.
        """
        if self._folder is None or os.getpid() != self._owner_pid:
            return
        with contextlib.suppress(OSError):  # some file systems refuse while it is open
            os.unlink(self._name, dir_fd=self._folder.fd)
            folder, self._folder = self._folder, None
            folder.close()

    def close(self) -> None:
        """Close it, and take its name away if it has one. Once.

        Raises:
            OSError: From closing; its descriptor and its name are gone all the same.
        """
        self.remove_name()
        try:
            os.close(self.fd)
        finally:
            self.remove_name()


def open_scratch(directory: str, *, direct: bool) -> ScratchFile:
    """Open a new file for reading and writing: Note [Names].

    The kernel frees its space when the last descriptor closes, also after SIGKILL; if the name
    had to stay, the next process that opens one here does.

    Args:
        directory: Where the space comes from.
        direct: With O_DIRECT.

    Raises:
        OSError: It cannot be created, or O_DIRECT is refused (``EINVAL``).
    """
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        return ScratchFile(os.open(directory, flags | os.O_TMPFILE, 0o600), "O_TMPFILE")
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    is_local = file_system_of(directory) in LOCAL_FILE_SYSTEMS
    gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
    for _ in range(_ATTEMPTS):
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _open_below(parent, flags, is_local=is_local)
        except FileNotFoundError as error:
            gone = error  # the last file of another process went, and our directory with it
    raise gone


def _open_below(parent: int, flags: int, *, is_local: bool) -> ScratchFile:
    """Open a file in our own directory; takes the descriptor of its parent over."""
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(os.close, parent)
        folder = _open_folder(parent)
        on_failure.pop_all()
    with contextlib.ExitStack() as at_end:
        at_end.callback(folder.close)
        _remove_stale(folder.fd, is_local=is_local)
        scratch = _create(folder, flags)
        if scratch.how == "named":
            at_end.pop_all()  # it closes the folder
    return scratch


def _create(folder: _Folder, flags: int) -> ScratchFile:
    """Create a file in our folder and take its name away, if the file then still works."""
    name, fd = _create_named(folder, flags)
    try:
        os.unlink(name, dir_fd=folder.fd)
    except OSError:
        return ScratchFile(fd, "named", folder, name)
    if _works_unlinked(fd):
        return ScratchFile(fd, "unlinked")
    os.close(fd)
    name, fd = _create_named(folder, flags)
    return ScratchFile(fd, "named", folder, name)


def _create_named(folder: _Folder, flags: int) -> tuple[str, int]:
    name = new_name(this_process())
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder.fd)
    except FileExistsError:
        raise
    except OSError:
        # A refused O_DIRECT may leave behind the file that O_CREAT has just made.
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder.fd)
        raise
    with contextlib.suppress(OSError):
        # Seen by whoever looks for stale files, also from another container; gone with the process.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return name, fd


def _works_unlinked(fd: int) -> bool:
    """Ask for what needs the file, not its name; some file systems then look for the name."""
    try:
        os.ftruncate(fd, _BLOCK_BYTES)
        os.ftruncate(fd, 0)
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_folder(parent: int) -> _Folder:
    """Open our own directory, one that is there or a new one.

    Raises:
        OSError: None can be made.
    """
    for name in sorted(os.listdir(parent)):
        match = _FOLDER.fullmatch(name)
        fd = _open_own(parent, name) if match is not None and int(match[1]) == os.geteuid() else None
        if fd is not None:
            return _Folder(parent, name, fd)
    name = f".ssdtrain-{os.geteuid()}-{secrets.token_hex(16)}"
    os.mkdir(name, 0o700, dir_fd=parent)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return _Folder(parent, name, os.open(name, flags, dir_fd=parent))


def _open_own(parent: int, name: str) -> int | None:
    """Open a directory if it is really ours and nobody else's; a link never is."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return None
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and status.st_mode & 0o777 == 0o700:
        return fd
    os.close(fd)
    return None


def _remove_stale(folder: int, *, is_local: bool) -> None:
    """Remove the files of processes that are certainly dead; leave all others, and what is not a file of ours."""
    me = this_process()
    if me is None:
        return  # without /proc nobody can be told from the dead
    for name in os.listdir(folder):
        owner = owner_of(name)
        if owner is None or not is_dead(owner, me, is_local=is_local):
            continue
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) and _is_unlocked(folder, name):
                os.unlink(name, dir_fd=folder)


def _is_unlocked(folder: int, name: str) -> bool:
    """Tell whether no process holds the file open; a child of a dead one may."""
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no such locks here; the name alone has to say it
    finally:
        os.close(fd)
    return True


def file_system_of(path: str) -> str:
    """Get the type of the file system that holds a path, for example ``ext4``.

    It is that of the longest mount point, the last of equals; ``unknown`` if the system does not say.

    Args:
        path: Relative or absolute.
    """
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
