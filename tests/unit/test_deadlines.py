"""What never returns is given up after a deadline; until it does return, it keeps what it may touch."""

import errno
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from clocks import ManualClock
from fakes import TIMEOUT_SECONDS, CacheRig, Gate, GatedTier

from ssdtrain_plugin.deadlines import Abandonable, Allowance, Deadlines, ending
from ssdtrain_plugin.errors import LoadError, StoreError
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue, TransferState
from ssdtrain_plugin.units import GIB, MIB

TIMEOUT = 60.0


def in_thread(work):
    """Run something that waits; return the thread, which holds up no exit, and where its result will be."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def end(thread):
    thread.join(TIMEOUT_SECONDS)
    assert not thread.is_alive()


# --- the books


def test_work_is_overdue_from_its_deadline_on():
    clock = ManualClock()
    deadlines = Deadlines(TIMEOUT, clock)
    assert not deadlines.is_due()
    assert deadlines.begin("first", "owner", 1)
    clock.advance(10.0)
    assert not deadlines.begin("second", "other", 1), "later than what is known"
    assert deadlines.left_seconds == 50.0
    clock.advance(49.9)
    assert not deadlines.is_due()
    clock.advance(0.1)
    assert deadlines.is_due()
    assert deadlines.take_overdue() == [("first", "owner", 60.0)]
    assert not deadlines.is_due()
    assert not deadlines.end("first"), "it was taken"
    assert deadlines.end("second")


@pytest.mark.parametrize(("nbytes", "seconds"), [(0, 60.0), (512 * MIB, 60.0), (GIB, 64.0), (8 * GIB, 512.0)])
def test_many_bytes_may_take_longer(nbytes, seconds):
    clock = ManualClock()
    deadlines = Deadlines(TIMEOUT, clock)
    deadlines.begin("work", "owner", nbytes)
    assert deadlines.left_seconds == seconds


def test_without_a_timeout_nothing_is_ever_due():
    clock = ManualClock()
    deadlines = Deadlines(clock=clock)
    deadlines.begin("work", "owner", GIB)
    clock.advance(1e9)
    assert not deadlines.is_due()


def test_what_is_left_behind_is_done_once_whoever_comes_first():
    done = []
    early, late = Abandonable(), Abandonable()
    early.when_returned(lambda: done.append("early"))
    assert done == []
    early.returned()
    late.returned()
    late.when_returned(lambda: done.append("late"))
    late.when_returned(lambda: done.append("again"))
    assert done == ["early", "late", "again"]


# --- what an end may wait: Note [One allowance for the end]


def test_what_hangs_spends_half_of_what_is_left_and_what_gets_on_nothing():
    given = []

    def answer(is_well):
        return lambda seconds: given.append(seconds) or is_well

    allowance = Allowance(4.0)
    assert not allowance.wait(answer(False))
    assert allowance.wait(answer(True))
    assert not allowance.wait(answer(False))
    assert not allowance.wait(answer(False))
    assert given == [2.0, 1.0, 1.0, 0.5]
    assert allowance.left_seconds == 0.5


def test_an_end_within_an_end_has_no_allowance_of_its_own():
    with ending() as first:
        with ending() as second:
            assert second is first
        others = in_thread(allowance_of_an_end)
        end(others[0])
        assert others[1] != [first], "it belongs to one thread"
    assert allowance_of_an_end() is not first
    with pytest.raises(KeyError), ending() as first:
        raise KeyError
    assert allowance_of_an_end() is not first


def allowance_of_an_end():
    with ending() as allowance:
        return allowance


def test_all_that_ends_with_the_interpreter_shares_one():
    """Finalizers of weakref run in a handler of their own, whether it was registered before ours or after."""
    code = (
        "import weakref\n{}\nfrom ssdtrain_plugin.deadlines import ending\nclass Thing: pass\n"
        "def say():\n  with ending() as allowance: print(id(allowance), flush=True)\n"
        "say()\nthings = [Thing(), Thing()]\nfor thing in things: weakref.finalize(thing, say)"
    )
    for early in ("", "weakref.finalize(type('Thing', (), {}), print)"):
        command = [sys.executable, "-c", code.format(early)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        first, second = done.stdout.split()[1:]
        assert first == second


# --- the queue


class Line:
    """A queue with a manual clock, and gates that are opened in the end."""

    def __init__(self, **options):
        self.clock = ManualClock()
        self.queue = TransferQueue(
            **{"io_threads": 1, "max_inflight_bytes": 1 << 40, "timeout_seconds": TIMEOUT, "clock": self.clock}
            | options
        )
        self.gate = Gate(is_open=False)
        self.ended = []

    def submit(self, work=lambda: None, *, direction=Direction.STORE, nbytes=10):
        transfer = Transfer(direction, nbytes, work, self.ended.append, path="/drive")
        self.queue.submit(transfer)
        return transfer

    def hang(self, **options):
        transfer = self.submit(self.gate.pass_through, **options)
        self.gate.wait_for_arrival()
        return transfer

    def let_time_pass(self, seconds=TIMEOUT):
        self.clock.advance(seconds)
        self.queue.give_up_overdue()

    def wait_for_return(self, transfer):
        returned = threading.Event()
        transfer.when_returned(returned.set)
        assert returned.wait(TIMEOUT_SECONDS)


@pytest.fixture
def make_line():
    lines = []

    def make(**options):
        lines.append(Line(**options))
        return lines[-1]

    yield make
    for line in lines:
        line.gate.open()
        line.queue.close()


def test_a_store_that_hangs_is_given_up_and_its_bytes_leave_the_budget(make_line):
    line = make_line()
    hung = line.hang()
    line.let_time_pass(59.9)
    assert hung.state is TransferState.RUNNING
    assert line.queue.inflight_bytes == 10
    line.let_time_pass(0.1)
    assert hung.state is TransferState.DONE
    assert (line.queue.inflight_bytes, line.ended) == (0, [hung])
    assert hung.is_given_up
    assert not hung.has_returned
    assert isinstance(hung.error, StoreError)
    assert (hung.error.errno, hung.error.path, hung.error.nbytes) == (errno.ETIMEDOUT, "/drive", 10)
    assert "no end after 60 s" in hung.error.message
    line.queue.wait_idle()
    line.gate.open()
    line.wait_for_return(hung)
    assert line.ended == [hung], "its end is not noted twice"
    assert line.queue.inflight_bytes == 0


def test_what_a_hung_store_may_touch_stays_until_it_returns(make_line):
    class Bytes:
        pass

    line, held = make_line(), Bytes()
    alive, freed = weakref.ref(held), []
    hung = line.submit(lambda held=held: line.gate.pass_through())
    del held
    line.gate.wait_for_arrival()
    line.let_time_pass()
    hung.when_returned(lambda: freed.append(alive() is None))
    assert alive() is not None
    assert freed == []
    line.gate.open()
    line.wait_for_return(hung)
    assert freed == [True], "first the bytes, then the place"


def test_an_error_that_comes_late_is_not_the_error(make_line):
    line = make_line()

    def fail():
        line.gate.pass_through()
        raise OSError(errno.EIO, "late")

    hung = line.submit(fail)
    line.gate.wait_for_arrival()
    line.let_time_pass()
    line.gate.open()
    line.wait_for_return(hung)
    assert hung.error.errno == errno.ETIMEDOUT


def test_the_thread_serves_again_when_it_returns(make_line):
    line = make_line()
    hung = line.hang()
    line.let_time_pass()
    line.gate.open()
    line.wait_for_return(hung)
    after = line.submit()
    line.queue.wait(after)
    assert after.error is None


def test_who_waits_for_room_goes_on(make_line):
    line = make_line(max_inflight_bytes=10)
    line.hang()
    waiter, waited = in_thread(lambda: line.queue.wait_for_room(10))
    line.let_time_pass()
    end(waiter)
    assert waited[0] >= 0


def test_who_waits_for_a_load_gets_an_error(make_line):
    line = make_line()
    hung = line.hang(direction=Direction.LOAD)
    waiter, _ = in_thread(lambda: line.queue.wait(hung))
    line.let_time_pass()
    end(waiter)
    assert isinstance(hung.error, LoadError)
    assert "resume from a checkpoint" in str(hung.error)


def test_who_waits_without_end_learns_of_a_deadline(make_line):
    """1. Somebody waits while nothing runs. 2. A transfer begins and hangs. 3. The wait must now have an end."""
    line = make_line()
    waits, waiting = [], threading.Semaphore(0)
    real = line.queue._changed.wait

    def wait(seconds):
        waits.append(seconds)
        waiting.release()
        return real(seconds)

    line.queue._changed.wait = wait
    cancelled = Transfer(Direction.LOAD, 1, lambda: None, lambda done: None)
    waiter, _ = in_thread(lambda: line.queue.wait(cancelled))
    assert waiting.acquire(timeout=TIMEOUT_SECONDS)
    assert waits == [threading.TIMEOUT_MAX]
    line.hang()
    assert waiting.acquire(timeout=TIMEOUT_SECONDS)
    assert waits[1] == TIMEOUT
    with line.queue._lock:
        cancelled.state = TransferState.CANCELLED
    line.let_time_pass()
    end(waiter)


def test_what_is_queued_behind_nothing_but_hung_transfers_is_given_up_too(make_line):
    line = make_line()
    hung, behind = line.hang(), [line.submit() for _ in range(3)]
    line.let_time_pass()
    assert [transfer.state for transfer in behind] == [TransferState.DONE] * 3
    assert "all transfers before it hang" in behind[0].error.message
    assert line.ended == [hung, *behind]
    assert line.queue.inflight_bytes == 0
    assert not line.queue.cancel(behind[0])
    late = line.submit()
    assert late.state is TransferState.QUEUED, "whoever submits may hold the lock that its end needs"
    line.queue.wait(late)
    assert late.error.errno == errno.ETIMEDOUT


def test_the_other_threads_of_a_drive_go_on(make_line):
    line = make_line(io_threads=2)
    line.hang()
    line.let_time_pass()
    others = [line.submit() for _ in range(3)]
    for transfer in others:
        line.queue.wait(transfer)
        assert transfer.error is None


def test_what_waited_for_the_only_thread_there_was_gets_another_one(make_line):
    line = make_line(io_threads=2)
    hung = line.hang()
    behind = line.submit()  # one thread is there, and one transfer waits for it
    line.let_time_pass()
    line.queue.wait(behind)
    assert behind.error is None
    assert not hung.has_returned


def test_a_cancelled_transfer_is_not_given_up(make_line):
    line = make_line()
    line.hang()
    cancelled = line.submit()
    assert line.queue.cancel(cancelled)
    line.let_time_pass()
    assert cancelled.state is TransferState.CANCELLED
    assert cancelled.error is None
    assert line.queue.inflight_bytes == 0


def test_close_does_not_wait_for_what_is_known_to_hang(make_line, monkeypatch):
    line = make_line()
    line.hang()
    line.let_time_pass()
    (hung_thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("ssdtrain-store")]
    joined = []
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: joined.append(self))
    line.queue.close()
    monkeypatch.undo()
    assert hung_thread not in joined
    assert hung_thread.is_alive()


def test_close_waits_less_than_five_seconds_for_what_hangs(make_line, monkeypatch):
    line = make_line()
    line.hang()
    waits = []
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: waits.append(timeout))
    line.queue.close()
    monkeypatch.undo()
    assert len(waits) == 1
    assert 0 < waits[0] < 5.0


# --- the cache


@pytest.fixture
def make_rig():
    rigs = []

    def make(tier=None, **options):
        clock = ManualClock()
        tier = tier or GatedTier(writes_open=False)
        rig = CacheRig(tier, **{"timeout_seconds": TIMEOUT, "clock": clock} | options)
        rig.clock = clock
        rigs.append(rig)
        rig.cache.begin_forward()
        return rig

    yield make
    for rig in rigs:
        rig.__exit__()


def let_time_pass(rig, seconds=TIMEOUT):
    rig.clock.advance(seconds)
    rig.queue.give_up_overdue()


def hung_store(rig, tensor):
    handle = rig.cache.put(tensor)
    rig.tier.writes.wait_for_arrival()
    record = handle.lease.record
    store = record.store
    let_time_pass(rig)
    return handle, record, store


def failed_get(rig, handles):
    """Unpack the only handle; return the error without the frames, which would hold it."""
    try:
        rig.cache.get(handles[0])
    except LoadError as error:
        return error.errno, error.message
    return None


def wait_for_return(transfer):
    returned = threading.Event()
    transfer.when_returned(returned.set)
    assert returned.wait(TIMEOUT_SECONDS)


def test_the_tensor_of_a_hung_store_is_handed_back_from_memory(make_rig, caplog):
    rig, tensor = make_rig(), torch.randn(8)
    expected = tensor.clone()
    handle, record, store = hung_store(rig, tensor)
    del tensor
    assert record.state.value == "resident"
    assert torch.equal(rig.cache.get(handle), expected)
    assert rig.tier.counts["read"] == 0
    stats = rig.cache.end_step()
    assert stats.failures == {"ssd: timeout": 1}
    assert (stats.stored_bytes, stats.kept_bytes) == (0, 32)
    assert [text for text in caplog.messages if "no end after" in text and "not affected" in text]
    assert len(caplog.messages) == 1
    del handle
    assert rig.cache.is_idle()
    assert rig.tier.used_bytes == 32, "the write may still come"
    rig.tier.writes.open()
    wait_for_return(store)
    assert rig.tier.used_bytes == 0
    assert rig.tier.counts["free"] == 1


def test_the_place_of_a_hung_store_is_not_given_to_another(make_rig):
    """A late write must not hit what was stored at the same place meanwhile."""
    rig = make_rig(io_threads=2)
    handle, _, store = hung_store(rig, torch.full((8,), 1.0))
    offset = next(iter(rig.tier._live))
    del handle
    rig.cache.is_idle()
    assert list(rig.tier._live) == [offset]
    assert rig.tier.allocate(32).offset != offset
    rig.tier.writes.open()
    wait_for_return(store)
    assert offset not in rig.tier._live


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_graph_dropped_around_the_deadline_leaves_the_place_to_the_store(when, make_rig):
    rig = make_rig()
    handle = rig.cache.put(torch.randn(8))
    rig.tier.writes.wait_for_arrival()
    store = handle.lease.record.store
    if when == "before":
        del handle
        rig.cache.is_idle()
        let_time_pass(rig)
    else:
        let_time_pass(rig)
        del handle
        rig.cache.is_idle()
    assert rig.tier.used_bytes == 32
    rig.tier.writes.open()
    wait_for_return(store)
    assert rig.tier.used_bytes == 0
    assert rig.cache.is_idle()
    assert rig.cache.live_bytes == 0


def test_the_memory_of_a_hung_store_counts_until_it_is_really_gone(make_rig):
    rig = make_rig()
    handle, _, store = hung_store(rig, torch.randn(8))
    del handle
    assert rig.cache.live_bytes == 32
    rig.tier.writes.open()
    wait_for_return(store)
    assert rig.cache.live_bytes == 0


def test_a_tier_is_left_alone_while_a_store_hangs_and_used_again_after(make_rig):
    rig = make_rig()
    handle, _, store = hung_store(rig, torch.randn(8))
    for _ in range(5):
        rig.cache.end_step()
        assert rig.cache.put(torch.randn(8)).lease.record.tier is None, "kept"
    rig.tier.writes.open()
    wait_for_return(store)
    again = rig.cache.put(torch.randn(8))
    rig.settle()
    assert again.lease.record.state.value == "stored"
    del handle, again


def test_forward_does_not_wait_for_ever_for_room(make_rig):
    rig = make_rig(max_inflight_bytes=32)
    handle = rig.cache.put(torch.randn(8))
    rig.tier.writes.wait_for_arrival()
    forward, results = in_thread(lambda: rig.cache.put(torch.randn(8)))
    let_time_pass(rig)
    end(forward)
    assert results
    del handle


def test_a_step_that_ends_gives_up_what_is_overdue(make_rig):
    rig = make_rig()
    handle = rig.cache.put(torch.randn(8))
    rig.tier.writes.wait_for_arrival()
    rig.clock.advance(TIMEOUT)
    assert rig.cache.end_step().failures == {"ssd: timeout": 1}
    del handle


def test_a_hung_load_is_an_error_where_the_tensor_was_needed(make_rig):
    rig = make_rig(GatedTier(reads_open=False))
    tensor = torch.randn(8)
    handle = rig.cache.put(tensor)
    rig.settle()
    del tensor
    handles = [handle]
    del handle
    waiter, errors = in_thread(lambda: failed_get(rig, handles))
    rig.tier.reads.wait_for_arrival()
    load = handles[0].lease.record.load
    let_time_pass(rig)
    end(waiter)
    ((number, message),) = errors
    assert number == errno.ETIMEDOUT
    assert message.startswith("cannot load the activation (8,) torch.float32")
    assert "no end after 60 s" in message
    handles.clear()
    assert rig.cache.is_idle()
    assert rig.tier.used_bytes == 32, "the read still runs"
    rig.tier.reads.open()
    wait_for_return(load)
    assert rig.tier.used_bytes == 0


def test_a_place_is_free_when_the_last_of_several_hung_loads_returns(make_rig):
    rig = make_rig(GatedTier(reads_open=False), io_threads=2)
    tensor = torch.randn(8)
    handles = [rig.cache.put(tensor)]
    rig.settle()
    del tensor
    loads = []
    for _ in range(2):
        waiter, errors = in_thread(lambda: failed_get(rig, handles))
        rig.tier.reads.wait_for_arrival()
        loads.append(handles[0].lease.record.load)
        let_time_pass(rig)
        end(waiter)
        assert errors[0][0] == errno.ETIMEDOUT
    handles.clear()
    assert rig.cache.is_idle()
    assert rig.tier.used_bytes == 32
    rig.tier.reads.open()
    for load in loads:
        wait_for_return(load)
    assert loads[0] is not loads[1]
    assert rig.tier.used_bytes == 0
    assert rig.tier.counts["free"] == 1


def test_a_load_that_comes_late_does_not_touch_what_was_loaded_since(make_rig):
    rig = make_rig(GatedTier(reads_open=False), io_threads=2)
    tensor = torch.randn(8)
    expected = tensor.clone()
    handles = [rig.cache.put(tensor)]
    rig.settle()
    del tensor
    waiter, errors = in_thread(lambda: failed_get(rig, handles))
    rig.tier.reads.wait_for_arrival()
    first = handles[0].lease.record.load
    let_time_pass(rig)
    end(waiter)
    assert errors[0][0] == errno.ETIMEDOUT
    rig.tier.reads.open()
    found = rig.cache.get(handles[0])
    wait_for_return(first)
    assert torch.equal(found, expected)
    del found
    handles.clear()
    assert rig.cache.is_idle()
    assert rig.tier.used_bytes == 0


def test_one_hung_drive_of_several_does_not_stop_the_others(make_rig):
    hanging, healthy = GatedTier(writes_open=False), GatedTier()
    tier = StripedTier([hanging, healthy])
    rig = make_rig(tier)
    handles = [rig.cache.put(torch.randn(8)) for _ in range(2)]
    assert {handle.lease.record.extent.drive for handle in handles} == {0, 1}
    hanging.writes.wait_for_arrival()
    by_drive = {handle.lease.record.extent.drive: handle.lease.record.store for handle in handles}
    hung = by_drive[0]
    rig.queue.wait(by_drive[1])
    let_time_pass(rig)
    assert rig.cache.end_step().failures == {"ssd: timeout": 1}
    rig.cache.end_step()  # the pause of the tier
    handles += [rig.cache.put(torch.randn(8)) for _ in range(4)]
    assert {handle.lease.record.extent.drive for handle in handles[2:]} == {1}
    rig.settle()
    assert rig.cache.end_step().stored_bytes == 4 * 32
    del handles
    rig.cache.is_idle()
    rig.settle()
    assert (hanging.used_bytes, healthy.used_bytes) == (32, 0)
    hanging.writes.open()
    wait_for_return(hung)
    assert tier.used_bytes == 0
