"""The log of a micro-batch read backwards: everything once a pass, within the budget."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.schedule import MicrobatchLog, ReloadSchedule

UNLIMITED = 1 << 60


def test_last_saved_is_first_wanted():
    log = MicrobatchLog()
    for serial in range(4):
        log.append(serial, 10)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [3, 2, 1, 0]
    assert log.upcoming(UNLIMITED, at_least_one=True) == []


def test_a_record_saved_twice_is_wanted_at_its_last_save():
    log = MicrobatchLog()
    for serial in (0, 1, 0, 2):
        log.append(serial, 10)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [2, 0, 1]
    assert log.total_bytes == 30


def test_the_budget_is_a_bound_and_one_larger_record_cannot_wedge():
    log = MicrobatchLog()
    for serial, nbytes in enumerate((5, 100, 10, 10)):
        log.append(serial, nbytes)
    assert log.upcoming(15, at_least_one=False) == [3]
    assert log.upcoming(15, at_least_one=False) == [2]
    assert log.upcoming(15, at_least_one=False) == []
    assert log.upcoming(15, at_least_one=True) == [1]
    assert log.upcoming(15, at_least_one=True) == [0]


def test_a_second_pass_begins_where_something_is_asked_for_again():
    log = MicrobatchLog()
    for serial in range(4):
        log.append(serial, 1)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [3, 2, 1, 0]
    log.demand(2)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [1, 0]


def test_a_first_demand_is_not_issued_again():
    log = MicrobatchLog()
    for serial in range(3):
        log.append(serial, 1)
    log.demand(2)
    log.demand(99)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [1, 0]


def test_what_is_removed_is_not_issued():
    log = MicrobatchLog()
    for serial in range(3):
        log.append(serial, 1)
    assert not log.remove(1)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [2, 0]
    assert not log.remove(2)
    assert log.remove(0)


def test_a_save_during_backward_is_read_from_the_new_end():
    log = MicrobatchLog()
    for serial in range(3):
        log.append(serial, 1)
    assert log.upcoming(1, at_least_one=True) == [2]
    log.append(3, 1)
    assert log.upcoming(UNLIMITED, at_least_one=True) == [3, 1, 0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    saves=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 50)), max_size=30),
    budgets=st.lists(st.integers(0, 80), max_size=60),
    force=st.booleans(),
)
def test_every_record_is_issued_once_a_pass_and_the_budget_is_respected(saves, budgets, force):
    log, sizes, last = MicrobatchLog(), {}, {}
    for position, (serial, nbytes) in enumerate(saves):
        nbytes = sizes.setdefault(serial, nbytes)
        log.append(serial, nbytes)
        last[serial] = position
    issued = []
    for budget in budgets:
        taken = log.upcoming(budget, at_least_one=force)
        spent = sum(sizes[serial] for serial in taken)
        assert spent <= budget or (force and sizes[taken[0]] > budget and len(taken) == 1)
        issued += taken
    issued += log.upcoming(UNLIMITED, at_least_one=True)
    assert issued == sorted(sizes, key=lambda serial: -last[serial])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("record"), st.integers(0, 3), st.integers(0, 9)),
            st.tuples(st.just("forget"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("upcoming"), st.integers(0, 3), st.integers(1, 40)),
            st.tuples(st.just("demand"), st.integers(0, 3), st.integers(0, 9)),
        ),
        max_size=60,
    )
)
def test_logs_hold_only_what_lives(operations):
    schedule, members = ReloadSchedule(), {}
    for name, first, second in operations:
        if name == "record":
            schedule.record(first, second, 10)
            members.setdefault(second, set()).add(first)
        elif name == "forget":
            schedule.forget(first)
            members.pop(first, None)
        elif name == "upcoming":
            taken = schedule.upcoming(first, second, at_least_one=False)
            assert len(set(taken)) == len(taken)
            assert all(first in members[serial] for serial in taken)
            assert 10 * len(taken) <= second
        else:
            schedule.demand(first, second)
        live = set().union(*members.values()) if members else set()
        assert len(schedule) == len(live)
    for serial in list(members):
        schedule.forget(serial)
    assert len(schedule) == 0
