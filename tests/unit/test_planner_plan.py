"""Plans never stall, stay close to the bound, and say what to expect."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_strategies import machines, schedules

from ssdtrain_plugin.planner.bound import least_peak
from ssdtrain_plugin.planner.machine import UNBOUNDED_BYTES, Machine
from ssdtrain_plugin.planner.plan import plan_prefixes
from ssdtrain_plugin.planner.simulate import simulate
from ssdtrain_plugin.planner.timeline import (
    Event,
    Phase,
    Place,
    Profile,
    Save,
    Schedule,
    accumulation,
    all_places,
    equal_layers,
    one_forward_one_backward,
)

TOTAL_BYTES = 120_000
LAYERS = equal_layers(12, TOTAL_BYTES, 1.0, 2.0)
STEP = accumulation([LAYERS])


def machine_of(factor, **settings):
    """Give a drive that moves so many times all bytes in the time of a forward."""
    return Machine(TOTAL_BYTES * factor, TOTAL_BYTES * factor, **settings)


def follow(schedule, machine, plan):
    return simulate(schedule, plan.apply(machine), plan.places(schedule))


# --- no stall


@settings(deadline=None, max_examples=300)
@given(schedule=schedules(max_microbatches=4, max_saves=8), machine=machines(), uses_window=st.booleans())
def test_a_plan_never_stalls_and_is_never_worse_than_keeping(schedule, machine, uses_window):
    plan = plan_prefixes(schedule, machine, uses_window=uses_window)
    outcome = follow(schedule, machine, plan)
    kept = simulate(schedule, machine, all_places(schedule, Place.KEEP))
    assert outcome.stall_seconds < 1e-6
    assert outcome.num_loads_on_demand == 0
    assert outcome.peak_bytes <= kept.peak_bytes == plan.kept_peak_bytes
    assert outcome.host_peak_bytes <= machine.host_bytes


@settings(deadline=None, max_examples=150)
@given(
    schedule=schedules(max_microbatches=4, max_saves=8),
    machine=machines(),
    slower=st.floats(0.05, 1.0),
    seed=st.booleans(),
)
def test_a_drive_that_writes_slower_than_planned_costs_memory_and_no_time(schedule, machine, slower, seed):
    machine = dataclasses.replace(machine, mixed_share=1.0, waits_when_full=False)
    plan = plan_prefixes(schedule, machine, uses_window=seed)
    slow = dataclasses.replace(machine, write_bytes_per_second=machine.write_bytes_per_second * slower)
    assert follow(schedule, slow, plan).stall_seconds < 1e-6


@settings(deadline=None, max_examples=100)
@given(schedule=schedules(max_microbatches=1, max_saves=8), machine=machines(), slower=st.floats(0.9, 1.0))
def test_the_margin_pays_for_a_drive_that_reads_slower(schedule, machine, slower):
    machine = dataclasses.replace(machine, mixed_share=1.0, latency_seconds=0.0)
    plan = plan_prefixes(schedule, machine, safety=0.1)
    slow = dataclasses.replace(machine, read_bytes_per_second=machine.read_bytes_per_second * slower)
    assert follow(schedule, slow, plan).stall_seconds < 1e-6


def test_latency_is_paid_at_half_speed_too_while_both_directions_share_the_drive():
    profile = equal_layers(24, TOTAL_BYTES, 1.0, 1.0)
    schedule = one_forward_one_backward(profile, 0, 3, 6)
    machine = machine_of(10.0, latency_seconds=0.03, mixed_share=0.5)
    plan = plan_prefixes(schedule, machine, safety=0.0)
    assert plan.microbatches[0].ssd_bytes > 0
    assert follow(schedule, machine, plan).stall_seconds < 1e-6


def test_a_queue_that_the_micro_batch_before_filled_makes_the_next_one_wait():
    """The first saves as much as may be in flight, late; the second saves less, and finds it there."""
    late = Profile(tuple(Save(2000, 0.9 + 0.01 * n, 1.9 - 0.2 * n, 2.0 - 0.2 * n) for n in range(10)), 1.0, 2.0)
    small = Profile((Save(4000, 0.02, 1.0, 2.0), Save(40_000, 0.99, 0.5, 2.0, is_movable=False)), 1.0, 2.0)
    order = [(Phase.FORWARD, 0), (Phase.FORWARD, 1), (Phase.BACKWARD, 0), (Phase.BACKWARD, 1)]
    schedule = Schedule((late, small), tuple(Event(*event) for event in order))
    machine = Machine(20_000.0, 200_000.0, max_inflight_bytes=12_000, waits_when_full=True)
    plan = plan_prefixes(schedule, machine)
    assert plan.microbatches[0].ssd_bytes == 12_000
    assert follow(schedule, machine, plan).stall_seconds < 1e-6


# --- close to the bound


@pytest.mark.parametrize("saves_per_layer", [1, 10])
@pytest.mark.parametrize(
    ("factor", "ratio"), [(0.1, 1.01), (0.25, 1.09), (0.5, 1.08), (1.0, 1.0), (2.0, 1.0), (4.0, 1.0)]
)
def test_twelve_equal_layers_against_the_bound(factor, ratio, saves_per_layer):
    pytest.importorskip("scipy", reason="bounds need scipy, extra `bench`")
    schedule = accumulation([equal_layers(12, TOTAL_BYTES, 1.0, 2.0, saves_per_layer=saves_per_layer)])
    machine = machine_of(factor)
    outcome = follow(schedule, machine, plan_prefixes(schedule, machine))
    assert outcome.peak_bytes <= ratio * least_peak(schedule, machine) * 1.00001


@pytest.mark.parametrize("factor", [0.95, 1.0, 1.05])
def test_at_the_knee_a_few_percent_of_bandwidth_are_no_cliff(factor):
    outcome = follow(STEP, machine_of(factor), plan_prefixes(STEP, machine_of(factor)))
    assert outcome.peak_bytes == TOTAL_BYTES / 6


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("factor", [0.1, 0.25, 0.5, 2.0])
def test_1f1b_against_the_bound(stage, factor):
    pytest.importorskip("scipy", reason="bounds need scipy, extra `bench`")
    schedule = one_forward_one_backward(LAYERS, stage, 4, 6)
    machine = machine_of(factor)
    outcome = follow(schedule, machine, plan_prefixes(schedule, machine))
    # Beyond the ratio, one layer: the loads of the next backward begin a forward early.
    assert outcome.peak_bytes <= 1.08 * least_peak(schedule, machine) + LAYERS.saves[0].nbytes


def test_the_peak_falls_with_bandwidth():
    peaks = [follow(STEP, machine_of(f), plan_prefixes(STEP, machine_of(f))).peak_bytes for f in (0.1, 0.25, 0.5, 1, 4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= 0.3 * TOTAL_BYTES


# --- the shape of a plan


def test_the_tail_whose_backward_comes_at_once_is_kept():
    plan = plan_prefixes(STEP, machine_of(4.0))
    assert [(each.ssd_end_bytes, each.kept_bytes) for each in plan.microbatches] == [(110_000, 10_000)]
    assert plan.prefetch_bytes == plan.window_bytes == 10_000, "one layer ahead is enough"
    assert plan.expected_peak_bytes == 20_000
    assert plan.expected_store_seconds == pytest.approx(11 / 12 / 4)
    assert plan.expected_load_seconds == pytest.approx(11 / 12 / 4 / 0.9)


def test_the_first_stage_offloads_its_tail_and_the_last_keeps_it():
    first, last = (one_forward_one_backward(LAYERS, stage, 4, 8) for stage in (0, 3))
    assert plan_prefixes(first, machine_of(2.0)).microbatches[0].kept_bytes == 0
    assert plan_prefixes(last, machine_of(2.0)).microbatches[0].kept_bytes == 10_000


def test_without_look_ahead_the_tail_is_kept_on_every_stage():
    schedule = one_forward_one_backward(LAYERS, 0, 4, 8, lookahead_events=0)
    plan = plan_prefixes(schedule, machine_of(2.0))
    assert {each.kept_bytes for each in plan.microbatches} == {10_000}
    assert follow(schedule, machine_of(2.0), plan).stall_seconds == 0.0


def test_what_nobody_can_hide_is_kept():
    plan = plan_prefixes(STEP, machine_of(0.01))
    assert [each.ssd_end_bytes for each in plan.microbatches] == [0]
    assert (plan.prefetch_bytes, plan.expected_peak_bytes) == (0, plan.kept_peak_bytes)


def test_the_window_is_worth_the_loads_that_would_come_early():
    machine = machine_of(0.5)
    with_window, without = (plan_prefixes(STEP, machine, uses_window=uses) for uses in (True, False))
    assert without.window_bytes == UNBOUNDED_BYTES
    assert follow(STEP, machine, with_window).peak_bytes == 70_000
    assert follow(STEP, machine, without).peak_bytes == 80_000


def test_a_tight_bound_on_loads_ahead_shortens_the_prefix():
    """At the end of the log four saves are needed within a moment; so many must be ahead."""
    saves = [Save(100, 0.1 * number, 1.9 - 0.01 * number, 2.0) for number in range(4)]
    saves += [Save(100, 0.1 * number, 1.0 - 0.1 * number, 2.0) for number in range(4, 8)]
    schedule = accumulation([Profile(tuple(saves), 1.0, 2.0)])
    machine = Machine(10_000.0, 1_000.0)
    wide, tight = (dataclasses.replace(machine, prefetch_bytes=nbytes) for nbytes in (1000, 200))
    assert plan_prefixes(schedule, wide).prefetch_bytes == 400
    plan = plan_prefixes(schedule, tight)
    assert plan.prefetch_bytes <= 200
    assert follow(schedule, tight, plan).stall_seconds == 0.0
    assert plan.microbatches[0].ssd_bytes < plan_prefixes(schedule, wide).microbatches[0].ssd_bytes


def test_a_full_queue_makes_the_prefix_reach_further():
    machine = machine_of(0.5)
    profile = equal_layers(120, TOTAL_BYTES, 1.0, 2.0)
    schedule = accumulation([profile])
    narrow = dataclasses.replace(machine, max_inflight_bytes=12_000)
    free, thinned = plan_prefixes(schedule, machine), plan_prefixes(schedule, narrow)
    assert thinned.microbatches[0].ssd_end_bytes > 1.2 * free.microbatches[0].ssd_end_bytes
    assert thinned.microbatches[0].ssd_bytes == pytest.approx(free.microbatches[0].ssd_bytes, rel=0.05)
    assert follow(schedule, narrow, thinned).peak_bytes == pytest.approx(
        follow(schedule, machine, free).peak_bytes, rel=0.1
    )
    assert follow(schedule, narrow, thinned).stall_seconds == 0.0


def test_where_a_full_queue_makes_forward_wait_the_prefix_ends_before():
    machine = machine_of(0.5, max_inflight_bytes=20_000, waits_when_full=True)
    plan = plan_prefixes(STEP, machine)
    assert 0 < plan.microbatches[0].ssd_end_bytes < plan_prefixes(STEP, machine_of(0.5)).microbatches[0].ssd_end_bytes
    assert follow(STEP, machine, plan).stall_seconds == 0.0


def test_the_host_takes_what_the_drive_cannot_hide_nearest_to_the_turn():
    machine = machine_of(0.5, host_bytes=30_000, host_bytes_per_second=10.0 * TOTAL_BYTES)
    plan = plan_prefixes(STEP, machine)
    (each,) = plan.microbatches
    assert (each.ssd_bytes, each.host_bytes) == (60_000, 30_000)
    assert each.host_end_bytes == each.ssd_end_bytes + 30_000
    outcome = follow(STEP, machine, plan)
    assert outcome.host_peak_bytes == 30_000
    assert outcome.peak_bytes == follow(STEP, machine_of(0.5), plan_prefixes(STEP, machine_of(0.5))).peak_bytes - 30_000


def test_the_host_is_divided_among_the_micro_batches_in_flight():
    schedule = one_forward_one_backward(LAYERS, 0, 3, 5)
    plan = plan_prefixes(schedule, machine_of(0.25, host_bytes=60_000))
    assert {each.host_bytes for each in plan.microbatches} == {20_000}


def test_a_later_deadline_is_taken_where_the_drive_has_time_for_it():
    """A short sequence, a small one that takes long, a short one: what the first saved can go under the second."""
    short, small = equal_layers(12, TOTAL_BYTES, 0.5, 2.0), equal_layers(12, TOTAL_BYTES // 12, 2.0, 2.0)
    order = [*((Phase.FORWARD, number) for number in range(3)), *((Phase.BACKWARD, number) for number in range(3))]
    schedule = Schedule((short, small, short), tuple(Event(*event) for event in order))
    machine = machine_of(0.6)
    plan = plan_prefixes(schedule, machine)
    assert plan.microbatches[0].ssd_bytes == TOTAL_BYTES, "its own forward has time for three tenths"
    assert plan.microbatches[2].ssd_bytes < TOTAL_BYTES / 2
    assert follow(schedule, machine, plan).stall_seconds == 0.0


@settings(deadline=None)
@given(schedule=schedules(max_microbatches=4, max_saves=8), machine=machines())
def test_micro_batches_may_share_a_profile_or_not(schedule, machine):
    copies = tuple(dataclasses.replace(profile) for profile in schedule.profiles)
    apart = dataclasses.replace(schedule, profiles=copies)
    assert plan_prefixes(schedule, machine) == plan_prefixes(apart, machine)


# --- what to expect


@pytest.mark.parametrize("factor", [0.1, 0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    "schedule",
    [STEP, accumulation([LAYERS] * 3), *(one_forward_one_backward(LAYERS, stage, 4, 6) for stage in range(4))],
    ids=["plain", "accumulation", "stage 0", "stage 1", "stage 2", "stage 3"],
)
def test_the_expected_peak_is_what_comes(schedule, factor):
    machine = machine_of(factor)
    plan = plan_prefixes(schedule, machine)
    outcome = follow(schedule, machine, plan)
    assert outcome.peak_bytes <= plan.expected_peak_bytes <= outcome.peak_bytes + 2 * LAYERS.saves[0].nbytes
    assert outcome.stored_bytes >= outcome.loaded_bytes
    assert plan.expected_load_seconds >= outcome.load_seconds - 1e-9


@pytest.mark.parametrize("safety", [-0.1, 1.0])
def test_a_margin_of_no_sense_is_refused(safety):
    with pytest.raises(ValueError, match="safety"):
        plan_prefixes(STEP, machine_of(1.0), safety=safety)


def test_nothing_saved_is_nothing_planned():
    schedule = accumulation([Profile((), 1.0, 1.0)])
    plan = plan_prefixes(schedule, machine_of(1.0))
    assert (plan.expected_peak_bytes, plan.kept_peak_bytes, plan.prefetch_bytes, plan.window_bytes) == (0, 0, 0, 0)
    assert plan_prefixes(Schedule((), ()), machine_of(1.0)).microbatches == ()
