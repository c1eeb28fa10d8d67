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

from ssdtrain_plugin.cli_bench import bench, size_in_bytes
from ssdtrain_plugin.cli_errors import Commands
from ssdtrain_plugin.cli_plan import plan
from ssdtrain_plugin.cli_report import report
from ssdtrain_plugin.errors import ConfigError, printable
from ssdtrain_plugin.version import __version__

if TYPE_CHECKING:
    from ssdtrain_plugin.doctor import Diagnosis

__all__ = ["app", "main"]

app = typer.Typer(
    help="Activation offloading to NVMe for training large language models.",
    no_args_is_help=True,
    add_completion=False,
    cls=Commands,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.command("plan")(plan)
app.command("report")(report)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"ssdtrain-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Activation offloading to NVMe for training large language models."""


@app.command()
def doctor(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Directories on the drives.")],
    size: Annotated[str, typer.Option(help="Bytes to write, clipped to a quarter of the free space.")] = "1 GiB",
    model: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML with a model's shape; predict its cost.")
    ] = None,
    tbw: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Rated endurance of a drive, such as `600 TB`; tell its life.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Tell whether activations can be offloaded to directories, and how fast. Exits with 0 only if so."""
    nbytes, rated_bytes = size_in_bytes("--size", size), None if tbw is None else size_in_bytes("--tbw", tbw)
    from ssdtrain_plugin.doctor import ModelShape, examine, examine_machine, predict  # torch
    from ssdtrain_plugin.doctor.rendering import directory_table, machine_table, prediction_table

    try:
        shape = None if model is None else ModelShape.from_yaml(model)
    except ConfigError as error:
        typer.echo(f"--model: {error}", err=True)
        raise typer.Exit(2) from None
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
            task = progress.add_task(escape(printable(path)), total=None)
            tell = partial(_advance, progress, task, path)
            diagnoses.append(examine(path, nbytes=nbytes, progress=tell, rated_bytes=rated_bytes))
    is_usable = all(diagnosis.is_usable for diagnosis in diagnoses)
    machine = examine_machine()
    rates = [diagnosis.bandwidth for diagnosis in diagnoses if diagnosis.bandwidth is not None]
    prediction = predict(shape, rates) if shape is not None and rates else None
    if as_json:
        report = {
            "is_usable": is_usable,
            "directories": [asdict(diagnosis) for diagnosis in diagnoses],
            "machine": [asdict(finding) for finding in machine],
            "prediction": None if prediction is None else asdict(prediction),
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        console = Console(highlight=False)
        for diagnosis in diagnoses:
            if diagnosis.is_usable:
                console.print(directory_table(diagnosis))
            _print_verdict(console, diagnosis)
        console.print(machine_table(machine), "")
        if prediction is not None:
            console.print(prediction_table(prediction))
    raise typer.Exit(0 if is_usable else 1)


def _advance(progress: Progress, task: TaskID, path: str, phase: str, done_bytes: int, total_bytes: int) -> None:
    progress.update(task, description=f"{escape(printable(path))}: {phase}", completed=done_bytes, total=total_bytes)


def _print_verdict(console: Console, diagnosis: Diagnosis) -> None:
    if not diagnosis.is_usable:
        errors = Console(stderr=True, highlight=False)
        errors.print(f"[bold red]not usable[/] {escape(printable(str(diagnosis.problem)))}", soft_wrap=True)
        errors.print("\nhint: name a directory on a local drive that this user can write to, with free space")
        return
    colour = "yellow" if diagnosis.advices else "green"
    console.print(f"[bold {colour}]{escape(printable(diagnosis.verdict))}[/]\n", soft_wrap=True)


def main() -> None:
    """Run the command line; the entry point of ``ssdtrain``."""
    app(prog_name="ssdtrain")
