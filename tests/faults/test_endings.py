"""However a process ends, nothing of it stays: no file, no process, no message over the user's own."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("ending_worker.py")
REPOSITORY = WORKER.parents[2]
START_SECONDS = 120  # importing torch beside other work
ADDRESS_SPACE_KIB = 12 * 1024 * 1024
# A process ends within 5 s, whatever hangs. On a loaded machine the interpreter, with torch in it, takes some more.
CONTRACT_SECONDS = 5
END_SECONDS = 20
LIMIT_SECONDS = 60
KILLS = int(os.environ.get("SSDTRAIN_KILLS", "3"))
SEED = 20261120

ENDINGS = {
    # way: exit code
    "exit": 0,
    "detach": 0,
    "exception": 1,
    "_exit": 3,
    "sys.exit": 4,
    "SIGTERM handled": 5,
    "SIGTERM": -signal.SIGTERM,
    "SIGKILL": -signal.SIGKILL,
    "SIGINT": -signal.SIGINT,
    "fork": 0,
    "spawn": 0,
    "given to a child": 0,
}
AT_ONCE = {"SIGKILL", "SIGTERM", "_exit"}
"""Ways in which no code of ours runs any more."""


def run(way, directory, *more, names=False):
    """Let a process end in one way, in time; return its exit code and what it wrote to stderr."""
    return run_and_listen(way, directory, *more, names=names)[:2]


def run_and_listen(way, directory, *more, names=False):
    """As :func:`run`; return what it wrote to stdout, too."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if names:
        environment["SSDTRAIN_TEST_NAMES"] = "1"
    limited = ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', str(ADDRESS_SPACE_KIB)]
    command = [*limited, sys.executable, str(WORKER), way, str(directory), *map(str, more)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            said, errors = process.communicate(timeout=START_SECONDS + LIMIT_SECONDS)
            ended_at = time.monotonic()
        finally:
            assert _end_group(process.pid) or process.poll() is not None
    assert not _group_lives(process.pid), "a process of it is still there"
    began_at = instant("ends at", said)
    assert began_at is not None or way == "killed", errors
    assert began_at is None or ended_at - began_at < END_SECONDS, errors
    return process.returncode, errors, said


def instant(what, said):
    """Find when a worker has said something, by the clock of all processes."""
    times = [float(line.removeprefix(what)) for line in said.splitlines() if line.startswith(what)]
    return times[0] if times else None


def _end_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _group_lives(pid):
    """Tell whether a process of the group stays; Python's resource tracker ends a moment after its parent."""
    deadline = time.monotonic() + 5
    while any(_group_of(stat) == pid for stat in Path("/proc").glob("[0-9]*/stat")):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)
    return False


def _group_of(stat):
    try:
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[2])


def found(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def deleted_and_open(directory):
    """Files below a directory that have no name and that some process of ours holds: their space is not free."""
    held = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(str(directory)) and target.endswith(" (deleted)"):
            held.append((str(link), target))
    return held


def left_in(directory):
    return found(directory), deleted_and_open(directory)


def end_and_look(directory, way):
    return *run(way, directory), left_in(directory)


def end_with_names_and_clean(directory, way):
    ended = *run(way, directory, names=True), found(directory)
    cleaned = (*run("clean", directory, names=True), found(directory)) if way in AT_ONCE else None
    return ended, cleaned


def kill_and_clean(directory, number):
    killed = *run("killed", directory, number), left_in(directory)
    return killed, (*run("clean", directory), left_in(directory))


def _parameters(item):
    return item.callspec.params.values() if hasattr(item, "callspec") else ()


def hang_and_look(directory):
    return *run_and_listen("two drives that hang", directory), left_in(directory)


@pytest.fixture(scope="module")
def ended(request, tmp_path_factory):
    """Run what all tests of this session want, two at a time: it is mostly the import of torch. A future by test."""
    jobs = {
        "test_a_process_leaves_nothing": end_and_look,
        "test_where_files_need_names_the_next_run_removes_those_of_the_dead": end_with_names_and_clean,
        "test_killed_inside_of_a_transfer": kill_and_clean,
        "test_drives_that_hang_hold_up_no_end": hang_and_look,
    }
    pool = ThreadPoolExecutor(2)
    yield {
        item.nodeid: pool.submit(jobs[item.originalname], tmp_path_factory.mktemp("ending"), *_parameters(item))
        for item in request.session.items
        if item.path == request.path
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("way", ENDINGS)
def test_a_process_leaves_nothing(ended, request, way):
    code, errors, left = ended[request.node.nodeid].result()
    assert code == ENDINGS[way], errors
    assert left == ([], [])
    if way == "exception":
        assert errors.rstrip().endswith("UsersOwnError: this is what the user must see"), errors
        assert errors.count("Traceback") == 1, errors
    elif way == "SIGINT":
        assert errors.rstrip().endswith("KeyboardInterrupt"), errors
        assert errors.count("Traceback") == 1, errors
    else:
        assert "Traceback" not in errors
        assert "ssdtrain" not in errors.replace("resource_tracker", ""), errors


@pytest.mark.parametrize("way", ["exit", "exception", "SIGINT", "_exit", "SIGKILL", "fork"])
def test_where_files_need_names_the_next_run_removes_those_of_the_dead(ended, request, way):
    (code, errors, left), cleaned = ended[request.node.nodeid].result()
    assert code == ENDINGS[way], errors
    assert len(left) == (2 if way in AT_ONCE else 0), "our folder, and one file in it"
    if way in AT_ONCE:
        code, errors, left = cleaned
        assert code == 0, errors
        assert left == []


def test_drives_that_hang_hold_up_no_end(ended, request):
    """Two models, two drives each, zeros to be written: all are waited for together, not one after the other."""
    code, errors, said, left = ended[request.node.nodeid].result()
    assert code == 0, errors
    assert "Traceback" not in errors
    assert left == (["one", "two"], [])
    assert instant("ended at", said) - instant("ends at", said) < CONTRACT_SECONDS


def seeded_kills():
    chance = random.Random(SEED)
    # 16 stores and as many loads a step: up to the fourth step, in either direction.
    return [chance.randrange(1, 60) for _ in range(KILLS)]


@pytest.mark.parametrize("number", seeded_kills())
def test_killed_inside_of_a_transfer(ended, request, number):
    """1. Training is killed while half of a write, or of a read, is done. 2. The next run starts clean."""
    (code, errors, left), cleaned = ended[request.node.nodeid].result()
    assert code == -signal.SIGKILL, errors
    assert left == ([], [])
    code, errors, left = cleaned
    assert code == 0, errors
    assert left == ([], [])
