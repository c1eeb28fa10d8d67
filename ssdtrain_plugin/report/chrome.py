"""The events as Chrome's trace format (a JSON array), which Perfetto opens: https://ui.perfetto.dev.

One process a rank. In it a track for compute, with the waits inside of the passes; tracks for
stores and for loads, as many as ran at once, because what lies on one track must not overlap;
and a counter of the live bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssdtrain_plugin.report.numbers import tracks_of, values_of
from ssdtrain_plugin.report.reading import RankRecord, Run

__all__ = ["chrome_events", "write_chrome_trace"]

_COMPUTE = 1
_FIRST_TRACK = {"store": 100, "load": 200, "spill": 300, "promote": 400}


def write_chrome_trace(run: Run, path: Path) -> None:
    """Write the events of all ranks.

    Args:
        run: All ranks.
        path: Of the file.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        file.write(",\n".join(json.dumps(event, separators=(",", ":")) for event in chrome_events(run)))
        file.write("\n]\n")


def chrome_events(run: Run) -> Iterator[dict[str, Any]]:
    """Give every event of every rank.

    Args:
        run: All ranks.
    """
    for rank in run.traced:
        yield _name(rank.rank, "process_name", f"rank {rank.rank}")
        yield {"ph": "M", "pid": rank.rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank.rank}}
        yield from _compute(run, rank)
        yield from _transfers(run, rank)
        yield from _counters(run, rank)


def _name(pid: int, kind: str, name: str, tid: int = 0) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _span(run: Run, rank: RankRecord, tid: int, name: str, event: Any) -> dict[str, Any]:
    begin = run.seconds_of(rank, event.begin)
    details = {key: value for key, value in values_of(event).items() if key not in ("begin", "end", "event")}
    return {
        "ph": "X",
        "pid": rank.rank,
        "tid": tid,
        "name": name,
        "cat": event.event,
        "ts": round(1e6 * begin, 3),
        "dur": round(1e6 * max(0.0, event.end - event.begin), 3),
        "args": details,
    }


def _compute(run: Run, rank: RankRecord) -> Iterator[dict[str, Any]]:
    yield _name(rank.rank, "thread_name", "compute", _COMPUTE)
    for step in rank.traced_steps:
        yield {"ph": "i", "pid": rank.rank, "tid": _COMPUTE, "s": "p", "name": f"step {step.step}: {step.plan}",
               "cat": "step", "ts": round(1e6 * run.seconds_of(rank, step.begin), 3)}  # fmt: skip
    first: dict[int, int] = {}
    for each in rank.passes:
        first[each.step] = min(each.microbatch, first.get(each.step, each.microbatch))
    for each in rank.passes:
        slot = "" if each.slot is None else f" (slot {each.slot})"
        yield _span(run, rank, _COMPUTE, f"{each.kind} {each.microbatch - first[each.step]}{slot}", each)
    for instruction in rank.instructions:
        yield _span(run, rank, _COMPUTE, instruction.name, instruction)
    for wait in rank.waits:
        yield _span(run, rank, _COMPUTE, f"wait for {wait.reason}", wait)


def _transfers(run: Run, rank: RankRecord) -> Iterator[dict[str, Any]]:
    modules = {save.serial: save.module for save in rank.saves}
    for direction, first_track in _FIRST_TRACK.items():
        events = [each for each in rank.transfers if each.direction == direction and each.outcome != "cancelled"]
        for index, track in enumerate(tracks_of(events)):
            yield _name(rank.rank, "thread_name", f"{direction} {index}", first_track + index)
            for event in track:
                span = _span(run, rank, first_track + index, modules.get(event.serial) or event.direction, event)
                span["args"]["queue_microseconds"] = round(1e6 * (event.begin - event.queued), 3)
                yield span


def _counters(run: Run, rank: RankRecord) -> Iterator[dict[str, Any]]:
    for each in rank.memory:
        ts = round(1e6 * run.seconds_of(rank, each.at), 3)
        for name in ("device_bytes", "would_be_bytes", "host_bytes", "drive_bytes"):
            yield {"ph": "C", "pid": rank.rank, "name": name, "ts": ts, "args": {"bytes": getattr(each, name)}}
