"""Compute time is the clock less the stalls, on a clock that the test moves."""

import pytest

from ssdtrain_plugin.profile import StepProfiler


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class DeviceMark:
    """A device that runs some time behind the host, or has not come so far yet."""

    def __init__(self, seconds):
        self.seconds = seconds

    def seconds_since(self, earlier):
        return None if self.seconds is None else self.seconds - earlier.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def profiler(clock):
    return StepProfiler(clock, lambda: DeviceMark(clock.now))


def run(profiler, clock, microbatch, sizes, *, stall=0.0):
    """Forward saves one thing a second, backward asks for one each two seconds."""
    profiler.begin_forward(microbatch)
    for index, nbytes in enumerate(sizes):
        clock.now += 1
        profiler.saved(10 * microbatch + index, nbytes, is_movable=nbytes > 1)
    profiler.end_forward()
    clock.now += 1
    for index in reversed(range(len(sizes))):
        profiler.needed(10 * microbatch + index, microbatch)
        clock.now += 2
        if stall:
            clock.now += stall
            profiler.stalled(stall)
    profiler.end_backward()


@pytest.mark.parametrize("stall", [0.0, 5.0])
def test_a_step_in_compute_seconds(profiler, clock, stall):
    run(profiler, clock, 0, [8, 1, 4], stall=stall)
    run(profiler, clock, 1, [8, 1, 4], stall=stall)
    clock.now += 50  # the optimizer
    step = profiler.take()
    assert step.seconds == pytest.approx(20)
    first, second = step.microbatches
    assert (first.forward_begin, first.forward_end, first.backward_begin, first.backward_end) == (0, 3, 4, 10)
    assert (second.forward_begin, second.forward_end) == pytest.approx((10, 13))
    assert [(save.nbytes, save.saved_seconds, save.needed_seconds) for save in second.saves] == [
        (8, pytest.approx(1), pytest.approx(4)),
        (1, pytest.approx(2), pytest.approx(2)),
        (4, pytest.approx(3), pytest.approx(0)),
    ]
    assert [save.is_movable for save in first.saves] == [True, False, True]
    assert first.nbytes == 13
    assert profiler.take() is None, "the next step is empty"


def test_a_backward_that_nobody_ends_ends_with_its_last_ask(profiler, clock):
    profiler.begin_forward(0)
    profiler.saved(0, 8, is_movable=True)
    profiler.saved(1, 8, is_movable=True)
    clock.now += 3
    profiler.end_forward()
    profiler.needed(1, 0)
    clock.now += 2
    profiler.needed(0, 0)
    clock.now += 50
    step = profiler.take()
    assert (step.microbatches[0].backward_end, step.seconds) == (5, 5)


def test_a_second_ask_does_not_count(profiler, clock):
    profiler.begin_forward(0)
    profiler.saved(0, 8, is_movable=True)
    clock.now += 1
    profiler.end_forward()
    profiler.needed(0, 0)
    clock.now += 3
    profiler.needed(0, 0)
    assert profiler.take().microbatches[0].saves[0].needed_seconds == 0


def test_what_backward_does_not_ask_for_is_known_by_that(profiler, clock):
    run(profiler, clock, 0, [8])
    profiler.begin_forward(1)
    profiler.saved(10, 8, is_movable=True)
    profiler.saved(11, 8, is_movable=True)
    clock.now += 1
    profiler.end_forward()
    profiler.needed(11, 1)
    assert [save.needed_seconds for save in profiler.take().microbatches[1].saves] == [None, 0]


def test_a_forward_without_backward_gives_no_profile(profiler, clock):
    run(profiler, clock, 0, [8])
    profiler.begin_forward(1)
    clock.now += 1
    profiler.end_forward()
    assert profiler.take() is None


def test_the_device_runs_behind_the_host(clock):
    """The host queues a forward in 1 s that the device runs for 10 s; a save half-way is saved at 5 s."""
    marks = iter([DeviceMark(0.0), DeviceMark(10.0), DeviceMark(12.0), DeviceMark(30.0), DeviceMark(30.0)])
    profiler = StepProfiler(clock, lambda: next(marks))
    profiler.begin_forward(0)
    clock.now += 0.5
    profiler.saved(0, 8, is_movable=True)
    clock.now += 0.5
    profiler.end_forward()
    profiler.needed(0, 0)
    clock.now += 2
    profiler.end_backward()
    (microbatch,) = profiler.take().microbatches
    assert (microbatch.forward_end, microbatch.backward_begin, microbatch.backward_end) == (10, 12, 30)
    assert microbatch.saves[0].saved_seconds == pytest.approx(5)


def test_a_device_that_has_not_finished_gives_no_profile(clock):
    profiler = StepProfiler(clock, lambda: DeviceMark(None))
    run(profiler, clock, 0, [8])
    assert profiler.take() is None


def test_times_are_scaled_together(profiler, clock):
    run(profiler, clock, 0, [8, 8])
    step = profiler.take().scaled(0.5)
    (microbatch,) = step.microbatches
    assert (step.seconds, microbatch.forward_end, microbatch.backward_begin) == (3.5, 1, 1.5)
    assert [save.saved_seconds for save in microbatch.saves] == [0.5, 1]
