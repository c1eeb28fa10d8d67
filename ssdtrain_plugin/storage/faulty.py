"""Faults on purpose: an engine whose calls go wrong as a plan says, for tests and for whoever wants to see it.

Nothing in training uses it unless an experiment puts it in::

    plan = FaultPlan([Fault(FaultKind.EIO, "write", probability=0.01)], seed=7)
    attach_with(model, config, Parts(wrap_engine=plan.wrap))

Note [The same faults again]. What happens to a call follows from the seed, the fault's
place in the plan and the number of the call, and from nothing else. Threads decide
which transfer gets which number; the n-th call fares the same in every run.
"""

from __future__ import annotations

import enum
import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ssdtrain_plugin.storage.base import Engine
from ssdtrain_plugin.storage.extents import round_down
from ssdtrain_plugin.storage.throttled import Clock, RealClock

__all__ = ["Fault", "FaultKind", "FaultPlan", "FaultyEngine", "Injected"]

_ALIGNMENT = 4096
_BITS = 8

Operation = Literal["write", "read"]


class FaultKind(enum.Enum):
    """What goes wrong in a call of an engine."""

    SHORT = "short"
    """Half of the bytes move, and their number is reported."""
    EIO = "EIO"
    ENOSPC = "ENOSPC"
    EINTR = "EINTR"
    EAGAIN = "EAGAIN"
    EACCES = "EACCES"
    HANG = "hang"
    """The call begins when the plan's ``hang`` returns, which may be never."""
    DELAY = "delay"
    """The call begins some seconds later, by the plan's clock."""
    FLIPPED_BIT = "flipped bit"
    """One bit is wrong, and success is reported."""
    TORN_BLOCK = "torn block"
    """One block is old, or zero, and success is reported."""
    STALE = "stale"
    """Nothing moves, and success is reported."""

    @property
    def is_silent(self) -> bool:
        """The call reports success for wrong bytes."""
        return self in (FaultKind.FLIPPED_BIT, FaultKind.TORN_BLOCK, FaultKind.STALE)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a plan: what goes wrong, and in which calls.

    Attributes:
        kind: What.
        operation: In which direction.
        first: Number of the first call concerned, from 0; writes and reads are counted apart.
        count: How many calls from there on are concerned; None: all.
        probability: Of the fault in each of them, 0 to 1.
        seconds: Of a delay.
        block_bytes: Of a torn block, 512 or 4096.
        is_zero: A torn block reads as zeros; else as what was there before.
    """

    kind: FaultKind
    operation: Operation
    first: int = 0
    count: int | None = None
    probability: float = 1.0
    seconds: float = 0.0
    block_bytes: int = _ALIGNMENT
    is_zero: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never happen.

        Raises:
            ValueError: A value is outside of its range.
        """
        if self.operation not in ("write", "read"):
            raise ValueError(f"operation: {self.operation!r} (expected `write` or `read`)")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability: {self.probability} (expected 0 to 1)")
        if self.first < 0 or (self.count is not None and self.count < 1) or self.seconds < 0:
            given = f"first: {self.first}, count: {self.count}, seconds: {self.seconds}"
            raise ValueError(f"{given} (expected 0 or more, count 1 or more)")
        if self.block_bytes not in (512, 4096):
            raise ValueError(f"block_bytes: {self.block_bytes} (expected 512 or 4096)")

    def concerns(self, operation: str, call: int) -> bool:
        """Tell whether a call may get this fault.

        Args:
            operation: ``write`` or ``read``.
            call: Its number.
        """
        is_in_range = call >= self.first and (self.count is None or call < self.first + self.count)
        return operation == self.operation and is_in_range


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that a call has got.

    Attributes:
        fault: Which one.
        call: Number of the call among those of its operation.
        nbytes: Of the call.
        offset: Of the call, in the file.
    """

    fault: Fault
    call: int
    nbytes: int
    offset: int


class FaultPlan:
    """Decides which calls go wrong. One plan may serve several engines, which then count together.

    Args:
        faults: A call gets the first that concerns it and whose probability comes true.
        seed: Of the probabilities, and of places such as which bit.
        clock: Of delays; None for the machine's.
        hang: Called by a call that hangs, before it does anything; it blocks until the
            call may go on. None: until :meth:`release`.

    Threads:
        Any.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        seed: int = 0,
        clock: Clock | None = None,
        hang: Callable[[], None] | None = None,
    ) -> None:
        """Start with call 0 in both directions."""
        self._faults = tuple(faults)
        self._seed = seed
        self.clock: Clock = RealClock() if clock is None else clock
        self._released = threading.Event()
        self._hang = hang
        self._lock = threading.Lock()
        self._num_calls = {"write": 0, "read": 0}
        self._injected: list[Injected] = []

    @property
    def injected(self) -> list[Injected]:
        """The faults so far, in order."""
        with self._lock:
            return list(self._injected)

    def num_calls(self, operation: Operation) -> int:
        """Count the calls so far.

        Args:
            operation: Of which direction.
        """
        with self._lock:
            return self._num_calls[operation]

    def wrap(self, engine: Engine) -> Engine:
        """Put the plan around an engine; for ``Parts.wrap_engine``.

        Args:
            engine: Moves the bytes when nothing goes wrong.
        """
        return FaultyEngine(engine, self)

    def release(self) -> None:
        """Let every call that hangs go on, and those to come."""
        self._released.set()

    def hang(self) -> None:
        """Block until the call may go on. For :class:`FaultyEngine`."""
        if self._hang is None:
            self._released.wait()
        else:
            self._hang()

    def draw(self, operation: Operation, nbytes: int, offset: int) -> tuple[Fault, random.Random] | None:
        """Number a call, and say what goes wrong in it. For :class:`FaultyEngine`.

        Args:
            operation: Its direction.
            nbytes: Its size.
            offset: Its place in the file.

        Returns:
            The fault, with random numbers for its details; or None: the call goes well.
        """
        with self._lock:
            call = self._num_calls[operation]
            self._num_calls[operation] += 1
            for index, fault in enumerate(self._faults):
                if not fault.concerns(operation, call):
                    continue
                chance = random.Random(f"{self._seed}/{index}/{call}")  # see Note [The same faults again]
                if chance.random() < fault.probability:
                    self._injected.append(Injected(fault, call, nbytes, offset))
                    return fault, chance
        return None


class FaultyEngine(Engine):
    """An engine with the faults of a plan.

    The memory that a write is given is never changed: wrong bytes are written from a copy.

    Args:
        inner: Moves the bytes. It belongs to this engine, which closes it.
        plan: Which calls go wrong, and how.
    """

    def __init__(self, inner: Engine, plan: FaultPlan) -> None:
        """Take the name of the engine inside."""
        self.name = inner.name
        self._inner = inner
        self._plan = plan

    def in_place_bytes(self, tensor: Tensor) -> int:
        """Ask the engine inside."""
        return self._inner.in_place_bytes(tensor)

    def staging(self, nbytes: int) -> Tensor:
        """Ask the engine inside."""
        return self._inner.staging(nbytes)

    def write(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Write, unless the plan has something against it."""
        drawn = self._plan.draw("write", nbytes, offset)
        if drawn is None:
            return self._inner.write(memory, nbytes, offset)
        fault, chance = drawn
        if fault.kind is FaultKind.STALE:
            return nbytes
        if not fault.kind.is_silent:
            return self._move(self._inner.write, fault, memory, nbytes, offset)
        size = min(nbytes, memory.numel())
        wrong = self._inner.staging(nbytes)
        wrong[:size].copy_(memory[:size])
        before = None
        if fault.kind is FaultKind.TORN_BLOCK and not fault.is_zero:
            before = self._inner.staging(nbytes).zero_()
            self._inner.read(before, nbytes, offset)
        _spoil(fault, chance, wrong, before, nbytes)
        return self._inner.write(wrong, nbytes, offset)

    def read(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Read, unless the plan has something against it."""
        drawn = self._plan.draw("read", nbytes, offset)
        if drawn is None:
            return self._inner.read(memory, nbytes, offset)
        fault, chance = drawn
        if fault.kind is FaultKind.STALE:
            return nbytes
        if not fault.kind.is_silent:
            return self._move(self._inner.read, fault, memory, nbytes, offset)
        before = memory.clone() if fault.kind is FaultKind.TORN_BLOCK and not fault.is_zero else None
        count = self._inner.read(memory, nbytes, offset)
        _spoil(fault, chance, memory, before, nbytes)
        return count

    def _move(
        self, call: Callable[[Tensor, int, int], int], fault: Fault, memory: Tensor, nbytes: int, offset: int
    ) -> int:
        kind = fault.kind
        if kind is FaultKind.SHORT:
            count = round_down(nbytes // 2, _ALIGNMENT)
            return call(memory, count, offset) if count else 0
        if kind is FaultKind.HANG:
            self._plan.hang()
        elif kind is FaultKind.DELAY:
            self._plan.clock.sleep_until(self._plan.clock.now() + fault.seconds)
        else:
            number: int = getattr(errno, kind.value)
            raise OSError(number, os.strerror(number))
        return call(memory, nbytes, offset)

    def describe(self) -> str:
        """Say that this is an experiment."""
        return f"{self._inner.describe()}, with injected faults"

    def close(self) -> None:
        """Close the engine inside."""
        self._inner.close()


def _spoil(fault: Fault, chance: random.Random, memory: Tensor, before: Tensor | None, nbytes: int) -> None:
    """Put one wrong bit, or one old block, into ``memory``; never into padding, where it would harm nobody.

    Args:
        fault: A flipped bit or a torn block.
        chance: Says where.
        memory: At least the part of ``nbytes`` that is no padding.
        before: What the call would replace; None: zeros.
        nbytes: Of the call.
    """
    end = max(1, min(nbytes - _ALIGNMENT + 1, memory.numel()))  # padding is shorter than the alignment
    byte = chance.randrange(end)
    if fault.kind is FaultKind.FLIPPED_BIT:
        memory[byte] ^= 1 << chance.randrange(_BITS)
        return
    start = round_down(byte, fault.block_bytes)
    block = memory[start : start + fault.block_bytes]
    if before is None:
        block.zero_()
    else:
        block.copy_(before[start : start + block.numel()])
