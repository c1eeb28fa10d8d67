"""``ssdtrain plan``. Parses, prints, and leaves the work to :mod:`ssdtrain_plugin.projection`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ssdtrain_plugin.errors import printable

if TYPE_CHECKING:
    from ssdtrain_plugin.projection.calibration import Calibration
    from ssdtrain_plugin.projection.projection import Projection

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
    from_run: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Compare with a run: the directory of `stats_path`, or a file (repeatable)."),
    ] = None,
) -> None:
    """Predict activations, bandwidth, drives and their life for a training run. Measures nothing."""
    from ssdtrain_plugin.projection import project, read_cluster, read_model
    from ssdtrain_plugin.projection.calibration_rendering import calibration_as_dict, calibration_tables
    from ssdtrain_plugin.projection.plot import draw
    from ssdtrain_plugin.projection.rendering import tables
    from ssdtrain_plugin.projection.report import as_dict

    found = project(read_model(model), read_cluster(cluster))
    if plot is not None:
        draw(found, plot)
    compared = _compare(found, from_run) if from_run else None
    if as_json:
        report = as_dict(found)
        if compared is not None:
            report["calibration"] = calibration_as_dict(compared)
        typer.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        # On a narrow terminal lines wrap; a table fitted to it would lose digits.
        console.width = max(console.width, _NARROWEST)
        console.print(tables(found) if compared is None else calibration_tables(compared), soft_wrap=True)


def _compare(found: Projection, paths: list[Path]) -> Calibration:
    from ssdtrain_plugin.projection.calibration import calibrate
    from ssdtrain_plugin.report.measuring import measure
    from ssdtrain_plugin.report.reading import read_files, read_run

    run = read_run(paths[0]) if len(paths) == 1 and not paths[0].is_file() else read_files(paths)
    for problem in run.problems:
        typer.echo(f"warning: {printable(problem)}", err=True)
    cluster = found.cluster
    ranks = measure(
        run,
        num_ranks=cluster.gpus,
        microbatches=cluster.batch.micro_batches,
        parts=cluster.parallel.virtual_stages,
    )
    return calibrate(found, ranks)
