"""A meter shows the speed of the drive, not of one transfer, however transfers overlap."""

import math

import pytest
from clocks import ManualClock
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.storage.meter import Meter

MB = 1_000_000


def one_after_the_other(meter, clock, sizes, rate, pause_seconds=0.0):
    for nbytes in sizes:
        meter.begin(nbytes)
        clock.advance(nbytes / rate)
        meter.end(nbytes)
        clock.advance(pause_seconds)


def side_by_side(meter, clock, nbytes, count, rounds, rate):
    """``count`` transfers share the rate, so they end together."""
    for _ in range(rounds):
        for _ in range(count):
            meter.begin(nbytes)
        clock.advance(count * nbytes / rate)
        for _ in range(count):
            meter.end(nbytes)


@pytest.fixture
def clock():
    return ManualClock(100.0)


def test_nothing_is_known_before_the_first_window(clock):
    meter = Meter(window_transfers=3, clock=clock)
    one_after_the_other(meter, clock, [MB, MB], rate=5 * MB)
    assert meter.bytes_per_second is None
    one_after_the_other(meter, clock, [MB], rate=5 * MB)
    assert meter.bytes_per_second == pytest.approx(5 * MB)


def test_a_window_ends_by_bytes_too(clock):
    meter = Meter(window_bytes=3 * MB, window_transfers=1000, clock=clock)
    one_after_the_other(meter, clock, [MB, MB], rate=5 * MB)
    assert meter.bytes_per_second is None
    one_after_the_other(meter, clock, [MB], rate=5 * MB)
    assert meter.bytes_per_second == pytest.approx(5 * MB)


def test_the_time_between_transfers_is_not_the_drives(clock):
    meter = Meter(clock=clock)
    one_after_the_other(meter, clock, [MB] * 20, rate=5 * MB, pause_seconds=3.0)
    assert meter.bytes_per_second == pytest.approx(5 * MB)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_transfers_at_once_are_counted_together(clock, count):
    """Note [Busy time]: each of four at once takes four times as long, and the drive is as fast as before."""
    meter = Meter(clock=clock)
    side_by_side(meter, clock, MB, count, rounds=40, rate=5 * MB)
    assert meter.bytes_per_second == pytest.approx(5 * MB)


def test_ends_at_the_same_moment_are_no_window(clock):
    """1. Four transfers run side by side. 2. They end in one moment. 3. Three ends in no time look like speed."""
    meter = Meter(window_bytes=MB, window_transfers=1, clock=clock)
    seen = set()
    for _ in range(10):
        for _ in range(4):
            meter.begin(MB)
        clock.advance(4 * MB / (5 * MB))
        for _ in range(4):
            meter.end(MB)
            seen.add(meter.bytes_per_second and round(meter.bytes_per_second))
    assert seen == {None, 5 * MB}


def test_transfers_under_way_when_a_window_starts_end_together_too(clock):
    """1. A window ends with three under way. 2. No more begin. 3. Their ends are one measurement."""
    meter = Meter(window_bytes=MB, window_transfers=1, clock=clock)
    for _ in range(4):
        meter.begin(MB)
    for turn in range(16):
        clock.advance(0.2)
        meter.end(MB)
        if turn < 15:
            meter.begin(MB)
    assert meter.bytes_per_second == pytest.approx(5 * MB)
    clock.advance(0.6)
    for _ in range(3):
        meter.end(MB)
        assert meter.bytes_per_second == pytest.approx(5 * MB)


def test_overlapping_transfers_count_a_second_once(clock):
    meter = Meter(window_transfers=4, clock=clock)
    meter.begin(MB)
    for _ in range(3):
        clock.advance(1.0)
        meter.begin(MB)
        clock.advance(1.0)
        meter.end(MB)
    clock.advance(1.0)
    meter.end(MB)
    assert meter.bytes_per_second == pytest.approx(4 * MB / 7)


def test_old_windows_fade_out(clock):
    meter = Meter(window_transfers=2, fading=0.5, clock=clock)
    one_after_the_other(meter, clock, [MB] * 40, rate=10 * MB)
    rates = []
    for _ in range(8):
        one_after_the_other(meter, clock, [MB] * 2, rate=MB)
        rates.append(meter.bytes_per_second)
    assert rates == sorted(rates, reverse=True)
    assert rates[1] < 2 * MB, "a slow drive shows after two windows"
    for _ in range(8):
        one_after_the_other(meter, clock, [MB] * 2, rate=10 * MB)
    assert meter.bytes_per_second > 9 * MB


def test_a_transfer_that_hangs_makes_the_drive_slower_by_the_second(clock):
    meter = Meter(clock=clock)
    one_after_the_other(meter, clock, [MB] * 8, rate=8 * MB)
    assert meter.bytes_per_second == pytest.approx(8 * MB)
    meter.begin(MB)
    clock.advance(MB / (8 * MB))
    assert meter.bytes_per_second == pytest.approx(8 * MB), "not late yet"
    rates = []
    for _ in range(3):
        clock.advance(10.0)
        rates.append(meter.bytes_per_second)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.4 * MB


def test_a_limit_is_known_before_the_first_window(clock):
    meter = Meter(clock=clock)
    assert meter.limit_bytes_per_second == math.inf
    meter.begin(MB)
    assert meter.limit_bytes_per_second == math.inf
    clock.advance(2.0)
    assert meter.limit_bytes_per_second == pytest.approx(MB / 2)
    meter.begin(3 * MB)
    assert meter.limit_bytes_per_second == pytest.approx(4 * MB / 2), "both may end now"
    meter.end(MB)
    clock.advance(2.0)
    meter.end(3 * MB, has_moved=False)
    assert meter.limit_bytes_per_second == pytest.approx(MB / 4)
    assert meter.bytes_per_second is None


def test_failures_alone_are_no_limit(clock):
    """A speed of nothing would be divided by."""
    meter = Meter(clock=clock)
    meter.begin(MB)
    clock.advance(2.0)
    meter.end(MB, has_moved=False)
    assert meter.limit_bytes_per_second == math.inf


def test_a_failed_transfer_costs_time_and_counts_no_bytes(clock):
    meter = Meter(window_transfers=2, clock=clock)
    meter.begin(7 * MB)
    clock.advance(1.0)
    meter.end(7 * MB, has_moved=False)
    assert meter.bytes_per_second is None
    one_after_the_other(meter, clock, [MB] * 2, rate=2 * MB)
    assert meter.bytes_per_second == pytest.approx(2 * MB / 2.0)


def test_what_the_clock_cannot_see_is_not_divided_by(clock):
    meter = Meter(window_transfers=1, clock=clock)
    for _ in range(50):
        meter.begin(MB)
        meter.end(MB)
    assert meter.bytes_per_second is None
    one_after_the_other(meter, clock, [MB], rate=MB)
    assert meter.bytes_per_second == pytest.approx(51 * MB)


def test_after_a_rest_one_transfer_replaces_the_old_value(clock):
    meter = Meter(clock=clock)
    one_after_the_other(meter, clock, [MB] * 11, rate=MB)  # one window, and a part of the next
    meter.expire()
    clock.advance(1000.0)
    assert meter.bytes_per_second == pytest.approx(MB), "until then the old value stands"
    one_after_the_other(meter, clock, [MB], rate=50 * MB)
    assert meter.bytes_per_second == pytest.approx(50 * MB)
    one_after_the_other(meter, clock, [MB], rate=MB)
    assert meter.bytes_per_second == pytest.approx(50 * MB), "only the first one"


def test_a_transfer_that_began_before_the_rest_counts_with_all_its_time(clock):
    meter = Meter(clock=clock)
    one_after_the_other(meter, clock, [MB] * 8, rate=MB)
    meter.begin(6 * MB)
    clock.advance(2.0)
    meter.expire()
    clock.advance(1.0)
    meter.end(6 * MB)
    assert meter.bytes_per_second == pytest.approx(2 * MB)


def test_a_failed_transfer_replaces_nothing(clock):
    meter = Meter(clock=clock)
    one_after_the_other(meter, clock, [MB] * 8, rate=MB)
    meter.expire()
    meter.begin(MB)
    clock.advance(1.0)
    meter.end(MB, has_moved=False)
    assert meter.bytes_per_second == pytest.approx(MB)


@pytest.mark.parametrize(
    "wrong", [{"window_bytes": 0}, {"window_transfers": 0}, {"fading": 0.0}, {"fading": 1.1}, {"fading": float("nan")}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected"):
        Meter(**wrong)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300 * MB), min_size=8, max_size=60),
    pauses=st.floats(0, 100),
    count=st.integers(1, 9),
)
def test_a_steady_drive_has_its_own_speed(sizes, pauses, count):
    """A pipe of constant speed: whatever the sizes and the overlap, what is shown is that speed."""
    clock, rate = ManualClock(), 200 * MB
    meter = Meter(clock=clock)
    waiting = list(sizes)
    active = []
    while waiting or active:
        while waiting and len(active) < count:
            active.append(waiting.pop())
            meter.begin(active[-1])
        clock.advance(active[0] / rate)  # first come, first served
        meter.end(active.pop(0))
        if not active:
            clock.advance(pauses)
        assert meter.bytes_per_second is None or meter.bytes_per_second == pytest.approx(rate, rel=1e-6)
    if len(sizes) >= max(8, 2 * count):
        assert meter.bytes_per_second is not None
