"""Released megatron-core under its own schedules: with the plugin everything is as without it, to the last bit.

Every case runs in this interpreter. Where ``SSDTRAIN_MEGATRON_PYTHON`` names one that has a newer megatron-core
(``make test`` makes it), those of ``NEWEST_TOO`` run in that one as well, and ``make test-all`` runs all in both.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from megatron_cases import NEWEST_TOO, SUITES
from megatron_launches import Launches, asked_for, each_release, needs_newest, start

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(500)]

WORKER = Path(__file__).with_name("megatron_worker.py")
CASES = {case.name: (suite, case) for suite, (_, cases) in SUITES.items() for case in cases}


def _on_newest(name):
    marks = [needs_newest] if name in NEWEST_TOO else [needs_newest, pytest.mark.exhaustive]
    return pytest.param("newest", name, marks=marks, id=f"newest-{name}")


each_case = pytest.mark.parametrize(
    ("release", "case"),
    [*(pytest.param("this", name, id=f"this-{name}") for name in CASES), *map(_on_newest, CASES)],
)


@pytest.fixture(scope="module")
def suites(request, tmp_path_factory):
    """Give what the ranks of a suite reported, by case."""
    asked = set(asked_for(request, "release", "case"))

    def launch(release, name):
        num_ranks, cases = SUITES[name]
        usual = set(CASES if release == "this" else NEWEST_TOO)
        names = [case.name for case in cases if case.name in usual or (release, case.name) in asked]
        directory = tmp_path_factory.mktemp(name)
        start(release, WORKER, [name, directory, *names], directory, num_ranks)
        ranks = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
        return {case: [rank[case] for rank in ranks] for case in [*names, "places_are_given_back"]}

    num_ranks = {name: number for name, (number, _) in SUITES.items()}
    launches = Launches(launch, {release for (release,) in asked_for(request, "release")}, num_ranks)
    yield launches
    launches.close()


@each_case
def test_losses_norms_and_gradients_are_those_of_the_run_without_the_plugin(suites, release, case):
    ranks = suites(release, CASES[case][0])[case]
    for rank in ranks:
        assert rank["with"]["losses"] == rank["without"]["losses"]
        assert rank["with"]["gradients"] == rank["without"]["gradients"]
        hashes = [step[0] for step in rank["without"]["gradients"]]
        assert all(hashes[0].values()) or case.endswith(("bert", "bert_full")), "a parameter without a gradient"
        assert hashes[0] != hashes[1] != hashes[2], "nothing was trained"
    assert any(len(set(rank["without"]["losses"])) > 1 for rank in ranks)


@each_case
def test_activations_go_out_and_come_back_ahead_of_backward(suites, release, case):
    for rank in suites(release, CASES[case][0])[case]:
        steps = rank["with"]["steps"]
        assert len(steps) == len(rank["with"]["gradients"]), "a step of the host is a step in the books"
        assert sum(step["stored_bytes"] for step in steps) > 0
        assert [step["num_loads_on_demand"] for step in steps] == [0] * len(steps)


@each_case
def test_nothing_is_left(suites, release, case):
    for rank in suites(release, CASES[case][0])[case]:
        assert rank["with"]["live_bytes"] == [0] * len(rank["with"]["live_bytes"])
        assert rank["with"]["files"] == []


@each_case
def test_layers_that_flags_would_recompute_run_once(suites, release, case):
    suite, case = CASES[case]
    is_full = case.config.get("recompute_granularity") == "full" and case.block.get("checkpointing") != "recompute"
    num_layers = case.num_layers // case.layout[1] * (2 if case.model == "t5" else 1)  # encoder and decoder
    for rank in suites(release, suite)[case.name]:
        num_without, num_with = rank["without"]["num_layer_calls"], rank["with"]["num_layer_calls"]
        if is_full:
            assert num_with == num_layers * case.microbatches * len(rank["with"]["steps"]) < num_without
        else:
            assert num_with == num_without


@pytest.mark.parametrize(
    ("release", "suite"),
    [
        *(pytest.param("this", suite, id=f"this-{suite}") for suite in SUITES),
        *(pytest.param("newest", suite, id=f"newest-{suite}", marks=needs_newest) for suite in ("one", "two", "four")),
    ],
)
def test_the_places_of_megatron_are_given_back(suites, release, suite):
    assert suites(release, suite)["places_are_given_back"] == [True] * SUITES[suite][0]


@each_release
def test_block_n_offloads_n_layers_and_keeps_the_rest(suites, release):
    one = suites(release, "one")
    half, all_layers = one["gpt_full_block"][0]["with"], one["gpt_full_uniform"][0]["with"]
    halves, wholes = Counter(), Counter()
    for some, every in zip(half["steps"], all_layers["steps"], strict=True):
        half_bytes = some["kept_bytes"] - every["kept_bytes"]  # 2 of 4 layers
        assert half_bytes > 0
        for sums, step, offered_bytes in ((halves, some, half_bytes), (wholes, every, 2 * half_bytes)):
            # A store that has not begun when its tensor is asked for is not made; one under way may be forwarded
            # too, and end, and be counted, in the step after. So the sums of all steps up to here are compared.
            sums.update(offered=offered_bytes, stored=step["stored_bytes"], forwarded=step["forwarded_bytes"])
            assert sums["stored"] <= sums["offered"] <= sums["stored"] + sums["forwarded"]
        assert some["saved_bytes"] == every["saved_bytes"]
