"""One rank of a job with tensor, pipeline and data parallelism: DeepSpeed's pipeline around Megatron-core's layers.

``deepspeed_3d_worker.py DIRECTORY`` writes ``DIRECTORY/rank<N>.json``: every case trained without the block and with.
The groups of both frameworks are made from the same layout, and compared: ``PipeModelDataParallelTopology`` numbers the
ranks by (pipe, data, model), the last one fastest, as Megatron-core does by default.
"""

import json
import math
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import deepspeed
import megatron_shim
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed_3d_cases import CASES, STEPS
from deepspeed_models import HIDDEN, SEQUENCE, VOCABULARY, batches, digest_of_parameters, open_extents
from deepspeed_worker import block_of, engine_config
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from torch import nn
from torch.nn import functional

import ssdtrain_plugin.integrations.deepspeed as ssdtrain_ds

STAGES = TENSOR = DATA = 2
HEADS = 4


def _linear(kind, inputs, outputs, **more):
    config = ModelParallelConfig(tensor_model_parallel_size=TENSOR, use_cpu_initialization=True)
    return kind(inputs, outputs, config=config, init_method=partial(nn.init.normal_, std=0.1), **more)


def _column(inputs, outputs):
    return _linear(tensor_parallel.ColumnParallelLinear, inputs, outputs, gather_output=False)


def _row(inputs, outputs):
    more = {"bias": True, "input_is_parallel": True, "skip_bias_add": False}
    return _linear(tensor_parallel.RowParallelLinear, inputs, outputs, **more)


class Embedding(nn.Module):
    """Tokens (batch, sequence) to hidden states (batch, sequence, hidden); each rank has a part of the vocabulary."""

    def __init__(self):
        super().__init__()
        self.tokens = _linear(tensor_parallel.VocabParallelEmbedding, VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(SEQUENCE, HIDDEN)

    def forward(self, tokens):
        return self.tokens(tokens) + self.positions.weight


class Block(nn.Module):
    """Pre-norm transformer block of which each rank has half of the heads, and half of the inner features."""

    num_calls = 0

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.project = _column(HIDDEN, 3 * HIDDEN), _row(HIDDEN, HIDDEN)
        self.up, self.down = _column(HIDDEN, 4 * HIDDEN), _row(4 * HIDDEN, HIDDEN)

    def _attention(self, x):
        qkv, _ = self.qkv(x)
        # (batch, sequence, 3 * hidden / TENSOR) to three views (batch, heads / TENSOR, sequence, hidden / heads)
        q, k, v = qkv.unflatten(-1, (3, HEADS // TENSOR, HIDDEN // HEADS)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)
        future = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        if self.dropout:
            # Each tensor-parallel rank drops other weights, and the same hidden states.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                weights = functional.dropout(weights, self.dropout, self.training)
        return self.project((weights @ v).transpose(1, 2).flatten(2))[0]

    def forward(self, x):
        Block.num_calls += 1
        x = x + functional.dropout(self._attention(self.norm1(x)), self.dropout, self.training)
        inner, _ = self.up(self.norm2(x))
        return x + functional.dropout(self.down(functional.gelu(inner))[0], self.dropout, self.training)


class Squash(nn.Module):
    """Last layer of the first stage. Saves its own output, which DeepSpeed empties before it sends the parts of it."""

    def forward(self, x):
        return torch.tanh(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(HIDDEN), _column(HIDDEN, VOCABULARY)

    def forward(self, x):
        return self.logits(self.norm(x))[0]


def loss_fn(logits, labels):
    # Writes into what it was given, and into what it has saved.
    return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels).mean()


def build_model(case):
    half = [LayerSpec(Block, case.dropout) for _ in range(case.num_blocks // STAGES)]
    return PipelineModule(
        [LayerSpec(Embedding), *half, LayerSpec(Squash), *half, LayerSpec(Head)],
        topology=PipeModelDataParallelTopology(num_pp=STAGES, num_mp=TENSOR, num_dp=DATA),
        loss_fn=loss_fn,
        partition_method="type:Block|Squash",
        checkpointable_layers=["Block"],
    )


class GradientLog:
    """Every gradient that every backward computes for every parameter."""

    def __init__(self, model):
        self.seen = []
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self.seen.append((name, gradient.clone())))


def seed(case):
    torch.manual_seed(case.seed)
    tensor_parallel.get_cuda_rng_tracker().reset()
    tensor_parallel.model_parallel_cuda_manual_seed(case.seed + 1)


def train(case, block=None):
    """Train a case from its beginning; return the log of its gradients, and all else that is compared or counted."""
    seed(case)
    Block.num_calls = 0
    model = build_model(case)
    log = GradientLog(model)
    initialize = deepspeed.initialize if block is None else ssdtrain_ds.initialize
    config = engine_config(case, block)
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
    seed(case)
    data = batches(case.seed + engine.grid.get_data_parallel_rank())
    losses, norms, live = [], [], []
    offloader = ssdtrain_ds.offloader_of(engine)
    for _ in range(STEPS):
        losses.append(engine.train_batch(data_iter=data).item().hex())
        norms.append(float(engine.get_global_grad_norm()).hex())
        if offloader is not None:
            live.append(offloader.cache.live_bytes)
    result = {
        "losses": losses,
        "norms": norms,
        "parameters": digest_of_parameters(model),
        "num_calls": Block.num_calls,
        "groups": groups_of(engine.grid),
        "layers": [type(layer).__name__ for layer in model.forward_funcs],
        "is_partitioned": engine.is_pipe_partitioned and engine.is_grad_partitioned,
    }
    if offloader is not None:
        result |= offloaded(offloader, block) | {"live_bytes": live}
    engine.destroy()
    return log.seen, result


def offloaded(offloader, block):
    offloader.detach()
    stats = Path(block["stats_path"]) / f"rank{deepspeed.comm.get_rank()}.jsonl"
    directory = Path(block["paths"][0].replace("{local_rank}", str(deepspeed.comm.get_rank())))
    return {
        "steps": [json.loads(line) for line in stats.read_text().splitlines()],
        "extents_after": open_extents(directory),
        "files_after": [entry.name for entry in directory.iterdir()],
    }


def groups_of(grid):
    """The ranks of this rank's groups, as each framework says."""
    ranks = torch.distributed.get_process_group_ranks
    return {
        "deepspeed": [sorted(grid.slice_group), sorted(grid.dp_group), sorted(grid.pp_group)],
        "megatron": [
            ranks(parallel_state.get_tensor_model_parallel_group()),
            ranks(parallel_state.get_data_parallel_group()),
            ranks(parallel_state.get_pipeline_model_parallel_group()),
        ],
    }


def compare(case, directory):
    expected, without = train(case)
    seen, result = train(case, block_of(case, directory))
    assert [name for name, _ in seen] == [name for name, _ in expected]
    unequal = [name for (name, one), (_, other) in zip(seen, expected, strict=True) if not torch.equal(one, other)]
    zero = [name for name, gradient in seen if not gradient.any()]
    return {"without": without, "with": result, "num_gradients": len(seen), "unequal": unequal, "zero": zero}


def main():
    directory = Path(sys.argv[-1])  # the launcher puts --local_rank before it
    torch.set_num_threads(1)
    megatron_shim.install()
    deepspeed.init_distributed(timeout=timedelta(seconds=60))
    parallel_state.initialize_model_parallel(TENSOR, STAGES)
    results = {case.name: compare(case, directory) for case in CASES}
    (directory / f"rank{deepspeed.comm.get_rank()}.json").write_text(json.dumps(results))
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
