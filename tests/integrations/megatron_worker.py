"""One rank of a job that trains small models of megatron-core in turn, each without and with the plugin.

``megatron_worker.py SUITE DIRECTORY CASE ...`` writes ``DIRECTORY/rank<N>.json``: the results of cases of a suite.
"""

import gc
import json
import os
import sys
from pathlib import Path

import megatron_shim
import torch
from megatron_cases import SUITES

STEPS = 3
SEED = 1234


def layer_calls(chunks):
    """Count how often transformer layers run."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    calls = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def train(case, directory=None):
    import megatron_models as models
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from ssdtrain_plugin.integrations.megatron import enable

    rank = torch.distributed.get_rank()
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    chunks = models.build(case, SEED)
    calls = layer_calls(chunks)
    options = {"paths": str(directory), "policy": "all", "min_tensor_bytes": 4096, "stats_path": f"{directory}-stats"}
    offload = None if directory is None else enable(options | case.block)
    schedule = get_forward_backward_func()
    losses, steps = [], []
    forward = models.forward_of(case.model, losses)
    data = [models.Microbatches(SEED + number) for number in range(len(chunks))]
    common = {
        "forward_step_func": forward,
        "data_iterator": data if len(chunks) > 1 else data[0],
        "model": chunks if len(chunks) > 1 else chunks[0],
        "seq_length": models.SEQUENCE,
        "micro_batch_size": models.BATCH,
    }
    if case.model == "t5":
        common["decoder_seq_length"] = models.SEQUENCE
    live = []
    for _ in range(STEPS):
        schedule(num_microbatches=case.microbatches, **common)
        steps.append(models.digest(chunks))
        models.update(chunks)
        if offload is not None:
            live.append(offload.offloader.cache.live_bytes)
        if case.evaluates:
            models.forward_only(schedule)(num_microbatches=2, **common)
    result = {"losses": losses, "gradients": steps, "num_layer_calls": len(calls)}
    if offload is None:
        return result
    result["report"] = offload.offloader.report()
    result["live_bytes"] = live
    offload.disable()
    lines = (Path(f"{directory}-stats") / f"rank{rank}.jsonl").read_text().splitlines()
    return result | {"steps": [json.loads(line) for line in lines], "files": sorted(os.listdir(directory))}


def taken_places():
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import schedules

    names = [name for name in vars(schedules) if name.startswith(("forward_", "backward_"))]
    return [getattr(schedules, name) for name in names] + [tensor_parallel.checkpoint]


def main(suite, directory, *names):
    megatron_shim.limit_address_space()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    megatron_shim.install(streams=True)
    from megatron.core import parallel_state

    results = {}
    before = taken_places()
    for case in [case for case in SUITES[suite][1] if case.name in names]:
        tp, pp, vpp = case.layout
        parallel_state.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=vpp)
        tier = Path(directory) / f"{case.name}-{torch.distributed.get_rank()}"
        tier.mkdir()
        results[case.name] = {"without": train(case), "with": train(case, tier)}
        gc.collect()
        parallel_state.destroy_model_parallel()
    results["places_are_given_back"] = before == taken_places()
    rank = torch.distributed.get_rank()
    (Path(directory) / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
