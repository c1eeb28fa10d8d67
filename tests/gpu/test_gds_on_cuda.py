"""kvikio for real: device memory to the drive and back, whichever way it says it takes."""

import pytest
import torch

from ssdtrain_plugin.storage.drive import DriveTier
from ssdtrain_plugin.storage.gds import GdsEngine, compatibility_reason, gds_problem
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.streams import create_streams

MIB = 1 << 20
SIZES = [1, 4095, 4096, 4097, MIB - 1, 2 * MIB, 24 * MIB + 5, 256 * MIB + 4097]


@pytest.fixture
def drive(device, tmp_path):
    problem = gds_problem(device)
    if problem is not None:
        pytest.skip(problem)
    streams = create_streams(device)
    arena = HostArena(streams)
    drive = DriveTier(
        str(tmp_path),
        create_engine=lambda fd, report: GdsEngine(fd, report=report, arena=arena),
        streams=streams,
        disk_bytes=1024 * MIB,
    )
    drive.record = streams.record
    yield drive
    drive.close()
    arena.close()


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_of_the_device_come_back(drive, device, nbytes):
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    extent = drive.allocate(nbytes)
    drive.write(extent, source, drive.record())
    target = torch.zeros_like(source)
    drive.read(extent, target, drive.record()).wait()
    assert torch.equal(target, source)
    drive.free(extent)


def test_the_engine_moves_device_memory_and_sees_what_staging_wrote(drive, device):
    extent = drive.allocate(8 * MIB)
    source = torch.randint(0, 256, (8 * MIB,), dtype=torch.uint8, device=device)
    assert drive._engine.in_place_bytes(source) == source.numel()
    torch.cuda.synchronize()
    assert drive._engine.write(source, 8 * MIB, extent.offset) == 8 * MIB
    host = drive._engine.staging(8 * MIB)
    assert drive._engine.read(host, 8 * MIB, extent.offset) == 8 * MIB
    assert torch.equal(host, source.cpu())
    host.add_(1)
    assert drive._engine.write(host, 8 * MIB, extent.offset) == 8 * MIB
    assert drive._engine.read(source, 8 * MIB, extent.offset) == 8 * MIB
    assert torch.equal(source.cpu(), host)


def test_it_says_which_way_it_takes(drive):
    said = drive._engine.describe()
    assert drive._engine.is_compatible_mode == said.startswith("gds, compatibility mode: ")
    if compatibility_reason() is not None:
        assert compatibility_reason() in said
