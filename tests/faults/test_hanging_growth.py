"""A drive that hangs while a file grows or is made shorter: the run goes on, and late ends spoil nothing."""

import errno
import logging
import os
import threading

import pytest
import torch
from fakes import TIMEOUT_SECONDS, Gate
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.errors import CapacityError, StorageError
from ssdtrain_plugin.storage import extent_file
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.extent_file import ExtentFile
from ssdtrain_plugin.storage.impatience import Impatience
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.streams import CpuStreams
from ssdtrain_plugin.units import GIB, KIB

STEP = 64 * KIB
SHORT_SECONDS = 0.1


class Hanging:
    """Calls of one name that wait at a gate, for files in one directory; then they are made, or fail."""

    def __init__(self, monkeypatch, name, directory):
        self.gate, self.error, self.num_calls = Gate(is_open=False), None, 0
        real = getattr(os, name)

        def call(fd, *rest):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(str(directory)):
                self.num_calls += 1
                self.gate.pass_through()
                if self.error is not None:
                    raise OSError(self.error, os.strerror(self.error))
            return real(fd, *rest)

        monkeypatch.setattr(os, name, call)

    def release(self, error=None):
        """Let what hangs return; wait until it has."""
        self.error = error
        self.gate.open()
        join_calls()


def join_calls():
    for thread in threading.enumerate():
        if thread.name == "ssdtrain-call":
            thread.join(TIMEOUT_SECONDS)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(extent_file, "_GROWTH_BYTES", STEP)


@pytest.fixture
def file(tmp_path):
    file = ExtentFile(probe_directory(str(tmp_path)), GIB)
    file.give_up_after(SHORT_SECONDS)
    yield file
    file.close()


def assert_times_out(file, match):
    with pytest.raises(CapacityError, match=match) as caught:
        file.allocate(KIB)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "`io_timeout_seconds`" in caught.value.hint


def test_growth_that_hangs_is_given_up_and_nothing_waits_a_second_time(file, tmp_path, monkeypatch):
    hanging = Hanging(monkeypatch, "posix_fallocate", tmp_path)
    assert_times_out(file, r"no answer within 0\.1 s")
    assert_times_out(file, "an earlier call has not returned yet")
    assert hanging.num_calls == 1
    assert (file.file_bytes, file.used_bytes) == (0, 0)
    assert file.trim() == 0
    hanging.release()
    assert file.file_bytes == STEP == os.fstat(file.fd).st_size, "what came late is used"
    extents = [file.allocate(STEP // 4) for _ in range(8)]
    assert sorted(extent.offset for extent in extents) == list(range(0, 2 * STEP, STEP // 4))
    assert file.file_bytes == 2 * STEP == os.fstat(file.fd).st_size


def test_growth_that_fails_late_leaves_the_file_as_it_was(file, tmp_path, monkeypatch):
    hanging = Hanging(monkeypatch, "posix_fallocate", tmp_path)
    assert_times_out(file, "no answer")
    hanging.release(errno.EIO)
    assert file.file_bytes == os.fstat(file.fd).st_size == 0
    hanging.error = None
    file.allocate(KIB)


def test_a_file_that_is_closed_while_it_grows_is_closed_by_who_comes_late(file, tmp_path, monkeypatch):
    hanging = Hanging(monkeypatch, "posix_fallocate", tmp_path)
    assert_times_out(file, "no answer")
    file.close()
    os.fstat(file.fd)  # a late call must not meet another file under this number
    assert not file.is_unused
    hanging.release()
    assert file.is_unused
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fd)


def with_surplus(file):
    """Have a file of 8 steps, of which 7 are not needed."""
    file.free(file.allocate(8 * STEP))
    assert file.trim() == 0
    return file


def test_a_file_that_hangs_when_it_is_made_shorter_does_not_grow_meanwhile(file, tmp_path, monkeypatch):
    with_surplus(file)
    hanging = Hanging(monkeypatch, "ftruncate", tmp_path)
    with pytest.raises(StorageError, match=r"cannot give space back: .*no answer within 0.1 s") as caught:
        file.trim()  # however much it is: no bytes are moved
    assert caught.value.errno == errno.ETIMEDOUT
    assert file.trim() == 0, "not tried again"
    extents = [file.allocate(STEP)]
    assert_times_out(file, "an earlier call")
    hanging.release()
    assert file.file_bytes == os.fstat(file.fd).st_size == STEP
    extents.append(file.allocate(STEP))
    assert [extent.offset for extent in extents] == [0, STEP]
    assert os.fstat(file.fd).st_size == 2 * STEP


def test_a_file_that_hangs_when_it_grows_is_not_made_shorter_meanwhile(file, tmp_path, monkeypatch):
    with_surplus(file)
    hanging = Hanging(monkeypatch, "posix_fallocate", tmp_path)
    with pytest.raises(CapacityError, match="no answer"):
        file.allocate(9 * STEP)
    assert (file.trim(), file.trim()) == (0, 0)
    hanging.release()
    assert file.file_bytes == os.fstat(file.fd).st_size == 9 * STEP
    assert file.trim() > 0


def test_a_file_with_a_transfer_that_hangs_is_not_made_shorter(file, tmp_path, monkeypatch):
    extent = file.allocate(KIB)
    with_surplus(file)
    hanging = Hanging(monkeypatch, "ftruncate", tmp_path)
    file.hangs(extent)
    assert file.trim() == 0
    assert hanging.num_calls == 0
    file.free(extent)  # the transfer has returned
    hanging.gate.open()
    assert file.trim() > 0


@pytest.mark.parametrize("num_drives", [1, 2])
def test_a_store_that_hangs_keeps_the_file_of_its_drive_as_it_is(tmp_path, monkeypatch, num_drives):
    streams = CpuStreams()
    drives = []
    for number in range(num_drives):
        (tmp_path / str(number)).mkdir()
        drives.append(
            open_drive(str(tmp_path / str(number)), engine="posix", streams=streams, arena=HostArena(streams))
        )
    tier = drives[0] if num_drives == 1 else StripedTier(drives)
    extent = tier.allocate(KIB)
    drive = drives[extent.drive]
    drive.free(drive.allocate(8 * STEP))
    tier.trim()
    before_bytes = drive.file_bytes
    tier.hangs(extent)
    tier.trim()
    assert drive.file_bytes == before_bytes >= 8 * STEP
    tier.free(extent)
    tier.trim()
    assert drive.file_bytes < before_bytes
    assert tier.take_survived() == []
    tier.close()


def test_without_a_thread_to_wait_in_the_drive_is_one_that_fails(file, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(CapacityError, match="can't start new thread") as caught:
        file.allocate(KIB)
    assert caught.value.errno == errno.EAGAIN
    monkeypatch.undo()
    file.allocate(KIB)


def test_errors_of_a_call_reach_who_waits():
    ended = []

    def fail():
        raise OSError(errno.EIO, "on purpose")

    for seconds in (TIMEOUT_SECONDS, float("inf")):
        with pytest.raises(OSError, match="on purpose"):
            Impatience(seconds).run(fail, 1, at_end=lambda: ended.append(1))
    assert len(ended) == 2


@pytest.mark.parametrize("num_drives", [1, 2])
def test_training_goes_on_while_a_file_does_not_grow(tmp_path, monkeypatch, caplog, num_drives):
    def train(offload):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        found, stats = [], []
        offloader = ssdtrain.attach(model, offload) if offload else None
        for _ in range(4):
            loss = model(torch.randn(64, 64)).mean()
            if offloader is not None:
                offloader.cache._queue.wait_idle()
            loss.backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
            del loss
            if offloader is not None:
                stats.append(offloader.end_step())
        if offloader is not None:
            offloader.detach()
        return found, stats

    expected, _ = train(None)
    drives = [tmp_path / str(number) for number in range(num_drives)]
    for drive in drives:
        drive.mkdir()
    hanging = Hanging(monkeypatch, "posix_fallocate", drives[0])
    config = {"paths": [str(drive) for drive in drives], "policy": "all", "min_tensor_bytes": 1}
    with caplog.at_level(logging.WARNING):
        found, stats = train(config | {"io_timeout_seconds": SHORT_SECONDS})
    for ours, plain in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert hanging.num_calls == 1
    failures = {cause for step in stats for cause in step.failures}
    if num_drives == 1:
        assert failures == {f"ssd: timeout at {drives[0]}", "ssd: left alone after a failure"}
        assert sum(step.stored_bytes for step in stats) == 0
    else:
        assert failures == {f"ssd: timeout at {drives[0]}"}
        assert all(step.stored_bytes > 0 for step in stats), "the other drive takes all"
    assert "no answer within" in caplog.text
    hanging.release()
