"""What happened when: the events of some steps of one rank, for ``ssdtrain report``. Observes; decides nothing.

Note [Clocks]. Times are seconds of ``time.perf_counter``, which never goes back and begins
anywhere. The first event of a process says which time of day one of them was, so that
ranks can be laid over each other as well as their machines' clocks agree.

Note [Which layer saved it]. There are no hooks for this. While a step is recorded, the stack
of Python frames is walked from the save upwards to the first call of a module; its name is
that of the layer. What is saved outside of all named modules has no name.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from torch import nn

from ssdtrain_plugin.events import (
    Event,
    InstructionEvent,
    MemoryEvent,
    PassEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    WaitEvent,
    to_json,
)
from ssdtrain_plugin.stats import WARM_UP_STEPS, StatsWriter, open_lines

__all__ = ["Trace", "open_records"]

logger = logging.getLogger(__name__)

_MODULE_CALL = nn.Module._call_impl.__code__


class Trace:
    """Collects events in memory and writes them to ``<directory>/rank<N>.trace.jsonl`` when a step ends.

    Args:
        directory: Created if it is missing.
        rank: Global rank of the process.
        first_step: Number of the first step to record.
        num_steps: How many to record.
        device: Where the activations are.
        clock: Host seconds.
        wall: Seconds since 1970.

    Raises:
        StorageError: The file cannot be opened.

    Attributes:
        is_on: The present step is recorded. Whoever observes asks this first.
        step: Number of the present step.
        clock: As given.

    Threads:
        Any may add events.
    """

    def __init__(
        self,
        directory: str,
        rank: int,
        *,
        first_step: int,
        num_steps: int,
        device: str,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Open the file for appending and write when it was."""
        self.clock = clock
        self.step = 0
        self.is_on = first_step == 0
        self._first_step = first_step
        self._end_step = first_step + num_steps
        self._events: deque[Event] = deque()
        # By id: a module may define what equality is.
        self._names: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._modules: dict[int, str | None] = {}
        self._sizes: dict[int, int] = {}
        self._slot: str | None = None
        self._unpacks: tuple[int, float, float] | None = None
        self._memory = (0, 0, 0, 0)
        self._begin = clock()
        self._path = Path(directory) / f"rank{rank}.trace.jsonl"
        self._file: IO[str] | None = open_lines(self._path)
        # The middle of two readings, so that a pause between them costs half.
        before, wall_seconds = clock(), wall()
        self.add(StartEvent(rank, (before + clock()) / 2, wall_seconds, device))
        self._flush()

    def add(self, event: Event) -> None:
        """Take an event.

        Args:
            event: Written when the step ends.
        """
        self._events.append(event)

    # What the host says

    def name_modules(self, model: nn.Module, prefix: str = "") -> None:
        """Learn the names of layers: Note [Which layer saved it].

        Args:
            model: Its modules are held weakly.
            prefix: In front of each name.
        """
        for name, module in model.named_modules(prefix=prefix):
            known = self._names.get(id(module))
            if known is None or known[0]() is not module:
                self._names[id(module)] = weakref.ref(module), name

    def name_pass(self, slot: Hashable) -> None:
        """Note how the host's schedule names the micro-batch of the pass that begins.

        Args:
            slot: One value or a tuple; None in it is left out.
        """
        parts = slot if isinstance(slot, tuple) else (slot,)
        self._slot = "/".join(str(part) for part in parts if part is not None) or None

    def instruction(self, name: str, begin: float) -> None:
        """Note that something has ended that the host's schedule told it to do.

        Args:
            name: As the host calls it.
            begin: Host seconds.
        """
        if self.is_on:
            self.add(InstructionEvent(self.step, name, begin, self.clock()))

    # What the cache says

    def passed(self, kind: Literal["forward", "backward"], microbatch: int, seconds: float) -> None:
        """Note that a pass has just ended.

        Args:
            kind: Which.
            microbatch: Its number.
            seconds: How long it took.
        """
        if kind == "backward":
            self._unpacks = None
        else:
            self.fold_unpacks()
        slot, self._slot = self._slot, None
        if self.is_on:
            end = self.clock()
            self.add(PassEvent(self.step, kind, microbatch, slot, end - seconds, end, is_exact=True))

    def unpacked(self, microbatch: int, begin: float) -> None:
        """Note an unpack that has just ended; the first and the last one bound a backward that nobody announces.

        Args:
            microbatch: Whose backward asked.
            begin: Host seconds.
        """
        if self._unpacks is not None and self._unpacks[0] != microbatch:
            self.fold_unpacks()
        first = begin if self._unpacks is None else self._unpacks[1]
        self._unpacks = microbatch, first, self.clock()

    def fold_unpacks(self) -> None:
        """Note the backward that the unpacks since the last pass have shown."""
        if self._unpacks is not None and self.is_on:
            microbatch, begin, end = self._unpacks
            self.add(PassEvent(self.step, "backward", microbatch, None, begin, end, is_exact=False))
        self._unpacks = None

    def saved(self, serial: int, nbytes: int, microbatch: int) -> None:
        """Note a save, if it is the first of its record.

        Args:
            serial: Of the record.
            nbytes: Its size.
            microbatch: Whose forward saved it.
        """
        if serial in self._sizes:
            return
        self._sizes[serial] = nbytes
        module = self._modules[serial] = self._running_module()
        self.add(SaveEvent(self.step, self.clock(), serial, microbatch, module, nbytes))

    def size_of(self, serial: int) -> int:
        """Get the size of a record whose save was noted; else 0.

        Args:
            serial: Of the record.
        """
        return self._sizes.get(serial, 0)

    def waited(self, serial: int | None, seconds: float) -> None:
        """Note a wait that has just ended.

        Args:
            serial: Of the record that was waited for; None if it was for room.
            seconds: How long.
        """
        if not seconds:
            return
        end = self.clock()
        module = self._running_module() if serial is None else self._modules.get(serial)
        reason: Literal["load", "room"] = "room" if serial is None else "load"
        self.add(WaitEvent(self.step, reason, serial, module, end - seconds, end))

    def memory(
        self,
        *,
        device_bytes: int | None = None,
        would_be_bytes: int | None = None,
        host_bytes: int | None = None,
        drive_bytes: int | None = None,
    ) -> None:
        """Note how many bytes are live, where that is known.

        Args:
            device_bytes: Saved bytes in device memory.
            would_be_bytes: What would be there without the plugin.
            host_bytes: Reserved in the host tier.
            drive_bytes: Reserved on the drives.
        """
        given = (device_bytes, would_be_bytes, host_bytes, drive_bytes)
        old = self._memory
        device, would_be, host, drive = (
            now if now is not None else before for now, before in zip(given, old, strict=True)
        )
        new = self._memory = device, would_be, host, drive
        if self.is_on and new != old:
            self.add(MemoryEvent(self.step, self.clock(), *new))

    def _running_module(self) -> str | None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _MODULE_CALL:
                module = frame.f_locals["self"]
                known = self._names.get(id(module))
                if known is not None and known[0]() is module:
                    return known[1]
            frame = frame.f_back
        return None

    # The file

    def end_step(self, step: int, plan: str) -> None:
        """Write what was recorded, and begin the next step.

        Args:
            step: Number of the step that has ended.
            plan: The policy's decision in one line.
        """
        self.fold_unpacks()
        now = self.clock()
        if self.is_on:
            self.add(StepEvent(step, self._begin, now, plan))
        self._begin, self.step = now, step + 1
        was_on, self.is_on = self.is_on, self._first_step <= self.step < self._end_step
        if self.is_on:
            self.add(MemoryEvent(self.step, now, *self._memory))
        self._flush()
        if was_on and not self.is_on:
            self.close()

    def _flush(self) -> None:
        """Write all events, also those that other threads add meanwhile; a full drive ends the recording."""
        if self._file is None:
            return
        lines = []
        while self._events:
            lines.append(to_json(self._events.popleft()) + "\n")
        try:
            self._file.write("".join(lines))
            self._file.flush()
        except OSError as error:
            logger.warning("ssdtrain: events are no longer recorded: cannot write `%s` (%s)", self._path, error)
            self._give_up()

    def close(self) -> None:
        """Write what is left and close the file. Calling it twice does nothing."""
        self._flush()
        self._give_up()

    def _give_up(self) -> None:
        self.is_on, self._end_step = False, 0
        file, self._file = self._file, None
        self._events.clear()
        self._names.clear()
        self._modules.clear()
        self._sizes.clear()
        if file is not None:
            try:
                file.close()
            except OSError:  # said already, when it was written
                return


@contextlib.contextmanager
def open_records(
    directory: str | None, rank: int, *, num_steps: int, device: str
) -> Iterator[tuple[StatsWriter | None, Trace | None]]:
    """Open what a rank writes down, and close it again if what comes inside fails.

    Args:
        directory: Of all ranks; None: nothing is written.
        rank: Global rank of the process.
        num_steps: How many to record events of; 0: none.
        device: Where the activations are.

    Raises:
        StorageError: A file cannot be opened.
    """
    with contextlib.ExitStack() as on_failure:
        writer = trace = None
        if directory is not None:
            writer = StatsWriter(directory, rank)
            on_failure.callback(writer.close)
            if num_steps:
                trace = Trace(directory, rank, first_step=WARM_UP_STEPS, num_steps=num_steps, device=device)
                on_failure.callback(trace.close)
        yield writer, trace
        on_failure.pop_all()
