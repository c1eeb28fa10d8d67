"""Compile DeepNVMe's extension before the tests need it: it takes minutes once, and no test should pay for it.

While torch compiles an extension, a file named ``lock`` lies beside it, held open by the process that compiles.
When that process is killed the file stays, and the next one waits for its end, which has long come, for ever. So
locks that nobody holds are removed first.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ssdtrain_plugin.storage.aio import aio_problem


def main() -> None:
    """Compile it, or say why the tests of the engine `aio` will be skipped."""
    problem = aio_problem()
    if problem is not None:
        sys.stdout.write(f"the tests of io_engine `aio` will be skipped: {problem}\n")
        return
    sys.stdout.write("loading DeepNVMe's extension (the first time it is compiled, which takes some minutes) ...\n")
    sys.stdout.flush()
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    cpp_extension = importlib.import_module("torch.utils.cpp_extension")
    cache = Path(cpp_extension._get_build_directory(builder.name, False)).parent
    with alone(cache):
        for lock in remove_stale_locks(cache):
            sys.stdout.write(f"removed `{lock}`, which a build that was interrupted has left\n")
        builder.load(verbose=False)


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Wait until no other run of this program works on a cache; the system ends this with the process.

    Args:
        cache: A directory.
    """
    with open(cache / ".ssdtrain-build", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_stale_locks(cache: Path) -> list[Path]:
    """Remove the locks of torch that are ours and that no living process has open.

    Nobody else can make such a lock while the old one lies there, so between the look
    and the removal it does not become another's; see :func:`alone`.

    Args:
        cache: Has a directory for each extension.

    Returns:
        The paths of those that were removed.
    """
    locks = [lock for lock in sorted(cache.glob("*/lock")) if lock.lstat().st_uid == os.geteuid()]
    held = _open_files() if locks else set()
    stale = [lock for lock in locks if _identity(lock) not in held]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # closed, or removed, a moment ago
        return None
    return status.st_dev, status.st_ino


def _open_files() -> set[tuple[int, int] | None]:
    """Find what the processes of this user have open."""
    found: set[tuple[int, int] | None] = {None}  # what is gone needs no removal
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            found |= {_identity(link) for link in (process / "fd").iterdir()}
    return found


if __name__ == "__main__":
    main()
