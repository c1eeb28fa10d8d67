"""The ``ssdtrain`` command. Parses, prints, and leaves the work to the modules it calls.

Commands import what they need when they run: torch takes seconds, ``--help`` must not.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from ssdtrain_plugin.units import format_bytes, format_rate, parse_bytes

if TYPE_CHECKING:
    from ssdtrain_plugin.doctor import Diagnosis

__all__ = ["app", "bench", "main"]

app = typer.Typer(
    help="Activation offloading to NVMe for training large language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure the plugin on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@app.callback()
def _root() -> None:
    """Activation offloading to NVMe for training large language models."""


def _size(text: str) -> int:
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if nbytes < 1:
        raise typer.BadParameter(f"{text!r} (expected more than zero bytes)")
    return nbytes


@app.command()
def doctor(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Directories on the drives.")],
    size: Annotated[str, typer.Option(help="Bytes to write, clipped to a quarter of the free space.")] = "1 GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Tell whether activations can be offloaded to directories, and how fast. Exits with 0 only if so."""
    nbytes = _size(size)
    from ssdtrain_plugin.doctor import examine  # torch

    diagnoses = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=as_json,
    ) as progress:
        for path in paths:
            task = progress.add_task(escape(path), total=None)
            diagnoses.append(examine(path, nbytes=nbytes, progress=partial(_advance, progress, task, path)))
    is_usable = all(diagnosis.is_usable for diagnosis in diagnoses)
    if as_json:
        report = {"is_usable": is_usable, "directories": [asdict(diagnosis) for diagnosis in diagnoses]}
        typer.echo(json.dumps(report, indent=2))
    else:
        console = Console(highlight=False)
        for diagnosis in diagnoses:
            _print_diagnosis(console, diagnosis)
    raise typer.Exit(0 if is_usable else 1)


def _advance(progress: Progress, task: TaskID, path: str, phase: str, done_bytes: int, total_bytes: int) -> None:
    progress.update(task, description=f"{escape(path)}: {phase}", completed=done_bytes, total=total_bytes)


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print one directory, on half a screen at most."""
    if not diagnosis.is_usable:
        problem = escape(str(diagnosis.problem))
        errors = Console(stderr=True, highlight=False)
        errors.print(f"[bold red]not usable[/] {problem}", soft_wrap=True)
        errors.print("\nhint: name a directory on a local drive that this user can write to, with free space")
        return
    table = Table(title=escape(diagnosis.path), title_justify="left", show_header=False, box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(diagnosis):
        table.add_row(name, escape(value))
    console.print(table)
    colour = "yellow" if diagnosis.remarks else "green"
    console.print(f"[bold {colour}]{escape(diagnosis.verdict)}[/]\n", soft_wrap=True)


def _rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Turn a diagnosis into names and values."""
    rows = []
    directory, bandwidth = diagnosis.directory, diagnosis.bandwidth
    if directory is not None:
        nameless = "yes" if directory.supports_tmpfile else "no; files are unlinked as soon as they are created"
        free = f"{format_bytes(directory.free_bytes)} of {format_bytes(directory.total_bytes)}"
        rows += [
            ("file system", directory.file_system),
            ("O_DIRECT", f"{'yes' if directory.supports_direct else 'no'}: {directory.direct_reason}"),
            ("O_TMPFILE", nameless),
            ("free space", free),
        ]
    if bandwidth is not None:
        how = (
            f"{format_bytes(bandwidth.nbytes)} in extents of {format_bytes(bandwidth.extent_bytes)}, "
            f"{bandwidth.threads} threads"
        )
        first = format_rate(bandwidth.first_write_bytes_per_second)
        rows += [
            ("write", f"{format_rate(bandwidth.write_bytes_per_second)} ({first} into new space)"),
            ("read", format_rate(bandwidth.read_bytes_per_second)),
            ("measured with", how),
        ]
    rows.append(("io_engine: auto", f"{diagnosis.engine}: {diagnosis.engine_reason}"))
    rows += [("note", remark) for remark in diagnosis.remarks]
    return rows


@bench.command("hooks")
def bench_hooks(
    tensors: Annotated[int, typer.Option(min=1, help="Saved tensors per pass.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each variant, interleaved.")] = 41,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure pack plus unpack of one saved tensor, without I/O, beside hooks that do nothing."""
    from ssdtrain_plugin.bench.hooks import measure  # torch

    with Progress(
        TextColumn("measuring hooks"), BarColumn(), console=Console(stderr=True), disable=as_json
    ) as progress:
        task = progress.add_task("hooks", total=rounds + 1)
        costs = measure(num_tensors=tensors, rounds=rounds, on_round=lambda: progress.advance(task))
    if as_json:
        typer.echo(json.dumps([asdict(cost) for cost in costs], indent=2))
        return
    table = Table(title=f"microseconds per saved tensor, forward plus backward (median of {rounds} interleaved passes)")
    table.add_column("variant")
    table.add_column("in all", justify="right")
    table.add_column("over identity hooks", justify="right")
    for cost in costs:
        table.add_row(cost.name, f"{cost.median_microseconds:.1f}", f"{cost.over_identity_microseconds:+.1f}")
    Console(highlight=False).print(table)


def main() -> None:
    """Run the command line; the entry point of ``ssdtrain``."""
    app(prog_name="ssdtrain")
