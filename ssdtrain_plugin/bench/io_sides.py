"""The two sides of ``ssdtrain bench io``: a tier behind the transfer queue, and fio. Each does the same on a visit."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssdtrain_plugin.bench.fio import FioJob, FioProgram, Sample, run_fio
from ssdtrain_plugin.errors import LoadError
from ssdtrain_plugin.reload import lane_of
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.storage.memory import HostArena, memory_at
from ssdtrain_plugin.streams import DeviceEvent
from ssdtrain_plugin.transfer import Direction, Transfer, TransferQueue
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["DIRECTIONS", "VERIFY", "Buffers", "Fio", "IoOptions", "Ours"]

DIRECTIONS = ("write", "read", "mixed")
"""What is measured, in this order. Mixed is one half of the bytes each way, at the same time."""

VERIFY = ("off", "checksum")
"""What the option ``verify`` may be, each measured beside the other: the first is what the second is compared with."""

_STAMP = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class IoOptions:
    """What to measure, and with how much.

    Attributes:
        size_bytes: Bytes of one pass in one direction; rounded down to an even number of blocks.
        block_bytes: Bytes of one transfer, a multiple of 4 KiB.
        threads: Transfers at once, per drive and direction; fio's depth.
        rounds: Visits of each side that count; one more comes before.
        engines: As in the option ``io_engine``.
        throttles: Bytes a second, both ways, of as many of the last paths, in order.
        verify: As in the option of that name; each is a side of its own, with a file of its own.
    """

    size_bytes: int
    block_bytes: int = 16 * MIB
    threads: int = 4
    rounds: int = 5
    engines: tuple[str, ...] = ("auto",)
    throttles: tuple[int, ...] = ()
    verify: tuple[str, ...] = VERIFY

    @property
    def num_blocks(self) -> int:
        """Transfers of one pass: even, for the halves of the mixed one."""
        return max(2, self.size_bytes // self.block_bytes // 2 * 2)


class Buffers:
    """Filled blocks of the arena, lent and given back; all have one content but for their stamps.

    Args:
        arena: Where the blocks come from.
        nbytes: Size of each, at least 16.
        count: How many; as many as are ever lent at once.

    Attributes:
        addresses: Of the blocks.

    Threads:
        Any.
    """

    def __init__(self, arena: HostArena, nbytes: int, count: int) -> None:
        """Fill the blocks."""
        # Random, because some drives compress.
        self._content = torch.frombuffer(bytearray(os.urandom(nbytes)), dtype=torch.uint8)
        # Filled now, so that page faults are not measured.
        self._idle = deque(arena.tensor(nbytes).copy_(self._content) for _ in range(count))
        self.addresses = tuple(buffer.data_ptr() for buffer in self._idle)
        self._middle = slice(_STAMP.size, nbytes - _STAMP.size)

    @contextlib.contextmanager
    def borrow(self, stamp: int) -> Iterator[Tensor]:
        """Lend a block.

        Args:
            stamp: Its first and last 8 bytes.

        Returns:
            (nbytes,), uint8, CPU; where a stamp of another transfer was, there is this one now.
        """
        buffer = self._idle.popleft()
        try:
            for begin in (0, buffer.numel() - _STAMP.size):
                _STAMP.pack_into(memory_at(buffer.data_ptr() + begin, _STAMP.size), 0, stamp)
            yield buffer
        finally:
            self._idle.append(buffer)

    def is_as_stored(self, buffer: Tensor, stamp: int) -> bool:
        """Compare every byte with what :meth:`borrow` gave.

        Args:
            buffer: (nbytes,), uint8, CPU.
            stamp: That was given then.
        """
        begin = int.from_bytes(bytes(buffer[: _STAMP.size].tolist()), "little", signed=True)
        end = int.from_bytes(bytes(buffer[-_STAMP.size :].tolist()), "little", signed=True)
        return begin == end == stamp and torch.equal(buffer[self._middle], self._content[self._middle])


class _Ends:
    """Counts the transfers that have ended, and wakes who waits once.

    To wait for the queue itself is to be woken at the end of each transfer, and so to
    compete with its workers for the interpreter: stores took a fifth longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._wanted: int | None = None
        self._is_reached = threading.Event()

    def add(self, transfer: Transfer) -> None:
        with self._lock:
            self._count += 1
            if self._count == self._wanted:
                self._is_reached.set()

    def wait_for(self, count: int) -> None:
        """Wait for the ends of ``count`` transfers since the last call."""
        with self._lock:
            self._wanted = count
            if self._count < count:
                self._is_reached.clear()
            else:
                self._is_reached.set()
        self._is_reached.wait()
        with self._lock:
            self._count, self._wanted = 0, None


class Ours:
    """A tier behind the transfer queue.

    Args:
        method: Name of the engine.
        tier: With room for one pass; all of it free.
        queue: With nothing else to do meanwhile.
        buffers: One for each of its threads.
        options: How many bytes, in blocks of which size.
        verify: As the tier was opened: ``off`` or ``checksum``.
        adapts: The tier places bytes by the speed that it has seen last. In training that
            was the same kind of pass, in the step before; so there is one, not timed,
            between the mixed pass of one visit and the write of the next.
    """

    def __init__(
        self,
        method: str,
        tier: Tier,
        queue: TransferQueue,
        buffers: Buffers,
        options: IoOptions,
        *,
        verify: str = "off",
        adapts: bool = False,
    ) -> None:
        """Move nothing yet."""
        self._adapts = adapts
        self.method, self.verify = method, verify
        self._tier = tier
        self._queue = queue
        self._buffers = buffers
        self._num_blocks, self._block_bytes = options.num_blocks, options.block_bytes
        self._ends = _Ends()
        self._stamps: dict[Extent, int] = {}  # of the live extents
        self._num_stored = 0

    @property
    def how(self) -> str:
        """The tier's own words; with several drives, the speeds that it has measured."""
        return self._tier.describe()

    def first_write(self) -> Sample:
        """Write all once, before all visits.

        Raises:
            StorageError: A store failed, or there is no room.
        """
        sample = self._timed(self._stores(self._num_blocks))
        self._free(list(self._stamps))
        return sample

    def visit(self) -> dict[str, Sample]:
        """Store, load, do both at the same time, and check every byte: each of :data:`DIRECTIONS` once.

        Raises:
            StorageError: A transfer failed, or bytes came back changed.
        """
        half = self._num_blocks // 2
        if self._adapts:
            self._timed(self._stores(self._num_blocks))
            self._timed([self._load(extent) for extent in self._stamps])
            self._free(list(self._stamps))
        samples = {"write": self._timed(self._stores(self._num_blocks))}
        samples["read"] = self._timed([self._load(extent) for extent in self._stamps])
        extents = list(self._stamps)
        self._timed([self._check(extent) for extent in extents[:half]])  # they are about to be written over
        self._free(extents[:half])
        samples["mixed"] = self._timed(self._stores(half), [self._load(extent) for extent in extents[half:]])
        self._timed([self._check(extent) for extent in self._stamps])
        self._free(list(self._stamps))
        return samples

    def _timed(self, transfers: Iterable[Transfer], loads_meanwhile: Sequence[Transfer] = ()) -> Sample:
        """Run transfers to their end; those that come with others are queued first, since nothing holds them up.

        Raises:
            StorageError: One of them failed.
        """
        submitted = []
        cpu_seconds, started = _cpu_seconds(), time.perf_counter()
        for transfer in itertools.chain(loads_meanwhile, transfers):
            self._queue.submit(transfer)
            submitted.append(transfer)
        self._ends.wait_for(len(submitted))
        self._queue.wait_idle()
        seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu_seconds
        for transfer in submitted:
            if transfer.error is not None:
                raise transfer.error
        return Sample(sum(transfer.nbytes for transfer in submitted), seconds, cpu_seconds)

    def _stores(self, count: int) -> Iterator[Transfer]:
        """Allocate and describe stores one by one, as training does: when there is room for one more in flight."""
        for _ in range(count):
            self._queue.wait_for_room(self._block_bytes)
            extent = self._tier.allocate(self._block_bytes)
            self._num_stored += 1
            self._stamps[extent] = self._num_stored
            yield self._transfer(Direction.STORE, extent, partial(self._write, extent, self._num_stored))

    def _load(self, extent: Extent) -> Transfer:
        return self._transfer(Direction.LOAD, extent, partial(self._read, extent))

    def _check(self, extent: Extent) -> Transfer:
        return self._transfer(Direction.LOAD, extent, partial(self._compare, extent, self._stamps[extent]))

    def _transfer(self, direction: Direction, extent: Extent, work: Callable[[], DeviceEvent | None]) -> Transfer:
        return Transfer(direction, extent.nbytes, work, self._ends.add, lane_of(self._tier, extent))

    def _write(self, extent: Extent, stamp: int) -> None:
        with self._buffers.borrow(stamp) as buffer:
            self._tier.write(extent, buffer, DeviceEvent())

    def _read(self, extent: Extent) -> None:
        with self._buffers.borrow(-1) as buffer:
            self._tier.read(extent, buffer, DeviceEvent()).synchronize()

    def _compare(self, extent: Extent, stamp: int) -> None:
        with self._buffers.borrow(-1) as buffer:
            self._tier.read(extent, buffer, DeviceEvent()).synchronize()
            if not self._buffers.is_as_stored(buffer, stamp):
                raise LoadError(
                    f"bytes came back changed: {format_bytes(extent.nbytes)} at {extent.offset}, drive {extent.drive}",
                    offset=extent.offset,
                    nbytes=extent.nbytes,
                    hint="look for drive errors in `dmesg`",
                )

    def _free(self, extents: Iterable[Extent]) -> None:
        for extent in extents:
            del self._stamps[extent]
            self._tier.free(extent)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Fio:
    """fio on the extent file of one drive of ours, or on those of several at once.

    Args:
        program: From ``find_fio``.
        files: Descriptors, and whether O_DIRECT works; all of each was written before.
        options: How many bytes in all, in blocks of which size.

    Attributes:
        huge_page_bytes: Of its memory in huge pages during the first visit's write; None if
            that could not be seen.
    """

    method, verify = "fio", "off"

    def __init__(self, program: FioProgram, files: Sequence[tuple[int, bool]], options: IoOptions) -> None:
        """Run nothing yet."""
        self._program = program
        self._files = files
        self._blocks, self._block_bytes = max(2, options.num_blocks // len(files) // 2 * 2), options.block_bytes
        self._depth = options.threads
        self._was_watched = False
        self.huge_page_bytes: int | None = None

    @property
    def how(self) -> str:
        """Version, engine and depth."""
        return f"{self._program.version}, {self._program.engine}, depth {self._depth}"

    @property
    def buffer_bytes(self) -> int:
        """What it needs for transfers in one direction."""
        return len(self._files) * self._depth * self._block_bytes

    def visit(self) -> dict[str, Sample]:
        """Run it once for each of :data:`DIRECTIONS`.

        Raises:
            FioError: It failed.
        """
        half = self._blocks // 2
        jobs = {
            "write": self._jobs(True, 0, self._blocks),
            "read": self._jobs(False, 0, self._blocks),
            "mixed": [*self._jobs(True, 0, half), *self._jobs(False, half, self._blocks)],
        }
        return {direction: self._run(jobs[direction]) for direction in DIRECTIONS}

    def _jobs(self, is_write: bool, begin: int, end: int) -> list[FioJob]:
        offset, nbytes = begin * self._block_bytes, (end - begin) * self._block_bytes
        return [FioJob(fd, is_write, offset, nbytes, is_direct) for fd, is_direct in self._files]

    def _run(self, jobs: Sequence[FioJob]) -> Sample:
        is_watched, self._was_watched = not self._was_watched, True
        sample, seen = run_fio(
            self._program, jobs, block_bytes=self._block_bytes, depth=self._depth, is_watched=is_watched
        )
        self.huge_page_bytes = seen if is_watched else self.huge_page_bytes
        return sample
