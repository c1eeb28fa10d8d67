"""The policy that measures, plans, checks itself against the clock, and declines where nothing is to be gained.

The first step is offloaded whole: its size is not known yet, and that is the choice
that cannot run out of memory. From then on each step's profile and the measured
bandwidths give a plan for the next: of each micro-batch the longest prefix whose
stores and loads hide behind compute (:mod:`ssdtrain_plugin.planner.plan`; the idea of
a byte budget per micro-batch is SSDTrain's, section III-D, which profiles one step,
takes backward for twice forward and does not look at the read bandwidth).

Note [When a plan is changed]. A plan stands while nothing speaks against it, or it
would follow the noise of the clock. It is replaced when training waited, when the
drive has become slower or faster than the plan assumes, or when a new plan would
offload a good deal more or less. If training waited although the drive was as fast
as assumed, the model of the step is wrong somewhere. Then loads are first allowed to
run further ahead, which costs the memory of a storage each time. If that is not
enough, less of the bandwidth is trusted, at once by a fifth, and regained in small
steps after quiet ones, up to a ceiling that is lifted only after a long time. So a
plan that was too bold is not tried again every few steps.

Note [Plans by shape]. Sequence lengths alternate. The first movable thing that a
micro-batch saves tells its shape by its size, so each slot of the step keeps a plan
for each shape that was seen there. A shape that is new takes the plan of the nearest,
scaled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.plan import Plan, plan_prefixes
from ssdtrain_plugin.policy.base import LoadBounds, Observation, PackRequest, Placement
from ssdtrain_plugin.policy.measured import schedule_of
from ssdtrain_plugin.profile import MicrobatchProfile, StepProfile
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.units import format_bytes, format_rate

__all__ = ["AdaptivePolicy"]

# A step has waited if it did so for this share of its compute time.
_STALL_SHARE = 0.01
# A plan that would offload this share of the bytes more or less is worth a change.
_CHANGE_SHARE = 0.05
# A drive whose speed has changed by this share is another drive.
_RATE_SHARE = 0.2
# Less than this share of the saved bytes is not worth the trouble.
_GAIN_SHARE = 0.02

_LESS_TRUST = 0.8
_MORE_TRUST = 1.1
_LEAST_TRUST = 0.05
_QUIET_STEPS = 4
_CEILING_STEPS = 64
# While nothing is offloaded, one storage goes out now and then: drives recover.
_PROBE_STEPS = 16
# The fastest of so many steps counts: what hides behind a slow one may not hide behind the next.
_RECENT_STEPS = 4
# After so many steps with nothing new, a new plan is made once in so many.
_CALM_STEPS = 8
# Storages that loads may run ahead beyond what the plan needs: threads wake up late.
_LEAST_SLACK = 1
_MOST_SLACK = 4
# So many steps in which nothing went out in time are enough to know.
_UNMEASURED_STEPS = 3
_MAX_SHAPES = 64


@dataclass(slots=True)
class _SlotPlan:
    """What to do with a micro-batch of one shape, in bytes of its log."""

    drive_end_bytes: int
    host_end_bytes: int
    offloaded_bytes: int
    total_bytes: int
    bounds: LoadBounds

    def scaled(self, factor: float) -> _SlotPlan:
        return _SlotPlan(
            int(factor * self.drive_end_bytes),
            int(factor * self.host_end_bytes),
            int(factor * self.offloaded_bytes),
            int(factor * self.total_bytes),
            LoadBounds(int(factor * self.bounds.prefetch_bytes), int(factor * self.bounds.window_bytes)),
        )


class AdaptivePolicy:
    """Offload what hides behind compute, and keep the rest.

    Args:
        max_inflight_bytes: Bound on stores queued or running; what finds it reached is kept.
        prefetch_bytes: The most that may be loaded ahead.
        host_bytes: Budget of the host tier, or 0.
        has_drive: There is a drive; else the host tier is the only place.
        lookahead_events: How many passes ahead the host announces a backward.
    """

    is_learning = True

    def __init__(
        self, *, max_inflight_bytes: int, prefetch_bytes: int, host_bytes: int, has_drive: bool, lookahead_events: int
    ) -> None:
        """Start with nothing measured."""
        self._max_inflight_bytes = max_inflight_bytes
        self._most_prefetch_bytes = prefetch_bytes
        self._host_bytes = host_bytes
        self._has_drive = has_drive
        self._lookahead_events = lookahead_events
        self._plans: dict[tuple[int, int], _SlotPlan] = {}  # by slot and shape
        self._present: _SlotPlan | None = None
        self._bounds: LoadBounds | None = None
        self._compute: deque[tuple[tuple[int, ...], float]] = deque(maxlen=_RECENT_STEPS)
        self._planned_rates: tuple[float, float] | None = None
        self._write_rate: float | None = None
        self._read_rate: float | None = None
        self._slack = _LEAST_SLACK
        self._trust = 1.0
        self._ceiling = 1.0
        self._ceiling_until = 0
        self._quiet_steps = 0
        self._calm_steps = 0
        self._declined_steps = 0
        self._is_probing = False
        self._unmeasured_steps = 0
        self._line = "measuring: offload everything"
        self._remark: str | None = None
        self._has_declined = False

    # --- the question

    def decide(self, request: PackRequest) -> Placement:
        """Offload what the plan of the micro-batch says, and keep what finds the queue full.

        Args:
            request: What is known of the storage.
        """
        if request.is_first:
            self._begin_microbatch(request)
        plan = self._present
        is_probe = request.is_first and self._is_probing
        if plan is None or is_probe or request.seen_bytes < plan.drive_end_bytes:
            return self._outwards(request)
        if request.seen_bytes < plan.host_end_bytes and request.nbytes <= request.host_free_bytes:
            return Placement.HOST
        return Placement.KEEP

    def _outwards(self, request: PackRequest) -> Placement:
        if request.inflight_bytes and request.inflight_bytes + request.nbytes > self._max_inflight_bytes:
            return Placement.KEEP
        if request.has_ssd:
            return Placement.SSD
        return Placement.HOST if request.nbytes <= request.host_free_bytes else Placement.KEEP

    def _begin_microbatch(self, request: PackRequest) -> None:
        self._present = self._plan_for(request.slot, request.nbytes)
        wanted = None if self._present is None else self._present.bounds
        if request.slot == 0 or wanted is None or self._bounds is None:
            self._bounds = wanted
        else:
            self._bounds = LoadBounds(*map(max, self._bounds, wanted))
        self._is_probing = request.slot == 0 and self._declined_steps % _PROBE_STEPS == _PROBE_STEPS - 1

    def _plan_for(self, slot: int, shape: int) -> _SlotPlan | None:
        """Get the plan of a shape in a slot, or the nearest one, scaled."""
        exact = self._plans.get((slot, shape))
        if exact is not None or not self._plans:
            return exact
        near_slot, near_shape = min(self._plans, key=lambda key: (abs(key[1] - shape), abs(key[0] - slot)))
        return self._plans[near_slot, near_shape].scaled(shape / max(near_shape, 1))

    def load_bounds(self) -> LoadBounds | None:
        """Bound the loads ahead as the plans of the present step want it."""
        return self._bounds

    # --- the answer of the clock

    def observe(self, observation: Observation) -> None:
        """Compare plan and fact; plan again where that pays.

        Args:
            observation: What is known of the step.
        """
        stats, profile = observation.stats, observation.profile
        self._declined_steps = 0 if stats.stored_bytes or stats.host_bytes else self._declined_steps + 1
        rates = self._rates(observation)
        if profile is None:
            return
        if rates is None:
            self._unmeasured_steps += 1
            if self._unmeasured_steps >= _UNMEASURED_STEPS:
                self._decline(profile, "backward begins before anything has reached its tier")
            return
        compute_seconds = profile.seconds
        has_waited = stats.stall_seconds > _STALL_SHARE * compute_seconds
        has_new_speed = self._planned_rates is None or any(
            abs(rate - planned) > _RATE_SHARE * planned
            for rate, planned in zip(rates, self._planned_rates, strict=True)
        )
        self._learn_trust(stats, has_waited=has_waited, has_new_speed=has_new_speed)
        self._calm_steps = 0 if has_waited or has_new_speed or not self._knows(profile) else self._calm_steps + 1
        if self._calm_steps > _CALM_STEPS and self._calm_steps % _CALM_STEPS:
            return  # planning takes a millisecond or two, and has found nothing new for a while
        plan = self._plan(profile, rates, observation.host_bytes_per_second)
        if plan is None:
            return
        if has_waited or has_new_speed or self._differs(profile, plan):
            self._adopt(profile, plan, rates)
        self._explain(profile, stats, rates, plan)

    def _rates(self, observation: Observation) -> tuple[float, float] | None:
        """Smooth the measured speeds; a slower one counts at once, a faster one by half."""
        write, read = observation.write_bytes_per_second, observation.read_bytes_per_second
        if not self._has_drive:
            write = read = observation.host_bytes_per_second
        self._write_rate = _smooth(self._write_rate, write)
        self._read_rate = _smooth(self._read_rate, read)
        # Until the other direction was used, take it for as fast as this one.
        write, read = self._write_rate or self._read_rate, self._read_rate or self._write_rate
        return None if write is None or read is None else (write, read)

    def _learn_trust(self, stats: StepStats, *, has_waited: bool, has_new_speed: bool) -> None:
        """Trust the model less when training waited and the drive was not the reason; Note [When a plan is changed]."""
        if has_waited:
            self._quiet_steps = 0
            if not has_new_speed and self._slack < _MOST_SLACK:
                self._slack += 1
            elif not has_new_speed:
                self._ceiling, self._ceiling_until = self._trust, stats.step + _CEILING_STEPS
                self._trust = max(_LEAST_TRUST, _LESS_TRUST * self._trust)
            return
        self._quiet_steps += 1
        if stats.step >= self._ceiling_until:
            self._ceiling = 1.0
        if self._quiet_steps % _QUIET_STEPS == 0:
            below = self._ceiling if self._ceiling == 1.0 else 0.95 * self._ceiling
            self._trust = max(self._trust, min(below, _MORE_TRUST * self._trust))

    def _plan(self, profile: StepProfile, rates: tuple[float, float], host_rate: float | None) -> Plan | None:
        schedule = schedule_of(self._fastest(profile), lookahead_events=self._lookahead_events)
        if schedule is None:
            return None
        machine = Machine(
            write_bytes_per_second=max(1.0, self._trust * rates[0]),
            read_bytes_per_second=max(1.0, self._trust * rates[1]),
            prefetch_bytes=self._most_prefetch_bytes,
            max_inflight_bytes=self._max_inflight_bytes,
            host_bytes=self._host_bytes if self._has_drive else 0,
            host_bytes_per_second=max(1.0, self._trust * (host_rate or max(rates))),
        )
        return plan_prefixes(schedule, machine)

    def _fastest(self, profile: StepProfile) -> StepProfile:
        """Shrink the times of a step to those of the fastest of the last ones that were alike."""
        shapes = tuple(microbatch.nbytes for microbatch in profile.microbatches)
        self._compute.append((shapes, profile.seconds))
        fastest = min(seconds for other, seconds in self._compute if other == shapes)
        return profile.scaled(fastest / profile.seconds) if profile.seconds > 0 else profile

    def _knows(self, profile: StepProfile) -> bool:
        return all((slot, _shape_of(each)) in self._plans for slot, each in enumerate(profile.microbatches))

    def _differs(self, profile: StepProfile, plan: Plan) -> bool:
        for slot, (microbatch, new) in enumerate(zip(profile.microbatches, plan.microbatches, strict=True)):
            old = self._plans.get((slot, _shape_of(microbatch)))
            if old is None or abs(new.ssd_bytes + new.host_bytes - old.offloaded_bytes) > (
                _CHANGE_SHARE * max(old.total_bytes, 1)
            ):
                return True
        return False

    def _adopt(self, profile: StepProfile, plan: Plan, rates: tuple[float, float]) -> None:
        self._planned_rates = rates
        total_bytes = sum(microbatch.nbytes for microbatch in profile.microbatches)
        offloaded_bytes = sum(each.ssd_bytes + each.host_bytes for each in plan.microbatches)
        is_declined = offloaded_bytes < _GAIN_SHARE * total_bytes
        while len(self._plans) + len(plan.microbatches) > _MAX_SHAPES * max(1, len(plan.microbatches)):
            self._plans.pop(next(iter(self._plans)))
        largest_bytes = max((save.nbytes for each in profile.microbatches for save in each.saves), default=0)
        slack_bytes = self._slack * largest_bytes
        bounds = LoadBounds(plan.prefetch_bytes + slack_bytes, plan.window_bytes + slack_bytes)
        for slot, (microbatch, each) in enumerate(zip(profile.microbatches, plan.microbatches, strict=True)):
            key = slot, _shape_of(microbatch)
            self._plans.pop(key, None)  # the newest last
            self._plans[key] = _SlotPlan(
                drive_end_bytes=0 if is_declined else each.ssd_end_bytes,
                host_end_bytes=0 if is_declined else each.host_end_bytes,
                offloaded_bytes=0 if is_declined else each.ssd_bytes + each.host_bytes,
                total_bytes=microbatch.nbytes,
                bounds=bounds,
            )

    # --- what a user reads

    def _explain(self, profile: StepProfile, stats: StepStats, rates: tuple[float, float], plan: Plan) -> None:
        plans = [self._plans.get((slot, _shape_of(each))) for slot, each in enumerate(profile.microbatches)]
        total_bytes = sum(each.nbytes for each in profile.microbatches)
        offloaded_bytes = sum(each.offloaded_bytes for each in plans if each is not None)
        speed = f"{format_rate(rates[0])} write, {format_rate(rates[1])} read"
        if offloaded_bytes:
            self._has_declined = False
            self._line = (
                f"offload {format_bytes(offloaded_bytes)} of {format_bytes(total_bytes)} a step at {speed}; "
                f"peak {format_bytes(plan.expected_peak_bytes)} of {format_bytes(plan.kept_peak_bytes)} expected"
            )
            if self._trust < 1.0:
                self._line += f"; trusting {self._trust:.0%} of the bandwidth"
            return
        self._say_declined(self._reason(profile, total_bytes, speed))

    def _decline(self, profile: StepProfile, reason: str) -> None:
        for slot, microbatch in enumerate(profile.microbatches):
            key = slot, _shape_of(microbatch)
            self._plans[key] = _SlotPlan(0, 0, 0, microbatch.nbytes, LoadBounds(0, 0))
        self._say_declined(reason)

    def _say_declined(self, reason: str) -> None:
        self._line = f"keep everything: {reason}"
        if not self._has_declined:
            self._has_declined = True
            self._remark = f"nothing is offloaded: {reason}"

    def _reason(self, profile: StepProfile, total_bytes: int, speed: str) -> str:
        movable_bytes = sum(save.nbytes for each in profile.microbatches for save in each.saves if save.is_movable)
        if movable_bytes < _GAIN_SHARE * max(total_bytes, 1):
            return "nothing is saved that is large enough to move"
        return (
            f"a step computes for {profile.seconds:.3g} s and saves {format_bytes(total_bytes)}, "
            f"too much to hide at {speed}"
        )

    def explain(self) -> str:
        """Say in one line what is offloaded, at which speed, and what is expected of it."""
        return self._line

    def take_remark(self) -> str | None:
        """Take the reason for offloading nothing, once each time that it comes to that."""
        remark, self._remark = self._remark, None
        return remark


def _shape_of(microbatch: MicrobatchProfile) -> int:
    return next((save.nbytes for save in microbatch.saves if save.is_movable), 0)


def _smooth(before: float | None, now: float | None) -> float | None:
    if now is None or before is None:
        return before if now is None else now
    return min(now, (before + now) / 2)
