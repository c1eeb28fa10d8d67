"""A drive that fails while space is given back, or asked for free space: the run goes on, and says so once."""

import errno
import logging
import os

import pytest
import torch
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin import runtime
from ssdtrain_plugin.errors import CapacityError, StorageError
from ssdtrain_plugin.storage import extent_file
from ssdtrain_plugin.storage.extent_file import ExtentFile
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.units import GIB, KIB

GROWTH_BYTES = 64 * KIB


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(x).exp().mean()


def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def gradients_of(model, sizes, offloader=None):
    """Train steps of these batch sizes; each step's gradients and, with an offloader, its numbers."""
    found, stats = [], []
    for number, size in enumerate(sizes):
        torch.manual_seed(number)
        loss = model(torch.randn(size, 64))
        if offloader is not None:
            offloader.cache._queue.wait_idle()
        loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        del loss
        if offloader is not None:
            stats.append(offloader.end_step())
    return found, stats


@pytest.fixture
def small_steps(monkeypatch):
    """Files grow, and are looked at, in steps that a test can make."""
    monkeypatch.setattr(extent_file, "_GROWTH_BYTES", GROWTH_BYTES)
    monkeypatch.setattr(runtime, "_TRIM_STEPS", 1)


@pytest.mark.parametrize("num_drives", [1, 2])
def test_a_drive_that_takes_no_space_back_does_not_stop_training(
    tmp_path, monkeypatch, caplog, small_steps, num_drives
):
    sizes = [4096, 16, 16, 16, 16, 16]
    expected, _ = gradients_of(Model(), sizes)
    drives = [tmp_path / str(number) for number in range(num_drives)]
    for drive in drives:
        drive.mkdir()
    monkeypatch.setattr(os, "ftruncate", fail)
    config = {"paths": [str(drive) for drive in drives], "policy": "all", "min_tensor_bytes": 1}
    model = Model()
    with caplog.at_level(logging.WARNING), ssdtrain.attach(model, config) as offloader:
        found, stats = gradients_of(model, sizes, offloader)
    for ours, plain in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert stats[0].failures == {}
    place = {f"ssd: EIO at {drive}": 1 for drive in drives}
    assert stats[-1].failures == place, "a failure of the step before shows with the next store"
    assert all(step.stored_bytes > 0 for step in stats), "the drive stays in use"
    said = [record.getMessage() for record in caplog.records if "cannot give space back" in record.getMessage()]
    assert len(said) == num_drives
    assert "Input/output error" in said[0]
    assert "no bytes are lost, gradients are not affected" in said[0]


def test_a_file_that_could_not_be_trimmed_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(extent_file, "_GROWTH_BYTES", GROWTH_BYTES)
    file = ExtentFile(probe_directory(str(tmp_path)), GIB)
    try:
        file.free(file.allocate(8 * GROWTH_BYTES))
        file.trim()
        with monkeypatch.context() as broken:
            broken.setattr(os, "ftruncate", fail)
            with pytest.raises(StorageError, match=r"cannot give space back.*Input/output error") as caught:
                file.trim()
        assert caught.value.errno == errno.EIO
        assert file.file_bytes == os.fstat(file.fd).st_size == 8 * GROWTH_BYTES
        assert file.trim() == 7 * GROWTH_BYTES, "the next call tries again"
        file.allocate(16 * GROWTH_BYTES)
    finally:
        file.close()


def test_a_drive_that_does_not_say_what_is_free_refuses_as_any_failing_drive(tmp_path, monkeypatch):
    file = ExtentFile(probe_directory(str(tmp_path)), GIB)
    try:
        monkeypatch.setattr(os, "fstatvfs", fail)
        with pytest.raises(CapacityError, match="Input/output error") as caught:
            file.allocate(KIB)
        assert caught.value.errno == errno.EIO
        assert file.free_words() == "free space unknown: Input/output error"
    finally:
        file.close()
