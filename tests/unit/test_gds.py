"""GPUDirect Storage through a fake kvikio that moves bytes of CPU tensors, short when told."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from fake_kvikio import CompatMode, DeviceTensor, FakeKvikio

from ssdtrain_plugin.errors import EnvironmentUnsupportedError, LoadError, StoreError
from ssdtrain_plugin.storage import gds
from ssdtrain_plugin.storage.drive import DriveTier
from ssdtrain_plugin.storage.gds import GdsEngine, compatibility_reason, gds_problem
from ssdtrain_plugin.storage.memory import HostArena, memory_at
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.storage.scratch import open_scratch
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.units import MIB

PAGE = 4096
CUDA = torch.device("cuda", 0)


@pytest.fixture
def kvikio(monkeypatch):
    return FakeKvikio().install(monkeypatch)


@pytest.fixture
def report(tmp_path):
    report = probe_directory(str(tmp_path))
    if not report.supports_direct:
        pytest.skip(f"O_DIRECT {report.direct_reason}")
    return report


@pytest.fixture
def arena():
    arena = HostArena(CpuStreams())
    yield arena
    arena.close()


@pytest.fixture
def fd(tmp_path, report):
    fd = open_scratch(str(tmp_path), direct=True).fd
    os.posix_fallocate(fd, 0, 4 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def engine(kvikio, fd, report, arena):
    engine = GdsEngine(fd, report=report, arena=arena)
    yield engine
    engine.close()


def device_tensor(nbytes, value=None):
    memory = torch.empty(nbytes, dtype=torch.uint8)
    return DeviceTensor.of(memory.random_(0, 256) if value is None else memory.fill_(value))


# --- moving


def test_device_memory_goes_to_the_file_and_comes_back(engine, kvikio):
    source, target = device_tensor(3 * PAGE), device_tensor(3 * PAGE, 0)
    assert engine.write(source, 2 * PAGE, PAGE) == 2 * PAGE
    assert engine.read(target, 2 * PAGE, PAGE) == 2 * PAGE
    assert torch.equal(target.on_host()[: 2 * PAGE], source.on_host()[: 2 * PAGE])
    assert not target.on_host()[2 * PAGE :].any()
    assert kvikio.calls == [("pwrite", 2 * PAGE, PAGE), ("pread", 2 * PAGE, PAGE)]


def test_host_memory_goes_by_system_calls(engine, kvikio):
    source, target = engine.staging(MIB).random_(0, 256), engine.staging(MIB).zero_()
    assert engine.write(source, MIB, 0) == MIB
    assert engine.read(target, MIB, 0) == MIB
    assert torch.equal(target, source)
    assert kvikio.calls == []


def test_both_ways_see_each_others_bytes(engine):
    host, device = engine.staging(MIB).random_(0, 256), device_tensor(MIB)
    engine.write(host, MIB, 0)
    assert engine.read(device, MIB, 0) == MIB
    assert torch.equal(device.on_host(), host)
    device.on_host().random_(0, 256)
    assert engine.write(device, MIB, 0) == MIB
    assert engine.read(host, MIB, 0) == MIB
    assert torch.equal(device.on_host(), host)


def test_the_device_of_the_memory_is_current(engine, kvikio):
    memory = device_tensor(MIB)
    engine.write(memory, MIB, 0)
    engine.read(memory, MIB, 0)
    assert kvikio.devices == [memory.device, memory.device]


@pytest.mark.parametrize(
    ("nbytes", "in_place"), [(1, 0), (16383, 0), (16384, 16384), (MIB + 1, MIB), (3 * MIB - 1, 3 * MIB - PAGE)]
)
def test_whole_multiples_above_the_threshold_are_in_place(engine, nbytes, in_place):
    assert engine.in_place_bytes(device_tensor(nbytes)) == in_place


def test_host_memory_is_in_place_as_for_system_calls(engine, arena):
    block = arena.tensor(MIB + 5)
    assert engine.in_place_bytes(block) == MIB + PAGE
    assert engine.in_place_bytes(block[1:]) == 0


# --- failing


@pytest.mark.parametrize("count", [0, 1, PAGE, MIB - 1])
def test_a_short_count_is_passed_on(engine, kvikio, count):
    kvikio.limit_bytes = count
    memory = device_tensor(MIB)
    assert engine.write(memory, MIB, 0) == count
    assert engine.read(memory, MIB, 0) == count


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Linux system/library function call error: No space left on device", errno.ENOSPC),
        ("Unable to write file: Input/output error", errno.EIO),
        ("cuFile error: internal error\nmore", errno.EIO),
        ("", errno.EIO),
    ],
)
def test_an_error_of_the_library_is_an_error_of_the_system(engine, kvikio, text, number):
    kvikio.error = RuntimeError(text)
    for call in (engine.write, engine.read):
        with pytest.raises(OSError, match=r"\[Errno \d+\]") as caught:
            call(device_tensor(MIB), MIB, 0)
        assert caught.value.errno == number
        assert "more" not in str(caught.value)


def test_a_drive_turns_short_counts_and_errors_into_errors(kvikio, tmp_path, arena, report):
    drive = DriveTier(
        str(tmp_path),
        create_engine=lambda fd, report: GdsEngine(fd, report=report, arena=arena),
        streams=CpuStreams(),
        disk_bytes=64 * MIB,
    )
    source, target = device_tensor(9 * MIB + 5), device_tensor(9 * MIB + 5, 0)
    extent = drive.allocate(source.numel())
    drive.write(extent, source, DeviceEvent())
    drive.read(extent, target, DeviceEvent())
    assert torch.equal(target.on_host(), source.on_host())
    assert [call[0] for call in kvikio.calls] == ["pwrite", "pread"], "the odd end is staged, the rest is not"
    kvikio.limit_bytes = MIB
    with pytest.raises(StoreError, match=f"wrote {MIB} bytes, expected {9 * MIB}"):
        drive.write(extent, source, DeviceEvent())
    with pytest.raises(LoadError, match=f"read {MIB} bytes, expected {9 * MIB}"):
        drive.read(extent, target, DeviceEvent())
    kvikio.error = RuntimeError("cuFile error: device went away")
    with pytest.raises(StoreError, match="device went away"):
        drive.write(extent, source, DeviceEvent())
    drive.close()
    assert kvikio.open_files == []


# --- opening and closing


def test_opening_keeps_the_bytes_in_the_file(kvikio, fd, report, arena):
    memory = arena.tensor(PAGE).fill_(7)
    os.pwritev(fd, [memory_at(memory.data_ptr(), PAGE)], 0)
    engine = GdsEngine(fd, report=report, arena=arena)
    assert os.fstat(fd).st_size == 4 * MIB
    memory.zero_()
    assert engine.read(memory, PAGE, 0) == PAGE
    assert torch.equal(memory, torch.full_like(memory, 7))
    engine.close()


def test_closing_gives_the_librarys_descriptors_back(kvikio, fd, report, arena):
    before = len(os.listdir("/proc/self/fd"))
    engine = GdsEngine(fd, report=report, arena=arena)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    engine.close()
    engine.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.fstat(fd).st_size == 4 * MIB, "the file itself stays open"


@pytest.mark.parametrize(("before", "wanted", "after"), [(1, 8, 8), (16, 8, 16)])
def test_kvikio_gets_more_threads_and_never_fewer(kvikio, fd, report, arena, before, wanted, after):
    kvikio.settings["num_threads"] = before
    GdsEngine(fd, report=report, arena=arena, num_threads=wanted).close()
    assert kvikio.settings["num_threads"] == after


def test_the_page_cache_is_avoided_where_kvikio_can(kvikio, fd, report, arena):
    GdsEngine(fd, report=report, arena=arena).close()
    assert kvikio.settings["auto_direct_io_read"] is kvikio.settings["auto_direct_io_write"] is True
    del kvikio.settings["auto_direct_io_read"]  # an older release
    GdsEngine(fd, report=report, arena=arena).close()


def test_a_file_that_cannot_be_opened_is_an_environment_error(kvikio, report, arena):
    with pytest.raises(EnvironmentUnsupportedError, match=r"kvikio does not take a file in `.*` .*No such file"):
        GdsEngine(1 << 20, report=report, arena=arena)


# --- being honest


def test_direct_transfers_are_called_so(engine, kvikio):
    assert not engine.is_compatible_mode
    assert engine.describe() == "gds, GPUDirect Storage"
    assert kvikio.settings["compat_mode"] is CompatMode.AUTO, "as it was"


REASONS = {
    "asked for": ({"is_preferred": True, "mode": CompatMode.ON}, "asked for, by KVIKIO_COMPAT_MODE"),
    "no libcufile": ({"is_preferred": True, "libcufile_version": (0, 0)}, "libcufile.so.0 does not load"),
    "no udev": ({"is_preferred": True, "has_udev": False}, "/run/udev cannot be read"),
    "other": ({"is_preferred": True}, "not supported on this system"),
    "no module": ({"is_gds_available": False}, "nvidia-fs is not loaded"),
}


@pytest.mark.parametrize("case", REASONS.values(), ids=REASONS)
def test_the_compatibility_mode_is_named_with_its_reason(kvikio, fd, report, arena, monkeypatch, case):
    state, reason = case
    monkeypatch.setattr(os, "access", lambda *_: state.get("has_udev", True))
    kvikio.settings["compat_mode"] = state.get("mode", CompatMode.AUTO)
    for name in ("is_preferred", "libcufile_version", "is_gds_available"):
        setattr(kvikio, name, state.get(name, getattr(kvikio, name)))
    assert reason in compatibility_reason()
    engine = GdsEngine(fd, report=report, arena=arena)
    assert engine.is_compatible_mode
    assert engine.describe().startswith("gds, compatibility mode: ")
    assert reason in engine.describe()
    engine.close()


def test_a_file_that_libcufile_refuses_is_named(kvikio, fd, report, arena):
    kvikio.refusal = "cuFile error: GPUDirect Storage not supported on current file\nand more"
    assert compatibility_reason() is None, "nothing says so before"
    engine = GdsEngine(fd, report=report, arena=arena)
    assert engine.describe() == (
        "gds, compatibility mode: libcufile refuses the file: "
        "cuFile error: GPUDirect Storage not supported on current file"
    )
    assert kvikio.settings["compat_mode"] is CompatMode.AUTO
    engine.close()


def test_nothing_is_wrong(kvikio):
    assert gds_problem(CUDA) is None
    assert compatibility_reason() is None


def test_a_device_without_gpudirect_is_named(kvikio):
    assert "activations are on `cpu`" in gds_problem(torch.device("cpu"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(gds.importlib.util, "find_spec", lambda name: None)
    assert gds_problem(CUDA) == "the package `kvikio` is not installed"


@pytest.mark.parametrize("error", [ImportError("libkvikio.so: no\nmore"), OSError("libkvikio.so: no"), RuntimeError])
def test_a_package_that_does_not_load_is_named(kvikio, monkeypatch, error):
    def fail(name, *_):
        raise error

    monkeypatch.setattr(gds.importlib, "import_module", fail)
    assert gds_problem(CUDA).startswith("the package `kvikio` does not work: ")


def test_importing_the_module_loads_no_kvikio():
    code = "import sys, ssdtrain_plugin.storage.gds; sys.exit('kvikio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
