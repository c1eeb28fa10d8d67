"""One rank of a long job: ``soak_worker.py REQUEST`` appends a line a step to ``<results>/rank<N>.jsonl``."""

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed_cases import Case
from deepspeed_models import digest_of_parameters

from ssdtrain_plugin.integrations import deepspeed as ssdtrain_ds
from ssdtrain_plugin.runtime import Parts
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan

_LOUD = ("SHORT", "EIO", "EINTR", "EAGAIN", "EACCES")
_SILENT = ("FLIPPED_BIT", "TORN_BLOCK", "STALE")
_DELAY_SECONDS = 0.005
_HANG_SECONDS = 4.0  # longer than `io_timeout_seconds` of the job, and not for ever


def make_plan(seed, probability):
    """All that a job survives. A store that hangs is rare: it takes seconds, and a step takes hundredths."""
    faults = [
        *(Fault(FaultKind[kind], "write", probability=probability) for kind in (*_LOUD, "ENOSPC")),
        *(Fault(FaultKind[kind], "read", probability=probability, is_zero=True) for kind in _LOUD + _SILENT),
        *(Fault(FaultKind.DELAY, way, probability=probability, seconds=_DELAY_SECONDS) for way in ("write", "read")),
        Fault(FaultKind.HANG, "write", probability=probability / 10),
    ]
    return FaultPlan(faults, seed=seed, hang=lambda: time.sleep(_HANG_SECONDS))


def sample(offloader):
    """What must not grow."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    tiers = [] if offloader is None else list(offloader._tiers.values())
    return {
        "rss_bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "threads": int(fields["Threads"]),
        "open_files": len(os.listdir("/proc/self/fd")),
        "extent_bytes": sum(tier.file_bytes for tier in tiers),
        "used_bytes": sum(tier.used_bytes for tier in tiers),
        "live_bytes": 0 if offloader is None else offloader.cache.live_bytes,
    }


def main():
    request = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rank = deepspeed.comm.get_rank()
    block, plan = None, None
    if request["is_faulty"]:
        plan = make_plan(request["seed"] + rank, request["probability"])
        build = ssdtrain_ds.build
        ssdtrain_ds.build = lambda *args, **kwargs: build(*args, **kwargs, parts=Parts(wrap_engine=plan.wrap))
        options = {"policy": "all", "min_tensor_bytes": 1, "verify": "checksum", "io_timeout_seconds": 3.0}
        block = {"paths": [request["drive"]], "stats_path": request["results"] + "/stats", **options}
    import deepspeed_worker

    job = deepspeed_worker.Job(Case("", dropout=0.1, microbatches=4, num_blocks=4), block)
    offloader = ssdtrain_ds.offloader_of(job.engine)
    with (Path(request["results"]) / f"rank{rank}.jsonl").open("w") as file:
        for step in range(request["steps"]):
            started = time.perf_counter()
            job.step()
            seconds = time.perf_counter() - started
            num_faults = 0 if plan is None else len(plan.injected)
            line = {"step": step, "loss": job.losses[-1], "seconds": seconds, "num_faults": num_faults}
            file.write(json.dumps(line | sample(offloader)) + "\n")
        kinds = {}
        for injected in [] if plan is None else plan.injected:
            name = f"{injected.fault.kind.value}, {injected.fault.operation}"
            kinds[name] = kinds.get(name, 0) + 1
        end = {"gradients": job.gradients.hexdigest(), "parameters": digest_of_parameters(job.engine.module)}
        calls = {} if plan is None else {way: plan.num_calls(way) for way in ("write", "read")}
        file.write(json.dumps({**end, "faults": kinds, "calls": calls}) + "\n")
    job.close()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
