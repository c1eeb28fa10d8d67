"""What ``ssdtrain bench rok`` shows: tables, the ROK picture and a result file in Markdown."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

from ssdtrain_plugin.bench.matrix import OUR_STRATEGIES
from ssdtrain_plugin.bench.rok import BASELINE, EqualBatch, EqualMemory, RokBench, StackRun
from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.units import MIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["markdown", "need_matplotlib", "plot", "tables_of", "verdicts"]

_OFFLOADS = ("all", "adaptive")
_MOST_SECONDS = 1.02
_LEAST_MICROBATCH = 2.0

# Of the palette of Okabe and Ito, which colour-blind people can tell apart; with markers and names besides.
_STYLES = {
    "keep": ("black", "o"),
    "recompute": ("#CC79A7", "s"),
    "selective": ("#CC79A7", "D"),
    "all": ("#D55E00", "^"),
    "adaptive": ("#0072B2", "v"),
    "host": ("#009E73", "P"),
}
_LABEL_WIDTH, _LABEL_HEIGHT = 0.15, 0.032  # shares of a panel
_PEER_STYLES = (("#E69F00", "X"), ("#56B4E9", "*"), ("#999999", "<"), ("#999999", ">"), ("#999999", "h"))


# --- rows, for the terminal and for the file


def _equal_batch_rows(run: StackRun) -> tuple[list[str], list[list[str]]]:
    names = [
        "strategy",
        "step",
        "range",
        f"x of {BASELINE}",
        "quartiles",
        "CPU, x",
        "tokens/s",
        "GFLOP/s",
        "activation peak",
        f"x of {BASELINE}",
        "memory of a step",
        "moved out",
        "moved back",
        "waited",
        "gradients",
    ]
    return names, [_equal_batch_cells(each) for each in run.equal_batch]


def _equal_batch_cells(each: EqualBatch) -> list[str]:
    summary = each.summary
    return [
        each.strategy,
        format_seconds(summary.seconds),
        f"{format_seconds(summary.lowest_seconds)} - {format_seconds(summary.highest_seconds)}",
        f"{summary.median_of_ratios:.3f}",
        f"{summary.first_quartile_of_ratios:.3f} - {summary.third_quartile_of_ratios:.3f}",
        f"{summary.cpu_ratio:.2f}",
        f"{each.tokens_per_second:.0f}",
        f"{each.flops_per_second / 1e9:.1f}",
        format_bytes(each.peak_bytes),
        f"{each.peak_ratio:.2f}",
        _size(each.memory_bytes),
        _size(each.stored_bytes),
        _size(each.loaded_bytes),
        format_seconds(summary.stall_seconds) if each.strategy in (*_OFFLOADS, "host") else "-",
        "equal, all bits" if summary.is_equal else "DIFFERENT",
    ]


def _size(nbytes: float | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)


def _equal_memory_rows(run: StackRun) -> tuple[list[str], list[list[str]]]:
    names = [
        "strategy",
        "micro-batch",
        f"x of {BASELINE}",
        "activation peak",
        "peak in the rounds",
        "step",
        "range",
        "tokens/s",
        "GFLOP/s",
        f"x of {BASELINE}",
    ]
    base = next(each for each in run.equal_memory if each.strategy == BASELINE)
    return names, [_equal_memory_cells(each, base) for each in run.equal_memory]


def _equal_memory_cells(each: EqualMemory, base: EqualMemory) -> list[str]:
    if not each.microbatch:
        return [each.strategy, "none fits", *["-"] * 8]
    more = " and more" if each.is_limited else ""
    has_base = base.microbatch > 0
    return [
        each.strategy,
        f"{each.microbatch}{more}",
        f"{each.microbatch / base.microbatch:.2f}{more}" if has_base else "-",
        format_bytes(each.peak_bytes),
        _size(each.run_peak_bytes),
        format_seconds(each.seconds),
        f"{format_seconds(each.lowest_seconds)} - {format_seconds(each.highest_seconds)}",
        f"{each.tokens_per_second:.0f}",
        f"{each.flops_per_second / 1e9:.1f}",
        f"{each.tokens_per_second / base.tokens_per_second:.3f}" if has_base else "-",
    ]


def _titles(report: RokBench, run: StackRun) -> tuple[str, str]:
    stack, matrix = run.stack, report.matrix
    return (
        f"{stack.name}: {stack.microbatch} sequences a micro-batch "
        f"(medians of {matrix.rounds} interleaved rounds, ratios by round)",
        f"{stack.name}: the largest micro-batch within {format_bytes(run.budget_bytes)} of activations, "
        f"{matrix.budget:.0%} of {BASELINE}'s peak (medians of {matrix.budget_rounds} interleaved rounds)",
    )


def tables_of(report: RokBench, run: StackRun) -> list[Table]:
    """Set out one stack.

    Args:
        report: Of :func:`ssdtrain_plugin.bench.rok.measure`.
        run: One of its runs.
    """
    tables = []
    for title, (names, rows) in zip(
        _titles(report, run), (_equal_batch_rows(run), _equal_memory_rows(run)), strict=True
    ):
        table = Table(title=title)
        for name in names:
            table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*cells)
        tables.append(table)
    return tables


# --- what was to be shown


def verdicts(run: StackRun) -> Iterator[tuple[str, bool]]:
    """Compare the plugin's two policies with what they are meant to reach; a sentence each, and whether it is met.

    Args:
        run: Of one stack.
    """
    same = {each.strategy: each for each in run.equal_batch}
    fitted = {each.strategy: each for each in run.equal_memory}
    for name in (name for name in _OFFLOADS if name in same):
        each = same[name]
        ratio = each.summary.median_of_ratios
        because = (
            f"training waited {format_seconds(each.summary.stall_seconds)} a step, "
            f"CPU time {each.summary.cpu_ratio:.2f} x of {BASELINE}, "
            f"quartiles {each.summary.first_quartile_of_ratios:.3f} - {each.summary.third_quartile_of_ratios:.3f}"
        )
        yield (
            f"`{name}`: step time {ratio:.3f} x of {BASELINE} (at most {_MOST_SECONDS}); {because}",
            (ratio <= _MOST_SECONDS),
        )
        if "recompute" in same:
            other = same["recompute"]
            yield (
                f"`{name}`: activation peak {each.peak_ratio:.2f} x of {BASELINE} "
                f"(below recomputation's {other.peak_ratio:.2f})",
                each.peak_bytes < other.peak_bytes,
            )
        mine, base = fitted[name].microbatch, fitted[BASELINE].microbatch
        share = (fitted[name].run_peak_bytes or 0) / run.budget_bytes
        yield (
            f"`{name}`: {mine} sequences within the budget, {BASELINE} {base} (at least {_LEAST_MICROBATCH:g} x); "
            f"in the timed rounds its peak was {share:.2f} x of the budget",
            mine > 0 and mine >= _LEAST_MICROBATCH * base,
        )


# --- the result file


def markdown(report: RokBench, *, command: str, date: str, picture: str) -> str:
    """Write the result file.

    Args:
        report: Of :func:`ssdtrain_plugin.bench.rok.measure`.
        command: That was run.
        date: Of the run.
        picture: Name of the picture's file, beside this one.
    """
    matrix = report.matrix
    parts = [
        f"# {date}: `ssdtrain bench rok`",
        f"Machine: {report.machine.sentences()} Only ratios of one interleaved run mean something.",
        f"```\n{command}\n```",
        f"All strategies take turns on the same weights and batches, {matrix.threads} compute threads, device "
        f"{report.device}, {matrix.rounds} rounds after {matrix.warm_up_rounds} to warm up. The activation peak is "
        "that of live saved bytes on the device, counted for all in the same way; what moved to host memory or the "
        "drive is not in it. The memory of a step is what it adds to the process, or to the device with CUDA: "
        "gradients, staging memory and copies in host memory are in it. FLOP/s are of the model, recomputation does "
        "not count.",
        f"![throughput over activation peak]({picture})",
        "\n".join(f"- `{each.strategy}`: {each.about}." for each in report.runs[0].equal_batch),
    ]
    if report.left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {each.name}: {each.reason}." for each in report.left_out))
    for run in report.runs:
        stack = run.stack
        parts.append(
            f"## {stack.name}\n\n{stack.family}, {stack.layers} layers, hidden {stack.hidden}, {stack.heads} heads, "
            f"sequence {stack.sequence}, {stack.dtype}, {stack.attention} attention, "
            f"{run.num_parameters / 1e6:.1f} M parameters."
        )
        tables = (_equal_batch_rows(run), _equal_memory_rows(run))
        for title, (names, rows) in zip(_titles(report, run), tables, strict=True):
            heading = title.removeprefix(f"{stack.name}: ")
            parts += [f"**{heading[0].upper()}{heading[1:]}**", _markdown_table(names, rows)]
        parts.append("\n".join(f"- {'met' if is_met else 'MISSED'}: {text}." for text, is_met in verdicts(run)))
    return "\n\n".join(parts) + "\n"


def _markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- the picture


def need_matplotlib() -> None:
    """Refuse early where no picture can be drawn.

    Raises:
        EnvironmentUnsupportedError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentUnsupportedError(
            "cannot draw: matplotlib is not installed (expected the extra `bench`)",
            hint='run `pip install "ssdtrain-plugin[bench]"`, or leave `--output` out',
        )


def plot(report: RokBench, path: Path) -> None:
    """Draw throughput over activation peak, a panel a stack.

    Args:
        report: Of :func:`ssdtrain_plugin.bench.rok.measure`.
        path: Of the picture; its suffix is the format.

    Raises:
        EnvironmentUnsupportedError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(report.runs)
    figure = Figure(figsize=(6.4 * count, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, run in zip(panels, report.runs, strict=True):
        _draw(axes, run)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4 * count))
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, run: StackRun) -> None:
    fitted = {each.strategy: each for each in run.equal_memory if each.microbatch}
    peers = [each.strategy for each in run.equal_batch if each.strategy not in OUR_STRATEGIES]
    names: list[_Label] = []
    numbers: list[_Label] = []
    for each in run.equal_batch:
        peer_style = (
            _PEER_STYLES[peers.index(each.strategy) % len(_PEER_STYLES)] if each.strategy in peers else ("", "")
        )
        colour, marker = _STYLES.get(each.strategy, peer_style)
        x, y, summary = each.peak_bytes / MIB, each.tokens_per_second, each.summary
        slow, fast = (y * summary.seconds / other for other in (summary.highest_seconds, summary.lowest_seconds))
        axes.plot([x, x], [slow, fast], color=colour, linewidth=1, alpha=0.6)
        axes.plot([x], [y], color=colour, marker=marker, markersize=9, linestyle="none", label=each.strategy)
        names.append(_Label(x, y, each.strategy, colour))
        if each.strategy in fitted:
            found = fitted[each.strategy]
            there = (found.peak_bytes / MIB, found.tokens_per_second)
            axes.plot([x, there[0]], [y, there[1]], color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
            axes.plot(*([value] for value in there), color=colour, marker=marker, markersize=9, fillstyle="none")
            numbers.append(_Label(*there, str(found.microbatch), colour))
    axes.axvline(run.budget_bytes / MIB, color="grey", linestyle="--", linewidth=0.9)
    axes.annotate(" budget", (run.budget_bytes / MIB, 0.01), xycoords=("data", "axes fraction"), color="grey")
    axes.set_xlim(0, 1.25 * max(axes.dataLim.x1, run.budget_bytes / MIB))
    axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    _write(axes, names, is_left=False)
    _write(axes, numbers, is_left=True)
    axes.set_xlabel("peak of live activations (MiB)")
    axes.set_ylabel("tokens a second")
    axes.set_title(f"{run.stack.name}: filled {run.stack.microbatch} sequences, hollow as many as the budget holds")
    axes.grid(visible=True, alpha=0.3)


class _Label(NamedTuple):
    x: float
    y: float
    text: str
    colour: str


def _write(axes: Axes, labels: Sequence[_Label], *, is_left: bool) -> None:
    """Write beside points, one below the other where they are close."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[1]
    written: list[tuple[float, float]] = []
    for label in sorted(labels, key=lambda label: -label.y):
        y = label.y + _LABEL_HEIGHT * height / 2
        for other_x, other_y in written:
            if abs(other_x - label.x) < _LABEL_WIDTH * width:
                y = min(y, other_y - _LABEL_HEIGHT * height)
        written.append((label.x, y))
        x = label.x + (-1 if is_left else 1) * 0.018 * width
        axes.text(x, y, label.text, fontsize=8, color=label.colour, ha="right" if is_left else "left", va="center")
