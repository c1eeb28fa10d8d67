"""A throttled tier answers when a drive of its speed would, by a clock that the test moves."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from clocks import TIMEOUT_SECONDS, ManualClock
from fakes import FlakyTier, GatedTier, MemoryTier, load_error, store_error
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.errors import LoadError, StoreError
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.storage.throttled import RealClock, ThrottledTier
from ssdtrain_plugin.streams import DeviceEvent

READY = DeviceEvent()


class Rig:
    """A throttled tier on a manual clock, and threads that transfer."""

    def __init__(self, inner=None, *, write=1000.0, read=1000.0, **options):
        self.clock = ManualClock(50.0)
        self.inner = MemoryTier() if inner is None else inner
        self.tier = ThrottledTier(
            self.inner, write_bytes_per_second=write, read_bytes_per_second=read, clock=self.clock, **options
        )
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="test-throttled")
        self.futures = []

    def start(self, function, *arguments):
        future = self.pool.submit(function, *arguments)
        self.futures.append(future)
        return future

    def write(self, nbytes):
        extent = self.tier.allocate(nbytes)
        return self.start(self.tier.write, extent, torch.zeros(nbytes, dtype=torch.uint8), READY)

    def stored(self, nbytes):
        """An extent that holds bytes, without the clock moving."""
        extent = self.tier.allocate(nbytes)
        source = torch.arange(nbytes, dtype=torch.int32).to(torch.uint8)
        self.inner.write(extent, source, READY)
        return extent, source

    def read(self, extent):
        return self.start(self.tier.read, extent, torch.zeros(extent.nbytes, dtype=torch.uint8), READY)


@pytest.fixture
def make_rig():
    rigs = []

    def make(*arguments, **options):
        rigs.append(Rig(*arguments, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.tier.close()
        rig.clock.advance(1e9)
        rig.pool.shutdown()


def ends_after(rig, future, seconds):
    """Check that a transfer under way ends when ``seconds`` have passed from now, and no earlier."""
    rig.clock.wait_for_sleepers(1)
    rig.clock.advance(seconds - 0.001)
    rig.clock.wait_for_sleepers(1)
    assert not future.done()
    rig.clock.advance(0.001)
    return future.result(TIMEOUT_SECONDS)


def test_a_write_takes_its_bytes_over_the_rate(make_rig):
    rig = make_rig(write=1000.0)
    ends_after(rig, rig.write(2500), 2.5)


def test_a_read_has_a_rate_of_its_own_and_gives_the_bytes_and_the_event(make_rig):
    event = DeviceEvent()

    class Inner(MemoryTier):
        def read(self, extent, target, ready):
            super().read(extent, target, ready)
            return event

    rig = make_rig(Inner(), write=1.0, read=500.0)
    extent, source = rig.stored(100)
    target = torch.zeros(100, dtype=torch.uint8)
    assert ends_after(rig, rig.start(rig.tier.read, extent, target, READY), 0.2) is event
    assert torch.equal(target, source)


def test_threads_share_the_rate(make_rig):
    """Four threads get the rate together, not each: the last byte leaves when all have had their time."""
    rig = make_rig(write=1000.0)
    futures = [rig.write(1000) for _ in range(4)]
    rig.clock.wait_for_sleepers(4)
    for num_done in range(4):
        assert sum(future.done() for future in futures) == num_done
        rig.clock.advance(1.0)
        rig.clock.wait_for_sleepers(3 - num_done)
        wait_until_done(futures, num_done + 1)


def wait_until_done(futures, count):
    done = sum(future.done() for future in futures)
    while done < count:
        left = [future for future in futures if not future.done()]
        finished, _ = wait(left, TIMEOUT_SECONDS, return_when="FIRST_COMPLETED")
        assert finished, "a transfer is late"
        done = sum(future.done() for future in futures)
    assert done == count


def test_the_directions_do_not_share(make_rig):
    rig = make_rig(write=1000.0, read=1000.0)
    extent, _ = rig.stored(1000)
    futures = [rig.write(1000), rig.read(extent)]
    rig.clock.wait_for_sleepers(2)
    rig.clock.advance(1.0)
    for future in futures:
        future.result(TIMEOUT_SECONDS)


def test_an_idle_pipe_saves_nothing_up(make_rig):
    rig = make_rig(write=1000.0)
    rig.clock.advance(3600.0)
    ends_after(rig, rig.write(1000), 1.0)
    rig.clock.advance(3600.0)
    ends_after(rig, rig.write(1000), 1.0)


def test_latencies_overlap_and_bytes_do_not(make_rig):
    rig = make_rig(write=1000.0, latency_seconds=5.0)
    first = rig.write(1000)
    rig.clock.wait_for_sleepers(1)
    second = rig.write(1000)
    rig.clock.wait_for_sleepers(2)
    rig.clock.advance(5.999)
    rig.clock.wait_for_sleepers(2)
    rig.clock.advance(0.001)
    first.result(TIMEOUT_SECONDS)
    ends_after(rig, second, 1.0)


def test_the_time_of_the_tier_inside_counts(make_rig):
    """1. 3 s are owed. 2. The tier inside takes 2 of them. 3. Only one is waited for."""
    inner = GatedTier(writes_open=False)
    rig = make_rig(inner, write=1000.0)
    future = rig.write(3000)
    inner.writes.wait_for_arrival()
    rig.clock.advance(2.0)
    inner.writes.open()
    ends_after(rig, future, 1.0)


def test_a_tier_inside_that_is_slower_is_not_waited_for_longer(make_rig):
    inner = GatedTier(writes_open=False)
    rig = make_rig(inner, write=1000.0, latency_seconds=0.5)
    future = rig.write(1000)
    inner.writes.wait_for_arrival()
    rig.clock.advance(1.5)
    inner.writes.open()
    future.result(TIMEOUT_SECONDS)


def test_waiting_for_the_source_is_not_the_drives_time(make_rig):
    class Later(DeviceEvent):
        def __init__(self):
            self.reached = threading.Event()
            self.is_waited_for = threading.Event()

        def synchronize(self):
            self.is_waited_for.set()
            assert self.reached.wait(TIMEOUT_SECONDS)

    rig, ready = make_rig(write=1000.0), Later()
    extent = rig.tier.allocate(1000)
    future = rig.start(rig.tier.write, extent, torch.zeros(1000, dtype=torch.uint8), ready)
    assert ready.is_waited_for.wait(TIMEOUT_SECONDS)
    rig.clock.advance(10.0)
    ready.reached.set()
    ends_after(rig, future, 1.0)


@pytest.mark.parametrize(("rate", "left_seconds"), [(100.0, 20.0), (1000.0, 2.0), (4000.0, 0.5)])
def test_a_new_rate_holds_for_bytes_that_are_under_way(make_rig, rate, left_seconds):
    rig = make_rig(write=1000.0)
    future = rig.write(4000)
    rig.clock.wait_for_sleepers(1)
    rig.clock.advance(2.0)
    rig.tier.set_rates(write_bytes_per_second=rate)
    ends_after(rig, future, left_seconds)
    ends_after(rig, rig.write(1000), 1000 / rate)


def test_bytes_let_go_by_a_raised_rate_owe_the_latency_only(make_rig):
    """1. Hours are owed. 2. The rate rises, and at the next look no byte is left. 3. The old end is void."""
    rig = make_rig(write=1.0, latency_seconds=2.0)
    future = rig.write(10_000)
    rig.clock.wait_for_sleepers(1)
    rig.tier.set_rates(write_bytes_per_second=math.inf)
    rig.clock.advance(1.0)
    ends_after(rig, future, 2.0)


def test_what_it_tells_of_its_speed_is_the_throttled_one(make_rig):
    rig = make_rig(write=1000.0, read=500.0)
    extent, _ = rig.stored(1000)
    assert rig.tier.take_rates() == (None, None)
    ends_after(rig, rig.write(3000), 3.0)
    ends_after(rig, rig.read(extent), 2.0)
    assert rig.tier.take_rates() == (pytest.approx(1000.0), pytest.approx(500.0))


def test_rates_are_set_apart(make_rig):
    rig = make_rig(write=1000.0, read=1000.0)
    extent, _ = rig.stored(1000)
    rig.tier.set_rates(read_bytes_per_second=100.0)
    ends_after(rig, rig.read(extent), 10.0)
    ends_after(rig, rig.write(1000), 1.0)


def test_no_bound_is_no_wait(make_rig):
    rig = make_rig(write=math.inf, read=math.inf)
    for _ in range(3):
        rig.write(1 << 20).result(TIMEOUT_SECONDS)
        rig.clock.advance(1.0)
    assert "no bound write" in rig.tier.describe()


def test_jitter_is_a_share_of_the_time_and_comes_from_the_seed(make_rig):
    def marks(seed):
        tier = ThrottledTier(
            MemoryTier(), write_bytes_per_second=1.0, read_bytes_per_second=1.0, jitter=0.5, seed=seed, clock=clock
        )
        return [tier._begin(tier._writes, 1000).due_at(0.0) for _ in range(200)]

    clock = ManualClock()
    first = marks(seed=1)
    assert first == marks(seed=1)
    assert first != marks(seed=2)
    steps = [later - earlier for earlier, later in zip([0.0, *first], first, strict=False)]
    assert 500 <= min(steps) < 600 < 1400 < max(steps) <= 1500
    assert sum(steps) / len(steps) == pytest.approx(1000, rel=0.1)


def test_latency_varies_with_the_rest():
    tier = ThrottledTier(
        MemoryTier(),
        write_bytes_per_second=math.inf,
        read_bytes_per_second=1.0,
        latency_seconds=10.0,
        jitter=0.5,
        clock=ManualClock(),
    )
    latencies = [tier._begin(tier._writes, 1000).due_at(0.0) for _ in range(100)]
    assert 5 <= min(latencies) < 7 < 13 < max(latencies) <= 15


@pytest.mark.parametrize(("name", "kind"), [("write", StoreError), ("read", LoadError)])
def test_a_failure_is_passed_on_at_once(make_rig, name, kind):
    inner = FlakyTier(fail_write=lambda n: store_error() if n == 1 else None, fail_read=lambda n: load_error())
    rig = make_rig(inner, write=1000.0)
    extent, _ = rig.stored(1000)
    future = rig.read(extent) if name == "read" else rig.write(1000)
    with pytest.raises(kind, match="injected"):
        future.result(TIMEOUT_SECONDS)


def test_close_lets_off_what_is_owed(make_rig):
    """A queue that is closed waits some seconds for its workers; they must not sleep on for hours."""
    rig = make_rig(write=1.0)
    future = rig.write(1_000_000)
    rig.clock.wait_for_sleepers(1)
    rig.tier.close()
    rig.clock.advance(1.0)
    future.result(TIMEOUT_SECONDS)
    rig.tier.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("at_call", [2, 3, 4])
def test_a_finalizer_may_close_the_tier_in_a_locked_region(at_call):
    """The collector may close the tier in the thread that holds its lock."""

    class Collecting(ManualClock):
        num_calls = 0

        def now(self):
            self.num_calls += 1
            if self.num_calls == at_call:
                tier.close()
            return super().now()

    tier = ThrottledTier(
        FlakyTier(fail_write=lambda n: store_error()),
        write_bytes_per_second=math.inf,
        read_bytes_per_second=1.0,
        clock=Collecting(),
    )
    tier.set_rates(write_bytes_per_second=1.0)
    with pytest.raises(StoreError):
        tier.write(Extent(0, 1, 1), torch.zeros(1, dtype=torch.uint8), READY)
    assert tier._is_closed


def test_the_rest_is_the_tiers_inside(make_rig):
    class Inner(MemoryTier):
        def __init__(self):
            super().__init__(name="host", capacity_bytes=5000)
            self.error = store_error()
            self.num_trims = 0

        def take_survived(self):
            return [self.error]

        def trim(self):
            self.num_trims += 1

        def memory_of(self, extent):
            return f"memory of {extent.nbytes}"

    rig = make_rig(Inner(), write=2e9, read=3e9, latency_seconds=1e-4, jitter=0.25)
    assert rig.tier.name == "host"
    extent = rig.tier.allocate(2000)
    assert (rig.tier.used_bytes, rig.tier.free_bytes) == (2000, 3000)
    assert rig.tier.memory_of(extent) == "memory of 2000"
    rig.tier.free(extent)
    assert rig.tier.used_bytes == 0
    assert rig.tier.take_survived() == [rig.inner.error]
    rig.tier.trim()
    assert rig.inner.num_trims == 1
    assert rig.tier.describe() == (
        "host: a dictionary, throttled to 2.00 GB/s write and 3.00 GB/s read, latency 100.0 us, jitter 25%"
    )


def test_no_method_of_a_tier_is_forgotten():
    """A method with a default in the base would else answer for the tier inside, wrongly and in silence."""
    for name in vars(Tier):
        if not name.startswith("_"):
            assert name in vars(ThrottledTier), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("write_bytes_per_second", 0),
        ("read_bytes_per_second", -1.0),
        ("write_bytes_per_second", math.nan),
        ("latency_seconds", -0.1),
        ("latency_seconds", math.inf),
        ("jitter", 1.1),
        ("jitter", -0.1),
    ],
)
def test_wrong_settings_are_refused(name, value):
    options = {"write_bytes_per_second": 1.0, "read_bytes_per_second": 1.0, name: value}
    with pytest.raises(ValueError, match=name):
        ThrottledTier(MemoryTier(), **options)


def test_a_wrong_rate_changes_nothing(make_rig):
    rig = make_rig(write=1000.0, read=1000.0)
    line = rig.tier.describe()
    with pytest.raises(ValueError, match="read_bytes_per_second: 0 "):
        rig.tier.set_rates(write_bytes_per_second=5.0, read_bytes_per_second=0)
    assert rig.tier.describe() == line


def test_the_real_clock_goes_forward_and_waits():
    clock = RealClock()
    began = clock.now()
    clock.sleep_until(began + 0.002)
    assert clock.now() >= began + 0.002
    clock.sleep_until(began - 100.0)
    assert clock.now() <= time.monotonic()


_CHANGES = st.lists(st.tuples(st.floats(0.01, 3.0), st.floats(10.0, 10_000.0)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8), changes=_CHANGES)
def test_bytes_leave_at_the_rate_whatever_changes(sizes, changes):
    """The end of the last transfer is where the sum of rate times time reaches the sum of bytes."""
    clock = ManualClock()
    tier = ThrottledTier(MemoryTier(), write_bytes_per_second=1000.0, read_bytes_per_second=1.0, clock=clock)
    owed = [tier._begin(tier._writes, nbytes) for nbytes in sizes]
    left, rate, expected = sum(sizes), 1000.0, 0.0
    for seconds, new_rate in changes:
        if left / rate < seconds:
            break
        clock.advance(seconds)
        left, expected = left - rate * seconds, expected + seconds
        tier.set_rates(write_bytes_per_second=new_rate)
        rate = new_rate
    dues = [one.due_at(clock.now()) for one in owed]
    assert dues[-1] == pytest.approx(expected + left / rate)
    assert dues == sorted(dues), "first come, first served"
