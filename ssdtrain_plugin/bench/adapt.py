"""``ssdtrain bench adapt``: what each policy makes of drives from far too slow to more than fast enough.

One model is trained in turns by every policy at every speed, beside the run that keeps
everything and beside recomputation. Speeds are multiples of what full offload needs:
all that a step saves, written in the time of its forward. The lower bound on the peak
is computed from the same step's profile (:mod:`ssdtrain_plugin.planner.bound`).
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from ssdtrain_plugin.bench.comparison import StrategySummary, summarize
from ssdtrain_plugin.bench.harness import StepResult, Strategy, run_interleaved
from ssdtrain_plugin.bench.models import DecoderShape, recompute_layer
from ssdtrain_plugin.bench.step import DecoderWorkload, only_warnings
from ssdtrain_plugin.planner.bound import least_peak
from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.timeline import Profile
from ssdtrain_plugin.policy.base import Observation
from ssdtrain_plugin.policy.fixed import FractionPolicy
from ssdtrain_plugin.policy.measured import schedule_of
from ssdtrain_plugin.profile import StepProfile
from ssdtrain_plugin.runtime import Offloader, Parts, attach_with
from ssdtrain_plugin.storage.base import Tier
from ssdtrain_plugin.storage.throttled import ThrottledTier
from ssdtrain_plugin.units import MIB, format_bytes, format_rate, format_seconds

__all__ = ["FACTORS", "AdaptBench", "AdaptSettings", "Cell", "measure", "plot", "table_of"]

FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Speeds of the drive, as multiples of what full offload needs."""

_NONE = "none"
_RECOMPUTE = "recompute"
_POLICIES = ("all", "fraction", "adaptive")
_CALIBRATION_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptSettings:
    """What to measure.

    Attributes:
        path: A directory on the drive.
        shape: Of the decoder and its micro-batch.
        factors: Speeds, as multiples of what full offload needs.
        rounds: Rounds that count.
        warm_up_rounds: Rounds before them, in which the adaptive policy learns.
        threads: Compute threads.
    """

    path: str
    shape: DecoderShape = field(default_factory=lambda: DecoderShape(hidden=256, microbatch=2, sequence=512))
    factors: tuple[float, ...] = FACTORS
    rounds: int = 5
    warm_up_rounds: int = 5
    threads: int = 1

    @property
    def num_steps(self) -> int:
        """Steps in all, for a progress display."""
        strategies = 2 + len(_POLICIES) * len(self.factors)
        return _CALIBRATION_ROUNDS + strategies * (self.rounds + self.warm_up_rounds)


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one speed.

    Attributes:
        policy: Its name; ``none`` and ``recompute`` have no speed.
        factor: Speed of the drive over what full offload needs, or None.
        bytes_per_second: Of the drive in each direction, or None.
        bound_ratio: Lower bound on the peak without stall over the peak of ``none``, or None.
        summary: Over the rounds that count, as ratios to ``none``.
    """

    policy: str
    factor: float | None
    bytes_per_second: float | None
    bound_ratio: float | None
    summary: StrategySummary


@dataclass(frozen=True, slots=True)
class AdaptBench:
    """The report.

    Attributes:
        settings: What was measured.
        torch_version: Of torch.
        processor: As the system names the machine's architecture.
        saved_bytes: Of a step.
        forward_seconds: Of a step, measured before the run.
        backward_seconds: Of a step, measured before the run.
        full_bytes_per_second: What full offload needs: the factor 1.
        cells: One a policy and speed.
    """

    settings: AdaptSettings
    torch_version: str
    processor: str
    saved_bytes: int
    forward_seconds: float
    backward_seconds: float
    full_bytes_per_second: float
    cells: tuple[Cell, ...]


class _Watcher(FractionPolicy):
    """Keeps everything and remembers the profile of each step."""

    is_learning = True

    def __init__(self) -> None:
        super().__init__(0.0)
        self.profiles: list[StepProfile] = []

    def observe(self, observation: Observation) -> None:
        if observation.profile is not None:
            self.profiles.append(observation.profile)


def measure(settings: AdaptSettings, *, on_step: Callable[[str], None] | None = None) -> AdaptBench:
    """Calibrate, then run every policy at every speed in turns.

    Args:
        settings: What to measure.
        on_step: Called after each step with the name of its strategy.

    Raises:
        ConfigError: The directory cannot be used.
        EnvironmentUnsupportedError: scipy is not installed.
    """
    tell = None if on_step is None else lambda result: on_step(result.strategy)
    threads_before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads_before)
        torch.set_num_threads(settings.threads)
        stack.enter_context(only_warnings())
        workload = DecoderWorkload(settings.shape, microbatches=1, device=torch.device("cpu"))
        profile = _calibrate(workload, tell)
        forward_seconds = profile.microbatches[0].forward_end - profile.microbatches[0].forward_begin
        saved_bytes = profile.microbatches[0].nbytes
        full_rate = saved_bytes / forward_seconds
        strategies = _strategies(settings, full_rate)
        rounds = settings.warm_up_rounds + settings.rounds
        results = run_interleaved([each for each, _, _ in strategies], workload, rounds=rounds, on_step=tell)
    summaries = summarize(results, baseline=_NONE, counter=None, warm_up_rounds=settings.warm_up_rounds)
    by_name = {summary.strategy: summary for summary in summaries}
    bounds = {factor: _bound_ratio(profile, factor * full_rate) for factor in settings.factors}
    return AdaptBench(
        settings=settings,
        torch_version=torch.__version__,
        processor=platform.machine(),
        saved_bytes=saved_bytes,
        forward_seconds=forward_seconds,
        backward_seconds=profile.microbatches[0].backward_end - profile.microbatches[0].backward_begin,
        full_bytes_per_second=full_rate,
        cells=tuple(
            Cell(
                policy=policy,
                factor=factor,
                bytes_per_second=None if factor is None else factor * full_rate,
                bound_ratio=None if factor is None else bounds[factor],
                summary=by_name[strategy.name],
            )
            for strategy, policy, factor in strategies
        ),
    )


def _calibrate(workload: DecoderWorkload, tell: Callable[[StepResult], None] | None) -> StepProfile:
    """Measure when a step saves and needs what; of some steps, the one in the middle."""
    watcher = _Watcher()
    strategy = Strategy("calibration", attach=partial(_attach, {"policy": "none"}, Parts(policy=watcher)))
    run_interleaved([strategy], workload, rounds=_CALIBRATION_ROUNDS, on_step=tell)
    profiles = sorted(watcher.profiles[1:], key=lambda profile: profile.seconds)
    return profiles[len(profiles) // 2]


def _strategies(settings: AdaptSettings, full_rate: float) -> list[tuple[Strategy, str, float | None]]:
    strategies: list[tuple[Strategy, str, float | None]] = [
        (Strategy(_NONE, attach=partial(_attach, {"policy": "none"}, None)), _NONE, None),
        (
            Strategy(_RECOMPUTE, attach=partial(_attach, {"policy": "none"}, None), run_layer=recompute_layer),
            _RECOMPUTE,
            None,
        ),
    ]
    for factor in settings.factors:
        for policy in _POLICIES:
            options = {"paths": settings.path, "policy": policy, "max_inflight_bytes": 64 * MIB}
            options |= {"offload_fraction": 0.5} if policy == "fraction" else {}
            options |= {} if policy == "adaptive" else {"prefetch_bytes": 64 * MIB}
            parts = Parts(wrap_drive=partial(_throttle, factor * full_rate))
            strategy = Strategy(f"{policy} at {factor:g}x", attach=partial(_attach, options, parts))
            strategies.append((strategy, policy, factor))
    return strategies


def _throttle(rate: float, tier: Tier) -> Tier:
    return ThrottledTier(tier, write_bytes_per_second=rate, read_bytes_per_second=rate)


def _attach(options: dict[str, object], parts: Parts | None, door: nn.Module) -> Offloader:
    return attach_with(door, options, parts)


def _bound_ratio(profile: StepProfile, rate: float) -> float | None:
    schedule = schedule_of(profile, lookahead_events=0)
    if schedule is None:
        return None
    total_bytes = sum(each.total_bytes for each in schedule.profiles)
    machine = Machine(write_bytes_per_second=rate, read_bytes_per_second=rate)
    movable = replace(schedule, profiles=tuple(_movable(each) for each in schedule.profiles))
    return least_peak(movable, machine) / total_bytes


def _movable(profile: Profile) -> Profile:
    """Leave out what is always kept; without it the bound is lower, and still a bound."""
    return replace(profile, saves=tuple(save for save in profile.saves if save.is_movable))


# --- what is shown


def table_of(report: AdaptBench) -> Table:
    """Set out the report, a row a policy and speed.

    Args:
        report: Of :func:`measure`.
    """
    table = Table(
        title=f"medians of {report.settings.rounds} interleaved rounds; "
        f"a step saves {format_bytes(report.saved_bytes)}, "
        f"1x is {format_rate(report.full_bytes_per_second)}"
    )
    names = (
        "drive",
        "policy",
        "step, x of none",
        "quartiles",
        "peak, x of none",
        "bound",
        "stored",
        "loaded",
        "waited",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for cell in report.cells:
        summary = cell.summary
        table.add_row(
            "" if cell.factor is None else f"{cell.factor:g}x",
            cell.policy,
            f"{summary.median_of_ratios:.3f}",
            f"{summary.first_quartile_of_ratios:.3f} - {summary.third_quartile_of_ratios:.3f}",
            "-" if summary.peak_ratio is None else f"{summary.peak_ratio:.2f}",
            "" if cell.bound_ratio is None else f"{cell.bound_ratio:.2f}",
            format_bytes(summary.stored_bytes),
            format_bytes(summary.loaded_bytes),
            format_seconds(summary.stall_seconds),
        )
    return table


def plot(report: AdaptBench, path: Path) -> None:
    """Draw step time and peak over the speed of the drive, with the lower bound.

    Args:
        report: Of :func:`measure`.
        path: Of the picture; its suffix is the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    times, peaks = figure.subplots(1, 2)
    # Of the palette of Okabe and Ito, which colour-blind people can tell apart; with markers besides.
    styles: Sequence[tuple[str, str, str]] = (
        ("all", "#D55E00", "s"),
        ("fraction", "#009E73", "^"),
        ("adaptive", "#0072B2", "o"),
    )
    for policy, colour, marker in styles:
        cells = [cell for cell in report.cells if cell.policy == policy]
        factors = [cell.factor for cell in cells]
        label = "fraction 0.5" if policy == "fraction" else policy
        times.plot(factors, [cell.summary.median_of_ratios for cell in cells], color=colour, marker=marker, label=label)
        peaks.plot(factors, [cell.summary.peak_ratio for cell in cells], color=colour, marker=marker, label=label)
    bounds = [(cell.factor, cell.bound_ratio) for cell in report.cells if cell.policy == "adaptive"]
    peaks.plot(*zip(*bounds, strict=True), color="black", linestyle="--", label="lower bound, no stall")
    recompute = next(cell.summary for cell in report.cells if cell.policy == _RECOMPUTE)
    for axes, value, title in (
        (times, recompute.median_of_ratios, "step time, x of keeping everything"),
        (peaks, recompute.peak_ratio, "peak of live activations, x of keeping everything"),
    ):
        if value is not None:
            axes.axhline(value, color="#CC79A7", linestyle=":", label="recompute (what it recomputes is not counted)")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(list(report.settings.factors), [f"{factor:g}x" for factor in report.settings.factors])
        axes.minorticks_off()
        axes.set_xlabel("drive's bandwidth over what full offload needs")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    times.set_yscale("log")
    times.set_yticks([1, 1.5, 2, 4, 8], ["1", "1.5", "2", "4", "8"])
    peaks.set_ylim(0, 1.1)
    figure.savefig(path, dpi=120)
