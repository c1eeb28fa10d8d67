"""Train a small model for a long time under faults at random, and see that nothing grows and nothing is lost.

Run by ``make soak``. Two jobs of two ranks each, a DeepSpeed pipeline: one without the plugin, one with it and
with faults. Exits with 1 unless all losses, gradients and parameters are equal in every bit and memory, open
files, threads and extent bytes are flat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from job_processes import ROOT, end_on_sigterm, launcher, run_processes
from rich.console import Console
from rich.table import Table
from scipy.stats import linregress

from ssdtrain_plugin.units import format_bytes

__all__ = ["MEASURES", "Rank", "Slope", "are_equal", "plot", "run_job", "slope_of", "what_grows"]

WORKER = ROOT / "tests" / "faults" / "soak_worker.py"
MEASURES = ("rss_bytes", "open_files", "threads", "extent_bytes", "used_bytes")
_RANKS = (0, 1)
_START_SECONDS = 180.0
_STEP_SECONDS = 1.0
_WARM_UP = 0.1  # of the steps: memory of libraries, the extent file, threads that start when they are first needed
_PER_STEPS = 1000
_MOST_RSS_GROWTH = 0.02  # of itself, over the whole run
_PANELS = (
    ("rss_bytes", "resident memory, minus that of the first step (MiB)", 2**20, True),
    ("open_files", "open files", 1, True),
    ("threads", "threads", 1, True),
    ("extent_bytes", "extent file (MiB)", 2**20, False),
    ("used_bytes", "extents in use after a step (KiB)", 2**10, False),
    ("num_faults", "faults so far", 1, False),
)


@dataclass(frozen=True)
class Rank:
    """What one rank has written.

    Attributes:
        steps: A mapping a step.
        end: Digests, and the faults by kind.
    """

    steps: list[dict[str, Any]]
    end: dict[str, Any]

    def series(self, name: str) -> np.ndarray:
        """Get one number of every step."""
        return np.array([step[name] for step in self.steps], dtype=float)


@dataclass(frozen=True)
class Slope:
    """A straight line through the steps after warm-up, by least squares.

    Attributes:
        per_thousand: How much a thousand steps add.
        error: Standard error of it.
        growth: Over all steps that were looked at.
        mean: Of the values.
        spread: Largest minus smallest value.
    """

    per_thousand: float
    error: float
    growth: float
    mean: float
    spread: float


def run_job(directory: Path, *, steps: int, is_faulty: bool, seed: int = 0, probability: float = 0.0005) -> list[Rank]:
    """Train one job to its end.

    Args:
        directory: For all its files; made new.
        steps: How many.
        is_faulty: With the plugin, and with faults; else DeepSpeed alone.
        seed: Of the faults.
        probability: Of each kind of fault in each call.

    Raises:
        RuntimeError: It did not end well; the message has the end of its log.
    """
    shutil.rmtree(directory, ignore_errors=True)
    drive, results = directory / "drive", directory / "results"
    for folder in (drive, results):
        folder.mkdir(parents=True)
    request = {"steps": steps, "is_faulty": is_faulty, "seed": seed, "probability": probability}
    paths = {"drive": str(drive), "results": str(results)}
    (directory / "request.json").write_text(json.dumps(request | paths), encoding="utf-8")
    command = [*launcher(results), str(WORKER), str(directory / "request.json")]
    limit_seconds = _START_SECONDS + _STEP_SECONDS * steps
    finished = run_processes(command, directory / "log", limit_seconds=limit_seconds)
    texts = [path.read_text(errors="replace")[-3000:] for path in (directory / "log", *results.glob("*_rank?.log"))]
    if finished.code != 0 or finished.left or any(drive.iterdir()):
        raise RuntimeError(f"exit code {finished.code}, left {finished.left}\n" + "\n".join(texts))
    return [_read(results / f"rank{rank}.jsonl") for rank in _RANKS]


def _read(path: Path) -> Rank:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Rank(lines[:-1], lines[-1])


def are_equal(one: Sequence[Rank], other: Sequence[Rank]) -> bool:
    """Compare every loss, gradient and parameter to the last bit.

    Args:
        one: The ranks of a job.
        other: Those of another.
    """
    return all(
        [step["loss"] for step in a.steps] == [step["loss"] for step in b.steps]
        and all(a.end[name] == b.end[name] for name in ("gradients", "parameters"))
        for a, b in zip(one, other, strict=True)
    )


def slope_of(values: np.ndarray) -> Slope:
    """Fit a line to what comes after warm-up.

    Args:
        values: (steps,), at least 30.
    """
    after = values[int(len(values) * _WARM_UP) :]
    line = linregress(np.arange(len(after)), after)
    growth = float(line.slope * len(after))
    error = float(np.nan_to_num(line.stderr)) * _PER_STEPS  # not a number if all values are the same
    return Slope(float(line.slope) * _PER_STEPS, error, growth, float(after.mean()), float(np.ptp(after)))


def what_grows(rank: Rank) -> list[str]:
    """Name the measures that are not flat.

    Memory may wander by a fiftieth; of the others, the line must not climb by one (file, thread, or byte for
    each byte of a step) over the run.

    Args:
        rank: Of a job with faults.
    """
    bounds: Mapping[str, float] = {"rss_bytes": _MOST_RSS_GROWTH * slope_of(rank.series("rss_bytes")).mean}
    bounds = {name: bounds.get(name, 1.0) for name in ("rss_bytes", "open_files", "threads", "extent_bytes")}
    return [name for name, bound in bounds.items() if slope_of(rank.series(name)).growth > bound]


def _show(name: str, value: float) -> str:
    return format_bytes(round(abs(value))) if name.endswith("_bytes") else f"{abs(value):.2g}"


def render(clean: Sequence[Rank], faulty: Sequence[Rank]) -> Table:
    """Show slopes.

    Args:
        clean: The job without the plugin.
        faulty: The job with faults.
    """
    table = Table(title=f"slope by least squares, per {_PER_STEPS} steps, after {_WARM_UP:.0%} of the steps")
    for column in ("rank", "measure", "mean", "largest - smallest", "slope", "standard error", "slope without us"):
        table.add_column(column, justify="left" if column in ("rank", "measure") else "right")
    for number, (rank, plain) in enumerate(zip(faulty, clean, strict=True)):
        for name in MEASURES:
            slope, without = slope_of(rank.series(name)), slope_of(plain.series(name))
            signs = ["-" if one.per_thousand < 0 else "+" for one in (slope, without)]
            values = [_show(name, one) for one in (slope.mean, slope.spread, slope.per_thousand, slope.error)]
            values[2] = signs[0] + values[2]
            table.add_row(str(number), name, *values, signs[1] + _show(name, without.per_thousand))
    return table


def plot(clean: Sequence[Rank], faulty: Sequence[Rank], path: Path) -> None:
    """Draw what must not grow, and the faults.

    Args:
        clean: The job without the plugin.
        faulty: The job with faults.
        path: Of the image.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (name, title, scale, is_of_both) in zip(axes.flat, _PANELS, strict=True):
        jobs = [(faulty, "-", "with faults"), *([(clean, ":", "without us")] if is_of_both else [])]
        for ranks, style, words in jobs:
            for number, rank in enumerate(ranks):
                values = rank.series(name) / scale
                if name == "rss_bytes":
                    values = values - values[0]
                axis.plot(values, linewidth=0.8, linestyle=style, label=f"rank {number}, {words}")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run both jobs, compare them, show slopes and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "soak", help="a directory on a drive")
    parser.add_argument("--plot", type=Path, help="default: soak.png in WORK")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps} (expected at least 1)")
    end_on_sigterm()
    console, work = Console(), arguments.work.resolve()
    clean = run_job(work / "clean", steps=arguments.steps, is_faulty=False)
    faulty = run_job(work / "faulty", steps=arguments.steps, is_faulty=True, seed=arguments.seed)
    plot(clean, faulty, arguments.plot or work / "soak.png")
    console.print(render(clean, faulty))
    problems = [] if are_equal(clean, faulty) else ["losses, gradients or parameters differ"]
    for number, rank in enumerate(faulty):
        problems += [f"rank {number}: {name} grows" for name in what_grows(rank)]
        medians = [np.median(job[number].series("seconds")) * 1000 for job in (clean, faulty)]
        console.print(f"rank {number}: {rank.end['calls']} calls, {sum(rank.end['faults'].values())} faults:")
        console.print(json.dumps(rank.end["faults"]), soft_wrap=True)
        console.print(f"median step: {medians[0]:.0f} ms without us, {medians[1]:.0f} ms with us and faults")
    console.print("\n".join(problems) or f"{arguments.steps} steps: equal to the last bit, and nothing grows")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
