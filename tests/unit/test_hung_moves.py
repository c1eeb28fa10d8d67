"""A copy between the tiers that hangs is given up, and keeps both of its places until it returns."""

import threading

import pytest
from clocks import ManualClock
from fakes import TIMEOUT_SECONDS
from test_migration import SIZE, Rig, turned

from ssdtrain_plugin.policy.base import Placement

TIMEOUT = 60.0


@pytest.fixture
def clock():
    return ManualClock()


def give_up(rig, clock, record):
    """Let the deadline pass; return what waits until the move returns."""
    clock.advance(TIMEOUT)
    rig.queue.give_up_overdue()
    (move,) = record.hanging
    returned = threading.Event()

    def let_return():
        rig.drive.moves.open()
        move.when_returned(returned.set)
        assert returned.wait(TIMEOUT_SECONDS)

    return let_return


@pytest.mark.parametrize("is_dropped_first", [True, False])
def test_a_hung_spill_leaves_the_record_where_it_was(is_dropped_first, clock):
    with Rig(4 * SIZE, timeout_seconds=TIMEOUT, clock=clock) as rig:
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        rig.queue.wait(handles[4].lease.record.store)
        record = handles[0].lease.record
        if is_dropped_first:
            handles.clear()
            rig.cache.is_idle()
        let_return = give_up(rig, clock, record)
        assert rig.failures() == {"ssd: timeout": 1}
        assert rig.cache._placer.usable(Placement.SSD, 1000) is None, "left alone until it returns"
        while handles:
            rig.get(handles.pop())
        assert rig.cache.is_idle()
        rig.settle()
        assert (len(rig.host.extents()), len(rig.drive.extents())) == (1, 1), "it reads here and writes there"
        let_return()
        rig.assert_empty()
        assert rig.cache._placer.usable(Placement.SSD, 1000) is rig.drive


def test_a_hung_promotion_leaves_the_record_on_the_drive(clock):
    with Rig(4 * SIZE, prefetch_bytes=SIZE, timeout_seconds=TIMEOUT, clock=clock) as rig:
        handles = turned(rig, 12, 3)
        rig.drive.moves.shut()
        rig.cache.expect_backward(rig.first)
        rig.drive.moves.wait_for_arrival()
        record = handles[8].lease.record
        rig.queue.wait(handles[11].lease.record.load)
        let_return = give_up(rig, clock, record)
        assert rig.failures() == {"ssd: timeout, promotion": 1}
        while handles:
            rig.get(handles.pop())
        assert rig.cache.is_idle()
        rig.settle()
        assert (len(rig.host.extents()), len(rig.drive.extents())) == (1, 1)
        let_return()
        rig.assert_empty()


def test_a_move_that_hangs_before_it_has_a_place_gives_back_the_place_that_it_gets_late(clock):
    with Rig(4 * SIZE, timeout_seconds=TIMEOUT, clock=clock) as rig:
        real, hung = rig.drive.allocate, []

        def allocate(nbytes):
            if threading.current_thread() is not threading.main_thread() and not hung:
                hung.append(nbytes)
                rig.drive.moves.pass_through()
            return real(nbytes)

        rig.drive.allocate = allocate
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        rig.queue.wait(handles[4].lease.record.store)
        let_return = give_up(rig, clock, handles[0].lease.record)
        while handles:
            rig.get(handles.pop())
        assert rig.cache.is_idle()
        let_return()
        rig.assert_empty()
