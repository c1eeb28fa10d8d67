"""Checks of transformer blocks under recompute flags, and of the checkpoint function, in one process."""

import megatron.core
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron_checks import (
    HIDDEN,
    MICROBATCHES,
    SEQUENCE,
    STEPS,
    Run,
    Skip,
    Stage,
    assert_same,
    batches,
    compare,
    config_of,
    seed_all,
)
from packaging import version
from torch import nn

import ssdtrain_plugin

LAYERS = 5
CALLS = STEPS * MICROBATCHES


def full(method, num_layers, **more):
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num_layers, **more}


def selective(*modules, **more):
    return {"recompute_granularity": "selective", "recompute_modules": list(modules), **more}


class _Block(nn.Module):
    """A transformer block with a causal mask, whose modules of some name are counted."""

    def __init__(self, config, counted):
        super().__init__()
        self.block = TransformerBlock(config, get_gpt_layer_local_spec())
        self.register_buffer("mask", torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1))
        self.num_calls = 0
        for name, module in self.block.named_modules():
            if name.rpartition(".")[2] == counted or (counted == "layer" and name.count(".") == 1):
                module.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.num_calls += 1

    def forward(self, x):
        return self.block(hidden_states=x, attention_mask=self.mask)


def _check_block(directory, *, without, with_plugin, counted="layer", block=None, **config):
    """Compare, and count how often the modules of a name run in all steps together."""
    counts = []

    def run(offload):
        stage = Stage(config_of(num_layers=LAYERS, **config), _Block(config_of(num_layers=LAYERS, **config), counted))
        found = Run(stage).steps()
        counts.append(stage.body.num_calls)
        return found

    _, books = compare(run, directory, **(block or {}))
    assert counts == [without * CALLS, with_plugin * CALLS]
    return books


def check_block_without_recomputation(directory):
    _check_block(directory, without=LAYERS, with_plugin=LAYERS)


def check_block_full_uniform(directory):
    _check_block(directory, without=2 * LAYERS, with_plugin=LAYERS, **full("uniform", 1))


def check_block_full_uniform_that_does_not_divide(directory):
    if version.parse(megatron.core.__version__).release < (0, 17):
        raise Skip(f"megatron-core {megatron.core.__version__} itself looks for a layer behind the last one")
    for number in (2, 3):
        place = directory / _new(directory, str(number))
        _check_block(place, without=2 * LAYERS, with_plugin=LAYERS, **full("uniform", number))


def check_block_full_block_offloads_some_layers_and_keeps_the_rest(directory):
    places = [directory / _new(directory, name) for name in ("some", "all")]
    some = _check_block(places[0], without=LAYERS + 2, with_plugin=LAYERS, **full("block", 2))[0]
    every = _check_block(places[1], without=2 * LAYERS, with_plugin=LAYERS, **full("block", LAYERS))[0]
    assert some["saved_bytes"] == every["saved_bytes"]
    assert 0.35 * every["stored_bytes"] < some["stored_bytes"] < 0.45 * every["stored_bytes"]  # 2 of 5


def check_block_full_recomputed_with_inputs_on_the_drive(directory):
    for number, flags in enumerate((full("uniform", LAYERS), full("block", 2))):
        runs = 2 * LAYERS if flags["recompute_method"] == "uniform" else LAYERS + 2
        place = directory / _new(directory, str(number))
        _check_block(place, without=runs, with_plugin=runs, block={"checkpointing": "recompute"}, **flags)


def check_block_full_with_distributed_saves(directory):
    flags = full("uniform", LAYERS, distribute_saved_activations=True)
    _check_block(directory / _new(directory, "offload"), without=2 * LAYERS, with_plugin=LAYERS, **flags)
    again = {"checkpointing": "recompute"}
    _check_block(directory / _new(directory, "again"), without=2 * LAYERS, with_plugin=2 * LAYERS, block=again, **flags)


def check_block_selective_core_attention(directory):
    flags = selective("core_attn")
    _check_block(directory, without=2 * LAYERS, with_plugin=2 * LAYERS, counted="core_attention", **flags)


def check_block_selective_mlp_without_biases(directory):
    flags = selective("mlp", add_bias_linear=False)
    _check_block(directory, without=2 * LAYERS, with_plugin=2 * LAYERS, counted="mlp", **flags)


def check_block_in_evaluation_mode_recomputes_nothing(directory):
    """Without `train()` Megatron's block takes the other branch."""

    def run(offload):
        config = config_of(num_layers=LAYERS, **full("uniform", 1))
        stage = Stage(config, _Block(config, "layer")).eval()
        found = Run(stage).steps()
        assert stage.body.num_calls == LAYERS * CALLS
        return found

    # The flags say "these layers, and no others", and none of them is a region now.
    compare(run, directory, stores=False)


def _new(directory, name):
    (directory / name).mkdir()
    return name


# ---------------------------------------------------------------------- the function


class _Region(nn.Module):
    """A body with one checkpointed region that draws random numbers of both kinds.

    Args:
        checkpoint: Called in Megatron's form.
        distributes: What is given for ``distribute_saved_activations``.
    """

    def __init__(self, checkpoint, distributes=False):
        super().__init__()
        self.inner, self.outer = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self._checkpoint, self._distributes = checkpoint, distributes
        self.register_buffer("scale", torch.tensor(2.0))
        self.num_calls, self.states = 0, []

    def _run(self, x, scale):
        self.num_calls += 1
        x = F.dropout(torch.tanh(self.inner(x)) * scale, 0.3)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, 0.3)

    def forward(self, x):
        y = self._checkpoint(self._run, self._distributes, torch.sin(self.outer(x)), self.scale)
        self.states.append(_random_states())
        return y


def _random_states():
    return [torch.get_rng_state(), dict(get_cuda_rng_tracker().get_states())]


def _check_region(directory, checkpoint, *, calls, stores=True, distributes=False, block=None, **config):
    """Compare losses, gradients and random states; count the runs of the region in both runs."""
    counts = []

    def run(offload):
        stage = Stage(config_of(**config), _Region(checkpoint, distributes))
        found = Run(stage).steps()
        counts.append(stage.body.num_calls)
        return found, stage.body.states, _random_states()

    _, books = compare(run, directory, stores=stores, **(block or {}))
    assert counts == [CALLS * number for number in calls]
    return books


def _megatrons(function, *args):
    return tensor_parallel.checkpoint(function, *args)  # looked up at the call, as Megatron does


def check_megatrons_checkpoint_restores_random_states(directory):
    _check_region(directory / _new(directory, "none"), _megatrons, calls=(2, 2))
    _check_region(directory / _new(directory, "full"), _megatrons, calls=(2, 1), **full("uniform", 1))
    again = {"checkpointing": "recompute"}
    _check_region(directory / _new(directory, "again"), _megatrons, calls=(2, 2), block=again, **full("uniform", 1))


def check_megatrons_checkpoint_distributes(directory):
    for name, flags, calls in (("none", {}, (2, 2)), ("full", full("uniform", 1), (2, 1))):
        _check_region(directory / _new(directory, name), _megatrons, calls=calls, distributes=True, **flags)
    again = {"checkpointing": "recompute"}
    place = directory / _new(directory, "again")
    _check_region(place, _megatrons, calls=(2, 2), distributes=True, block=again, **full("uniform", 1))


def check_our_checkpoint_in_megatrons_form_offloads(directory):
    for distributes in (False, True):
        place = directory / _new(directory, str(distributes))
        _check_region(place, ssdtrain_plugin.checkpoint, calls=(2, 1), distributes=distributes)


def check_our_checkpoint_offloads_where_only_regions_are(directory):
    """Under full recomputation all that is outside of regions is kept; this is one."""
    _check_region(directory, ssdtrain_plugin.checkpoint, calls=(2, 1), **full("uniform", 1))


def check_our_checkpoint_recomputes_when_told_to(directory):
    for number, flags in enumerate(({}, full("uniform", 1))):
        for distributes in (False, True):
            place = directory / _new(directory, f"{number}{distributes}")
            block = {"checkpointing": "recompute"}
            _check_region(
                place, ssdtrain_plugin.checkpoint, calls=(2, 2), block=block, distributes=distributes, **flags
            )


def _outside(checkpoint, distributes):
    """Run a region on its own, forward and backward."""
    seed_all(5)
    region, x = _Region(checkpoint, distributes), next(batches())
    output = region(x)
    output.square().sum().backward()
    masked = output.detach() == 0
    assert 0 < masked.sum() < masked.numel(), "nothing was dropped"
    grads = [parameter.grad for parameter in region.parameters()]
    return output.detach(), x.grad, grads, region.states, _random_states(), region.num_calls


def check_our_checkpoint_outside_of_a_forward_is_megatrons(directory):
    def run(offload):
        found = [
            _outside(checkpoint, way)
            for checkpoint in (ssdtrain_plugin.checkpoint, _megatrons)
            for way in (False, True)
        ]
        assert [result[-1] for result in found] == [2] * 4
        assert_same(found[:2], found[2:])
        return found, Run(Stage(config_of(), _Region(_megatrons))).steps()

    compare(run, directory)


def check_our_checkpoint_under_attach(directory):
    """The other door: `attach` on a module that calls it in Megatron's form."""
    plain = _outside(_megatrons, False)
    for checkpointing, calls in (("offload", 1), ("recompute", 2)):
        seed_all(5)
        region, x = _Region(ssdtrain_plugin.checkpoint), next(batches())
        options = {"paths": [str(directory)], "policy": "all", "min_tensor_bytes": 1024, "checkpointing": checkpointing}
        with ssdtrain_plugin.attach(region, options) as offloader:
            output = region(x)
            output.square().sum().backward()
            stats = offloader.end_step()
        assert stats.saved_bytes > 0
        ours = [output.detach(), x.grad, [parameter.grad for parameter in region.parameters()]]
        assert_same([*ours, region.states, _random_states()], [*plain[:-1]])
        assert region.num_calls == calls
    assert list(directory.iterdir()) == []


def check_a_region_without_an_input_that_wants_a_gradient_gets_none(directory):
    """Megatron's checkpoint is reentrant, so it gives none to the weights inside either; then ours does not."""

    class Blind(nn.Module):
        def __init__(self, checkpoint):
            super().__init__()
            self.inner, self.outer, self._checkpoint = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN), checkpoint

        def forward(self, x):
            return self.outer(self._checkpoint(self.inner, False, x.detach()))

    for number, checkpoint in enumerate((_megatrons, ssdtrain_plugin.checkpoint)):

        def run(offload, checkpoint=checkpoint):
            stage = Stage(config_of(**full("uniform", 1)), Blind(checkpoint))
            found = Run(stage).steps()
            assert [grad is None for grad in found[0][1]] == [True, True, False, False]
            return found

        compare(run, directory / _new(directory, str(number)), stores=False)
