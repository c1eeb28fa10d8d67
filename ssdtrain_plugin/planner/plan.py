"""Plans: which prefix of each micro-batch's log to offload, so that nothing ever waits.

Note [How a plan is made]
    Of one micro-batch a prefix is offloaded, since what is saved first is needed
    last. The longest prefix is taken for which

    * the last store, first come first served behind those of the micro-batches
      before, begins before a deadline, and
    * the loads, each begun as late as it can be, begin after the stores have
      ended and the backward is announced, and end before they are needed and
      before those of the next backward must begin.

    Both are monotone in the prefix, so it is found by bisection on running sums.
    Stores are walked in the order of forwards and loads in the reverse order of
    backwards, because the former push later ones back and the latter push earlier
    ones forward.

    The deadline is the end of a forward, its own or the next one before its
    backward: live bytes are highest there, and what is still on its way out has
    not helped. A late deadline stores more; but where the drive does not keep up,
    a queue forms in which every later micro-batch waits. The lower expected peak
    decides.

    Stores are not planned with a safety margin. One that is late is forwarded and
    costs memory alone, and one that was not planned is memory given away. A load
    that is late stalls, so only the rate of loads is derated.

    With ``max_inflight_bytes``, saves that find the queue full are kept, and the
    prefix reaches further instead.

    What is kept behind the prefix, nearest to the turn, goes to the host as far as
    its stores end before the last forward and its loads are in time.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

from ssdtrain_plugin.planner.curve import Curve, last_true
from ssdtrain_plugin.planner.expect import PeakEstimate, kept_peak, most_in_flight
from ssdtrain_plugin.planner.machine import UNBOUNDED_BYTES, Machine
from ssdtrain_plugin.planner.timeline import Phase, Place, Profile, Schedule, prefix_places
from ssdtrain_plugin.planner.turn import Turn

__all__ = ["MicrobatchPlan", "Plan", "plan_prefixes"]

# Times closer than this share of the step are the same time.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class MicrobatchPlan:
    """What to do with the log of one micro-batch.

    Attributes:
        ssd_end_bytes: A save that begins before this byte of the log goes to the drive.
        host_end_bytes: One that begins before this byte, and not before the other, goes to host memory.
        ssd_bytes: What the drive is expected to take; less than the prefix if saves find the queue full.
        host_bytes: What the host is expected to take.
        kept_bytes: What stays.
    """

    ssd_end_bytes: int
    host_end_bytes: int
    ssd_bytes: int
    host_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class Plan:
    """What to offload in one step. It expects no stall.

    Attributes:
        microbatches: One for each.
        prefetch_bytes: The least bound on loads ahead with which none is late.
        window_bytes: The same for ``Machine.window_bytes``; unbounded if the plan may not use it.
        expected_peak_bytes: Highest live bytes; an estimate from the begin and end of each event.
        kept_peak_bytes: Highest live bytes if all were kept.
        expected_store_seconds: How long the drive writes.
        expected_load_seconds: How long the drive reads, at the rate that is counted on.
    """

    microbatches: tuple[MicrobatchPlan, ...]
    prefetch_bytes: int
    window_bytes: int
    expected_peak_bytes: int
    kept_peak_bytes: int
    expected_store_seconds: float
    expected_load_seconds: float

    def places(self, schedule: Schedule) -> tuple[tuple[Place, ...], ...]:
        """List one place for each save, for the simulation."""
        return prefix_places(schedule, [(each.ssd_end_bytes, each.host_end_bytes) for each in self.microbatches])

    def apply(self, machine: Machine) -> Machine:
        """Give a machine the bounds of this plan, for the simulation."""
        return dataclasses.replace(machine, prefetch_bytes=self.prefetch_bytes, window_bytes=self.window_bytes)


def plan_prefixes(schedule: Schedule, machine: Machine, *, safety: float = 0.1, uses_window: bool = True) -> Plan:
    """Choose what to offload so that the peak is low and nothing waits.

    Args:
        schedule: What the stage computes. Micro-batches that share a profile object are planned faster.
        machine: What moves bytes; its ``prefetch_bytes`` and ``window_bytes`` are the most that the plan may ask for.
        safety: Share of the rate of loads that is not counted on, 0 to less than 1.
        uses_window: Whether the runtime can hold loads back while the kept tail is enough to go on with.

    Raises:
        ValueError: ``safety`` is out of its range.
    """
    if not 0.0 <= safety < 1.0:
        raise ValueError(f"safety is {safety} (expected 0 to less than 1)")
    planner = _Planner(schedule, machine, safety, uses_window=uses_window)
    own = planner.draft(0)
    if not planner.overlaps:
        return own
    later = planner.draft(1)
    return later if later.expected_peak_bytes < own.expected_peak_bytes else own


class _Planner:
    def __init__(self, schedule: Schedule, machine: Machine, safety: float, *, uses_window: bool) -> None:
        self._schedule = schedule
        self._machine = machine
        self._uses_window = uses_window
        num_in_flight = most_in_flight(schedule)
        self.overlaps = num_in_flight > 1
        share = machine.mixed_share if self.overlaps else 1.0
        self._rated = dataclasses.replace(
            machine,
            latency_seconds=machine.latency_seconds / share,
            # Where a late store makes forward wait, it stalls too.
            write_bytes_per_second=machine.write_bytes_per_second * (share if machine.waits_when_full else 1.0),
            read_bytes_per_second=machine.read_bytes_per_second * share * (1.0 - safety),
            host_bytes_per_second=machine.host_bytes_per_second * (1.0 - safety),
        )
        curves = {id(profile): Curve(profile, self._rated) for profile in _distinct(schedule)}
        self._curves = [curves[id(profile)] for profile in schedule.profiles]
        self._turns = [Turn(schedule, number, curve) for number, curve in enumerate(self._curves)]
        forward_order = [event.microbatch for event in schedule.events if event.phase is Phase.FORWARD]
        self._by_forward = [self._turns[microbatch] for microbatch in forward_order]
        self._by_backward = [self._turns[microbatch] for microbatch in schedule.backward_order]
        movable_bytes = sum(curve.moved_bytes[-1] for curve in self._curves)
        # Stores to the host take room in flight as well, which is not modelled; where that stalls, there are none.
        may_wait = machine.waits_when_full and machine.max_inflight_bytes < movable_bytes
        self._host_share_bytes = 0 if may_wait else machine.host_bytes // max(1, num_in_flight)
        self._tolerance_seconds = _TOLERANCE * schedule.seconds
        # Micro-batches are alike, so most questions come again.
        self._thinned: dict[tuple[Curve, float, int], Curve] = {}
        self._leads: dict[tuple[Curve, int, int, float], tuple[int, int]] = {}
        self._estimate = PeakEstimate(schedule, self._turns, self._tolerance_seconds)

    def draft(self, later: int) -> Plan:
        """Make a plan whose deadlines are the ends of the ``later``-th forwards after the own ones."""
        for turn, curve in zip(self._turns, self._curves, strict=True):
            turn.reset(curve)
        self._fit_stores(later, is_first=True)
        if self._fit_loads():
            self._fit_stores(later, is_first=False)
        for turn in self._turns:
            turn.host_end = turn.end
        if self._host_share_bytes:
            self._fit_host()
        return self._summarise()

    # --- the drive

    def _fit_stores(self, later: int, *, is_first: bool) -> None:
        """Walk the stores in their order; each queue delays the next."""
        free_seconds = 0.0
        for position, turn in enumerate(self._by_forward):
            # Nothing is saved before forward begins, so a queue that was empty earlier is just empty.
            turn.free_seconds = max(0.0, free_seconds - turn.forward_seconds)
            deadline = turn.forward_ends[min(later, len(turn.forward_ends) - 1)] + self._tolerance_seconds
            if is_first:
                self._thin(turn, self._by_forward[:position])
            turn.end = last_true(partial(turn.fits, deadline_seconds=deadline), 0, turn.cap)
            if turn.end:
                free_seconds = turn.stored_seconds

    def _thin(self, turn: Turn, before: list[Turn]) -> None:
        """Leave out the saves that find too much in flight."""
        waiting_bytes = 0
        if turn.free_seconds > 0.0:
            waiting_bytes = sum(other.waiting_bytes(turn.forward_seconds) for other in before)
        if waiting_bytes + turn.curve.moved_bytes[-1] <= self._machine.max_inflight_bytes:
            return
        key = (turn.curve, turn.free_seconds, waiting_bytes)
        if key not in self._thinned:
            refused = turn.curve.refusals(turn.free_seconds, waiting_bytes, self._rated)
            self._thinned[key] = Curve(turn.curve.profile, self._rated, refused)
        thinned = self._thinned[key]
        if self._machine.waits_when_full:
            # A wait is a stall, so the prefix ends before the first one.
            turn.cap = turn.curve.first_difference(thinned)
        else:
            turn.stored_curve = thinned

    def _fit_loads(self) -> bool:
        """Walk the loads against their order; each must make room for the next. Tell whether a prefix shrank."""
        next_load_seconds = math.inf
        has_shrunk = False
        for position in reversed(range(len(self._by_backward))):
            turn = self._by_backward[position]
            turn.done_by_seconds = next_load_seconds - turn.backward_seconds
            end = last_true(partial(turn.fits, deadline_seconds=math.inf), 0, turn.end)
            if not self._is_ahead_enough(position, end):
                end = last_true(partial(self._is_ahead_enough, position), 0, end)
            has_shrunk |= end < turn.end
            turn.cap = turn.end = end
            if turn.end:
                next_load_seconds = turn.latest_load_seconds(turn.end)
        return has_shrunk

    # --- how far ahead

    def _is_ahead_enough(self, position: int, end: int) -> bool:
        """Tell whether the bounds on bytes ahead are wide enough for a prefix."""
        turn = self._by_backward[position]
        ahead_bytes, window_bytes = self._lead(position, end, max(end, turn.host_end))
        # One save over a bound is always admitted.
        largest_bytes = turn.curve.largest_bytes
        return ahead_bytes <= max(self._machine.prefetch_bytes, largest_bytes) and (
            not self._uses_window or window_bytes <= max(self._machine.window_bytes, largest_bytes)
        )

    def _lead(self, position: int, end: int, host_end: int) -> tuple[int, int]:
        """How far ahead loads must run, with what the backwards before have still to ask for."""
        turn = self._by_backward[position]
        if not host_end:
            return 0, 0
        last_needed = turn.curve.profile.saves[0].needed_seconds
        done_by_seconds = turn.done_by_seconds if turn.done_by_seconds < last_needed else math.inf
        key = (turn.curve, end, host_end, done_by_seconds)
        if key not in self._leads:
            self._leads[key] = turn.curve.lead(end, host_end, done_by_seconds)
        ahead_bytes, window_bytes = self._leads[key]
        begin_seconds = turn.latest_load_seconds(end)
        if host_end > end:
            begin_seconds = min(begin_seconds, turn.latest_host_load_seconds(host_end))
        for before in reversed(self._by_backward[:position]):
            before_ahead_bytes, before_window_bytes = before.unasked(begin_seconds)
            if not before_window_bytes:
                break
            ahead_bytes += before_ahead_bytes
            window_bytes += before_window_bytes
        return ahead_bytes, window_bytes

    def _leads_of_all(self) -> tuple[int, int]:
        leads = [self._lead(position, turn.end, turn.host_end) for position, turn in enumerate(self._by_backward)]
        return max((ahead for ahead, _ in leads), default=0), max((window for _, window in leads), default=0)

    # --- the host

    def _fit_host(self) -> None:
        """Give the host what the drive cannot hide, nearest to the turn, if the bounds allow it at all."""
        free_seconds = 0.0
        for turn in self._by_forward:
            turn.host_free_seconds = max(0.0, free_seconds - turn.forward_seconds)
            turn.host_end = self._widest_host_end(turn, len(turn.curve))
            if turn.host_end > turn.end:
                free_seconds = turn.host_stored_seconds(turn.host_end)
        next_load_seconds = math.inf
        for turn in reversed(self._by_backward):
            turn.host_done_by_seconds = next_load_seconds - turn.backward_seconds
            turn.host_end = self._widest_host_end(turn, turn.host_end)
            if turn.host_end > turn.end:
                next_load_seconds = turn.latest_host_load_seconds(turn.host_end)
        if not all(self._is_ahead_enough(position, turn.end) for position, turn in enumerate(self._by_backward)):
            for turn in self._by_backward:
                turn.host_end = turn.end

    def _widest_host_end(self, turn: Turn, cap: int) -> int:
        moved_bytes = turn.curve.moved_bytes
        limit_bytes = moved_bytes[turn.end] + self._host_share_bytes
        return last_true(lambda end: moved_bytes[end] <= limit_bytes and turn.fits_host(end), turn.end, cap)

    # --- what to expect

    def _summarise(self) -> Plan:
        prefetch_bytes, window_bytes = self._leads_of_all()
        if not self._uses_window:
            window_bytes = UNBOUNDED_BYTES
        return Plan(
            microbatches=tuple(_describe(turn) for turn in self._turns),
            prefetch_bytes=prefetch_bytes,
            window_bytes=window_bytes,
            expected_peak_bytes=self._estimate.peak_bytes(prefetch_bytes, window_bytes),
            kept_peak_bytes=kept_peak(self._schedule),
            expected_store_seconds=math.fsum(turn.stored_curve.store_seconds[turn.end] for turn in self._turns),
            expected_load_seconds=math.fsum(turn.stored_curve.load_seconds[turn.end] for turn in self._turns),
        )


def _distinct(schedule: Schedule) -> list[Profile]:
    return list({id(profile): profile for profile in schedule.profiles}.values())


def _describe(turn: Turn) -> MicrobatchPlan:
    logged_bytes = turn.curve.profile.logged_bytes
    return MicrobatchPlan(
        ssd_end_bytes=logged_bytes[turn.end],
        host_end_bytes=logged_bytes[turn.host_end],
        ssd_bytes=turn.ssd_bytes,
        host_bytes=turn.host_bytes,
        kept_bytes=logged_bytes[-1] - turn.ssd_bytes - turn.host_bytes,
    )
