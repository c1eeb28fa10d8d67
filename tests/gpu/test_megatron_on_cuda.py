"""Megatron-core on its own devices: NCCL, TransformerEngine, distributed optimizer, sequence parallelism.

Each case is a job of its own, and cases of two ranks want two devices.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from integrations.processes import environment, free_port
from megatron_cuda_worker import CASES, MIB, STEPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

WORKER = Path(__file__).with_name("megatron_cuda_worker.py")
TIMEOUT_SECONDS = 600
# What makes kernels repeat themselves, and what Megatron asks for where tensors are parallel.
DETERMINISM = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def _run_ranks(command, directory, num_ranks):
    """Run a command as every rank; all end with this function. No bound on addresses: CUDA reserves a lot of them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks), **DETERMINISM}
    processes, logs = [], [directory / f"rank{rank}.log" for rank in range(num_ranks)]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        for rank, log in enumerate(logs):
            variables = environment(**common, RANK=str(rank), LOCAL_RANK=str(rank))
            variables.pop("DS_ACCELERATOR")
            with log.open("wb") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables))
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    tails = "\n".join(f"---- rank {n}, exit code {codes[n]}\n{log.read_text()[-6000:]}" for n, log in enumerate(logs))
    assert codes == [0] * num_ranks, tails


def _results(name, directory):
    case = CASES[name]
    if case.num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {case.num_ranks} CUDA devices")
    if case.spec == "te" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs TransformerEngine")
    _run_ranks([sys.executable, str(WORKER), str(directory), name], directory, case.num_ranks)
    return [json.loads((directory / f"rank{rank}.json").read_text())[name] for rank in range(case.num_ranks)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.measures])
def test_losses_gradients_and_weights_are_bit_equal(tmp_path, name):
    for rank in _results(name, tmp_path):
        assert rank["is_trained"]
        assert rank["is_repeatable"], "the kernels are not deterministic here: nothing can be said"
        assert rank["is_equal"]
        assert rank["left"] == {"live_bytes": 0, "is_idle": True}
        assert rank["files"] == []
        assert len(rank["steps"]) == STEPS
        assert not any(step["failures"] for step in rank["steps"])
        moved = [step["loaded_bytes"] + step["host_bytes"] for step in rank["steps"]]
        assert CASES[name].block.get("policy") == "adaptive" or moved[1] > 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.measures])
def test_forward_holds_as_little_of_the_device_as_under_full_recomputation(tmp_path, name):
    (held,) = _results(name, tmp_path)
    saved_by_recomputing = held["keep_bytes"] - held["full_bytes"]
    assert saved_by_recomputing > 50 * MIB, "or the comparison is about noise"
    assert held["keep_bytes"] - held["offload_bytes"] >= 0.9 * saved_by_recomputing
