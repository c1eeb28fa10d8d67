"""Run every fault under every host and write what came of it into the operations manual. Run by ``make test-faults``.

Exits with 1 if a row is not as it should be: a hang, an abort, a wrong number in silence, something left behind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fault_cases import ALL_CASES, PIPELINE, PLAIN
from fault_jobs import Row, run_cases
from job_processes import ROOT, end_on_sigterm
from rich.console import Console

__all__ = ["insert_table", "render_table"]

MANUAL = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
_HEAD = ("fault", "direction", "which calls, or how", "host", "outcome", "gradients equal", "leftovers", "seconds")


def _cells(row: Row) -> tuple[str, ...]:
    case = row.case
    if row.outcome is None:
        return case.fault, case.direction, case.calls, row.host, row.remark, "-", "-", "-"
    outcome = row.outcome.value + (row.remark if row.is_good else "")
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    left = f"{len(row.leftovers)}: {row.leftovers[0]}" if row.leftovers else "none"
    equal = "-" if row.are_equal is None else "yes" if row.are_equal else "NO"
    return case.fault, case.direction, case.calls, row.host, outcome, equal, left, seconds


def render_table(rows: Sequence[Row]) -> str:
    """Write the rows in Markdown, ending in a line break.

    Args:
        rows: In any order; the table has that of the cases.
    """
    order = {case: number for number, case in enumerate(ALL_CASES)}
    lines = [_HEAD, ("---",) * (len(_HEAD) - 1) + ("--:",)]
    lines += [_cells(row) for row in sorted(rows, key=lambda row: (order[row.case], row.host != PLAIN))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def insert_table(text: str, table: str) -> str:
    """Replace what stands between the markers.

    Args:
        text: The manual.
        table: From :func:`render_table`.

    Raises:
        ValueError: The markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the manual has no `{BEGIN}` and `{END}`")
    return f"{head}{BEGIN}\n{table}{END}{tail}"


def main() -> None:
    """Run the faults, show each row, write the table, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "faults", help="a directory on a drive")
    parser.add_argument("--only", default="", help="cases whose name holds this text; the manual is left alone")
    parser.add_argument("--host", choices=(PLAIN, PIPELINE), action="append", help="default: both")
    arguments = parser.parse_args()
    if not any(arguments.only in case.name for case in ALL_CASES):
        parser.error(f"--only: {arguments.only!r} (expected a part of the name of a case)")
    end_on_sigterm()
    arguments.work.mkdir(parents=True, exist_ok=True)
    console, started = Console(soft_wrap=True, highlight=False), time.monotonic()
    rows: list[Row] = []
    for host in arguments.host or (PLAIN, PIPELINE):
        cases = [case for case in ALL_CASES if host in case.hosts and arguments.only in case.name]
        for row in run_cases(cases, host, arguments.work.resolve()):
            rows.append(row)
            verdict = "skipped" if row.outcome is None else "ok" if row.is_good else "WRONG"
            console.print(f"{time.monotonic() - started:5.0f} s  {verdict:7}  {' | '.join(_cells(row))}", markup=False)
            if verdict == "WRONG":
                console.print(f"expected: {row.case.expected.value}; found: {row.leftovers} {row.remark}", markup=False)
    if not arguments.only and not arguments.host:
        MANUAL.write_text(insert_table(MANUAL.read_text(encoding="utf-8"), render_table(rows)), encoding="utf-8")
    wrong = [row for row in rows if not row.is_good]
    console.print(f"{len(rows)} rows, {len(wrong)} not as they should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
