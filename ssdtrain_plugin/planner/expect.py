"""How high live bytes will go under a plan, without running it."""

from __future__ import annotations

from collections.abc import Sequence

from ssdtrain_plugin.planner.curve import Curve
from ssdtrain_plugin.planner.timeline import Phase, Schedule
from ssdtrain_plugin.planner.turn import Turn

__all__ = ["PeakEstimate", "kept_peak", "most_in_flight"]


def most_in_flight(schedule: Schedule) -> int:
    """Count the micro-batches between forward and backward where they are most."""
    in_flight = most = 0
    for event in schedule.events:
        in_flight += (event.phase is Phase.FORWARD) - (event.phase is Phase.BACKWARD)
        most = max(most, in_flight)
    return most


def kept_peak(schedule: Schedule) -> int:
    """Compute the highest live bytes if nothing is offloaded."""
    live_bytes = most_bytes = 0
    for event in schedule.events:
        if event.phase is Phase.FORWARD:
            live_bytes += schedule.profiles[event.microbatch].total_bytes
            most_bytes = max(most_bytes, live_bytes)
        elif event.phase is Phase.BACKWARD:
            live_bytes -= schedule.profiles[event.microbatch].total_bytes
    return most_bytes


class PeakEstimate:
    """Looks at the end of each forward, at its own worst moment, and at the begin of each backward.

    Args:
        schedule: Of the step.
        turns: The micro-batches; what is chosen for them is read at each question.
        tolerance_seconds: Times that close are the same.
    """

    def __init__(self, schedule: Schedule, turns: Sequence[Turn], tolerance_seconds: float) -> None:
        """Remember what to look at."""
        self._schedule = schedule
        self._turns = turns
        self._tolerance_seconds = tolerance_seconds
        self._residues: dict[tuple[Curve, int, float], tuple[int, float]] = {}

    def peak_bytes(self, prefetch_bytes: int, window_bytes: int) -> int:
        """Estimate the highest live bytes.

        Args:
            prefetch_bytes: Bound on loads ahead.
            window_bytes: Bound on loads ahead with what was kept.
        """
        most_bytes = 0
        in_flight: list[Turn] = []
        for position, event in enumerate(self._schedule.events):
            begin_seconds, end_seconds = self._schedule.begins[position : position + 2]
            if event.phase is Phase.FORWARD:
                turn = self._turns[event.microbatch]
                residue_bytes, at_seconds = self._residue(turn)
                others_bytes = self._live(in_flight, begin_seconds + at_seconds, prefetch_bytes, window_bytes)
                in_flight.append(turn)
                after_bytes = self._live(in_flight, end_seconds, prefetch_bytes, window_bytes)
                most_bytes = max(most_bytes, others_bytes + residue_bytes, after_bytes)
            elif event.phase is Phase.BACKWARD:
                turn = self._turns[event.microbatch]
                in_flight.remove(turn)
                others_bytes = self._live(in_flight, begin_seconds, prefetch_bytes, window_bytes)
                own_bytes = _live_in_backward(turn, prefetch_bytes, window_bytes)
                most_bytes = max(most_bytes, others_bytes + own_bytes)
        return most_bytes

    def _residue(self, turn: Turn) -> tuple[int, float]:
        key = (turn.stored_curve, turn.end, turn.free_seconds)
        if key not in self._residues:
            self._residues[key] = turn.stored_curve.residue(turn.end, turn.free_seconds)
        return self._residues[key]

    def _live(self, turns: list[Turn], seconds: float, prefetch_bytes: int, window_bytes: int) -> int:
        """Bytes of micro-batches between their forward and their backward."""
        live_bytes = 0
        for turn in turns:
            live_bytes += turn.curve.profile.total_bytes - turn.out_bytes(seconds + self._tolerance_seconds)
            if turn.announced_seconds < seconds - self._tolerance_seconds:
                live_bytes += _ahead(turn, prefetch_bytes, window_bytes)
        return live_bytes


def _ahead(turn: Turn, prefetch_bytes: int, window_bytes: int) -> int:
    """Bytes loaded when backward begins."""
    out_bytes = turn.ssd_bytes + turn.host_bytes
    kept_bytes = turn.curve.profile.total_bytes - out_bytes
    return max(0, min(out_bytes, prefetch_bytes, window_bytes - kept_bytes))


def _live_in_backward(turn: Turn, prefetch_bytes: int, window_bytes: int) -> int:
    """Most bytes of a micro-batch in its own backward: at its begin, or when the kept tail is used up."""
    profile = turn.curve.profile
    out_bytes = turn.ssd_bytes + turn.host_bytes
    at_begin = profile.total_bytes - out_bytes + _ahead(turn, prefetch_bytes, window_bytes)
    within = profile.held_bytes + min(out_bytes, prefetch_bytes, window_bytes)
    return min(max(at_begin, within), profile.total_bytes)
