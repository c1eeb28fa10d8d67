"""Sentences about what was done: the after-warm-up line and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.units import format_bytes, format_seconds

__all__ = ["RunTotals", "after_warm_up", "metrics_of", "step_line"]


def after_warm_up(stats: StepStats) -> tuple[str, bool]:
    """Say once what one step moved, saved and cost.

    Args:
        stats: A step after the first.

    Returns:
        The line, and whether anything moved.
    """
    moved_bytes = stats.stored_bytes + stats.host_bytes
    head = f"ssdtrain: rank {stats.rank}, step {stats.step}"
    if not moved_bytes:
        reason = _why_nothing(stats)
        return f"{head}: nothing was moved, because {reason} ({stats.plan})", False
    return (
        f"{head}: moved {format_bytes(moved_bytes)} out and {format_bytes(stats.loaded_bytes)} back, "
        f"forwarded {format_bytes(stats.forwarded_bytes)}; live activations peak at "
        f"{format_bytes(stats.peak_activation_bytes)} instead of {format_bytes(stats.saved_bytes)}{_percent(stats)}; "
        f"training waited {format_seconds(stats.stall_seconds)}, "
        f"{stats.num_loads_on_demand} loads on demand{_failures(stats.failures)}"
    ), True


def metrics_of(stats: StepStats) -> dict[str, float]:
    """Choose what people who watch a run want to see, under the names that it has in TensorBoard and its like.

    Args:
        stats: Of a step.
    """
    names = (
        "peak_activation_bytes",
        "saved_bytes",
        "stored_bytes",
        "host_bytes",
        "loaded_bytes",
        "stall_seconds",
        "num_loads_on_demand",
    )
    return {f"Train/ssdtrain/{name}": getattr(stats, name) for name in names}


def step_line(stats: StepStats) -> str:
    """Say in one line what a step moved and cost.

    Args:
        stats: Of the step.
    """
    return (
        f"step {stats.step}: activations peak {format_bytes(stats.peak_activation_bytes)} instead of "
        f"{format_bytes(stats.saved_bytes)}; stored {format_bytes(stats.stored_bytes)}, "
        f"to host memory {format_bytes(stats.host_bytes)}, loaded {format_bytes(stats.loaded_bytes)}; "
        f"waited {format_seconds(stats.stall_seconds)}, {stats.num_loads_on_demand} loads on demand"
    )


def _percent(stats: StepStats) -> str:
    if not stats.saved_bytes:
        return ""
    return f" ({100 * (stats.peak_activation_bytes / stats.saved_bytes - 1):+.0f} %)"


def _failures(failures: dict[str, int]) -> str:
    if not failures:
        return ""
    return "; failures: " + ", ".join(f"{count} x {cause}" for cause, count in failures.items())


def _why_nothing(stats: StepStats) -> str:
    if not stats.microbatches:
        return "no forward of the attached model ran with gradients"
    if stats.failures:
        return "no store was made" + _failures(stats.failures)
    if not stats.saved_bytes and stats.kept_bytes:
        kept = format_bytes(stats.kept_bytes)
        return f"the {kept} saved are tensor subclasses, or not on the device that the model was on"
    if not stats.saved_bytes:
        return "autograd saved nothing but weights"
    if stats.forwarded_bytes:
        return "backward asked for everything before its store began"
    return f"no saved tensor was offloaded; {format_bytes(stats.kept_bytes)} were kept, by the policy or as too small"


class RunTotals:
    """Sums over the steps of a run; its size does not grow with them.

    Args:
        rank: Global rank of the process.

    Attributes:
        num_steps: Steps added.
    """

    _SUMMED = (
        "microbatches",
        "stored_bytes",
        "loaded_bytes",
        "forwarded_bytes",
        "deduplicated_bytes",
        "kept_bytes",
        "host_bytes",
        "num_loads_on_demand",
        "stall_seconds",
    )

    def __init__(self, rank: int) -> None:
        """Start before the first step."""
        self.num_steps = 0
        self._rank = rank
        self._sums: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._peak_bytes = 0
        self._saved_bytes = 0
        self._plan = ""

    def add(self, step: StepStats) -> None:
        """Add a finished step.

        Args:
            step: Its numbers.
        """
        self.num_steps += 1
        for name in self._SUMMED:
            self._sums[name] += getattr(step, name)
        self._failures.update(step.failures)
        self._peak_bytes = max(self._peak_bytes, step.peak_activation_bytes)
        self._saved_bytes = max(self._saved_bytes, step.saved_bytes)
        self._plan = step.plan

    def report(self, tiers: Sequence[str]) -> str:
        """Sum up in some lines.

        Args:
            tiers: One line each.
        """
        if not self.num_steps:
            return (
                f"ssdtrain: rank {self._rank}: no step has ended yet\n\n"
                "hint: run a forward and a backward of the attached model, and let go of the loss"
            )
        amounts = {name: format_bytes(self._sums[name]) for name in self._SUMMED if name.endswith("_bytes")}
        share = f" ({100 * (self._peak_bytes / self._saved_bytes - 1):+.0f} %)" if self._saved_bytes else ""
        lines = [
            f"ssdtrain: rank {self._rank}, {self.num_steps} steps, {self._sums['microbatches']} micro-batches",
            f"  plan        {self._plan}",
            *(f"  tier        {line}" for line in tiers),
            f"  activations peak {format_bytes(self._peak_bytes)} instead of {format_bytes(self._saved_bytes)}{share}",
            f"  moved       {amounts['stored_bytes']} to the drive, {amounts['host_bytes']} to host memory, "
            f"{amounts['loaded_bytes']} back",
            f"  not moved   {amounts['forwarded_bytes']} forwarded, {amounts['deduplicated_bytes']} deduplicated, "
            f"{amounts['kept_bytes']} kept",
            f"  cost        {format_seconds(self._sums['stall_seconds'] / self.num_steps)} waiting a step (mean), "
            f"{self._sums['num_loads_on_demand']} loads on demand in all",
        ]
        if self._failures:
            causes = ", ".join(f"{count} x {cause}" for cause, count in self._failures.items())
            lines.append(f"  failures    {causes}")
        return "\n".join(lines)
