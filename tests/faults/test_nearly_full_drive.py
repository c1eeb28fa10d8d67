"""A drive with little room that ranks share: a file that grows takes what it needs, and not all that is left."""

import os

import pytest

from ssdtrain_plugin.errors import CapacityError
from ssdtrain_plugin.storage.extent_file import ExtentFile
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.units import KIB, MIB


@pytest.fixture
def asked(monkeypatch):
    """Sizes of all requests for space; the drive has 1 MiB and tells so."""
    real, sizes, taken = os.posix_fallocate, [], [0]

    def fallocate(fd, offset, nbytes):
        sizes.append(nbytes)
        if taken[0] + nbytes > MIB:
            raise OSError(28, "No space left on device")
        real(fd, offset, nbytes)
        taken[0] += nbytes

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(ExtentFile, "drive_free_bytes", lambda self: MIB - taken[0])
    return sizes


def test_no_request_is_larger_than_what_is_free(tmp_path, asked):
    file = ExtentFile(probe_directory(str(tmp_path)), 256 * MIB)
    try:
        for _ in range(16):
            file.allocate(64 * KIB)
        assert asked == [64 * KIB] * 16
        with pytest.raises(CapacityError, match="No space left") as caught:
            file.allocate(64 * KIB)
        assert caught.value.errno == 28
    finally:
        file.close()


def test_with_enough_room_it_grows_in_large_steps(tmp_path, asked):
    file = ExtentFile(probe_directory(str(tmp_path)), MIB)
    try:
        for _ in range(16):
            file.allocate(64 * KIB)
        assert asked == [MIB]
    finally:
        file.close()
