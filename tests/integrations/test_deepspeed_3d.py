"""DeepSpeed's pipeline around Megatron-core's layers, PP2 x TP2 x DP2 on 8 processes: all is as without the block."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from deepspeed_3d_cases import CASES, STEPS
from processes import EAGER, free_port, run

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

WORKER = Path(__file__).with_name("deepspeed_3d_worker.py")
RANKS = range(8)
WARM_UP = 2
MICROBATCHES, BLOCKS_OF_A_STAGE = 4, 2
NAMES = [case.name for case in CASES]


class Job:
    """What the ranks of one launch reported."""

    def __init__(self, directory):
        launcher = [sys.executable, Path(sys.executable).with_name("deepspeed")]
        launcher += ["--num_gpus", str(len(RANKS)), "--master_port", free_port()]
        command = [*launcher, WORKER, directory]
        self.code, self.log = run(command, directory / "log", timeout_seconds=240, **EAGER)
        assert self.code == 0, self.log[-8000:]
        self.left = _processes_that_mention(directory)
        self._ranks = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in RANKS]

    def __call__(self, rank, case):
        return self._ranks[rank][case]


def _processes_that_mention(directory):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if str(directory).encode() in command and int(process.name) != os.getpid():
            found.append(command)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("job"))


# ---------------------------------------------------------------------- it is the job that it claims to be


@pytest.mark.parametrize("rank", RANKS)
def test_both_frameworks_mean_the_same_groups(job, rank):
    stage, replica, part = rank // 4, rank // 2 % 2, rank % 2
    tensor = [4 * stage + 2 * replica + other for other in (0, 1)]
    data = [4 * stage + 2 * other + part for other in (0, 1)]
    pipe = [4 * other + 2 * replica + part for other in (0, 1)]
    for case in NAMES:
        groups = job(rank, case)["with"]["groups"]
        assert groups == {"deepspeed": [tensor, data, pipe], "megatron": [tensor, data, pipe]}


@pytest.mark.parametrize("rank", RANKS)
def test_the_first_stage_ends_in_an_output_that_deepspeed_empties(job, rank):
    layers = ["Embedding", "Block", "Block", "Squash"] if rank < 4 else ["Block", "Block", "Head"]
    for case in NAMES:
        assert job(rank, case)["with"]["layers"] == layers
        assert job(rank, case)["with"]["is_partitioned"]


# ---------------------------------------------------------------------- to the last bit


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", NAMES)
def test_every_gradient_is_as_without_the_block(job, case, rank):
    result = job(rank, case)
    assert result["num_gradients"] > STEPS * MICROBATCHES * BLOCKS_OF_A_STAGE * 12  # parameters of a block
    assert result["zero"] == []
    assert result["unequal"] == []


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", NAMES)
def test_losses_norms_and_parameters_are_as_without_the_block(job, case, rank):
    result = job(rank, case)
    for what in ("losses", "norms", "parameters"):
        assert result["with"][what] == result["without"][what], what
    assert len(set(result["without"]["losses"])) == len(set(result["without"]["norms"])) == STEPS
    assert all(0 < float.fromhex(norm) < 100 for norm in result["without"]["norms"])


@pytest.mark.parametrize("case", NAMES)
def test_all_ranks_tell_the_same_loss_and_norm(job, case):
    for what in ("losses", "norms"):
        assert len({tuple(job(rank, case)["with"][what]) for rank in RANKS}) == 1


# ---------------------------------------------------------------------- what moved


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", NAMES)
def test_every_rank_stores_and_has_it_back_before_it_is_needed(job, case, rank):
    steps = job(rank, case)["with"]["steps"]
    assert [step["microbatches"] for step in steps] == [MICROBATCHES] * STEPS
    for step in steps:
        assert step["stored_bytes"] > 0
        assert step["kept_bytes"] == 0
    assert sum(step["loaded_bytes"] for step in steps) > 0
    assert [step["num_loads_on_demand"] for step in steps[WARM_UP:]] == [0] * (STEPS - WARM_UP)


@pytest.mark.parametrize("rank", RANKS)
def test_a_checkpointed_pipeline_recomputes_nothing(job, rank):
    result, forwards = job(rank, "checkpointed"), STEPS * MICROBATCHES * BLOCKS_OF_A_STAGE
    assert result["without"]["num_calls"] == 2 * forwards
    assert result["with"]["num_calls"] == forwards


@pytest.mark.parametrize("stage", [0, 1])
def test_each_stage_has_one_voice(job, stage):
    for rank in range(4 * stage, 4 * stage + 4):
        expected = len(CASES) if rank == 4 * stage else 0
        assert job.log.count(f"] ssdtrain: rank {rank}: ") == expected, rank


# ---------------------------------------------------------------------- what is left


@pytest.mark.parametrize("rank", RANKS)
def test_nothing_is_left_on_the_drive_or_alive(job, rank):
    for case in NAMES:
        result = job(rank, case)["with"]
        assert result["live_bytes"] == [0] * STEPS
        assert result["extents_after"] == result["files_after"] == []


def test_the_launcher_ends_cleanly_with_all_of_its_processes(job):
    assert job.left == []
    for word in ("terminate called", "Exception ignored", "Traceback", "Fatal Python error"):
        assert word not in job.log, job.log[-6000:]


def test_the_shim_says_what_it_does(job):
    assert job.log.count('what is asked for on device "cuda" is made on the CPU; nothing else is changed') == len(RANKS)
