"""The commands of ``ssdtrain bench``. Parses, prints, and leaves the work to :mod:`ssdtrain_plugin.bench`.

As in :mod:`ssdtrain_plugin.cli`, commands import what they need when they run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ssdtrain_plugin.cli_errors import in_directory
from ssdtrain_plugin.documents import parse_yaml, shown
from ssdtrain_plugin.units import KIB, LARGEST_BYTES, format_bytes, parse_bytes

__all__ = ["bench", "size_in_bytes"]

_LARGEST_FACTOR = 1000
_MOST_THREADS = 1024

bench = typer.Typer(help="Measure the plugin on this machine.", no_args_is_help=True)


def size_in_bytes(option: str, text: str) -> int:
    """Read a size from an option.

    Args:
        option: As typed, for the error.
        text: For example ``1 GiB``.

    Raises:
        typer.BadParameter: It is not a size, or it is zero.
    """
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if not 1 <= nbytes <= LARGEST_BYTES:
        raise typer.BadParameter(f"{text!r} (expected 1 to {LARGEST_BYTES} bytes)", param_hint=option)
    return nbytes


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


@bench.command("io")
def bench_io(  # noqa: PLR0913 - an option each
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Directories on the drives.")],
    engine: Annotated[list[str] | None, typer.Option(help="auto, posix, aio or gds; repeat it for several.")] = None,
    size: Annotated[str, typer.Option(help="Bytes of each pass; more is steadier.")] = "1 GiB",
    block: Annotated[str, typer.Option(help="Bytes of each transfer.")] = "16 MiB",
    threads: Annotated[int, typer.Option(min=1, max=64, help="Transfers at once, per drive and direction.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Visits of each side, interleaved.")] = 5,
    throttle: Annotated[
        list[str] | None,
        typer.Option(metavar="RATE", help="Slow the last path down, for example 500MB/s; repeat it for the last ones."),
    ] = None,
    verify: Annotated[
        list[str] | None, typer.Option(help="off or checksum, as in the option; repeat it. By default both.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure write, read and both at once beside fio; several paths alone and striped. Exits with 1 if it cannot.

    Each engine is measured with and without `verify: checksum`, and what that costs is the last line of each table.
    """
    size_bytes, block_bytes = size_in_bytes("--size", size), size_in_bytes("--block", block)
    if block_bytes % (4 * KIB):
        raise typer.BadParameter(f"{block!r} (expected a multiple of 4 KiB)", param_hint="--block")
    if size_bytes < 2 * block_bytes:
        least = format_bytes(2 * block_bytes)
        raise typer.BadParameter(f"{size!r} (expected at least two blocks, {least})", param_hint="--size")
    throttles = tuple(size_in_bytes("--throttle", text.strip().removesuffix("/s")) for text in throttle or ())
    if len(throttles) > len(paths):
        said = f"given {len(throttles)} times (expected at most once a path)"
        raise typer.BadParameter(said, param_hint="--throttle")
    engines = tuple(engine or ("auto",))
    unknown = [name for name in engines if name not in ("auto", "posix", "aio", "gds")]
    if unknown:
        said = f"{unknown[0]!r} (expected auto, posix, aio or gds)"
        raise typer.BadParameter(said, param_hint="--engine")
    unknown = [name for name in verify or () if name not in ("off", "checksum")]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} (expected off or checksum)", param_hint="--verify")
    from ssdtrain_plugin.bench.io import IoOptions, measure_io  # torch
    from ssdtrain_plugin.bench.io_report import print_report
    from ssdtrain_plugin.bench.io_sides import VERIFY

    options = IoOptions(size_bytes, block_bytes, threads, rounds, engines, throttles, tuple(verify or VERIFY))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        console=Console(stderr=True),
        auto_refresh=False,  # it would draw while something is timed
        transient=True,
        disable=as_json,
    ) as progress:
        task = progress.add_task("preparing", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=escape(what), completed=done, total=total, refresh=True)

        report = measure_io(paths, options, show)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        print_report(Console(highlight=False), report)


@bench.command("step")
def bench_step(
    path: Annotated[str, typer.Argument(help="A directory on the drive.")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="keep, count, recompute, or a policy; repeat it. By default keep, count and all."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="layers, hidden, heads, sequence, microbatch or dtype; repeat it."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the plugin, for what moves bytes; repeat it."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each strategy that count, interleaved.")] = 5,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=_MOST_THREADS, help="Compute threads; repeat it. By default a run with 1 and one with 2."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure a training step of a transformer beside the same step without the plugin. Exits with 1 if bits differ."""
    # Page-aligned CPU tensors go to the drive and come back without a copy. torch reads
    # this at its first allocation; it is the same for all strategies.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from ssdtrain_plugin.bench.models import DecoderShape  # torch
    from ssdtrain_plugin.bench.step import (
        DEFAULT_OPTIONS,
        DEFAULT_STRATEGIES,
        DEFAULT_THREADS,
        StepSettings,
        measure,
        table_of,
    )

    sizes = _assignments("--model", model)
    unknown = sizes.keys() - {field.name for field in fields(DecoderShape)}
    if unknown:
        said = f"{shown(min(unknown))} (expected a size of the model, see --help)"
        raise typer.BadParameter(said, param_hint="--model")
    try:
        settings = StepSettings(
            path=path,
            shape=DecoderShape(**sizes),
            strategies=tuple(strategy or DEFAULT_STRATEGIES),
            rounds=rounds,
            threads=tuple(threads or DEFAULT_THREADS),
            device=device,
            options={**DEFAULT_OPTIONS, **_assignments("--option", option)},
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _step_progress(settings.num_steps, is_shown=not as_json) as tell:
        report = measure(settings, on_step=tell)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        for run in report.runs:
            Console(highlight=False).print(table_of(run))
    raise typer.Exit(0 if report.is_equal else 1)


def _assignments(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE`` as often as it was given; a value is read as in YAML."""
    values = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{shown(text)} (expected NAME=VALUE)", param_hint=option)
        try:
            values[name.strip()] = parse_yaml(value)
        except ValueError as error:
            raise typer.BadParameter(f"{shown(text)}: {error}", param_hint=option) from None
    return values


@bench.command("adapt")
def bench_adapt(
    path: Annotated[str, typer.Argument(help="A directory on the drive.")],
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each policy and speed that count, interleaved.")] = 5,
    warm_up: Annotated[int, typer.Option(min=2, help="Rounds before them, in which the adaptive policy learns.")] = 5,
    threads: Annotated[int, typer.Option(min=1, max=_MOST_THREADS, help="Compute threads.")] = 1,
    factor: Annotated[
        list[float] | None,
        typer.Option(help="Speed of the drive over what full offload needs; repeat it. By default 0.1 to 4."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for adapt.json and adapt.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Train with every policy on drives of different speeds, beside keeping and recomputing, and the lower bound."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as for `step`
    from ssdtrain_plugin.bench.adapt import FACTORS, AdaptSettings, measure, plot, table_of

    settings = AdaptSettings(
        path=path, rounds=rounds, warm_up_rounds=warm_up, threads=threads, factors=tuple(sorted(factor or FACTORS))
    )
    wrong = [each for each in settings.factors if not 0 < each <= _LARGEST_FACTOR]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]} (expected more than 0, at most {_LARGEST_FACTOR})", param_hint="--factor")
    in_directory(output)
    with _step_progress(settings.num_steps, is_shown=not as_json) as tell:
        report = measure(settings, on_step=tell)
    text = json.dumps(asdict(report), indent=2)
    if output is not None:
        (output / "adapt.json").write_text(text + "\n", encoding="utf-8")
        plot(report, output / "adapt.png")
    if as_json:
        typer.echo(text)
    else:
        Console(highlight=False).print(table_of(report))
    raise typer.Exit(0 if all(cell.summary.is_equal for cell in report.cells) else 1)


@bench.command("rok")
def bench_rok(
    path: Annotated[str, typer.Argument(help="A directory on the drive.")],
    matrix: Annotated[
        Path | None, typer.Argument(metavar="MATRIX.yaml", help="Stacks, sizes and rounds; see configs/bench/.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three small stacks, under ten minutes on two cores.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Directory for the JSON, the picture and a result file.")] = None,
    name: Annotated[str, typer.Option(help="Of these files, without suffix.")] = "rok",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Compare keeping, recomputing, offloading and other tools: speed over memory. Exits with 1 if bits differ."""
    if not name or Path(name).name != name or "\0" in name:
        raise typer.BadParameter(f"{shown(name)} (expected the name of a file)", param_hint="--name")
    if quick is (matrix is not None):
        raise typer.BadParameter("MATRIX.yaml and --quick (expected one of them)")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as for `step`
    from ssdtrain_plugin.bench import rok, rok_report
    from ssdtrain_plugin.bench.matrix import quick_matrix, read_matrix
    from ssdtrain_plugin.integrations import deepspeed_peer

    with _step_progress(1, is_shown=not as_json) as tell, contextlib.ExitStack() as stack:
        chosen = quick_matrix() if matrix is None else read_matrix(matrix)
        if output is not None:
            rok_report.need_matplotlib()
            in_directory(output)
        reason = deepspeed_peer.why_not(device)
        offer = reason or stack.enter_context(deepspeed_peer.cpu_checkpointing())
        others = {deepspeed_peer.NAME: offer}
        report = rok.measure(chosen, path, device=device, others=others, on_step=tell, on_total=tell.expect)
    text = json.dumps(rok.as_dict(report), indent=2)
    if output is not None:
        (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        rok_report.plot(report, output / f"{name}.png")
        command = f"ssdtrain bench rok DRIVE {'--quick' if matrix is None else f'configs/bench/{matrix.name}'}"
        command += "" if device == "cpu" else f" --device {device}"
        today = datetime.now(timezone.utc).date().isoformat()
        result = rok_report.markdown(report, command=command, date=today, picture=f"{name}.png")
        (output / f"{name}.md").write_text(result, encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        _print_wide(table for run in report.runs for table in rok_report.tables_of(report, run))
        for each in report.left_out:
            typer.echo(f"left out: {each.name}: {each.reason}")
        for run in report.runs:
            for sentence, is_met in rok_report.verdicts(run):
                typer.echo(f"{run.stack.name}: {'met' if is_met else 'MISSED'}: {sentence}")
    raise typer.Exit(0 if report.is_equal else 1)


@bench.command("scale")
def bench_scale(
    path: Annotated[str, typer.Argument(help="A directory on the drive.")],
    records: Annotated[
        list[int] | None, typer.Option(min=10, help="Live records; repeat it. By default 100 to 100000.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, max=64, help="Processes on the drive at once, at most; 1, 2, 4 to it.")
    ] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Passes that count, interleaved.")] = 3,
    tensors: Annotated[int, typer.Option(min=1, help="Tensors that each rank saves a pass.")] = 128,
    tensor_size: Annotated[str, typer.Option(help="Bytes of each of them.")] = "1 MiB",
    output: Annotated[Path | None, typer.Option(help="Directory for scale.json and scale.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure what a saved tensor costs with many live records, and with several processes on one drive."""
    tensor_bytes = size_in_bytes("--tensor-size", tensor_size)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as for `step`
    from ssdtrain_plugin.bench.scale import DEFAULT_RECORDS, ScaleSettings, measure, plot, remarks, tables_of

    settings = ScaleSettings(
        path=path,
        records=tuple(sorted(set(records or DEFAULT_RECORDS))),
        ranks=ranks,
        rounds=rounds,
        tensors=tensors,
        tensor_bytes=tensor_bytes,
    )
    in_directory(output)
    with _step_progress(settings.num_steps, is_shown=not as_json) as tell:
        report = measure(settings, on_step=tell)
        if output is not None:
            plot(report, output / "scale.png")
    text = json.dumps(asdict(report), indent=2)
    if output is not None:
        (output / "scale.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    _print_wide(tables_of(report))
    for remark in remarks(report):
        typer.echo(remark)


def _print_wide(tables: Iterable[Table]) -> None:
    """Print tables in full; one fitted to a narrow terminal would lose digits."""
    console = Console(highlight=False)
    for table in tables:
        console.width = max(console.width, console.measure(table, options=console.options.update(width=400)).maximum)
        console.print(table, soft_wrap=True)


class _Bar:
    """Moves a bar when it is told a step's name."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("preparing", total=total)

    def __call__(self, name: str) -> None:
        self._progress.update(self._task, description=escape(name), advance=1, refresh=True)

    def expect(self, total: int) -> None:
        """Say how many steps there will be, once that is known."""
        self._progress.update(self._task, total=total)


@contextlib.contextmanager
def _step_progress(num_steps: int, *, is_shown: bool) -> Iterator[_Bar]:
    """Show a bar that moves when it is told a step's name."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        console=Console(stderr=True),
        auto_refresh=False,  # it would draw while something is timed
        transient=True,
        disable=not is_shown,
    ) as progress:
        yield _Bar(progress, num_steps)
