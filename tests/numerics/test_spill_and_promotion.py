"""Gradients are equal to the last bit while bytes change between host memory and the drive under way."""

from collections import Counter

import pytest
import torch
from training import SEED, assert_nothing_held, assert_same, gradients, settle
from workloads import WORKLOADS

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.transfer import Direction

SHARE = 3
"""The host tier holds one in so many bytes of what forward saves."""

ORDERS = {
    1: ["F0 B0", "F0 F1 B0 B1"],
    4: ["F0 F1 F2 F3 B0 B1 B2 B3", "F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 F2 F3 B3 B2 B1 B0"],
}


def place_of(record, offloader):
    return "host" if record.tier is offloader._tiers[Placement.HOST] else "ssd"


def places(offloader, microbatch):
    """Where the records of a micro-batch are, in the order of their last saves."""
    cache = offloader.cache
    log = cache._reloader.schedule._logs[microbatch]
    current = [s for index, s in enumerate(log._serials) if log._last_position.get(s) == index]
    return [place_of(cache._table[serial], offloader) for serial in current]


class Moves(Counter):
    """Counts the spills and promotions that an offloader begins."""

    def __init__(self, offloader):
        super().__init__()
        migrator = offloader.cache._migrator
        start = migrator._start

        def count(record, direction):
            self["spill" if direction is Direction.STORE else "promotion"] += 1
            return start(record, direction)

        migrator._start = count


def settle_between_layers(model, offloader):
    """Let every transfer end before the next layer runs, in forward and in backward."""

    def after(module, args, output):
        settle(offloader)
        output.register_hook(lambda gradient: settle(offloader))

    for block in model.blocks:
        block.register_forward_hook(after)


def saved_bytes(workload, make_config, num_forwards):
    """Bytes that a host tier needs for all that so many forwards save."""
    model = workload.build()
    with ssdtrain.attach(model, make_config("host", policy="all")) as offloader:
        losses = [model(*workload.batch(index)) for index in range(num_forwards)]
        settle(offloader)
        used_bytes = offloader._tiers[Placement.HOST].used_bytes
        del losses
    return used_bytes


def run(workload, order, config, *, is_slow=False, is_retained=False):
    """Train two steps in an order; return gradients, losses and the counted moves."""
    model = workload.build()
    offloader = None if config is None else ssdtrain.attach(model, config)
    moves = None if offloader is None else Moves(offloader)
    if offloader is not None and is_slow:
        settle_between_layers(model, offloader)
    found = []
    for step in range(2):
        model.zero_grad()
        losses = {}
        for kind, number in order:
            if kind == "F":
                torch.manual_seed(SEED + number)
                losses[number] = model(*workload.batch(8 * step + number))
                continue
            loss = losses.pop(number)
            if is_retained:
                loss.backward(retain_graph=True)
            loss.backward()
            found.append(loss.detach().clone())
            del loss
        found.append(gradients(model))
    if offloader is not None:
        stats = offloader.end_step()
        assert stats.failures == {}
        assert_nothing_held(offloader)
        offloader.detach()
    return found, moves


@pytest.mark.parametrize("is_retained", [False, True], ids=["once", "retained"])
@pytest.mark.parametrize("is_slow", [True, False], ids=["settled", "free"])
@pytest.mark.parametrize(("in_flight", "order"), [(n, order) for n, orders in ORDERS.items() for order in orders])
def test_gradients_are_bit_equal(in_flight, order, is_slow, is_retained, make_config):
    instructions = [(text[0], int(text[1:])) for text in order.split()]
    workload = WORKLOADS["gpt dropout" if is_slow else "gpt rmsnorm swiglu bf16"]
    host_bytes = saved_bytes(workload, make_config, in_flight) // SHARE
    config = make_config("host, then ssd", policy="all", host_bytes=host_bytes, prefetch_bytes=4096)
    expected, _ = run(workload, instructions, None, is_retained=is_retained)
    ours, moves = run(workload, instructions, config, is_slow=is_slow, is_retained=is_retained)
    assert_same(ours, expected)
    if is_slow:
        assert moves["spill"] > 0
        assert moves["promotion"] > 0


def test_the_host_holds_the_tail_when_forward_turns(make_config):
    workload = WORKLOADS["gpt"]
    host_bytes = saved_bytes(workload, make_config, 1) // SHARE
    model = workload.build()
    config = make_config("host, then ssd", policy="all", host_bytes=host_bytes, prefetch_bytes=1)
    with ssdtrain.attach(model, config) as offloader:
        put = offloader.cache.put

        def settled_put(tensor):
            handle = put(tensor)
            settle(offloader)
            return handle

        offloader.cache.put = settled_put
        loss = model(*workload.batch(0))
        found = places(offloader, 0)
        num_on_host = found.count("host")
        assert num_on_host >= len(found) // SHARE - 2
        assert found[-num_on_host:].count("host") >= num_on_host - 2, "all but what went to the drive for lack of room"
        loss.backward()
        del loss
        assert_nothing_held(offloader)


def test_most_loads_come_from_the_host_when_the_drive_has_time(make_config):
    workload = WORKLOADS["gpt"]
    host_bytes = saved_bytes(workload, make_config, 1) // SHARE
    model = workload.build()
    config = make_config("host, then ssd", policy="all", host_bytes=host_bytes, prefetch_bytes=1)
    with ssdtrain.attach(model, config) as offloader:
        settle_between_layers(model, offloader)
        get = offloader.cache.get

        def settled_get(saved):
            tensor = get(saved)
            settle(offloader)
            return tensor

        offloader.cache.get = settled_get
        reads = Counter()
        for placement, tier in offloader._tiers.items():
            read = tier.read

            def count(extent, target, ready, read=read, placement=placement):
                host = offloader._tiers[Placement.HOST]
                is_promotion = any(block is target for _, block in tuple(host._blocks.values()))
                reads["promotion" if is_promotion else placement.value] += 1
                return read(extent, target, ready)

            tier.read = count
        loss = model(*workload.batch(0))
        settle(offloader)
        loss.backward()
        del loss
        assert reads["promotion"] > 0
        assert reads["host"] > 2 * reads["ssd"]
        assert_nothing_held(offloader)
