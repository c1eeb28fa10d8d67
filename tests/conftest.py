"""Nothing is left behind: no thread and no open extent after a test, no mount or process after the session."""

import gc
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import pytest
import shared_memory

_DEADLINE_SECONDS = 10.0
# An O_TMPFILE file reads "/dir/#1234 (deleted)", one created and unlinked "/dir/.ssdtrain-... (deleted)".
_DELETED_EXTENT = re.compile(r"/(#\d+|[^/]*ssdtrain[^/]*) \(deleted\)$")
# Helpers that Python and torch start once and end with the interpreter.
_SERVICE_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch/_inductor")


def pytest_addoption(parser):
    parser.addoption(
        "--machine-runs", type=int, default=0, help="random runs of the cache against its model, instead of a fixed few"
    )


def _our_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("ssdtrain-")}


def _open_extents():
    """Inode and name of every deleted file that this process holds open and that may be an extent file."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target, inode = os.readlink(link), os.stat(link).st_ino
        except OSError:  # the descriptor that lists the directory is gone by now
            continue
        if _DELETED_EXTENT.search(target):
            found.add((inode, target))
    return found


def _end_of(threads):
    """Wait for threads that are about to end; return those that did not."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in threads if thread.is_alive())


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail the test that leaves one of our threads, or an extent file, open."""
    threads, extents = _our_threads(), _open_extents()
    yield
    if _our_threads() - threads or _open_extents() - extents:
        gc.collect()  # what the test dropped may sit in a reference cycle, for example a traceback's
    alive = _end_of(_our_threads() - threads)
    assert not alive, f"threads still alive after the test: {', '.join(alive)}"
    left = sorted(name for _, name in _open_extents() - extents)
    assert not left, f"extent files still open after the test: {', '.join(left)}"


@pytest.fixture(scope="session")
def foreign_buffers():
    """What DeepSpeed left in shared memory before the session."""
    return shared_memory.buffers()


@pytest.fixture(autouse=True)
def shared_memory_is_given_back(foreign_buffers):
    """Remove what DeepSpeed leaves in memory."""
    yield
    shared_memory.give_back(foreign_buffers)


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory):
    """Keep what tests write to drives out of the records of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def _mounts():
    return {line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()}


def _child_processes():
    children = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text(encoding="ascii").split()
            commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
        except OSError:  # a thread or child that ended meanwhile
            continue
        children |= {
            f"{pid}: {command.replace(bytes(1), b' ').decode(errors='replace').strip()}"
            for pid, command in commands.items()
            if command and not any(service.encode() in command for service in _SERVICE_PROCESSES)
        }
    return children


@pytest.fixture(scope="session", autouse=True)
def session_leaves_nothing_behind(tmp_path_factory):
    """Fail the session that leaves a mount or a running child process."""
    mounts, children = _mounts(), _child_processes()
    yield
    # Other programs mount below the temporary directory too; there only this session's own part counts.
    own, shared = str(tmp_path_factory.getbasetemp()), tempfile.gettempdir()
    new = {point for point in _mounts() - mounts if point.startswith(own) or not point.startswith(shared)}
    assert not new, f"mounts left behind: {', '.join(sorted(new))}"
    left = _child_processes() - children
    assert not left, f"processes left behind: {'; '.join(sorted(left))}"
