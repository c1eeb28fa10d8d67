"""Random steps, machines and choices for the tests of the planner."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.planner.machine import UNBOUNDED_BYTES, Machine
from ssdtrain_plugin.planner.timeline import Event, Phase, Place, Profile, Save, Schedule

SECONDS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])


@st.composite
def profiles(draw, max_saves=5, is_mirrored=None):
    """Saves at any times; needed in the reverse order of forward, or in any."""
    count = draw(st.integers(0, max_saves))
    shares = st.floats(0.0, 1.0)
    saved = sorted(draw(st.lists(shares, min_size=count, max_size=count)))
    needed = sorted(draw(st.lists(shares, min_size=count, max_size=count)), reverse=True)
    if not (draw(st.booleans()) if is_mirrored is None else is_mirrored):
        random.Random(draw(st.integers(0, 99))).shuffle(needed)
    forward, backward = draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))
    saves = []
    for begin, need in zip(saved, needed, strict=True):
        release = min(1.0, need + draw(st.sampled_from([0.0, 0.1, 0.5])))
        is_movable = draw(st.integers(0, 5)) > 0
        saves.append(Save(draw(st.integers(1, 300)), begin * forward, need * backward, release * backward, is_movable))
    return Profile(tuple(saves), forward, backward)


@st.composite
def schedules(draw, max_microbatches=3, max_saves=5):
    """Forwards in order; backwards of any micro-batch in flight; idle times between."""
    count = draw(st.integers(1, max_microbatches))
    first = draw(profiles(max_saves))
    found = [first, *(draw(st.one_of(st.just(first), profiles(max_saves))) for _ in range(count - 1))]
    events, in_flight, begun = [], [], 0
    while begun < count or in_flight:
        if begun < count and (not in_flight or draw(st.booleans())):
            events.append(Event(Phase.FORWARD, begun))
            in_flight.append(begun)
            begun += 1
        else:
            events.append(Event(Phase.BACKWARD, in_flight.pop(draw(st.sampled_from([0, 0, -1])))))
        if draw(st.integers(0, 4)) == 0:
            events.append(Event(Phase.IDLE, seconds=draw(SECONDS)))
    return Schedule(tuple(found), tuple(events), draw(st.sampled_from([0, 1, 1, 2])))


@st.composite
def machines(draw):
    """Rates from a tenth to ten times of what matters, and bounds that bind or do not."""
    rates = st.sampled_from([100.0, 300.0, 700.0, 1000.0, 2500.0, 10000.0])
    bounds = st.sampled_from([UNBOUNDED_BYTES, UNBOUNDED_BYTES, 1000, 250])
    return Machine(
        write_bytes_per_second=draw(rates),
        read_bytes_per_second=draw(rates),
        latency_seconds=draw(st.sampled_from([0.0, 0.0, 0.01, 0.1])),
        mixed_share=draw(st.sampled_from([1.0, 1.0, 0.7, 0.5])),
        prefetch_bytes=draw(bounds),
        window_bytes=draw(bounds),
        max_inflight_bytes=draw(bounds),
        waits_when_full=draw(st.booleans()),
        host_bytes=draw(st.sampled_from([0, 0, 300, 1000])),
        host_bytes_per_second=draw(st.sampled_from([500.0, 5000.0, float("inf")])),
    )


def place_tables(schedule):
    """A schedule with any place for each movable save."""
    rows = [
        st.tuples(*(st.sampled_from(Place) if save.is_movable else st.just(Place.KEEP) for save in profile.saves))
        for profile in schedule.profiles
    ]
    return st.tuples(st.just(schedule), st.tuples(*rows))


@settings(deadline=None, max_examples=20)
@given(schedule=schedules(), machine=machines())
def test_what_is_drawn_can_be_run(schedule, machine):
    assert len(schedule.backward_order) == len(schedule.profiles)
    assert machine.store_seconds(1) > 0.0
