"""Trains while the file of statistics cannot grow, and says that it came to the end. Arguments: STATS DRIVE."""

import resource
import sys
from pathlib import Path

import torch
from torch import nn

import ssdtrain_plugin as ssdtrain

stats, drive = sys.argv[1:]
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
config = {"paths": [drive], "policy": "all", "min_tensor_bytes": 1, "stats_path": stats, "trace_steps": 2}
offloader = ssdtrain.attach(model, config)
for step in range(6):
    model(torch.ones(4, 16)).sum().backward()
    offloader.end_step()
    if step == 2:
        # In the middle of the next line: the kernel writes what has room.
        size = (Path(stats) / "rank0.jsonl").stat().st_size + 40
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
offloader.detach()
sys.stdout.write("trained to the end\n")
