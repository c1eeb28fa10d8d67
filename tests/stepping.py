"""A transfer queue whose workers go on one at a time, when a test says so: each stands at a gate before it moves bytes.

The queue, its threads and its locks are the real ones. Only the moment at which a tier
moves bytes is the test's to choose, and a thread that would wait lets workers go on instead.
"""

import errno
import threading
from typing import NamedTuple

import torch
from fakes import TIMEOUT_SECONDS, MemoryTier

from ssdtrain_plugin.errors import CapacityError, LoadError, StoreError
from ssdtrain_plugin.transfer import Direction, TransferQueue, TransferState

GO = 0
MOVES = "moves"  # the lane of spills and promotions


class Parked:
    """A worker that is about to move bytes. ``verdict`` lets it: 0, or the error number to fail with."""

    def __init__(self, tier, extent, memory, transfer):
        self.tier = tier
        self.extent = extent
        self.memory = memory
        self.transfer = transfer
        self.verdict = None

    def order(self):
        """The same in every run of the same steps, as the moment of arrival is not."""
        return self.transfer.serial, self.transfer.direction.value, self.tier.name, self.extent.offset

    def __repr__(self):
        return f"<{self.transfer.direction.value} of record {self.transfer.serial} at {self.tier.name}>"


class Ended(NamedTuple):
    """A transfer whose work has ended, failed or was given up."""

    direction: Direction
    lane: object
    nbytes: int
    serial: int
    error: BaseException | None
    is_copied: bool

    @property
    def is_move(self):
        return self.lane == MOVES


class SteppedQueue(TransferQueue):
    """Stands still unless told: see :meth:`release` and :attr:`when_waiting`.

    Attributes:
        parked: Workers at a gate, the oldest record first.
        ended: What has ended since somebody cleared it.
        when_waiting: Called, with nothing, each time that the thread of the test would wait.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.parked = []
        self.ended = []
        self.when_waiting = self.release_oldest
        self._busy = {}

    # in workers

    def _next(self, lane):
        with self._lock:
            self._busy.pop(threading.current_thread(), None)
            self._changed.notify_all()
            transfer = super()._next(lane)
            if transfer is not None:
                self._busy[threading.current_thread()] = transfer
            return transfer

    def _finish(self, transfer):
        is_copied = transfer.event is not None
        self.ended.append(
            Ended(transfer.direction, transfer.lane, transfer.nbytes, transfer.serial, transfer.error, is_copied)
        )
        super()._finish(transfer)

    def park(self, tier, extent, memory):
        """Wait for a verdict, or for the end of the queue; return the verdict."""
        with self._lock:
            parked = Parked(tier, extent, memory, self._busy[threading.current_thread()])
            self.parked.append(parked)
            self.parked.sort(key=Parked.order)  # threads race to their gates
            self._changed.notify_all()
            came = self._changed.wait_for(lambda: not self._stands(parked), TIMEOUT_SECONDS)
            self.parked.remove(parked)
        if not came:
            raise TimeoutError("nobody let the worker go on")
        return parked.verdict or GO

    def _stands(self, parked):
        return parked.verdict is None and (not self._is_closed or parked.transfer.is_given_up)

    # in the thread of the test

    def quiesce(self):
        """Return when every worker stands at a gate or has nothing to do."""
        with self._lock:
            assert self._changed.wait_for(self._is_still, TIMEOUT_SECONDS), "the workers did not come to rest"

    def _is_still(self):
        if len(self._busy) != sum(map(self._stands, self.parked)):
            return False
        for lane in self._lanes.values():
            is_someone_free = any(thread not in self._busy for thread in lane.threads)
            if is_someone_free and any(transfer.state is TransferState.QUEUED for transfer in lane.queue):
                return False
        return True

    def waiting(self, *, is_given_up=False):
        """Workers at a gate whose transfer was given up, or was not."""
        return [parked for parked in self.parked if parked.transfer.is_given_up == is_given_up]

    def release(self, parked, verdict=GO):
        """Let one worker go on; return when all stand still again."""
        with self._lock:
            parked.verdict = verdict
            self._changed.notify_all()
        self.quiesce()

    def release_oldest(self):
        waiting = self.waiting()
        assert waiting, "training would wait for ever"
        self.release(waiting[0])

    def _wait_until(self, is_true):
        while True:
            self.give_up_overdue()
            self.quiesce()
            if is_true():
                break
            self.when_waiting()
        super()._wait_until(is_true)

    def end(self):
        """Close, let everybody go on, and wait for their threads, those that were left behind too."""
        with self._lock:
            threads = [thread for lane in self._lanes.values() for thread in lane.threads]
        self.close()
        with self._lock:
            for parked in self.parked:
                parked.verdict = GO if parked.verdict is None else parked.verdict
            self._changed.notify_all()
        for thread in threads:
            thread.join(TIMEOUT_SECONDS)


class SteppedTier(MemoryTier):
    """Parks whoever moves bytes. Writes down what was asked of it, and what must never be.

    Attributes:
        refusals: Error numbers for the next calls of ``allocate``; 0 lets one pass.
        asked: (bytes, error or None) of each call of ``allocate`` by the thread of the test.
        defects: What its owner should not have done.
    """

    def __init__(self, queue, **options):
        super().__init__(**options)
        self.refusals = []
        self.asked = []
        self.defects = []
        self._queue = queue
        self._owner = threading.current_thread()

    def allocate(self, nbytes):
        if threading.current_thread() is not self._owner:
            return self._allocate(nbytes)
        try:
            extent = self._allocate(nbytes)
        except CapacityError as error:
            self.asked.append((nbytes, error.errno or 0))
            raise
        self.asked.append((nbytes, None))
        return extent

    def _allocate(self, nbytes):
        if self._is_closed:
            raise CapacityError("cannot store activation: the tier is closed", nbytes=nbytes)
        number = self.refusals.pop(0) if self.refusals else GO
        if number:
            raise CapacityError("cannot store activation: injected", errno=number, nbytes=nbytes)
        extent = super().allocate(nbytes)
        if self.name == "host":
            with self._lock:
                self._live[extent.offset] = (extent, torch.zeros(nbytes, dtype=torch.uint8))
        return extent

    def write(self, extent, source, ready):
        number = self._queue.park(self, extent, source)
        if number:
            raise StoreError("cannot store activation: injected", errno=number, nbytes=extent.nbytes)
        self._check("write", extent, lambda: MemoryTier.write(self, extent, source, ready))

    def read(self, extent, target, ready):
        number = self._queue.park(self, extent, target)
        if number:
            raise LoadError("cannot load activation: injected", errno=number, nbytes=extent.nbytes)
        return self._check("read", extent, lambda: MemoryTier.read(self, extent, target, ready))

    def free(self, extent):
        self._check("free", extent, lambda: MemoryTier.free(self, extent))

    def _check(self, what, extent, action):
        if self._is_closed and what != "free":
            raise StoreError("cannot go on: the tier is closed", errno=errno.EBADF)
        try:
            return action()
        except (KeyError, AssertionError) as error:
            self.defects.append(f"{what} of {extent}: {error!r}")
            raise

    def contents(self):
        """Each live extent with its bytes."""
        with self._lock:
            return {extent: data for extent, data in self._live.values()}

    def memory_of(self, extent):
        return self.contents().get(extent) if self.name == "host" else None
