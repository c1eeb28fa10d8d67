"""What the steady steps of a run measured, as the plain numbers that a plan is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import median

from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.policy.base import KEEPS_EVERYTHING
from ssdtrain_plugin.projection.measurement import MeasuredRank, MeasuredSave
from ssdtrain_plugin.report.numbers import layer_of, union_seconds
from ssdtrain_plugin.report.reading import RankRecord, Run
from ssdtrain_plugin.stats import WARM_UP_STEPS, StepStats

__all__ = ["measure"]

_WRITES, _READS = ("store", "spill"), ("load", "promote")
_RECEIVES = "Recv"
"""How DeepSpeed's instructions begin that wait for another stage."""


def measure(run: Run, *, num_ranks: int, microbatches: int, parts: int = 1) -> tuple[MeasuredRank, ...]:
    """Take the medians of all steps after the warm-up.

    Args:
        run: All ranks.
        num_ranks: That the plan is for.
        microbatches: That it has in a step.
        parts: Of a stage, each with a forward of its own (interleaved schedules).

    Raises:
        ConfigError: The run is not one of such a plan, or too short, or its policy moved nothing on purpose; all
            faults are listed.
    """
    faults = [*_rank_faults(run, num_ranks)]
    passes = microbatches * parts
    steady: dict[int, list[StepStats]] = {}
    for rank in run.ranks:
        later = [step for step in rank.steps if step.step >= WARM_UP_STEPS]
        steady[rank.rank] = [step for step in later if step.microbatches == passes]
        faults += _step_faults(rank, later, steady[rank.rank], microbatches, parts)
    if faults:
        raise ConfigError(f"the run `{run.directory}`", [text for text, _ in faults], hint=faults[0][1])
    return tuple(_measured(rank, steady[rank.rank], has_whole_stages=parts == 1) for rank in run.ranks)


def _rank_faults(run: Run, num_ranks: int) -> Iterable[tuple[str, str]]:
    found = [rank.rank for rank in run.ranks]
    if found != list(range(num_ranks)):
        # A job of a thousand ranks is not listed.
        named = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        yield (
            f"ranks: {len(found)} ({named}) (expected gpus, {num_ranks}, numbered from 0)",
            "name the directory with the files of all ranks, or write the mapping of the run into the cluster's file",
        )


def _step_faults(
    rank: RankRecord, later: Sequence[StepStats], steady: Sequence[StepStats], microbatches: int, parts: int
) -> Iterable[tuple[str, str]]:
    if not later:
        yield (
            f"rank {rank.rank}: {len(rank.steps)} finished steps (expected more than {WARM_UP_STEPS}, the warm-up)",
            f"train {WARM_UP_STEPS + 1} steps or more with `stats_path`, better 10",
        )
    elif all(step.plan == KEEPS_EVERYTHING for step in later):
        yield (
            f"rank {rank.rank}: policy none (expected one that offloads)",
            "train some steps with `policy: adaptive` or `policy: all`",
        )
    elif not steady:
        (found, _), *_ = Counter(step.microbatches for step in later).most_common(1)
        wanted = f"batch.micro_batches, {microbatches}" + (f", times {parts} virtual stages" if parts > 1 else "")
        yield (
            f"rank {rank.rank}: micro-batches: {found} a step (expected {wanted})",
            "write the batch of the run into the cluster's file",
        )


def _measured(rank: RankRecord, steps: Sequence[StepStats], *, has_whole_stages: bool) -> MeasuredRank:
    def middle(value: Callable[[StepStats], float]) -> float:
        return median(map(value, steps))

    numbers = {step.step for step in steps}
    traced = [step for step in rank.traced_steps if step.step in numbers]
    waits = _waits(rank, numbers)
    saves, alike = _saves(rank, numbers) if traced and has_whole_stages else (None, 0.0)
    return MeasuredRank(
        rank=rank.rank,
        first_step=steps[0].step,
        num_steps=len(steps),
        num_traced_steps=len(traced),
        device=None if rank.start is None else rank.start.device,
        saved_bytes=middle(lambda step: step.saved_bytes),
        peak_bytes=middle(lambda step: step.peak_activation_bytes),
        stored_bytes=middle(lambda step: step.stored_bytes),
        host_bytes=middle(lambda step: step.host_bytes),
        loaded_bytes=middle(lambda step: step.loaded_bytes),
        forwarded_bytes=middle(lambda step: step.forwarded_bytes),
        kept_bytes=middle(lambda step: step.kept_bytes),
        stall_seconds=middle(lambda step: step.stall_seconds),
        forward_seconds=middle(lambda step: step.forward_seconds),
        backward_seconds=middle(lambda step: step.backward_seconds),
        step_seconds=median(step.end - step.begin for step in traced) if traced else None,
        waiting_seconds=median(waits.values()) if waits else None,
        write_bytes_per_second=_rate(rank, numbers, _WRITES),
        read_bytes_per_second=_rate(rank, numbers, _READS),
        num_drives=len({each.drive for each in rank.transfers if each.tier == "ssd" and each.direction in _WRITES}),
        saves=saves,
        saved_alike=alike,
    )


def _waits(rank: RankRecord, steps: Collection[int]) -> dict[int, float]:
    """Sum up by step what the host's schedule waited for other stages; empty if it says nothing of instructions."""
    own = [each for each in rank.instructions if each.step in steps]
    waits = dict.fromkeys((each.step for each in own), 0.0)
    for each in own:
        if each.name.startswith(_RECEIVES):
            waits[each.step] += each.end - each.begin
    return waits


def _rate(rank: RankRecord, steps: Collection[int], directions: Collection[str]) -> float | None:
    """Get bytes for each second in which a drive was at work; None if no transfer was recorded."""
    done = [
        each
        for each in rank.transfers
        if each.step in steps and each.tier == "ssd" and each.direction in directions and each.outcome == "done"
    ]
    seconds = union_seconds((each.begin, each.end) for each in done)
    return sum(each.nbytes for each in done) / seconds if seconds else None


def _saves(rank: RankRecord, steps: Collection[int]) -> tuple[tuple[MeasuredSave, ...] | None, float]:
    """Choose what most micro-batches saved; say how large a share of them it is."""
    found: dict[int, list[MeasuredSave]] = defaultdict(list)
    for each in rank.saves:
        if each.step in steps:
            found[each.microbatch].append(MeasuredSave(layer_of(each.module), each.module or "", each.nbytes))
    if not found:
        return None, 0.0
    (saves, count), *_ = Counter(map(tuple, found.values())).most_common(1)
    return saves, count / len(found)
