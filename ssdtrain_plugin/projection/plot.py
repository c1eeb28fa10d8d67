"""The picture of ``ssdtrain plan``: where a step's time goes, against the micro-batch (SSDTrain, Fig. 8)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.projection.projection import Projection
from ssdtrain_plugin.projection.sweep import SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]


def draw(found: Projection, path: Path) -> None:
    """Draw shares of the step and the needed bandwidth over the micro-batch.

    Args:
        found: Of :func:`ssdtrain_plugin.projection.project`.
        path: Of the picture; its suffix is the format.

    Raises:
        EnvironmentUnsupportedError: matplotlib is missing, cannot write such a format, or cannot write there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentUnsupportedError(
            f"cannot draw `{path}`: matplotlib is not installed (expected the extra `bench`)",
            hint='run `pip install "ssdtrain-plugin[bench]"`, or leave `--plot` out',
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    same, growing, rates = figure.subplots(1, 3)
    _draw_shares(same, found.sweep, "same sequences a step")
    _draw_shares(growing, found.growth, "same number of micro-batches a step")
    _draw_rates(rates, found)
    for axes in (same, growing, rates):
        axes.set_xlabel("micro-batch (sequences)")
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"{found.model.name} on {found.cluster.gpus} {found.cluster.gpu.name}: a model, not a measurement")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise EnvironmentUnsupportedError(
            f"cannot draw `{path}`: {error}", hint="name a file that ends in .png, .svg or .pdf, in a directory"
        ) from None


def _draw_shares(axes: Axes, points: Sequence[SweepPoint], title: str) -> None:
    # Of the palette of Okabe and Ito, which colour-blind people can tell apart; with hatches and markers besides.
    below = [0.0] * len(points)
    for name, values, colour, hatch in (
        ("pipeline bubble", [100 * point.bubble_share for point in points], "#E69F00", "//"),
        ("weights: accumulate, update, exchange", [100 * point.update_share for point in points], "#0072B2", ".."),
    ):
        axes.bar(range(len(points)), values, bottom=below, color=colour, hatch=hatch, edgecolor="white", label=name)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_xticks(range(len(points)), [str(point.micro_batch) for point in points])
    axes.set_ylim(top=max(1.0, 1.3 * max(below)))
    axes.set_ylabel("share of the step (%)")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left")


def _draw_rates(axes: Axes, found: Projection) -> None:
    sizes = [point.micro_batch for point in found.growth]
    axes.plot(
        sizes,
        [point.write_bytes_per_second / 1e9 for point in found.growth],
        color="#D55E00",
        marker="o",
        label="needed to write",
    )
    count = found.cluster.drives_per_gpu
    given = count * found.cluster.drive.write_bytes_per_second / 1e9
    axes.axhline(given, color="black", linestyle="--", label=f"{count} drive{'s' if count > 1 else ''}")
    for name, line in (("keep", ":"), ("recompute", "-."), ("offload", "-")):
        limit = getattr(found.limits, name)
        if sizes[0] <= limit <= sizes[-1]:
            axes.axvline(limit, color="#009E73", linestyle=line, label=f"largest that fits: {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s a GPU")
    axes.set_title("bandwidth to write")
    axes.legend(frameon=False)
