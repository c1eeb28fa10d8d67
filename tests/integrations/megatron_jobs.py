"""Jobs of Megatron's own training loop, with and without the plugin, and what they print."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from processes import EAGER, REPOSITORY, free_port, run

HERE = Path(__file__).parent
SCRIPT = HERE / "megatron_pretrain_gpt.py"
DOOR = HERE / "megatron_pretrain_gpt_door.py"
FAILING = HERE / "megatron_pretrain_gpt_failing.py"
NEWEST = os.environ.get("SSDTRAIN_MEGATRON_PYTHON")
RELEASE_017 = os.environ.get("SSDTRAIN_MEGATRON_017")
THROUGH = ["-m", "ssdtrain_plugin.run"]

STEPS = int(os.environ.get("SSDTRAIN_PRETRAIN_STEPS", "10"))
MICROBATCHES, EVALUATED_EVERY = 4, 8
MIB = 2**20
INFLIGHT_BYTES, PREFETCH_BYTES = MIB // 2, MIB

FLAGS = f"""
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size {2 * MICROBATCHES} --train-iters {STEPS} --lr 1e-3 --log-interval 1
    --eval-interval {EVALUATED_EVERY} --eval-iters 2 --vocab-size 127 --tokenizer-type NullTokenizer --mock-data
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-masked-softmax-fusion
""".split()
PP2 = ["--pipeline-model-parallel-size", "2"]
TP2 = ["--tensor-model-parallel-size", "2"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "2"]

# All of an iteration's line but its time; ranks may write into the same line, but not into the same words.
_ITERATION = re.compile(
    rf"iteration +(\d+)/ +{STEPS} \| consumed samples: +(\d+) \| elapsed time per iteration \(ms\): [\d.]+ "
    r"\| (learning rate: [^\n]*?number of nan iterations: +\d+ \|)"
)
_EVALUATION = re.compile(r"validation loss at iteration \d+ [^\n]*?lm loss PPL: \S+")


@dataclass(frozen=True)
class Job:
    """A job of Megatron's training loop.

    Attributes:
        name: In the table.
        num_ranks: Processes.
        flags: Of the layout and of recomputation.
        is_017: On megatron-core 0.17 in this interpreter, with the plugin under DeepSpeed's launcher. Otherwise on the
            newest megatron-core in its own interpreter, under torchrun.
        script: Started with the plugin.
        is_through_run: Whether it is started through ``ssdtrain_plugin.run``.
        compiles: Whether Megatron compiles its small functions, as it does by itself; it doubles the time of a start.
    """

    name: str
    num_ranks: int
    flags: tuple
    is_017: bool = False
    script: Path = SCRIPT
    is_through_run: bool = True
    compiles: bool = False


@dataclass(frozen=True)
class Result:
    """What a job left.

    Attributes:
        code: Exit code of the launcher.
        output: Of all ranks.
        steps: Of every rank with the plugin, its step statistics.
        files: On the drive.
    """

    code: int
    output: str
    steps: tuple = ()
    files: tuple = ()

    def printed(self):
        """Get the numbers of all iterations and evaluations, as they were printed."""
        return _ITERATION.findall(self.output), _EVALUATION.findall(self.output)


def variables(is_017=False, compiles=False):
    paths = [RELEASE_017, REPOSITORY] if is_017 else [REPOSITORY]
    common = {} if compiles else EAGER
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)), **common}


def plugin_flags(directory):
    (directory / "drive").mkdir()
    return [
        *("--ssdtrain", "--ssdtrain-paths", directory / "drive", "--ssdtrain-stats-path", directory / "stats"),
        *("--ssdtrain-policy", "all", "--ssdtrain-min-tensor-bytes", "4 KiB"),
        *("--ssdtrain-max-inflight-bytes", INFLIGHT_BYTES, "--ssdtrain-prefetch-bytes", PREFETCH_BYTES),
    ]


def torchrun(python, num_ranks):
    return [python, "-m", "torch.distributed.run", "--nproc_per_node", num_ranks, "--master_port", free_port()]


def _deepspeed(num_ranks):
    command = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, command, "--num_gpus", num_ranks, "--master_port", free_port()]


def train_without(job, directory):
    """Train with the unchanged script."""
    launcher = torchrun(sys.executable if job.is_017 else NEWEST, job.num_ranks)
    command = [*launcher, SCRIPT, *FLAGS, *job.flags]
    return Result(*run(command, directory / "log", timeout_seconds=200, **variables(job.is_017, job.compiles)))


def train_with(job, directory):
    """Train with the plugin."""
    launcher = _deepspeed(job.num_ranks) if job.is_017 else torchrun(NEWEST, job.num_ranks)
    through = (["--module", THROUGH[1]] if job.is_017 else THROUGH) if job.is_through_run else []
    command = [*launcher, *through, job.script, *FLAGS, *job.flags, *plugin_flags(directory)]
    code, output = run(command, directory / "log", timeout_seconds=200, **variables(job.is_017, job.compiles))
    files = sorted((directory / "stats").glob("rank*.jsonl"), key=lambda file: int(file.stem.removeprefix("rank")))
    steps = tuple([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return Result(code, output, steps, tuple(os.listdir(directory / "drive")))


def table_of(results):
    """Write what every rank saved and what it cost, a line a rank; peaks are those of the steps after warm-up."""
    lines = [
        "| job | rank | stored MiB a step | saved MiB | peak MiB | peak / saved | stall ms a step | loads on demand |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for rank, steps in enumerate(result.steps):
            steps = steps[2:]
            stored = sum(step["stored_bytes"] for step in steps) / len(steps) / MIB
            saved = max(step["saved_bytes"] for step in steps) / MIB
            peak = max(step["peak_activation_bytes"] for step in steps) / MIB
            stall = 1000 * sum(step["stall_seconds"] for step in steps) / len(steps)
            on_demand = sum(step["num_loads_on_demand"] for step in steps)
            numbers = f"{stored:.2f} | {saved:.2f} | {peak:.2f} | {peak / saved:.0%} | {stall:.1f} | {on_demand}"
            lines.append(f"| {name} | {rank} | {numbers} |")
    return "\n".join(lines)
