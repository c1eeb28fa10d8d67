"""The report as one HTML page that needs nothing else: no network, no script, no font.

Note [Numbers]. Every number in the text stands in an element of its own, with its exact value in
``data-value`` and where it comes from in ``data-key``; what the pictures are drawn from stands in the
block ``series`` as JSON. So a test, or a reader, can compute each of them again.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ssdtrain_plugin.report.drawing import MAX_RANKS, THEMES, Picture, as_svg, pictures, write_pngs
from ssdtrain_plugin.report.numbers import (
    bandwidth,
    layers,
    memory,
    plan_changes,
    timed_steps,
    totals,
    transfers,
    values_of,
)
from ssdtrain_plugin.report.reading import RankRecord, Run
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.units import format_bytes, format_rate, format_seconds
from ssdtrain_plugin.version import __version__

__all__ = ["render_page", "shown", "write_page"]

# Of a long run these many steps are in the table of a rank; the files have them all.
MAX_STEPS = 100

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --tint: #f3f5f7; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --tint: #22262b; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, Verdana, sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.6rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
p { max-width: 48rem; } .tiles { display: grid; gap: .7rem; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
.tiles div { padding: .6rem .8rem; border-radius: .4rem; background: var(--tint); }
dl, dd, dt { margin: 0; } dt { font-size: .85rem; } dd { font-size: 1.3rem; font-weight: 600; }
figure { margin: 0; } figcaption { font-size: .9rem; } svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { padding: .8rem 0 .3rem; text-align: left; font-weight: 600; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { background: var(--tint); vertical-align: bottom; font-weight: 600; } thead th { white-space: normal; }
.word { text-align: left; } td.word { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
.plan { text-align: left; white-space: normal; min-width: 20rem; }
.problem { border-left: .3rem solid var(--red); padding-left: .7rem; }
summary { cursor: pointer; margin-top: .8rem; font-weight: 600; }
@media print { body { max-width: none; } details { display: block; } }
"""

_WORD = ' class="word"'
_WORDS = ("direction", "tier", "path", "layer")

_TOTALS = {
    "ranks": "ranks",
    "steps": "steps",
    "peak_activation_bytes": "activations, highest on a rank",
    "saved_bytes": "the same without the plugin",
    "stored_bytes": "written to drives",
    "host_bytes": "copied to host memory",
    "loaded_bytes": "loaded back",
    "stall_seconds": "training waited, all ranks",
    "num_loads_on_demand": "loads on demand",
    "num_failures": "failures and tiers passed over",
}
_STEP = {
    "step": "step",
    "microbatches": "micro-batches",
    "peak_activation_bytes": "peak",
    "saved_bytes": "without the plugin",
    "stored_bytes": "to the drive",
    "host_bytes": "to host memory",
    "loaded_bytes": "loaded",
    "forwarded_bytes": "forwarded",
    "deduplicated_bytes": "dedupli\u00adcated",
    "kept_bytes": "kept",
    "num_loads_on_demand": "loads on demand",
    "stall_seconds": "waited",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
}
_TIMED = {
    "step": "step",
    "seconds": "length",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "other_seconds": "other instructions",
    "rest_seconds": "rest",
    "wait_seconds": "waits in the passes",
}
_TRANSFER = {
    "direction": "direction",
    "tier": "tier",
    "drive": "drive",
    "num_done": "done",
    "nbytes": "moved",
    "busy_seconds": "time at work",
    "bytes_per_second": "speed at work",
    "queue_seconds": "in the queue, mean",
    "num_on_demand": "on demand",
    "num_cancelled": "cancelled",
    "num_failed": "failed",
    "path": "directory",
}
_LAYER = {
    "layer": "layer",
    "num_saves": "storages",
    "saved_bytes": "saved",
    "stored_bytes": "offloaded",
    "kept_bytes": "not offloaded",
    "loaded_bytes": "loaded",
    "num_on_demand": "loads on demand",
    "wait_seconds": "training waited",
}


def shown(name: str, value: float) -> str:
    """Write a number as the page does.

    Args:
        name: Its ending says the unit.
        value: In that unit.
    """
    if name.endswith("bytes_per_second"):
        return format_rate(value)
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("seconds"):
        return ("-" if value < 0 else "") + format_seconds(abs(value)) if value else "0 s"
    return f"{value:,.0f}"


def _number(key: str, value: float, element: str = "td") -> str:
    text = html.escape(shown(key, value))
    return f'<{element} data-key="{html.escape(key)}" data-value="{value!r}">{text}</{element}>'


def _cell(key: str, value: Any, *, is_first: bool) -> str:
    if not isinstance(value, str):
        return _number(key, value)
    text = html.escape(value)
    return f'<th scope="row" class="word">{text}</th>' if is_first else f'<td class="word">{text}</td>'


def _cells(key: str, columns: Iterable[str], row: Any) -> str:
    values = values_of(row)
    return "".join(_cell(f"{key}/{name}", values[name], is_first=not index) for index, name in enumerate(columns))


def _table(key: str, caption: str, columns: dict[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    """Make a table of rows, each with its own key and a dataclass."""
    head = "".join(
        f'<th scope="col"{_WORD if name in _WORDS else ""}>{html.escape(title)}</th>' for name, title in columns.items()
    )
    body = "".join("<tr>" + _cells(f"{key}/{row_key}", columns, row) + "</tr>\n" for row_key, row in rows)
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{''.join(parts)}</section>\n"


def _figure(picture: Picture) -> str:
    svg = as_svg(picture).replace("<svg", f'<svg role="img" aria-label="{html.escape(picture.alt)}"', 1)
    return f"<figure>{svg}<figcaption>{html.escape(picture.alt)}</figcaption></figure>\n"


def _head(run: Run) -> str:
    values = totals(run)
    tiles = "".join(
        f"<div><dt>{html.escape(title)}</dt>{_number(f'total/{name}', values[name], 'dd')}</div>"
        for name, title in _TOTALS.items()
    )
    parts = [f"<h1>ssdtrain report</h1><p>{html.escape(str(run.directory))}</p>\n"]
    problems = list(run.problems)
    if run.num_earlier:
        problems.append("The files hold earlier runs as well; the last one is shown.")
    if len(run.ranks) > MAX_RANKS:
        problems.append("Not all ranks are drawn; all of them are in the tables.")
    if problems:
        lines = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        parts.append(f'<div class="problem" data-part="problems"><p>To be known:</p><ul>{lines}</ul></div>\n')
    return "".join([*parts, f'<dl class="tiles">{tiles}</dl>\n'])


def _plans(run: Run) -> str:
    parts = []
    for rank in run.ranks:
        rows = "".join(
            f"<tr>{_number(f'plan/{rank.rank}/{index}/step', step)}"
            f'<td class="plan" data-plan="{rank.rank}/{index}">{html.escape(plan)}</td></tr>\n'
            for index, (step, plan) in enumerate(plan_changes(rank))
        )
        parts.append(
            f'<div class="scroll"><table><caption>rank {rank.rank}</caption><thead><tr><th scope="col">from step</th>'
            f'<th scope="col" class="word">plan</th></tr></thead><tbody>{rows}</tbody></table></div>\n'
        )
    return "".join(parts)


def _steps(run: Run) -> str:
    parts = []
    for rank in run.ranks:
        chosen: Sequence[StepStats] = rank.steps
        note = ""
        if len(chosen) > MAX_STEPS:
            chosen = [*chosen[:3], *chosen[3 - MAX_STEPS :]]
            note = "; the first three and the last ones"
        rows = ((str(step.step), step) for step in chosen)
        table = _table(f"step/{rank.rank}", f"rank {rank.rank}{note}", _STEP, rows)
        failures = "".join(
            f"<li>{html.escape(cause)}: {_number(f'failures/{rank.rank}/{step.step}/{cause}', count, 'span')} in step "
            f"{_number(f'failures/{rank.rank}/{step.step}/step', step.step, 'span')}</li>"
            for step in chosen
            for cause, count in step.failures.items()
        )
        parts.append(_folded(rank, len(run.ranks), table + (f"<ul>{failures}</ul>" if failures else "")))
    return "".join(parts)


def _folded(rank: RankRecord, num_ranks: int, text: str) -> str:
    is_open = " open" if num_ranks <= 4 else ""
    return f"<details{is_open}><summary>rank {rank.rank}</summary>{text}</details>\n"


def _traced(run: Run, found: dict[str, Picture]) -> list[str]:
    """Make what needs the events."""
    if not run.traced:
        return [
            '<p class="problem">No events were recorded: set <code>trace_steps</code> for time lines and layers.</p>'
        ]
    timed = "".join(
        _table(f"timed/{rank.rank}", f"rank {rank.rank}", _TIMED, ((str(row.step), row) for row in timed_steps(rank)))
        for rank in run.traced
    )
    moved = "".join(
        _table(
            f"transfer/{rank.rank}",
            f"rank {rank.rank}, all recorded steps",
            _TRANSFER,
            ((f"{row.direction}/{row.tier}/{row.drive}", row) for row in transfers(rank)),
        )
        for rank in run.traced
    )
    saved = "".join(
        _table(
            f"layer/{rank.rank}",
            f"rank {rank.rank}, all recorded steps",
            _LAYER,
            ((row.layer, row) for row in layers(rank)),
        )
        for rank in run.traced
    )
    return [
        _section(found["memory"].title, _figure(found["memory"])),
        _section(found["timeline"].title, _figure(found["timeline"])),
        _section("Where the time of the recorded steps went", timed),
        _section(found["bandwidth"].title, _figure(found["bandwidth"]), moved),
        _section("Layers", saved),
    ]


def _series(run: Run) -> str:
    charts = {"memory": memory(run), "bandwidth": bandwidth(run)}
    values = {
        name: {str(chart.rank): {line.name: [line.x, line.y] for line in chart.series} for chart in found[:MAX_RANKS]}
        for name, found in charts.items()
    }
    # `</` would end the block, whatever a name says.
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return f'<script type="application/json" id="series">{text}</script>\n'


def _style() -> str:
    light = " ".join(f"--{role}: {colour};" for role, (colour, _) in THEMES.items())
    dark = " ".join(f"--{role}: {colour};" for role, (_, colour) in THEMES.items())
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def render_page(run: Run, found: Sequence[Picture]) -> str:
    """Make the page.

    Args:
        run: All ranks.
        found: Of :func:`ssdtrain_plugin.report.drawing.pictures`.
    """
    by_name = {picture.name: picture for picture in found}
    parts = [
        _head(run),
        _section(by_name["steps"].title, _figure(by_name["steps"])),
        *_traced(run, by_name),
        _section("Plans", _plans(run)),
        _section("Steps", _steps(run)),
        f"<footer><p>ssdtrain {html.escape(__version__)}</p></footer>\n",
        _series(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ssdtrain report: {html.escape(run.directory.name)}</title>\n<style>{_style()}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def write_page(run: Run, path: Path, *, step: int | None = None) -> list[Path]:
    """Write the page, and its pictures beside it.

    Args:
        run: All ranks.
        path: Of the page.
        step: Whose time line is drawn; by default the last one that was recorded.

    Returns:
        All that was written.

    Raises:
        EnvironmentUnsupportedError: matplotlib is missing.
        OSError: A file cannot be written.
    """
    recorded = [each.step for rank in run.traced for each in rank.traced_steps]
    chosen = max(recorded, default=None) if step is None else step
    found = pictures(run, chosen)
    path.write_text(render_page(run, found), encoding="utf-8")
    return [path, *write_pngs(found, path.with_suffix(""))]
