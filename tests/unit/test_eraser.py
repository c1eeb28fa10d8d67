"""Zeros over what was freed."""

import errno
import os
import time

import pytest
import torch
from fakes import Gate
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.deadlines import ending
from ssdtrain_plugin.storage import eraser
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent

MIB = 1 << 20
SECRET = 0x5A


@pytest.fixture
def drive(tmp_path):
    streams = CpuStreams()
    arena = HostArena(streams)
    drive = open_drive(str(tmp_path), engine="posix", streams=streams, arena=arena, disk_bytes=64 * MIB)
    drive.zero_what_is_freed()
    yield drive
    drive.close()
    arena.close()


def store(drive, nbytes):
    extent = drive.allocate(nbytes)
    drive.write(extent, torch.full((nbytes,), SECRET, dtype=torch.uint8), DeviceEvent())
    return extent


def same_file(drive):
    """Open the drive's file a second time, through the page cache."""
    return os.open(f"/proc/self/fd/{drive._file.fd}", os.O_RDONLY)


def secrets_in(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0).count(SECRET)


@pytest.mark.parametrize("nbytes", [1, 4096, 5000, MIB + 3, 9 * MIB])
def test_what_is_freed_is_zeroed_before_it_is_given_to_another(drive, nbytes):
    extent = store(drive, nbytes)
    fd = same_file(drive)
    try:
        assert secrets_in(fd) >= nbytes
        drive.free(extent)
        drive.close()
        assert secrets_in(fd) == 0
    finally:
        os.close(fd)


def test_what_is_not_freed_is_zeroed_at_the_end(drive):
    store(drive, MIB)
    freed = store(drive, MIB)
    drive.free(freed)
    store(drive, 2 * MIB)
    fd = same_file(drive)
    try:
        drive.close()
        assert secrets_in(fd) == 0
    finally:
        os.close(fd)


def test_zeros_go_to_the_drive_a_little_at_a_time(drive, monkeypatch):
    """Else an eraser that waits for all of them at the end looks as if it did not get on."""
    monkeypatch.setattr(eraser, "_BYTES_A_SYNC", 2 * MIB)
    at_syncs = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: at_syncs.append(drive._eraser._written_bytes))
    for _ in range(5):
        store(drive, MIB)
    drive.close()
    assert at_syncs == [2 * MIB, 4 * MIB, 5 * MIB]


def test_other_extents_are_not_touched(drive):
    extents = [store(drive, MIB) for _ in range(4)]
    drive.free(extents[1])
    drive.free(extents[3])
    while drive.used_bytes > 2 * MIB:  # its thread ends, or the test does
        os.sched_yield()
    for extent in (extents[0], extents[2]):
        target = torch.zeros(MIB, dtype=torch.uint8)
        drive.read(extent, target, DeviceEvent())
        assert torch.equal(target, torch.full_like(target, SECRET))


def test_a_drive_that_takes_no_zeros_is_said_once_and_gives_its_room_back(drive, monkeypatch, caplog):
    extents = [store(drive, MIB) for _ in range(3)]
    monkeypatch.setattr(os, "pwritev", refuse)
    for extent in extents:
        drive.free(extent)
    while drive.used_bytes:
        os.sched_yield()
    drive.close()
    assert len([record for record in caplog.records if "zero_on_free" in record.message]) == 1


def refuse(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_drives_that_hang_do_not_hold_up_a_detach(tmp_path, monkeypatch, caplog):
    """Stores and zeros hang, on two drives: what is waited for, one after the other, is less than 5 s in all."""
    gate, write = Gate(is_open=False), os.pwritev

    def hang(*args):
        gate.pass_through()
        return write(*args)

    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.mkdir()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    config = {"paths": [str(path) for path in paths], "policy": "all", "min_tensor_bytes": 1, "zero_on_free": True}
    with ssdtrain.attach(model, config) as offloader:
        monkeypatch.setattr(os, "pwritev", hang)
        loss = model(torch.randn(256, 64)).sum()
        gate.wait_for_arrival()
        (tier,) = offloader._tiers.values()
        erasers = [drive.tier._eraser._thread for drive in tier._drives]
        started = time.monotonic()
        offloader.detach()
        seconds = time.monotonic() - started
    try:
        assert all(thread.is_alive() for thread in erasers)
        assert seconds < 5.0, "a bound on a hang, not a measurement"
        assert caplog.text.count("the drive does not answer") == 2
    finally:
        gate.open()
    del loss


def test_an_eraser_that_gets_on_is_waited_for(drive, monkeypatch, caplog):
    """However little is left of the allowance for the end."""
    extents = [store(drive, 9 * MIB) for _ in range(3)]
    fd = same_file(drive)
    eraser = drive._eraser
    with ending() as allowance:
        allowance.left_seconds = 1e-9
        monkeypatch.setattr(eraser, "_gets_on", lambda seconds: eraser._thread.join(1.0) or True)
        drive.close()
    try:
        assert secrets_in(fd) == 0
        assert not caplog.records
    finally:
        os.close(fd)
    del extents


def test_training_with_it_gives_the_same_gradients_and_leaves_zeros(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x = torch.randn(256, 64)
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    config = ssdtrain.OffloadConfig(paths=str(tmp_path), policy="all", min_tensor_bytes=1, zero_on_free=True)
    with ssdtrain.attach(model, config) as offloader:
        (tier,) = offloader._tiers.values()
        fd = same_file(tier)
        for _ in range(3):
            model.zero_grad()
            loss = model(x).sum()
            offloader.cache._queue.wait_idle()
            loss.backward()
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                assert torch.equal(parameter.grad, gradient)
            assert offloader.end_step().stored_bytes > 0
        held = model(x).sum()
        assert "zeros over what is freed" in offloader.report()
    try:
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        assert not content.strip(b"\0")
    finally:
        os.close(fd)
    del held
