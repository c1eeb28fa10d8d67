"""The numbers of a plan beside those of a run.

Note [What a run can tell]. Bytes are counted, so they agree to the last one if file and run are
of the same model. Times are those of the host; where kernels run behind it, only the length of a
step says anything. A rate of arithmetic is found by asking at which rate the plan would take as long
as the run did, so that all that the plan leaves out goes into it. A drive's rate is bytes for each
second in which it worked: less than it could do, if it never had enough to do at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from ssdtrain_plugin.projection.endurance import drive_life
from ssdtrain_plugin.projection.limits import resident_bytes
from ssdtrain_plugin.projection.measurement import MeasuredRank
from ssdtrain_plugin.projection.projection import Projection, StagePlan

__all__ = ["NOTHING_MOVED", "UNTRACED", "Term", "Unit", "over_ranks", "saved_bytes", "step_term", "terms_of"]

Unit = Literal["bytes", "seconds", "bytes_per_second", "share", "years"]

UNTRACED = "no steady step was traced: train with `trace_steps`"
NOTHING_MOVED = "no byte went between memory and a drive"


@dataclass(frozen=True, slots=True)
class Term:
    """One number of the plan and of the run.

    Attributes:
        name: What it is of.
        unit: Of all numbers of it.
        planned: By the plan.
        measured: The median over ranks; None if the run cannot tell.
        lowest: Of all ranks.
        highest: Of all ranks.
        reason: Why it was not measured.
    """

    name: str
    unit: Unit
    planned: float
    measured: float | None
    lowest: float | None = None
    highest: float | None = None
    reason: str = ""

    @property
    def off_by(self) -> float | None:
        """How much more than planned was measured, as a share of what was planned; None if that has no meaning."""
        if self.measured is None:
            return None
        if self.measured == self.planned:
            return 0.0
        return self.measured / self.planned - 1 if self.planned else None


def over_ranks(terms: Sequence[Term]) -> Term:
    """Take the median over ranks.

    Args:
        terms: The same one of each rank.
    """
    values = [term.measured for term in terms if term.measured is not None]
    first = terms[0]
    if not values:
        return first
    return Term(first.name, first.unit, first.planned, median(values), min(values), max(values))


def _term(name: str, unit: Unit, planned: float, measured: float | None, reason: str = "") -> Term:
    return Term(name, unit, planned, measured, reason="" if measured is not None else reason)


def saved_bytes(plan: StagePlan, rank: MeasuredRank) -> float:
    """Get the bytes of one micro-batch: of its saves, or of all in flight when most of them were.

    Args:
        plan: How many are in flight.
        rank: Of the run.
    """
    if rank.saves is not None:
        return float(sum(save.nbytes for save in rank.saves))
    return rank.saved_bytes / plan.in_flight


def terms_of(planned: Projection, plan: StagePlan, rank: MeasuredRank) -> list[Term]:
    """Compare one rank with its stage.

    Args:
        planned: The plan.
        plan: Of the stage.
        rank: Of the run.
    """
    cluster, step = planned.cluster, planned.step
    count = cluster.batch.micro_batches
    saved, kept_all = saved_bytes(plan, rank), plan.saved_bytes * plan.in_flight
    offloaded = max(0.0, 1 - rank.kept_bytes / (saved * count)) if saved else None
    terms = [
        _term("saved in a micro-batch", "bytes", plan.saved_bytes, saved),
        _term("saved at the highest, all in flight", "bytes", kept_all, rank.saved_bytes),
        _term(
            "live at the highest, offloading",
            "bytes",
            min(resident_bytes(plan.stage, cluster), kept_all),
            rank.peak_bytes,
        ),
        _term("share chosen to be offloaded", "share", plan.offloaded_bytes / plan.saved_bytes, offloaded),
        _term("stored on drives in a step", "bytes", plan.offloaded_bytes * count, rank.stored_bytes),
        _term("copied to host memory in a step", "bytes", 0, rank.host_bytes),
        _term("handed back from memory in a step", "bytes", 0, rank.forwarded_bytes),
        _term("loaded in a step", "bytes", plan.offloaded_bytes * count, rank.loaded_bytes),
        *_times(plan, rank, count),
        _term("stalls in a step", "seconds", 0, rank.stall_seconds),
    ]
    if cluster.parallel.pp > 1:
        # The slowest stage waits for the bubble alone, a faster one also for it.
        idle = step.compute_seconds + step.bubble_seconds - count * plan.time.seconds
        reason = "the host's schedule has recorded no instructions" if rank.num_traced_steps else UNTRACED
        terms.append(_term("waits for other stages in a step", "seconds", idle, rank.waiting_seconds, reason))
    drives, drive = cluster.drives_per_gpu, cluster.drive
    reason = NOTHING_MOVED if rank.num_traced_steps else UNTRACED
    terms += [
        _term(
            "write reached",
            "bytes_per_second",
            drives * drive.write_bytes_per_second,
            rank.write_bytes_per_second,
            reason,
        ),
        _term(
            "read reached", "bytes_per_second", drives * drive.read_bytes_per_second, rank.read_bytes_per_second, reason
        ),
    ]
    seconds = None if rank.is_behind_host else rank.forward_seconds + rank.backward_seconds
    for name, life, length, why in (
        ("life of the drives, without a pause", plan.busy_life, seconds, _behind(rank)),
        ("life of the drives, in a step's time", plan.life, rank.step_seconds, UNTRACED),
    ):
        years = drive_life(cluster, rank.stored_bytes, length).rated_years if length else None
        terms.append(_term(name, "years", life.rated_years, years, why))
    return terms


def _times(plan: StagePlan, rank: MeasuredRank, count: int) -> list[Term]:
    """Compare what rests on the host's times of passes."""
    forward, backward = rank.forward_seconds, rank.backward_seconds
    needed: list[float | None] = [forward / count, backward / count, None, None]
    if forward + backward:
        needed[2] = rank.stored_bytes / ((forward + backward) / 2)
    if backward:
        needed[3] = rank.loaded_bytes / backward
    if rank.is_behind_host:
        needed = [None] * 4
    time, need, reason = plan.time, plan.need, _behind(rank)
    return [
        _term("forward of a micro-batch", "seconds", time.forward_seconds, needed[0], reason),
        _term("backward of a micro-batch", "seconds", time.backward_seconds, needed[1], reason),
        _term("write needed", "bytes_per_second", need.write_bytes_per_second, needed[2], reason),
        _term("read needed", "bytes_per_second", need.read_bytes_per_second, needed[3], reason),
    ]


def _behind(rank: MeasuredRank) -> str:
    return f"it is the host's time, and on {rank.device} kernels run behind it" if rank.is_behind_host else "it is 0"


def step_term(planned: Projection, rank: MeasuredRank) -> Term:
    """Compare the length of a step.

    Args:
        planned: The plan.
        rank: Of the run.
    """
    return _term("step", "seconds", planned.step.seconds, rank.step_seconds, UNTRACED)
