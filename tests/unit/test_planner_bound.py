"""No plan beats the bounds: every subset of small steps is tried, and equal layers are solved in closed form."""

import dataclasses
import itertools
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_strategies import machines, place_tables, schedules

from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.planner.bound import equal_layers_peak, least_peak, least_stall
from ssdtrain_plugin.planner.machine import UNBOUNDED_BYTES, Machine
from ssdtrain_plugin.planner.simulate import simulate
from ssdtrain_plugin.planner.timeline import (
    Place,
    Profile,
    Save,
    accumulation,
    all_places,
    equal_layers,
    one_forward_one_backward,
)

LAYERS = equal_layers(12, 1200, 1.0, 2.0)
STEP = accumulation([LAYERS])


@pytest.fixture(autouse=True)
def _needs_scipy(request):
    if "without_scipy" not in request.node.name:
        pytest.importorskip("scipy", reason="bounds need scipy, extra `bench`")


def subsets(schedule):
    """Every choice between the device and the drive."""
    rows = [
        itertools.product(*([(Place.KEEP, Place.SSD) if save.is_movable else (Place.KEEP,) for save in profile.saves]))
        for profile in schedule.profiles
    ]
    return itertools.product(*rows)


@settings(deadline=None, max_examples=40)
@given(schedule=schedules(max_microbatches=2, max_saves=3), machine=machines())
def test_no_subset_without_a_stall_has_a_lower_peak(schedule, machine):
    # The bounds of the runtime only take choices away, so the best outcome is without them.
    free = dataclasses.replace(machine, max_inflight_bytes=UNBOUNDED_BYTES, host_bytes=0)
    bound = least_peak(schedule, free)
    for places in subsets(schedule):
        outcome = simulate(schedule, free, places)
        if outcome.stall_seconds == 0.0:
            assert outcome.peak_bytes >= bound - 1e-6, places


@settings(deadline=None, max_examples=150)
@given(schedule_and_places=schedules().flatmap(place_tables), machine=machines())
def test_no_choice_has_a_lower_peak_or_a_shorter_stall(schedule_and_places, machine):
    schedule, places = schedule_and_places
    outcome = simulate(schedule, machine, places)
    if outcome.stall_seconds == 0.0:
        assert outcome.peak_bytes >= least_peak(schedule, machine) - 1e-6
    assert outcome.stall_seconds >= least_stall(schedule, machine, outcome.peak_bytes) - 1e-6


@settings(deadline=None)
@given(
    num_layers=st.integers(1, 9),
    forward=st.floats(0.1, 3.0),
    backward=st.floats(0.1, 6.0),
    write=st.floats(0.05, 5.0),
    read=st.floats(0.05, 5.0),
)
def test_the_closed_form_of_equal_layers(num_layers, forward, backward, write, read):
    total_bytes = 1000 * num_layers
    machine = Machine(write * total_bytes / forward, read * total_bytes / backward)
    closed = equal_layers_peak(num_layers, total_bytes, forward, backward, machine)
    program = least_peak(accumulation([equal_layers(num_layers, total_bytes, forward, backward)]), machine)
    assert program == pytest.approx(closed, rel=1e-5)


@pytest.mark.parametrize(
    ("factor", "share"), [(0.1, 1 - 1.1 / 12), (0.25, 1 - 2.75 / 12), (0.5, 1 - 5.5 / 12), (1.0, 2 / 12), (4.0, 2 / 12)]
)
def test_the_closed_form_in_numbers(factor, share):
    machine = Machine(1200.0 * factor, 1200.0 * factor)
    assert equal_layers_peak(12, 1200, 1.0, 2.0, machine) == pytest.approx(1200 * share)
    assert least_peak(STEP, machine) == pytest.approx(1200 * share, rel=1e-5)


def test_the_best_subset_of_equal_layers_reaches_the_bound():
    machine = Machine(1200.0, 1200.0, prefetch_bytes=100)
    places = ((*(Place.SSD,) * 11, Place.KEEP),)
    outcome = simulate(STEP, machine, places)
    assert (outcome.stall_seconds, outcome.peak_bytes) == (0.0, pytest.approx(least_peak(STEP, machine), rel=1e-5))


def test_reading_may_be_what_binds():
    """Half of a layer can be read in the time of a layer: ten of twelve must come back in ten layer times."""
    assert least_peak(STEP, Machine(9600.0, 300.0)) == pytest.approx(1200 - 10 * 50, rel=1e-5)


def test_a_peak_costs_at_least_what_the_bytes_over_it_take():
    """Everything is stored before the turn at once the rate; at half of it 4.5 layers more take half a step."""
    machine = Machine(600.0, 1e9)
    assert least_stall(STEP, machine, 1200.0) == 0.0
    assert least_stall(STEP, machine, least_peak(STEP, machine) + 1.0) == 0.0
    assert least_stall(STEP, machine, 200.0) == pytest.approx(450 / 600, rel=1e-4)
    assert least_stall(STEP, machine, 650.0 - 60.0) == pytest.approx(60 / 600, rel=1e-4)


def test_no_waiting_brings_the_peak_below_what_is_in_use():
    machine = Machine(600.0, 600.0)
    assert least_stall(STEP, machine, 99.0) == math.inf
    assert math.isfinite(least_stall(STEP, machine, 101.0)), "wait after a release, before the next need"


def test_two_directions_that_share_one_bandwidth_are_worse():
    profile = equal_layers(6, 600, 1.0, 0.5)
    schedule = one_forward_one_backward(profile, 0, 3, 6)
    peaks = [least_peak(schedule, Machine(700.0, 700.0, mixed_share=share)) for share in (1.0, 0.75, 0.5)]
    assert peaks[0] * 1.01 < peaks[1] < peaks[2] / 1.01


def test_a_host_tier_lowers_the_bound_by_its_size_and_not_below_what_is_in_use():
    machine = Machine(600.0, 600.0)
    peak = least_peak(STEP, machine)
    assert least_peak(STEP, dataclasses.replace(machine, host_bytes=100)) == pytest.approx(peak - 100, rel=1e-5)
    assert least_peak(STEP, dataclasses.replace(machine, host_bytes=10**6)) == 100.0
    assert least_stall(STEP, dataclasses.replace(machine, host_bytes=10**6), 100.0) == 0.0


def test_what_is_not_movable_stays():
    saves = tuple(save._replace(is_movable=False) for save in LAYERS.saves)
    schedule = accumulation([Profile(saves, 1.0, 2.0)])
    assert least_peak(schedule, Machine(1e9, 1e9)) == pytest.approx(1200, rel=1e-5)


@pytest.mark.parametrize("saves", [(), (Save(7, 0.5, 0.5, 0.5),)])
def test_small_steps(saves):
    schedule = accumulation([Profile(saves, 1.0, 1.0)])
    peak = sum(save.nbytes for save in saves)
    assert least_peak(schedule, Machine(1.0, 1.0)) == pytest.approx(peak, abs=1e-4)
    assert least_stall(schedule, Machine(1.0, 1.0), peak) == 0.0


@pytest.mark.parametrize("max_nodes", [2, 3, 10, 40])
def test_fewer_moments_give_a_lower_bound(max_nodes):
    schedule = one_forward_one_backward(equal_layers(6, 600, 1.0, 2.0), 0, 2, 3)
    machine = Machine(400.0, 400.0)
    assert least_peak(schedule, machine, max_nodes=max_nodes) <= least_peak(schedule, machine) + 1e-3
    assert least_stall(schedule, machine, 250.0, max_nodes=max_nodes) <= least_stall(schedule, machine, 250.0) + 1e-6


def test_more_of_anything_never_hurts():
    schedule = one_forward_one_backward(equal_layers(6, 600, 1.0, 2.0), 1, 3, 4)
    peaks = [least_peak(schedule, Machine(rate, rate)) for rate in (50.0, 100.0, 200.0, 400.0, 1600.0)]
    stalls = [least_stall(schedule, Machine(100.0, 100.0), peak) for peak in (200.0, 300.0, 600.0, 1200.0)]
    assert peaks == sorted(peaks, reverse=True)
    assert stalls == sorted(stalls, reverse=True)
    assert stalls[0] > 0.0 == stalls[-1]


def test_keeping_everything_is_above_the_bound():
    machine = Machine(1.0, 1.0)
    assert least_peak(STEP, machine) <= simulate(STEP, machine, all_places(STEP, Place.KEEP)).peak_bytes


def test_the_error_without_scipy_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(EnvironmentUnsupportedError, match=r"scipy is not installed(.|\n)*hint: pip install"):
        least_peak(STEP, Machine(1.0, 1.0))
