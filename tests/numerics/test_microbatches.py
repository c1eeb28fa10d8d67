"""Several micro-batches in flight, as a pipeline engine runs them; announced through the hooks, or not."""

import gc
import random
from functools import cache

import pytest
import torch
from fakes import ahead_bytes
from training import SEED, assert_nothing_held, assert_same, gradients, settle
from workloads import WORKLOADS

import ssdtrain_plugin as ssdtrain

ORDERS = {
    "1F1B": "F0 F1 B0 F2 B1 F3 B2 B3",
    "warm-up of two": "F0 F1 F2 B0 F3 B1 B2 B3",
    "all forward, then backward": "F0 F1 F2 F3 B0 B1 B2 B3",
    "backward in reverse": "F0 F1 F2 F3 B3 B2 B1 B0",
    "any": "F0 F1 F2 B1 F3 B3 B0 B2",
}
ANNOUNCED = ["silent", "announced", "announced early", "announced wrongly"]


def run(workload, order, config, how, *, must_load):
    model = workload.build()
    offloader = None if config is None else ssdtrain.attach(model, config)
    losses, numbers, found = {}, {}, []
    for step in range(2):
        model.zero_grad()
        for instruction in order.split():
            kind, index = instruction[0], int(instruction[1:])
            if kind == "F":
                torch.manual_seed(SEED + index)
                losses[index] = model(*workload.batch(4 * step + index))
                numbers[index] = None if offloader is None else offloader.cache._microbatch
                if offloader is not None and how == "announced early":
                    offloader.cache.expect_backward(numbers[min(losses)])
            else:
                if must_load and offloader is not None:
                    settle(offloader)
                loss = losses.pop(index)
                if offloader is None or how == "silent":
                    loss.backward()
                else:
                    wrong = how == "announced wrongly" and losses
                    with offloader.hooks.backward(numbers[min(losses) if wrong else index]):
                        loss.backward()
                del loss
        found.append(gradients(model))
    if offloader is not None:
        stats = offloader.end_step()
        assert stats.stored_bytes + stats.host_bytes + stats.forwarded_bytes > 0
        assert ahead_bytes(offloader.cache) == 0
        assert_nothing_held(offloader)
        offloader.detach()
    return found


@cache
def plain(name, order):
    """Train without the plugin, once for all that is compared with it."""
    return run(WORKLOADS[name], order, None, "", must_load=False)


@pytest.mark.parametrize("how", ANNOUNCED)
@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("config_name", ["ssd", "ssd, no room"])
def test_pipeline_orders(config_name, order, how, make_config):
    config = make_config(config_name)
    for name, must_load in (("gpt dropout", True), ("swiglu chunk", False)):
        ours = run(WORKLOADS[name], ORDERS[order], config, how, must_load=must_load)
        assert_same(ours, plain(name, ORDERS[order]))


@pytest.mark.parametrize("seed", range(4))
def test_random_legal_orders(seed, make_config):
    chance = random.Random(seed)
    waiting, live, order = list(range(6)), [], []
    while waiting or live:
        if waiting and (not live or chance.random() < 0.6):
            live.append(waiting.pop(0))
            order.append(f"F{live[-1]}")
        else:
            order.append(f"B{live.pop(chance.randrange(len(live)))}")
    text, workload = " ".join(order), WORKLOADS["encoder-decoder"]
    expected = run(workload, text, None, "", must_load=False)
    for how in ANNOUNCED:
        config = make_config("ssd", prefetch_bytes=chance.choice([1, 3000, 1 << 20]))
        assert_same(run(workload, text, config, how, must_load=chance.random() < 0.5), expected)


def test_announced_backward_loads_nothing_on_demand(make_config):
    """With room to prefetch, no unpack finds its bytes still on the drive with no load under way."""
    workload = WORKLOADS["gpt"]
    model = workload.build()
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        losses = [model(*workload.batch(index)) for index in range(2)]
        settle(offloader)
        for number, loss in enumerate(losses):
            with offloader.hooks.backward(number):
                loss.backward()
        stats = offloader.end_step()
    assert stats.loaded_bytes > 0
    assert stats.num_loads_on_demand == 0
    assert stats.microbatches == 2


def test_what_micro_batches_share_is_stored_once(make_config):
    """A mask that every micro-batch saves is one storage, in several logs."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x, mask):
            return (self.linear(x) * mask).exp().sum()

    mask = torch.rand(64, 64).round()

    def train(offloader, model):
        losses = [model(torch.full((64, 64), 0.1 * index), mask) for index in range(3)]
        if offloader is not None:
            settle(offloader)
            for number in (0, 1, 2):
                offloader.cache.expect_backward(number)
        for loss in losses:
            loss.backward()
        return gradients(model)

    torch.manual_seed(0)
    expected = train(None, Masked())
    torch.manual_seed(0)
    model = Masked()
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        assert_same(train(offloader, model), expected)
        assert ahead_bytes(offloader.cache) == 0
        assert offloader.end_step().deduplicated_bytes >= 2 * mask.nbytes
        gc.collect()
        assert_nothing_held(offloader)
