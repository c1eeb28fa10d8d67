"""The command ``ssdtrain report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssdtrain_plugin.errors import OffloadError

__all__ = ["report"]


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

    try:
        found = read_run(run)
        recorded = sorted({each.step for rank in found.traced for each in rank.traced_steps})
        if step is not None and step not in recorded:
            numbers = f"{recorded[0]} to {recorded[-1]}" if recorded else "none"
            raise typer.BadParameter(f"{step} was not recorded (recorded: {numbers})", param_hint="--step")
        if trace is not None and not recorded:
            raise typer.BadParameter("no step was recorded; set the option `trace_steps`", param_hint="--trace")
        for problem in found.problems:
            typer.echo(f"warning: {problem}", err=True)
        paths = write_page(found, output, step=step)
        if trace is not None:
            write_chrome_trace(found, trace)
            paths.append(trace)
    except (OffloadError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for path in paths:
        typer.echo(str(path))
