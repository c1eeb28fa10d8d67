"""What a run reached, in place of what the cluster's file assumes: Note [What a run can tell]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ssdtrain_plugin.projection.arithmetic import head_flops, layer_flops
from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.measurement import MeasuredRank
from ssdtrain_plugin.projection.projection import Projection
from ssdtrain_plugin.projection.terms import NOTHING_MOVED, UNTRACED
from ssdtrain_plugin.projection.times import stage_time, step_time

__all__ = ["Reached", "reached_by", "with_reached"]

_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Reached:
    """What the run reached, for the cluster's file; None where it cannot tell.

    Attributes:
        flops_per_second: The model's operations over the time they took, on one GPU.
        achieved_tflops: The field with which the plan takes as long as the run.
        write_bytes_per_second: Of one drive.
        read_bytes_per_second: Of one drive.
        reasons: Why something is missing, one line each.
    """

    flops_per_second: float | None
    achieved_tflops: float | None
    write_bytes_per_second: float | None
    read_bytes_per_second: float | None
    reasons: tuple[str, ...]


def reached_by(planned: Projection, by_stage: Sequence[Sequence[MeasuredRank]]) -> Reached:
    """Say what the run reached.

    Args:
        planned: The plan of it.
        by_stage: Its ranks, those of each stage together.
    """
    reasons: list[str] = []
    flops, tflops = _arithmetic(planned, by_stage, reasons)
    ranks = [rank for own in by_stage for rank in own]
    rates = []
    for name in ("write", "read"):
        found = [
            rate / max(1, rank.num_drives)
            for rank in ranks
            if (rate := getattr(rank, f"{name}_bytes_per_second")) is not None
        ]
        if not found:
            why = NOTHING_MOVED if ranks[0].num_traced_steps else UNTRACED
            reasons.append(f"drive.{name}_bytes_per_second: {why}")
        rates.append(_rounded(median(found)) if found else None)
    return Reached(flops, tflops, rates[0], rates[1], tuple(reasons))


def _arithmetic(
    planned: Projection, by_stage: Sequence[Sequence[MeasuredRank]], reasons: list[str]
) -> tuple[float | None, float | None]:
    """Say how many operations a second the run did, and which rate of products explains its time."""
    model, cluster = planned.model, planned.cluster
    batch, stages = cluster.batch, tuple(plan.stage for plan in planned.stages)
    if any(rank.is_behind_host for own in by_stage for rank in own):
        lengths = [rank.step_seconds for own in by_stage for rank in own if rank.step_seconds is not None]
        seconds = median(lengths) if lengths else 0.0
        done = planned.model_flops / cluster.gpus

        def takes(at: ClusterSpec) -> float:
            return step_time(model, at, stages, batch.micro_batch, batch.micro_batches).seconds
    else:
        times = [median(rank.forward_seconds + rank.backward_seconds for rank in own) for own in by_stage]
        slowest = max(range(len(times)), key=times.__getitem__)
        seconds, stage = times[slowest] / batch.micro_batches, stages[slowest]
        forward = sum(layer_flops(model, block) for block in stage.blocks) + (head_flops(model) if stage.is_last else 0)
        done = 3 * forward * batch.micro_batch / cluster.parallel.tp

        def takes(at: ClusterSpec) -> float:
            return stage_time(model, at, stage, batch.micro_batch).seconds

    if not seconds:
        reasons.append(f"achieved_tflops: {UNTRACED}")  # passes always take some time
        return None, None
    rate = _rate_for(cluster, takes, seconds)
    if rate is None:
        reasons.append(
            "achieved_tflops: at no rate up to the GPU's peak the plan takes as long as the run; if that was faster, "
            "hbm_bytes_per_second, link_bytes_per_second or peak_flops_per_second is too low"
        )
    return done / seconds, None if rate is None else min(_rounded(rate), cluster.gpu.peak_flops_per_second) / 1e12


def _rate_for(cluster: ClusterSpec, takes: Callable[[ClusterSpec], float], seconds: float) -> float | None:
    """Find operations a second with which the plan takes so long; None if there are none up to the GPU's peak."""
    low, high = 1.0, cluster.gpu.peak_flops_per_second
    if not takes(_at(cluster, high)) <= seconds <= takes(_at(cluster, low)):
        return None
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if takes(_at(cluster, middle)) > seconds else (low, middle)
    return high


def _at(cluster: ClusterSpec, flops_per_second: float) -> ClusterSpec:
    return cluster.model_copy(update={"achieved_tflops": flops_per_second / 1e12, "efficiency": None})


def _rounded(value: float) -> float:
    """Round to what is printed, so that pasted fields give the plan that was shown."""
    return float(f"{value:.4g}")


def with_reached(cluster: ClusterSpec, reached: Reached) -> ClusterSpec:
    """Put what was reached in place of what was assumed.

    Args:
        cluster: With the assumptions.
        reached: What is None in it stays as assumed.
    """
    names = ("write_bytes_per_second", "read_bytes_per_second")
    rates = {name: getattr(reached, name) for name in names if getattr(reached, name) is not None}
    found = cluster.model_copy(update={"drive": cluster.drive.model_copy(update=rates)})
    return found if reached.achieved_tflops is None else _at(found, reached.achieved_tflops * 1e12)
