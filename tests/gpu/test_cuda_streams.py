"""Ordering on the device: no copy reads too early, no memory is given away too soon."""

import pytest
import torch

from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.host import HostTier
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.streams import create_streams

MIB = 1 << 20
SLOW_CYCLES = 200_000_000  # some 100 ms on any device of these years


@pytest.fixture
def streams(device):
    return create_streams(device)


@pytest.fixture(params=[Placement.HOST, Placement.SSD], ids=["host", "ssd"])
def tier(request, streams, device, tmp_path):
    arena = HostArena(streams)
    if request.param is Placement.HOST:
        tier = HostTier(256 * MIB, streams=streams)
    else:
        tier = open_drive(str(tmp_path), engine="posix", streams=streams, arena=arena, disk_bytes=256 * MIB)
    yield tier
    tier.close()
    arena.close()


def test_copy_streams_are_not_the_compute_stream(streams, device):
    compute = torch.cuda.current_stream(device)
    assert len({compute, torch.cuda.default_stream(device), streams._store_stream, streams._load_stream}) in (3, 4)
    assert compute not in (streams._store_stream, streams._load_stream)
    assert streams._store_stream != streams._load_stream


def test_a_store_sees_what_a_slow_kernel_launched_before_it_writes(streams, tier, device):
    source = torch.zeros(8 * MIB, dtype=torch.uint8, device=device)
    extent = tier.allocate(source.numel())
    torch.cuda._sleep(SLOW_CYCLES)
    source.fill_(7)
    tier.write(extent, source, streams.record())
    target = torch.zeros_like(source)
    tier.read(extent, target, streams.record()).wait()
    assert torch.equal(target, torch.full_like(target, 7))
    tier.free(extent)


def test_a_store_does_not_wait_for_kernels_launched_after_it(streams, tier, device):
    source = torch.full((8 * MIB,), 3, dtype=torch.uint8, device=device)
    extent = tier.allocate(source.numel())
    ready = streams.record()
    torch.cuda._sleep(20 * SLOW_CYCLES)
    after = streams.record()
    tier.write(extent, source, ready)
    assert not after._event.query(), "the compute stream was waited for"
    torch.cuda.synchronize()
    tier.free(extent)


def test_a_load_target_in_reused_memory_is_not_clobbered(streams, tier, device):
    """1. A slow kernel still writes to memory that was freed. 2. The load target is that memory."""
    source = torch.full((8 * MIB,), 9, dtype=torch.uint8, device=device)
    extent = tier.allocate(source.numel())
    tier.write(extent, source, streams.record())
    del source
    old = torch.empty(8 * MIB, dtype=torch.uint8, device=device)
    address = old.data_ptr()
    torch.cuda._sleep(SLOW_CYCLES)
    old.fill_(1)
    del old
    target = torch.empty(8 * MIB, dtype=torch.uint8, device=device)
    assert target.data_ptr() == address, "the test is vacuous: other memory was given"
    tier.read(extent, target, streams.record()).wait()
    assert torch.equal(target, torch.full_like(target, 9))
    tier.free(extent)


def test_the_compute_stream_waits_for_a_load_and_the_host_does_not_have_to(streams, device):
    host = torch.full((64 * MIB,), 5, dtype=torch.uint8).pin_memory()
    target = torch.zeros(64 * MIB, dtype=torch.uint8, device=device)
    for value in range(5):
        host.fill_(value)
        streams.copy_to_device(target, host, streams.record()).wait()
        result = target.sum(dtype=torch.int64)  # launched at once, on the compute stream
        assert result.item() == value * target.numel()


def test_another_compute_stream_is_respected(streams, tier, device):
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        source = torch.zeros(8 * MIB, dtype=torch.uint8, device=device)
        extent = tier.allocate(source.numel())
        torch.cuda._sleep(SLOW_CYCLES)
        source.fill_(4)
        tier.write(extent, source, streams.record())
        target = torch.empty_like(source)
        tier.read(extent, target, streams.record()).wait()
        assert torch.equal(target, torch.full_like(target, 4))
    tier.free(extent)


def test_pinned_memory_is_pinned_and_given_back(streams):
    arena = HostArena(streams)
    block = arena.tensor(4 * MIB)
    assert block.is_pinned()
    del block
    arena.close()
