"""One suite for every tier: all bytes moved or an error, never a count to check.

``ssd-*-device`` and ``host-device`` run the code for a device other than the CPU on CPU
tensors: their streams make a copy only when its event is waited for, the latest moment
a device may choose, so that a missing wait shows as wrong bytes.
"""

import contextlib
import errno
import os
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_kvikio import DeviceTensor, FakeKvikio

from ssdtrain_plugin.errors import CapacityError, LoadError, StateError, StorageError, StoreError
from ssdtrain_plugin.storage import drive
from ssdtrain_plugin.storage.aio import aio_problem
from ssdtrain_plugin.storage.drive import DriveTier
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.host import HostTier
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.posix import PosixEngine
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.storage.throttled import ThrottledTier
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.units import GIB, MIB

SIZES = [1, 511, 512, 513, 4095, 4096, 4097, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 24 * MIB + 5, 64 * MIB]
SSD = ["ssd-direct", "ssd-buffered", "ssd-late-device", "ssd-early-device"]
ENGINES = ["ssd-aio", "ssd-gds"]
KINDS = [*SSD, *ENGINES, "striped", "throttled", "host", "host-device"]
CAPACITY_BYTES = 256 * MIB
READY = DeviceEvent()


class _LateEvent(DeviceEvent):
    """Runs its copy when somebody waits for it."""

    def __init__(self, copy):
        self._copy, self._lock = copy, threading.Lock()

    def synchronize(self):
        with self._lock:
            copy, self._copy = self._copy, None
        if copy is not None:
            copy()


class LateStreams(CpuStreams):
    """Copies as late as a device may; a waited-for event is the only sign that one is done."""

    def copy_to_host(self, target, source, after):
        return _LateEvent(lambda: target.copy_(source))

    def copy_to_device(self, target, source, after):
        return _LateEvent(lambda: target.copy_(source))


def refuse_direct(monkeypatch):
    real = os.open

    def fake(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", fake)


class DeviceEngine(PosixEngine):
    """Takes nothing in place, as for a tensor in device memory."""

    def in_place_bytes(self, tensor):
        return 0


def open_ssd(kind, directory, streams, arena, capacity_bytes):
    if kind in ENGINES:
        engine = kind.removeprefix("ssd-")
        return open_drive(str(directory), engine=engine, streams=streams, arena=arena, disk_bytes=capacity_bytes)
    if kind == "throttled":
        inner = open_ssd("ssd", directory, streams, arena, capacity_bytes)
        return ThrottledTier(inner, write_bytes_per_second=1e12, read_bytes_per_second=1e12)
    if kind == "striped":
        halves = [directory / name for name in ("a", "b")]
        for half in halves:
            half.mkdir()
        return StripedTier([open_ssd("ssd", half, streams, arena, capacity_bytes // 2) for half in halves])
    if not kind.endswith("device"):
        return open_drive(str(directory), engine="posix", streams=streams, arena=arena, disk_bytes=capacity_bytes)
    return DriveTier(
        str(directory),
        create_engine=lambda fd, report: DeviceEngine(fd, report=report, arena=arena),
        streams=streams,
        disk_bytes=capacity_bytes,
    )


class Bench:
    """A tier and the arena beside it."""

    def __init__(self, kind, directory, capacity_bytes):
        late = kind in ("ssd-late-device", "host-device")
        streams = LateStreams() if late else CpuStreams()
        self.arena = HostArena(streams)
        if kind.startswith("host"):
            self.tier = HostTier(capacity_bytes, streams=streams)
        else:
            self.tier = open_ssd(kind, directory, streams, self.arena, capacity_bytes)
        self.kind = kind
        self._on_device = DeviceTensor.of if kind == "ssd-gds" else lambda tensor: tensor

    def store(self, source):
        extent = self.tier.allocate(source.numel())
        self.tier.write(extent, self._on_device(source), READY)
        return extent

    def load(self, extent, target=None):
        target = torch.zeros(extent.nbytes, dtype=torch.uint8) if target is None else target
        self.tier.read(extent, self._on_device(target), READY).synchronize()
        return target

    def close(self):
        self.tier.close()
        self.arena.close()


def build(kind, directory, monkeypatch, capacity_bytes=CAPACITY_BYTES):
    if kind == "ssd-buffered":
        refuse_direct(monkeypatch)
    elif kind in ("ssd-direct", *ENGINES) and not probe_directory(str(directory)).supports_direct:
        pytest.skip("no O_DIRECT in the temporary directory")
    if kind == "ssd-gds":
        FakeKvikio().install(monkeypatch)
    if kind == "ssd-aio" and (problem := aio_problem()):
        pytest.skip(problem)
    return Bench(kind, directory, capacity_bytes)


@pytest.fixture(params=KINDS)
def bench(request, tmp_path, monkeypatch):
    bench = build(request.param, tmp_path, monkeypatch)
    yield bench
    bench.close()


@pytest.fixture(params=SSD)
def ssd(request, tmp_path, monkeypatch):
    bench = build(request.param, tmp_path, monkeypatch)
    yield bench
    bench.close()


def pattern(nbytes, seed=0):
    """Bytes that differ from their neighbours and between seeds; quick to make at any size."""
    period = torch.randint(256, (65_521,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return period.repeat(-(-nbytes // period.numel()))[:nbytes].clone()


# Round trips


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back(bench, nbytes):
    source = pattern(nbytes)
    extent = bench.store(source)
    assert extent.nbytes == nbytes <= extent.reserved_bytes
    assert extent.offset % 4096 == 0
    assert torch.equal(bench.load(extent), source)
    assert torch.equal(bench.load(extent), source), "a second read gives the same"
    bench.tier.free(extent)


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back_through_arena_tensors(bench, nbytes):
    source = bench.arena.tensor(nbytes).copy_(pattern(nbytes, 1))
    extent = bench.store(source)
    assert torch.equal(bench.load(extent, bench.arena.tensor(nbytes).zero_()), source)


MAX_RW_COUNT = 0x7FFFF000
"""The most that Linux moves in one call: less was moved than asked for, and no error said so."""
MANY_CALLS = ["ssd-direct", "ssd-late-device", *ENGINES, "striped", "throttled", "host"]


def test_no_call_asks_for_more_than_the_kernel_moves():
    assert 4096 <= drive._CALL_BYTES <= MAX_RW_COUNT


@pytest.mark.parametrize("kind", MANY_CALLS)
def test_more_than_one_system_call(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "_CALL_BYTES", 8 * MIB)
    bench = build(kind, tmp_path, monkeypatch)
    try:
        source = bench.arena.tensor(24 * MIB + 1).copy_(pattern(24 * MIB + 1, 2))
        extent = bench.store(source)
        assert torch.equal(bench.load(extent, bench.arena.tensor(24 * MIB + 1)), source)
    finally:
        bench.close()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", MANY_CALLS)
def test_more_bytes_than_one_call_takes(kind, tmp_path, monkeypatch):
    nbytes = GIB + 1
    bench = build(kind, tmp_path, monkeypatch, 4 * GIB)
    try:
        source = bench.arena.tensor(nbytes).copy_(pattern(nbytes, 2))
        extent = bench.store(source)
        assert torch.equal(bench.load(extent, bench.arena.tensor(nbytes)), source)
    finally:
        bench.close()


@pytest.mark.parametrize("shift", [1, 16, 64, 511, 512, 513])
def test_unaligned_memory_comes_back(bench, shift):
    nbytes = 9 * MIB + 3
    source = bench.arena.tensor(nbytes + shift)[shift:].copy_(pattern(nbytes, shift))
    extent = bench.store(source)
    target = bench.arena.tensor(nbytes + shift).zero_()
    assert torch.equal(bench.load(extent, target[shift:]), source)
    assert not target[:shift].any(), "bytes before the target are untouched"


@pytest.mark.parametrize("nbytes", [100, 513, 4097, 8 * MIB + 1])
def test_a_load_stays_within_its_target(bench, nbytes):
    """Note [Aligned or staged]: padding never runs over memory of somebody else.

    1. The target is the aligned beginning of a larger tensor. 2. A load of the padded
    extent straight into it would overwrite what follows. 3. It must not.
    """
    extent = bench.store(pattern(nbytes))
    whole = bench.arena.tensor(nbytes + 5000).fill_(77)
    bench.load(extent, whole[:nbytes])
    assert torch.equal(whole[:nbytes], pattern(nbytes))
    assert bool((whole[nbytes:] == 77).all())


def test_the_source_is_not_changed(bench):
    source = pattern(3 * MIB + 9)
    bench.store(source)
    assert torch.equal(source, pattern(3 * MIB + 9))


def test_extents_do_not_disturb_each_other(bench):
    sources = [pattern(nbytes, nbytes) for nbytes in (1, 4096, 5000, MIB + 1, 3, 2 * MIB)]
    extents = [bench.store(source) for source in sources]
    for extent, source in reversed(list(zip(extents, sources, strict=True))):
        assert torch.equal(bench.load(extent), source)


def test_a_freed_extent_is_used_again(bench):
    first = bench.store(pattern(MIB, 1))
    bench.tier.free(first)
    second = bench.store(pattern(MIB, 2))
    if bench.kind != "striped":  # whose offsets are names
        assert second.offset == first.offset
    assert torch.equal(bench.load(second), pattern(MIB, 2))


def test_writers_and_readers_at_once(bench):
    def work(seed):
        for turn in range(12):
            source = pattern(1 + (seed * 911 + turn * 400_009) % (3 * MIB), seed * 100 + turn)
            extent = bench.store(source)
            found = bench.load(extent)
            bench.tier.free(extent)
            if not torch.equal(found, source):
                return f"thread {seed}, turn {turn}"
        return None

    with ThreadPoolExecutor(8, thread_name_prefix="test-tier") as pool:
        assert [fault for fault in pool.map(work, range(8)) if fault] == []
    assert bench.tier.used_bytes == 0


# Capacity


def test_bytes_in_use_are_counted(bench):
    assert (bench.tier.used_bytes, bench.tier.free_bytes) == (0, CAPACITY_BYTES)
    extent = bench.tier.allocate(5000)
    assert (bench.tier.used_bytes, bench.tier.free_bytes) == (8192, CAPACITY_BYTES - 8192)
    bench.tier.free(extent)
    assert (bench.tier.used_bytes, bench.tier.free_bytes) == (0, CAPACITY_BYTES)


def test_a_full_tier_says_so_and_recovers(bench):
    extents = [bench.tier.allocate(64 * MIB) for _ in range(4)]
    for _ in range(2):
        with pytest.raises(CapacityError, match=r"(?s)cannot store activation: 64\.0 MiB .*hint: ") as caught:
            _ = bench.tier.allocate(64 * MIB)
        assert (caught.value.errno, caught.value.nbytes) == (None, 64 * MIB)
    assert bench.tier.used_bytes == CAPACITY_BYTES
    bench.tier.free(extents[2])
    extent = bench.store(pattern(64 * MIB))
    assert torch.equal(bench.load(extent), pattern(64 * MIB))


def test_more_than_the_budget_is_refused(bench):
    with pytest.raises(CapacityError):
        bench.tier.allocate(CAPACITY_BYTES + 1)
    assert bench.tier.used_bytes == 0


# Misuse and the end


def test_freeing_twice_is_refused(bench):
    extent = bench.tier.allocate(4096)
    bench.tier.free(extent)
    with pytest.raises(StateError):
        bench.tier.free(extent)


def test_a_freed_extent_cannot_be_used(bench):
    extent = bench.store(pattern(4096))
    bench.tier.free(extent)
    with pytest.raises(StateError):
        bench.load(extent)
    with pytest.raises(StateError):
        bench.tier.write(extent, pattern(4096), READY)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(4095, dtype=torch.uint8),
        torch.zeros(4096, dtype=torch.int32),
        torch.zeros(8192, dtype=torch.uint8)[::2],
    ],
    ids=["short", "dtype", "strided"],
)
def test_a_tensor_that_does_not_fit_is_refused(bench, wrong):
    extent = bench.tier.allocate(4096)
    with pytest.raises(StateError):
        bench.tier.write(extent, wrong, READY)
    with pytest.raises(StateError):
        bench.tier.read(extent, wrong, READY)


def test_a_closed_tier_refuses_with_the_errors_of_the_contract(bench):
    extent = bench.store(pattern(4096))
    bench.tier.close()
    bench.tier.close()
    with pytest.raises(CapacityError, match="closed"):
        bench.tier.allocate(1)
    with pytest.raises(StoreError, match="closed"):
        bench.tier.write(extent, pattern(4096), READY)
    with pytest.raises(LoadError, match="closed"):
        bench.load(extent)
    bench.tier.free(extent)
    assert bench.tier.free_bytes == 0


def test_one_line_describes_a_tier(bench, tmp_path):
    line = bench.tier.describe()
    assert "\n" not in line
    assert line.startswith(f"{bench.tier.name}: ")
    assert ("128.0 MiB" if bench.kind == "striped" else "256.0 MiB") in line
    if bench.tier.name == "ssd":
        assert str(tmp_path) in line
        assert ("buffered I/O" in line) == (bench.kind == "ssd-buffered")


# The drive


def test_the_file_has_no_name_and_is_private(ssd, tmp_path):
    assert os.listdir(tmp_path) == []
    extents = [ssd.store(pattern(MIB + 1)) for _ in range(3)]
    assert os.listdir(tmp_path) == []
    status = os.fstat(ssd.tier._file.fd)
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o600, 0)
    assert not os.get_inheritable(ssd.tier._file.fd)
    ssd.load(extents[0])
    ssd.tier.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "unaligned"])
def test_an_extent_in_pieces_holds_its_bytes(ssd, skip):
    """Every other 4 MiB is free, so 10 MiB fit in pieces only; their neighbours stay as they are."""
    small = [(ssd.store(pattern(4 * MIB, seed)), seed) for seed in range(64)]
    for extent, _ in small[::2]:
        ssd.tier.free(extent)
    source = pattern(10 * MIB + 5, 1000)
    extent = ssd.tier.allocate(source.numel())
    assert len(extent.pieces) == 3
    memory = ssd.arena.tensor(source.numel() + skip)[skip:].copy_(source)
    ssd.tier.write(extent, memory, READY)
    assert torch.equal(ssd.load(extent), source)
    assert torch.equal(ssd.load(extent, memory.zero_()), source)
    for extent, seed in small[1::2]:
        assert torch.equal(ssd.load(extent), pattern(4 * MIB, seed))


def test_space_that_is_not_needed_for_long_goes_back_to_the_drive(tmp_path):
    bench = Bench("ssd-early-device", tmp_path, 4 * GIB)
    extents = [bench.tier.allocate(64 * MIB) for _ in range(24)]
    kept = bench.store(pattern(MIB))
    bench.tier.trim()
    assert bench.tier.file_bytes >= 24 * 64 * MIB, "it was in use since the last call"
    for extent in extents:
        bench.tier.free(extent)
    bench.tier.trim()
    size = bench.tier.file_bytes
    assert size >= 24 * 64 * MIB, "it was in use at the last call, and one extent lies at its end"
    bench.tier.free(kept)
    bench.tier.trim()
    bench.tier.trim()
    assert bench.tier.file_bytes == os.fstat(bench.tier._file.fd).st_size == 256 * MIB
    assert torch.equal(bench.load(bench.store(pattern(300 * MIB))), pattern(300 * MIB)), "and it grows again"
    bench.close()


def test_a_dropped_tier_closes_its_file(tmp_path):
    bench = Bench("ssd-early-device", tmp_path, MIB)
    fd = bench.tier._file.fd
    del bench
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_buffered_io_is_said_aloud_once(tmp_path, monkeypatch, caplog):
    bench = build("ssd-buffered", tmp_path, monkeypatch)
    for _ in range(3):
        bench.store(pattern(10_000))
    bench.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "O_DIRECT refused by the file system: Invalid argument" in caplog.text
    assert "hint: " in caplog.text


def test_aligned_cpu_memory_is_not_copied(tmp_path, monkeypatch):
    bench = build("ssd-direct", tmp_path, monkeypatch)
    try:
        source, target = bench.arena.tensor(5 * MIB + 7).copy_(pattern(5 * MIB + 7)), bench.arena.tensor(5 * MIB + 7)
        monkeypatch.setattr(bench.arena, "tensor", lambda nbytes: pytest.fail("staging was used"))
        assert torch.equal(bench.load(bench.store(source), target), source)
    finally:
        bench.close()


def test_staging_comes_back(ssd):
    extent = ssd.store(pattern(30 * MIB + 1)[1:])
    ssd.load(extent)
    assert ssd.arena.used_bytes == 0


def test_alignment_beyond_a_page_is_kept(tmp_path, monkeypatch):
    """A drive that wants 16 KiB: every address, offset and length must be a multiple."""
    wanted, real_write, real_read = 16 * 1024, os.pwritev, os.preadv

    def check(buffers, offset):
        view = memoryview(buffers[0])
        address = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        if (address | offset | view.nbytes) % wanted:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def write(fd, buffers, offset):
        check(buffers, offset)
        return real_write(fd, buffers, offset)

    def read(fd, buffers, offset):
        check(buffers, offset)
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "preadv", read)
    bench = build("ssd-direct", tmp_path, monkeypatch)
    try:
        assert "16384-byte alignment" in bench.tier.describe()
        for nbytes in (1, 16 * 1024, 10 * MIB + 1):
            source = bench.arena.tensor(nbytes).copy_(pattern(nbytes))
            assert torch.equal(bench.load(bench.store(source), bench.arena.tensor(nbytes)), source)
    finally:
        bench.close()


def test_close_does_not_wait_and_the_last_transfer_closes(ssd, monkeypatch):
    """1. A write is in the kernel. 2. Somebody closes, and goes on. 3. The descriptor stays until the write returns.

    Its number could be another file's by then. And nobody may wait for a write that
    never returns, or, when the collector closes, for the very thread it runs in.
    """
    writing, closed, real = threading.Event(), threading.Event(), os.pwritev
    descriptors = []

    def gated(fd, buffers, offset):
        writing.set()
        closed.wait(60)
        descriptors.append((fd, os.fstat(fd).st_nlink == 0))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", gated)
    extent = ssd.tier.allocate(4096)
    with ThreadPoolExecutor(1, thread_name_prefix="test-writer") as pool:
        write = pool.submit(ssd.tier.write, extent, pattern(4096), READY)
        writing.wait(60)
        ssd.tier.close()
        closed.set()
        write.result(60)
    ((fd, was_open),) = descriptors
    assert was_open
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# Faults of the drive


def cut_short(monkeypatch, name, at_call):
    """Move fewer bytes than asked from the n-th call on, as a full or failing drive does."""
    real, calls = getattr(os, name), []

    def fake(fd, buffers, offset):
        calls.append(offset)
        if len(calls) >= at_call:
            return real(fd, [memoryview(buffers[0]).cast("B")[:512]], offset) if len(calls) > 1 else 0
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, name, fake)


@pytest.mark.parametrize("at_call", [1, 2])
def test_a_short_write_is_a_failure(ssd, monkeypatch, tmp_path, at_call):
    source = pattern(20 * MIB + 1)[1:]  # staged in three chunks, also where memory could be used in place
    extent = ssd.tier.allocate(20 * MIB)
    with monkeypatch.context() as patch:
        cut_short(patch, "pwritev", at_call)
        if ssd.kind == "ssd-buffered":
            source = pattern(20 * MIB)
            at_call = 1
            patch.setattr(os, "pwritev", lambda fd, buffers, offset: 512)
        with pytest.raises(
            StoreError, match=r"(?s)cannot store activation: 20\.0 MiB .*wrote \d+ bytes, expected"
        ) as caught:
            ssd.tier.write(extent, source, READY)
    assert caught.value.errno is None
    assert caught.value.path == str(tmp_path)
    assert caught.value.offset == extent.offset + (at_call - 1) * 8 * MIB
    ssd.tier.write(extent, source, READY)
    assert torch.equal(ssd.load(extent), source), "the extent is as good as before"


@pytest.mark.parametrize("at_call", [1, 2])
def test_a_short_read_is_a_failure(ssd, monkeypatch, at_call):
    source = pattern(20 * MIB)
    extent = ssd.store(source)  # read into unaligned memory: staged in three chunks
    with monkeypatch.context() as patch:
        cut_short(patch, "preadv", at_call)
        if ssd.kind == "ssd-buffered":
            patch.setattr(os, "preadv", lambda fd, buffers, offset: 512)
        with pytest.raises(
            LoadError, match=r"(?s)cannot load activation: 20\.0 MiB .*read \d+ bytes, expected"
        ) as caught:
            ssd.load(extent, torch.zeros(20 * MIB + 1, dtype=torch.uint8)[1:])
    assert caught.value.nbytes is not None
    assert torch.equal(ssd.load(extent), source)
    assert ssd.arena.used_bytes == 0


def test_a_file_cut_short_is_a_failure(ssd):
    extent = ssd.store(pattern(MIB))
    os.ftruncate(ssd.tier._file.fd, 4096)
    with pytest.raises(LoadError, match="expected"):
        ssd.load(extent)


@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_a_system_error_is_mapped_once_with_its_number(ssd, monkeypatch, name):
    extent = ssd.store(pattern(MIB))

    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, broken)
    kind, transfer = (StoreError, ssd.tier.write) if name == "pwritev" else (LoadError, ssd.tier.read)
    with pytest.raises(kind, match=r"(?s)Input/output error\).*hint: ") as caught:
        transfer(extent, pattern(MIB), READY)
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, extent.offset)
    assert isinstance(caught.value.__cause__, OSError)


def test_no_staging_memory_is_a_failure_of_the_transfer(tmp_path):
    arena = HostArena(CpuStreams(), limit_bytes=4096)
    tier = open_ssd("ssd-early-device", tmp_path, CpuStreams(), arena, MIB)
    extent = tier.allocate(MIB)
    with pytest.raises(StoreError, match="no staging memory"):
        tier.write(extent, pattern(MIB), READY)
    with pytest.raises(LoadError, match="no staging memory"):
        tier.read(extent, pattern(MIB), READY)
    tier.close()


def test_a_directory_that_is_missing(tmp_path):
    with pytest.raises(StorageError, match=r"cannot create the extent file.*No such file") as caught:
        Bench("ssd-early-device", tmp_path / "missing", MIB)
    assert caught.value.errno == errno.ENOENT


def test_a_file_system_without_fallocate_is_used_sparsely(ssd, monkeypatch):
    def refuses(fd, offset, nbytes):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    assert torch.equal(ssd.load(ssd.store(pattern(3 * MIB))), pattern(3 * MIB))


def test_growth_that_does_not_fit_is_tried_with_the_exact_need(ssd, monkeypatch):
    real, asked = os.posix_fallocate, []

    def nearly_full(fd, offset, nbytes):
        asked.append(nbytes)
        if nbytes > 8 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    assert ssd.tier.allocate(MIB).offset == 0
    assert asked == [CAPACITY_BYTES, MIB]
    with pytest.raises(CapacityError, match=r"No space left on device, .* free\)") as caught:
        ssd.tier.allocate(9 * MIB)
    assert (caught.value.errno, caught.value.offset) == (errno.ENOSPC, MIB)
    assert ssd.tier.used_bytes == MIB


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


def test_a_drive_that_is_really_full(tmp_path):
    with mounted_ext4(tmp_path, 48 * MIB) as (_, point):
        bench = Bench("ssd-direct", point, GIB)
        try:
            stored = []

            def fill():
                for seed in range(100):
                    stored.append((bench.store(pattern(4 * MIB, seed)), seed))

            with pytest.raises(CapacityError, match=r"\(No space left on device, .* free\)") as caught:
                fill()
            assert caught.value.errno == errno.ENOSPC
            assert len(stored) >= 5
            for extent, seed in stored:
                assert torch.equal(bench.load(extent), pattern(4 * MIB, seed))
            bench.tier.free(stored[1][0])
            extent = bench.store(pattern(4 * MIB, 1000))
            assert torch.equal(bench.load(extent), pattern(4 * MIB, 1000))
            assert os.listdir(point) == ["lost+found"]
        finally:
            bench.close()
        assert os.statvfs(point).f_bavail * os.statvfs(point).f_frsize > 30 * MIB, "the space is back"


def test_a_drive_that_fails_to_read(tmp_path):
    with mounted_ext4(tmp_path, 128 * MIB) as (image, point):
        bench = Bench("ssd-direct", point, 64 * MIB)
        try:
            extents = [bench.store(pattern(8 * MIB, seed)) for seed in range(8)]
            os.truncate(image, 64 * 1024)
            with pytest.raises(LoadError) as caught:
                list(map(bench.load, extents))
            assert caught.value.errno == errno.EIO
        finally:
            bench.close()
