"""The simulated step: when bytes are live, when the computation waits, what the drive does."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from test_planner_strategies import machines, place_tables, schedules

from ssdtrain_plugin.planner.machine import Machine
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
    prefix_places,
)

# Four layers of 100 bytes, one second each in forward and two in backward.
LAYERS = equal_layers(4, 400, 4.0, 8.0)
STEP = accumulation([LAYERS])
FAST = Machine(write_bytes_per_second=100.0, read_bytes_per_second=100.0)


def run(machine=FAST, schedule=STEP, places=None, prefix_bytes=None):
    if places is None:
        end = schedule.profiles[0].total_bytes if prefix_bytes is None else prefix_bytes
        places = prefix_places(schedule, [(end, end)] * len(schedule.profiles))
    return simulate(schedule, machine, places, with_trace=True)


def story(outcome, what):
    return [(round(row.seconds, 6), row.index) for row in outcome.trace if row.what == what]


def test_kept_saves_are_live_from_save_to_release():
    outcome = run(places=all_places(STEP, Place.KEEP))
    assert (outcome.peak_bytes, outcome.stall_seconds, outcome.seconds) == (400, 0.0, 12.0)
    assert (outcome.stored_bytes, outcome.loaded_bytes, outcome.store_seconds) == (0, 0, 0.0)


def test_a_store_that_keeps_up_leaves_one_layer():
    outcome = run(dataclasses.replace(FAST, prefetch_bytes=100), prefix_bytes=300)
    assert story(outcome, "stored") == [(2.0, 0), (3.0, 1), (4.0, 2)]
    assert story(outcome, "load") == [(4.0, 2), (6.0, 1), (8.0, 0)], "the next one when the one before is asked for"
    assert (outcome.peak_bytes, outcome.stall_seconds) == (200, 0.0)
    assert (outcome.store_seconds, outcome.load_seconds) == (3.0, 3.0)


def test_memory_for_a_load_is_live_when_it_is_queued():
    outcome = run(prefix_bytes=300)
    assert story(outcome, "load") == [(4.0, 2), (4.0, 1), (4.0, 0)]
    assert outcome.peak_bytes == 400


def test_the_window_holds_loads_back_while_the_kept_tail_is_enough():
    outcome = run(dataclasses.replace(FAST, window_bytes=100), prefix_bytes=200)
    assert story(outcome, "load") == [(6.0, 1), (8.0, 0)], "layer 2 fills the window until it is asked for"
    assert (outcome.peak_bytes, outcome.stall_seconds) == (200, 0.0)
    assert run(prefix_bytes=200).peak_bytes == 400, "without it the loads begin at the turn"


def test_a_save_that_is_larger_than_the_bounds_is_loaded():
    outcome = run(dataclasses.replace(FAST, prefetch_bytes=1, window_bytes=1), prefix_bytes=300)
    assert (outcome.num_loads_on_demand, outcome.stall_seconds) == (0, 0.0)


def test_a_late_load_stalls_and_what_follows_moves():
    outcome = run(Machine(100.0, 20.0), prefix_bytes=300)
    assert story(outcome, "loaded") == [(9.0, 2), (14.0, 1), (19.0, 0)]
    assert story(outcome, "stall") == [(9.0, 2), (14.0, 1), (19.0, 0)]
    assert (outcome.stall_seconds, outcome.seconds) == (9.0, 21.0)
    assert outcome.num_loads_on_demand == 0, "they were queued in time, only slow"


def test_a_load_that_nobody_queued_goes_first():
    """Needs out of the log's order: save 0 is asked for while 1 is still being loaded."""
    profile = Profile((Save(100, 1.0, 0.0, 4.0), Save(100, 2.0, 3.0, 4.0), Save(100, 3.0, 3.5, 4.0)), 5.0, 4.0)
    outcome = run(dataclasses.replace(FAST, prefetch_bytes=100), accumulation([profile]))
    assert story(outcome, "load")[:2] == [(5.0, 2), (5.0, 0)]
    assert story(outcome, "loaded")[:2] == [(6.0, 2), (7.0, 0)], "the one that runs is not interrupted"
    assert (outcome.num_loads_on_demand, outcome.stall_seconds) == (2, 3.0), "save 1 had no room ahead either"


def test_what_is_on_its_way_out_is_forwarded():
    outcome = run(Machine(40.0, 1000.0))
    assert story(outcome, "stored") == [(3.5, 0), (6.0, 1)]
    assert story(outcome, "forward") == [(4.0, 3), (4.0, 2), (4.0, 1)]
    assert outcome.forwarded_bytes == 300
    assert outcome.stored_bytes == 200, "one store ran for nothing, two never began"
    assert (outcome.loaded_bytes, outcome.stall_seconds) == (100, 0.0)


def test_bytes_let_go_of_under_a_store_are_free_when_it_ends():
    profile = Profile((Save(100, 1.0, 0.0, 1.0),), 1.0, 5.0)
    outcome = run(Machine(25.0, 25.0), accumulation([profile]))
    assert [(row.seconds, row.what, row.live_bytes) for row in outcome.trace if row.what in ("release", "stored")] == [
        (2.0, "release", 100),
        (5.0, "stored", 0),
    ]


def test_a_full_queue_makes_forward_wait():
    outcome = run(dataclasses.replace(FAST, write_bytes_per_second=50.0, max_inflight_bytes=100, waits_when_full=True))
    assert outcome.refused_bytes == 0
    assert story(outcome, "stall")[0] == (3.0, 1), "until the store of save 0 has ended"
    assert outcome.stall_seconds == pytest.approx(1.0 + 1.0 + 1.0)


def test_or_a_full_queue_makes_it_keep():
    outcome = run(dataclasses.replace(FAST, write_bytes_per_second=50.0, max_inflight_bytes=100))
    assert outcome.refused_bytes == 200, "saves 1 and 3"
    assert outcome.stall_seconds == 0.0


def test_one_store_larger_than_the_bound_is_admitted():
    assert run(dataclasses.replace(FAST, max_inflight_bytes=1)).stored_bytes == 400


def test_the_host_is_a_way_of_its_own_and_has_room_for_so_much():
    machine = dataclasses.replace(FAST, host_bytes=200, host_bytes_per_second=200.0, window_bytes=100)
    outcome = run(machine, places=((Place.SSD, Place.HOST, Place.HOST, Place.HOST),))
    assert outcome.host_peak_bytes == 200
    assert story(outcome, "stored")[:3] == [(2.0, 0), (2.5, 1), (3.5, 2)]
    assert outcome.stored_bytes == 200, "the last one found the host full and went to the drive"
    assert outcome.loaded_bytes == 100


def test_both_directions_share_what_the_drive_has():
    """Two micro-batches: the load of the first runs beside the store of the second."""
    profile = Profile((Save(100, 0.0, 0.0, 1.0),), 2.0, 2.0)
    order = [(Phase.FORWARD, 0), (Phase.FORWARD, 1), (Phase.BACKWARD, 0), (Phase.BACKWARD, 1)]
    schedule = Schedule((profile, profile), tuple(Event(*event) for event in order))
    alone = run(FAST, schedule)
    shared = run(dataclasses.replace(FAST, mixed_share=0.5), schedule)
    assert [story(outcome, "loaded")[0] for outcome in (alone, shared)] == [(3.0, 0), (4.0, 0)]
    assert [story(outcome, "stored")[1] for outcome in (alone, shared)] == [(3.0, 0), (4.0, 0)]
    assert shared.store_seconds == 3.0, "busy all the time, at half the rate"


def test_latency_is_paid_once_a_transfer():
    outcome = run(dataclasses.replace(FAST, latency_seconds=0.5), prefix_bytes=200)
    assert story(outcome, "stored") == [(2.5, 0), (4.0, 1)]


@pytest.mark.parametrize(("lookahead", "stall"), [(0, 1.0), (1, 0.0)])
def test_look_ahead_finds_the_tail_loaded(lookahead, stall):
    order = [(Phase.FORWARD, 0), (Phase.FORWARD, 1), (Phase.BACKWARD, 0), (Phase.BACKWARD, 1)]
    schedule = Schedule((LAYERS, LAYERS), tuple(Event(*event) for event in order), lookahead)
    places = (*prefix_places(accumulation([LAYERS]), [(400, 400)]), (Place.KEEP,) * 4)
    assert run(schedule=schedule, places=places).stall_seconds == stall


def test_a_transfer_as_long_as_a_layer_is_not_late_by_a_rounding_error():
    for count, seconds in itertools.product((5, 7, 11, 12, 24), (0.1, 0.3, 0.7)):
        profile = equal_layers(count, 1000 * count, seconds, 2 * seconds)
        rate = 1000 * count / seconds
        machine = Machine(rate, rate / 2, prefetch_bytes=1000)
        outcome = run(machine, accumulation([profile]), prefix_bytes=1000 * (count - 1))
        assert (outcome.peak_bytes, outcome.stall_seconds) == (2000, 0.0), (count, seconds)


def test_places_must_fit():
    with pytest.raises(ValueError, match=r"micro-batch 0 has 1 places \(expected 4\)"):
        simulate(STEP, FAST, ((Place.KEEP,),))


@settings(deadline=None)
@given(schedule_and_places=schedules().flatmap(place_tables), machine=machines())
def test_the_books_balance(schedule_and_places, machine):
    schedule, places = schedule_and_places
    outcome = simulate(schedule, machine, places, with_trace=True)
    live = [row.live_bytes for row in outcome.trace]
    assert min(live, default=0) >= 0
    assert max(live, default=0) <= outcome.peak_bytes
    if outcome.forwarded_bytes == 0:
        assert live[-1:] in ([], [0]), "only a store that runs for nothing may outlive the step"
    saves = [save for profile in schedule.profiles for save in profile.saves]
    assert sum(row.what == "release" for row in outcome.trace) == len(saves)
    times = [row.seconds for row in outcome.trace]
    assert times == sorted(times)
    assert outcome.seconds == schedule.seconds + outcome.stall_seconds
    assert outcome.loaded_bytes <= outcome.stored_bytes
    assert outcome.host_peak_bytes <= machine.host_bytes
    again = simulate(schedule, machine, places, with_trace=True)
    assert outcome == again
    if not machine.waits_when_full:
        kept = simulate(schedule, machine, all_places(schedule, Place.KEEP))
        assert kept.stall_seconds == 0.0
        assert outcome.peak_bytes <= sum(save.nbytes for save in saves)
