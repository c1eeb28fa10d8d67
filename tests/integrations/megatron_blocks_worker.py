"""One rank that runs the checks of some modules; each says nothing, or why it was skipped, or how it failed.

``megatron_blocks_worker.py MODULE[,MODULE ...] DIRECTORY`` writes ``DIRECTORY/rank<N>.json``: what was said, by
``MODULE.CHECK``.
"""

import gc
import importlib
import json
import sys
import traceback
from pathlib import Path

import megatron_shim
import torch


def places():
    """List what stands in the places that the plugin takes."""
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import schedules

    names = [name for name in vars(schedules) if name.startswith(("forward_", "backward_"))]
    return [getattr(schedules, name) for name in names] + [tensor_parallel.checkpoint]


def layout_of(check):
    return getattr(check, "layout", (1, 1, None))


def name_of(check):
    return f"{check.__module__}.{check.__name__}"


def run(check, directory):
    """Run one check in the layout of now.

    Args:
        check: Called with a new directory.
        directory: Of the whole run.
    """
    from megatron_checks import Skip

    own = Path(directory) / f"{name_of(check)}-{torch.distributed.get_rank()}"
    own.mkdir()
    before = places()
    try:
        check(own)
        assert places() == before, "Megatron's own functions were not put back"
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception:
        if torch.distributed.get_world_size() > 1:
            raise  # the other rank waits for this one: better to end both
        return {"failed": traceback.format_exc()}
    finally:
        gc.collect()
    return {}


def run_all(checks, directory):
    """Run checks, those that want the same layout one after another: gloo's groups cost threads and addresses."""
    from megatron.core import parallel_state

    results = {}
    for layout in dict.fromkeys(layout_of(check) for check in checks):
        tp, pp, vpp = layout
        parallel_state.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=vpp)
        for check in checks:
            if layout_of(check) == layout:
                results[name_of(check)] = run(check, directory)
        parallel_state.destroy_model_parallel()
    return results


def checks_of(module):
    return [check for name, check in vars(importlib.import_module(module)).items() if name.startswith("check_")]


def main(modules, directory):
    megatron_shim.limit_address_space()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    megatron_shim.install(streams=True)
    results = run_all([check for module in modules.split(",") for check in checks_of(module)], directory)
    (Path(directory) / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
