"""The model of a step: what a stage runs when, and what a prefix is."""

import pytest

from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.timeline import (
    Event,
    Phase,
    Place,
    PointKind,
    Profile,
    Save,
    Schedule,
    accumulation,
    all_places,
    equal_layers,
    one_forward_one_backward,
    prefix_places,
)

LAYERS = equal_layers(3, 300, 3.0, 6.0)


def order_of(schedule):
    letters = {Phase.FORWARD: "F", Phase.BACKWARD: "B", Phase.IDLE: "-"}
    return " ".join(
        letters[event.phase] + (str(event.microbatch) if event.microbatch >= 0 else "") for event in schedule.events
    )


def test_equal_layers_save_at_their_end_and_need_at_their_begin():
    assert LAYERS.saves == (Save(100, 1.0, 4.0, 6.0), Save(100, 2.0, 2.0, 4.0), Save(100, 3.0, 0.0, 2.0))
    assert (LAYERS.total_bytes, LAYERS.logged_bytes) == (300, (0, 100, 200, 300))
    assert LAYERS.asked_seconds == (4.0, 2.0, 0.0)
    assert LAYERS.held_bytes == 100, "what is released at a time is gone before what is needed then"


@pytest.mark.parametrize("count", [3, 7, 11, 12])
@pytest.mark.parametrize("seconds", [0.1, 0.7, 1.1])
def test_rounding_keeps_equal_layers_inside_their_phases(count, seconds):
    assert equal_layers(count, 1000, seconds, 2 * seconds).saves[-1].saved_seconds == seconds


def test_a_save_that_is_released_when_it_is_needed_counts_as_held():
    assert Profile((Save(5, 0.0, 1.0, 1.0),), 1.0, 1.0).held_bytes == 5
    assert Profile((), 1.0, 1.0).held_bytes == 0


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (Save(0, 0.0, 0.0, 0.0), "holds 0 bytes"),
        (Save(1, 1.5, 0.0, 0.0), "saved at 1.5 s"),
        (Save(1, -0.1, 0.0, 0.0), "saved at -0.1 s"),
        (Save(1, 0.5, 1.0, 0.5), "needed at 1.0 s"),
        (Save(1, 0.5, 1.0, 2.5), "released at 2.5 s"),
    ],
)
def test_a_save_that_cannot_have_been_measured_is_refused(save, message):
    with pytest.raises(ValueError, match=message):
        Profile((save,), 1.0, 2.0)


def test_saves_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"save 1 is saved at 0\.2 s \(expected 0\.5 to 1\.0 s"):
        Profile((Save(1, 0.5, 0.0, 0.0), Save(1, 0.2, 0.0, 0.0)), 1.0, 1.0)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(Phase.FORWARD, 0)], "runs forward"),
        ([(Phase.BACKWARD, 0), (Phase.FORWARD, 0)], "runs backward, forward"),
        ([], "runs nothing"),
        ([(Phase.FORWARD, 0), (Phase.BACKWARD, 0), (Phase.FORWARD, 1)], "3 computing events for 1 profiles"),
    ],
)
def test_an_order_that_no_stage_can_run_is_refused(events, message):
    with pytest.raises(ValueError, match=message):
        Schedule((LAYERS,), tuple(Event(*event) for event in events))


def test_accumulation_turns_round_at_once():
    schedule = accumulation([LAYERS, LAYERS])
    assert order_of(schedule) == "F0 B0 F1 B1"
    assert schedule.begins == (0.0, 3.0, 9.0, 12.0, 18.0)


@pytest.mark.parametrize(
    ("stage", "order"),
    [
        (0, "F0 F1 - B0 F2 B1 F3 B2 - B3"),
        (1, "- F0 B0 F1 B1 F2 B2 F3 B3"),
    ],
)
def test_1f1b_on_two_stages(stage, order):
    assert order_of(one_forward_one_backward(LAYERS, stage, 2, 4)) == order


@pytest.mark.parametrize("num_stages", [1, 2, 4, 5])
@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
def test_1f1b_ends_when_the_pipeline_ends(num_stages, num_microbatches):
    """The bubble is (stages - 1) slots of a forward and a backward, whatever the number of micro-batches."""
    first = one_forward_one_backward(LAYERS, 0, num_stages, num_microbatches)
    assert first.seconds == pytest.approx(9.0 * (num_microbatches + num_stages - 1))
    for stage in range(num_stages):
        events = one_forward_one_backward(LAYERS, stage, num_stages, num_microbatches).events
        live = most = 0
        for event in events:
            live += (event.phase is Phase.FORWARD) - (event.phase is Phase.BACKWARD)
            most = max(most, live)
        assert most == min(num_stages - stage, num_microbatches), "the first stage holds the most"


@pytest.mark.parametrize(("lookahead", "announced"), [(0, (3, 5, 6)), (1, (2, 4, 5)), (9, (1, 3, 5))])
def test_a_backward_is_announced_ahead_but_not_before_its_forward_has_ended(lookahead, announced):
    events = [(Phase.FORWARD, 0), (Phase.IDLE, -1, 1.0), (Phase.FORWARD, 1), (Phase.BACKWARD, 0), (Phase.FORWARD, 2)]
    events += [(Phase.BACKWARD, 1), (Phase.BACKWARD, 2)]
    schedule = Schedule((LAYERS,) * 3, tuple(Event(*event) for event in events), lookahead)
    assert schedule.announcements == announced


def test_backwards_are_announced_in_their_order():
    """Micro-batch 1 turns round at once; 0 comes later and must not be loaded before it."""
    events = [(Phase.FORWARD, 0), (Phase.FORWARD, 1), (Phase.BACKWARD, 1), (Phase.BACKWARD, 0)]
    schedule = Schedule((LAYERS,) * 2, tuple(Event(*event) for event in events), lookahead_events=2)
    assert schedule.announcements == (2, 2)
    announced = [point.microbatch for point in schedule.points() if point.kind is PointKind.ANNOUNCE]
    assert announced == [1, 0]


def test_points_free_memory_first_and_never_release_before_the_need():
    profile = Profile((Save(1, 0.0, 1.0, 2.0), Save(2, 0.5, 1.0, 1.0), Save(4, 1.0, 0.0, 1.0)), 1.0, 2.0)
    points = [(point.seconds, point.kind.value, point.number) for point in accumulation([profile]).points()]
    assert points == [
        (0.0, "save", 0),
        (0.5, "save", 1),
        (1.0, "save", 2),
        (1.0, "announce", -1),
        (1.0, "need", 2),
        (2.0, "release", 2),
        (2.0, "need", 1),
        (2.0, "need", 0),
        (2.0, "release", 1),
        (3.0, "release", 0),
    ]


def test_a_save_belongs_where_its_first_byte_lies():
    saves = tuple(Save(10, 0.0, 0.0, 0.0, is_movable=number != 1) for number in range(5))
    schedule = accumulation([Profile(saves, 1.0, 1.0)])
    assert prefix_places(schedule, [(21, 31)]) == ((Place.SSD, Place.KEEP, Place.SSD, Place.HOST, Place.KEEP),)
    assert prefix_places(schedule, [(20, 30)]) == ((Place.SSD, Place.KEEP, Place.HOST, Place.KEEP, Place.KEEP),)


@pytest.mark.parametrize("place", Place)
def test_everything_in_one_place(place):
    assert all_places(accumulation([LAYERS]), place) == ((place,) * 3,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"write_bytes_per_second": 0.0},
        {"read_bytes_per_second": float("nan")},
        {"host_bytes_per_second": -1.0},
        {"latency_seconds": -1.0},
        {"window_bytes": -1},
        {"mixed_share": 0.4},
        {"mixed_share": 1.1},
    ],
)
def test_a_machine_of_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Machine(**{"write_bytes_per_second": 1.0, "read_bytes_per_second": 1.0, **wrong})
