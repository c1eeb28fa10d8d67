"""What stands in place of ``threading`` and ``time`` in the modules under test: the same, with points."""

import contextlib
import math
from collections import deque

__all__ = ["SimThreading", "SimTime", "replaced"]


class _Lock:
    def __init__(self, scheduler, name, *, is_reentrant):
        self._scheduler = scheduler
        self._is_reentrant = is_reentrant
        self.name = name
        self.owner = None
        self.count = 0
        self.on_release = None

    def acquire(self, blocking=True, timeout=-1):
        scheduler = self._scheduler
        task = scheduler.current
        if self.owner is task and self._is_reentrant:
            self.count += 1
            return True
        if self.owner is task and blocking:
            scheduler.block_until(lambda: False, f"{self.name}, which it has")
        scheduler.point(f"acquire {self.name}")
        if self.owner is not None:
            if not blocking:
                return False
            deadline = None if timeout < 0 else scheduler.now + timeout
            if not scheduler.block_until(lambda: self.owner is None, self.name, deadline):
                return False
        self.owner, self.count = task, 1
        return True

    def release(self):
        scheduler = self._scheduler
        if self.owner is not scheduler.current:
            if scheduler.failure is None:
                raise RuntimeError(f"{self.name} is released by who has not got it")
            return
        self.count -= 1
        if self.count:
            return
        self.count = 1
        if self.on_release is not None and scheduler.failure is None:
            self.on_release()
        self.owner, self.count = None, 0
        if scheduler.failure is None:
            scheduler.point(f"release {self.name}")

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *_):
        self.release()

    def locked(self):
        return self.owner is not None


class _Waiter:
    is_notified = False


class _Condition:
    def __init__(self, scheduler, lock, name):
        self._scheduler = scheduler
        self._lock = lock
        self._waiters = deque()
        self._name = name

    def __enter__(self):
        self._lock.acquire()
        return self

    def __exit__(self, *_):
        self._lock.release()

    def acquire(self, *arguments):
        return self._lock.acquire(*arguments)

    def release(self):
        self._lock.release()

    def wait(self, timeout=None):
        scheduler, lock = self._scheduler, self._lock
        if lock.owner is not scheduler.current:
            raise RuntimeError(f"{self._name} is waited for without its lock")
        waiter = _Waiter()
        self._waiters.append(waiter)
        count, lock.count = lock.count, 1
        deadline = None if timeout is None else scheduler.now + timeout
        lock.release()
        try:
            return scheduler.block_until(lambda: waiter.is_notified, self._name, deadline)
        finally:
            if scheduler.failure is None:
                if not waiter.is_notified:
                    self._waiters.remove(waiter)
                lock.acquire()
                lock.count = count

    def wait_for(self, predicate, timeout=None):
        deadline = math.inf if timeout is None else self._scheduler.now + timeout
        while not predicate():
            if self._scheduler.now >= deadline:
                return False
            self.wait(deadline - self._scheduler.now)
        return True

    def notify(self, n=1):
        if self._lock.owner is not self._scheduler.current:
            raise RuntimeError(f"{self._name} is notified without its lock")
        for _ in range(min(n, len(self._waiters))):
            self._waiters.popleft().is_notified = True
        self._scheduler.point(f"notify {self._name}")

    def notify_all(self):
        self.notify(len(self._waiters))


class _Event:
    def __init__(self, scheduler, name):
        self._scheduler = scheduler
        self._name = name
        self._is_set = False

    def is_set(self):
        return self._is_set

    def set(self):
        self._is_set = True
        self._scheduler.point(f"set {self._name}")

    def clear(self):
        self._is_set = False

    def wait(self, timeout=None):
        deadline = None if timeout is None else self._scheduler.now + timeout
        return self._scheduler.block_until(self.is_set, self._name, deadline)


class _Thread:
    def __init__(self, scheduler, target, args, name):
        self._scheduler = scheduler
        self._run = target, args
        self.name = name
        self.task = None

    def start(self):
        scheduler = self._scheduler
        self.task = scheduler.spawn(self.name, self._top)
        scheduler.threads[self.task] = self
        scheduler.point(f"start {self.name}")

    def _top(self):
        (target, args), self._run = self._run, None
        target(*args)

    def is_alive(self):
        return self.task is not None and not self.task.is_finished

    def join(self, timeout=None):
        deadline = None if timeout is None else self._scheduler.now + timeout
        self._scheduler.block_until(lambda: self.task.is_finished, f"the end of {self.name}", deadline)


class SimThreading:
    """Has the names of ``threading`` that the package uses."""

    TIMEOUT_MAX = math.inf

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._num_locks = 0
        scheduler.threads = {scheduler.current: _Thread(scheduler, None, (), "main")}

    def _name(self, kind):
        self._num_locks += 1
        return f"{kind} {self._num_locks}"

    def Lock(self):  # noqa: N802 - as in threading
        return _Lock(self._scheduler, self._name("lock"), is_reentrant=False)

    def RLock(self):  # noqa: N802
        return _Lock(self._scheduler, self._name("lock"), is_reentrant=True)

    def Condition(self, lock=None):  # noqa: N802
        return _Condition(self._scheduler, self.RLock() if lock is None else lock, self._name("condition"))

    def Event(self):  # noqa: N802
        return _Event(self._scheduler, self._name("event"))

    def Thread(self, *, target, args=(), name="thread", daemon=None):  # noqa: N802
        return _Thread(self._scheduler, target, args, name)

    def current_thread(self):
        return self._scheduler.threads[self._scheduler.current]


class SimTime:
    """Has the clocks of ``time``: all are the run's."""

    def __init__(self, scheduler):
        self._scheduler = scheduler

    def monotonic(self):
        return self._scheduler.now

    perf_counter = time = monotonic

    def sleep(self, seconds):
        self._scheduler.point("sleep")


@contextlib.contextmanager
def replaced(modules, **shims):
    """Put shims in place of the names that the modules have imported."""
    before = [(module, name, getattr(module, name)) for module in modules for name in shims if hasattr(module, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, shims[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
