"""Between host memory and the drive: what is needed last goes out, what is needed next comes in.

Part of :class:`ssdtrain_plugin.cache.TensorCache`, which calls it under its lock.

Note [Who moves between tiers]. A tier knows bytes and not when they are wanted; the
logs of the micro-batches do. Forward saves first what backward needs last, so a host
tier that takes what comes first is full of the wrong bytes when forward turns. From
the moment at which the host tier had no room for a storage, what that micro-batch
saved first is spilled to the drive, so that what it saves last finds room. In
backward, when the drive has no load to serve, what is needed next is promoted from it
into the room that the host tier has by then.

Note [A move is never waited for]. Until the copy has ended and its record is still
stored, the old place is the place: a load reads there and the move comes to nothing.
The old extent is freed by the last transfer that uses it. A move that fails or comes
too late costs the copy and no more.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import partial

from ssdtrain_plugin.errors import CapacityError, QueueClosedError
from ssdtrain_plugin.ledger import Ledger
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.records import Record, State
from ssdtrain_plugin.schedule import ReloadSchedule
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import DeviceEvent
from ssdtrain_plugin.table import RecordTable
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue

__all__ = ["Migrator"]

# Threads of their own: neither a store nor a load ever stands behind a move.
_LANE = "moves"

# Room is kept free for the next storage only if that takes at most one in so many parts
# of the host tier: the tier is there to hold what backward needs first.
_PARTS = 4


@dataclass(slots=True, eq=False)
class _Move:
    """One copy between two tiers.

    Attributes:
        record: Whose bytes.
        direction: ``STORE`` is a spill, ``LOAD`` is a promotion.
        extent: The new place, once there is one.
        is_copied: It has all the bytes.
    """

    record: Record
    direction: Direction
    extent: Extent | None = None
    is_copied: bool = False


class Migrator:
    """Moves stored bytes between the host tier and the drive, in the background.

    Args:
        lock: Of the cache; taken in workers, held by all other callers.
        queue: Runs the copies.
        table: Of the cache.
        ledger: Of the cache.
        schedule: Of the cache: who is needed when.
        placer: Of the cache: which tier works, and what failed.
        promote_bytes: Bound on promotions queued or running. One record larger than
            the bound is promoted when no other is.
    """

    def __init__(
        self,
        *,
        lock: contextlib.AbstractContextManager[object],
        queue: TransferQueue,
        table: RecordTable,
        ledger: Ledger,
        schedule: ReloadSchedule,
        placer: Placer,
        promote_bytes: int,
    ) -> None:
        """Start with nothing to move."""
        self._lock = lock
        self._queue = queue
        self._table = table
        self._ledger = ledger
        self._schedule = schedule
        self._placer = placer
        self._host = placer.tiers[Placement.HOST]
        self._drive = placer.tiers[Placement.SSD]
        self._promote_bytes = promote_bytes
        self._moving_bytes: Counter[Direction] = Counter()
        self._num_drive_loads = 0
        self._running = -1
        self._unreadable = -1
        self._microbatch = -1
        self._room_bytes = 0

    # Spill

    def make_room(self, newcomer: Record, chosen: Tier | None, microbatch: int) -> None:
        """Spill what is needed last, if a micro-batch has more than the host tier can hold.

        Args:
            newcomer: Its store was queued just now.
            chosen: The tier that the policy wanted for it.
            microbatch: Whose forward saved it, the newest.
        """
        if microbatch != self._microbatch:
            self._microbatch, self._room_bytes = microbatch, 0
        is_displaced = newcomer.tier is not chosen
        if chosen is not self._host or not (is_displaced or self._room_bytes):
            return
        nbytes, free_bytes = newcomer.span.nbytes, self._host.free_bytes
        size_bytes = free_bytes + self._host.used_bytes
        if nbytes > size_bytes:
            return  # there is no making room for that
        if nbytes * _PARTS <= size_bytes:
            self._room_bytes = max(self._room_bytes, nbytes)  # layers repeat
        wanted_bytes = max(self._room_bytes, nbytes) if is_displaced else self._room_bytes
        if is_displaced and nbytes <= free_bytes:
            free_bytes = 0  # it is free in pieces that are too small
        missing_bytes = wanted_bytes - free_bytes - self._moving_bytes[Direction.STORE]
        if missing_bytes > 0 and self._placer.usable(Placement.SSD, self._ledger.step) is not None:
            self._spill(newcomer, missing_bytes)

    def _spill(self, newcomer: Record, missing_bytes: int) -> None:
        """Move what is needed later than ``newcomer`` to the drive, until that makes enough room."""
        candidates = self._schedule.furthest(
            newcomer.serial, self._microbatch, running=self._running, is_out=self._is_not_on_host
        )
        for serial in candidates:
            record = self._table[serial]
            if not _can_move(record):
                continue
            if missing_bytes <= 0 or not self._start(record, Direction.STORE):
                return
            missing_bytes -= record.span.nbytes

    def _is_not_on_host(self, serial: int) -> bool:
        return self._table[serial].tier is not self._host

    # Promotion

    def begin_backward(self, microbatch: int) -> None:
        """Note whose records are needed next.

        Args:
            microbatch: Whose backward is next or running.
        """
        self._running = microbatch
        self.promote()

    def load_begins(self, tier: Tier) -> None:
        """Leave the drive to a load that was queued.

        Args:
            tier: That has the bytes.
        """
        self._num_drive_loads += tier is self._drive

    def load_ended(self, tier: Tier) -> None:
        """Go on with promotions when the last load of the drive has ended.

        Args:
            tier: As given to :meth:`load_begins`.
        """
        if tier is self._drive:
            self._num_drive_loads -= 1
            self.promote()

    def promote(self) -> None:
        """Copy what backward needs soon into free host memory, while the drive has nothing else to do.

        When loads are waiting for the drive, it is what holds backward up, and reading
        for later would only make that worse.
        """
        if self._num_drive_loads or self._unreadable == self._running:
            return
        for serial in self._schedule.beyond(self._running, self._is_not_on_drive):
            record = self._table[serial]
            # What something else still holds in memory needs no load at all.
            if not _can_move(record) or not record.is_original_gone():
                continue
            moving_bytes, nbytes = self._moving_bytes[Direction.LOAD], record.span.nbytes
            is_over_bound = moving_bytes > 0 and moving_bytes + nbytes > self._promote_bytes
            if is_over_bound or moving_bytes + nbytes > self._host.free_bytes:
                return
            if not self._start(record, Direction.LOAD):
                return

    def _is_not_on_drive(self, serial: int) -> bool:
        return self._table[serial].tier is not self._drive

    # Moves

    def _start(self, record: Record, direction: Direction) -> bool:
        """Queue a move; False if the queue is closed."""
        move = _Move(record, direction)
        # Its size is 0 for the budget of stores in flight: it holds no device memory.
        run, end = partial(self._run, move), partial(self._end, move)
        transfer = Transfer(direction, 0, run, end, _LANE, serial=record.serial)
        try:
            self._queue.submit(transfer)  # its beginning waits for the lock
        except QueueClosedError:
            return False
        record.is_moving = True
        self._moving_bytes[direction] += record.span.nbytes
        return True

    def _run(self, move: _Move) -> DeviceEvent | None:
        """Find a place and copy the bytes, in a worker: either may take long. None if nothing was copied."""
        with self._lock:
            if not self._is_worth_starting(move):
                return None
            tier, extent = move.record.place()
        if move.direction is Direction.STORE:
            move.extent = self._drive.allocate(extent.nbytes)
            memory = tier.memory_of(extent)
            if memory is not None:
                self._drive.write(move.extent, memory, DeviceEvent())
        else:
            move.extent = self._host.allocate(extent.nbytes)
            memory = self._host.memory_of(move.extent)
            if memory is not None:
                tier.read(extent, memory, DeviceEvent()).synchronize()
        move.is_copied = memory is not None
        return DeviceEvent() if move.is_copied else None

    def _is_wanted(self, move: _Move) -> bool:
        """Tell whether the record is still stored, and not about to be needed where it was."""
        record = move.record
        if record.state is not State.STORED or record.lives() is None:
            return False
        return move.direction is Direction.LOAD or not self._schedule.has(self._running, record.serial)

    def _is_worth_starting(self, move: _Move) -> bool:
        if not self._is_wanted(move):
            return False
        is_spill = move.direction is Direction.STORE
        # A load has come since a promotion was queued: when it ends, promotions go on.
        return is_spill or (not self._num_drive_loads and self._schedule.has(self._running, move.record.serial))

    def _end(self, move: _Move, transfer: Transfer) -> None:
        """Take note in a worker that a move has ended: the record changes its place, or the copy is dropped."""
        is_spill = move.direction is Direction.STORE
        with self._lock:
            record = move.record
            record.is_moving = False
            self._moving_bytes[move.direction] -= record.span.nbytes
            if transfer.is_given_up:
                self._leave(move, transfer)
            elif is_spill:
                self._note_spill(move, transfer)
            elif transfer.error is not None:
                self._note_failed_promotion(transfer.error)
            if transfer.is_given_up:
                pass  # see `_leave`
            elif move.is_copied and self._is_wanted(move):
                record.free_extent()
                record.tier, record.extent = self._target(move), move.extent
            else:
                self._free_copy(move)
            if record.state is State.FREED:
                record.end_transfer()
            if move.is_copied and not is_spill and not transfer.is_given_up:
                self.promote()
        self._placer.failures.say()

    def _target(self, move: _Move) -> Tier:
        return self._drive if move.direction is Direction.STORE else self._host

    def _free_copy(self, move: _Move) -> None:
        if move.extent is not None:
            self._target(move).free(move.extent)

    def _leave(self, move: _Move, transfer: Transfer) -> None:
        """Leave both places to a move that was given up, until it returns."""
        move.record.leave_to(transfer)
        if move.direction is Direction.STORE:
            self._placer.hangs(self._drive, move.extent, transfer)
            self._count_failed_spill(transfer)
        else:
            if move.record.extent is not None:
                self._drive.hangs(move.record.extent)
            if transfer.error is not None:
                self._note_failed_promotion(transfer.error)
        transfer.when_returned(partial(self._free_copy, move))

    def _count_failed_spill(self, transfer: Transfer) -> None:
        if transfer.error is not None:
            counts = self._ledger.counter.failures
            self._placer.failures.failed(self._drive.name, transfer.error, self._ledger.step, counts)

    def _note_spill(self, move: _Move, transfer: Transfer) -> None:
        failures, counts = self._placer.failures, self._ledger.counter.failures
        error, name = transfer.error, self._drive.name
        if move.is_copied:
            self._ledger.count_spill(transfer, move.record.span.nbytes)
            for survived in self._drive.take_survived():
                failures.survived(name, survived, counts)
        # A budget that is used up is no failure: the bytes have a place.
        elif error is not None and (not isinstance(error, CapacityError) or error.errno is not None):
            self._count_failed_spill(transfer)

    def _note_failed_promotion(self, error: BaseException) -> None:
        """Count it and stop for this backward; whether bytes are lost is for their load to find out."""
        if not isinstance(error, CapacityError) or error.errno is not None:
            self._unreadable = self._running
            self._placer.failures.unread(self._drive.name, "promotion", error, self._ledger.counter.failures)


def _can_move(record: Record) -> bool:
    return record.state is State.STORED and not record.is_moving and record.lives() is not None
