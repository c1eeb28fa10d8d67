"""Checks of pipeline stages and of tensor-parallel regions on two ranks."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron_checks import MICROBATCHES, SEQUENCE, STEPS, Mlp, Run, Stage, compare, config_of, layout
from torch import nn

# With overlap an emptied output would race with gloo, which reads it later: a fault of gloo's on any machine.
OVERLAP = {"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}


def _is_last():
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def _train(num_chunks=1, schedule=None, body=Mlp, **config):
    """Train the stages of this rank; count losses and forwards."""
    config = config_of(**config)
    chunks = [Stage(config, body(), number if num_chunks > 1 else None) for number in range(num_chunks)]
    run = Run(*chunks, schedule=schedule)
    for _ in range(STEPS):
        assert len(run.step()) == (MICROBATCHES if _is_last() else 0)
    assert [chunk.num_forwards for chunk in chunks] == [STEPS * MICROBATCHES] * num_chunks
    return run


@layout(1, 2)
def check_1f1b_counts(directory):
    _, books = compare(lambda _: _train().found, directory)
    assert [step["microbatches"] for step in books] == [MICROBATCHES] * STEPS
    assert sum(step["num_loads_on_demand"] for step in books) == 0


@layout(1, 2)
def check_1f1b_without_emptied_outputs(directory):
    compare(lambda _: _train(deallocate_pipeline_outputs=False).found, directory)


@layout(1, 2)
def check_stages_that_end_in_tanh_save_the_output_that_is_emptied(directory):
    """Backward of tanh needs the very tensor that the schedule empties when it has been sent."""

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outputs = Mlp(ends_in_tanh=True), []

        def forward(self, x):
            y = self.inner(x)
            self.outputs.append(y)
            return y

    for policy in ("all", "none"):
        (directory / policy).mkdir()

        def run(offload):
            run = _train(body=Watched)
            outputs = run.chunks[0].body.outputs
            assert {output.numel() for output in outputs} == ({outputs[0].numel()} if _is_last() else {1})
            assert _is_last() or len(outputs) == STEPS * MICROBATCHES
            outputs.clear()
            return run.found

        compare(run, directory / policy, stores=policy == "all", policy=policy)


@layout(1, 2)
def check_1f1b_forward_only_leaves_no_trace(directory):
    def run(offload):
        run = _train()
        found = [run.call(forward_only=True)]
        with torch.no_grad():
            found.append(run.call(forward_only=True, collect_non_loss_data=True))
        run.step()
        assert offload is None or offload.offloader.cache.num_microbatches == 0
        return found, run.found

    _, books = compare(run, directory, steps=STEPS + 1)
    assert [step["microbatches"] for step in books] == [MICROBATCHES] * (STEPS + 1)


@layout(1, 2)
def check_1f1b_imported_earlier_works_and_its_steps_are_counted(directory):
    schedule = get_forward_backward_func()
    _, books = compare(lambda _: _train(schedule=schedule).found, directory)
    assert [step["microbatches"] for step in books] == [MICROBATCHES] * STEPS


@layout(1, 2, 2)
def check_interleaved_counts(directory):
    _, books = compare(lambda _: _train(2, **OVERLAP).found, directory)
    assert [step["microbatches"] for step in books] == [2 * MICROBATCHES] * STEPS
    assert sum(step["num_loads_on_demand"] for step in books) == 0


@layout(1, 2, 2)
def check_interleaved_imported_earlier_works_and_its_steps_are_counted(directory):
    schedule = get_forward_backward_func()
    _, books = compare(lambda _: _train(2, schedule, **OVERLAP).found, directory)
    assert [step["microbatches"] for step in books] == [2 * MICROBATCHES] * STEPS


class _Layers(nn.Module):
    """This stage's part of a transformer block."""

    def __init__(self, config):
        super().__init__()
        self.block = TransformerBlock(config, get_gpt_layer_local_spec())
        self.register_buffer("mask", torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1))

    def forward(self, x):
        self.block.set_input_tensor(x)
        return self.block(hidden_states=x, attention_mask=self.mask)


def _check_layers(directory, block, **flags):
    def run(offload):
        return _train(body=lambda: _Layers(config_of(**flags)), **flags).found

    compare(run, directory, **block)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@layout(1, 2)
def check_a_stage_whose_layers_would_be_recomputed(directory):
    _check_layers(directory, {}, **FULL)


@layout(1, 2)
def check_a_stage_that_is_recomputed_with_inputs_on_the_drive(directory):
    _check_layers(directory, {"checkpointing": "recompute"}, **FULL)


@layout(2, 1)
def check_distributed_saves_that_would_be_recomputed(directory):
    _check_layers(directory, {}, distribute_saved_activations=True, **FULL)


@layout(2, 1)
def check_distributed_saves_that_are_recomputed(directory):
    _check_layers(directory, {"checkpointing": "recompute"}, distribute_saved_activations=True, **FULL)
