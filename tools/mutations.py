"""Take the guards out of a copy of the package, one at a time, and see that the race suite notices.

Run by ``make mutations``. Where the suite does not and the guard names a test that holds it, that test is run as well.
Exits with 1 if a guard is missed that is neither explained nor held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch  # noqa: F401 - once, before the processes are forked: that is most of what a guard would take
from guards import GUARDS, Guard
from job_processes import ROOT
from race_jobs import RaceResult
from rich.console import Console
from rich.table import Table

__all__ = ["Finding", "find"]

_PACKAGE = "ssdtrain_plugin"
_MOST_CHARACTERS = 110
_FAILED = 1  # what pytest ends with; no test of that name is another number
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Finding:
    """What the suite says without a guard.

    Attributes:
        guard: That was taken out.
        num_runs: How many runs it took, or were done in vain.
        check: What failed first, or None.
        is_held: The test that holds the guard was run, and failed.
    """

    guard: Guard
    num_runs: int
    check: str | None
    is_held: bool

    @property
    def explanation(self) -> str | None:
        """Say why it is no loss that the suite does not notice; None if it is one."""
        if self.guard.held_by is None:
            return self.guard.why_missed
        if not self.is_held:
            return None
        return "; ".join(filter(None, [self.guard.why_missed, f"held by `{self.guard.held_by}`"]))


def _run(guard: Guard, first: int, most: int, package: Path, sink: Connection) -> None:
    """Run seeds without a guard until one fails; in a process of its own."""
    source = package / _PACKAGE / guard.file
    source.write_text(guard.removed_from(source.read_text(encoding="utf-8")), encoding="utf-8")
    sys.path[:0] = [str(package), str(ROOT / "tests"), str(ROOT / "tests" / "races")]
    from race_run import prepare_process, race
    from race_scheduler import Threads

    prepare_process()
    threads, failure, num_runs = Threads(), None, 0
    while failure is None and num_runs < most:
        failure = race(first + num_runs, threads).failure
        num_runs += 1
    is_held = failure is None and guard.held_by is not None and _fails(guard.held_by, package)
    sink.send((num_runs, failure, is_held))


def _fails(test: str, package: Path) -> bool:
    """Run one test with the copy of the package; one that is not there does not fail."""
    for name in ("tests", "tools"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", package)
    command = [sys.executable, "-m", "pytest", "-q", "-x", test]
    return subprocess.run(command, cwd=package, stdout=subprocess.DEVNULL, check=False).returncode == _FAILED


class _Job:
    """A guard, a copy of the package without it, and the process that runs there."""

    def __init__(self, guard: Guard, first: int, most: int) -> None:
        self.guard = guard
        self._folder = tempfile.TemporaryDirectory(prefix="ssdtrain-mutation-")
        copy = Path(self._folder.name) / _PACKAGE
        shutil.copytree(ROOT / _PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        self.source, sink = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_run, args=(guard, first, most, copy.parent, sink))
        self._process.start()
        sink.close()

    def finding(self) -> Finding:
        """Take what the process has found; it has ended, or is about to."""
        try:
            num_runs, failure, is_held = self.source.recv()
        except EOFError:
            num_runs, failure, is_held = 0, "the process died", False
        self._process.join()
        self._folder.cleanup()
        check = None if failure is None else RaceResult(0, failure, 0, 0).check[:_MOST_CHARACTERS]
        return Finding(self.guard, num_runs, check, is_held)


def find(guards: Iterable[Guard], *, first: int, most: int, processes: int) -> Iterator[Finding]:
    """Run seeds without each guard until one fails.

    Args:
        guards: To be taken out, one at a time.
        first: The first seed.
        most: How many seeds at most.
        processes: At the same time.
    """
    waiting, running = list(guards)[::-1], {}
    while waiting or running:
        while waiting and len(running) < processes:
            job = _Job(waiting.pop(), first, most)
            running[job.source] = job
        for source in wait(list(running)):
            yield running.pop(source).finding()


def _render(findings: Iterable[Finding], most: int) -> Table:
    table = Table(title="each guard taken out, alone")
    for column in ("guard", "in", "runs", "first check that failed"):
        table.add_column(column, justify="right" if column == "runs" else "left", overflow="fold")
    for finding in findings:
        missed = f"none in {most}: {finding.explanation or 'MISSED'}"
        table.add_row(finding.guard.name, finding.guard.file, str(finding.num_runs), finding.check or missed)
    return table


def _as_markdown(findings: Iterable[Finding], most: int) -> str:
    lines = ["| guard | in | found after runs | first check that failed |", "|---|---|--:|---|"]
    for finding in findings:
        missed = f"not in {most}: {finding.explanation or 'MISSED'}"
        runs = str(finding.num_runs) if finding.check else "-"
        lines.append(f"| {finding.guard.name} | `{finding.guard.file}` | {runs} | {finding.check or missed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take out all guards, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=2000, help="runs for each guard at most")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", help="guards whose name matches this regular expression")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--markdown", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    console = Console()
    guards = [guard for guard in GUARDS if re.search(arguments.only or "", guard.name)]

    findings = []
    options = {"first": arguments.first, "most": arguments.most, "processes": arguments.processes}
    for finding in find(guards, **options):
        findings.append(finding)
        text = f"{finding.guard.name}: {finding.num_runs} runs, {finding.check or 'NONE FAILED'}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    findings.sort(key=lambda finding: guards.index(finding.guard))
    console.print(_render(findings, arguments.most))
    if arguments.markdown:
        arguments.markdown.write_text(_as_markdown(findings, arguments.most), encoding="utf-8")
    missed = [finding.guard.name for finding in findings if finding.check is None and not finding.explanation]
    console.print(f"missed: {', '.join(missed)}" if missed else f"{len(findings)} guards, none missed in silence")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
