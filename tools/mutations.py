"""Take the guards out of a copy of the package, one at a time, and see that the race suite notices.

Run by ``make mutations``. Exits with 1 if a guard is missed that is not explained.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from guards import GUARDS, Guard
from job_processes import ROOT
from race_jobs import races
from rich.console import Console
from rich.table import Table

__all__ = ["Finding", "find"]

_PACKAGE = "ssdtrain_plugin"
_MOST_CHARACTERS = 110


@dataclass(frozen=True)
class Finding:
    """What the suite says without a guard.

    Attributes:
        guard: That was taken out.
        num_runs: How many runs it took, or were done in vain.
        check: What failed first, or None.
    """

    guard: Guard
    num_runs: int
    check: str | None


def find(guard: Guard, *, first: int, most: int) -> Finding:
    """Run seeds without a guard until one fails.

    Args:
        guard: To be taken out.
        first: The first seed.
        most: How many seeds at most.
    """
    with tempfile.TemporaryDirectory(prefix="ssdtrain-mutation-") as folder:
        copy = Path(folder) / _PACKAGE
        shutil.copytree(ROOT / _PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / guard.file).write_text(guard.removed_from((copy / guard.file).read_text(encoding="utf-8")))
        num_runs = 0
        for result in races(first, most, package=Path(folder), until_failure=True):
            num_runs += 1
            if result.failure is not None:
                return Finding(guard, num_runs, result.check[:_MOST_CHARACTERS])
    return Finding(guard, num_runs, None)


def _render(findings: Iterable[Finding], most: int) -> Table:
    table = Table(title="each guard taken out, alone")
    for column in ("guard", "in", "runs", "first check that failed"):
        table.add_column(column, justify="right" if column == "runs" else "left", overflow="fold")
    for finding in findings:
        missed = f"none in {most}: {finding.guard.why_missed or 'MISSED'}"
        table.add_row(finding.guard.name, finding.guard.file, str(finding.num_runs), finding.check or missed)
    return table


def _as_markdown(findings: Iterable[Finding], most: int) -> str:
    lines = ["| guard | in | found after runs | first check that failed |", "|---|---|--:|---|"]
    for finding in findings:
        missed = f"not in {most}: {finding.guard.why_missed or 'MISSED'}"
        runs = str(finding.num_runs) if finding.check else "-"
        lines.append(f"| {finding.guard.name} | `{finding.guard.file}` | {runs} | {finding.check or missed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take out all guards, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=400, help="runs for each guard at most")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", help="guards whose name contains this")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--markdown", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    console = Console()
    guards = [guard for guard in GUARDS if not arguments.only or arguments.only in guard.name]

    def run(guard: Guard) -> Finding:
        finding = find(guard, first=arguments.first, most=arguments.most)
        text = finding.check or "none"
        console.print(f"{guard.name}: {finding.num_runs} runs, {text}", markup=False, highlight=False, soft_wrap=True)
        return finding

    with ThreadPoolExecutor(arguments.processes) as pool:
        findings = list(pool.map(run, guards))
    console.print(_render(findings, arguments.most))
    if arguments.markdown:
        arguments.markdown.write_text(_as_markdown(findings, arguments.most), encoding="utf-8")
    missed = [finding.guard.name for finding in findings if finding.check is None and not finding.guard.why_missed]
    console.print(f"missed: {', '.join(missed)}" if missed else f"{len(findings)} guards, none missed in silence")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
