"""Every number of the report, computed from what the ranks wrote. Draws and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ssdtrain_plugin.events import TransferEvent
from ssdtrain_plugin.report.reading import RankRecord, Run

__all__ = [
    "Chart",
    "LayerRow",
    "Series",
    "StepRow",
    "TransferRow",
    "bandwidth",
    "layer_of",
    "layers",
    "memory",
    "plan_changes",
    "timed_steps",
    "totals",
    "tracks_of",
    "transfers",
    "values_of",
]

NUM_BINS = 240
MAX_POINTS = 2000
OUTSIDE = "(outside of named modules)"


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
        name: In the legend.
        x: Where.
        y: How much.
    """

    name: str
    x: list[float]
    y: list[float]


class Chart(NamedTuple):
    """What is drawn for one rank.

    Attributes:
        rank: Global rank.
        series: Over the same axis.
    """

    rank: int
    series: list[Series]


def totals(run: Run) -> dict[str, float]:
    """Sum up the run.

    Args:
        run: All ranks.

    Returns:
        By name; names end in their unit.
    """
    steps = [step for rank in run.ranks for step in rank.steps]
    num_steps = max(len(rank.steps) for rank in run.ranks)
    peak = max(steps, key=lambda step: step.peak_activation_bytes)
    return {
        "ranks": len(run.ranks),
        "steps": num_steps,
        "peak_activation_bytes": peak.peak_activation_bytes,
        "saved_bytes": max(step.saved_bytes for step in steps),
        "stored_bytes": sum(step.stored_bytes for step in steps),
        "host_bytes": sum(step.host_bytes for step in steps),
        "loaded_bytes": sum(step.loaded_bytes for step in steps),
        "stall_seconds": sum(step.stall_seconds for step in steps),
        "num_loads_on_demand": sum(step.num_loads_on_demand for step in steps),
        "num_failures": sum(sum(step.failures.values()) for step in steps),
    }


def plan_changes(rank: RankRecord) -> list[tuple[int, str]]:
    """List the steps whose plan is not that of the step before.

    Args:
        rank: One.

    Returns:
        The number of the step, and the plan in one line.
    """
    changes: list[tuple[int, str]] = []
    for step in rank.steps:
        if not changes or changes[-1][1] != step.plan:
            changes.append((step.step, step.plan))
    return changes


@dataclass(slots=True)
class StepRow:
    """Where the time of a recorded step went.

    Attributes:
        step: Its number.
        seconds: Its length.
        forward_seconds: In forward passes.
        backward_seconds: In backward passes.
        other_seconds: In other instructions of the host's schedule.
        wait_seconds: For transfers; part of the passes.
        rest_seconds: In none of these.
    """

    step: int
    seconds: float
    forward_seconds: float
    backward_seconds: float
    other_seconds: float
    wait_seconds: float
    rest_seconds: float


def timed_steps(rank: RankRecord) -> list[StepRow]:
    """Say where the time of each recorded step went.

    Args:
        rank: One.
    """
    rows = []
    for step in rank.traced_steps:
        own = [each for each in rank.passes if each.step == step.step]
        forward = sum(each.end - each.begin for each in own if each.kind == "forward")
        backward = sum(each.end - each.begin for each in own if each.kind == "backward")
        other = sum(each.end - each.begin for each in rank.instructions if each.step == step.step)
        wait = sum(each.end - each.begin for each in rank.waits if each.step == step.step)
        seconds = step.end - step.begin
        rows.append(StepRow(step.step, seconds, forward, backward, other, wait, seconds - forward - backward - other))
    return rows


@dataclass(slots=True)
class TransferRow:
    """What went one way between device memory and one drive, or host memory, in the recorded steps.

    Attributes:
        direction: As of :class:`ssdtrain_plugin.events.TransferEvent`.
        tier: Of the same.
        drive: Of the same.
        path: Of the same; empty for host memory.
        num_done: Transfers that moved their bytes.
        nbytes: Bytes moved.
        busy_seconds: In which at least one was under way.
        bytes_per_second: Bytes for each of these seconds.
        queue_seconds: For which one waited in the queue, on average.
        num_on_demand: Queued when backward was waiting already.
        num_cancelled: Taken back, because the tensor was still in memory.
        num_failed: Failed or given up.
    """

    direction: str
    tier: str
    drive: int
    path: str
    num_done: int = 0
    nbytes: int = 0
    busy_seconds: float = 0.0
    bytes_per_second: float = 0.0
    queue_seconds: float = 0.0
    num_on_demand: int = 0
    num_cancelled: int = 0
    num_failed: int = 0


def transfers(rank: RankRecord) -> list[TransferRow]:
    """Sum up the transfers of the recorded steps.

    Args:
        rank: One.
    """
    groups: dict[tuple[str, str, int], list[TransferEvent]] = {}
    for event in rank.transfers:
        groups.setdefault((event.direction, event.tier, event.drive), []).append(event)
    rows = []
    for (direction, tier, drive), events in sorted(groups.items()):
        done = [event for event in events if event.outcome == "done"]
        row = TransferRow(direction, tier, drive, next((event.path for event in events if event.path), ""))
        row.num_done, row.nbytes = len(done), sum(event.nbytes for event in done)
        row.busy_seconds = union_seconds((event.begin, event.end) for event in done)
        row.bytes_per_second = row.nbytes / row.busy_seconds if row.busy_seconds else 0.0
        row.queue_seconds = sum(event.begin - event.queued for event in done) / len(done) if done else 0.0
        row.num_on_demand = sum(event.is_on_demand for event in events)
        row.num_cancelled = sum(event.outcome == "cancelled" for event in events)
        row.num_failed = sum(event.outcome in ("failed", "given up") for event in events)
        rows.append(row)
    return rows


def union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Get the length of the union of spans.

    Args:
        spans: Begin and end of each.
    """
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


@dataclass(slots=True)
class LayerRow:
    """What one layer saved in the recorded steps.

    Attributes:
        layer: Its name.
        num_saves: Storages.
        saved_bytes: Of these.
        stored_bytes: That left device memory, to the drive or to host memory.
        kept_bytes: That did not: kept by decision, forwarded, or failed.
        loaded_bytes: That came back by a load.
        num_on_demand: Loads for which backward waited from the beginning.
        wait_seconds: That training waited, for these loads or to store these bytes.
    """

    layer: str
    num_saves: int = 0
    saved_bytes: int = 0
    stored_bytes: int = 0
    kept_bytes: int = 0
    loaded_bytes: int = 0
    num_on_demand: int = 0
    wait_seconds: float = 0.0


def layer_of(module: str | None) -> str:
    """Name the layer that a module belongs to: all up to the first number in its name, or else its first part.

    Args:
        module: Full name, for example ``decoder.layers.3.mlp.linear_fc1``; None for no module.
    """
    if not module:
        return OUTSIDE
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def layers(rank: RankRecord) -> list[LayerRow]:
    """Sum up saves, transfers and waits by layer, in the order in which the layers first saved something.

    Args:
        rank: One.
    """
    rows: dict[str, LayerRow] = {}
    owner: dict[int, LayerRow] = {}

    def row_of(module: str | None) -> LayerRow:
        name = layer_of(module)
        return rows.setdefault(name, LayerRow(name))

    for save in rank.saves:
        row = owner[save.serial] = row_of(save.module)
        row.num_saves += 1
        row.saved_bytes += save.nbytes
    for event in rank.transfers:
        found = owner.get(event.serial)
        if found is None or event.direction not in ("store", "load"):
            continue
        is_done = event.outcome == "done"
        found.stored_bytes += event.nbytes if is_done and event.direction == "store" else 0
        found.loaded_bytes += event.nbytes if is_done and event.direction == "load" else 0
        found.num_on_demand += event.is_on_demand
    for wait in rank.waits:
        row_of(wait.module).wait_seconds += wait.end - wait.begin
    for row in rows.values():
        row.kept_bytes = row.saved_bytes - row.stored_bytes
    return list(rows.values())


def memory(run: Run) -> list[Chart]:
    """Follow the live bytes of each rank that recorded.

    Args:
        run: All ranks.

    Returns:
        Seconds from the origin of the run against bytes; a value holds until the next point.
    """
    names = {
        "without the plugin": "would_be_bytes",
        "device memory": "device_bytes",
        "host memory": "host_bytes",
        "drive": "drive_bytes",
    }
    charts = []
    for rank in run.traced:
        seconds = [run.seconds_of(rank, event.at) for event in rank.memory]
        series = []
        for label, name in names.items():
            x, y = _thin(seconds, [float(getattr(event, name)) for event in rank.memory])
            series.append(Series(label, x, y))
        charts.append(Chart(rank.rank, series))
    return charts


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Keep the highest of each group of neighbours, so that peaks stay and the page does not grow without bound."""
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y
    groups = [range(begin, min(begin + size, len(x))) for begin in range(0, len(x), size)]
    chosen = [max(group, key=y.__getitem__) for group in groups]
    return [x[index] for index in chosen], [y[index] for index in chosen]


def bandwidth(run: Run) -> list[Chart]:
    """Follow the bytes a second that each rank moved, over all its recorded steps.

    The bytes of a transfer count evenly from its begin to its end.

    Args:
        run: All ranks.

    Returns:
        The middle of each of :data:`NUM_BINS` bins, in seconds from the origin of the run, against bytes a second.
    """
    charts = []
    for rank in run.traced:
        begin, end = rank.traced_steps[0].begin, rank.traced_steps[-1].end
        width = (end - begin) / NUM_BINS
        middles = [run.seconds_of(rank, begin + (index + 0.5) * width) for index in range(NUM_BINS)]
        series = []
        for direction in ("store", "load"):
            for tier, place in (("ssd", "drive"), ("host", "host memory")):
                chosen = [
                    event
                    for event in rank.transfers
                    if (event.direction, event.tier, event.outcome) == (direction, tier, "done")
                ]
                if chosen and width > 0:
                    word = "to" if direction == "store" else "from"
                    series.append(Series(f"{direction} {word} {place}", middles, _bins(chosen, begin, width)))
        charts.append(Chart(rank.rank, series))
    return charts


def _bins(events: Sequence[TransferEvent], begin: float, width: float) -> list[float]:
    amounts = [0.0] * NUM_BINS
    for event in events:
        seconds = max(event.end - event.begin, 1e-9)
        first = max(0, int((event.begin - begin) / width))
        last = min(NUM_BINS - 1, int((event.end - begin) / width))
        for index in range(first, last + 1):
            left = begin + index * width
            share = max(0.0, min(event.end, left + width) - max(event.begin, left)) / seconds
            amounts[index] += share * event.nbytes / width
    return amounts


def tracks_of(events: list[TransferEvent]) -> list[list[TransferEvent]]:
    """Lay transfers that overlap side by side.

    Args:
        events: In any order.
    """
    tracks: list[list[TransferEvent]] = []
    for event in sorted(events, key=lambda event: event.begin):
        free = next((track for track in tracks if track[-1].end <= event.begin), None)
        if free is None:
            tracks.append([event])
        else:
            free.append(event)
    return tracks


def values_of(row: Any) -> dict[str, Any]:
    """Get the fields of a row by their names.

    Args:
        row: A dataclass.
    """
    return {field.name: getattr(row, field.name) for field in fields(row)}
