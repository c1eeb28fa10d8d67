"""Discrete-event simulation of one step: what a choice of places costs in memory and in waiting.

The rules are those of the runtime. Each direction of a tier serves first come
first served. Loads go in the reverse order of saves, as soon as the backward is
announced, within ``prefetch_bytes`` and ``window_bytes``. A save that is still on its way out when its
turn to be loaded comes is forwarded: its store is cancelled, or runs on for nothing.

A save counts as live from its save until its store ends, and again from the
moment at which its load is queued, since memory for it is allocated then, until
backward lets go of it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from ssdtrain_plugin.planner.link import Job, Link
from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.timeline import Place, Point, PointKind, Schedule

__all__ = ["Outcome", "TraceRow", "simulate"]

# Times closer than this share of the step are the same time. A store that takes
# exactly as long as a layer must not miss the next save by a rounding error.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class TraceRow:
    """One thing that happened.

    Attributes:
        seconds: When, stalls included.
        what: ``save``, ``stored``, ``load``, ``loaded``, ``forward``, ``need``, ``stall`` or ``release``.
        microbatch: Whose.
        index: Of the save.
        live_bytes: In device memory afterwards.
    """

    seconds: float
    what: str
    microbatch: int
    index: int
    live_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What a simulated step cost.

    Attributes:
        peak_bytes: Most bytes of saves in device memory at any time.
        stall_seconds: How long the computation waited.
        seconds: How long the step took, stalls included.
        stored_bytes: Written to the drive.
        loaded_bytes: Read from the drive.
        store_seconds: How long the drive was writing.
        load_seconds: How long the drive was reading.
        forwarded_bytes: Handed back before their store had ended.
        refused_bytes: Kept because too much was in flight.
        host_peak_bytes: Most bytes in the host tier at any time.
        num_loads_on_demand: Loads that were not queued when backward asked.
        trace: What happened, in order; empty unless it was asked for.
    """

    peak_bytes: int
    stall_seconds: float
    seconds: float
    stored_bytes: int
    loaded_bytes: int
    store_seconds: float
    load_seconds: float
    forwarded_bytes: int
    refused_bytes: int
    host_peak_bytes: int
    num_loads_on_demand: int
    trace: tuple[TraceRow, ...]


def simulate(
    schedule: Schedule, machine: Machine, places: Sequence[Sequence[Place]], *, with_trace: bool = False
) -> Outcome:
    """Run one step.

    Args:
        schedule: What the stage computes.
        machine: What moves bytes.
        places: For each micro-batch, one place for each save. What finds the host tier full goes to the drive.
        with_trace: Keep a record of what happened.

    Raises:
        ValueError: The places do not fit to the schedule.
    """
    for microbatch, (profile, row) in enumerate(zip(schedule.profiles, places, strict=True)):
        if len(profile.saves) != len(row):
            raise ValueError(f"micro-batch {microbatch} has {len(row)} places (expected {len(profile.saves)})")
    return _Simulation(schedule, machine, places, with_trace=with_trace).run()


class _State(enum.Enum):
    """Where the bytes of a save are."""

    RESIDENT = "resident"
    STORING = "storing"
    STORED = "stored"
    LOADING = "loading"
    RELEASED = "released"


class _Tracked:
    """One save under way."""

    __slots__ = (
        "is_ahead",
        "is_asked",
        "is_forwarded",
        "is_in_window",
        "is_offloaded",
        "job",
        "nbytes",
        "place",
        "state",
    )

    def __init__(self, nbytes: int, place: Place) -> None:
        self.nbytes = nbytes
        self.place = place
        self.state = _State.RESIDENT
        self.is_offloaded = False
        self.is_forwarded = False
        self.is_in_window = False
        self.is_ahead = False
        self.is_asked = False
        self.job: Job | None = None


class _Simulation:
    def __init__(
        self, schedule: Schedule, machine: Machine, places: Sequence[Sequence[Place]], *, with_trace: bool
    ) -> None:
        self._schedule = schedule
        self._machine = machine
        self._tracked = [
            [_Tracked(save.nbytes, place) for save, place in zip(profile.saves, row, strict=True)]
            for profile, row in zip(schedule.profiles, places, strict=True)
        ]
        self._tolerance_seconds = _TOLERANCE * max(schedule.seconds, 1e-300)
        self._ssd = Link(machine.mixed_share)
        self._host = Link()
        self._now_seconds = 0.0
        self._stall_seconds = 0.0
        self._live_bytes = self._peak_bytes = 0
        self._host_live_bytes = self._host_peak_bytes = 0
        self._inflight_bytes = self._ahead_bytes = self._window_bytes = 0
        self._forwarded_bytes = self._refused_bytes = 0
        self._num_loads_on_demand = 0
        self._announced: list[int] = []
        self._cursors = [len(row) - 1 for row in self._tracked]
        self._trace: list[TraceRow] | None = [] if with_trace else None

    def run(self) -> Outcome:
        handlers = {
            PointKind.SAVE: self._save,
            PointKind.ANNOUNCE: self._announce,
            PointKind.NEED: self._need,
            PointKind.RELEASE: self._release,
        }
        for point in self._schedule.points():
            self._advance_to(point.seconds + self._stall_seconds)
            handlers[point.kind](point)
        self._advance_to(self._schedule.seconds + self._stall_seconds)
        stored_bytes, loaded_bytes = self._ssd.moved_bytes
        store_seconds, load_seconds = self._ssd.busy_seconds
        return Outcome(
            peak_bytes=self._peak_bytes,
            stall_seconds=self._stall_seconds,
            seconds=self._schedule.seconds + self._stall_seconds,
            stored_bytes=stored_bytes,
            loaded_bytes=loaded_bytes,
            store_seconds=store_seconds,
            load_seconds=load_seconds,
            forwarded_bytes=self._forwarded_bytes,
            refused_bytes=self._refused_bytes,
            host_peak_bytes=self._host_peak_bytes,
            num_loads_on_demand=self._num_loads_on_demand,
            trace=tuple(self._trace or ()),
        )

    def _note(self, what: str, microbatch: int, index: int) -> None:
        if self._trace is not None:
            self._trace.append(TraceRow(self._now_seconds, what, microbatch, index, self._live_bytes))

    def _hold(self, nbytes: int) -> None:
        self._live_bytes += nbytes
        self._peak_bytes = max(self._peak_bytes, self._live_bytes)

    # --- time

    def _advance_to(self, seconds: float) -> None:
        """Let transfers end until a time, in the order of their ends."""
        while (left_seconds := seconds - self._now_seconds) > 0.0:
            step_seconds = self._seconds_to_next_end()
            if step_seconds > left_seconds + self._tolerance_seconds:
                self._pass(left_seconds)
                self._now_seconds = seconds
            else:
                self._pass(step_seconds)
        # What has no more than a rounding error left has ended.
        while self._seconds_to_next_end() <= self._tolerance_seconds:
            self._pass(0.0)

    def _seconds_to_next_end(self) -> float:
        return min(self._ssd.seconds_to_next_end(), self._host.seconds_to_next_end())

    def _pass(self, seconds: float) -> None:
        self._now_seconds += seconds
        for link in (self._ssd, self._host):
            for job in link.advance(seconds, self._tolerance_seconds):
                self._end(job)

    def _end(self, job: Job) -> None:
        tracked = self._tracked[job.microbatch][job.index]
        tracked.job = None
        if job.is_load:
            tracked.state = _State.RESIDENT
            self._note("loaded", job.microbatch, job.index)
            return
        self._inflight_bytes -= job.nbytes
        if tracked.state is _State.RELEASED:
            # It was let go of while the store ran for nothing; only now the bytes are free.
            self._live_bytes -= job.nbytes
        elif tracked.is_forwarded:
            tracked.state = _State.RESIDENT
        else:
            tracked.state = _State.STORED
            self._live_bytes -= job.nbytes
        self._note("stored", job.microbatch, job.index)

    # --- forward

    def _save(self, point: Point) -> None:
        tracked = self._tracked[point.microbatch][point.number]
        self._hold(tracked.nbytes)
        self._note("save", point.microbatch, point.number)
        if tracked.place is Place.KEEP:
            return
        if not self._has_room(tracked.nbytes):
            if not self._machine.waits_when_full:
                self._refused_bytes += tracked.nbytes
                return
            started = self._now_seconds
            while not self._has_room(tracked.nbytes):
                self._pass(self._seconds_to_next_end())
            self._count_stall(started, point)
        if tracked.place is Place.HOST and self._host_live_bytes + tracked.nbytes > self._machine.host_bytes:
            tracked.place = Place.SSD
        if tracked.place is Place.HOST:
            self._host_live_bytes += tracked.nbytes
            self._host_peak_bytes = max(self._host_peak_bytes, self._host_live_bytes)
        tracked.is_offloaded = True
        tracked.state = _State.STORING
        self._inflight_bytes += tracked.nbytes
        tracked.job = self._job(point.microbatch, point.number, is_load=False)
        self._link_of(tracked).submit(tracked.job)

    def _has_room(self, nbytes: int) -> bool:
        return self._inflight_bytes == 0 or self._inflight_bytes + nbytes <= self._machine.max_inflight_bytes

    def _count_stall(self, started_seconds: float, point: Point) -> None:
        waited_seconds = self._now_seconds - started_seconds
        if waited_seconds > 0.0:
            self._stall_seconds += waited_seconds
            self._note("stall", point.microbatch, point.number)

    def _link_of(self, tracked: _Tracked) -> Link:
        return self._host if tracked.place is Place.HOST else self._ssd

    def _job(self, microbatch: int, index: int, *, is_load: bool) -> Job:
        tracked = self._tracked[microbatch][index]
        machine, nbytes = self._machine, tracked.nbytes
        seconds = machine.load_seconds(nbytes) if is_load else machine.store_seconds(nbytes)
        if tracked.place is Place.HOST:
            seconds = machine.host_seconds(nbytes)
        return Job(microbatch, index, nbytes, is_load, seconds)

    # --- backward

    def _announce(self, point: Point) -> None:
        self._announced.append(point.microbatch)
        self._prefetch()

    def _prefetch(self) -> None:
        """Queue loads in the order in which backward needs them, within the bounds."""
        for microbatch in self._announced:
            row = self._tracked[microbatch]
            while (index := self._cursors[microbatch]) >= 0:
                if not row[index].is_asked and not self._bring(microbatch, index):
                    return
                self._cursors[microbatch] -= 1

    def _bring(self, microbatch: int, index: int) -> bool:
        """Have a save in memory ahead of backward; False if there is no room for it."""
        tracked, machine = self._tracked[microbatch][index], self._machine
        # One save over a bound is admitted, so that one larger than the bound is loaded at all.
        if not tracked.is_in_window:
            if self._window_bytes and self._window_bytes + tracked.nbytes > machine.window_bytes:
                return False
            tracked.is_in_window = True
            self._window_bytes += tracked.nbytes
        if not tracked.is_offloaded:
            return True
        if self._ahead_bytes and self._ahead_bytes + tracked.nbytes > machine.prefetch_bytes:
            return False
        tracked.is_ahead = True
        self._ahead_bytes += tracked.nbytes
        if tracked.state is _State.STORING:
            self._forward(microbatch, index)
        elif tracked.state is _State.STORED:
            self._load(microbatch, index, is_urgent=False)
        return True

    def _forward(self, microbatch: int, index: int) -> None:
        """Keep what is still on its way out."""
        tracked = self._tracked[microbatch][index]
        if tracked.is_forwarded or tracked.job is None:
            return
        tracked.is_forwarded = True
        self._forwarded_bytes += tracked.nbytes
        if self._link_of(tracked).cancel(tracked.job):
            self._inflight_bytes -= tracked.nbytes
            tracked.state = _State.RESIDENT
            tracked.job = None
        self._note("forward", microbatch, index)

    def _load(self, microbatch: int, index: int, *, is_urgent: bool) -> None:
        tracked = self._tracked[microbatch][index]
        tracked.state = _State.LOADING
        self._hold(tracked.nbytes)
        tracked.job = self._job(microbatch, index, is_load=True)
        self._link_of(tracked).submit(tracked.job, is_urgent=is_urgent)
        self._note("load", microbatch, index)

    def _need(self, point: Point) -> None:
        tracked = self._tracked[point.microbatch][point.number]
        if tracked.state is _State.STORING:
            self._forward(point.microbatch, point.number)
        elif tracked.state is _State.STORED:
            self._num_loads_on_demand += 1
            self._load(point.microbatch, point.number, is_urgent=True)
        started = self._now_seconds
        while tracked.state is _State.LOADING:
            self._pass(self._seconds_to_next_end())
        self._count_stall(started, point)
        self._note("need", point.microbatch, point.number)
        tracked.is_asked = True
        self._ahead_bytes -= tracked.nbytes * tracked.is_ahead
        self._window_bytes -= tracked.nbytes * tracked.is_in_window
        self._prefetch()

    def _release(self, point: Point) -> None:
        tracked = self._tracked[point.microbatch][point.number]
        if tracked.state is not _State.STORING:
            self._live_bytes -= tracked.nbytes
        if tracked.place is Place.HOST and tracked.is_offloaded:
            self._host_live_bytes -= tracked.nbytes
        tracked.state = _State.RELEASED
        self._note("release", point.microbatch, point.number)
