"""Run the race suite: many small training programs, each under a scheduler of threads that a seed decides.

Run by ``make stress``. Exits with 1 unless all runs are green. A run that failed is repeated by
``python tests/races/race_worker.py SEED 1``.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from queue import Queue

from race_jobs import RaceResult, races
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PER_PROCESS = 1000  # torch keeps a little for each backward that an unpack hook ended


def _run(jobs: Queue[tuple[int, int]], results: Queue[RaceResult]) -> None:
    while not jobs.empty():
        first, count = jobs.get()
        while count > 0:  # a process that died takes one seed with it
            num_seen = 0
            for result in races(first, count):
                num_seen += 1
                results.put(result)
            first, count = first + num_seen, count - num_seen


def main() -> None:
    """Run them on all cores; print the figure, and the seeds that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    console, began = Console(), time.monotonic()
    jobs: Queue[tuple[int, int]] = Queue()
    size = min(_PER_PROCESS, -(-arguments.count // arguments.processes))
    for start in range(0, arguments.count, size):
        jobs.put((arguments.first + start, min(size, arguments.count - start)))
    results: Queue[RaceResult] = Queue()
    for _ in range(arguments.processes):
        threading.Thread(target=_run, args=(jobs, results), daemon=True).start()
    failed: list[RaceResult] = []
    points = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=arguments.count)
        for _ in range(arguments.count):
            result = results.get()
            points += result.points
            if result.failure is not None:
                failed.append(result)
                console.print(f"seed {result.seed}: {result.failure}", markup=False, highlight=False)
            progress.advance(task)
    seconds = time.monotonic() - began
    console.print(
        f"{arguments.count - len(failed):,} of {arguments.count:,} runs green, seeds {arguments.first} to "
        f"{arguments.first + arguments.count - 1}, {points:,} points, {seconds:.0f} s",
        highlight=False,
    )
    if failed:
        console.print("seeds that failed: " + ", ".join(str(result.seed) for result in failed), highlight=False)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
