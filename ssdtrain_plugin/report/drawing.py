"""The pictures of the report, by matplotlib.

Note [Colours]. The palette is that of Okabe and Ito, which colour-blind people can tell apart, and
no meaning hangs on colour alone: lines differ in their dashes, bars in their row or their hatch.
In the page the same picture is read on white and on black, so its colours there are CSS variables.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.report.numbers import Chart, bandwidth, memory, tracks_of
from ssdtrain_plugin.report.reading import RankRecord, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MAX_RANKS", "THEMES", "Picture", "as_png", "as_svg", "pictures", "write_pngs"]

MAX_RANKS = 8
MIB, GB = 2**20, 1e9

# Role: on white, on black. Each is matplotlib's colour in the PNG, and a variable in the page.
THEMES = {
    "ink": ("#1a1a1a", "#e8e8e8"),
    "grid": ("#d5d5d5", "#444444"),
    "blue": ("#0072b2", "#4aa3df"),
    "orange": ("#e69f00", "#f0b429"),
    "green": ("#009e73", "#2ec99b"),
    "red": ("#d55e00", "#ff8a3d"),
    "purple": ("#cc79a7", "#e39ac2"),
    "grey": ("#8a8a8a", "#9a9a9a"),
    "inside": ("#ffffff", "#101214"),
}
COLOURS = {role: light for role, (light, _) in THEMES.items()}

# Name of a series: colour and dashes.
STYLES = {
    "without the plugin": ("grey", "--"),
    "device memory": ("blue", "-"),
    "host memory": ("green", "-."),
    "drive": ("orange", ":"),
    "store to drive": ("green", "-"),
    "load from drive": ("purple", "--"),
    "store to host memory": ("blue", "-."),
    "load from host memory": ("orange", ":"),
}
_RANK_STYLES = [(colour, dashes) for dashes in ("-", "--") for colour in ("blue", "orange", "green", "purple")]
_MARKERS = "osD^vPX*"


class Picture:
    """One picture.

    Args:
        name: Of its file, without suffix.
        title: Above it.
        alt: What it shows, in words, for those who cannot see it.
        figure: Drawn.
    """

    def __init__(self, name: str, title: str, alt: str, figure: Figure) -> None:
        """Keep all four."""
        self.name = name
        self.title = title
        self.alt = alt
        self.figure = figure


def pictures(run: Run, step: int | None) -> list[Picture]:
    """Draw all that the run has numbers for.

    Args:
        run: All ranks; of many, the first :data:`MAX_RANKS` are drawn.
        step: Whose time line is drawn; None if there is none.

    Raises:
        EnvironmentUnsupportedError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentUnsupportedError(
            "cannot draw the report: matplotlib is not installed (expected the extra `bench`)",
            hint='run `pip install "ssdtrain-plugin[bench]"`',
        )
    found = []
    if step is not None:
        found += [_memory(run), _timeline(run, step), _bandwidth(run)]
    return [*found, _steps(run)]


def as_png(picture: Picture) -> bytes:
    """Render on white.

    Args:
        picture: One.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    picture.figure.patch.set_visible(True)
    FigureCanvasAgg(picture.figure).print_figure(file, dpi=130, format="png")
    return file.getvalue()


def as_svg(picture: Picture) -> str:
    """Render as an element of a page, with colours from its style sheet and text that can be searched.

    Args:
        picture: One.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    picture.figure.patch.set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name}):
        canvas = FigureCanvasSVG(picture.figure)
        canvas.print_figure(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several pictures share the page, and with it the names of their parts.
    text = re.sub(r'\bid="', f'id="{picture.name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{picture.name}-", text)
    for role, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{role})")
    return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def _figure(num_rows: int, row_inches: float, *, shares_x: bool = True) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.7 + row_inches * num_rows), layout="constrained")
    rows = [row[0] for row in figure.subplots(num_rows, 1, sharex=shares_x, squeeze=False)]
    for axes in rows:
        axes.grid(visible=True, color=COLOURS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        axes.tick_params(colors=COLOURS["ink"], labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(COLOURS["grid"])
    return figure, rows


def _label(axes: Axes, *, x: str = "", y: str = "", title: str = "") -> None:
    axes.set_xlabel(x, color=COLOURS["ink"])
    axes.set_ylabel(y, color=COLOURS["ink"])
    if title:
        axes.set_title(title, color=COLOURS["ink"], loc="left", fontsize=10)


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(
        handles, labels, loc="outside upper right", ncols=min(len(labels), 7), frameon=False, fontsize=9,
        labelcolor=COLOURS["ink"],
    )  # fmt: skip


def _lines(charts: list[Chart], unit: float, y: str, draw: Callable[..., Any]) -> Figure:
    charts = charts[:MAX_RANKS]
    figure, rows = _figure(len(charts), 1.9)
    seen: dict[str, Any] = {}
    for axes, chart in zip(rows, charts, strict=True):
        for series in chart.series:
            colour, dashes = STYLES[series.name]
            values = [value / unit for value in series.y]
            style = {"color": COLOURS[colour], "linestyle": dashes, "linewidth": 1.6, "label": series.name}
            seen[series.name] = draw(axes, series.x, values, **style)[0]
        axes.set_ylim(bottom=0)
        _label(axes, y=y, title=f"rank {chart.rank}")
    _label(rows[-1], x="seconds since the first recorded step began", y=y, title=f"rank {charts[-1].rank}")
    _legend(figure, list(seen.values()), list(seen))
    return figure


def _memory(run: Run) -> Picture:
    def draw(axes: Axes, x: list[float], y: list[float], **style: Any) -> list[Any]:
        if style["label"] == "without the plugin":
            return [axes.fill_between(x, y, step="post", color=style["color"], alpha=0.35, linewidth=0)]
        return list(axes.plot(x, y, drawstyle="steps-post", **style))

    alt = "Saved bytes over time for each rank: in device memory, without the plugin, in host memory and on the drive."
    return Picture("memory", "Memory over time", alt, _lines(memory(run), MIB, "MiB", draw))


def _bandwidth(run: Run) -> Picture:
    figure = _lines(bandwidth(run), GB, "GB/s", lambda axes, x, y, **style: axes.plot(x, y, **style))
    alt = "Bytes a second over time for each rank, stores and loads apart, drive and host memory apart."
    return Picture("bandwidth", "Bandwidth", alt, figure)


def _steps(run: Run) -> Picture:
    """Draw peak and stall of every step, recorded or not."""
    figure, (peak, stall) = _figure(2, 2.1)
    entries: dict[str, Any] = {}
    for index, rank in enumerate(run.ranks[:MAX_RANKS]):
        colour, dashes = _RANK_STYLES[index]
        numbers = [step.step for step in rank.steps]
        style: dict[str, Any] = {"color": COLOURS[colour], "linestyle": dashes, "marker": _MARKERS[index]}
        style |= {"markersize": 4 if len(numbers) < 100 else 0}
        (handle,) = peak.plot(numbers, [step.peak_activation_bytes / MIB for step in rank.steps], **style)
        without = [step.saved_bytes / MIB for step in rank.steps]
        (grey,) = peak.plot(numbers, without, color=COLOURS["grey"], linestyle="--", linewidth=1)
        stall.plot(numbers, [1e3 * step.stall_seconds for step in rank.steps], **style)
        entries |= {f"rank {rank.rank}": handle, "without the plugin": grey}
    from matplotlib.ticker import MaxNLocator

    for axes in (peak, stall):
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(peak, y="MiB", title="activations, highest in device memory")
    _label(stall, x="step", y="ms", title="training waited for transfers")
    _legend(figure, list(entries.values()), list(entries))
    alt = "For every step and rank: the highest number of live activation bytes, and how long training waited."
    return Picture("steps", "Peak and stalls, step by step", alt, figure)


# ---------------------------------------------------------------------- the time line


def _timeline(run: Run, step: int) -> Picture:
    ranks = [rank for rank in run.traced if any(each.step == step for each in rank.traced_steps)][:MAX_RANKS]
    figure, rows = _figure(len(ranks), 2.0)
    spans = [(rank, each) for rank in ranks for each in rank.traced_steps if each.step == step]
    origin = min(run.seconds_of(rank, each.begin) for rank, each in spans)
    is_long = max(run.seconds_of(rank, each.end) for rank, each in spans) - origin > _MOST_MILLISECONDS / 1e3
    unit, per_second = ("seconds", 1.0) if is_long else ("milliseconds", 1e3)
    for axes, rank in zip(rows, ranks, strict=True):
        _draw_rank(axes, rank, step, partial(_since, run, rank, origin, per_second))
        _label(axes, title=f"rank {rank.rank}")
    _label(rows[-1], x=f"{unit} since step {step} began", title=f"rank {ranks[-1].rank}")
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=COLOURS[colour], hatch=hatch, edgecolor=COLOURS["inside"]) for _, colour, hatch in _BARS]
    _legend(figure, patches, [name for name, _, _ in _BARS])
    alt = (
        "Time line of one step for each rank: forward and backward passes with the number of their micro-batch, other "
        "instructions of the schedule, waits, stores and loads."
    )
    return Picture("timeline", f"Input, output and compute in step {step}", alt, figure)


_BARS = [
    ("forward", "blue", ""),
    ("backward", "orange", "///"),
    ("other instruction", "grey", "..."),
    ("training waits", "red", ""),
    ("store", "green", ""),
    ("load", "purple", ""),
    ("load on demand", "purple", "xxxx"),
]
_MOST_MILLISECONDS = 10_000  # a longer step is drawn in seconds
_LANES = {"compute": 3, "wait": 2, "store": 1, "load": 0}


def _since(run: Run, rank: RankRecord, origin: float, per_second: float, clock_seconds: float) -> float:
    return per_second * (run.seconds_of(rank, clock_seconds) - origin)


def _draw_rank(axes: Axes, rank: RankRecord, step: int, at: Callable[[float], float]) -> None:
    def bars(spans: list[tuple[float, float]], low: float, height: float, colour: str, hatch: str = "") -> None:
        places = [(at(begin), max(at(end) - at(begin), 1e-4)) for begin, end in spans]
        axes.broken_barh(
            places, (low, height), facecolor=COLOURS[colour], hatch=hatch, edgecolor=COLOURS["inside"],
            linewidth=0.3 if hatch else 0,
        )  # fmt: skip

    passes = [each for each in rank.passes if each.step == step]
    first = min((each.microbatch for each in passes if each.kind == "forward"), default=0)
    instructions = [(each.begin, each.end) for each in rank.instructions if each.step == step]
    bars(instructions, _LANES["compute"] + 0.25, 0.3, "grey", "...")
    for kind, colour, hatch in (("forward", "blue", ""), ("backward", "orange", "///")):
        bars([(each.begin, each.end) for each in passes if each.kind == kind], 3.1, 0.6, colour, hatch)
    whole = next(each for each in rank.traced_steps if each.step == step)
    for each in passes:
        if each.end - each.begin > 0.015 * (whole.end - whole.begin):
            axes.text(
                at((each.begin + each.end) / 2), 3.4, str(each.microbatch - first), ha="center", va="center",
                fontsize=8, color=COLOURS["inside"], fontweight="bold",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": COLOURS["ink"], "edgecolor": "none"},
            )  # fmt: skip
    bars([(each.begin, each.end) for each in rank.waits if each.step == step], 2.15, 0.5, "red")
    moved = [each for each in rank.transfers if each.step == step and each.outcome != "cancelled"]
    for lane, colour, directions in (("store", "green", ("store", "spill")), ("load", "purple", ("load", "promote"))):
        tracks = tracks_of([each for each in moved if each.direction in directions])
        height = 0.8 / max(len(tracks), 1)
        for index, track in enumerate(tracks):
            for hatch in ("", "xxxx"):
                spans = [(each.begin, each.end) for each in track if each.is_on_demand == bool(hatch)]
                bars(spans, _LANES[lane] + index * height, 0.85 * height, colour, hatch)
    axes.set_xlim(min(0.0, at(whole.begin)), 1.01 * at(whole.end))
    axes.set_ylim(-0.1, 3.9)
    axes.set_yticks([low + 0.4 for low in _LANES.values()], list(_LANES))
    axes.grid(visible=False, axis="y")


def write_pngs(found: Sequence[Picture], stem: Path) -> list[Path]:
    """Write each picture beside the page.

    Args:
        found: The pictures.
        stem: Of the page, without suffix.

    Returns:
        Where they are.
    """
    paths = [stem.with_name(f"{stem.name}-{picture.name}.png") for picture in found]
    for path, picture in zip(paths, found, strict=True):
        path.write_bytes(as_png(picture))
    return paths
