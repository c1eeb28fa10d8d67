"""Trains one step in a control group that gets small under it: ``group_worker.py DRIVE GROUP RESULT.json``.

The first step runs outside, without the plugin; the second in the group, with host memory and a drive.
"""

import json
import os
import sys
from pathlib import Path

import torch

import ssdtrain_plugin

NUM_LAYERS, LAYER_BYTES = 80, 8 << 20


class Chain(torch.nn.Module):
    """Saves one tensor of `LAYER_BYTES` a layer, and computes little."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, LAYER_BYTES // 4))

    def forward(self):
        x = self.scale * 1.0
        for _ in range(NUM_LAYERS):
            x = torch.sin(x)
        return x.sum()


def main():
    drive, group, results = sys.argv[1:]
    torch.set_num_threads(1)
    model = Chain()
    model().backward()
    expected, model.scale.grad = model.scale.grad, None
    offloader = ssdtrain_plugin.attach(
        model,
        {
            "paths": [drive],
            "policy": "all",
            "host_bytes": NUM_LAYERS * LAYER_BYTES,
            # Of the process's own, which counts in the group too.
            "max_inflight_bytes": 2 * LAYER_BYTES,
            "prefetch_bytes": 2 * LAYER_BYTES,
        },
    )
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    model().backward()
    stats = offloader.end_step()
    found = {
        "is_equal": torch.equal(model.scale.grad, expected),
        "host_bytes": stats.host_bytes,
        "stored_bytes": stats.stored_bytes,
        "failures": stats.failures,
    }
    Path(results).write_text(json.dumps(found))
    offloader.detach()


if __name__ == "__main__":
    main()
