"""A projection as tables for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from rich.console import Group as Together
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ssdtrain_plugin.projection.endurance import DAY_SECONDS, YEAR_SECONDS, DriveLife
from ssdtrain_plugin.projection.projection import ASSUMPTIONS, Projection
from ssdtrain_plugin.projection.sweep import SweepPoint
from ssdtrain_plugin.units import format_bytes, format_rate, format_seconds

__all__ = ["format_life", "inputs", "plain_table", "tables", "titled"]


def format_life(years: float) -> str:
    """Write a life in years, or in days if it is short.

    Args:
        years: May be infinite.
    """
    if math.isinf(years):
        return "no limit"
    return f"{years:.1f} years" if years >= 1 else f"{years * YEAR_SECONDS / DAY_SECONDS:.1f} days"


def tables(found: Projection) -> RenderableType:
    """Show everything.

    Args:
        found: Of :func:`ssdtrain_plugin.projection.project`.
    """
    options = Text(json.dumps({"ssdtrain": dict(found.config)}, indent=2))
    parts: Sequence[tuple[str, RenderableType]] = (
        ("", inputs(found)),
        ("saved in one micro-batch on one rank, by tensor", _tensors(found)),
        ("stages", _stages(found)),
        ("a step, and the drives of one rank", _summary(found)),
        ("life of the drives of one rank", _lives(found)),
        ("other micro-batches, at the same sequences a step", _sweep(found.sweep)),
        ("other micro-batches, at the same number of them a step", _sweep(found.growth)),
        ("assumptions", Text("\n".join(f"- {line}" for line in ASSUMPTIONS))),
        ("options, for DeepSpeed's JSON; the same names elsewhere", options),
    )
    return Together(*titled(parts))


def titled(parts: Sequence[tuple[str, RenderableType]]) -> Iterator[RenderableType]:
    """Put titles above some parts.

    Args:
        parts: Title, which may be empty, and part.
    """
    for title, part in parts:
        if title:
            yield Text(f"\n{title}", style="bold")
        yield part


def plain_table(*columns: str) -> Table:
    """Make a table without lines.

    Args:
        *columns: Their heads; the first one is that of names.
    """
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def inputs(found: Projection) -> Table:
    """Show what was planned for.

    Args:
        found: The plan.
    """
    model, cluster = found.model, found.cluster
    split, batch, gpu, drive = cluster.parallel, cluster.batch, cluster.gpu, cluster.drive
    rate = f"{_teraflops(cluster.flops_per_second)} of {_teraflops(gpu.peak_flops_per_second)} TFLOP/s assumed"
    mapping = f"TP {split.tp}{' with SP' if split.sp else ''}, PP {split.pp}, DP {split.dp}, ZeRO {split.zero}"
    return _pairs(
        [
            ("model", f"{model.name}: {_many(found.parameters)} parameters  {_source(model.source)}"),
            ("GPUs", f"{cluster.gpus} {gpu.name}, {rate}  {_source(gpu.source)}"),
            ("mapping", f"{mapping}; micro-batch {batch.micro_batch}, {batch.micro_batches} a step and replica"),
            ("drives", f"{cluster.drives_per_gpu} {drive.name} a GPU  {_source(drive.source)}"),
        ]
    )


def _teraflops(flops_per_second: float) -> str:
    value = flops_per_second / 1e12
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def _many(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e8 else f"{count / 1e6:.1f} million"


def _source(text: str) -> str:
    return f"[{text}]" if text else ""


def _tensors(found: Projection) -> Table:
    """List the tensors of the stage that has most to write."""
    plan = found.worst
    table = plain_table(f"stage {plan.stage.index}", "shape", "type", "each", "in a part", "parts", "in all", "share")
    for group in plan.stage.groups:
        for tensor in group.tensors:
            nbytes = group.count * tensor.nbytes
            table.add_row(
                f"{group.name}.{tensor.name}",
                " x ".join(map(str, tensor.shape)),
                tensor.dtype,
                format_bytes(tensor.one_bytes),
                str(tensor.count),
                str(group.count),
                format_bytes(nbytes),
                f"{nbytes / plan.saved_bytes:.1%}",
            )
    table.add_row("all", "", "", "", "", "", format_bytes(plan.saved_bytes), "100.0%", style="bold")
    return table


def _stages(found: Projection) -> Table:
    columns = ("stage", "layers", "saved", "in flight", "forward", "backward", "write", "static memory")
    table = plain_table(*columns)
    plans = found.stages
    shown = plans if len(plans) <= 8 else (plans[0], plans[1], plans[-1])
    for plan in shown:
        table.add_row(
            str(plan.stage.index),
            str(len(plan.stage.blocks)),
            format_bytes(plan.saved_bytes),
            f"{plan.in_flight:g}",
            format_seconds(plan.time.forward_seconds),
            format_seconds(plan.time.backward_seconds),
            format_rate(plan.need.write_bytes_per_second),
            format_bytes(plan.static.nbytes),
        )
    if len(shown) < len(plans):
        table.caption = f"stages 1 to {len(plans) - 2} are alike"
    return table


def _summary(found: Projection) -> Table:
    step, need, limits, cluster = found.step, found.worst.need, found.limits, found.cluster
    parts = [
        f"{format_seconds(step.compute_seconds)} compute",
        f"bubble {step.bubble_share:.1%}",
        f"weights {step.update_share:.1%}",
        f"{found.model_utilization:.1%} of the GPUs' peak",
    ]
    budget = f"of {format_bytes(cluster.memory_budget_bytes)}"
    given = f"{cluster.drives_per_gpu} given: they hide {found.hidden_share:.0%} of the bytes"
    fits = {None: "", True: " (it has them)", False: " (it has not)"}[found.host.fits]
    return _pairs(
        [
            ("step", f"{format_seconds(step.seconds)}: {', '.join(parts)}"),
            (
                "write",
                f"{format_rate(need.write_bytes_per_second)} in half of the step, "
                f"{format_rate(need.write_in_forward_bytes_per_second)} to end with forward",
            ),
            ("read", f"{format_rate(need.read_bytes_per_second)} in backward"),
            ("room", f"{format_bytes(found.occupied_bytes)} on the drives"),
            ("drives", f"{found.need.drives} needed (for {found.need.limited_by}), {given}"),
            (
                "largest micro-batch",
                f"{limits.keep} kept, {limits.recompute} recomputed, {limits.offload} offloaded, {budget}",
            ),
            (
                "host memory",
                f"{format_bytes(found.host.staging_bytes)} a node for staging; {format_bytes(found.host.tier_bytes)} "
                f"a node to hold everything without drives{fits}",
            ),
        ]
    )


def _lives(found: Projection) -> Table:
    plan, credit = found.worst, found.cluster.endurance
    waf = f"WAF {credit.rating_waf:g} / {credit.workload_waf:g}"
    table = plain_table("", "written", "by the rating", f"+ {waf}", f"+ retention {credit.retention_credit:g}x")
    rows: Sequence[tuple[str, DriveLife]] = (
        ("in a step's time", plan.life),
        ("micro-batches without a pause", plan.busy_life),
    )
    for name, life in rows:
        years = (life.rated_years, life.sequential_years, life.retention_years)
        table.add_row(name, format_rate(life.written_bytes_per_second), *map(format_life, years))
    return table


def _sweep(points: Sequence[SweepPoint]) -> Table:
    table = plain_table("micro-batch", "a step", "step", "bubble", "weights", "speed", "write", "memory allows")
    for point in points:
        table.add_row(
            str(point.micro_batch),
            str(point.micro_batches),
            format_seconds(point.step.seconds),
            f"{point.bubble_share:.1%}",
            f"{point.update_share:.1%}",
            f"{point.speedup:.2f}",
            format_rate(point.write_bytes_per_second),
            ", ".join(point.fits) or "none",
        )
    return table
