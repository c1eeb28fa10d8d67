#!/usr/bin/env python3
"""Train a small GPT with DeepSpeed, on the text of Python's own standard library.

An ordinary DeepSpeed script. With two stages or more it is a pipeline; with one it
trains by plain data parallelism, which ZeRO-2 and ZeRO-3 need::

    deepspeed --num_gpus 2 train_gpt.py --deepspeed_config gpt_pp2_plain.json
    deepspeed --num_gpus 2 train_gpt.py --stages 1 --deepspeed_config gpt_dp2_zero3_plain.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

VOCABULARY = 256  # a token is a byte
CORPUS_BYTES = 4 * 1024 * 1024


class Embedding(nn.Module):
    """Tokens (batch, sequence) int64 to hidden states (batch, sequence, hidden)."""

    def __init__(self, sequence: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, hidden)
        self.positions = nn.Embedding(sequence, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]


class Block(nn.Module):
    """Pre-norm transformer block; shape in is shape out."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.project = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        # (batch, sequence, 3 * hidden) to three views (batch, heads, sequence, hidden / heads)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """Hidden states to logits (batch, sequence, vocabulary)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.logits = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x))


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in fp32, in nats a byte."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build_model(args: argparse.Namespace) -> nn.Module:
    """The same seed gives the same weights; `seed_layers` makes that hold for any number of stages."""
    layers = [
        LayerSpec(Embedding, args.sequence, args.hidden),
        *(LayerSpec(Block, args.hidden, args.heads) for _ in range(args.layers)),
        LayerSpec(Head, args.hidden),
    ]
    if args.stages > 1:
        return PipelineModule(
            layers,
            num_stages=args.stages,
            loss_fn=loss_fn,
            partition_method="type:Block",  # as many blocks on every stage
            checkpointable_layers=["Block"],  # used if the JSON sets an activation_checkpoint_interval
            seed_layers=True,
            base_seed=args.seed,
            seed_fn=lambda seed: torch.manual_seed(int(seed)),  # DeepSpeed passes a numpy integer
        )
    torch.manual_seed(args.seed)
    return nn.Sequential(*(spec.build() for spec in layers))


def read_corpus() -> Tensor:
    """The top modules of the standard library, in order of name: bytes (N,) uint8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    if not text:
        raise SystemExit(f"no corpus: {root} holds no .py files (expected Python's standard library)")
    return torch.frombuffer(text[:CORPUS_BYTES], dtype=torch.uint8)


def micro_batches(args: argparse.Namespace, rows: int, rank: int, replicas: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, labels), each (rows, sequence) int64, without end.

    Every rank draws the same numbers and takes the rows of its replica, so the first
    stage (which reads the tokens) and the last (which reads the labels) agree.
    """
    corpus = read_corpus()
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        starts = torch.randint(len(corpus) - args.sequence, (replicas, rows), generator=generator)[rank]
        windows = torch.stack([corpus[i : i + args.sequence + 1] for i in starts.tolist()]).long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def train_step(engine: deepspeed.DeepSpeedEngine, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Run one optimizer step. Returns the mean loss, the same on every rank."""
    if isinstance(engine, deepspeed.PipelineEngine):  # runs all micro-batches of the step itself
        return engine.train_batch(data_iter=batches).item()
    total = torch.zeros((), device=engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        tokens, labels = (part.to(engine.device) for part in next(batches))
        loss = loss_fn(engine(tokens), labels)
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    deepspeed.comm.all_reduce(total)
    return total.item() / engine.gradient_accumulation_steps() / deepspeed.comm.get_world_size()


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes: as getrusage counts it, and the kernel's high-water mark."""
    status = Path("/proc/self/status").read_text()
    high_water = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "vm_hwm_bytes": int(high_water.split()[1]) * 1024,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT with DeepSpeed on Python's own source code.")
    parser.add_argument("--layers", type=int, default=8, help="transformer blocks")
    parser.add_argument("--hidden", type=int, default=512, help="width of the hidden states")
    parser.add_argument("--heads", type=int, default=8, help="attention heads")
    parser.add_argument("--sequence", type=int, default=512, help="bytes of text in a sample")
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages; 1 is plain data parallelism")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text")
    parser.add_argument("--metrics", type=Path, metavar="DIR", help="write DIR/rank<N>.json at the end")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    args = parse_arguments()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the ranks of a CPU run share the cores
    deepspeed.init_distributed()
    model = build_model(args)
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    rank, replicas = deepspeed.comm.get_rank(), engine.dp_world_size
    replica = engine.mpu.get_data_parallel_rank() if args.stages > 1 else rank
    batches = micro_batches(args, engine.train_micro_batch_size_per_gpu(), replica, replicas)

    losses, seconds = [], []
    # disable=None: no bar where the output is no terminal; a line a step goes there instead
    progress = tqdm(range(1, args.steps + 1), disable=None if rank == 0 else True, file=sys.stdout, unit="step")
    for step in progress:
        start = time.perf_counter()
        losses.append(train_step(engine, batches))
        seconds.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
        if rank == 0 and progress.disable:
            print(f"step {step}/{args.steps} loss {losses[-1]:.4f} {seconds[-1]:.2f} s", flush=True)

    if args.metrics:
        # float.hex() is exact, so that two runs can be compared to the last bit
        exact = [loss.hex() for loss in losses]
        metrics = {"rank": rank, "losses": exact, "seconds": seconds, **peak_memory()}
        args.metrics.mkdir(parents=True, exist_ok=True)
        (args.metrics / f"rank{rank}.json").write_text(json.dumps(metrics) + "\n")
    if rank == 0:
        print(f"done: {args.steps} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
