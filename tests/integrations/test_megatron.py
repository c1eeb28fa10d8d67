"""Released megatron-core under its own schedules: with the plugin everything is as without it, to the last bit.

Every suite runs in this interpreter and, where ``SSDTRAIN_MEGATRON_PYTHON`` names one that has a newer
megatron-core (``make test`` makes it), in that one.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from megatron_cases import SUITES
from processes import EAGER, MEGATRON, fork_ranks

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(500)]

WORKER = Path(__file__).with_name("megatron_worker.py")
NEWEST = os.environ.get("SSDTRAIN_MEGATRON_PYTHON")
PYTHONS = [
    pytest.param(sys.executable, id="this"),
    pytest.param(
        NEWEST, id="newest", marks=pytest.mark.skipif(not NEWEST, reason="SSDTRAIN_MEGATRON_PYTHON is not set")
    ),
]
CASES = [(suite, case.name) for suite, (_, cases) in SUITES.items() for case in cases]
each_case = pytest.mark.parametrize(("suite", "case"), CASES, ids=[name for _, name in CASES])


@pytest.fixture(scope="module", params=PYTHONS)
def suites(request, tmp_path_factory):
    """Launch a suite when the first test asks for it; give what its ranks reported."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = None  # a suite that fails is not launched again by every test of it
            num_ranks, cases = SUITES[name]
            directory = tmp_path_factory.mktemp(name)
            options = {"python": request.param, "num_ranks": num_ranks, "imports": MEGATRON}
            options |= EAGER if num_ranks > 1 else {}
            fork_ranks(WORKER, [name, directory], directory, timeout_seconds=400, **options)
            ranks = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
            names = [*(case.name for case in cases), "places_are_given_back"]
            found[name] = {case: [rank[case] for rank in ranks] for case in names}
        assert found[name] is not None, f"suite `{name}` failed before"
        return found[name]

    return get


@each_case
def test_losses_norms_and_gradients_are_those_of_the_run_without_the_plugin(suites, suite, case):
    ranks = suites(suite)[case]
    for rank in ranks:
        assert rank["with"]["losses"] == rank["without"]["losses"]
        assert rank["with"]["gradients"] == rank["without"]["gradients"]
        hashes = [step[0] for step in rank["without"]["gradients"]]
        assert all(hashes[0].values()) or case.endswith(("bert", "bert_full")), "a parameter without a gradient"
        assert hashes[0] != hashes[1] != hashes[2], "nothing was trained"
    assert any(len(set(rank["without"]["losses"])) > 1 for rank in ranks)


@each_case
def test_activations_go_out_and_come_back_ahead_of_backward(suites, suite, case):
    for rank in suites(suite)[case]:
        steps = rank["with"]["steps"]
        assert len(steps) == len(rank["with"]["gradients"]), "a step of the host is a step in the books"
        assert sum(step["stored_bytes"] for step in steps) > 0
        assert [step["num_loads_on_demand"] for step in steps] == [0] * len(steps)


@each_case
def test_nothing_is_left(suites, suite, case):
    for rank in suites(suite)[case]:
        assert rank["with"]["live_bytes"] == [0] * len(rank["with"]["live_bytes"])
        assert rank["with"]["files"] == []


@pytest.mark.parametrize(
    ("suite", "case"),
    [(suite, case) for suite, (_, cases) in SUITES.items() for case in cases],
    ids=[name for _, name in CASES],
)
def test_layers_that_flags_would_recompute_run_once(suites, suite, case):
    is_full = case.config.get("recompute_granularity") == "full" and case.block.get("checkpointing") != "recompute"
    num_layers = case.num_layers // case.layout[1] * (2 if case.model == "t5" else 1)  # encoder and decoder
    for rank in suites(suite)[case.name]:
        num_without, num_with = rank["without"]["num_layer_calls"], rank["with"]["num_layer_calls"]
        if is_full:
            assert num_with == num_layers * case.microbatches * len(rank["with"]["steps"]) < num_without
        else:
            assert num_with == num_without


@pytest.mark.parametrize("suite", SUITES)
def test_the_places_of_megatron_are_given_back(suites, suite):
    assert suites(suite)["places_are_given_back"] == [True] * SUITES[suite][0]


def test_block_n_offloads_n_layers_and_keeps_the_rest(suites):
    half, all_layers = suites("one")["gpt_full_block"][0]["with"], suites("one")["gpt_full_uniform"][0]["with"]
    for some, every in zip(half["steps"], all_layers["steps"], strict=True):
        assert some["stored_bytes"] * 2 == every["stored_bytes"]  # 2 of 4 layers
        assert some["saved_bytes"] == every["saved_bytes"]
