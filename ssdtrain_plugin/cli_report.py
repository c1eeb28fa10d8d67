"""The command ``ssdtrain report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssdtrain_plugin.cli_errors import to_file
from ssdtrain_plugin.errors import printable

__all__ = ["report"]

_LONGEST_PATH = 4096


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of `stats_path`.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page; pictures are written beside it.")] = Path(
        "report.html"
    ),
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the events for https://ui.perfetto.dev as well.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Whose time line is drawn; by default the last one recorded.")
    ] = None,
) -> None:
    """Show what a run did: memory, transfers, waits, plans and layers, as one HTML page."""
    from ssdtrain_plugin.report import read_run, write_chrome_trace, write_page

    found = read_run(run)
    recorded = sorted({each.step for rank in found.traced for each in rank.traced_steps})
    if step is not None and step not in recorded:
        numbers = f"{recorded[0]} to {recorded[-1]}" if recorded else "none"
        raise typer.BadParameter(f"{step} was not recorded (recorded: {numbers})", param_hint="--step")
    if trace is not None and not recorded:
        raise typer.BadParameter("no step was recorded; set the option `trace_steps`", param_hint="--trace")
    for problem in found.problems:
        typer.echo(f"warning: {printable(problem)}", err=True)
    with to_file("--output", output):
        paths = write_page(found, output, step=step)
    if trace is not None:
        with to_file("--trace", trace):
            write_chrome_trace(found, trace)
        paths.append(trace)
    for path in paths:
        typer.echo(printable(str(path), longest=_LONGEST_PATH))
