"""The queue: order, budget, cancelling, closing; gates decide what happens when."""

import threading

import pytest
from fakes import TIMEOUT_SECONDS, Gate

from ssdtrain_plugin.errors import QueueClosedError
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue, TransferState


@pytest.fixture
def make_queue():
    queues, gates = [], []

    def make(**options):
        options = {"io_threads": 1, "max_inflight_bytes": 1 << 40} | options
        queues.append(TransferQueue(**options))
        return queues[-1]

    make.gates = gates
    yield make
    for gate in gates:
        gate.open()
    for queue in queues:
        queue.close()


def gated(make_queue):
    gate = Gate(is_open=False)
    make_queue.gates.append(gate)
    return gate


def transfer(work=lambda: None, *, finish=lambda _: None, direction=Direction.STORE, nbytes=10):
    return Transfer(direction, nbytes, work, finish)


def test_first_come_first_served(make_queue):
    queue, gate, seen = make_queue(), gated(make_queue), []
    queue.submit(transfer(gate.pass_through))
    gate.wait_for_arrival()
    for number in range(5):
        queue.submit(transfer(lambda number=number: seen.append(number)))
    gate.open()
    queue.wait_idle()
    assert seen == [0, 1, 2, 3, 4]


def test_urgent_goes_first(make_queue):
    queue, gate, seen = make_queue(), gated(make_queue), []
    queue.submit(transfer(gate.pass_through, direction=Direction.LOAD))
    gate.wait_for_arrival()
    for number in range(3):
        queue.submit(
            transfer(lambda number=number: seen.append(number), direction=Direction.LOAD), is_urgent=number == 2
        )
    gate.open()
    queue.wait_idle()
    assert seen == [2, 0, 1]


def test_stores_and_loads_do_not_wait_for_each_other(make_queue):
    queue, gate = make_queue(), gated(make_queue)
    queue.submit(transfer(gate.pass_through))
    gate.wait_for_arrival()
    load = transfer(direction=Direction.LOAD)
    queue.submit(load)
    queue.wait(load)
    assert load.state is TransferState.DONE


def test_finish_runs_before_done_with_seconds_and_event(make_queue):
    queue, seen = make_queue(), []
    event = object()
    one = transfer(lambda: event, finish=lambda t: seen.append((t.state, t.event, t.seconds >= 0, t.error)))
    queue.submit(one)
    queue.wait(one)
    assert seen == [(TransferState.RUNNING, event, True, None)]
    assert one.state is TransferState.DONE


def test_what_work_raises_is_kept_and_the_thread_goes_on(make_queue):
    queue, seen = make_queue(), []

    def fail():
        raise OSError(5, "on purpose")

    bad, good = transfer(fail, finish=lambda t: seen.append(t.error)), transfer()
    queue.submit(bad)
    queue.submit(good)
    queue.wait(good)
    assert isinstance(bad.error, OSError)
    assert seen == [bad.error]
    assert queue.inflight_bytes == 0


def test_work_is_let_go_before_finish(make_queue):
    import weakref

    class Bytes:
        pass

    queue, seen = make_queue(), []
    held = Bytes()
    reference = weakref.ref(held)
    work = lambda held=held: None  # noqa: E731 - its default argument is the point
    one = transfer(work, finish=lambda t: seen.append(reference() is None))
    del held, work
    queue.submit(one)
    queue.wait(one)
    assert seen == [True]


def test_only_what_has_not_started_can_be_cancelled(make_queue):
    queue, gate, seen = make_queue(), gated(make_queue), []
    running, queued = transfer(gate.pass_through), transfer(lambda: seen.append(1), finish=lambda t: seen.append(2))
    queue.submit(running)
    gate.wait_for_arrival()
    queue.submit(queued)
    assert not queue.cancel(running)
    assert queue.cancel(queued)
    assert not queue.cancel(queued)
    assert queue.inflight_bytes == 10
    gate.open()
    queue.wait_idle()
    assert queue.wait(queued) >= 0
    assert seen == []
    assert not queue.cancel(running)


def test_the_budget_blocks_until_a_store_ends(make_queue):
    queue, gate, passed = make_queue(max_inflight_bytes=15), gated(make_queue), threading.Event()
    queue.submit(transfer(gate.pass_through))
    gate.wait_for_arrival()

    def submit_second():
        queue.wait_for_room(10)
        passed.set()

    assert queue.wait_for_room(5) == 0.0
    waiter = threading.Thread(target=submit_second)
    waiter.start()
    assert not passed.is_set()
    gate.open()
    assert passed.wait(TIMEOUT_SECONDS)
    waiter.join(TIMEOUT_SECONDS)


def test_one_store_over_the_whole_budget_is_admitted_alone(make_queue):
    queue = make_queue(max_inflight_bytes=5)
    assert queue.wait_for_room(1000) == 0.0


def test_a_cancelled_store_gives_its_room_back(make_queue):
    queue, gate = make_queue(max_inflight_bytes=20), gated(make_queue)
    queue.submit(transfer(gate.pass_through))
    gate.wait_for_arrival()
    queued = transfer()
    queue.submit(queued)
    assert queue.inflight_bytes == 20
    queue.cancel(queued)
    assert queue.wait_for_room(10) == 0.0


def test_loads_do_not_count_as_in_flight(make_queue):
    queue, gate = make_queue(), gated(make_queue)
    queue.submit(transfer(gate.pass_through, direction=Direction.LOAD))
    assert queue.inflight_bytes == 0


def test_close_cancels_what_is_queued_and_waits_for_what_runs(make_queue):
    queue, gate, seen = make_queue(), gated(make_queue), []
    running = transfer(gate.pass_through, finish=lambda t: seen.append("running"))
    queued = transfer(finish=lambda t: seen.append("queued"))
    queue.submit(running)
    gate.wait_for_arrival()
    queue.submit(queued)
    closer = threading.Thread(target=queue.close)
    closer.start()
    queue.wait(queued)
    gate.open()
    closer.join(TIMEOUT_SECONDS)
    assert seen == ["running"]
    assert queued.state is TransferState.CANCELLED
    assert isinstance(queued.error, QueueClosedError)
    queue.close()
    with pytest.raises(QueueClosedError, match="closed"):
        queue.submit(transfer())
    assert queue.inflight_bytes == 0


def test_close_wakes_who_waits_for_room(make_queue):
    queue, gate = make_queue(max_inflight_bytes=10), gated(make_queue)
    queue.submit(transfer(gate.pass_through))
    gate.wait_for_arrival()
    waiter = threading.Thread(target=queue.wait_for_room, args=(10,))
    waiter.start()
    closer = threading.Thread(target=queue.close)
    closer.start()
    waiter.join(TIMEOUT_SECONDS)
    assert not waiter.is_alive()
    gate.open()
    closer.join(TIMEOUT_SECONDS)


def test_threads_start_as_needed_and_no_more_than_allowed(make_queue):
    queue, gate = make_queue(io_threads=3), gated(make_queue)
    count = lambda: sum(t.name.startswith("ssdtrain-store") for t in threading.enumerate())  # noqa: E731
    before = count()
    for _ in range(6):
        queue.submit(transfer(gate.pass_through))
    for _ in range(3):
        gate.wait_for_arrival()
    assert before + 1 <= count() <= before + 3
    gate.open()
    queue.wait_idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_finish_does_not_make_anybody_wait_for_ever(make_queue):
    queue = make_queue()

    def fail(_):
        raise ZeroDivisionError("defect")

    one = transfer(finish=fail)
    queue.submit(one)
    queue.wait(one)
    queue.wait_idle()
    assert one.state is TransferState.DONE


# Lanes


def test_a_slow_drive_does_not_hold_up_a_fast_one():
    """All threads of one lane wait; the other lane goes on in the same direction."""
    queue = TransferQueue(io_threads=2, max_inflight_bytes=1 << 30)
    gate = Gate(is_open=False)
    slow = [Transfer(Direction.STORE, 1, gate.pass_through, lambda done: None, lane="slow") for _ in range(4)]
    fast = [Transfer(Direction.STORE, 1, lambda: None, lambda done: None, lane="fast") for _ in range(4)]
    for transfer in (*slow, *fast):
        queue.submit(transfer)
    for transfer in fast:
        queue.wait(transfer)
    assert {transfer.state for transfer in slow} <= {TransferState.QUEUED, TransferState.RUNNING}
    gate.open()
    queue.wait_idle()
    assert {transfer.state for transfer in slow} == {TransferState.DONE}
    queue.close()


def test_close_ends_the_threads_of_every_lane():
    queue = TransferQueue(io_threads=1, max_inflight_bytes=1 << 30)
    for lane in range(3):
        queue.submit(Transfer(Direction.LOAD, 1, lambda: None, lambda done: None, lane=lane))
    queue.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssdtrain-load")]
