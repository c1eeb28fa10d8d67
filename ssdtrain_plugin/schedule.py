"""In which order backward wants things back: the log of a micro-batch, read backwards.

Works on serial numbers and bytes. It knows no tensor, moves nothing, and needs
no module hook: what forward saved last, backward needs first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

__all__ = ["MicrobatchLog", "ReloadSchedule"]


class MicrobatchLog:
    """The offloaded saves of one micro-batch, in forward order.

    A record saved twice stands in the log twice: backward needs it first at its
    last save.

    Attributes:
        total_bytes: Bytes of its records, each counted once.
    """

    __slots__ = (
        "_beyond",
        "_cursor",
        "_first",
        "_issued",
        "_last_position",
        "_nbytes",
        "_serials",
        "total_bytes",
    )

    def __init__(self) -> None:
        """Start empty."""
        self._serials: list[int] = []
        self._nbytes: dict[int, int] = {}
        self._last_position: dict[int, int] = {}
        self._issued: set[int] = set()
        self._cursor: int | None = None
        self._beyond: int | None = None
        self._first = 0
        self.total_bytes = 0

    def append(self, serial: int, nbytes: int) -> None:
        """Add a save at the end; reading starts from the new end.

        Args:
            serial: Of the record.
            nbytes: Bytes that its load needs.
        """
        if serial not in self._nbytes:
            self.total_bytes += nbytes
        self._nbytes[serial] = nbytes
        self._last_position[serial] = len(self._serials)
        self._serials.append(serial)
        self._cursor = self._beyond = None

    def upcoming(self, budget_bytes: int, *, at_least_one: bool) -> list[int]:
        """Take the next records that backward will ask for, within a byte budget.

        Args:
            budget_bytes: Bytes that may be spent now.
            at_least_one: Allow one record over the budget, so that one larger
                than the whole budget cannot wedge the prefetch.

        Returns:
            Serials, soonest needed first; each is given once a pass.
        """
        taken: list[int] = []
        cursor = len(self._serials) - 1 if self._cursor is None else self._cursor
        while cursor >= 0:
            serial = self._serials[cursor]
            nbytes = self._nbytes.get(serial)
            if nbytes is not None and serial not in self._issued:
                if nbytes > budget_bytes and not (at_least_one and not taken):
                    break
                budget_bytes -= nbytes
                self._issued.add(serial)
                taken.append(serial)
            cursor -= 1
        self._cursor = cursor
        return taken

    def is_read(self) -> bool:
        """Tell whether :meth:`upcoming` has come to the beginning of the log."""
        return self._cursor is not None and self._cursor < 0

    def demand(self, serial: int) -> None:
        """Note that backward asked for a record that is not in memory.

        If the cursor has passed it, this is another backward over a retained
        graph: reading starts again from there.

        Args:
            serial: Of the record.
        """
        position = self._last_position.get(serial)
        if position is None:
            return
        if serial in self._issued:
            self._issued.clear()
            self._cursor, self._beyond = position, None
        self._issued.add(serial)

    def furthest(self, is_out: Callable[[int], bool]) -> Iterator[int]:
        """Go through the records from the one that backward needs last.

        Args:
            is_out: Tells that a record is out of the question for good. A run of such
                records at the beginning is passed over once, and never looked at again.
        """
        is_run = True
        for position in range(self._first, len(self._serials)):
            serial = self._serials[position]
            if self._last_position.get(serial) == position and not is_out(serial):
                is_run = False
                yield serial
            elif is_run:
                self._first = position + 1

    def beyond(self, is_out: Callable[[int], bool]) -> Iterator[int]:
        """Go through the records that :meth:`upcoming` has not come to, soonest needed first.

        The very next one is left to it: it takes that one as soon as there is room.

        Args:
            is_out: As for :meth:`furthest`, for this pass.
        """
        start = len(self._serials) - 1 if self._cursor is None else self._cursor
        while start >= 0 and (self._serials[start] not in self._nbytes or self._serials[start] in self._issued):
            start -= 1
        start = start - 1 if self._beyond is None else min(start - 1, self._beyond)
        is_run = True
        for position in range(start, -1, -1):
            serial = self._serials[position]
            is_current = self._last_position.get(serial) == position and serial not in self._issued
            if is_current and not is_out(serial):
                is_run = False
                yield serial
            elif is_run:
                self._beyond = position - 1

    def remove(self, serial: int) -> bool:
        """Forget a record.

        Args:
            serial: Of the record.

        Returns:
            True if nothing is left in the log.
        """
        self._nbytes.pop(serial, None)
        self._last_position.pop(serial, None)
        self._issued.discard(serial)
        return not self._nbytes


class ReloadSchedule:
    """The logs of all micro-batches in flight.

    Threads:
        Not safe; its owner locks.
    """

    def __init__(self) -> None:
        """Start without a log."""
        self._logs: dict[int, MicrobatchLog] = {}
        self._microbatches_of: dict[int, list[int]] = {}

    def record(self, microbatch: int, serial: int, nbytes: int) -> None:
        """Log a save.

        Args:
            microbatch: Whose forward is running.
            serial: Of the record; may stand in several logs.
            nbytes: Bytes that its load needs.
        """
        log = self._logs.get(microbatch)
        if log is None:
            log = self._logs[microbatch] = MicrobatchLog()
        log.append(serial, nbytes)
        microbatches = self._microbatches_of.setdefault(serial, [])
        if microbatch not in microbatches:
            microbatches.append(microbatch)

    def upcoming(self, microbatch: int, budget_bytes: int, *, at_least_one: bool) -> list[int]:
        """Take what backward of a micro-batch wants next; see :meth:`MicrobatchLog.upcoming`.

        Args:
            microbatch: Whose backward is next or running.
            budget_bytes: Bytes that may be spent now.
            at_least_one: Allow one record over the budget.
        """
        log = self._logs.get(microbatch)
        return [] if log is None else log.upcoming(budget_bytes, at_least_one=at_least_one)

    def is_read(self, microbatch: int) -> bool:
        """Tell whether everything that a micro-batch wants was given; see :meth:`MicrobatchLog.is_read`.

        Args:
            microbatch: Whose backward is next or running.
        """
        log = self._logs.get(microbatch)
        return log is None or log.is_read()

    def demand(self, microbatch: int, serial: int) -> None:
        """Note an ask for a record that is not in memory; see :meth:`MicrobatchLog.demand`.

        Args:
            microbatch: Whose backward is running.
            serial: Of the record.
        """
        log = self._logs.get(microbatch)
        if log is not None:
            log.demand(serial)

    def furthest(self, newcomer: int, microbatch: int, *, running: int, is_out: Callable[[int], bool]) -> Iterator[int]:
        """Go through the records that are needed later than a new one, the last needed first.

        Micro-batches run backward in the order of their forwards, and within one the
        last save comes first. A record of several micro-batches belongs to the earliest.

        Args:
            newcomer: Serial of the record that was saved last.
            microbatch: Whose forward saved it.
            running: The micro-batch whose backward is running or next; its records are left out.
            is_out: See :meth:`MicrobatchLog.furthest`.
        """
        for number in sorted(self._logs, reverse=True):
            if number < microbatch:
                return
            for serial in self._logs[number].furthest(partial(self._is_out, is_out, number)):
                if serial == newcomer:
                    return
                if not self.has(running, serial):
                    yield serial

    def _is_out(self, is_out: Callable[[int], bool], microbatch: int, serial: int) -> bool:
        return min(self._microbatches_of[serial]) < microbatch or is_out(serial)

    def beyond(self, microbatch: int, is_out: Callable[[int], bool]) -> Iterator[int]:
        """Go through what :meth:`upcoming` has not come to; see :meth:`MicrobatchLog.beyond`.

        Args:
            microbatch: Whose backward is next or running.
            is_out: See :meth:`MicrobatchLog.beyond`.
        """
        log = self._logs.get(microbatch)
        return iter(()) if log is None else log.beyond(is_out)

    def has(self, microbatch: int, serial: int) -> bool:
        """Tell whether a record stands in the log of a micro-batch.

        Args:
            microbatch: Any number.
            serial: Of the record.
        """
        return microbatch in self._microbatches_of.get(serial, ())

    def forget(self, serial: int) -> None:
        """Drop a record that was freed, and logs that became empty.

        Args:
            serial: Of the record.
        """
        for microbatch in self._microbatches_of.pop(serial, ()):
            if self._logs[microbatch].remove(serial):
                del self._logs[microbatch]

    def __len__(self) -> int:
        """Count the logs."""
        return len(self._logs)
