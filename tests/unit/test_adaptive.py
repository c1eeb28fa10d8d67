"""The adaptive policy against a simulated stage: its decisions go in, stalls and speeds come out. No clock runs."""

import dataclasses
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.simulate import simulate
from ssdtrain_plugin.planner.timeline import (
    Phase,
    Place,
    accumulation,
    equal_layers,
    one_forward_one_backward,
)
from ssdtrain_plugin.policy.adaptive import AdaptivePolicy
from ssdtrain_plugin.policy.base import Observation, PackRequest, Placement
from ssdtrain_plugin.profile import MicrobatchProfile, SaveProfile, StepProfile
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.units import GIB, MIB

PLACES = {Placement.KEEP: Place.KEEP, Placement.SSD: Place.SSD, Placement.HOST: Place.HOST}
LAYERS = equal_layers(12, 12 * 64 * MIB, forward_seconds=1.0, backward_seconds=2.0)
FULL_RATE = LAYERS.total_bytes / 1.0
"""What full offload needs: all is written while forward runs."""


def profile_of(schedule):
    microbatches = []
    for number, profile in enumerate(schedule.profiles):
        forward = schedule.begins[schedule.positions[Phase.FORWARD, number]]
        backward = schedule.begins[schedule.positions[Phase.BACKWARD, number]]
        saves = tuple(SaveProfile(s.nbytes, s.saved_seconds, s.needed_seconds, s.is_movable) for s in profile.saves)
        microbatches.append(
            MicrobatchProfile(
                forward, forward + profile.forward_seconds, backward, backward + profile.backward_seconds, saves
            )
        )
    return StepProfile(tuple(microbatches), schedule.seconds)


class Stage:
    """Runs steps of a schedule on a machine, as the runtime would, for one policy."""

    def __init__(self, rate=FULL_RATE, *, host_bytes=0, seed=None):
        self.rate = rate
        self.host_bytes = host_bytes
        self.noise = random.Random(seed) if seed is not None else None
        self.policy = AdaptivePolicy(
            max_inflight_bytes=2 * GIB,
            prefetch_bytes=2 * GIB,
            host_bytes=host_bytes,
            has_drive=True,
            lookahead_events=0,
        )
        self.is_too_late = False
        self.trace = []

    def step(self, schedule):
        rate = self.rate * (self.noise.uniform(0.95, 1.05) if self.noise else 1.0)
        machine = Machine(write_bytes_per_second=rate, read_bytes_per_second=rate, host_bytes=self.host_bytes)
        places = [self._places(slot, profile) for slot, profile in enumerate(schedule.profiles)]
        bounds = self.policy.load_bounds()
        if bounds is not None:
            machine = dataclasses.replace(
                machine, prefetch_bytes=bounds.prefetch_bytes, window_bytes=bounds.window_bytes
            )
        outcome = simulate(schedule, machine, places)
        has_moved = any(Place.SSD in row for row in places) and not self.is_too_late
        stats = _stats(len(self.trace), outcome, self.policy.explain())
        self.policy.observe(
            Observation(
                stats=stats,
                profile=profile_of(schedule),
                write_bytes_per_second=rate if has_moved else None,
                read_bytes_per_second=rate if outcome.loaded_bytes else None,
                host_bytes_per_second=None,
            )
        )
        self.trace.append(stats)
        return stats

    def _places(self, slot, profile):
        seen, first, row = 0, True, []
        host_free = self.host_bytes
        for save in profile.saves:
            placement = Placement.KEEP
            if save.is_movable:
                request = PackRequest(
                    save.nbytes, seen, None, host_free, has_ssd=True, slot=slot, is_first=first, inflight_bytes=0
                )
                placement, first = self.policy.decide(request), False
            host_free -= save.nbytes if placement is Placement.HOST else 0
            row.append(PLACES[placement])
            seen += save.nbytes
        return row


def _stats(step, outcome, plan):
    values = {field.name: 0 for field in dataclasses.fields(StepStats)} | {"failures": {}, "plan": plan, "step": step}
    return StepStats(
        **values
        | {
            "stored_bytes": outcome.stored_bytes,
            "loaded_bytes": outcome.loaded_bytes,
            "peak_activation_bytes": outcome.peak_bytes,
            "num_loads_on_demand": outcome.num_loads_on_demand,
            "stall_seconds": outcome.stall_seconds,
        }
    )


PLAIN = accumulation([LAYERS])
NONE_BYTES = LAYERS.total_bytes


def settled(stage, schedule, num_steps=12):
    for _ in range(num_steps):
        stats = stage.step(schedule)
    return stats


def test_the_first_step_is_offloaded_whole():
    assert Stage().step(PLAIN).stored_bytes + 2 * LAYERS.saves[-1].nbytes >= NONE_BYTES


@pytest.mark.parametrize("factor", [0.1, 0.25, 0.5, 1, 2, 4])
def test_nothing_waits_at_any_speed(factor):
    stats = settled(Stage(factor * FULL_RATE), PLAIN)
    assert stats.stall_seconds <= 0.01 * PLAIN.seconds
    assert stats.num_loads_on_demand == 0
    assert stats.peak_activation_bytes <= NONE_BYTES


def test_the_peak_falls_with_the_speed_of_the_drive():
    peaks = [
        settled(Stage(factor * FULL_RATE), PLAIN).peak_activation_bytes / NONE_BYTES
        for factor in (0.1, 0.25, 0.5, 1, 2, 4)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= 0.30
    assert peaks[0] < 1


def test_a_drive_that_slows_down_and_comes_back():
    """Ten steps at full speed, ten at a tenth, then full speed again."""
    stage = Stage(4 * FULL_RATE)
    settled(stage, PLAIN, 10)
    before = stage.trace[-1].stored_bytes
    stage.rate /= 10
    settled(stage, PLAIN, 10)
    slow = stage.trace[10:]
    assert slow[0].stall_seconds > 0.01 * PLAIN.seconds, "the test is vacuous: the slow drive is fast enough"
    stalled = [stats.step for stats in slow if stats.stall_seconds > 0.01 * PLAIN.seconds]
    assert stalled == list(range(10, 10 + len(stalled)))
    assert len(stalled) <= 3
    assert slow[-1].stored_bytes < 0.8 * before, "the plan shrinks"
    stage.rate *= 10
    settled(stage, PLAIN, 20)
    assert stage.trace[-1].stored_bytes >= 0.9 * before, "and grows again"
    assert not [stats for stats in stage.trace[20:] if stats.stall_seconds > 0.01 * PLAIN.seconds]
    assert [json.loads(stats.to_json())["stored_bytes"] for stats in stage.trace] == [
        stats.stored_bytes for stats in stage.trace
    ]


@pytest.mark.parametrize("factor", [0.5, 1, 4])
def test_noise_does_not_move_the_plan(factor):
    stage = Stage(factor * FULL_RATE, seed=0)
    settled(stage, PLAIN, 100)
    late = [stats.stored_bytes for stats in stage.trace[40:]]
    changes = sum(before != after for before, after in itertools.pairwise(late))
    assert changes <= 6
    assert sum(stats.stall_seconds for stats in stage.trace[40:]) <= 0.01 * 60 * PLAIN.seconds


def test_lengths_that_alternate_have_plans_of_their_own():
    short = equal_layers(12, LAYERS.total_bytes // 4, forward_seconds=0.25, backward_seconds=0.5)
    stage = Stage(FULL_RATE)
    for _ in range(10):
        stage.step(PLAIN)
        stage.step(accumulation([short]))
    long_step, short_step = stage.step(PLAIN), stage.step(accumulation([short]))
    for stats, schedule in ((long_step, PLAIN), (short_step, accumulation([short]))):
        assert stats.stall_seconds <= 0.01 * schedule.seconds
        assert 0 < stats.stored_bytes < schedule.profiles[0].total_bytes
    assert len(stage.policy._plans) == 2


def test_shapes_that_never_repeat_do_not_pile_up():
    stage = Stage(FULL_RATE)
    for number in range(300):
        stage.step(accumulation([equal_layers(12, LAYERS.total_bytes + 12 * number, 1.0, 2.0)]))
    assert len(stage.policy._plans) <= 64


def test_a_stage_with_more_in_flight_offloads_more():
    """The first of four stages holds four micro-batches, the last turns round at once."""
    schedules = [one_forward_one_backward(LAYERS, stage, 4, 8, lookahead_events=0) for stage in (0, 3)]
    first, last = (settled(Stage(FULL_RATE), schedule) for schedule in schedules)
    assert first.stall_seconds <= 0.01 * schedules[0].seconds
    assert last.stall_seconds <= 0.01 * schedules[1].seconds
    assert first.stored_bytes >= last.stored_bytes


def test_what_the_drive_cannot_hide_goes_to_the_host():
    rate = 0.25 * FULL_RATE
    alone, both = Stage(rate), Stage(rate, host_bytes=256 * MIB)
    assert settled(both, PLAIN).peak_activation_bytes < settled(alone, PLAIN).peak_activation_bytes
    row = both._places(0, LAYERS)
    assert row == sorted(row, key=[Place.SSD, Place.HOST, Place.KEEP].index), "the host has what is nearest to the turn"
    assert Place.HOST in row


def test_it_declines_once_and_says_why_and_looks_again_now_and_then():
    stage = Stage(0.005 * FULL_RATE)
    remarks = []
    for _ in range(60):
        stage.step(PLAIN)
        remarks.append(stage.policy.take_remark())
    said = [remark for remark in remarks if remark]
    assert len(said) == 1
    assert "nothing is offloaded: a step computes for 3 s and saves 768.0 MiB, too much to hide at" in said[0]
    assert stage.policy.explain().startswith("keep everything: ")
    probes = [stats for stats in stage.trace[10:] if stats.stored_bytes]
    assert not probes, "what is probed is forwarded: it cannot go out in time"
    stage.rate = 4 * FULL_RATE
    for _ in range(40):
        stage.step(PLAIN)
    assert stage.trace[-1].stored_bytes > NONE_BYTES / 2


def test_it_declines_when_nothing_goes_out_in_time():
    stage = Stage(1.0)
    stage.is_too_late = True
    settled(stage, PLAIN, 5)
    assert stage.policy.take_remark() == "nothing is offloaded: backward begins before anything has reached its tier"
    places = [stage._places(0, LAYERS) for _ in range(3)]
    assert all(place is Place.KEEP for row in places for place in row)


def test_nothing_that_is_large_enough():
    small = dataclasses.replace(LAYERS, saves=tuple(save._replace(is_movable=False) for save in LAYERS.saves))
    stage = Stage()
    stage.step(PLAIN)
    settled(stage, accumulation([small]), 3)
    assert "nothing is saved that is large enough to move" in stage.policy.take_remark()


def test_what_finds_the_queue_full_is_kept():
    policy = Stage().policy
    request = PackRequest(10 * MIB, 0, None, 0, has_ssd=True, is_first=True, inflight_bytes=2 * GIB)
    assert policy.decide(request) is Placement.KEEP
    request.inflight_bytes = 0
    assert policy.decide(request) is Placement.SSD


def test_planning_is_rare_when_nothing_changes(monkeypatch):
    stage = Stage(FULL_RATE)
    settled(stage, PLAIN, 20)
    calls = []
    monkeypatch.setattr(stage.policy, "_plan", lambda *arguments: calls.append(arguments))
    settled(stage, PLAIN, 32)
    assert len(calls) == 4


_TIMES = st.floats(0, 3, allow_nan=False)
_SAVES = st.lists(
    st.builds(SaveProfile, st.integers(1, 1 << 30), _TIMES, st.none() | _TIMES, st.booleans()), max_size=8
).map(tuple)
_MICROBATCHES = st.lists(
    st.tuples(_TIMES, _TIMES, _TIMES, _TIMES, _SAVES).map(
        lambda each: MicrobatchProfile(*itertools.accumulate(each[:4]), each[4])
    ),
    min_size=1,
    max_size=3,
).map(tuple)


@settings(deadline=None, max_examples=150)
@given(
    steps=st.lists(
        st.tuples(_MICROBATCHES, _TIMES, st.none() | st.floats(1, 1e10), st.none() | st.floats(1, 1e10)), max_size=6
    )
)
def test_whatever_was_measured_the_policy_goes_on(steps):
    """Gaps, passes that overlap, times out of order, nothing saved, nothing asked for: training must not stop."""
    stage = Stage(host_bytes=MIB)
    for number, (microbatches, stall, write, read) in enumerate(steps):
        profile = StepProfile(microbatches, max(each.backward_end for each in microbatches))
        outcome = simulate(PLAIN, Machine(1e9, 1e9), [[Place.KEEP] * 12])
        stats = dataclasses.replace(_stats(number, outcome, ""), stall_seconds=stall)
        stage.policy.observe(Observation(stats, profile, write, read, write))
        for slot, each in enumerate(microbatches):
            seen = 0
            for index, save in enumerate(each.saves):
                request = PackRequest(save.nbytes, seen, None, MIB, has_ssd=True, slot=slot, is_first=index == 0)
                assert stage.policy.decide(request) in Placement
                seen += save.nbytes
        bounds = stage.policy.load_bounds()
        assert bounds is None or min(bounds) >= 0
        assert "\n" not in stage.policy.explain()


def test_the_line_says_what_is_planned():
    stage = Stage(FULL_RATE)
    settled(stage, PLAIN)
    line = stage.policy.explain()
    assert "\n" not in line
    assert "MiB of 768.0 MiB a step at 805.31 MB/s write, 805.31 MB/s read; peak" in line
