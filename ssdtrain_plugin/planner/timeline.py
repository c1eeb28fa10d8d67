"""What a pipeline stage computes in one step: when it saves, when it needs what it saved, when it lets go.

All times are those of a step that never waits; :mod:`ssdtrain_plugin.planner.simulate`
moves them when it does.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = [
    "Event",
    "Phase",
    "Place",
    "Point",
    "PointKind",
    "Profile",
    "Save",
    "Schedule",
    "accumulation",
    "all_places",
    "equal_layers",
    "one_forward_one_backward",
    "prefix_places",
]


class Save(NamedTuple):
    """One storage that forward saves for backward.

    Attributes:
        nbytes: Its size.
        saved_seconds: When it is saved, from the begin of forward.
        needed_seconds: When it is first unpacked, from the begin of backward.
        released_seconds: When backward lets go of it, from the begin of backward.
        is_movable: False for what is always kept: too small, or not on the device's tier.
    """

    nbytes: int
    saved_seconds: float
    needed_seconds: float
    released_seconds: float
    is_movable: bool = True


@dataclass(frozen=True)
class Profile:
    """The saves of one micro-batch.

    Attributes:
        saves: In the order of forward.
        forward_seconds: How long forward computes.
        backward_seconds: How long backward computes.

    Raises:
        ValueError: A size is not positive, or a time lies outside of its phase or out of order.
    """

    saves: tuple[Save, ...]
    forward_seconds: float
    backward_seconds: float

    def __post_init__(self) -> None:
        """Refuse what cannot have been measured."""
        before_seconds = 0.0
        for number, save in enumerate(self.saves):
            if save.nbytes < 1:
                raise ValueError(f"save {number} holds {save.nbytes} bytes (expected at least 1)")
            if not before_seconds <= save.saved_seconds <= self.forward_seconds:
                raise ValueError(
                    f"save {number} is saved at {save.saved_seconds} s "
                    f"(expected {before_seconds} to {self.forward_seconds} s, in the order of forward)"
                )
            if not 0.0 <= save.needed_seconds <= save.released_seconds <= self.backward_seconds:
                raise ValueError(
                    f"save {number} is needed at {save.needed_seconds} s and released at {save.released_seconds} s "
                    f"(expected this order, within 0 to {self.backward_seconds} s)"
                )
            before_seconds = save.saved_seconds

    @property
    def total_bytes(self) -> int:
        """Bytes of all saves."""
        return self.logged_bytes[-1]

    @cached_property
    def logged_bytes(self) -> tuple[int, ...]:
        """Bytes of each prefix of the log, from the empty one to the whole."""
        return (0, *itertools.accumulate(save.nbytes for save in self.saves))

    @cached_property
    def asked_seconds(self) -> tuple[float, ...]:
        """For each save, when backward has asked for it and for all saves after it."""
        needs = itertools.accumulate((save.needed_seconds for save in reversed(self.saves)), max)
        return tuple(needs)[::-1]

    @cached_property
    def held_bytes(self) -> int:
        """Most bytes that backward has asked for and not released at the same time."""
        changes = [(save.needed_seconds, 1, save.nbytes) for save in self.saves]
        # What is released is gone before what is needed then, but not before it was needed itself.
        changes += [
            (save.released_seconds, 2 * (save.needed_seconds == save.released_seconds), -save.nbytes)
            for save in self.saves
        ]
        changes.sort()
        return max(itertools.accumulate(nbytes for _, _, nbytes in changes), default=0)


def equal_layers(
    num_layers: int, total_bytes: int, forward_seconds: float, backward_seconds: float, *, saves_per_layer: int = 1
) -> Profile:
    """Describe a stack of equal layers, each with equal saves at equal distances.

    A save is made at the end of its part of forward, needed at the begin of its
    part of backward and released at the end of it.

    Args:
        num_layers: At least 1.
        total_bytes: Of all layers; rounded down to a multiple of the number of saves.
        forward_seconds: Of all layers.
        backward_seconds: Of all layers.
        saves_per_layer: At least 1.
    """
    count = num_layers * saves_per_layer
    saves = tuple(
        Save(
            nbytes=total_bytes // count,
            saved_seconds=(number + 1) / count * forward_seconds,
            needed_seconds=(count - 1 - number) / count * backward_seconds,
            released_seconds=(count - number) / count * backward_seconds,
        )
        for number in range(count)
    )
    return Profile(saves, forward_seconds, backward_seconds)


class Phase(enum.Enum):
    """What a stage does."""

    FORWARD = "forward"
    BACKWARD = "backward"
    IDLE = "idle"


class Event(NamedTuple):
    """One thing that a stage does.

    Attributes:
        phase: What.
        microbatch: Whose; not used when idle.
        seconds: How long it is idle; forward and backward take what their profile says.
    """

    phase: Phase
    microbatch: int = -1
    seconds: float = 0.0


class PointKind(enum.Enum):
    """What happens at one moment of the computation."""

    SAVE = "save"
    ANNOUNCE = "announce"
    NEED = "need"
    RELEASE = "release"


class Point(NamedTuple):
    """One moment of the computation.

    Attributes:
        seconds: From the begin of the step, without any stall.
        kind: What happens.
        microbatch: Whose.
        number: Of the save in its profile; -1 when a backward is announced.
    """

    seconds: float
    kind: PointKind
    microbatch: int
    number: int


@dataclass(frozen=True)
class Schedule:
    """The order in which a stage runs the micro-batches of a step.

    Attributes:
        profiles: One for each micro-batch. Micro-batches that are alike should share one object.
        events: What the stage does, in order. An idle time is not shortened by a stall before it.
        lookahead_events: How many computing events ahead a backward is announced; 0
            announces it when it begins. Never before its own forward has ended.

    Raises:
        ValueError: A micro-batch has not one forward and, later, one backward.
    """

    profiles: tuple[Profile, ...]
    events: tuple[Event, ...]
    lookahead_events: int = 1

    def __post_init__(self) -> None:
        """Refuse an order that no stage can run."""
        ran = [(event.phase, event.microbatch) for event in self.events if event.phase is not Phase.IDLE]
        for microbatch in range(len(self.profiles)):
            mine = [phase for phase, other in ran if other == microbatch]
            if mine != [Phase.FORWARD, Phase.BACKWARD]:
                got = ", ".join(phase.value for phase in mine) or "nothing"
                raise ValueError(f"micro-batch {microbatch} runs {got} (expected forward, then backward)")
        if len(ran) != 2 * len(self.profiles):
            raise ValueError(f"{len(ran)} computing events for {len(self.profiles)} profiles (expected two for each)")

    def seconds_of(self, event: Event) -> float:
        """Tell how long an event takes."""
        if event.phase is Phase.IDLE:
            return event.seconds
        profile = self.profiles[event.microbatch]
        return profile.forward_seconds if event.phase is Phase.FORWARD else profile.backward_seconds

    @cached_property
    def begins(self) -> tuple[float, ...]:
        """Begin of each event in seconds, and the end of the last one."""
        return (0.0, *itertools.accumulate(self.seconds_of(event) for event in self.events))

    @property
    def seconds(self) -> float:
        """How long the step takes without a stall."""
        return self.begins[-1]

    @cached_property
    def positions(self) -> dict[tuple[Phase, int], int]:
        """Position in ``events`` of each forward and backward."""
        return {
            (event.phase, event.microbatch): position
            for position, event in enumerate(self.events)
            if event.phase is not Phase.IDLE
        }

    @cached_property
    def announcements(self) -> tuple[int, ...]:
        """For each micro-batch, the position of the event at whose begin its backward is announced."""
        computing = [position for position, event in enumerate(self.events) if event.phase is not Phase.IDLE]
        ranks = {position: rank for rank, position in enumerate(computing)}
        announced = [0] * len(self.profiles)
        last = 0
        for microbatch in self.backward_order:
            rank = ranks[self.positions[Phase.BACKWARD, microbatch]]
            earliest = computing[max(0, rank - self.lookahead_events)]
            # In the order of backwards: what is needed later must not be loaded first.
            last = max(last, earliest, self.positions[Phase.FORWARD, microbatch] + 1)
            announced[microbatch] = last
        return tuple(announced)

    @cached_property
    def backward_order(self) -> tuple[int, ...]:
        """Micro-batches in the order of their backwards."""
        return tuple(event.microbatch for event in self.events if event.phase is Phase.BACKWARD)

    def points(self) -> list[Point]:
        """List every moment at which something happens, in order.

        Of what happens at the same time, what frees memory comes first.
        """
        announced_at: dict[int, list[int]] = {}
        for microbatch in self.backward_order:
            announced_at.setdefault(self.announcements[microbatch], []).append(microbatch)
        found: list[Point] = []
        for position, event in enumerate(self.events):
            begin = self.begins[position]
            found += [Point(begin, PointKind.ANNOUNCE, other, -1) for other in announced_at.get(position, ())]
            if event.phase is Phase.FORWARD:
                saves = self.profiles[event.microbatch].saves
                for index, save in enumerate(saves):
                    found.append(Point(begin + save.saved_seconds, PointKind.SAVE, event.microbatch, index))
            elif event.phase is Phase.BACKWARD:
                found += _backward_points(self.profiles[event.microbatch], event.microbatch, begin)
        return found


def _backward_points(profile: Profile, microbatch: int, begin_seconds: float) -> list[Point]:
    """Order needs and releases: at the same time, releases first, but never before their own need."""
    ranked: list[tuple[float, int, int, PointKind]] = []
    for index, save in enumerate(profile.saves):
        is_instant = save.needed_seconds == save.released_seconds
        ranked.append((save.needed_seconds, 1, -index, PointKind.NEED))
        ranked.append((save.released_seconds, 2 if is_instant else 0, -index, PointKind.RELEASE))
    ranked.sort(key=lambda entry: entry[:3])
    return [Point(begin_seconds + seconds, kind, microbatch, -number) for seconds, _, number, kind in ranked]


def accumulation(profiles: Sequence[Profile], *, lookahead_events: int = 1) -> Schedule:
    """Run each micro-batch forward and at once backward; one profile is a plain step.

    Args:
        profiles: One for each micro-batch.
        lookahead_events: As in :class:`Schedule`.
    """
    events = [Event(phase, number) for number in range(len(profiles)) for phase in (Phase.FORWARD, Phase.BACKWARD)]
    return Schedule(tuple(profiles), tuple(events), lookahead_events)


def one_forward_one_backward(
    profile: Profile, stage: int, num_stages: int, num_microbatches: int, *, lookahead_events: int = 1
) -> Schedule:
    """Run a stage of the 1F1B pipeline (PipeDream-Flush), with the bubbles of equal stages.

    Args:
        profile: Of every micro-batch on every stage.
        stage: From 0.
        num_stages: At least ``stage + 1``.
        num_microbatches: In the step.
        lookahead_events: As in :class:`Schedule`.
    """
    orders = [_order_of(other, num_stages, num_microbatches) for other in range(num_stages)]
    begins = _begins_of(orders, profile)
    events: list[Event] = []
    now = 0.0
    for event in orders[stage]:
        begin = begins[stage, event]
        # Sums in another order differ in the last bits; that is no bubble.
        if begin - now > 1e-9 * (profile.forward_seconds + profile.backward_seconds):
            events.append(Event(Phase.IDLE, seconds=begin - now))
        events.append(event)
        now = begin + (profile.forward_seconds if event.phase is Phase.FORWARD else profile.backward_seconds)
    return Schedule((profile,) * num_microbatches, tuple(events), lookahead_events)


def _order_of(stage: int, num_stages: int, num_microbatches: int) -> list[Event]:
    num_warmup = min(num_stages - stage - 1, num_microbatches)
    order = [Event(Phase.FORWARD, number) for number in range(num_warmup)]
    for number in range(num_microbatches):
        if number + num_warmup < num_microbatches:
            order.append(Event(Phase.FORWARD, number + num_warmup))
        order.append(Event(Phase.BACKWARD, number))
    return order


def _begins_of(orders: list[list[Event]], profile: Profile) -> dict[tuple[int, Event], float]:
    """When each event of each stage can begin, given the stages before and behind."""
    begins: dict[tuple[int, Event], float] = {}
    free_at = [0.0] * len(orders)
    next_position = [0] * len(orders)
    ends: dict[tuple[int, Event], float] = {}
    while any(position < len(order) for position, order in zip(next_position, orders, strict=True)):
        for stage, order in enumerate(orders):
            while next_position[stage] < len(order):
                event = order[next_position[stage]]
                is_forward = event.phase is Phase.FORWARD
                neighbour = stage - 1 if is_forward else stage + 1
                waits_for = (neighbour, event)
                if 0 <= neighbour < len(orders) and waits_for not in ends:
                    break
                begin = max(free_at[stage], ends.get(waits_for, 0.0))
                begins[stage, event] = begin
                free_at[stage] = begin + (profile.forward_seconds if is_forward else profile.backward_seconds)
                ends[stage, event] = free_at[stage]
                next_position[stage] += 1
    return begins


class Place(enum.Enum):
    """Where a save spends the time between forward and backward."""

    KEEP = "keep"
    HOST = "host"
    SSD = "ssd"


def all_places(schedule: Schedule, place: Place) -> tuple[tuple[Place, ...], ...]:
    """Put every save in the same place.

    Args:
        schedule: Of the step.
        place: For what is movable.
    """
    return prefix_places(schedule, [_everything_in(place, profile) for profile in schedule.profiles])


def _everything_in(place: Place, profile: Profile) -> tuple[int, int]:
    end_bytes = profile.total_bytes if place is not Place.KEEP else 0
    return (0, end_bytes) if place is Place.HOST else (end_bytes, end_bytes)


def prefix_places(schedule: Schedule, ends: Sequence[tuple[int, int]]) -> tuple[tuple[Place, ...], ...]:
    """Put the first bytes of each log on the drive, the next ones into host memory, and keep the rest.

    A save belongs where its first byte lies: the rule that a policy applies to
    ``PackRequest.seen_bytes``.

    Args:
        schedule: Of the step.
        ends: For each micro-batch, the ends in bytes of the part for the drive and of the part for the host.

    Returns:
        For each micro-batch, one place for each save.
    """
    places = []
    for profile, (ssd_end_bytes, host_end_bytes) in zip(schedule.profiles, ends, strict=True):
        seen_bytes = 0
        row = []
        for save in profile.saves:
            place = Place.KEEP
            if save.is_movable and seen_bytes < ssd_end_bytes:
                place = Place.SSD
            elif save.is_movable and seen_bytes < host_end_bytes:
                place = Place.HOST
            row.append(place)
            seen_bytes += save.nbytes
        places.append(tuple(row))
    return tuple(places)
