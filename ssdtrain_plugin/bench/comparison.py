"""What the steps of an interleaved run say about strategies: medians, ratios to one of them, and equal bits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ssdtrain_plugin.bench.harness import StepResult

__all__ = ["StrategySummary", "summarize"]

_TICK_SECONDS = 1e-6  # of a tiny step the system may say that it took no time


@dataclass(frozen=True, slots=True)
class StrategySummary:
    """One strategy over the rounds that count; medians unless something else is said.

    Attributes:
        strategy: Its name.
        rounds: How many count.
        seconds: Of a step.
        lowest_seconds: Of a step.
        highest_seconds: Of a step.
        ratio_of_medians: ``seconds`` over the baseline's.
        median_of_ratios: Of the ratios to the baseline's step of the same round: what both
            suffer from the machine falls out.
        first_quartile_of_ratios: Of the same ratios.
        third_quartile_of_ratios: Of the same ratios.
        cpu_ratio: As ``median_of_ratios``, of CPU time, user and system together: steadier than
            wall time where others use the machine too.
        user_seconds: CPU time a step outside of the kernel.
        system_seconds: CPU time a step in the kernel.
        page_faults: A step.
        peak_activation_bytes: By the plugin's own account, the highest; None if nobody counts.
        peak_ratio: ``peak_activation_bytes`` over the baseline's, or None.
        stored_bytes: A step.
        loaded_bytes: A step.
        forwarded_bytes: A step.
        kept_bytes: A step.
        num_loads_on_demand: A step.
        stall_seconds: A step.
        num_failures: Of all kinds, over all rounds that count.
        is_equal: Losses and gradients are the baseline's in every round, the first ones too, to the last bit.
        plan: The policy's last word; empty without a plugin.
    """

    strategy: str
    rounds: int
    seconds: float
    lowest_seconds: float
    highest_seconds: float
    ratio_of_medians: float
    median_of_ratios: float
    first_quartile_of_ratios: float
    third_quartile_of_ratios: float
    cpu_ratio: float
    user_seconds: float
    system_seconds: float
    page_faults: float
    peak_activation_bytes: int | None
    peak_ratio: float | None
    stored_bytes: float
    loaded_bytes: float
    forwarded_bytes: float
    kept_bytes: float
    num_loads_on_demand: float
    stall_seconds: float
    num_failures: int
    is_equal: bool
    plan: str


def summarize(
    results: Sequence[StepResult], *, baseline: str, counter: str | None, warm_up_rounds: int
) -> list[StrategySummary]:
    """Compare every strategy with one of them.

    Args:
        results: Of :func:`ssdtrain_plugin.bench.harness.run_interleaved`.
        baseline: Name of a strategy that ran.
        counter: Name of the one that trains as the baseline and counts what is alive, for a
            baseline without the plugin; None if there is none.
        warm_up_rounds: The first rounds, of which only the bits count.

    Returns:
        One entry a strategy, in the order of the first round.

    Raises:
        ValueError: No round of the baseline is left.
    """
    base = {result.round_number: result for result in results if result.strategy == baseline}
    if not any(number >= warm_up_rounds for number in base):
        raise ValueError(f"no round of `{baseline}` after {warm_up_rounds} to warm up (expected at least one)")
    steps: dict[str, list[StepResult]] = {}
    for result in results:
        steps.setdefault(result.strategy, []).append(result)
    peaks = {
        name: _peak([step for step in taken if step.round_number >= warm_up_rounds]) for name, taken in steps.items()
    }
    if peaks[baseline] is None and counter is not None:
        peaks[baseline] = peaks[counter]
    return [_summarize_one(taken, base, warm_up_rounds, peaks[name], peaks[baseline]) for name, taken in steps.items()]


def _peak(counted: Sequence[StepResult]) -> int | None:
    return max((step.stats.peak_activation_bytes for step in counted if step.stats is not None), default=None)


def _cpu_seconds(step: StepResult) -> float:
    return step.user_seconds + step.system_seconds


def _summarize_one(
    taken: Sequence[StepResult],
    base: dict[int, StepResult],
    warm_up_rounds: int,
    peak_bytes: int | None,
    base_peak_bytes: int | None,
) -> StrategySummary:
    counted = [step for step in taken if step.round_number >= warm_up_rounds]
    seconds = [step.seconds for step in counted]
    base_seconds = [step.seconds for number, step in base.items() if number >= warm_up_rounds]
    ratios = [step.seconds / base[step.round_number].seconds for step in counted]
    cpu_ratios = [_cpu_seconds(step) / max(_cpu_seconds(base[step.round_number]), _TICK_SECONDS) for step in counted]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    stats = [step.stats for step in counted if step.stats is not None]

    def median_of(field: str) -> float:
        return statistics.median(getattr(step, field) for step in stats) if stats else 0.0

    return StrategySummary(
        strategy=taken[0].strategy,
        rounds=len(counted),
        seconds=statistics.median(seconds),
        lowest_seconds=min(seconds),
        highest_seconds=max(seconds),
        ratio_of_medians=statistics.median(seconds) / statistics.median(base_seconds),
        median_of_ratios=middle,
        first_quartile_of_ratios=low,
        third_quartile_of_ratios=high,
        cpu_ratio=statistics.median(cpu_ratios),
        user_seconds=statistics.median(step.user_seconds for step in counted),
        system_seconds=statistics.median(step.system_seconds for step in counted),
        page_faults=statistics.median(step.page_faults for step in counted),
        peak_activation_bytes=peak_bytes,
        peak_ratio=peak_bytes / base_peak_bytes if peak_bytes is not None and base_peak_bytes else None,
        stored_bytes=median_of("stored_bytes"),
        loaded_bytes=median_of("loaded_bytes"),
        forwarded_bytes=median_of("forwarded_bytes"),
        kept_bytes=median_of("kept_bytes"),
        num_loads_on_demand=median_of("num_loads_on_demand"),
        stall_seconds=median_of("stall_seconds"),
        num_failures=sum(sum(step.failures.values()) for step in stats),
        is_equal=all(step.digest == base[step.round_number].digest for step in taken),
        plan=stats[-1].plan if stats else "",
    )
