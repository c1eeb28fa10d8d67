"""In which order backward wants things back: the log of a micro-batch, read backwards.

Works on serial numbers and bytes. It knows no tensor, moves nothing, and needs
no module hook: what forward saved last, backward needs first.
"""

from __future__ import annotations

__all__ = ["MicrobatchLog", "ReloadSchedule"]


class MicrobatchLog:
    """The offloaded saves of one micro-batch, in forward order.

    A record saved twice stands in the log twice: backward needs it first at its
    last save.

    Attributes:
        total_bytes: Bytes of its records, each counted once.
    """

    __slots__ = ("_cursor", "_issued", "_last_position", "_nbytes", "_serials", "total_bytes")

    def __init__(self) -> None:
        """Start empty."""
        self._serials: list[int] = []
        self._nbytes: dict[int, int] = {}
        self._last_position: dict[int, int] = {}
        self._issued: set[int] = set()
        self._cursor: int | None = None
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
        self._cursor = None

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
            self._cursor = position
        self._issued.add(serial)

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

    def demand(self, microbatch: int, serial: int) -> None:
        """Note an ask for a record that is not in memory; see :meth:`MicrobatchLog.demand`.

        Args:
            microbatch: Whose backward is running.
            serial: Of the record.
        """
        log = self._logs.get(microbatch)
        if log is not None:
            log.demand(serial)

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
