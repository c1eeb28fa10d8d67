"""Sentences about what was done."""

import pytest

from ssdtrain_plugin.stats import StepCounter
from ssdtrain_plugin.summary import RunTotals, after_warm_up


def step(plan="offload everything", **numbers):
    return StepCounter(**numbers).freeze(step=1, rank=0, plan=plan)


def test_what_moved_is_said():
    line, has_moved = after_warm_up(
        step(stored_bytes=1 << 30, loaded_bytes=1 << 29, peak_activation_bytes=50, saved_bytes=100, microbatches=1)
    )
    assert has_moved
    assert "-50 %" in line
    assert "1.0 GiB" in line or "1 GiB" in line


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({}, "no forward"),
        ({"microbatches": 1, "failures": {"ssd: EIO": 3}}, "3 x ssd: EIO"),
        ({"microbatches": 1}, "nothing but weights"),
        ({"microbatches": 1, "saved_bytes": 5, "forwarded_bytes": 5}, "before its store began"),
        ({"microbatches": 1, "saved_bytes": 5, "kept_bytes": 5}, "as too small"),
        ({"microbatches": 1, "kept_bytes": 5}, "tensor subclasses"),
    ],
)
def test_nothing_moved_is_said_with_the_reason(numbers, reason):
    line, has_moved = after_warm_up(step(**numbers))
    assert not has_moved
    assert reason in line


def test_the_report_adds_the_steps_up():
    totals = RunTotals(rank=3)
    assert "no step" in totals.report([])
    for seconds in (1.0, 2.0, 9.0):
        totals.add(step(stored_bytes=1024, stall_seconds=seconds, microbatches=2))
    text = totals.report(["ssd: x"])
    assert "rank 3, 3 steps, 6 micro-batches" in text
    assert "ssd: x" in text
    assert "3.0 KiB" in text or "3 KiB" in text
    assert "4.00 s waiting a step" in text
