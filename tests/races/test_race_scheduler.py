"""The scheduler finds what it is there for: a deadlock, a lost update, a lost call, a thread that never ends."""

import pytest
from race_scheduler import Aborted, Deadlock, Scheduler, Threads, Violation
from race_threading import SimThreading

NUM_SEEDS = 60


@pytest.fixture(scope="module")
def threads():
    return Threads()


def outcome(seed, threads, body, traced=()):
    """Run ``body(scheduler, threading)`` as the main thread; return the failure, and the digest."""
    scheduler = Scheduler(seed, threads, traced=traced)
    with scheduler:
        try:
            body(scheduler, SimThreading(scheduler))
        except Aborted:
            pass
    return scheduler.failure, scheduler.digest


def test_locks_in_two_orders_end_in_a_deadlock_that_says_who_waits(threads):
    def body(scheduler, threading):
        one, other = threading.Lock(), threading.Lock()

        def take(first, second):
            with first, second:
                scheduler.point("both")

        thread = threading.Thread(target=take, args=(other, one), name="helper")
        thread.start()
        take(one, other)
        thread.join()

    failures = [outcome(seed, threads, body)[0] for seed in range(NUM_SEEDS)]
    found = [failure for failure in failures if failure is not None]
    assert 0 < len(found) < NUM_SEEDS
    assert all(isinstance(failure, Deadlock) for failure in found)
    assert "main: waits for lock 2" in str(found[0])
    assert "helper: waits for lock 1" in str(found[0])


class Account:
    def __init__(self):
        self.total = 0

    def add(self):
        total = self.total
        self.total = total + 1


@pytest.mark.parametrize("is_locked", [True, False])
def test_an_update_without_a_lock_is_lost_in_some_run(is_locked, threads):
    def body(scheduler, threading):
        lock, account = threading.Lock(), Account()

        def work():
            for _ in range(30):
                if is_locked:
                    with lock:
                        account.add()
                else:
                    account.add()

        helper = threading.Thread(target=work)
        helper.start()
        work()
        helper.join()
        scheduler.check(account.total == 60, f"{account.total} of 60")

    found = [outcome(seed, threads, body, traced=[__file__])[0] for seed in range(NUM_SEEDS)]
    assert any(found) == (not is_locked)


def test_a_call_that_comes_before_the_wait_is_lost(threads):
    def body(scheduler, threading):
        condition = threading.Condition()

        def call():
            with condition:
                condition.notify()

        threading.Thread(target=call).start()
        with condition:
            condition.wait()

    kinds = {type(outcome(seed, threads, body)[0]) for seed in range(NUM_SEEDS)}
    assert Deadlock in kinds


def test_time_ends_a_wait_only_if_something_hangs(threads):
    def body(scheduler, threading):
        condition = threading.Condition()
        with condition:
            scheduler.num_hanging = 1
            assert not condition.wait(5.0)
            assert scheduler.now > 5
            scheduler.num_hanging = 0
            condition.wait(5.0)

    assert isinstance(outcome(1, threads, body)[0], Deadlock)


def test_a_thread_that_is_left_behind_is_a_failure_and_is_taken_down(threads):
    ended = []

    def body(scheduler, threading):
        def wait():
            try:
                threading.Event().wait()
            finally:
                ended.append(True)

        threading.Thread(target=wait, name="left").start()
        scheduler.point("end")

    for seed in range(5):
        failure, _ = outcome(seed, threads, body)
        assert isinstance(failure, Violation)
        assert "left" in str(failure)


def test_an_error_of_a_thread_is_the_failure(threads):
    def body(scheduler, threading):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()

    assert isinstance(outcome(3, threads, body)[0], ZeroDivisionError)


def test_the_same_seed_is_the_same_run(threads):
    def body(scheduler, threading):
        lock = threading.RLock()

        def work():
            for _ in range(10):
                with lock, lock:
                    scheduler.point("in")

        helpers = [threading.Thread(target=work, name=f"helper {number}") for number in range(3)]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()

    digests = [[outcome(seed, threads, body)[1] for seed in range(10)] for _ in range(2)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 10
