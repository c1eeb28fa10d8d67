"""Runs to report on, made in a moment: one that really trained, and ranks written by hand."""

import json

import torch
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.stats import StepCounter
from ssdtrain_plugin.trace import Trace


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.exp().sum()


def train(directory, *, num_steps=5, **options):
    """Train a small model as rank 0; the files of the run are in ``directory/run``."""
    torch.manual_seed(0)
    model, data = Model(), torch.randn(16, 64)
    common = {"paths": [str(directory)], "policy": "all", "min_tensor_bytes": 1, "host_bytes": 1 << 15}
    common |= {"stats_path": str(directory / "run"), "trace_steps": 2}
    with ssdtrain.attach(model, common | options) as offloader:
        for _ in range(num_steps):
            losses = [model(data), model(data)]
            for loss in losses:
                loss.backward()
            del losses, loss
            offloader.end_step()
    return directory / "run"


def write_steps(directory, rank, num_steps=4, **changes):
    """Write statistics by hand."""
    directory.mkdir(exist_ok=True)
    with (directory / f"rank{rank}.jsonl").open("a", encoding="utf-8") as file:
        for step in range(num_steps):
            counter = StepCounter(microbatches=2, stored_bytes=(step + 1) << 30, stall_seconds=0.25 * step)
            counter.peak_activation_bytes, counter.saved_bytes = 3 << 29, 7 << 29
            counter.failures["ssd: EIO"] = 2 * (step == 1)
            stats = counter.freeze(step=step, rank=rank, plan=changes.get("plan", f"plan {step // 2}"))
            stats.failures.update({} if step == 1 else {cause: 0 for cause in ()})
            values = json.loads(stats.to_json()) | changes
            values["failures"] = {cause: count for cause, count in values["failures"].items() if count}
            file.write(json.dumps(values) + "\n")


def write_events(directory, rank, clock, module="layers.0", wall_seconds=1_000_000.0):
    """Record one step by hand: two passes, a store, a load on demand that is waited for, a cancelled store."""
    trace = Trace(str(directory), rank, first_step=0, num_steps=1, device="cpu", clock=clock, wall=lambda: wall_seconds)
    trace.name_pass((None, 0))
    trace.saved(1, 4096, 0)
    trace._modules[1] = module
    trace.memory(device_bytes=4096, would_be_bytes=4096)
    clock.advance(1.0)
    trace.passed("forward", 0, 1.0)
    begin = clock()
    clock.advance(0.5)
    trace.instruction("RecvGrad", begin)
    trace.memory(device_bytes=0, drive_bytes=4096)
    clock.advance(0.5)
    trace.waited(1, 0.25)
    trace.passed("backward", 0, 0.5)
    trace.memory(device_bytes=0, would_be_bytes=0, drive_bytes=0)
    trace.end_step(0, "plan 0")
    path = directory / f"rank{rank}.trace.jsonl"
    common = {"step": 0, "tier": "ssd", "drive": 0, "path": "/drive", "serial": 1, "nbytes": 4096, "event": "transfer"}
    rows = [
        {"direction": "store", "queued": 0.1, "begin": 0.2, "end": 0.6, "is_on_demand": False, "outcome": "done"},
        {"direction": "store", "queued": 0.1, "begin": 0.7, "end": 0.8, "is_on_demand": False, "outcome": "failed"},
        {"direction": "store", "queued": 0.3, "begin": 0.4, "end": 0.4, "is_on_demand": False, "outcome": "cancelled"},
        {"direction": "load", "queued": 1.5, "begin": 1.6, "end": 1.8, "is_on_demand": True, "outcome": "done"},
    ]
    text = path.read_text(encoding="utf-8").splitlines()
    lines = [json.dumps(json.loads(line) | ({"module": module} if '"module"' in line else {})) for line in text]
    path.write_text("\n".join([*lines, *(json.dumps(common | row) for row in rows)]) + "\n", encoding="utf-8")
