"""DeepNVMe for real, on drives that fail, and with a handle that lies: what it says it moved is never believed."""

import contextlib
import errno
import importlib.util
import itertools
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.deadlines import ending
from ssdtrain_plugin.errors import CapacityError, EnvironmentUnsupportedError, LoadError, StateError, StoreError
from ssdtrain_plugin.storage import aio, completions, locked
from ssdtrain_plugin.storage.aio import AioEngine, aio_problem
from ssdtrain_plugin.storage.drive import DriveTier
from ssdtrain_plugin.storage.memory import HostArena, memory_at
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.storage.scratch import open_scratch
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.units import KIB, MIB

# The first run on a machine compiles the extension.
pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(900)]

PAGE = 4096
BLOCK = 64 * KIB
FILE_BYTES = 4 * MIB


class LyingHandle:
    """Moves what ``lie`` says, by a real handle, and reports what the test wants.

    ``lie(nbytes)`` gives the ranges of the transfer that are really moved.
    """

    def __init__(self, real, rig):
        self._real, self._rig = real, rig

    def sync_pwrite(self, memory, path, offset):
        return self._move("write", self._real.sync_pwrite, memory, path, offset)

    def sync_pread(self, memory, path, offset):
        return self._move("read", self._real.sync_pread, memory, path, offset)

    def _move(self, name, call, memory, path, offset):
        self._rig.calls.append((name, memory.numel(), offset))
        for begin, end in self._rig.lie(memory.numel()):
            assert call(memory[begin:end], path, offset + begin) == 1
        return self._rig.result


class Rig:
    """A file of random bytes, an engine on it, and the way to make its handles lie."""

    def __init__(self, fd, arena, report, library, monkeypatch):
        self.fd, self.arena, self.report = fd, arena, report
        self.lie, self.result, self.calls = None, 1, []
        self._library = library
        monkeypatch.setattr(aio, "_load_library", lambda: self)
        self.__file__ = library.__file__
        self.engine = AioEngine(fd, report=report, arena=arena, block_bytes=BLOCK)

    def aio_handle(self, *arguments):
        real = self._library.aio_handle(*arguments)
        return real if self.lie is None else LyingHandle(real, self)

    def drop_handles(self):
        self.engine._handles._idle.clear()

    def random(self, nbytes):
        memory = self.engine.staging(nbytes)
        memory.random_(0, 256)
        return memory

    def on_file(self, nbytes, offset):
        memory = self.arena.tensor(nbytes)
        assert os.preadv(self.fd, [memory_at(memory.data_ptr(), nbytes)], offset) == nbytes
        return memory


@pytest.fixture(scope="module")
def library():
    problem = aio_problem()
    if problem is not None:
        pytest.skip(problem)
    return aio._load_library()


@pytest.fixture
def rig(library, tmp_path, monkeypatch):
    report = probe_directory(str(tmp_path))
    if not report.supports_direct:
        pytest.skip(f"O_DIRECT {report.direct_reason}")
    arena = HostArena(CpuStreams())
    fd = open_scratch(str(tmp_path), direct=True).fd
    os.posix_fallocate(fd, 0, FILE_BYTES)
    rig = Rig(fd, arena, report, library, monkeypatch)
    yield rig
    rig.engine.close()
    os.close(fd)
    arena.close()


# --- the truth


@pytest.mark.parametrize("nbytes", [PAGE, BLOCK - PAGE, BLOCK, BLOCK + PAGE, 3 * BLOCK, 2 * MIB])
@pytest.mark.parametrize("offset", [0, PAGE, BLOCK + PAGE])
def test_bytes_go_there_and_come_back(rig, nbytes, offset):
    memory, back = rig.random(nbytes), rig.random(nbytes)
    assert rig.engine.write(memory, nbytes, offset) == nbytes
    assert torch.equal(rig.on_file(nbytes, offset), memory)
    assert rig.engine.read(back, nbytes, offset) == nbytes
    assert torch.equal(back, memory)


def test_only_the_bytes_asked_for_are_touched(rig):
    memory = rig.random(3 * PAGE)
    assert rig.engine.write(memory, PAGE, PAGE) == PAGE
    assert not rig.on_file(PAGE, 2 * PAGE).any()
    back = rig.random(3 * PAGE)
    rest = back[PAGE:].clone()
    assert rig.engine.read(back, PAGE, PAGE) == PAGE
    assert torch.equal(back[:PAGE], memory[:PAGE])
    assert torch.equal(back[PAGE:], rest)


def test_threads_have_a_handle_each(rig):
    barrier = threading.Barrier(4)

    def round_trip(index):
        memory, back = rig.random(MIB), rig.random(MIB)
        barrier.wait(20)
        for _ in range(5):
            assert rig.engine.write(memory, MIB, index * MIB) == MIB
            assert rig.engine.read(back, MIB, index * MIB) == MIB
            assert torch.equal(back, memory)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(round_trip, range(4)))
    assert 1 <= len(rig.engine._handles._idle) <= 4


def test_more_blocks_than_the_queue_holds_are_counted_too(rig, monkeypatch):
    monkeypatch.setattr(aio, "_QUEUE_DEPTH", 2)
    memory, back = rig.random(7 * BLOCK + PAGE), rig.random(7 * BLOCK + PAGE)
    assert rig.engine.write(memory, memory.numel(), PAGE) == memory.numel()
    assert rig.engine.read(back, memory.numel(), PAGE) == memory.numel()
    assert torch.equal(back, memory)
    rig.drop_handles()
    rig.lie = lambda nbytes: [(0, PAGE)] if rig.calls[1:] else [(0, nbytes)]
    assert rig.engine.read(back, memory.numel(), PAGE) == 2 * BLOCK + PAGE
    assert len(rig.calls) == 2, "after the first gap nothing more is asked for"


def test_a_transfer_that_is_not_aligned_is_a_defect(rig):
    memory = rig.random(2 * PAGE)
    for nbytes, offset in [(512, 0), (PAGE, 512), (0, 0)]:
        with pytest.raises(StateError, match="not aligned"):
            rig.engine.write(memory, nbytes, offset)
        with pytest.raises(StateError, match="not aligned"):
            rig.engine.read(memory, nbytes, offset)


# --- the lies

WHOLE = 4 * BLOCK + PAGE


@pytest.mark.parametrize("moved", [0, 512, PAGE, 2 * BLOCK, 2 * BLOCK + 512, WHOLE - 512])
@pytest.mark.parametrize("direction", ["write", "read"])
def test_a_transfer_cut_short_in_silence_is_found_out(rig, direction, moved):
    rig.lie = lambda nbytes: [(0, moved)] if moved else []
    assert getattr(rig.engine, direction)(rig.random(WHOLE), WHOLE, PAGE) == moved
    assert rig.calls == [(direction, WHOLE, PAGE)]


@pytest.mark.parametrize("direction", ["write", "read"])
def test_what_was_moved_behind_a_gap_does_not_count(rig, direction):
    rig.lie = lambda nbytes: [(BLOCK, nbytes)]
    assert getattr(rig.engine, direction)(rig.random(WHOLE), WHOLE, PAGE) == 0


@pytest.mark.parametrize("direction", ["write", "read"])
def test_a_lie_is_found_out_where_old_and_new_bytes_are_the_same(rig, direction):
    memory = rig.engine.staging(2 * BLOCK).zero_()  # as is the file
    rig.lie = lambda nbytes: []
    assert getattr(rig.engine, direction)(memory, 2 * BLOCK, 0) == 0


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nbytes=st.integers(1, 40).map(lambda pages: pages * PAGE), moved=st.integers(0, 320).map(lambda n: n * 512))
def test_any_prefix_counts_to_the_byte(rig, nbytes, moved):
    rig.drop_handles()
    moved = min(moved, nbytes)
    rig.lie = lambda _: [(0, moved)] if moved else []
    memory = rig.random(nbytes)
    assert rig.engine.write(memory, nbytes, 0) == moved
    assert rig.engine.read(memory, nbytes, 0) == moved


def test_a_call_that_raised_leaves_nothing_to_the_next(rig):
    def interrupt(nbytes):
        yield (0, nbytes)
        raise KeyboardInterrupt

    memory = rig.random(BLOCK)
    rig.lie = interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.engine.write(memory, BLOCK, 0)
    rig.lie = lambda nbytes: []
    assert rig.engine.write(memory, BLOCK, 0) == 0


@pytest.mark.parametrize("result", [-1, 0, 2])
def test_a_refused_call_is_an_error(rig, result):
    rig.lie, rig.result = (lambda nbytes: [(0, nbytes)]), result
    memory = rig.random(BLOCK)
    for call in (rig.engine.write, rig.engine.read):
        with pytest.raises(OSError, match="DeepNVMe refused") as caught:
            call(memory, BLOCK, 0)
        assert caught.value.errno == errno.EIO


@contextlib.contextmanager
def file_size_limit(nbytes):
    """Let the kernel cut writes beyond ``nbytes``, as a full drive would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_cuts_short_counts_to_the_byte(rig):
    memory = rig.random(BLOCK)
    with file_size_limit(BLOCK // 2):
        assert rig.engine.write(memory, BLOCK, 0) == BLOCK // 2
        assert rig.engine._memory_owner.real.sync_pwrite(memory, rig.engine._path, 0) == 1, "the library says success"
    assert torch.equal(rig.on_file(BLOCK // 2, 0), memory[: BLOCK // 2])


def test_a_write_that_the_kernel_refuses_keeps_its_error_number(rig):
    memory = rig.random(3 * BLOCK)
    with file_size_limit(BLOCK), pytest.raises(OSError, match="File too large") as caught:
        rig.engine.write(memory, 3 * BLOCK, 0)
    assert caught.value.errno == errno.EFBIG
    assert rig.engine.write(memory, 3 * BLOCK, 0) == 3 * BLOCK, "and the next one is not blamed for it"


@contextlib.contextmanager
def mounted_ext4(tmp_path, nbytes):
    """Mount a small ext4 image for the duration of a block, or skip where that is impossible."""
    image, point = tmp_path / "image", tmp_path / "mount"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(nbytes)
    for command in (["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(point)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"no {command[0]}")
        if done.returncode:
            pytest.skip(f"{command[0]} is impossible here: {done.stderr.strip()}")
    try:
        yield image, point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


@contextlib.contextmanager
def engine_in(path, arena):
    fd = open_scratch(str(path), direct=True).fd
    engine = AioEngine(fd, report=probe_directory(str(path)), arena=arena)
    try:
        yield engine, fd
    finally:
        engine.close()
        os.close(fd)


def test_a_drive_that_is_really_full(rig, tmp_path):
    with mounted_ext4(tmp_path, 48 * MIB) as (_, point), engine_in(point, rig.arena) as (engine, fd):
        os.ftruncate(fd, 64 * MIB)  # sparse, as where blocks cannot be reserved
        memory = rig.random(64 * MIB)
        with pytest.raises(OSError, match="No space left") as caught:
            engine.write(memory, 64 * MIB, 0)
        assert caught.value.errno == errno.ENOSPC


def test_a_drive_that_fails_to_read(rig, tmp_path):
    with mounted_ext4(tmp_path, 64 * MIB) as (image, point), engine_in(point, rig.arena) as (engine, fd):
        os.posix_fallocate(fd, 0, 32 * MIB)
        memory = rig.random(8 * MIB)
        assert engine.write(memory, 8 * MIB, 16 * MIB) == 8 * MIB
        os.truncate(image, 64 * KIB)
        with pytest.raises(OSError, match="Input/output error") as caught:
            engine.read(memory, 8 * MIB, 16 * MIB)
        assert caught.value.errno == errno.EIO
        # The library says success, and the memory has changed: neither tells.
        memory.fill_(7)
        assert engine._memory_owner.real.sync_pread(memory, engine._path, 16 * MIB) == 1
        assert not memory.any()


def test_a_read_beyond_the_end_is_short_and_never_reaches_the_library(rig):
    rig.lie = lambda nbytes: [(0, nbytes)]
    memory = rig.random(2 * BLOCK)
    assert rig.engine.read(memory, 2 * BLOCK, FILE_BYTES - BLOCK) == BLOCK
    assert rig.engine.read(memory, 2 * BLOCK, FILE_BYTES) == 0
    assert rig.engine.read(memory, 2 * BLOCK, FILE_BYTES + BLOCK) == 0
    assert rig.calls == [("read", BLOCK, FILE_BYTES - BLOCK)]


@pytest.mark.parametrize("lie", [[], [(0, BLOCK)]], ids=["nothing", "a part"])
def test_a_drive_turns_a_lie_into_an_error(rig, tmp_path, lie):
    def create(fd, report):
        rig.fd = fd
        return AioEngine(fd, report=report, arena=rig.arena, block_bytes=BLOCK)

    own_fd = rig.fd
    drive = DriveTier(str(tmp_path), create_engine=create, streams=CpuStreams(), disk_bytes=64 * MIB)
    try:
        source = torch.arange(3 * BLOCK + 5, dtype=torch.int64).to(torch.uint8)
        extent = drive.allocate(source.numel())
        drive.write(extent, source, DeviceEvent())
        target = torch.zeros_like(source)
        drive.read(extent, target, DeviceEvent())
        assert torch.equal(target, source)
        drive._engine._handles._idle.clear()
        rig.lie = lambda nbytes: lie
        with pytest.raises(LoadError, match="bytes, expected"):
            drive.read(extent, target, DeviceEvent())
        with pytest.raises(StoreError, match="bytes, expected"):
            drive.write(extent, source, DeviceEvent())
    finally:
        drive.close()
        rig.fd = own_fd


# --- staging


def test_staging_is_aligned_and_what_the_library_takes_without_a_copy(rig):
    for nbytes in (1, PAGE, PAGE + 1, 8 * MIB):
        block = rig.engine.staging(nbytes)
        assert block.numel() == -(-nbytes // PAGE) * PAGE
        assert block.data_ptr() % PAGE == 0
        assert rig.engine._memory_owner.real.is_pinned(block)
    assert rig.engine.in_place_bytes(torch.empty(MIB, dtype=torch.uint8)) == 0


def test_staging_comes_back_when_the_last_tensor_on_it_dies(rig):
    first = rig.engine.staging(MIB)
    address, part = first.data_ptr(), first[PAGE:]
    del first
    assert rig.engine.staging(MIB).data_ptr() != address, "a part is alive"
    del part
    assert rig.engine.staging(MIB).data_ptr() == address


def test_a_forked_child_gets_no_staging_memory_and_gives_none_back(rig):
    address = rig.engine.staging(MIB).data_ptr()
    flags = mapping_flags(address)
    assert "dc" in flags, "not copied at a fork, which during direct I/O would send bytes astray"

    class Owner:
        def free_cpu_locked_tensor(self, whole):
            pytest.fail("a child has not got this memory")

    locked._free_locked(Owner(), torch.empty(0), address, MIB, os.getpid() + 1)
    assert mapping_flags(address) == flags


def mapping_flags(address):
    is_inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            is_inside = begin <= address < end
        elif is_inside and fields[0] == "VmFlags:":
            return fields[1:]
    raise AssertionError("no such memory")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(st.integers(1, 9 * MIB), st.integers(-20, -1)), max_size=30))
def test_blocks_in_use_do_not_overlap(rig, steps):
    """A positive step takes that many bytes, a negative one drops the n-th live block."""
    live = []
    for step in steps:
        if step > 0:
            live.append(rig.engine.staging(step))
        elif live:
            live.pop(-step % len(live))
        spans = sorted((block.data_ptr(), block.data_ptr() + block.numel()) for block in live)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))


def test_a_block_outlives_the_engine(rig):
    block = rig.random(MIB)
    copy = block.clone()
    rig.engine.close()
    others = [rig.engine.staging(MIB) for _ in range(3)]
    assert torch.equal(block, copy)
    del block, others


def test_memory_that_cannot_be_locked_is_a_lack_of_room(rig, monkeypatch):
    def refuse(*_):
        locked.ctypes.set_errno(errno.ENOMEM)
        return -1

    monkeypatch.setattr(locked, "_LIBC", SimpleNamespace(mlock=refuse, madvise=lambda *_: 0))
    with pytest.raises(CapacityError, match=r"cannot lock host memory: 64\.0 MiB") as caught:
        rig.engine.staging(MIB)
    assert caught.value.errno == errno.ENOMEM
    assert "ulimit -l" in str(caught.value)


# --- beginning and end


def test_a_lack_of_kernel_contexts_is_an_error_and_not_the_end_of_the_process(rig, monkeypatch):
    monkeypatch.setattr(aio, "_QUEUE_DEPTH", int(Path("/proc/sys/fs/aio-max-nr").read_text()))
    with pytest.raises(OSError, match=r"fs\.aio-max-nr") as caught:
        rig.engine.write(rig.random(PAGE), PAGE, 0)
    assert caught.value.errno == errno.EAGAIN


def test_a_kernel_that_does_not_show_its_rings_is_refused(rig, monkeypatch, tmp_path):
    (tmp_path / "maps").write_text("7f00-7f01 rw-p 00000000 00:00 0 \n")
    monkeypatch.setattr(completions, "_MAPS", str(tmp_path / "maps"))
    with pytest.raises(EnvironmentUnsupportedError, match=r"0 rings of completions in .* \(expected 2\)"):
        AioEngine(rig.fd, report=rig.report, arena=rig.arena)


def test_a_directory_without_direct_access_is_refused(rig):
    report = SimpleNamespace(supports_direct=False, direct_reason="refused by the file system", path="/p")
    with pytest.raises(EnvironmentUnsupportedError, match="in `/p` O_DIRECT refused by the file system"):
        AioEngine(rig.fd, report=report, arena=rig.arena)


def test_closing_ends_the_threads_of_the_library_and_refuses_calls(rig):
    memory = rig.random(PAGE)
    before = len(os.listdir("/proc/self/task"))
    assert rig.engine.write(memory, PAGE, 0) == PAGE
    assert len(os.listdir("/proc/self/task")) == before + 1
    rig.engine.close()
    rig.engine.close()
    assert len(os.listdir("/proc/self/task")) == before
    for call in (rig.engine.write, rig.engine.read):
        with pytest.raises(OSError, match="closed") as caught:
            call(memory, PAGE, 0)
        assert caught.value.errno == errno.ESHUTDOWN


def test_it_says_what_it_is(rig):
    assert rig.engine.describe() == "aio, DeepNVMe in blocks of 64.0 KiB"
    assert rig.engine.name == "aio"


SCRIPT = """
    import os, signal, sys, threading
    from ssdtrain_plugin.storage.aio import AioEngine
    from ssdtrain_plugin.storage.memory import HostArena, memory_at
    from ssdtrain_plugin.storage.probe import probe_directory
    from ssdtrain_plugin.storage.scratch import open_scratch
    from ssdtrain_plugin.streams import CpuStreams

    path = sys.argv[1]
    fd = open_scratch(path, direct=True).fd
    engine = AioEngine(fd, report=probe_directory(path), arena=HostArena(CpuStreams()))
    blocks = [engine.staging(8 << 20) for _ in range(3)]
"""
AT_WORK = """
    has_written = threading.Semaphore(0)

    def write_for_ever(block):
        while True:
            engine.write(block, 8 << 20, 0)
            engine.read(block, 8 << 20, 0)
            has_written.release()

    for block in blocks:
        threading.Thread(target=write_for_ever, args=(block,), daemon=True).start()
    for _ in range(6):
        has_written.acquire()
"""
FORK = """
    barrier = threading.Barrier(len(blocks))

    def write(block):
        barrier.wait()
        engine.write(block, 8 << 20, 0)

    threads = [threading.Thread(target=write, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def write_in_child():
        try:
            engine.write(blocks[0], 8 << 20, 0)
        except OSError as error:
            assert "another process" in str(error)
        else:
            sys.exit(1)

    for act in (sys.exit, engine.close, write_in_child):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that hangs must not stay behind
            act()
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine.write(blocks[0], 8 << 20, 0) == 8 << 20
"""
WARNED = """
    import deepspeed.utils
    assert deepspeed.utils._deepspeed_nvme_write_warning_emitted
"""


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "more",
    [
        pytest.param("", id="idle at the end"),
        pytest.param(AT_WORK, id="at work at the end"),
        pytest.param(FORK, id="forked"),
        pytest.param(WARNED, id="the library warns before there are threads, or they would wait for each other"),
    ],
)
def test_a_process_with_an_engine_ends_well(tmp_path, more):
    script = textwrap.dedent(SCRIPT) + textwrap.dedent(more)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "terminate called" not in done.stderr


# --- why it cannot be used; nothing of this loads or builds the library


def _without(name):
    real = shutil.which
    return lambda command, *rest, **more: None if command == name else real(command, *rest, **more)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert aio_problem() == "the package `deepspeed` is not installed"


@pytest.mark.parametrize("missing", ["c++", "ninja"])
def test_a_missing_build_tool_is_named(library, monkeypatch, missing):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", _without(missing))
    assert f"`{missing}` is not on the PATH" in aio_problem()


def test_a_missing_header_is_named(library, monkeypatch):
    monkeypatch.setattr(aio.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert "`libaio.h` is missing" in aio_problem()


def test_a_library_that_cannot_be_linked_is_named(library, monkeypatch):
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: False)
    assert aio_problem() == "libaio cannot be linked"


@pytest.mark.parametrize("error", [ImportError("no\nsuch"), RuntimeError("no"), TypeError("no")])
def test_a_library_that_does_not_load_is_an_environment_error(library, monkeypatch, error):
    def fail(self, verbose=False):
        raise error

    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder
    monkeypatch.setattr(builder, "load", fail)
    with pytest.raises(EnvironmentUnsupportedError, match="cannot use io_engine `aio`: no"):
        aio._load_library()


def test_importing_the_module_loads_no_deepspeed():
    code = "import sys, ssdtrain_plugin.storage.aio; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_the_end_waits_for_a_hanging_transfer_by_the_allowance_that_all_ends_share(monkeypatch, caplog):
    handles, waited = aio._Handles(None, BLOCK), []
    handles._num_active = 1
    monkeypatch.setattr(handles._changed, "wait_for", lambda _, seconds: waited.append(seconds))
    with ending() as allowance:
        handles.end()
        assert allowance.left_seconds < 4
    assert sum(waited) < 4
    assert "1 transfers of DeepNVMe hang" in caplog.text
