"""Several drives as one tier: who gets an extent, and what a drive that fails costs."""

import errno
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clocks import TIMEOUT_SECONDS, ManualClock
from fakes import FlakyTier, Gate, GatedTier, MemoryTier, load_error, store_error
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from ssdtrain_plugin.errors import CapacityError, LoadError, StateError, StoreError
from ssdtrain_plugin.storage.base import Extent, Rates
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.streams import DeviceEvent

READY = DeviceEvent()
MB = 1_000_000


def pattern(nbytes, seed):
    return (torch.arange(nbytes, dtype=torch.int64) * 7 + seed * 31).to(torch.uint8)


def store(tier, nbytes=1000, seed=0):
    extent = tier.allocate(nbytes)
    tier.write(extent, pattern(nbytes, seed), READY)
    return extent


def load(tier, extent):
    target = torch.zeros(extent.nbytes, dtype=torch.uint8)
    tier.read(extent, target, READY).synchronize()
    return target


def full(number=None):
    return CapacityError("cannot store activation: injected", errno=number, path="/full", nbytes=1)


class Drive(FlakyTier):
    """Fails while it is told to, by an attribute of the same name; counts what it is asked."""

    def __init__(self, **options):
        rules = {f"fail_{name}": lambda n, name=name: self.faults.get(name) for name in ("allocate", "write", "read")}
        super().__init__(**rules, **options)
        self.faults = {}

    def fails(self, **faults):
        self.faults = faults


class SizedDrive(MemoryTier):
    """Takes its time, by the clock; keeps sizes instead of bytes."""

    def __init__(self, clock, write, read=None, **options):
        super().__init__(**options)
        self.clock, self.write_rate, self.read_rate = clock, write, read or write

    def write(self, extent, source, ready):
        self.clock.advance(extent.nbytes / self.write_rate)

    def read(self, extent, target, ready):
        self.clock.advance(extent.nbytes / self.read_rate)
        return DeviceEvent()


class Rig:
    """A striped tier over drives, on a manual clock."""

    def __init__(self, *drives, clock=None):
        self.clock = ManualClock(1000.0) if clock is None else clock
        self.drives = drives
        self.tier = StripedTier(drives, clock=self.clock)

    def step(self, sizes):
        """Store all, then load all in reverse; return the bytes that each drive got."""
        extents = []
        for nbytes in sizes:
            extents.append(self.tier.allocate(nbytes))
            self.tier.write(extents[-1], None, READY)
        shares = self.shares(extents)
        for extent in reversed(extents):
            self.tier.read(extent, None, READY)
            self.tier.free(extent)
        return shares

    def shares(self, extents):
        return [sum(e.nbytes for e in extents if e.drive == index) for index in range(len(self.drives))]

    def pending_bytes(self):
        return [drive.pending_bytes for drive in self.tier._drives]

    def held_bytes(self):
        return [drive.held_bytes for drive in self.tier._drives]


def rig_of(count, **options):
    return Rig(*(Drive(**options) for _ in range(count)))


def rig_of_speeds(*speeds):
    """Drives by (write, read) bytes a second."""
    clock = ManualClock(1000.0)
    return Rig(*(SizedDrive(clock, write, read) for write, read in speeds), clock=clock)


def no_frames(error):
    return error is None or (error.__traceback__ is None and no_frames(error.__cause__))


# Which drive


def test_while_nothing_is_known_drives_get_the_same():
    rig = rig_of(3)
    assert rig.shares([store(rig.tier, 100) for _ in range(30)]) == [1000, 1000, 1000]


def test_bytes_count_and_not_turns():
    rig = rig_of(2)
    sizes = [9000, 1000, 1000, 1000, 1000, 5000]
    assert [rig.tier.allocate(nbytes).drive for nbytes in sizes] == [0, 1, 1, 1, 1, 1]


def test_each_drive_gets_bytes_by_its_speed():
    rig = rig_of_speeds((3 * MB, 3 * MB), (MB, MB))
    rig.step([10_000] * 64)
    first, second = rig.step([10_000] * 400)
    assert first / second == pytest.approx(3, rel=0.05)


def test_drives_end_reading_back_at_the_same_time():
    """They write equally fast, so only what they hold tells: it takes the same time to read."""
    rig = rig_of_speeds((MB, 4 * MB), (MB, MB))
    rig.step([10_000] * 64)
    first, second = rig.step([10_000] * 400)
    assert first / second == pytest.approx(4, rel=0.05)


def test_a_drive_with_a_queue_gets_less():
    """What waits to be written counts once more than what is held."""
    rig = rig_of(2)
    waiting = rig.tier.allocate(10_000)
    assert waiting.drive == 0
    others = [store(rig.tier, 1000) for _ in range(19)]
    assert {extent.drive for extent in others} == {1}, "each owes 20 kB: 10 to write, 10 to read; 19 to read"
    rig.tier.write(waiting, pattern(10_000, 0), READY)
    assert store(rig.tier, 1000).drive == 0


def test_a_drive_that_becomes_slow_gets_less_and_one_that_recovers_gets_more():
    rig = rig_of_speeds((MB, MB), (MB, MB))
    for _ in range(3):
        rig.step([10_000] * 60)
    rig.drives[1].write_rate = rig.drives[1].read_rate = MB / 10
    for _ in range(4):
        shares = rig.step([10_000] * 60)
    assert shares[1] == pytest.approx(sum(shares) / 11, rel=0.35)
    rig.drives[1].write_rate = rig.drives[1].read_rate = MB
    for _ in range(8):
        shares = rig.step([10_000] * 60)
    assert shares[1] == pytest.approx(sum(shares) / 2, rel=0.1)


def test_an_unmeasured_drive_is_taken_to_be_as_fast_as_the_best():
    rig = rig_of_speeds((4 * MB, 4 * MB), (MB, MB), (2 * MB, 2 * MB))
    for drive, rate in zip(rig.tier._drives[:2], (4 * MB, MB), strict=True):
        for meter in (drive.writes, drive.reads):
            for _ in range(8):
                meter.begin(MB)
                rig.clock.advance(MB / rate)
                meter.end(MB)
    extents = [rig.tier.allocate(1000) for _ in range(90)]
    assert rig.shares(extents) == [40_000, 10_000, 40_000]


@pytest.mark.parametrize("direction", ["writes", "reads"])
def test_an_unmeasured_drive_that_is_seen_to_be_slow_is_not_taken_to_be_fast(direction):
    """1. A first window takes a slow drive long. 2. Until then it would get as much as the best."""
    rig = rig_of(2)
    meters = [getattr(drive, direction) for drive in rig.tier._drives]
    for _ in range(8):
        meters[0].begin(MB)
        rig.clock.advance(1.0)
        meters[0].end(MB)
    meters[1].begin(MB)
    rig.clock.advance(100.0)
    others = [rig.tier.allocate(1000).drive for _ in range(50)]
    assert others.count(1) <= 1
    meters[1].end(MB)
    others = [rig.tier.allocate(1000).drive for _ in range(50)]
    assert others.count(1) <= 1, "also between its transfers"


def test_a_store_that_hangs_repels_more_and_more():
    """1. A write does not return. 2. No failure, no measurement. 3. The others must get the bytes."""
    clock = ManualClock(1000.0)
    hanging = GatedTier()
    rig = Rig(hanging, MemoryTier(), clock=clock)
    for drive in rig.tier._drives:
        for _ in range(8):
            drive.writes.begin(MB)
            clock.advance(1.0)
            drive.writes.end(MB)
    hanging.writes.shut()
    extent = rig.tier.allocate(1000)
    assert extent.drive == 0
    with ThreadPoolExecutor(1, thread_name_prefix="test-striped") as pool:
        future = pool.submit(rig.tier.write, extent, pattern(1000, 0), READY)
        hanging.writes.wait_for_arrival()
        clock.advance(10_000.0)
        assert {rig.tier.allocate(1000).drive for _ in range(50)} == {1}
        hanging.writes.open()
        future.result(TIMEOUT_SECONDS)


def test_a_drive_that_takes_its_time_to_fail_is_slow():
    class Failing(SizedDrive):
        def write(self, extent, source, ready):
            self.clock.advance(100.0)
            raise store_error()

    clock = ManualClock(1000.0)
    rig = Rig(SizedDrive(clock, MB), SizedDrive(clock, MB), clock=clock)
    rig.step([10_000] * 60)
    rig.drives[0].__class__ = Failing
    before = rig.tier._drives[0].writes.bytes_per_second
    rig.step([10_000] * 4)
    rig.drives[0].__class__ = SizedDrive
    clock.advance(1.0)
    rig.step([10_000] * 60)
    assert rig.tier._drives[0].writes.bytes_per_second < before / 10


def test_a_drive_that_fails_at_once_is_not_fast():
    class Failing(SizedDrive):
        def write(self, extent, source, ready):
            self.clock.advance(1e-6)
            raise store_error()

    clock = ManualClock(1000.0)
    rig = Rig(Failing(clock, MB), SizedDrive(clock, MB), clock=clock)
    for _ in range(20):
        rig.step([10_000] * 4)
        clock.advance(100.0)
    assert rig.tier._drives[0].num_failures == 20
    assert rig.tier._drives[0].writes.bytes_per_second is None


def test_waiting_for_the_source_is_not_the_drives_time():
    rig = rig_of(1)
    active = []

    class Ready(DeviceEvent):
        def synchronize(self):
            active.append(rig.tier._drives[0].writes._num_active)

    rig.tier.write(rig.tier.allocate(10), pattern(10, 0), Ready())
    assert active[0] == 0


def starved(recovered_rate=None):
    """A rig whose second drive has become so slow that it gets nothing."""
    rig = rig_of_speeds((MB, MB), (MB, MB))
    rig.step([10_000] * 100)
    rig.drives[1].write_rate = rig.drives[1].read_rate = MB / 10_000
    while rig.step([10_000] * 20)[1]:
        pass
    if recovered_rate:
        rig.drives[1].write_rate = rig.drives[1].read_rate = recovered_rate
    return rig


def test_a_drive_that_recovered_is_noticed():
    rig = starved(recovered_rate=MB)
    rig.clock.advance(1e6)
    shares = [rig.step([10_000] * 20) for _ in range(30)]
    assert shares[-1] == [100_000, 100_000]


def test_a_drive_that_is_still_slow_is_probed_with_one_extent_at_a_time():
    rig = starved()
    rig.clock.advance(1e9)
    num_probes = 0
    for _ in range(40):
        num_probes += rig.step([10_000] * 50)[1] / 10_000
        rig.clock.advance(1e6)
    assert 2 <= num_probes <= 40 * 50 / 256 + 1


def test_probes_cost_a_small_share_of_the_time():
    """Many allocations pass quickly; a probe of a drive that takes minutes each time must not come as often."""
    rig = starved()
    rig.clock.advance(1e6)
    began, num_probes = rig.clock.now(), 0
    for _ in range(100):
        num_probes += rig.step([10_000] * 50)[1] / 10_000
    seconds_of_probes = num_probes * 2 * 10_000 / rig.drives[1].write_rate
    assert num_probes == 1
    assert seconds_of_probes < 0.02 * (rig.clock.now() - began + 1e6)


def test_a_busy_drive_is_not_probed():
    rig = starved()
    waiting = rig.tier._drives[1]
    waiting.reserve(10_000)
    rig.clock.advance(1e9)
    for _ in range(20):
        assert rig.step([10_000] * 50)[1] == 0
    waiting.release(10_000, is_pending=True)
    rig.clock.advance(1e9)
    assert rig.step([10_000] * 50)[1] == 10_000


# Room


def test_a_full_drive_hands_on_to_the_next():
    rig = Rig(Drive(capacity_bytes=2500), Drive(capacity_bytes=6000))
    extents = [store(rig.tier, 1000, seed) for seed in range(8)]
    assert rig.shares(extents) == [2000, 6000]
    assert (rig.tier.used_bytes, rig.tier.free_bytes) == (8000, 500)
    for seed, extent in enumerate(extents):
        assert torch.equal(load(rig.tier, extent), pattern(1000, seed))
    assert rig.pending_bytes() == [0, 0]


def test_no_room_anywhere_names_the_totals():
    rig = rig_of(2, capacity_bytes=3 << 20)
    for _ in range(2):
        store(rig.tier, 2 << 20)
    message = (
        r"(?s)cannot store activation: 2\.0 MiB to 2 drives \(2\.0 MiB left in pieces, of 6\.0 MiB\).*"
        r"hint: raise `disk_bytes` or lower `offload_fraction`; the tensor stays in memory meanwhile"
    )
    with pytest.raises(CapacityError, match=message) as caught:
        rig.tier.allocate(2 << 20)
    assert (caught.value.errno, caught.value.nbytes) == (None, 2 << 20)
    assert isinstance(caught.value.__cause__, CapacityError)
    assert rig.pending_bytes() == [0, 0]
    assert rig.tier.take_survived() == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (errno.ENOSPC, errno.ENOSPC, errno.ENOSPC),
        (errno.ENOSPC, None, None),
        (None, errno.ENOSPC, None),
        (errno.EIO, errno.EIO, errno.EIO),
    ],
)
def test_no_room_has_a_number_only_if_no_budget_is_the_reason(first, second, expected):
    """A budget frees itself, so the tier must not be taken for a failing one while a budget was the reason."""
    rig = rig_of(2)
    for drive, number in zip(rig.drives, (first, second), strict=True):
        drive.fails(allocate=full(number))
    with pytest.raises(CapacityError) as caught:
        rig.tier.allocate(1000)
    assert caught.value.errno == expected


def test_a_drive_whose_disk_is_full_is_not_a_failing_one():
    """Its own extents are freed and used again; a pause would waste all that it holds."""
    rig = rig_of(2)
    rig.drives[0].fails(allocate=full(errno.ENOSPC))
    assert store(rig.tier).drive == 1
    assert rig.tier.take_survived() == []
    rig.drives[0].fails()
    assert store(rig.tier).drive == 0


def test_a_drive_that_cannot_reserve_for_another_reason_is_failing():
    rig = rig_of(2)
    error = full(errno.EIO)
    rig.drives[0].fails(allocate=error)
    assert [store(rig.tier).drive for _ in range(5)] == [1] * 5
    assert rig.drives[0].calls["allocate"] == 1, "it is left alone"
    assert rig.tier.take_survived() == [error]


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_size_that_a_drive_refuses_leaves_no_trace(nbytes):
    class Strict(MemoryTier):
        def allocate(self, nbytes):
            raise ValueError(f"nbytes: {nbytes} (expected at least 1)")

    rig = Rig(Strict(), Strict())
    with pytest.raises(ValueError, match="at least 1"):
        rig.tier.allocate(nbytes)
    assert rig.pending_bytes() == rig.held_bytes() == [0, 0]


# Failures


def test_a_failed_store_goes_to_another_drive():
    rig = rig_of(2)
    error = store_error(errno.EIO)
    rig.drives[0].fails(write=error)
    extent = store(rig.tier, 1000, seed=5)
    assert extent.drive == 0, "the name stays"
    assert torch.equal(load(rig.tier, extent), pattern(1000, 5))
    assert [drive.used_bytes for drive in rig.drives] == [0, 1000], "what was reserved at first is given back"
    assert rig.tier.take_survived() == [error]
    assert rig.tier.take_survived() == [], "taken and cleared"
    rig.tier.free(extent)
    assert rig.tier.used_bytes == 0
    assert rig.held_bytes() == rig.pending_bytes() == [0, 0]


def test_an_error_that_is_kept_holds_no_tensor():
    """1. A traceback holds frames. 2. A frame holds the source. 3. Device memory would be kept until somebody asks."""

    class Failing(MemoryTier):
        def write(self, extent, source, ready):
            try:
                self.call_the_system(source)
            except OSError as cause:
                raise store_error() from cause

        def call_the_system(self, source):
            raise OSError(errno.EIO, "injected")

    rig = Rig(Failing(), MemoryTier())
    extent, source = rig.tier.allocate(1000), pattern(1000, 0)
    alive = weakref.ref(source)
    rig.tier.write(extent, source, READY)
    del source
    assert alive() is None
    (error,) = rig.tier.take_survived()
    assert isinstance(error.__cause__, OSError)
    assert no_frames(error)


def test_pauses_double_and_a_success_ends_them():
    rig = rig_of(2)
    bad = rig.drives[0]
    bad.fails(write=store_error())
    num_tried = 0
    for seconds in [1, 2, 4, 8, 16, 32, 64, 64, 64]:
        store(rig.tier, 10)
        num_tried += 1
        assert bad.calls["write"] == num_tried
        rig.clock.advance(seconds - 0.01)
        for _ in range(5):
            assert store(rig.tier, 10).drive == 1
        assert (bad.calls["allocate"], bad.calls["write"]) == (num_tried, num_tried), "nothing in a pause"
        rig.clock.advance(0.01)
    assert len(rig.tier.take_survived()) == num_tried
    bad.fails()
    assert store(rig.tier, 10).drive == 0
    bad.fails(write=store_error())
    while bad.calls["write"] == num_tried + 1:
        store(rig.tier, 10)
    rig.clock.advance(1.0)
    assert rig.tier.allocate(10).drive == 0, "the pauses begin with one second again"


def test_after_a_pause_one_extent_is_tried_at_a_time():
    rig = rig_of(2)
    rig.drives[0].fails(write=store_error())
    store(rig.tier, 10)
    rig.clock.advance(1.0)
    trial = rig.tier.allocate(10)
    assert trial.drive == 0
    assert [store(rig.tier, 10).drive for _ in range(20)] == [1] * 20
    rig.drives[0].fails()
    rig.tier.write(trial, pattern(10, 0), READY)
    assert [store(rig.tier, 10).drive for _ in range(20)] == [0] * 20, "trusted, and behind"


def test_a_trial_that_is_given_back_leaves_room_for_another():
    rig = rig_of(2)
    rig.drives[0].fails(write=store_error())
    store(rig.tier, 10)
    rig.clock.advance(1.0)
    rig.tier.free(rig.tier.allocate(10))
    assert rig.tier.allocate(10).drive == 0


def test_what_is_queued_for_a_paused_drive_goes_elsewhere_untried():
    """A dying drive takes seconds for each error; one is enough."""
    rig = rig_of(2)
    extents = [rig.tier.allocate(1000) for _ in range(8)]
    assert [extent.drive for extent in extents] == [0, 1] * 4
    rig.drives[0].fails(write=store_error())
    for seed, extent in enumerate(extents):
        rig.tier.write(extent, pattern(1000, seed), READY)
    assert rig.drives[0].calls["write"] == 1
    assert [drive.used_bytes for drive in rig.drives] == [0, 8000]
    assert len(rig.tier.take_survived()) == 1
    for seed, extent in enumerate(extents):
        assert torch.equal(load(rig.tier, extent), pattern(1000, seed))


def test_a_paused_drive_is_tried_when_no_other_takes_the_bytes():
    rig = Rig(Drive(), Drive(capacity_bytes=1000))
    first, second = rig.tier.allocate(1000), rig.tier.allocate(1000)
    third = rig.tier.allocate(1000)
    assert [extent.drive for extent in (first, second, third)] == [0, 1, 0]
    rig.drives[0].fails(write=store_error(7))
    with pytest.raises(StoreError, match="injected") as caught:
        rig.tier.write(first, pattern(1000, 1), READY)
    assert caught.value.errno == 7
    rig.drives[0].fails()
    rig.tier.write(third, pattern(1000, 3), READY)
    assert torch.equal(load(rig.tier, third), pattern(1000, 3))
    assert "paused" not in rig.tier.describe(), "the success has ended the pause"


def test_when_no_drive_takes_the_bytes_the_last_error_is_raised():
    rig = rig_of(3)
    errors = [store_error(number) for number in (1, 2, 3)]
    for drive, error in zip(rig.drives, errors, strict=True):
        drive.fails(write=error)
    extent = rig.tier.allocate(1000)
    with pytest.raises(StoreError) as caught:
        rig.tier.write(extent, pattern(1000, 4), READY)
    assert caught.value is errors[2]
    assert rig.tier.take_survived() == [], "nothing was made good"
    assert [drive.used_bytes for drive in rig.drives] == [1000, 0, 0]
    for drive in rig.drives:
        drive.fails()
    rig.tier.write(extent, pattern(1000, 4), READY)
    assert torch.equal(load(rig.tier, extent), pattern(1000, 4)), "the extent is as good as before"
    rig.tier.free(extent)
    assert rig.held_bytes() == rig.pending_bytes() == [0, 0, 0]


def test_when_all_drives_are_paused_there_is_no_room_and_it_says_why():
    rig = rig_of(2)
    for drive in rig.drives:
        drive.fails(write=store_error(errno.EIO))
    extent = rig.tier.allocate(1000)
    with pytest.raises(StoreError):
        rig.tier.write(extent, pattern(1000, 0), READY)
    with pytest.raises(CapacityError, match=r"2 of 2 paused after failures\)\n\nhint: look for drive") as caught:
        rig.tier.allocate(1000)
    assert caught.value.errno == errno.EIO, "a failing tier, not a budget"
    rig.clock.advance(1.0)
    rig.tier.allocate(1000)


@pytest.mark.parametrize(("number", "is_paused"), [(errno.ENOSPC, True), (None, False)])
def test_no_room_at_the_write_is_a_failed_store(number, is_paused):
    """A sparse file shows only then that the drive is full; no staging memory is not the drive's fault."""
    rig = rig_of(2)
    error = full(number)
    rig.drives[0].fails(write=error)
    extent = store(rig.tier, 1000, seed=2)
    assert torch.equal(load(rig.tier, extent), pattern(1000, 2))
    assert rig.tier.take_survived() == [error]
    assert ("paused" in rig.tier.describe()) == is_paused


def test_a_drive_is_tried_once_for_one_store():
    """Its second place would be as bad as the first, also where it is not at fault and not paused."""
    rig = Rig(Drive(), Drive(capacity_bytes=10))
    error = full()
    rig.drives[0].fails(write=error)
    extent = rig.tier.allocate(1000)
    with pytest.raises(CapacityError) as caught:
        rig.tier.write(extent, pattern(1000, 0), READY)
    assert caught.value is error
    assert rig.drives[0].calls["write"] == 1


def test_a_failed_load_is_raised_as_it_is_and_pauses_the_drive_for_stores():
    rig = rig_of(2)
    extent = store(rig.tier, 1000, seed=1)
    error = load_error()
    rig.drives[0].fails(read=error)
    with pytest.raises(LoadError) as caught:
        load(rig.tier, extent)
    assert caught.value is error
    assert rig.tier.take_survived() == []
    assert [store(rig.tier, 10).drive for _ in range(5)] == [1] * 5
    rig.drives[0].fails()
    assert torch.equal(load(rig.tier, extent), pattern(1000, 1)), "a load may be tried again"
    assert "paused" in rig.tier.describe(), "a load that works says nothing about stores"
    rig.clock.advance(1.0)
    assert rig.tier.allocate(10).drive == 1, "it holds more"
    assert rig.tier.allocate(5000).drive == 1
    assert rig.tier.allocate(10).drive == 0


class TwoGates(MemoryTier):
    """Each write stands at a gate of its own and then does as told."""

    def __init__(self, *outcomes):
        super().__init__()
        self.gates = [Gate(is_open=False) for _ in outcomes]
        self.outcomes = list(outcomes)
        self._turn = iter(range(len(outcomes)))

    def write(self, extent, source, ready):
        turn = next(self._turn)
        self.gates[turn].pass_through()
        if self.outcomes[turn] is not None:
            raise self.outcomes[turn]
        super().write(extent, source, ready)


def run_together(first, second):
    """Two writes are under way on drive 0 together; they end one after the other, three seconds apart."""
    rig = Rig(TwoGates(first, second), MemoryTier())
    drive = rig.drives[0]
    extents = [rig.tier.allocate(1000) for _ in range(3)]
    with ThreadPoolExecutor(2, thread_name_prefix="test-striped") as pool:
        futures = []
        for turn, extent in enumerate((extents[0], extents[2])):
            assert extent.drive == 0
            futures.append(pool.submit(rig.tier.write, extent, pattern(1000, turn), READY))
            drive.gates[turn].wait_for_arrival()
        for gate, future in zip(drive.gates, futures, strict=True):
            gate.open()
            future.result(TIMEOUT_SECONDS)
    return rig


def test_a_store_that_began_before_the_failure_does_not_end_the_pause():
    rig = run_together(store_error(), None)
    assert "paused" in rig.tier.describe()
    assert {rig.tier.allocate(10).drive for _ in range(5)} == {1}


def test_stores_that_fail_together_are_one_failure():
    rig = run_together(store_error(), store_error())
    assert len(rig.tier.take_survived()) == 2
    rig.clock.advance(1.0)
    assert "paused" not in rig.tier.describe()


def test_a_defect_is_passed_on_and_nothing_stays_behind():
    class Refusing(MemoryTier):
        def write(self, extent, source, ready):
            raise StateError("a transfer was given another tensor")

    rig = Rig(Refusing(), Refusing())
    extent = rig.tier.allocate(1000)
    with pytest.raises(StateError, match="another tensor"):
        rig.tier.write(extent, pattern(999, 0), READY)
    assert "paused" not in rig.tier.describe()
    rig.tier.free(extent)
    assert rig.held_bytes() == rig.pending_bytes() == [0, 0]
    assert rig.tier._drives[0].writes._num_active == 0


def test_a_defect_on_the_second_drive_gives_its_place_back():
    class Refusing(MemoryTier):
        def write(self, extent, source, ready):
            raise StateError("a transfer was given another tensor")

    first = Drive()
    first.fails(write=store_error())
    rig = Rig(first, Refusing())
    extent = rig.tier.allocate(1000)
    with pytest.raises(StateError, match="another tensor"):
        rig.tier.write(extent, pattern(1000, 0), READY)
    assert rig.drives[1].used_bytes == 0
    rig.tier.free(extent)
    assert rig.held_bytes() == rig.pending_bytes() == [0, 0]


# Extents and the end


def test_extents_have_names_of_their_own():
    rig = rig_of(2)
    extents = [rig.tier.allocate(1000) for _ in range(10)]
    assert len({extent.offset for extent in extents}) == 10
    assert all(extent.offset % 4096 == 0 for extent in extents)
    assert {extent.reserved_bytes for extent in extents} == {1000}


def test_a_cancelled_store_gives_its_place_in_the_queue_back():
    rig = rig_of(2)
    extents = [rig.tier.allocate(1000) for _ in range(4)]
    assert rig.pending_bytes() == [2000, 2000]
    for extent in extents:
        rig.tier.free(extent)
    assert rig.held_bytes() == rig.pending_bytes() == [0, 0]
    assert rig.tier.used_bytes == 0


def test_freeing_what_is_not_live_is_refused():
    rig = rig_of(2)
    extent = store(rig.tier)
    for strange in (Extent(0, 1000, 1000), Extent(extent.offset, 999, 1000), Extent(extent.offset, 1000, 1000, 1)):
        with pytest.raises(StateError, match="not allocated"):
            rig.tier.free(strange)
    rig.tier.free(extent)
    store(rig.tier)
    with pytest.raises(StateError, match="not allocated"):
        rig.tier.free(extent)


def test_a_freed_extent_cannot_be_used():
    rig = rig_of(2)
    extent = store(rig.tier)
    rig.tier.free(extent)
    with pytest.raises(StateError, match="not allocated"):
        load(rig.tier, extent)
    with pytest.raises(StateError, match="not allocated"):
        rig.tier.write(extent, pattern(1000, 0), READY)


def test_a_closed_tier_refuses_with_the_errors_of_the_contract():
    rig = rig_of(2)
    extent = store(rig.tier)
    rig.tier.close()
    rig.tier.close()
    assert [drive._is_closed for drive in rig.drives] == [True, True]
    with pytest.raises(CapacityError, match="closed"):
        rig.tier.allocate(1)
    with pytest.raises(StoreError, match="closed"):
        rig.tier.write(extent, pattern(1000, 0), READY)
    with pytest.raises(LoadError, match="closed"):
        load(rig.tier, extent)
    for _ in range(2):
        rig.tier.free(extent)
    assert rig.tier.free_bytes == 0


def test_all_drives_are_closed_also_if_one_cannot_be():
    class Stuck(MemoryTier):
        def close(self):
            raise OSError(errno.EIO, "injected")

    rig = Rig(MemoryTier(), Stuck(), MemoryTier())
    with pytest.raises(OSError, match="injected"):
        rig.tier.close()
    assert [drive._is_closed for drive in rig.drives] == [True, False, True]


def test_one_line_describes_all_drives():
    rig = rig_of_speeds((2 * MB, 3 * MB), (MB, MB))
    assert rig.tier.describe() == "ssd: 2 drives by load and speed: [0] a dictionary; [1] a dictionary"
    rig.step([10_000] * 60)
    assert rig.tier.describe() == (
        "ssd: 2 drives by load and speed: [0] a dictionary, write 2.00 MB/s, read 3.00 MB/s; "
        "[1] a dictionary, write 1.00 MB/s, read 1.00 MB/s"
    )


def test_what_concerns_all_drives_reaches_them():
    class Inner(MemoryTier):
        num_trims = 0

        def take_survived(self):
            return [store_error()]

        def trim(self):
            self.num_trims += 1

    rig = Rig(Inner(), Inner())
    rig.tier.trim()
    assert [drive.num_trims for drive in rig.drives] == [1, 1]
    assert len(rig.tier.take_survived()) == 2


def test_the_speed_of_all_is_the_sum_of_those_that_worked():
    class Inner(MemoryTier):
        def __init__(self, *rates):
            super().__init__()
            self.rates = Rates(*rates)

        def take_rates(self):
            return self.rates

    assert Rig(Inner(3.0, None), Inner(4.0, 5.0), Inner(None, None)).tier.take_rates() == (7.0, 5.0)
    assert Rig(Inner(None, None)).tier.take_rates() == (None, None)


def test_a_load_gives_the_event_of_the_drive():
    event = DeviceEvent()

    class Device(MemoryTier):
        def read(self, extent, target, ready):
            super().read(extent, target, ready)
            return event

    rig = Rig(Device())
    assert rig.tier.read(store(rig.tier), torch.zeros(1000, dtype=torch.uint8), READY) is event


def test_a_tier_has_a_drive():
    with pytest.raises(ValueError, match="drives: none"):
        StripedTier([])


# Threads


@pytest.mark.timeout(60)
def test_no_lock_is_held_while_a_drive_works():
    """A drive stands still in a write, one in a read and one in an allocation; all else goes on."""

    class Slow(GatedTier):
        def __init__(self):
            super().__init__()
            self.allocations = Gate()

        def allocate(self, nbytes):
            self.allocations.pass_through()
            return super().allocate(nbytes)

    drive = Slow()
    rig = Rig(drive, MemoryTier())
    extents = [store(rig.tier, 1000, seed) for seed in range(6)]
    assert [extent.drive for extent in extents] == [0, 1] * 3
    queued = rig.tier.allocate(1000)
    for _ in range(10):
        assert store(rig.tier, 100).drive == 1
    for gate in (drive.writes, drive.reads, drive.allocations):
        gate.shut()
        while gate._arrived.acquire(blocking=False):
            pass
    with ThreadPoolExecutor(3, thread_name_prefix="test-striped") as pool:
        futures = [
            pool.submit(rig.tier.write, queued, pattern(1000, 9), READY),
            pool.submit(load, rig.tier, extents[0]),
        ]
        drive.writes.wait_for_arrival()
        drive.reads.wait_for_arrival()
        rig.tier._drives[1].held_bytes += 1 << 30  # so the next one goes to drive 0
        futures.append(pool.submit(rig.tier.allocate, 1000))
        drive.allocations.wait_for_arrival()
        rig.tier._drives[1].held_bytes -= 1 << 30
        assert torch.equal(load(rig.tier, extents[1]), pattern(1000, 1))
        rig.tier.free(extents[1])
        rig.tier.free(extents[2])
        assert store(rig.tier, 10).drive == 1
        assert rig.tier.take_survived() == []
        assert rig.tier.describe()
        for gate in (drive.writes, drive.reads, drive.allocations):
            gate.open()
        for future in futures:
            future.result(TIMEOUT_SECONDS)
    assert futures[2].result().drive == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("at_call", range(1, 14))
def test_a_finalizer_may_close_the_tier_in_the_middle_of_anything(at_call):
    """The collector may run anywhere, also in a locked region, and close the tier in the thread that holds the lock."""
    calls = []

    def clock():
        calls.append(None)
        if len(calls) == at_call:
            rig.tier.close()
        return 0.0

    rig = Rig(Drive(), Drive(), clock=lambda: 0.0)
    rig.tier._clock = clock
    rig.drives[0].fails(write=store_error())
    rig.drives[1].fails(read=load_error())
    try:
        extent = store(rig.tier)
        load(rig.tier, extent)
    except (CapacityError, StoreError, LoadError, KeyError, AssertionError):
        pass  # the fake has no answer of its own to a closed tier
    rig.tier.close()


def test_threads_store_and_load_at_once_while_drives_fail():
    drives = []
    for index in range(3):
        rules = {"fail_write": lambda n, index=index: store_error() if (n * 7 + index) % 5 == 0 else None}
        drives.append(FlakyTier(capacity_bytes=200_000, **rules))
    tier = StripedTier(drives, clock=ManualClock())
    # The clock stands, so a pause would not end; the counter of failures does what is wanted here.
    tier._clock = iter(range(0, 10**9, 100)).__next__
    start = threading.Barrier(8, timeout=TIMEOUT_SECONDS)

    def work(seed):
        start.wait()
        num_stored = 0
        for turn in range(60):
            nbytes = 1 + (seed * 911 + turn * 4013) % 9000
            try:
                extent = tier.allocate(nbytes)
            except CapacityError:
                continue
            try:
                tier.write(extent, pattern(nbytes, seed + turn), READY)
            except StoreError:
                tier.free(extent)
                continue
            assert torch.equal(load(tier, extent), pattern(nbytes, seed + turn))
            num_stored += 1
            tier.free(extent)
        return num_stored

    with ThreadPoolExecutor(8, thread_name_prefix="test-striped") as pool:
        assert sum(pool.map(work, range(8))) > 0
    assert [drive.used_bytes for drive in drives] == [0, 0, 0]
    assert [(drive.held_bytes, drive.pending_bytes) for drive in tier._drives] == [(0, 0)] * 3


# All of it, at random


class Stripes(RuleBasedStateMachine):
    """Allocations, stores, loads, faults, time: in any order the books are right and the bytes come back."""

    reserved = Bundle("reserved")
    stored = Bundle("stored")
    DRIVES = 3

    def __init__(self):
        super().__init__()
        self.clock = ManualClock()
        self.drives = [Drive(capacity_bytes=20_000) for _ in range(self.DRIVES)]
        self.tier = StripedTier(self.drives, clock=self.clock)
        self.live = {}  # extent -> seed of its bytes, or None
        self.num_errors = 0

    @rule(target=reserved, nbytes=st.integers(1, 9000))
    def allocate(self, nbytes):
        try:
            extent = self.tier.allocate(nbytes)
        except CapacityError:
            self.check_refusal(nbytes)
            return multiple()
        assert extent not in self.live
        assert extent.offset not in {other.offset for other in self.live}
        assert extent.nbytes == nbytes
        assert extent.drive in range(self.DRIVES)
        self.live[extent] = None
        return extent

    def check_refusal(self, nbytes):
        """No drive that works and is not paused had room."""
        for drive, state in zip(self.drives, self.tier._drives, strict=True):
            is_open = state.is_usable(self.clock.now()) and "allocate" not in drive.faults
            assert not is_open or drive.free_bytes < nbytes

    @rule(target=stored, extent=consumes(reserved), seed=st.integers(0, 99))
    def write(self, extent, seed):
        works = [index for index, drive in enumerate(self.drives) if "write" not in drive.faults]
        try:
            self.tier.write(extent, pattern(extent.nbytes, seed), READY)
        except StoreError:
            assert self.place_of(extent).drive.index not in works, "its own drive would have taken it"
            self.tier.free(extent)
            del self.live[extent]
            return multiple()
        assert self.place_of(extent).drive.index in works
        self.live[extent] = seed
        return extent

    @rule(extent=stored)
    def read(self, extent):
        if extent not in self.live:
            return
        is_faulty = "read" in self.drives[self.place_of(extent).drive.index].faults
        try:
            assert torch.equal(load(self.tier, extent), pattern(extent.nbytes, self.live[extent]))
            assert not is_faulty
        except LoadError:
            assert is_faulty

    @rule(extent=st.one_of(consumes(reserved), consumes(stored)))
    def free(self, extent):
        self.tier.free(extent)
        del self.live[extent]
        with pytest.raises(StateError):
            self.tier.free(extent)

    @rule(
        index=st.integers(0, DRIVES - 1),
        faults=st.sets(st.sampled_from(["allocate", "write", "read"])),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
    )
    def change_faults(self, index, faults, number):
        errors = {"allocate": full(number), "write": store_error(number), "read": load_error(number)}
        self.drives[index].faults = {name: errors[name] for name in faults}

    @rule(seconds=st.sampled_from([0.1, 1.0, 70.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def take(self):
        assert all(no_frames(error) for error in self.tier.take_survived())
        assert self.tier.take_survived() == []

    def place_of(self, extent):
        return self.tier._live[extent.offset][1]

    @invariant()
    def books_are_right(self):
        assert self.tier.used_bytes == sum(drive.used_bytes for drive in self.drives)
        assert self.tier.used_bytes == sum(extent.nbytes for extent in self.live)
        assert self.tier.used_bytes + self.tier.free_bytes == 20_000 * self.DRIVES
        places = [self.place_of(extent) for extent in self.live]
        inner = {(place.drive.index, place.extent.offset) for place in places}
        assert len(inner) == len(self.live) == len(self.tier._live), "two extents in one place"
        for index, state in enumerate(self.tier._drives):
            here = [place for place in places if place.drive.index == index]
            assert state.held_bytes == sum(place.extent.nbytes for place in here) == self.drives[index].used_bytes
            assert state.pending_bytes == sum(place.extent.nbytes for place in here if place.is_pending) >= 0
        waiting = {extent for extent, seed in self.live.items() if seed is None}
        assert {extent for extent in self.live if self.place_of(extent).is_pending} == waiting

    def teardown(self):
        for drive in self.drives:
            drive.fails()
        for extent, seed in self.live.items():
            if seed is not None:
                assert torch.equal(load(self.tier, extent), pattern(extent.nbytes, seed))
            self.tier.free(extent)
        assert [drive.used_bytes for drive in self.drives] == [0] * self.DRIVES
        assert [(drive.held_bytes, drive.pending_bytes) for drive in self.tier._drives] == [(0, 0)] * self.DRIVES
        self.tier.close()


Stripes.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestStripes = Stripes.TestCase
