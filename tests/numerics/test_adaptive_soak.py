"""Two hundred steps of changing shapes under the adaptive policy: nothing piles up, and the bits stay equal."""

import threading

import pytest
import torch
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.units import KIB, MIB

NUM_STEPS = 200
LENGTHS = (96, 512, 200)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def make_model():
    torch.manual_seed(0)
    return Model()


def run_step(model, optimizer, number, microbatches):
    generator = torch.Generator().manual_seed(number)
    losses = []
    for _ in range(microbatches):
        loss = model(torch.randn(4, LENGTHS[number % len(LENGTHS)], 128, generator=generator))
        loss.backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
    if number % 3 == 0:  # an evaluation comes between
        with torch.no_grad():
            losses.append(model(torch.randn(4, 64, 128, generator=generator)).item())
    return losses


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("microbatches", [1, 8])
def test_nothing_piles_up_over_two_hundred_steps(tmp_path, microbatches):
    plain, ours = make_model(), make_model()
    plain_optimizer, optimizer = (torch.optim.SGD(model.parameters(), lr=1e-2) for model in (plain, ours))
    config = ssdtrain.OffloadConfig(paths=[str(tmp_path)], min_tensor_bytes=64 * KIB, io_threads=2)
    with ssdtrain.attach(ours, config) as offloader:
        offloader.hooks.end_step = None  # a step spans the micro-batches
        drive = offloader._tiers[Placement.SSD]
        stored, threads, files = [], [], []
        for number in range(NUM_STEPS // microbatches + 20):
            losses = run_step(ours, optimizer, number, microbatches)
            stats = offloader.end_step()
            stored.append(stats.stored_bytes)
            threads.append(threading.active_count())
            files.append(drive.file_bytes)
            if number % 10 == 0 or number < 10:
                assert losses == run_step(plain, plain_optimizer, number, microbatches)
            else:
                run_step(plain, plain_optimizer, number, microbatches)
            assert stats.failures == {}
            offloader.cache._queue.wait_idle()
            assert offloader.cache.is_idle()
            assert (offloader.cache.live_bytes, drive.used_bytes) == (0, 0)
        policy = offloader.cache._placer.policy
        assert len(policy._plans) == len(LENGTHS) * microbatches, (
            "a plan for each shape and slot, none for what is gone"
        )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert sum(stored) > 0
    assert max(threads) <= threads[2] + 4
    assert max(files) <= 256 * MIB
    assert max(files[10:]) == max(files[:10])
