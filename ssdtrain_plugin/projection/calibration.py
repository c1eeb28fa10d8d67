"""A plan against a run of it: how far each term was off, and the plan with what the run reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssdtrain_plugin.projection.limits import MeasuredShare, MicroBatchLimits, micro_batch_limits, resident_bytes
from ssdtrain_plugin.projection.matching import TensorComparison, compare_tensors
from ssdtrain_plugin.projection.measurement import MeasuredRank
from ssdtrain_plugin.projection.projection import Projection, StagePlan, project
from ssdtrain_plugin.projection.reached import Reached, reached_by, with_reached
from ssdtrain_plugin.projection.terms import UNTRACED, Term, over_ranks, saved_bytes, step_term, terms_of

__all__ = ["Calibration", "StageComparison", "calibrate"]

_OTHER_MODEL_SHARE = 0.01
"""Where bytes are further off than this, file and run are probably not of the same model."""


@dataclass(frozen=True, slots=True)
class StageComparison:
    """One stage of the pipeline.

    Attributes:
        index: From 0.
        ranks: That run it.
        terms: In the order of the table.
        tensors: Of the first rank; None if the run has not recorded them.
        reason: Why not.
    """

    index: int
    ranks: tuple[int, ...]
    terms: tuple[Term, ...]
    tensors: TensorComparison | None
    reason: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What ``ssdtrain plan --from-run`` says.

    Attributes:
        planned: The plan as it was.
        num_steps: That were measured, on the rank with fewest.
        num_traced_steps: Of these, how many were traced.
        stages: One each.
        step: Length of a step.
        warnings: What makes the comparison doubtful, one line each.
        reached: In place of what was assumed.
        calibrated: The plan with it.
        limits: Of the micro-batch, with the bytes that the run had.
    """

    planned: Projection
    num_steps: int
    num_traced_steps: int
    stages: tuple[StageComparison, ...]
    step: Term
    warnings: tuple[str, ...]
    reached: Reached
    calibrated: Projection
    limits: MicroBatchLimits


def calibrate(planned: Projection, ranks: Sequence[MeasuredRank]) -> Calibration:
    """Compare, and plan again.

    Args:
        planned: Of the model and the cluster that ran.
        ranks: All of them, by number. As DeepSpeed and Megatron number them, the ranks of a stage follow each other.
    """
    cluster = planned.cluster
    size = len(ranks) // cluster.parallel.pp
    by_stage = [ranks[index * size : (index + 1) * size] for index in range(cluster.parallel.pp)]
    stages = tuple(_stage(planned, plan, own) for plan, own in zip(planned.stages, by_stage, strict=True))
    reached = reached_by(planned, by_stage)
    shares = [_shares(planned, plan, own) for plan, own in zip(planned.stages, by_stage, strict=True)]
    found = with_reached(cluster, reached)
    return Calibration(
        planned=planned,
        num_steps=min(rank.num_steps for rank in ranks),
        num_traced_steps=min(rank.num_traced_steps for rank in ranks),
        stages=stages,
        step=over_ranks([step_term(planned, rank) for rank in ranks]),
        warnings=tuple(_warnings(planned, stages, ranks)),
        reached=reached,
        calibrated=project(planned.model, found),
        limits=micro_batch_limits(planned.model, found, shares),
    )


def _stage(planned: Projection, plan: StagePlan, ranks: Sequence[MeasuredRank]) -> StageComparison:
    of_ranks = [terms_of(planned, plan, rank) for rank in ranks]
    terms = tuple(over_ranks(list(same)) for same in zip(*of_ranks, strict=True))
    first, tensors, reason = ranks[0], None, UNTRACED
    if first.saves is not None:
        tensors, reason = compare_tensors(plan.stage, first.saves), ""
    elif first.num_traced_steps:
        reason = "forwards of interleaved parts have no whole stage"
    return StageComparison(plan.stage.index, tuple(rank.rank for rank in ranks), terms, tensors, reason)


def _shares(planned: Projection, plan: StagePlan, ranks: Sequence[MeasuredRank]) -> MeasuredShare:
    resident = resident_bytes(plan.stage, planned.cluster)
    return MeasuredShare(
        saved=max(saved_bytes(plan, rank) for rank in ranks) / plan.saved_bytes,
        resident=max(rank.peak_bytes for rank in ranks) / resident,
    )


def _warnings(planned: Projection, stages: Sequence[StageComparison], ranks: Sequence[MeasuredRank]) -> list[str]:
    found = []
    far = [
        f"stage {stage.index} by {term.off_by:+.1%}"
        for stage in stages
        for term in stage.terms[:1]
        if term.off_by is not None and abs(term.off_by) > _OTHER_MODEL_SHARE
    ]
    if far:
        found.append(
            f"saved bytes are off, {', '.join(far[:4])}: the model's file and the run are probably not of the same "
            "model, micro-batch, precision, attention, dropout or recomputation; then the rest means little"
        )
    drives = sorted({rank.num_drives for rank in ranks if rank.write_bytes_per_second is not None})
    if drives and drives != [planned.cluster.drives_per_gpu]:
        found.append(
            f"drives_per_gpu: {planned.cluster.drives_per_gpu} in the cluster's file, but ranks of the run wrote to "
            f"{' or '.join(map(str, drives))}"
        )
    if any(rank.device is None for rank in ranks):
        found.append(
            "times of passes are the host's: on a GPU kernels run behind it; `trace_steps` records where the run was"
        )
    unlike = [rank.rank for rank in ranks if rank.saves is not None and rank.saved_alike < 1]
    if unlike:
        found.append(f"not all micro-batches saved the same on ranks {unlike[:8]}: what most of them saved is compared")
    return found
