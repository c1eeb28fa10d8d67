"""One rank of a small job of two pipeline stages that records events, and what the host's monitor is told.

``report_worker.py HOST DIRECTORY`` writes statistics and events to ``DIRECTORY/run`` and, under DeepSpeed, the CSV
files of its monitor to ``DIRECTORY/monitor``. ``SCALE`` in the environment makes the models wider.
"""

import os
import sys
from pathlib import Path

import torch

SCALE = int(os.environ.get("SCALE", "1"))
STEPS, TRACED = 5, 3


def options(directory, rank):
    drive = Path(directory) / f"drive{rank}"
    drive.mkdir()
    return {
        "paths": [str(drive)],
        "policy": "all",
        "min_tensor_bytes": 4096,
        "host_bytes": 1 << 16,
        "stats_path": str(Path(directory) / "run"),
        "trace_steps": TRACED,
    }


def train_with_deepspeed(directory):
    import deepspeed
    import deepspeed_models as models

    models.HIDDEN *= SCALE
    models.SEQUENCE *= SCALE
    from deepspeed_cases import Case
    from deepspeed_worker import build_model, engine_config

    import ssdtrain_plugin.integrations.deepspeed as ssdtrain_ds

    deepspeed.init_distributed()
    case = Case("", num_blocks=4)
    torch.manual_seed(1)
    model = build_model(case)
    config = engine_config(case, options(directory, deepspeed.comm.get_rank()))
    config["csv_monitor"] = {"enabled": True, "output_path": f"{directory}/monitor", "job_name": "job"}
    engine, *_ = ssdtrain_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    batches = models.batches(1)
    for _ in range(STEPS):
        engine.train_batch(data_iter=batches)
    engine.destroy()
    deepspeed.comm.destroy_process_group()


def train_with_megatron(directory):
    import megatron_shim

    megatron_shim.limit_address_space()
    torch.distributed.init_process_group("gloo")
    megatron_shim.install(streams=True)
    import megatron_models as models
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron_cases import Case

    from ssdtrain_plugin.integrations.megatron import enable

    models.HIDDEN *= SCALE
    models.SEQUENCE *= SCALE
    parallel_state.initialize_model_parallel(1, 2)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    case = Case("", layout=(1, 2, None))
    chunks = models.build(case, 1)
    offload = enable(options(directory, torch.distributed.get_rank()))
    schedule = get_forward_backward_func()
    for _ in range(STEPS):
        schedule(
            num_microbatches=case.microbatches,
            forward_step_func=models.forward_of(case.model, []),
            data_iterator=models.Microbatches(1),
            model=chunks[0],
            seq_length=models.SEQUENCE,
            micro_batch_size=models.BATCH,
        )
        models.update(chunks)
    offload.disable()
    parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"deepspeed": train_with_deepspeed, "megatron": train_with_megatron}[sys.argv[1]](sys.argv[2])
