"""The CPU twin of the device streams."""

import torch

from ssdtrain_plugin.streams import CpuStreams, DeviceEvent, create_streams


def test_copies_are_done_when_they_return():
    streams = create_streams(torch.device("cpu"))
    assert type(streams) is CpuStreams
    source, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    event = streams.copy_to_host(target, source, streams.record())
    assert isinstance(event, DeviceEvent)
    event.wait()
    event.synchronize()
    assert torch.equal(target, source)
    streams.copy_to_device(target, source.flip(0), streams.record())
    assert torch.equal(target, source.flip(0))
    streams.pin(0, 0)
    streams.unpin(0)
