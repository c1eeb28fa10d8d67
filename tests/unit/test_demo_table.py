"""The demo's table and verdict, as pure functions of what the runs wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import demo
from ssdtrain_plugin.stats import StepCounter
from ssdtrain_plugin.units import GIB, MIB

LOSSES = (5.7, 4.0, 3.5, 3.0)


def run_of(losses: Iterable[float] = LOSSES, seconds: tuple[float, ...] = (9.0, 8.0, 2.0, 3.0)) -> demo.RankRun:
    return demo.RankRun(tuple(loss.hex() for loss in losses), seconds, GIB)


def step_stats(step: int, rank: int = 0, **values: Any) -> dict[str, Any]:
    counter = StepCounter(peak_activation_bytes=100 * MIB, stored_bytes=GIB, loaded_bytes=GIB // 2)
    for name, value in values.items():
        setattr(counter, name, value)
    stats: dict[str, Any] = json.loads(counter.freeze(step=step, rank=rank, plan="").to_json())
    return stats


def figures_of(rank: int = 0, **changes: Any) -> demo.RankFigures:
    runs = {"plain": run_of(), "count": run_of(LOSSES[:2]), "ssdtrain": run_of(seconds=(9.0, 8.0, 2.5, 3.5))}
    stats = {
        "count": [step_stats(step, rank, peak_activation_bytes=400 * MIB, stored_bytes=0) for step in range(2)],
        "ssdtrain": [step_stats(step, rank, num_loads_on_demand=3 - step, stall_seconds=0.5) for step in range(4)],
    }
    return replace(demo.summarise(rank, runs, stats), **changes)


def faults_of(*ranks: demo.RankFigures, steps: int = 4) -> list[str]:
    return demo.find_faults(ranks, steps=steps, count_steps=2)


def rendered(figures: demo.RankFigures, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(demo.build_table(figures))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_summary_adds_the_steps() -> None:
    figures = figures_of()
    assert figures.stored_bytes == 4 * GIB
    assert figures.loaded_bytes == 2 * GIB
    assert (figures.loads_on_demand, figures.loads_on_demand_in_warm_up) == (6, 5)
    assert figures.stall_seconds == 2.0
    assert (figures.plain_activation_bytes, figures.ssdtrain_activation_bytes) == (400 * MIB, 100 * MIB)
    assert figures.activation_ratio == 0.25
    assert (figures.plain_step_seconds, figures.ssdtrain_step_seconds) == (2.5, 3.0)
    assert figures.step_ratio == pytest.approx(1.2)


def test_step_time_leaves_out_the_warm_up() -> None:
    assert demo.step_seconds((100.0, 100.0, 3.0, 1.0, 2.0)) == 2.0
    assert demo.step_seconds((4.0, 6.0)) == 5.0
    assert demo.step_range((100.0, 0.1, 3.0, 1.0, 2.0)) == (1.0, 3.0)


def test_a_good_run_has_no_faults() -> None:
    assert faults_of(figures_of(0), figures_of(1)) == []


def test_a_loss_that_differs_in_its_last_bit_is_a_fault() -> None:
    losses = list(figures_of().plain_losses)
    losses[2] = (3.5 + 2**-51).hex()
    (fault,) = faults_of(figures_of(0), figures_of(1, ssdtrain_losses=tuple(losses)))
    assert fault == ("rank 1: the loss of the ssdtrain run differs at step 3 (3.5000000000000004, expected 3.5)")


def test_a_loss_that_differs_in_the_counting_run_is_a_fault() -> None:
    (fault,) = faults_of(figures_of(count_losses=(LOSSES[0].hex(), (4.5).hex())))
    assert fault.startswith("rank 0: the loss of the count run differs at step 2")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_does_not_fall(bad: float) -> None:
    losses = (*figures_of().plain_losses[:-1], bad.hex())
    (fault,) = faults_of(figures_of(plain_losses=losses, ssdtrain_losses=losses))
    assert fault.startswith("the loss did not fall")


def test_a_loss_that_rises_is_a_fault() -> None:
    losses = tuple(reversed(figures_of().plain_losses))
    faults = faults_of(figures_of(plain_losses=losses, ssdtrain_losses=losses, count_losses=losses[:2]))
    assert faults == ["the loss did not fall (first step 3.0000, last step 5.7000)"]


def test_nothing_stored_is_a_fault_on_any_rank() -> None:
    assert faults_of(figures_of(0), figures_of(1, stored_bytes=0)) == ["rank 1: nothing was stored on the drive"]


def test_more_than_half_the_activations_is_a_fault_on_stage_0_only() -> None:
    assert faults_of(figures_of(0, ssdtrain_activation_bytes=200 * MIB)) == []
    assert faults_of(figures_of(0), figures_of(1, ssdtrain_activation_bytes=300 * MIB)) == []
    (fault,) = faults_of(figures_of(0, ssdtrain_activation_bytes=200 * MIB + 1))
    assert fault == (
        "stage 0: the peak of live activations is 200.0 MiB with the plugin and 400.0 MiB without "
        "(expected at most half)"
    )


def test_a_run_that_counted_nothing_is_a_fault() -> None:
    faults = faults_of(figures_of(plain_activation_bytes=0))
    assert any("expected at most half" in fault for fault in faults)


def test_missing_steps_and_statistics_are_faults() -> None:
    figures = figures_of(steps=3, ssdtrain_losses=figures_of().ssdtrain_losses[:3])
    assert faults_of(figures) == [
        "rank 0: the ssdtrain run made 3 steps (expected 4)",
        "rank 0: the plugin wrote statistics of 3 steps (expected 4)",
    ]


def test_failed_stores_are_a_fault() -> None:
    (fault,) = faults_of(figures_of(failures={"ENOSPC": 7}))
    assert fault == "rank 0: stores failed (ENOSPC: 7)"


def test_failures_are_added_by_cause() -> None:
    runs = {name: run_of() for name in ("plain", "count", "ssdtrain")}
    moved = [step_stats(0, failures={"EIO": 1}), step_stats(1, failures={"EIO": 2, "ENOSPC": 1})]
    figures = demo.summarise(0, runs, {"count": [step_stats(0)], "ssdtrain": moved})
    assert figures.failures == {"EIO": 3, "ENOSPC": 1}


def test_table_shows_every_figure_in_80_columns() -> None:
    text = rendered(figures_of())
    for part in ("5.700000", "equal, all bits", "2.50 s", "1.20 x", "400.0 MiB *", "0.25 x", "4.0 GiB", "2.00 s"):
        assert part in text
    assert "2 - 3 s" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "stalls: loads on demand" in text  # no label is wrapped


def test_table_says_when_losses_differ() -> None:
    assert "DIFFERENT" in rendered(figures_of(ssdtrain_losses=run_of((5.7, 4.0, 3.5, 3.1)).losses))


def test_notes_explain_stalls_only_where_there_are_some() -> None:
    assert not any("asked for" in line for line in demo.notes([figures_of(loads_on_demand=0)]))
    assert "6 tensors" in demo.notes([figures_of()])[-1]


@pytest.mark.parametrize(
    ("seconds", "low", "high", "words"),
    [
        (2.52, 2.5, 2.5, "in about the same time"),
        (3.0, 2.0, 3.1, "in about the same time"),
        (3.0, 2.4, 2.6, "20% slower"),
        (2.0, 2.4, 2.6, "20% faster"),
    ],
)
def test_sentence_is_made_of_the_figures(seconds: float, low: float, high: float, words: str) -> None:
    figures = figures_of(0, ssdtrain_step_seconds=seconds, plain_step_range=(low, high))
    text = demo.sentence([figures, figures_of(1)])
    assert words in text
    assert "75% less memory" in text
    assert "100.0 MiB instead of 400.0 MiB" in text
    assert "8.0 GiB waited on the drive" in text


def test_progress_is_read_from_the_last_complete_line() -> None:
    assert "starting" in demo.progress_text("loading\n")
    log = "step 1/8 loss 5.7076 14.33 s\nnoise\nstep 2/8 loss 3.9520 12.42 s\nstep 3/8 lo"
    assert demo.progress_text(log) == "step 2 of 8, loss 3.9520, 12.42 s"


def test_runs_and_statistics_are_read_from_their_files(tmp_path: Path) -> None:
    values = {"losses": ["0x1.8p+1"], "seconds": [1.5], "ru_maxrss_bytes": 5, "vm_hwm_bytes": 4}
    (tmp_path / "rank1.json").write_text(json.dumps(values))
    assert demo.read_run(tmp_path, 1) == demo.RankRun(("0x1.8p+1",), (1.5,), 4)
    lines = [json.dumps(step_stats(step)) for step in (1, 0)]
    (tmp_path / "rank1.jsonl").write_text("\n".join(lines) + "\n")
    assert [stats["step"] for stats in demo.read_stats(tmp_path, 1)] == [0, 1]
