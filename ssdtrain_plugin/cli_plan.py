"""``ssdtrain plan``. Parses, prints, and leaves the work to :mod:`ssdtrain_plugin.projection`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssdtrain_plugin.errors import OffloadError

__all__ = ["plan"]

_NARROWEST = 124
"""Columns that the widest table takes."""


def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL.yaml", help="What is trained.")],
    cluster: Annotated[Path, typer.Argument(metavar="CLUSTER.yaml", help="GPUs, drives, mapping, assumptions.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Draw shares of a step over the micro-batch.")
    ] = None,
) -> None:
    """Predict activations, bandwidth, drives and their life for a training run. Measures nothing."""
    from ssdtrain_plugin.projection import project, read_cluster, read_model
    from ssdtrain_plugin.projection.plot import draw
    from ssdtrain_plugin.projection.rendering import tables
    from ssdtrain_plugin.projection.report import as_dict

    try:
        found = project(read_model(model), read_cluster(cluster))
        if plot is not None:
            draw(found, plot)
    except OffloadError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(as_dict(found), indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        # On a narrow terminal lines wrap; a table fitted to it would lose digits.
        console.width = max(console.width, _NARROWEST)
        console.print(tables(found), soft_wrap=True)
