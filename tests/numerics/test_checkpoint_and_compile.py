"""Regions that are recomputed, by torch or through our drop-in, and regions that are compiled."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint_sequential
from training import assert_same, train
from workloads import Gpt, Workload

import ssdtrain_plugin as ssdtrain

RUNS = {
    "torch, reentrant": lambda block, x: torch_checkpoint(block, x, use_reentrant=True),
    "torch, non-reentrant": lambda block, x: torch_checkpoint(block, x, use_reentrant=False),
    "torch, nested": lambda block, x: torch_checkpoint(
        lambda y: torch_checkpoint(block, y, use_reentrant=False), x, use_reentrant=False
    ),
    "torch, nested mixed": lambda block, x: torch_checkpoint(
        lambda y: torch_checkpoint(block, y, use_reentrant=True), x, use_reentrant=False
    ),
    "torch, two blocks": lambda block, x: checkpoint_sequential([block, block], 2, x, use_reentrant=False),
    "ours": lambda block, x: ssdtrain.checkpoint(block, x),
    "ours, reentrant": lambda block, x: ssdtrain.checkpoint(block, x, use_reentrant=True),
    "ours, with options": lambda block, x: ssdtrain.checkpoint(
        lambda y, mask: block(y, mask), x, mask=None, preserve_rng_state=True, determinism_check="default"
    ),
}


@pytest.mark.parametrize("checkpointing", ["offload", "recompute"])
@pytest.mark.parametrize("name", list(RUNS))
def test_checkpointed_blocks(name, checkpointing, make_config):
    workload = Workload(partial(Gpt, dropout=0.2, run=RUNS[name]))
    expected, _ = train(workload)
    for config_name in ("ssd", "ssd, no room", "host"):
        for must_load in (True, False):
            config = make_config(config_name, checkpointing=checkpointing)
            ours, stats = train(workload, config, must_load=must_load)
            assert_same(ours, expected)
            assert not must_load or all(step.loaded_bytes for step in stats)


def test_offload_and_recompute_give_the_same_as_no_checkpoint(make_config):
    plain, _ = train(Workload(partial(Gpt, dropout=0.2)))
    for checkpointing in ("offload", "recompute"):
        workload = Workload(partial(Gpt, dropout=0.2, run=RUNS["ours"]))
        ours, _ = train(workload, make_config("ssd", checkpointing=checkpointing), must_load=True)
        assert_same(ours, plain)


def test_what_the_two_meanings_of_checkpointing_cost(make_config):
    """``offload`` runs each block once, ``recompute`` twice and stores only its input."""
    calls, stored = {}, {}
    for checkpointing in ("offload", "recompute"):
        count = []

        def run(block, x, count=count):
            def region(y):
                count.append(1)
                return block(y)

            return ssdtrain.checkpoint(region, x)

        workload = Workload(partial(Gpt, layers=3, run=run))
        config = make_config("ssd", checkpointing=checkpointing)
        _, stats = train(workload, config, steps=1, must_load=True)
        calls[checkpointing], stored[checkpointing] = len(count), stats[0].stored_bytes
    assert calls == {"offload": 3, "recompute": 6}
    assert stored["recompute"] < 0.5 * stored["offload"]


def test_outside_of_an_attached_model_checkpoint_recomputes():
    count = []

    def region(x):
        count.append(1)
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    ssdtrain.checkpoint(region, x).sum().backward()
    assert len(count) == 2
    assert torch.equal(x.grad, torch.ones(3).exp())


@pytest.mark.filterwarnings("default")  # dynamo's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers(backend, make_config):
    """Compiled per layer, the hooks outside; what a region saves is packed at its end."""

    class Compiled(Gpt):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block.mlp.compile(backend=backend)
                block.attention.compile(backend=backend)

    torch._dynamo.reset()
    workload = Workload(Compiled)
    expected, _ = train(workload)
    for must_load in (True, False):
        ours, stats = train(workload, make_config("ssd"), must_load=must_load)
        assert_same(ours, expected)
        assert not must_load or all(step.loaded_bytes for step in stats)
    torch._dynamo.reset()
