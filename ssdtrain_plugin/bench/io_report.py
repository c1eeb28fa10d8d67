"""What ``ssdtrain bench io`` has measured, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssdtrain_plugin.units import format_bytes, format_rate

__all__ = ["Figure", "IoReport", "Place", "Row", "print_report"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One direction of one side.

    Attributes:
        bytes_per_second: Median of the rounds.
        cpu_milliseconds_per_gib: Median of the rounds; user and system time.
        bytes_per_second_by_round: In order.
        cpu_milliseconds_per_gib_by_round: In order.
        share_of_fio: ``bytes_per_second`` over fio's, or None.
        median_share_of_fio: Median of the shares of single rounds: what both suffer from
            the machine falls out; or None.
        share_of_sum: Of several paths together: ``bytes_per_second`` over the sum of
            each path's alone, by the same side; or None.
        share_of_unverified: With ``verify: checksum``: median of the shares of single
            rounds, throughput over that of the same engine with ``verify: off``; else None.
        cpu_over_unverified: The same of CPU time a GiB: above 1 is what checksums cost.
    """

    bytes_per_second: float
    cpu_milliseconds_per_gib: float
    bytes_per_second_by_round: tuple[float, ...]
    cpu_milliseconds_per_gib_by_round: tuple[float, ...]
    share_of_fio: float | None
    median_share_of_fio: float | None
    share_of_sum: float | None
    share_of_unverified: float | None
    cpu_over_unverified: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One side at one place.

    Attributes:
        method: An engine of ours, or ``fio``.
        verify: As in the option of that name; ``off`` for fio.
        how: Where the bytes went and how, in one line.
        first_write_bytes_per_second: Into space that was allocated and never written; None
            for fio and for several paths together, which come later.
        figures: By direction.
    """

    method: str
    verify: str
    how: str
    first_write_bytes_per_second: float | None
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Place:
    """One path, or several striped.

    Attributes:
        paths: As given.
        throttles: Bytes a second of each, or None.
        rows: Each engine in the order asked for, with each ``verify``, followed by fio on the file of the first.
    """

    paths: tuple[str, ...]
    throttles: tuple[int | None, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class IoReport:
    """What was measured.

    Attributes:
        size_bytes: Bytes of one pass.
        block_bytes: Bytes of one transfer.
        threads: Transfers at once, per drive and direction.
        rounds: That count.
        fio: Version and engine, or None if it was not used.
        remarks: What is worth knowing, one sentence each.
        places: Each path, then all of them.
    """

    size_bytes: int
    block_bytes: int
    threads: int
    rounds: int
    fio: str | None
    remarks: tuple[str, ...]
    places: tuple[Place, ...]


def print_report(console: Console, report: IoReport) -> None:
    """Print a table a place with what checksums cost there, then what is worth knowing.

    Args:
        console: Where to.
        report: What was measured.
    """
    console.print(
        f"{format_bytes(report.size_bytes)} a pass in blocks of {format_bytes(report.block_bytes)}, {report.threads} "
        f"at once; medians of {report.rounds} interleaved rounds; fio: {report.fio or 'none'}\n",
        soft_wrap=True,
    )
    for place in report.places:
        console.print(escape(_title(place)), style="bold", soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for name in ("", "by", "median", "lowest", "highest", "of fio", "CPU/GiB"):
            table.add_column(name, justify="left" if name in ("", "by") else "right", no_wrap=True)
        is_striped = len(place.paths) > 1
        if is_striped:
            table.add_column("of the sum", justify="right")
        for cells in _io_rows(place.rows, is_striped=is_striped):
            table.add_row(*cells)
        console.print(table)
        for cost in _costs_of_checksums(place.rows):
            console.print(cost, soft_wrap=True)
        console.print()
    for remark in report.remarks:
        console.print(f"note: {escape(remark)}", soft_wrap=True)


def _title(place: Place) -> str:
    names = [
        path if throttle is None else f"{path} (throttled to {format_rate(throttle)})"
        for path, throttle in zip(place.paths, place.throttles, strict=True)
    ]
    return names[0] if len(names) == 1 else f"all together: {', '.join(names)}"


def _costs_of_checksums(rows: tuple[Row, ...]) -> list[str]:
    """Say what ``verify: checksum`` costs, a line for each engine that was measured with and without."""
    lines = []
    for row in rows:
        costs = [
            f"{direction} {_ratio(figure.share_of_unverified)} / {_ratio(figure.cpu_over_unverified)}"
            for direction, figure in row.figures.items()
            if figure.share_of_unverified is not None
        ]
        if costs:
            lines.append(f"verify: checksum, {row.method}: throughput / CPU time over verify: off: {', '.join(costs)}")
    return lines


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _side(row: Row) -> str:
    return row.method if row.verify == "off" else f"{row.method}, {row.verify}"


def _io_rows(rows: tuple[Row, ...], *, is_striped: bool) -> list[list[str]]:
    """Turn the sides at one place into cells, all sides of one direction below each other."""
    cells = [
        ["first write", _side(row), format_rate(row.first_write_bytes_per_second)]
        for row in rows
        if row.first_write_bytes_per_second is not None
    ]
    for direction in rows[0].figures:
        for row in rows:
            figure = row.figures[direction]
            rates = figure.bytes_per_second_by_round
            cells.append(
                [direction, _side(row), *map(format_rate, (figure.bytes_per_second, min(rates), max(rates)))]
                + [_percent(figure.share_of_fio), f"{figure.cpu_milliseconds_per_gib:.1f} ms"]
                + ([_percent(figure.share_of_sum)] if is_striped else [])
            )
    return cells


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
