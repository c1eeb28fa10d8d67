"""Spill and promotion: who moves when, what a load or a death under a move does, and that no budget is exceeded."""

import gc
import threading

import pytest
import torch
from fakes import TIMEOUT_SECONDS, AlwaysOffload, Gate, GatedTier, MemoryTier, load_error, store_error
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.errors import CapacityError
from ssdtrain_plugin.migration import Migrator
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.policy.fixed import FractionPolicy
from ssdtrain_plugin.records import State
from ssdtrain_plugin.schedule import MicrobatchLog, ReloadSchedule
from ssdtrain_plugin.streams import CpuStreams
from ssdtrain_plugin.transfer import TransferQueue

SIZE = 64
UNLIMITED = 1 << 40


class Place(GatedTier):
    """A tier whose budget holds in any thread. Moves have a gate of their own, and fail when told, once."""

    def __init__(self, **options):
        super().__init__(**options)
        self.moves = Gate()
        self.other = None
        self.moved = []
        self.failing = set()
        self.most_bytes = 0
        self._allocating = threading.Lock()

    def allocate(self, nbytes):
        with self._allocating:
            extent = super().allocate(nbytes)
            self.most_bytes = max(self.most_bytes, self.used_bytes)
        return extent

    def data(self, extent):
        with self._lock:
            live, data = self._live[extent.offset]
            assert live == extent
            return data

    def extents(self):
        with self._lock:
            return {extent for extent, _ in self._live.values()}

    def _is_move(self, name, extent, memory):
        if self.other is None or not self.other.has_block(memory):
            return False
        self.moved.append((name, extent.nbytes))
        self.moves.pass_through()
        if name in self.failing:
            self.failing.discard(name)
            raise store_error() if name == "spill" else load_error()
        return True

    def write(self, extent, source, ready):
        base = MemoryTier if self._is_move("spill", extent, source) else GatedTier
        base.write(self, extent, source, ready)

    def read(self, extent, target, ready):
        base = MemoryTier if self._is_move("promotion", extent, target) else GatedTier
        return base.read(self, extent, target, ready)

    def close(self):
        self.moves.open()
        super().close()


class HostPlace(Place):
    """Has its bytes in memory that another tier may copy from or to."""

    def allocate(self, nbytes):
        extent = super().allocate(nbytes)
        with self._lock:
            self._live[extent.offset] = (extent, torch.zeros(nbytes, dtype=torch.uint8))
        return extent

    def has_block(self, memory):
        with self._lock:
            return any(block is memory for _, block in self._live.values())

    def memory_of(self, extent):
        return None if self._is_closed else self.data(extent)


class Crumbled(HostPlace):
    """Free in pieces that are all too small."""

    def allocate(self, nbytes):
        try:
            raise ValueError("the arena has no such block")
        except ValueError as error:
            raise CapacityError("cannot store activation: free in pieces", nbytes=nbytes) from error


class Rig:
    """A cache over a host tier and a drive. A context manager."""

    def __init__(self, host_bytes, *, drive=None, prefetch_bytes=UNLIMITED, policy=None, **queue):
        self.host = HostPlace(name="host", capacity_bytes=host_bytes)
        self.drive = drive or Place(name="ssd")
        self.drive.other = self.host
        options = {"io_threads": 1, "max_inflight_bytes": UNLIMITED} | queue
        self.queue = TransferQueue(**options)
        self.tiers = {Placement.HOST: self.host, Placement.SSD: self.drive}
        self.cache = TensorCache(
            placer=Placer(policy or FractionPolicy(1.0), self.tiers, 1, 0),
            queue=self.queue,
            streams=CpuStreams(),
            device=torch.device("cpu"),
            allocate_target=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
            prefetch_bytes=prefetch_bytes,
            rank=0,
        )
        self.values = {}
        self.starts = 0
        self._start = self.cache._migrator._start
        self.cache._migrator._start = self._count_start
        self.first = self.cache.begin_forward()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for tier in (self.host, self.drive):
            for gate in (tier.writes, tier.reads, tier.moves):
                gate.open()
        self.queue.close()
        for tier in (self.host, self.drive):
            tier.close()

    def _count_start(self, record, direction):
        self.starts += 1
        return self._start(record, direction)

    def settle(self):
        self.queue.wait_idle()

    def wait_until(self, predicate):
        """Wait on the queue's own condition until the end of some transfer has made something true."""
        with self.queue._lock:
            assert self.queue._changed.wait_for(predicate, TIMEOUT_SECONDS)

    def save(self, nbytes=SIZE):
        """Save a new storage and return its handle."""
        value = torch.randint(256, (nbytes,), dtype=torch.uint8)
        handle = self.cache.put(value)
        self.values[handle.lease.record.serial] = value.clone()
        return handle

    def save_all(self, count, nbytes=SIZE):
        """Save one after the other, each when all that was under way has ended."""
        handles = []
        for _ in range(count):
            handles.append(self.save(nbytes))
            self.settle()
        return handles

    def get(self, handle):
        """Unpack, and compare with what was saved."""
        assert torch.equal(self.cache.get(handle), self.values[handle.lease.record.serial])

    def on_host(self, handles):
        """The indices of the handles whose bytes are on the host tier."""
        return [index for index, handle in enumerate(handles) if handle.lease.record.tier is self.host]

    def failures(self):
        return self.cache._ledger.counter.failures

    def assert_empty(self):
        self.settle()
        assert self.cache.is_idle()
        self.settle()
        assert self.cache.is_idle()
        assert (self.host.extents(), self.drive.extents()) == (set(), set())
        assert self.cache.live_bytes == 0


# --- spill


def test_the_tail_of_forward_ends_up_on_the_host():
    with Rig(4 * SIZE) as rig:
        handles = rig.save_all(12)
        assert rig.on_host(handles) == [9, 10, 11], "and room for one more, made ahead"
        stats = rig.cache.end_step()
        assert stats.stored_bytes == 9 * SIZE, "each byte went to the drive once"
        assert stats.host_bytes == 11 * SIZE
        assert stats.kept_bytes == 0
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


def test_what_fits_is_not_spilled():
    with Rig(4 * SIZE) as rig:
        handles = rig.save_all(4)
        assert rig.on_host(handles) == [0, 1, 2, 3]
        assert rig.drive.counts["write"] == 0


def test_no_room_is_made_for_what_is_larger_than_the_whole_tier():
    with Rig(4 * SIZE) as rig:
        handles = rig.save_all(4) + rig.save_all(1, 5 * SIZE) + rig.save_all(1)
        assert rig.on_host(handles[:4]) == [1, 2, 3], "spilled for the small one alone"


def test_a_large_storage_makes_room_but_keeps_none_free_afterwards():
    with Rig(4 * SIZE) as rig:
        handles = rig.save_all(4) + rig.save_all(1, 3 * SIZE)
        assert rig.on_host(handles) == [3]
        handles += rig.save_all(3)
        assert rig.on_host(handles) == [3, 5, 6, 7]


@pytest.mark.parametrize("host_units", [4, 5], ids=["full", "with room"])
def test_nothing_is_spilled_when_the_policy_wants_the_drive(host_units):
    class DriveAfterFour(AlwaysOffload):
        def decide(self, request):
            return Placement.HOST if request.seen_bytes < 4 * SIZE else Placement.SSD

    with Rig(host_units * SIZE, policy=DriveAfterFour()) as rig:
        handles = rig.save_all(8)
        assert rig.on_host(handles) == [0, 1, 2, 3]
        assert not rig.drive.moved


def test_an_earlier_micro_batch_is_needed_sooner_and_stays():
    with Rig(4 * SIZE) as rig:
        early = rig.save_all(4)
        rig.cache.begin_forward()
        late = rig.save_all(6)
        assert rig.on_host(early) == [0, 1, 2, 3]
        assert rig.on_host(late) == []
        assert not rig.drive.moved


def test_a_record_shared_with_an_earlier_micro_batch_stays():
    with Rig(4 * SIZE) as rig:
        mask = torch.zeros(SIZE, dtype=torch.uint8)
        early = rig.cache.put(mask)
        rig.settle()
        rig.cache.begin_forward()
        handles = [rig.cache.put(mask), *rig.save_all(6)]
        assert early.lease.record.tier is rig.host
        assert rig.on_host(handles) == [0, 5, 6]


def test_a_record_of_the_running_backward_is_not_spilled():
    """Announced between the two forwards of one log: what backward needs now must not go away."""
    with Rig(4 * SIZE, prefetch_bytes=1) as rig:
        handles = rig.save_all(4)
        rig.cache.expect_backward(rig.first)
        handles += rig.save_all(3)
        assert rig.on_host(handles) == [0, 1, 2, 3]


def test_a_spill_that_backward_overtakes_comes_to_nothing():
    with Rig(4 * SIZE, prefetch_bytes=1, io_threads=1) as rig:
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save(), rig.save(2 * SIZE)]
        rig.drive.moves.wait_for_arrival()
        rig.wait_until(lambda: all(handle.lease.record.state is State.STORED for handle in handles))
        assert [handle.lease.record.is_moving for handle in handles] == [True, True, False, False, False, False]
        rig.cache.expect_backward(rig.first)
        rig.drive.moves.open()
        rig.settle()
        assert rig.on_host(handles) == [0, 1, 2, 3]
        assert rig.drive.moved == [("spill", SIZE)], "what was queued has not even begun"
        assert rig.cache.end_step().stored_bytes == (1 + 2 + 1) * SIZE, "what was written wears the drive all the same"
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


def test_a_spill_takes_no_place_in_the_budget_of_stores_in_flight():
    with Rig(4 * SIZE, max_inflight_bytes=SIZE) as rig:
        rig.drive.moves.shut()
        handles = rig.save_all(4)
        handles.append(rig.save())
        rig.drive.moves.wait_for_arrival()
        rig.wait_until(lambda: handles[-1].lease.record.state is State.STORED)
        rig.wait_until(lambda: rig.queue.inflight_bytes == 0)  # the worker settles its store a moment later


def test_spills_under_way_count_as_room_that_comes():
    with Rig(4 * SIZE) as rig:
        rig.drive.moves.shut()
        handles = rig.save_all(4)
        handles += [rig.save() for _ in range(5)]
        rig.drive.moves.open()
        rig.settle()
        assert len(rig.drive.moved) == 1, "one storage's worth of room, not five"


def test_a_host_tier_free_in_pieces_is_emptied_further():
    with Rig(8 * SIZE) as rig:
        handles = rig.save_all(4)
        rig.host.__class__ = Crumbled
        gc.disable()
        try:
            handles += rig.save_all(2)
            assert rig.on_host(handles) == [2, 3]
            assert rig.failures() == {}, "no failure: the drive has room"
            handles.clear()
            rig.assert_empty()  # the frames of the refusal hold neither tensor nor handle
        finally:
            gc.enable()


def test_a_micro_batch_that_fits_is_not_spilled_because_the_last_one_did_not():
    with Rig(4 * SIZE) as rig:
        handles = rig.save_all(6)
        handles.clear()
        rig.cache.is_idle()
        rig.cache.begin_forward()
        handles = rig.save_all(4)
        assert rig.on_host(handles) == [0, 1, 2, 3]


# --- a spill and a load, or a death


def test_a_load_under_a_spill_reads_where_the_bytes_were():
    with Rig(4 * SIZE, prefetch_bytes=1) as rig:
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        rig.get(handles[0])
        assert rig.host.counts["read"] >= 1
        rig.drive.moves.open()
        rig.settle()
        rig.get(handles[0])
        handles.clear()
        rig.assert_empty()


def test_a_spill_that_ends_under_a_load_leaves_the_bytes_to_it():
    with Rig(4 * SIZE, prefetch_bytes=1) as rig:
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        record = handles[0].lease.record
        rig.host.reads.shut()
        with rig.cache._lock:
            transfer = rig.cache._reloader.demand(record, rig.first)
        rig.host.reads.wait_for_arrival()
        rig.drive.moves.open()
        rig.wait_until(lambda: not record.is_moving)
        assert record.extent in rig.host.extents()
        rig.host.reads.open()
        rig.queue.wait(transfer)
        assert transfer.error is None
        rig.get(handles[0])
        handles.clear()
        rig.assert_empty()


def test_a_graph_dropped_under_a_spill_frees_both_places_when_it_ends():
    with Rig(4 * SIZE) as rig:
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        handles.clear()
        assert rig.cache.is_idle()
        assert len(rig.host.extents()) == 1, "the move reads there"
        rig.drive.moves.open()
        rig.assert_empty()


@pytest.mark.parametrize("is_move_first", [True, False])
def test_a_graph_dropped_under_a_spill_and_a_load_frees_its_place_with_the_last(is_move_first):
    with Rig(4 * SIZE, prefetch_bytes=1) as rig:
        rig.drive.moves.shut()
        handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        rig.host.reads.shut()
        with rig.cache._lock:
            rig.cache._reloader.demand(handles[0].lease.record, rig.first)
        rig.host.reads.wait_for_arrival()
        extent = handles[0].lease.record.extent
        handles.clear()
        assert rig.cache.is_idle()
        ends = [rig.drive.moves, rig.host.reads]
        if not is_move_first:
            ends.reverse()
        ends[0].open()
        if is_move_first:
            rig.wait_until(lambda: not rig.drive.extents())
        assert extent in rig.host.extents()
        ends[1].open()
        rig.assert_empty()


# --- promotion


def turned(rig, count, host_count):
    """A log of ``count`` records, the last ``host_count`` of them on the host, ready for backward."""
    handles = rig.save_all(count)
    assert rig.on_host(handles) == list(range(count - host_count, count))
    return handles


def test_the_host_fills_with_what_is_needed_soonest():
    with Rig(4 * SIZE, prefetch_bytes=SIZE) as rig:
        handles = turned(rig, 12, 3)
        rig.cache.expect_backward(rig.first)
        rig.settle()
        # 11 is loaded; 8 is the first on the drive that the prefetch is not about to take.
        assert rig.on_host(handles) == [8, 9, 10, 11]
        rig.get(handles.pop())
        rig.settle()
        rig.get(handles.pop())
        rig.settle()
        assert rig.on_host(handles) == [7, 8, 9], "in the room of 11; that of 10 is noticed at the next unpack"
        while handles:
            rig.get(handles.pop())
            rig.settle()
        assert rig.drive.moved.count(("promotion", SIZE)) == 9
        assert rig.host.counts["read"] == 12, "every load came from the host"
        stats = rig.cache.end_step()
        assert stats.loaded_bytes == 12 * SIZE, "promoted bytes are not in device memory"
        rig.assert_empty()


def test_what_does_not_fit_is_not_moved_and_nothing_overtakes_it():
    with Rig(4 * SIZE, prefetch_bytes=SIZE) as rig:
        early = rig.save_all(4)
        rig.cache.begin_forward()
        handles = rig.save_all(2) + rig.save_all(2, 3 * SIZE) + rig.save_all(2)
        del early[:2]
        rig.cache.is_idle()
        rig.cache.expect_backward(rig.first + 1)
        rig.settle()
        assert rig.on_host(handles) == [], "5 is loaded, 4 is next, and for 3 there is no room"
        assert rig.starts == 0


def test_loads_of_the_drive_come_before_promotions():
    with Rig(4 * SIZE, prefetch_bytes=2 * SIZE) as rig:
        early = rig.save_all(4)
        rig.cache.begin_forward()
        handles = rig.save_all(6)
        assert rig.on_host(handles) == []
        early.clear()
        assert rig.cache.is_idle() is False
        rig.drive.reads.shut()
        rig.cache.expect_backward(rig.first + 1)
        rig.drive.reads.wait_for_arrival()
        assert rig.host.free_bytes == 4 * SIZE
        assert rig.starts == 0
        rig.drive.reads.open()
        rig.settle()
        assert rig.on_host(handles) == [0, 1, 2], "3 is the prefetch's next"
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


def test_promotions_that_are_queued_step_aside_for_a_load():
    with Rig(4 * SIZE, prefetch_bytes=2 * SIZE) as rig:
        early = rig.save_all(4)
        rig.cache.begin_forward()
        handles = rig.save_all(8)
        early.clear()
        rig.cache.is_idle()
        rig.drive.moves.shut()
        rig.cache.expect_backward(rig.first + 1)
        rig.drive.moves.wait_for_arrival()
        assert [handle.lease.record.is_moving for handle in handles] == 3 * [False] + 2 * [True] + 3 * [False]
        rig.drive.reads.shut()
        rig.get(handles.pop())  # makes room for a load of 5
        rig.drive.moves.open()
        rig.wait_until(lambda: not any(handle.lease.record.is_moving for handle in handles))
        assert rig.on_host(handles) == [4], "3 has not begun"
        rig.drive.reads.open()
        rig.settle()
        assert rig.on_host(handles) == [1, 2, 3, 4]
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


def test_a_promotion_that_a_load_overtakes_is_not_waited_for():
    with Rig(4 * SIZE, prefetch_bytes=SIZE, io_threads=1) as rig:
        handles = turned(rig, 12, 3)
        rig.drive.moves.shut()
        rig.cache.expect_backward(rig.first)
        rig.drive.moves.wait_for_arrival()
        assert handles[8].lease.record.is_moving
        while handles:
            rig.get(handles.pop())  # reads 8 from the drive
        rig.drive.moves.open()
        rig.assert_empty()


def test_promotions_stay_within_their_bound_and_the_free_room():
    with Rig(16 * SIZE, prefetch_bytes=2 * SIZE) as rig:
        early = rig.save_all(16)
        rig.cache.begin_forward()
        handles = rig.save_all(12)
        early.clear()
        rig.cache.is_idle()
        rig.drive.moves.shut()
        rig.cache.expect_backward(rig.first + 1)
        rig.drive.moves.wait_for_arrival()
        with rig.cache._lock:
            moving = [index for index, handle in enumerate(handles) if handle.lease.record.is_moving]
        assert moving == [7, 8], "10 and 11 are loaded, 9 is next, and two are as much as the bound allows"
        rig.drive.moves.open()
        rig.settle()
        assert rig.on_host(handles) == list(range(9)), "one after the other they all come"


def test_what_something_else_still_holds_is_not_promoted():
    with Rig(4 * SIZE, prefetch_bytes=1) as rig:
        early = rig.save_all(4)
        rig.cache.begin_forward()
        held = torch.zeros(SIZE, dtype=torch.uint8)
        handles = [rig.cache.put(held), *rig.save_all(3)]
        rig.settle()
        early.clear()
        rig.cache.is_idle()
        rig.cache.expect_backward(rig.first + 1)
        rig.settle()
        assert rig.on_host(handles) == [1]


def test_a_second_pass_over_a_retained_graph_promotes_again():
    with Rig(4 * SIZE, prefetch_bytes=SIZE) as rig:
        handles = turned(rig, 12, 3)
        for _ in range(2):
            for handle in reversed(handles):
                rig.get(handle)
                rig.settle()
        assert len(rig.on_host(handles)) == 4
        del handle
        handles.clear()
        rig.assert_empty()


def test_the_end_of_a_cancelled_load_lets_promotions_go_on():
    with Rig(4 * SIZE, prefetch_bytes=2 * SIZE) as rig:
        early = rig.save_all(4)
        rig.cache.begin_forward()
        handles = rig.save_all(6)
        early.clear()
        rig.cache.is_idle()
        with rig.queue._lock:  # so that no load begins
            rig.cache.expect_backward(rig.first + 1)
            for _ in range(2):
                handles.pop()
                rig.cache.is_idle()
        rig.settle()
        assert rig.on_host(handles) == [0, 1, 2], "3 is next; no load is counted that will not come"
        handles.clear()
        rig.assert_empty()


# --- failures


def test_a_failed_spill_leaves_the_record_where_it_was():
    with Rig(4 * SIZE) as rig:
        rig.drive.failing.add("spill")
        handles = rig.save_all(5)
        assert rig.on_host(handles) == [0, 1, 2, 3]
        assert rig.failures() == {"ssd: EIO at /nowhere": 1}
        assert rig.cache._placer.usable(Placement.SSD, 0) is None, "as after a failed store"
        assert rig.drive.used_bytes == SIZE
        del handles[3]
        rig.cache.is_idle()
        assert rig.starts == 1
        handles += rig.save_all(1)
        assert rig.on_host(handles) == [0, 1, 2, 4]
        assert rig.starts == 1, "and nothing is tried while the drive is left alone"
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


def test_a_drive_without_room_for_a_spill_is_no_failure():
    with Rig(4 * SIZE, drive=Place(name="ssd", capacity_bytes=SIZE)) as rig:
        handles = rig.save_all(5)
        assert rig.on_host(handles) == [0, 1, 2, 3]
        assert rig.failures() == {}
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


def test_a_failed_promotion_is_counted_once_and_the_load_decides():
    with Rig(4 * SIZE, prefetch_bytes=SIZE) as rig:
        rig.drive.failing.add("promotion")
        handles = turned(rig, 12, 3)
        while handles:
            rig.get(handles.pop())
            rig.settle()
        assert rig.failures() == {"ssd: EIO at /nowhere, promotion": 1}
        assert rig.drive.moved.count(("promotion", SIZE)) == 1, "none is tried again in this backward"
        rig.assert_empty()


def test_a_host_tier_that_refuses_a_promotion_is_not_asked_for_ever():
    with Rig(4 * SIZE, prefetch_bytes=SIZE) as rig:
        handles = turned(rig, 12, 3)
        rig.host.__class__ = Crumbled
        rig.cache.expect_backward(rig.first)
        rig.settle()
        assert rig.on_host(handles) == [9, 10, 11]
        assert rig.failures() == {}
        while handles:
            rig.get(handles.pop())
        rig.assert_empty()


@pytest.mark.parametrize("kind", ["spill", "promotion"])
def test_closing_under_a_move_hangs_nobody(kind):
    with Rig(4 * SIZE, prefetch_bytes=SIZE) as rig:
        if kind == "promotion":
            handles = turned(rig, 12, 3)
            rig.drive.moves.shut()
            rig.cache.expect_backward(rig.first)
        else:
            rig.drive.moves.shut()
            handles = [*rig.save_all(4), rig.save()]
        rig.drive.moves.wait_for_arrival()
        closer = threading.Thread(target=rig.queue.close)
        closer.start()
        rig.drive.moves.open()
        closer.join(TIMEOUT_SECONDS)
        assert not closer.is_alive()
        rig.cache.expect_backward(rig.first)
        rig.cache.put(torch.zeros(SIZE, dtype=torch.uint8))
        handles.clear()
        rig.cache.is_idle()


# --- nothing to do


@pytest.mark.parametrize("placement", list({Placement.HOST, Placement.SSD}))
def test_with_one_tier_there_is_no_migrator(placement):
    queue = TransferQueue(io_threads=1, max_inflight_bytes=1)
    cache = TensorCache(
        placer=Placer(FractionPolicy(1.0), {placement: Place(name=placement.value)}, 1, 0),
        queue=queue,
        streams=CpuStreams(),
        device=torch.device("cpu"),
        allocate_target=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        prefetch_bytes=1,
        rank=0,
    )
    assert cache._migrator is None
    assert cache._reloader.observer is None


# --- the order of need, in integers


def furthest(schedule, newcomer, microbatch, running=-1, out=()):
    return list(schedule.furthest(newcomer, microbatch, running=running, is_out=lambda serial: serial in out))


def logged(*entries):
    schedule = ReloadSchedule()
    for microbatch, serial in entries:
        schedule.record(microbatch, serial, 1)
    return schedule


def test_furthest_is_the_first_save_of_the_newest_log():
    schedule = logged((0, 0), (0, 1), (1, 2), (1, 3), (1, 4))
    assert furthest(schedule, 4, 1) == [2, 3]
    assert furthest(schedule, 1, 0) == [2, 3, 4, 0]
    assert furthest(schedule, 1, 0, running=1) == [0]
    assert furthest(schedule, 1, 0, running=0) == [2, 3, 4]


def test_furthest_counts_a_record_at_its_last_save_in_its_earliest_log():
    schedule = logged((0, 0), (0, 1), (0, 0), (0, 2), (1, 0), (1, 3), (1, 4))
    assert furthest(schedule, 2, 0) == [3, 4, 1, 0]
    assert furthest(schedule, 4, 1) == [3]


def test_furthest_passes_over_what_is_out_only_once():
    log = MicrobatchLog()
    for serial in range(5):
        log.append(serial, 1)
    asked = []

    def is_out(serial):
        asked.append(serial)
        return serial != 2

    assert list(log.furthest(is_out)) == [2]
    assert list(log.furthest(is_out)) == [2]
    assert asked == [0, 1, 2, 3, 4, 2, 3, 4]


def test_beyond_begins_behind_the_next_of_the_prefetch():
    log = MicrobatchLog()
    for serial in range(6):
        log.append(serial, 1)
    assert log.upcoming(2, at_least_one=False) == [5, 4]
    assert list(log.beyond(lambda serial: serial == 1)) == [2, 0]
    log.demand(2)
    assert list(log.beyond(lambda serial: False)) == [1, 0]
    assert log.upcoming(2, at_least_one=False) == [3, 1]
    assert log.upcoming(2, at_least_one=False) == [0]
    assert list(log.beyond(lambda serial: False)) == []
    log.demand(3)  # another pass
    assert list(log.beyond(lambda serial: True)) == []
    assert list(log.beyond(lambda serial: False)) == [], "out for good, in this pass"
    log.demand(3)
    assert list(log.beyond(lambda serial: False)) == [1, 0]


# --- invariants


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 5)),
        st.tuples(st.just("save"), st.integers(1, 5)),
        st.tuples(st.sampled_from(["save_again", "drop"]), st.integers(0, 30)),
        st.tuples(st.sampled_from(["forward", "shut", "open", "settle", "end_step"]), st.just(0)),
        st.tuples(st.sampled_from(["unpack", "unpack_retained"]), st.integers(1, 6)),
        st.tuples(st.just("expect"), st.integers(0, 3)),
        st.tuples(st.just("fail"), st.integers(0, 1)),
    ),
    max_size=60,
)


class Model:
    """What is alive, beside the rig, and what must hold after every step."""

    def __init__(self, rig):
        self.rig = rig
        self.graphs = {rig.first: []}  # micro-batch -> handles in forward order
        self.running = None
        self.was_on_host = set()

    def all_handles(self):
        return [handle for handles in self.graphs.values() for handle in handles]

    def newest(self):
        return self.graphs[max(self.graphs)]

    def save(self, number):
        self.newest().append(self.rig.save(number * SIZE // 2))

    def forward(self, _):
        self.graphs[self.rig.cache.begin_forward()] = []

    def shut(self, _):
        self.rig.drive.moves.shut()

    def open(self, _):
        self.rig.drive.moves.open()

    def settle(self, _):
        self.rig.drive.moves.open()
        self.rig.settle()

    def end_step(self, _):
        self.rig.cache.end_step()

    def expect(self, number):
        self.rig.cache.expect_backward(list(self.graphs)[number % len(self.graphs)])

    def fail(self, number):
        self.rig.drive.failing.add("promotion" if number else "spill")

    def drop(self, number):
        handles = self.all_handles()
        victim = handles[number % len(handles)] if handles else None
        for graph in self.graphs.values():
            graph[:] = [handle for handle in graph if handle is not victim]

    def save_again(self, number):
        """Save a storage that something still holds once more: in two logs, or twice in one."""
        handles = self.all_handles()
        storage = handles[number % len(handles)].lease.record.find_original() if handles else None
        if storage is not None:
            tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
            handle = self.rig.cache.put(tensor)
            self.rig.values[handle.lease.record.serial] = tensor.clone()
            self.newest().append(handle)

    def unpack(self, count):
        graph = next((handles for handles in self.graphs.values() if handles), [])
        for _ in range(min(count, len(graph))):
            self.rig.get(graph.pop())

    def unpack_retained(self, count):
        graph = next((handles for handles in self.graphs.values() if handles), [])
        for handle in graph[: -count - 1 : -1]:
            self.rig.get(handle)

    def check(self):
        rig, cache = self.rig, self.rig.cache
        for tier in rig.tiers.values():
            assert tier.most_bytes <= tier.capacity_bytes
        with cache._lock:
            stored = [handle.lease.record for handle in self.all_handles() if handle.lease.record.extent is not None]
            for record in stored:
                assert record.extent in record.tier.extents()
                if record.state in (State.STORED, State.LOADED):
                    assert torch.equal(record.tier.data(record.extent), rig.values[record.serial])
            running, schedule = cache._backward_microbatch, cache._reloader.schedule
            on_host = {
                record.serial for record in stored if record.tier is rig.host and schedule.has(running, record.serial)
            }
            if running == self.running:
                gone = self.was_on_host - on_host
                spilled = {record.serial for record in stored if record.tier is rig.drive} & gone
                assert not spilled, "backward needs them now"
            self.running, self.was_on_host = running, on_host

    def check_at_rest(self):
        """With nothing under way, the tiers have the extents of the living and no other."""
        rig = self.rig
        rig.drive.moves.open()
        for _ in range(2):
            rig.settle()
            rig.cache.is_idle()
        for tier in rig.tiers.values():
            records = {handle.lease.record for handle in self.all_handles() if handle.lease.record.tier is tier}
            assert tier.extents() == {record.extent for record in records if record.extent is not None}
            assert not any(record.is_moving or record.num_transfers for record in records)
        assert not +rig.cache._migrator._moving_bytes
        assert rig.cache._migrator._num_drive_loads == 0


@settings(deadline=None, max_examples=150)
@given(
    steps=_STEPS,
    host_units=st.integers(1, 12),
    drive_units=st.sampled_from([4, 20, 1000]),
    prefetch_bytes=st.sampled_from([1, SIZE, 4 * SIZE, UNLIMITED]),
    io_threads=st.integers(1, 2),
)
def test_invariants_hold_after_every_step(steps, host_units, drive_units, prefetch_bytes, io_threads):
    drive = Place(name="ssd", capacity_bytes=drive_units * SIZE)
    with Rig(host_units * SIZE, drive=drive, prefetch_bytes=prefetch_bytes, io_threads=io_threads) as rig:
        model = Model(rig)
        for name, number in steps:
            getattr(model, name)(number)
            model.check()
        model.check_at_rest()
        for handle in model.all_handles():
            rig.get(handle)
        handle = None
        model.check_at_rest()
        model.graphs.clear()
        rig.assert_empty()


def test_the_migrator_is_the_one_that_is_tested():
    with Rig(SIZE) as rig:
        assert isinstance(rig.cache._migrator, Migrator)
