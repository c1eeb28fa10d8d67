"""The lock that torch leaves when a build is killed is removed; one that somebody holds is not."""

import fcntl
import subprocess
import sys

import pytest
from build_aio import alone, remove_stale_locks
from torch.utils.file_baton import FileBaton

# Takes torch's own lock, says so, and stays until it is killed.
_BUILD = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path):
    for name in ("async_io", "deepspeed_shm_comm"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_lock_of_a_build_that_was_killed_is_removed_and_not_before(cache):
    lock = cache / "async_io" / "lock"
    command = [sys.executable, "-c", _BUILD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as build:
        assert build.stdout.readline() == b"building\n"
        assert remove_stale_locks(cache) == []
        assert lock.exists()
        build.kill()
    assert lock.exists(), "torch's lock outlives its process"
    assert remove_stale_locks(cache) == [lock]
    assert FileBaton(str(lock)).try_acquire()


def test_locks_of_all_extensions_are_looked_at_and_nothing_else(cache):
    stale = cache / "deepspeed_shm_comm" / "lock"
    for path in (stale, cache / "lock", cache / "async_io" / "build.ninja"):
        path.touch()
    held = FileBaton(str(cache / "async_io" / "lock"))
    assert held.try_acquire()
    assert remove_stale_locks(cache) == [stale]
    held.release()
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["build.ninja", "lock"]


def test_two_builds_are_not_at_it_at_once(cache):
    with alone(cache), open(cache / ".ssdtrain-build", "ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with alone(cache):
        pass
