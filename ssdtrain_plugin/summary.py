"""Sentences about what was done: the after-warm-up line and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.units import format_bytes, format_seconds

__all__ = ["after_warm_up", "report"]


def after_warm_up(stats: StepStats) -> tuple[str, bool]:
    """Say once what one step moved, saved and cost.

    Args:
        stats: A step after the first.

    Returns:
        The line, and whether it is a warning: nothing moved although something was asked for.
    """
    moved_bytes = stats.stored_bytes + stats.host_bytes
    head = f"ssdtrain: rank {stats.rank}, step {stats.step}"
    if not moved_bytes:
        reason = _why_nothing(stats)
        return f"{head}: nothing was moved, because {reason} ({stats.plan})", not stats.plan.startswith("keep")
    return (
        f"{head}: moved {format_bytes(moved_bytes)} out and {format_bytes(stats.loaded_bytes)} back, "
        f"forwarded {format_bytes(stats.forwarded_bytes)}; live activations peak at "
        f"{format_bytes(stats.peak_activation_bytes)} instead of {format_bytes(stats.saved_bytes)}{_percent(stats)}; "
        f"training waited {format_seconds(stats.stall_seconds)}, "
        f"{stats.num_loads_on_demand} loads on demand{_failures(stats.failures)}"
    ), False


def _percent(stats: StepStats) -> str:
    if not stats.saved_bytes:
        return ""
    return f" ({100 * (stats.peak_activation_bytes / stats.saved_bytes - 1):+.0f} %)"


def _failures(failures: dict[str, int]) -> str:
    if not failures:
        return ""
    return "; failed stores: " + ", ".join(f"{count} x {cause}" for cause, count in failures.items())


def _why_nothing(stats: StepStats) -> str:
    if not stats.microbatches:
        return "no forward of the attached model ran with gradients"
    if stats.failures:
        return "every store failed" + _failures(stats.failures)
    if not stats.saved_bytes:
        return "autograd saved nothing but weights"
    if stats.forwarded_bytes:
        return "backward asked for everything before its store began"
    return f"no saved tensor was offloaded; {format_bytes(stats.kept_bytes)} were kept (see `min_tensor_bytes`)"


def report(steps: Sequence[StepStats], rank: int, tiers: Sequence[str]) -> str:
    """Sum up all steps so far.

    Args:
        steps: In order.
        rank: Global rank of the process.
        tiers: One line each.
    """
    if not steps:
        return f"ssdtrain: rank {rank}: no step has ended yet"

    def total(name: str) -> str:
        return format_bytes(sum(getattr(step, name) for step in steps))

    failures: Counter[str] = Counter()
    for step in steps:
        failures.update(step.failures)
    peak = max(step.peak_activation_bytes for step in steps)
    saved = max(step.saved_bytes for step in steps)
    share = f" ({100 * (peak / saved - 1):+.0f} %)" if saved else ""
    lines = [
        f"ssdtrain: rank {rank}, {len(steps)} steps, {sum(step.microbatches for step in steps)} micro-batches",
        f"  plan        {steps[-1].plan}",
        *(f"  tier        {line}" for line in tiers),
        f"  activations peak {format_bytes(peak)} instead of {format_bytes(saved)}{share}",
        f"  moved       {total('stored_bytes')} to the drive, {total('host_bytes')} to host memory, "
        f"{total('loaded_bytes')} back",
        f"  not moved   {total('forwarded_bytes')} forwarded, {total('deduplicated_bytes')} deduplicated, "
        f"{total('kept_bytes')} kept",
        f"  cost        {format_seconds(median(step.stall_seconds for step in steps))} waiting a step (median), "
        f"{sum(step.num_loads_on_demand for step in steps)} loads on demand in all",
    ]
    if failures:
        lines.append("  failures    " + ", ".join(f"{count} x {cause}" for cause, count in failures.items()))
    return "\n".join(lines)
