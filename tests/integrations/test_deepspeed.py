"""Real DeepSpeed engines on two gloo ranks: with the block everything is as without it, to the last bit."""

import json
import re
from pathlib import Path

import pytest
from deepspeed_cases import PIPELINE, PLAIN
from processes import DEEPSPEED, fork_ranks

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(400)]

WORKER = Path(__file__).with_name("deepspeed_worker.py")
RANKS = (0, 1)
EXACT = ("losses", "gradients", "parameters")


class Suite:
    """What the ranks of one launch reported."""

    def __init__(self, name, directory):
        # The first start compiles an operator of DeepSpeed if the cache is cold.
        self.logs = fork_ranks(WORKER, [name, directory], directory, imports=DEEPSPEED, timeout_seconds=360)
        self._ranks = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in RANKS]

    def __call__(self, rank, case):
        return self._ranks[rank][case]

    def total(self, rank, case, name):
        return sum(step[name] for step in self(rank, case)["with"]["steps"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Suite("pipeline", tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Suite("plain", tmp_path_factory.mktemp("plain"))


@pytest.fixture(params=["pipeline", "plain"])
def suite(request):
    return request.getfixturevalue(request.param)


def _names(cases, *words):
    return [case.name for case in cases if not words or any(word in case.name for word in words)]


def _assert_exact(result):
    for what in EXACT:
        assert result["with"][what] == result["without"][what], what


# ---------------------------------------------------------------------- to the last bit


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", _names(PIPELINE))
def test_a_pipeline_trains_as_without_the_block(pipeline, case, rank):
    result = pipeline(rank, case)
    assert len(set(result["without"]["losses"])) > 1, "nothing was trained"
    _assert_exact(result)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", _names(PLAIN))
def test_a_plain_engine_trains_as_without_the_block(plain, case, rank):
    result = plain(rank, case)
    assert len(set(result["without"]["losses"])) > 1, "nothing was trained"
    _assert_exact(result)


# ---------------------------------------------------------------------- what moved


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    "case", [case for case in PIPELINE if case.name not in ("none", "disabled")], ids=lambda case: case.name
)
def test_a_pipeline_stores_and_gets_back_ahead_of_backward(pipeline, case, rank):
    steps = pipeline(rank, case.name)["with"]["steps"]
    num_forwards = case.microbatches * (2 if case.kind == "dualpipe" else 1)  # two stages a rank
    assert [step["microbatches"] for step in steps] == [num_forwards] * 3
    assert pipeline.total(rank, case.name, "stored_bytes") > 0
    assert pipeline.total(rank, case.name, "loaded_bytes") > 0
    if not case.is_pair:
        # The second backward of a stage that sends two tensors asks again for what was let go of.
        assert pipeline.total(rank, case.name, "num_loads_on_demand") == 0


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_step_of_a_plain_engine_spans_its_accumulation(plain, case, rank):
    steps = plain(rank, case.name)["with"]["steps"]
    assert [step["microbatches"] for step in steps] == [case.microbatches] * 3
    assert plain.total(rank, case.name, "stored_bytes") > 0
    if not case.retains_graph:
        # Nothing announces a backward here: the first tensor of each may have to be waited for.
        assert plain.total(rank, case.name, "num_loads_on_demand") <= 3 * case.microbatches


def test_the_last_stage_forwards_what_backward_wants_at_once(pipeline):
    cases = [case for case in _names(PIPELINE, "zero") if "recompute" not in case]
    assert sum(pipeline.total(1, case, "forwarded_bytes") for case in cases) > 0


@pytest.mark.parametrize("rank", RANKS)
def test_the_policy_decides_what_moves(pipeline, rank):
    everything, half = pipeline(rank, "zero0_fp32")["with"]["steps"], pipeline(rank, "fraction")["with"]["steps"]
    nothing = pipeline(rank, "none")["with"]["steps"]
    assert all(step["kept_bytes"] == 0 for step in everything)
    # The first micro-batch of the first step is offloaded whole: its size is not known yet.
    for step in half[1:]:
        share = 1 - step["kept_bytes"] / nothing[1]["kept_bytes"]
        assert share == pytest.approx(0.5, abs=0.05)
    for step in nothing:
        assert step["stored_bytes"] == step["loaded_bytes"] == 0
        assert step["peak_activation_bytes"] == step["saved_bytes"] > 0


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", _names(PLAIN, "zero3_fp32", "zero3_bf16"))
def test_the_weights_that_zero_3_gathers_are_not_taken_for_activations(plain, case, rank):
    saved = {name: plain(rank, name)["with"]["steps"][2]["saved_bytes"] for name in (case, case.replace("3", "0", 1))}
    assert saved[case] == saved[case.replace("3", "0", 1)]


@pytest.mark.parametrize("rank", RANKS)
def test_nothing_stays_alive_after_a_step(suite, rank):
    for case in PIPELINE + PLAIN:
        try:
            result = suite(rank, case.name)["with"]
        except KeyError:
            continue
        assert result.get("live_bytes", [0, 0, 0]) == [0, 0, 0], case.name


# ---------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["offload", "offload_non_reentrant"])
def test_with_offload_a_checkpointed_pipeline_recomputes_nothing(pipeline, name, rank):
    result = pipeline(rank, name)
    forwards = 3 * 4 * 2  # steps, micro-batches, blocks of a stage
    assert result["without"]["num_calls"] == 2 * forwards
    assert result["with"]["num_calls"] == forwards


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["recompute", "recompute_non_reentrant", "recompute_zero1_bf16"])
def test_with_recompute_a_checkpointed_pipeline_offloads_the_inputs(pipeline, name, rank):
    result = pipeline(rank, name)
    assert result["with"]["num_calls"] == result["without"]["num_calls"] == 2 * 3 * 4 * 2
    step = result["with"]["steps"][2]
    assert pipeline.total(rank, name, "stored_bytes") > 0
    assert step["saved_bytes"] < pipeline(rank, "offload")["with"]["steps"][2]["saved_bytes"] / 2


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("how", ["imported", "attribute", "non_reentrant"])
def test_with_offload_a_checkpointed_module_recomputes_nothing(plain, how, rank):
    result = plain(rank, f"offload_{how}")
    forwards = 3 * 2 * 2
    assert result["without"]["num_calls"] == 2 * forwards
    assert result["with"]["num_calls"] == forwards


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("how", ["imported", "attribute", "non_reentrant"])
def test_with_recompute_a_checkpointed_module_offloads_the_inputs(plain, how, rank):
    result = plain(rank, f"recompute_{how}")
    assert result["with"]["num_calls"] == result["without"]["num_calls"]
    assert plain.total(rank, f"recompute_{how}", "stored_bytes") > 0
    saved = {mode: plain(rank, f"{mode}_{how}")["with"]["steps"][2]["saved_bytes"] for mode in ("recompute", "offload")}
    assert saved["recompute"] < saved["offload"] / 2


# ---------------------------------------------------------------------- on disk


@pytest.mark.parametrize("rank", RANKS)
def test_every_engine_has_one_file_without_a_name_and_leaves_nothing(suite, rank):
    for case in PIPELINE + PLAIN:
        try:
            result = suite(rank, case.name)["with"]
        except KeyError:
            continue
        if "steps" in result:
            assert len(result["extents"]) == (case.name != "none"), case.name
            assert result["files"] == result["extents_after"] == result["files_after"] == [], case.name


def test_every_rank_has_its_own_file(suite):
    for case in PIPELINE + PLAIN:
        try:
            first, second = (suite(rank, case.name)["with"].get("extents", []) for rank in RANKS)
        except KeyError:
            continue
        assert not set(first) & set(second), case.name


# ---------------------------------------------------------------------- off again


@pytest.mark.parametrize("rank", RANKS)
def test_a_disabled_block_is_plain_deepspeed(pipeline, rank):
    result = pipeline(rank, "disabled")
    assert "steps" not in result["with"], "something was attached"
    assert result["with"]["num_calls"] == result["without"]["num_calls"]


_ALWAYS = {"CheckpointFunction", "non_reentrant_checkpoint", "destroy", "offloader"}
_PIPELINE = _ALWAYS | {"instruction_map", "schedule", "train_batch"}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("name", "touched"),
    [("detach", _PIPELINE), ("detach_non_reentrant", _PIPELINE | {"activation_checkpoint_func"})],
)
def test_a_detached_pipeline_is_deepspeeds_own_again(pipeline, name, touched, rank):
    result = pipeline(rank, name)
    assert set(result["changed"]) == touched
    assert result["not_restored"] == []
    _assert_exact(result)
    assert result["num_calls_after"] == 2 * (2 * 4 * 2), "DeepSpeed recomputes again"


@pytest.mark.parametrize("rank", RANKS)
def test_a_detached_plain_engine_is_deepspeeds_own_again(plain, rank):
    result = plain(rank, "detach")
    assert set(result["changed"]) == _ALWAYS | {"step", "num_forward_hooks", "num_forward_pre_hooks"}
    assert result["not_restored"] == []
    _assert_exact(result)
    assert result["num_calls_after"] == 2 * (2 * 2 * 4), "DeepSpeed recomputes again"


@pytest.mark.parametrize("rank", RANKS)
def test_another_engine_of_the_process_is_not_affected(plain, rank):
    result = plain(rank, "two_engines")
    forwards = 3 * 2 * 4
    for name in ("offloaded", "plain"):
        assert {what: result[name][what] for what in EXACT} == {what: result["without"][what] for what in EXACT}
    assert result["calls"]["offloaded"] == forwards
    assert result["calls"]["plain"] == 2 * forwards
    # Two engines with the block, detached in the order of their birth.
    assert result["stays"], "the first to go took the other's checkpointing away"
    assert result["calls"]["second"] == 2 * 4
    assert result["is_restored"]


@pytest.mark.parametrize("rank", RANKS)
def test_destroy_gives_everything_back(suite, rank):
    assert suite(rank, "destroyed") == {"num_open": 1, "num_open_after": 0, "is_restored": True}


@pytest.mark.parametrize("rank", RANKS)
def test_an_engine_that_is_only_dropped_gives_everything_back(plain, rank):
    assert plain(rank, "dropped") == {"num_open": 1, "num_open_after": 0, "is_restored": True}


def test_an_engine_that_is_attached_at_exit_does_not_disturb_it(suite):
    for log in suite.logs:
        for word in ("terminate called", "Exception ignored", "Traceback", "Fatal Python error"):
            assert word not in log, log[-4000:]


def test_every_stage_says_what_was_done_and_replicas_say_it_once(pipeline, plain):
    num_engines = {"pipeline": len(PIPELINE) - 1 + 2 + 2, "plain": len(PLAIN) + 1 + 2 + 3}
    for rank in RANKS:
        assert pipeline.logs[rank].count(f"] ssdtrain: rank {rank}: ") == num_engines["pipeline"]
        assert re.search(rf"ssdtrain: rank {rank}, step 1: (moved|nothing was moved)", pipeline.logs[rank])
    assert plain.logs[0].count("] ssdtrain: rank 0: ") == num_engines["plain"]
    assert re.search(r"ssdtrain: rank 0, step 1: (moved|nothing was moved)", plain.logs[0])
    assert "ssdtrain: rank 1" not in plain.logs[1]
