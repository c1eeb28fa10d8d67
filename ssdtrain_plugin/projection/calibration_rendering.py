"""A calibration as tables for a terminal, and as what ``--json`` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from rich.console import Group as Together
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ssdtrain_plugin.projection.calibration import Calibration, StageComparison
from ssdtrain_plugin.projection.rendering import format_life, inputs, plain_table, titled
from ssdtrain_plugin.projection.report import as_dict
from ssdtrain_plugin.projection.terms import Term
from ssdtrain_plugin.units import format_bytes, format_rate, format_seconds

__all__ = ["calibration_as_dict", "calibration_tables", "pasted"]

_MOST_STAGES = 8
_MOST_PLACES = 3


def pasted(found: Calibration) -> str:
    """Write what the run reached as fields of CLUSTER.yaml; empty if it could tell nothing.

    Args:
        found: The calibration.
    """
    reached = found.reached
    fields: dict[str, Any] = {}
    if reached.achieved_tflops is not None:
        fields["achieved_tflops"] = reached.achieved_tflops
    names = ("write_bytes_per_second", "read_bytes_per_second")
    drive = {name: round(getattr(reached, name)) for name in names if getattr(reached, name) is not None}
    if drive:
        fields["drive"] = drive
    return yaml.safe_dump(fields, sort_keys=False).rstrip() if fields else ""


# ---------------------------------------------------------------------- tables


def calibration_tables(found: Calibration) -> RenderableType:
    """Show everything.

    Args:
        found: Of :func:`ssdtrain_plugin.projection.calibration.calibrate`.
    """
    parts: list[tuple[str, RenderableType]] = [
        ("", inputs(found.planned)),
        (
            f"the plan against the run: medians of {found.num_steps} steps, {found.num_traced_steps} traced",
            _terms(found),
        ),
        ("not recorded", Text("\n".join(_reasons(found)) or "nothing is missing")),
        ("saved tensors of a micro-batch, plan against run", _tensors(found)),
        ("the plan with what the run reached", _changes(found)),
    ]
    fields = pasted(found)
    if fields:
        note = "# in place of `efficiency` or `achieved_tflops`, and of the same fields of `drive`"
        parts.append(("fields for the cluster's file", Text(f"{note}\n{fields}")))
    if found.warnings:
        parts.append(("mind", Text("\n".join(f"- {line}" for line in found.warnings))))
    return Together(*titled(parts))


def _shown(found: Calibration) -> Sequence[StageComparison]:
    stages = found.stages
    return stages if len(stages) <= _MOST_STAGES else (stages[0], stages[1], stages[-1])


def _terms(found: Calibration) -> Table:
    stages = _shown(found)
    every = [term for stage in stages for term in stage.terms] + [found.step]
    spread = ("lowest rank", "highest") if any(map(_differs, every)) else ()
    table = plain_table("term", "planned", "measured", "off by", *spread)
    for stage in stages:
        if len(found.stages) > 1:
            table.add_row(f"stage {stage.index}, {_ranks(stage)}", style="bold")
        for term in stage.terms:
            table.add_row(*_row(term, has_spread=bool(spread)))
    table.add_row(*_row(found.step, has_spread=bool(spread)))
    return table


def _ranks(stage: StageComparison) -> str:
    first, last = stage.ranks[0], stage.ranks[-1]
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


def _differs(term: Term) -> bool:
    return term.lowest != term.highest


def _row(term: Term, *, has_spread: bool) -> tuple[str, ...]:
    planned = _text(term, term.planned)
    if term.measured is None:
        return term.name, planned, "not recorded"
    row = (term.name, planned, _text(term, term.measured), _off(term))
    if not (has_spread and _differs(term) and term.lowest is not None and term.highest is not None):
        return row
    return *row, _text(term, term.lowest), _text(term, term.highest)


def _text(term: Term, value: float) -> str:
    return {
        "bytes": format_bytes,
        "seconds": lambda seconds: format_seconds(seconds) if seconds else "0 s",
        "bytes_per_second": format_rate,
        "share": lambda share: f"{share:.1%}",
        "years": format_life,
    }[term.unit](value)


def _off(term: Term) -> str:
    """Write how far the plan was off; what is equal to the last byte is told from what rounds to nothing."""
    if term.measured is None or (term.off_by is None and not term.planned):
        return ""
    if term.measured == term.planned:
        return "0"
    if term.off_by is None or not math.isfinite(term.off_by):
        return ""
    return f"{term.off_by:+.1%}" if abs(term.off_by) < 10 else f"{1 + term.off_by:.0f} x"


def _reasons(found: Calibration) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for term in (*(term for stage in found.stages for term in stage.terms), found.step):
        if term.measured is None:
            by_reason.setdefault(term.reason, []).append(term.name)
    for reason, names in by_reason.items():
        yield f"- {', '.join(dict.fromkeys(names))}: {reason}"


def _tensors(found: Calibration) -> RenderableType:
    lines = []
    table = plain_table("only on one side", "size", "how many", "where")
    for stage in _shown(found):
        name = f"stage {stage.index}: " if len(found.stages) > 1 else ""
        tensors = stage.tensors
        if tensors is None:
            lines.append(f"{name}not recorded: {stage.reason}")
            continue
        equal = "all equal" if not tensors.differences else f"{len(tensors.differences)} differences"
        lines.append(
            f"{name}{tensors.num_tensors} tensors planned, {tensors.num_storages} storages saved, "
            f"{tensors.num_layers} layers one by one: {equal}"
        )
        for each in tensors.differences:
            side = "planned" if each.is_planned else "saved"
            where = ", ".join(each.places[:_MOST_PLACES]) + (", ..." if len(each.places) > _MOST_PLACES else "")
            table.add_row(f"{name}{side}: {each.name}", format_bytes(each.nbytes), str(each.count), where)
    text = Text("\n".join(lines))
    return Together(text, table) if table.row_count else text


def _changes(found: Calibration) -> Table:
    table = plain_table("", "assumed", "with the run")
    before, after, reached = found.planned, found.calibrated, found.reached
    rate = "not recorded" if reached.flops_per_second is None else f"{reached.flops_per_second / 1e12:.4g} TFLOP/s"
    table.add_row("operations of the model over their time, a GPU", "", rate)
    rows = [("rate of products", *(f"{plan.cluster.flops_per_second / 1e12:.4g} TFLOP/s" for plan in (before, after)))]
    for name in ("write", "read"):
        field = f"{name}_bytes_per_second"
        rows.append(
            (f"a drive's {name}", *(format_rate(getattr(plan.cluster.drive, field)) for plan in (before, after)))
        )
    rows += [
        ("step", *(format_seconds(plan.step.seconds) for plan in (before, after))),
        ("write needed", *(format_rate(plan.worst.need.write_bytes_per_second) for plan in (before, after))),
        ("drives needed", *(f"{plan.need.drives} (for {plan.need.limited_by})" for plan in (before, after))),
        ("hidden by the given drives", *(f"{plan.hidden_share:.0%}" for plan in (before, after))),
        (
            "life by the rating, without a pause",
            *(format_life(plan.worst.busy_life.rated_years) for plan in (before, after)),
        ),
    ]
    for name, title in (("keep", "kept"), ("recompute", "recomputed"), ("offload", "offloaded")):
        rows.append(
            (f"largest micro-batch, {title}", str(getattr(before.limits, name)), str(getattr(found.limits, name)))
        )
    for row in rows:
        table.add_row(*row)
    if reached.reasons:
        table.caption = "\n".join(reached.reasons)
        table.caption_justify = "left"
    return table


# ---------------------------------------------------------------------- JSON


def calibration_as_dict(found: Calibration) -> dict[str, Any]:
    """Turn a calibration into a part of what ``--json`` prints; sizes are bytes, times seconds, lives years.

    Args:
        found: Of :func:`ssdtrain_plugin.projection.calibration.calibrate`.
    """
    return {
        "num_steps": found.num_steps,
        "num_traced_steps": found.num_traced_steps,
        "stages": [
            {
                "index": stage.index,
                "ranks": list(stage.ranks),
                "terms": [_term(term) for term in stage.terms],
                "tensors": None if stage.tensors is None else asdict(stage.tensors),
                "tensors_reason": stage.reason,
            }
            for stage in found.stages
        ],
        "step": _term(found.step),
        "warnings": list(found.warnings),
        "reached": asdict(found.reached),
        "fields": pasted(found),
        "largest_micro_batch": asdict(found.limits),
        "calibrated": as_dict(found.calibrated),
    }


def _term(term: Term) -> dict[str, Any]:
    values = {**asdict(term), "off_by": term.off_by}
    # JSON has no number for what is infinite: drives that are never written to.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
