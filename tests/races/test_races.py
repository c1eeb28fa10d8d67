"""Random training programs under a scheduler of threads that a seed decides: gradients, and all that must hold.

``make stress`` runs 10,000 of them, ``make mutations`` shows that they notice each guard's absence.
One that fails is repeated by ``python tests/races/race_worker.py SEED 1``.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from guards import GUARDS
from race_jobs import RaceResult, races
from race_run import race
from race_scheduler import Threads

import ssdtrain_plugin

ROOT = Path(ssdtrain_plugin.__file__).parent

NUM_PROCESSES = 2
FIRSTS = range(NUM_PROCESSES)
NUM_RUNS = 400


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Threads()
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(600)  # half a minute on two quiet cores
def test_runs_are_green():
    """In processes of their own: a run stops the collector, and a process keeps to one core."""
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        parts = pool.map(lambda first: list(races(first, NUM_RUNS // NUM_PROCESSES, step=NUM_PROCESSES)), FIRSTS)
        results = [result for part in parts for result in part]
    failed = [f"seed {result.seed}: {result.failure}" for result in results if result.failure is not None]
    assert not failed, "\n\n".join(failed)
    assert len(results) == NUM_RUNS


def test_a_seed_is_a_run(threads):
    for seed in (3, 16):
        first, second = race(seed, threads), race(seed, threads)
        assert (first.digest, first.seen) == (second.digest, second.seen)
        (elsewhere,) = races(seed, 1)
        assert elsewhere.digest == first.digest


def test_the_runs_are_not_vacuous(threads):
    seen = Counter()
    for seed in range(40):
        seen.update(race(seed, threads).seen)
    for name in ("stored_bytes", "host_bytes", "loaded_bytes", "forwarded_bytes", "deduplicated_bytes", "preemptions",
                 "gradients", "dropped", "mutated", "lost", "with another thread", "fail write", "hang write",
                 "fail read", "hang read", "ssd: timeout", "ssd: budget used up"):  # fmt: skip
        assert seen[name] > 0, name


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_stands_where_the_list_says(guard):
    source = (ROOT / guard.file).read_text(encoding="utf-8")
    compile(guard.removed_from(source), guard.file, "exec")


@pytest.mark.parametrize("guard", [guard for guard in GUARDS if guard.held_by], ids=lambda guard: guard.name)
def test_the_test_that_holds_a_guard_is_there(guard):
    file, name = guard.held_by.split("::")
    assert f"\ndef {name}(" in (ROOT.parent / file).read_text(encoding="utf-8")


def test_guards_have_names_of_their_own():
    assert len({guard.name for guard in GUARDS}) == len(GUARDS) >= 20


def test_what_failed_is_named_in_one_line():
    assert RaceResult(1, "a.b.Violation: a place is lost\nthreads:\n  main", 5, 0).check == "a place is lost"
    text = "Traceback:\n  x\nssdtrain_plugin.errors.StateError: cannot\n\nhint: report"
    assert RaceResult(1, text, 5, 0).check == "StateError: cannot"
    assert RaceResult(1, "the process died: signal", 0, 0).check == "the process died: signal"
