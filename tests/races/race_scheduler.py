"""A scheduler of threads by chance, and by nothing else: one thread runs at a time, and a seed says which.

Note [Points]. Every shim (race_threading.py), the tiers of a run and its program call
:meth:`Scheduler.point` where work passes from one thread to another. There, and at a few
lines, or instructions, of the modules under test, the scheduler may give the turn to another
thread. Threads are real ones, since locals and tracing belong to threads, but each waits for
its baton, so what happens follows from the seed alone. The same seed gives the same run:
same points, same digest.

Not under control: addresses of memory, which nothing here depends on, and the collector,
which a run switches off and calls itself at points of its program. Finalizers run when the last
reference goes, which is determined.
"""

import _thread
import math
import random
import sys
import zlib
from collections import deque
from functools import partial

__all__ = ["Aborted", "Deadlock", "Scheduler", "Task", "Threads", "Violation"]

REAL_SECONDS = 60.0
"""How long a thread waits for its baton: only if a lock that is not ours holds another one up."""

TICK_SECONDS = 1e-6
_MOST_POINTS = 60_000
_SHOWN = 30


class Violation(AssertionError):  # noqa: N818 - what it is called in checks of models
    """Something that must never be."""


class Deadlock(Violation):
    """Nobody can go on."""


class Aborted(BaseException):
    """The run has failed elsewhere; raised wherever a thread would go on."""


class Threads:
    """Threads that run after run lends from: nobody can tell when a thread of its own would really be gone.

    What torch keeps for a thread, handles too, dies only then.
    """

    def __init__(self):
        self._idle = []

    def run(self, work):
        """Have a thread do some work. Work ends by giving its turn away, so it is done before that."""
        if not self._idle:
            self._idle.append(_Worker(self._idle))
        self._idle.pop().give(work)


class _Worker:
    def __init__(self, idle):
        self._idle = idle
        self._given = _thread.allocate_lock()
        self._given.acquire()
        self._work = None
        _thread.start_new_thread(self._serve, ())

    def give(self, work):
        self._work = work
        self._given.release()

    def _serve(self):
        while True:
            self._given.acquire()
            work, self._work = self._work, None
            give_turn_away = work()
            del work
            self._idle.append(self)
            give_turn_away()
            del give_turn_away


class Task:
    """One thread of a run.

    Attributes:
        name: For messages.
        predicate: What it waits for; None if it can go on.
        what: The same in words.
        deadline: Until when it waits.
        is_finished: It has ended.
        calls: What the tiers did for the transfer that it runs now; see race_checks.py.
    """

    def __init__(self, name, number, priority):
        self.name = name
        self.number = number
        self.priority = priority
        self.baton = _thread.allocate_lock()
        self.baton.acquire()
        self.predicate = None
        self.what = "start"
        self.deadline = None
        self.is_finished = False
        self.calls = []

    def where(self):
        """Say where it stands."""
        if self.is_finished:
            return "ended"
        return f"waits for {self.what}" if self.predicate else "can go on"

    def is_ready(self, now):
        return not self.is_finished and (
            self.predicate is None or self.predicate() or (self.deadline is not None and self.deadline <= now)
        )


class Walk:
    """At each point the turn goes, with some probability, to anybody."""

    def __init__(self, chance):
        self._chance = chance
        self._probability = chance.choice([1.0, 0.6, 0.3, 0.1])

    def pick(self, current, ready):
        if current in ready and self._chance.random() >= self._probability:
            return current
        return self._chance.choice(ready)


class Priorities:
    """The highest priority runs; now and then who runs falls to the lowest (PCT, Burckhardt et al., ASPLOS 2010)."""

    def __init__(self, chance):
        self._chance = chance
        self._probability = chance.choice([0.002, 0.01, 0.05])
        self._lowest = 0.0

    def pick(self, current, ready):
        if self._chance.random() < self._probability:
            self._lowest -= 1.0
            current.priority = self._lowest
        return max(ready, key=lambda task: task.priority)


class Scheduler:
    """Runs the threads of one run; see Note [Points].

    Args:
        seed: Of every choice.
        threads: To run on.
        traced: Files in which a thread may lose its turn at any line.

    Attributes:
        now: Seconds of the run's clock. It moves by a tick a point, and to the next deadline when
            all that can end a wait is time.
        failure: The first thing that went wrong, or None.
        num_hanging: Calls that hang on purpose: only then may time alone end a wait.
        on_point: Called at each point, to check what must always hold.
        digest: Of all points so far.
    """

    def __init__(self, seed, threads, *, traced=()):
        self._threads = threads
        self._chance = random.Random(f"{seed}/schedule")
        self._strategy = self._chance.choice([Walk, Walk, Priorities])(self._chance)
        self._is_traced = dict.fromkeys(traced, True)
        self._by_opcode = self._chance.random() < 0.3
        self._mean_gap = self._chance.choice([0, 60, 250, 1000]) * (4 if self._by_opcode else 1)
        self._gap = self._draw_gap()
        self._main = Task("main", 0, self._chance.random())
        self.tasks = [self._main]
        self.current = self._main
        self.now = 1.0
        self.failure = None
        self.num_hanging = 0
        self.on_point = lambda: None
        self.digest = 0
        self.num_points = 0
        self.num_preemptions = 0
        self._recent = deque(maxlen=_SHOWN)
        self._is_checking = False

    # For shims, tiers and programs

    def point(self, what):
        """Let the scheduler choose who goes on.

        Raises:
            Aborted: The run has failed.
        """
        task = self.current
        self._note(task, what)
        self._switch(task)
        self._check_alive()

    def block_until(self, predicate, what, deadline=None):
        """Go on when ``predicate`` is true, or time has come; tell whether it is true."""
        task = self.current
        self._note(task, what)
        task.predicate, task.what = predicate, what
        task.deadline = None if deadline is None or math.isinf(deadline) else deadline
        try:
            self._switch(task)
            self._check_alive()
            return bool(predicate())
        finally:
            task.predicate = task.deadline = None

    def spawn(self, name, run):
        """Add a thread; it begins when it gets its turn."""
        task = Task(name, len(self.tasks), self._chance.random())
        self.tasks.append(task)
        self._threads.run(partial(self._top, task, run))
        return task

    def fail(self, error):
        """Note what went wrong and stop the run."""
        if self.failure is None:
            self.failure = error
        raise Aborted

    def check(self, condition, message):
        """Fail the run unless ``condition`` holds; ``message`` is a text, or makes one."""
        if not condition:
            self.fail(Violation(message() if callable(message) else message))

    # For the run itself

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        if self.failure is None and any(not task.is_finished for task in self.tasks[1:]):
            self.failure = Violation(f"threads still alive at the end\n{self.picture()}")
        for task in self.tasks[1:]:
            if not task.is_finished:
                self._hand_over(self._main, task)  # it raises Aborted, and ends

    def picture(self):
        """Say who waits where, and what happened last."""
        lines = [f"  {task.name}: {task.where()}" for task in self.tasks]
        recent = [f"  {self.tasks[number].name}: {what}" for number, what in self._recent]
        return "\n".join(["threads:", *lines, "the last points:", *recent])

    # Inside

    def _note(self, task, what):
        self._check_alive()
        self.now += TICK_SECONDS
        self.num_points += 1
        self._recent.append((task.number, what))
        self.digest = zlib.crc32(what.encode(), self.digest ^ task.number)
        if not self._is_checking:
            self._is_checking = True
            try:
                self.on_point()
            finally:
                self._is_checking = False
        if self.num_points > _MOST_POINTS:
            self.fail(Violation(f"no end after {_MOST_POINTS} points\n{self.picture()}"))

    def _check_alive(self):
        if self.failure is not None:
            raise Aborted

    def _switch(self, task):
        if self.failure is None:
            chosen = self._choose(task)
            if chosen is not task:
                self._hand_over(task, chosen)

    def _choose(self, task):
        ready = [other for other in self.tasks if other.is_ready(self.now)]
        if not ready:
            deadlines = [other.deadline for other in self.tasks if other.predicate and other.deadline is not None]
            if not deadlines or not self.num_hanging:
                self.fail(Deadlock(f"nobody can go on\n{self.picture()}"))
            self.now = max(self.now, min(deadlines))
            ready = [other for other in self.tasks if other.is_ready(self.now)]
        return self._strategy.pick(task, ready)

    def _hand_over(self, task, chosen):
        self.current = chosen
        chosen.baton.release()
        if not task.is_finished and not task.baton.acquire(timeout=REAL_SECONDS):
            raise RuntimeError(f"{chosen.name} neither ends nor comes to a point\n{self.picture()}")

    def _top(self, task, run):
        task.baton.acquire()
        if self.failure is None:
            sys.settrace(self._trace)
            try:
                run()
            except Aborted:
                pass
            except BaseException as error:  # noqa: BLE001 - a thread's top
                self.failure = self.failure or error
            finally:
                sys.settrace(None)
        del run
        task.is_finished = True
        chosen = self._main  # after a failure it takes the others down, one after the other; see __exit__
        if self.failure is None:
            try:
                self._note(task, "end of thread")
                chosen = self._choose(task)
            except Aborted:
                pass
        return partial(self._hand_over, task, chosen)

    def _draw_gap(self):
        return self._chance.expovariate(1 / self._mean_gap) + 1 if self._mean_gap else math.inf

    def _trace(self, frame, event, arg):
        code = frame.f_code
        if event == "call" and self._is_traced.get(code.co_filename) and code.co_name not in _UNDIVIDED:
            if self._by_opcode:
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._trace_lines
        return None

    def _trace_lines(self, frame, event, arg):
        if event in ("line", "opcode") and self.failure is None:
            self._gap -= self._mean_gap / 4 if frame.f_code.co_name in _FINALIZERS else 1
            if self._gap <= 0 and not self._is_checking:
                self._gap = self._draw_gap()
                self.num_preemptions += 1
                task = self.current
                try:
                    self._note(task, f"line {frame.f_lineno} of {frame.f_code.co_name}")
                    self._switch(task)
                except Aborted:
                    return None  # raised at the next point; here it might be in a finalizer, which would swallow it
        return self._trace_lines


# A storage that its owner frees between the look at it and the copy is a limit that docs/design.md names.
_UNDIVIDED = frozenset({"write"})

# Short, and rare, and in the way of anybody.
_FINALIZERS = frozenset({"__del__", "_let_go"})
