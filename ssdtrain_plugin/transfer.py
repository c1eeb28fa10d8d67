"""TransferQueue: the only threads of the package, and the bound on bytes in flight.

It knows time, not tensors: a transfer is a piece of blocking work with a size.

Note [Lanes]. Each drive, in each direction, is a lane with threads of its own: stores
do not hold up loads, and a slow drive does not hold up a fast one. A lane is first
come first served; an urgent transfer goes to its head.

Note [A transfer that hangs]. A system call may never return, and nothing can make it.
So a transfer that has run too long is given up: its ``finish`` runs, with an error, as
if it had failed, and its bytes leave the budget. Its thread is left alone. Until the call
returns, if ever, the transfer goes on owning what the call may touch: the memory, which
its work holds, and the place on the tier, which ``finish`` leaves to it by
:meth:`Transfer.when_returned`. The thread is not replaced, so that a drive that hangs holds
at most ``io_threads`` transfers in each direction; when all of them hang, what is queued
behind them is given up too. Nobody watches a clock all the time: who submits a store or
waits for something looks, before and while it waits, in a thread that computes.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable

from ssdtrain_plugin.deadlines import Abandonable, Deadlines, ending, hangs
from ssdtrain_plugin.errors import QueueClosedError
from ssdtrain_plugin.frames import without_frames
from ssdtrain_plugin.streams import DeviceEvent

__all__ = ["Direction", "Transfer", "TransferQueue", "TransferState"]

logger = logging.getLogger(__name__)


class Direction(enum.Enum):
    """Which way the bytes go."""

    STORE = "store"
    LOAD = "load"


class TransferState(enum.Enum):
    """Where a transfer stands. ``DONE`` is set after its ``finish`` has run."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"


class Transfer(Abandonable):
    """One copy between device memory and a tier.

    Args:
        nbytes: Its size, for the budget.
        work: Blocking; runs in a worker. What it returns becomes ``event``, what
            it raises becomes ``error``. It is dropped as soon as it has run, with
            all it holds.
        finish: Called in the worker after ``work`` and before ``DONE``, with no
            lock held; not called when the transfer is cancelled.
        lane: Which drive, or other place, the bytes go to or come from.
        path: The same for messages, or None.
        serial: Of the record, for the trace.

    Attributes:
        state: Written under the queue's lock.
        error: What ``work`` raised, or None.
        event: To be waited for by the compute stream before the bytes are used.
        seconds: How long ``work`` took.
    """

    __slots__ = (
        "_finish", "_work", "direction", "error", "event", "lane", "nbytes", "path", "seconds", "serial", "state",
    )  # fmt: skip

    def __init__(
        self,
        direction: Direction,
        nbytes: int,
        work: Callable[[], DeviceEvent | None],
        finish: Callable[[Transfer], None],
        lane: Hashable = None,
        path: str | None = None,
        serial: int = -1,
    ) -> None:
        """Describe the work; nothing runs yet."""
        super().__init__()
        self.direction = direction
        self.lane = lane
        self.path = path
        self.serial = serial
        self.nbytes = nbytes
        self._work: Callable[[], DeviceEvent | None] | None = work
        self._finish: Callable[[Transfer], None] | None = finish
        self.state = TransferState.QUEUED
        self.error: BaseException | None = None
        self.event: DeviceEvent | None = None
        self.seconds = 0.0

    def run(self) -> tuple[DeviceEvent | None, BaseException | None, float]:
        """Do the work; return its event, its error and how long it took. For the queue's workers."""
        event, failure = None, None
        started = time.perf_counter()
        try:
            if self._work is not None:
                event = self._work()
        except BaseException as error:  # noqa: BLE001 - a thread's top: kept, and raised where the bytes are needed
            failure = without_frames(error)
        # The work holds the source. It must be gone before `finish` asks whether
        # the bytes are still in memory.
        self._work = None
        return event, failure, time.perf_counter() - started

    def finish(self) -> None:
        """Call ``finish``. For the queue, once."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish(self)

    def give_up(self, reason: str, seconds: float) -> None:
        """Set the error of a transfer that is not waited for. For the queue; ``finish`` comes next.

        Args:
            reason: In a few words.
            seconds: For which it has run.
        """
        self.is_given_up = True
        self.seconds = seconds
        is_store = self.direction is Direction.STORE
        self.error = hangs(is_store=is_store, nbytes=self.nbytes, path=self.path, reason=reason)

    def drop(self) -> None:
        """Let go of what the work holds. For the queue, on cancel."""
        self._work = None
        self._finish = None

    def drop_work(self) -> None:
        """Let go of what the work holds; ``finish`` comes all the same. For the queue."""
        self._work = None


class _Lane:
    """One direction of one drive: who waits, the threads that serve, and those of them that hang."""

    __slots__ = ("hanging", "queue", "ready", "threads")

    def __init__(self, lock: threading.RLock) -> None:
        self.queue: deque[Transfer] = deque()
        self.ready = threading.Condition(lock)
        self.threads: list[threading.Thread] = []
        self.hanging: set[threading.Thread] = set()


class TransferQueue:
    """Runs transfers on daemon threads, first come first served in each lane: Note [Lanes].

    Args:
        io_threads: Threads per lane, started when there is work for them.
        max_inflight_bytes: Bound on stores queued or running. One store larger
            than the bound is admitted when nothing else is in flight.
        timeout_seconds: As of :class:`ssdtrain_plugin.deadlines.Deadlines`.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        *,
        io_threads: int,
        max_inflight_bytes: int,
        timeout_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the queues; no thread runs yet."""
        self._io_threads = io_threads
        self._max_inflight_bytes = max_inflight_bytes
        # Reentrant: a collection inside a locked region may run the finalizer that closes the queue.
        self._lock = threading.RLock()
        self._lanes: dict[tuple[Direction, Hashable], _Lane] = {}
        self._changed = threading.Condition(self._lock)
        self._deadlines: Deadlines[Transfer, threading.Thread] = Deadlines(timeout_seconds, clock)
        self._inflight_bytes = 0
        self._num_unfinished = 0
        self._is_closed = False

    @property
    def inflight_bytes(self) -> int:
        """Bytes of stores queued or running."""
        return self._inflight_bytes

    def is_closed(self) -> bool:
        """Whether nothing more can be queued."""
        return self._is_closed

    def check_open(self) -> None:
        """Refuse to go on if the queue is closed.

        Raises:
            QueueClosedError: It is.
        """
        if self._is_closed:
            raise _closed("go on")

    def wait_for_room(self, nbytes: int) -> float:
        """Wait until a store of ``nbytes`` fits into the budget.

        Args:
            nbytes: Size of the store.

        Returns:
            Seconds waited.

        Threads:
            Any, with no lock held: it is the workers that make room.
        """
        self.give_up_overdue()
        if self._has_room(nbytes):
            return 0.0
        started = time.perf_counter()
        self._wait_until(lambda: self._is_closed or self._has_room(nbytes))
        return time.perf_counter() - started

    def _has_room(self, nbytes: int) -> bool:
        return self._inflight_bytes == 0 or self._inflight_bytes + nbytes <= self._max_inflight_bytes

    def submit(self, transfer: Transfer, *, is_urgent: bool = False) -> None:
        """Queue a transfer and return at once.

        Args:
            transfer: Not submitted before.
            is_urgent: Go before all that is queued in this lane.

        Raises:
            QueueClosedError: The queue was closed.
        """
        direction = transfer.direction
        with self._lock:
            if self._is_closed:
                raise _closed(f"{direction.value} {transfer.nbytes} bytes")
            if direction is Direction.STORE:
                self._inflight_bytes += transfer.nbytes
            self._num_unfinished += 1
            key = (direction, transfer.lane)
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(self._lock)
            if is_urgent:
                lane.queue.appendleft(transfer)
            else:
                lane.queue.append(transfer)
            if len(lane.hanging) == self._io_threads:
                # Nobody will ever serve it. The cache's lock may be held here, so another call gives it up.
                self._deadlines.look_now()
                self._changed.notify_all()
            self._start_thread_if_needed(direction, lane)
            lane.ready.notify()

    def _start_thread_if_needed(self, direction: Direction, lane: _Lane) -> None:
        num_hanging = len(lane.hanging)
        if len(lane.threads) - num_hanging < min(self._io_threads - num_hanging, len(lane.queue)):
            name = f"ssdtrain-{direction.value}-{sum(len(lane.threads) for lane in self._lanes.values())}"
            thread = threading.Thread(target=self._serve, args=(lane,), name=name, daemon=True)
            thread.start()
            lane.threads.append(thread)

    def cancel(self, transfer: Transfer) -> bool:
        """Take back a transfer that has not started.

        Args:
            transfer: Submitted before.

        Returns:
            True if it will not run; its ``finish`` is not called then.
        """
        with self._lock:
            if transfer.state is not TransferState.QUEUED:
                return False
            transfer.state = TransferState.CANCELLED
            transfer.drop()
            self._settle(transfer)
            return True

    def _settle(self, transfer: Transfer) -> None:
        if transfer.direction is Direction.STORE:
            self._inflight_bytes -= transfer.nbytes
        self._num_unfinished -= 1
        self._changed.notify_all()

    def wait(self, transfer: Transfer) -> float:
        """Wait until a transfer is done.

        Args:
            transfer: Submitted before.

        Returns:
            Seconds waited.

        Threads:
            Any but the workers, with no lock held.
        """
        if transfer.state is TransferState.DONE:
            return 0.0
        started = time.perf_counter()
        ended = (TransferState.DONE, TransferState.CANCELLED)
        self._wait_until(lambda: transfer.state in ended)
        return time.perf_counter() - started

    def wait_idle(self) -> None:
        """Wait until nothing is queued or running, but for what was given up."""
        self._wait_until(lambda: self._num_unfinished == 0)

    def _wait_until(self, is_true: Callable[[], bool]) -> None:
        """Wait for a condition on what the lock guards; give up meanwhile what is overdue."""
        while True:
            self.give_up_overdue()
            with self._lock:
                if is_true():
                    return
                left_seconds = self._deadlines.left_seconds
                if left_seconds > 0:
                    self._changed.wait(min(left_seconds, threading.TIMEOUT_MAX))

    def give_up_overdue(self) -> None:
        """Give up every transfer that has run too long: Note [A transfer that hangs].

        Threads:
            Any but the workers, with no lock held: ``finish`` of those transfers is called here.
        """
        if not self._deadlines.is_due():
            return
        with self._lock:
            given_up = []
            for transfer, thread, seconds in self._deadlines.take_overdue():
                self._lanes[transfer.direction, transfer.lane].hanging.add(thread)
                transfer.give_up(f"no end after {seconds:.0f} s", seconds)
                given_up.append(transfer)
            for (direction, _), lane in self._lanes.items():
                given_up += self._take_hopeless(lane)
                self._start_thread_if_needed(direction, lane)
            self._changed.notify_all()  # who waits may have to look again earlier, or later
        with contextlib.ExitStack() as ends:  # every one, whatever another one raises
            for transfer in reversed(given_up):
                ends.callback(self._finish, transfer)

    def _take_hopeless(self, lane: _Lane) -> list[Transfer]:
        """Give up what is queued behind nothing but transfers that hang."""
        if len(lane.hanging) < self._io_threads:
            return []
        behind = [transfer for transfer in lane.queue if transfer.state is TransferState.QUEUED]
        lane.queue.clear()
        for transfer in behind:
            transfer.state = TransferState.RUNNING  # it can no more be cancelled
            transfer.give_up("all transfers before it hang", 0.0)
            transfer.drop_work()
            transfer.returned()
        return behind

    def close(self) -> None:
        """Cancel what is queued, wait for what runs, stop the threads. Calling this twice does nothing.

        A worker that hangs in the kernel, a daemon, is left behind: at once, or by Note [One allowance for the end].
        """
        me = {threading.current_thread()}
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for lane in self._lanes.values():
                    self._cancel_all(lane.queue)
            for condition in (*(lane.ready for lane in self._lanes.values()), self._changed):
                condition.notify_all()
            threads = [each for lane in self._lanes.values() for each in lane.threads if each not in lane.hanging | me]
        with ending() as allowance:
            allowance.wait(lambda seconds: _have_ended(threads, seconds))

    def _cancel_all(self, queue: deque[Transfer]) -> None:
        while queue:
            transfer = queue.popleft()
            if transfer.state is TransferState.QUEUED:
                transfer.state = TransferState.CANCELLED
                transfer.error = _closed(f"{transfer.direction.value} {transfer.nbytes} bytes")
                transfer.drop()
                self._settle(transfer)

    def _serve(self, lane: _Lane) -> None:
        while (transfer := self._next(lane)) is not None:
            self._run(transfer, lane)
            # The loop variable would hold the last transfer while the thread waits.
            del transfer

    def _run(self, transfer: Transfer, lane: _Lane) -> None:
        event, error, seconds = transfer.run()
        with self._lock:
            is_in_time = self._deadlines.end(transfer)
            if is_in_time:
                transfer.event, transfer.error, transfer.seconds = event, error, seconds
            else:
                lane.hanging.discard(threading.current_thread())
        if is_in_time:
            self._finish(transfer)
            return
        try:
            transfer.returned()
        except BaseException:  # a thread's top
            logger.exception("a late transfer's end failed; this is a defect of ssdtrain_plugin, please report it")

    def _finish(self, transfer: Transfer) -> None:
        try:
            transfer.finish()
        except BaseException as error:  # whoever waits must get an answer
            transfer.error = transfer.error or without_frames(error)
            logger.exception("a transfer's end failed; this is a defect of ssdtrain_plugin, please report it")
            if isinstance(error, KeyboardInterrupt):  # of the thread that computes
                raise
        finally:
            with self._lock:
                transfer.state = TransferState.DONE
                self._settle(transfer)

    def _next(self, lane: _Lane) -> Transfer | None:
        with self._lock:
            while True:
                while lane.queue:
                    transfer = lane.queue.popleft()
                    if transfer.state is TransferState.QUEUED:
                        transfer.state = TransferState.RUNNING
                        if self._deadlines.begin(transfer, threading.current_thread(), transfer.nbytes):
                            self._changed.notify_all()  # who waits without end has something to wait for
                        return transfer
                if self._is_closed:
                    return None
                lane.ready.wait()


def _have_ended(threads: list[threading.Thread], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _closed(what: str) -> QueueClosedError:
    return QueueClosedError(
        f"cannot {what}: the offloader was detached and its transfer queue is closed",
        hint="detach only after the last backward of a graph that was offloaded",
    )
