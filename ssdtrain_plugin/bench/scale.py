"""``ssdtrain bench scale``: what a saved tensor costs when there are many of them, and many ranks.

First chains of tiny operators, with 100 to 100,000 live records, without I/O: bookkeeping whose
cost grew with what is alive would show. Then 1, 2, 4 and more processes that offload to one drive.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ssdtrain_plugin.bench.hooks import IDENTITY, Variant, open_variants
from ssdtrain_plugin.bench.ranks import RankPass, RankTask, run_ranks
from ssdtrain_plugin.bench.rok_report import need_matplotlib
from ssdtrain_plugin.units import format_bytes, format_rate

__all__ = [
    "DEFAULT_RECORDS",
    "RankCost",
    "RecordCost",
    "ScaleBench",
    "ScaleSettings",
    "measure",
    "plot",
    "remarks",
    "tables_of",
]

DEFAULT_RECORDS = (100, 1_000, 10_000, 100_000)
"""Live records of the passes."""

_LEAST_TENSORS = 2_000  # of a measurement: a short chain runs several times
_FLAT = 1.25  # times the lowest cost
_STYLES = (("black", "o"), ("#999999", "s"), ("#009E73", "^"), ("#0072B2", "v"), ("#D55E00", "D"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSettings:
    """What to measure.

    Attributes:
        path: A directory on the drive.
        records: Live records, in growing order.
        ranks: Processes at once, at most.
        rounds: Passes that count.
        tensors: That each rank saves in a pass.
        tensor_bytes: Of each of them.
    """

    path: str
    records: tuple[int, ...] = DEFAULT_RECORDS
    ranks: int = 4
    rounds: int = 3
    tensors: int = 128
    tensor_bytes: int = 1 << 20

    @property
    def rank_counts(self) -> tuple[int, ...]:
        """1, 2, 4 and so on, and the highest."""
        counts = [1]
        while 2 * counts[-1] < self.ranks:
            counts.append(2 * counts[-1])
        return tuple(dict.fromkeys((*counts, self.ranks)))

    @property
    def num_steps(self) -> int:
        """Rounds in all, for a progress display."""
        return (self.rounds + 1) * (len(self.records) + len(self.rank_counts))


@dataclass(frozen=True, slots=True)
class RecordCost:
    """One variant of ``bench hooks`` with so many live records.

    Attributes:
        variant: What was done with each saved tensor.
        records: Live at the end of forward.
        microseconds: Of forward plus backward, per saved tensor, median.
        over_identity_microseconds: The same, less that of hooks that do nothing.
        uncollected_microseconds: As ``microseconds``, with Python's garbage collector off, which
            else visits live objects again and again; None but for the most records.
    """

    variant: str
    records: int
    microseconds: float
    over_identity_microseconds: float
    uncollected_microseconds: float | None


@dataclass(frozen=True, slots=True)
class RankCost:
    """So many ranks on one drive; medians over ranks and passes, per saved tensor.

    Attributes:
        ranks: Processes.
        kept_microseconds: Wall time without the plugin.
        offloaded_microseconds: Wall time with everything offloaded.
        cpu_microseconds: CPU time that offloading adds, all threads of a rank.
        stall_microseconds: That training waited for transfers.
        bytes_per_second: Stored and loaded by all ranks together, over the wall time of a pass.
    """

    ranks: int
    kept_microseconds: float
    offloaded_microseconds: float
    cpu_microseconds: float
    stall_microseconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class ScaleBench:
    """The report.

    Attributes:
        settings: What was measured.
        cores: That this process may use.
        records: One a variant and number of records.
        ranks: One a number of ranks.
    """

    settings: ScaleSettings
    cores: int
    records: tuple[RecordCost, ...]
    ranks: tuple[RankCost, ...]


def measure(settings: ScaleSettings, *, on_step: Callable[[str], None] | None = None) -> ScaleBench:
    """Measure both.

    Args:
        settings: What to measure.
        on_step: Called after each round with what it was.

    Raises:
        EnvironmentUnsupportedError: A rank failed, for example since the directory cannot be used.
    """
    tell = on_step or (lambda text: None)
    return ScaleBench(
        settings=settings,
        cores=len(os.sched_getaffinity(0)),
        records=tuple(_measure_records(settings, tell)),
        ranks=tuple(_measure_ranks(settings, count, tell) for count in settings.rank_counts),
    )


def _measure_records(settings: ScaleSettings, tell: Callable[[str], None]) -> list[RecordCost]:
    most = settings.records[-1]
    with open_variants() as variants:
        costs: dict[tuple[str, int], list[float]] = {(name, n): [] for name in variants for n in settings.records}
        uncollected: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in range(settings.rounds + 1):
            for records in settings.records:
                for name, variant in variants.items():
                    cost = _cost(variant, records)
                    with _no_collections():
                        without = _cost(variant, records) if records == most else 0.0
                    if round_number:  # the first round warms caches and starts threads
                        costs[name, records].append(cost)
                        uncollected[name].extend([without] if records == most else [])
                tell(f"{records} live records")
    medians = {key: statistics.median(found) for key, found in costs.items()}
    return [
        RecordCost(
            name,
            records,
            median,
            median - medians[IDENTITY, records],
            statistics.median(uncollected[name]) if records == most else None,
        )
        for (name, records), median in medians.items()
    ]


def _cost(variant: Variant, records: int) -> float:
    """Measure microseconds per saved tensor."""
    seconds = []
    for _ in range(max(1, _LEAST_TENSORS // records)):
        seconds.append(variant.run(records))
        variant.end_step()
    return 1e6 * statistics.mean(seconds) / records


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _measure_ranks(settings: ScaleSettings, count: int, tell: Callable[[str], None]) -> RankCost:
    task = RankTask(settings.path, settings.tensors, settings.tensor_bytes, settings.rounds + 1)
    passes = run_ranks(count, task, on_pass=lambda: tell(f"{count} ranks"))
    counted = [each for each in passes if each.number]  # the first pays for the extent file
    kept = [each for each in counted if not each.is_offloaded]
    offloaded = [each for each in counted if each.is_offloaded]

    def microseconds(some: Sequence[RankPass], field: str) -> float:
        values: list[float] = [getattr(each, field) for each in some]
        return 1e6 * statistics.median(values) / settings.tensors

    together = [[each for each in offloaded if each.number == number] for number in range(1, task.passes)]
    return RankCost(
        ranks=count,
        kept_microseconds=microseconds(kept, "seconds"),
        offloaded_microseconds=microseconds(offloaded, "seconds"),
        cpu_microseconds=microseconds(offloaded, "cpu_seconds") - microseconds(kept, "cpu_seconds"),
        stall_microseconds=microseconds(offloaded, "stall_seconds"),
        bytes_per_second=statistics.median(
            sum(each.moved_bytes for each in some) / max(each.seconds for each in some) for some in together
        ),
    )


# --- what is shown


def remarks(report: ScaleBench) -> list[str]:
    """Say of each cost whether it is flat, and else what grows with it.

    Args:
        report: Of :func:`measure`.
    """
    lines = []
    for name in dict.fromkeys(cost.variant for cost in report.records):
        costs = [cost for cost in report.records if cost.variant == name]
        growth, most = _growth([cost.microseconds for cost in costs]), costs[-1]
        line = f"{name}: the dearest number of records costs {growth:.2f} x the cheapest a tensor"
        if growth <= _FLAT:
            line += ": flat"
        elif most.uncollected_microseconds is not None:
            line += (
                f"; of {most.microseconds:.1f} us with {most.records:,} the garbage collector's visits take "
                f"{most.microseconds - most.uncollected_microseconds:.1f} us"
            )
        lines.append(line)
    cpu = [cost.cpu_microseconds for cost in report.ranks]
    wall = _growth([cost.offloaded_microseconds for cost in report.ranks])
    kept = _growth([cost.kept_microseconds for cost in report.ranks])
    lines.append(
        f"ranks 1 to {report.settings.ranks} on {report.cores} cores: CPU time that offloading adds {min(cpu):.0f} to "
        f"{max(cpu):.0f} us a tensor; wall time of a tensor {wall:.2f} x, without the plugin {kept:.2f} x"
    )
    return lines


def _growth(costs: Sequence[float]) -> float:
    return max(costs) / min(costs)


def tables_of(report: ScaleBench) -> list[Table]:
    """Set out both parts.

    Args:
        report: Of :func:`measure`.
    """
    settings = report.settings
    records = Table(
        title="microseconds per saved tensor, forward plus backward, no I/O; in brackets over identity hooks "
        f"(medians of {settings.rounds} interleaved rounds)"
    )
    records.add_column("variant")
    for count in settings.records:
        records.add_column(f"{count:,} live", justify="right", no_wrap=True)
    for name in dict.fromkeys(cost.variant for cost in report.records):
        cells = [
            f"{cost.microseconds:.1f} ({cost.over_identity_microseconds:+.1f})"
            for cost in report.records
            if cost.variant == name
        ]
        records.add_row(name, *cells)
    ranks = Table(
        title=f"ranks on one drive, {settings.tensors} tensors of {format_bytes(settings.tensor_bytes)} each; "
        "microseconds per saved tensor"
    )
    for name in ("ranks", "kept", "offloaded", "CPU added", "waited", "moved, all ranks"):
        ranks.add_column(name, justify="right", no_wrap=True)
    for cost in report.ranks:
        times = (cost.kept_microseconds, cost.offloaded_microseconds, cost.cpu_microseconds, cost.stall_microseconds)
        ranks.add_row(str(cost.ranks), *(f"{each:.0f}" for each in times), format_rate(cost.bytes_per_second))
    return [records, ranks]


def plot(report: ScaleBench, path: Path) -> None:
    """Draw both parts.

    Args:
        report: Of :func:`measure`.
        path: Of the picture; its suffix is the format.

    Raises:
        EnvironmentUnsupportedError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(cost.variant for cost in report.records))
    for name, (colour, marker) in zip(names, _STYLES, strict=True):
        costs = [cost for cost in report.records if cost.variant == name]
        values = [cost.microseconds for cost in costs]
        left.plot([cost.records for cost in costs], values, color=colour, marker=marker, label=name)
    left.set_xscale("log")
    left.set_xlabel("live records")
    counts = [cost.ranks for cost in report.ranks]
    for label, values, (colour, marker) in (
        ("kept, wall time", [cost.kept_microseconds for cost in report.ranks], _STYLES[0]),
        ("offloaded, wall time", [cost.offloaded_microseconds for cost in report.ranks], _STYLES[4]),
        ("CPU time that offloading adds", [cost.cpu_microseconds for cost in report.ranks], _STYLES[3]),
    ):
        right.plot(counts, values, color=colour, marker=marker, label=label)
    right.set_xticks(counts, [str(count) for count in counts])
    right.set_xlabel(f"ranks on one drive, {report.cores} cores")
    for axes in (left, right):
        axes.set_ylabel("microseconds per saved tensor")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
