"""How fast a directory is, through the same tier as training uses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ssdtrain_plugin.errors import LoadError
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.streams import DeviceEvent, create_streams
from ssdtrain_plugin.units import MIB

__all__ = ["EXTENT_BYTES", "Bandwidth", "Progress", "measure"]

EXTENT_BYTES = 16 * MIB
"""Size of one transfer of the measurement."""

_STAMP_BYTES = 8

Progress = Callable[[str, int, int], None]
"""Called with the phase, the bytes done and the bytes of all phases."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was measured.

    Attributes:
        nbytes: Bytes of one pass.
        extent_bytes: Bytes of one transfer.
        threads: Transfers at once.
        first_write_bytes_per_second: Into space never written before, as in the first step.
        write_bytes_per_second: Into space written before, as in every later step.
        read_bytes_per_second: Reads.
    """

    nbytes: int
    extent_bytes: int
    threads: int
    first_write_bytes_per_second: float
    write_bytes_per_second: float
    read_bytes_per_second: float


def measure(path: str, num_extents: int, threads: int, progress: Progress) -> Bandwidth:
    """Write, write again and read ``num_extents`` extents. Leaves nothing behind.

    Args:
        path: A directory.
        num_extents: Of :data:`EXTENT_BYTES` each, at least 1.
        threads: Transfers at once.
        progress: Told after every transfer.

    Raises:
        StorageError: A transfer failed, or bytes came back changed.
    """
    streams = create_streams(torch.device("cpu"))
    arena = HostArena(streams)
    total_bytes = num_extents * EXTENT_BYTES
    rates = []
    with _quiet("ssdtrain_plugin.storage.drive"):  # the findings say the same
        tier = open_drive(path, engine="posix", streams=streams, arena=arena, disk_bytes=total_bytes)
    try:
        extents = [tier.allocate(EXTENT_BYTES) for _ in range(num_extents)]
        worker = _Worker(tier, arena, threads)
        phases: tuple[tuple[str, Callable[[Extent], None]], ...] = (
            ("first write", worker.write),
            ("write", worker.write),
            ("read", worker.read),
        )
        with ThreadPoolExecutor(threads, thread_name_prefix="ssdtrain-doctor") as pool:
            for index, (phase, transfer) in enumerate(phases):
                done_bytes = index * total_bytes
                started = time.perf_counter()
                for _ in pool.map(transfer, extents):
                    done_bytes += EXTENT_BYTES
                    progress(phase, done_bytes, len(phases) * total_bytes)
                rates.append(total_bytes / max(time.perf_counter() - started, 1e-9))
    finally:
        tier.close()
        arena.close()
    return Bandwidth(total_bytes, EXTENT_BYTES, threads, *rates)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled


class _Worker:
    """Moves one extent from, or to, a recycled buffer, stamped so that a mix-up shows."""

    def __init__(self, tier: Tier, arena: HostArena, threads: int) -> None:
        self._tier = tier
        self._arena = arena
        # Random, because some drives compress.
        self._content = torch.frombuffer(bytearray(os.urandom(EXTENT_BYTES)), dtype=torch.uint8)
        # Filled now, so that page faults are not measured.
        self._idle: list[Tensor] = []
        self._idle += [self._buffer() for _ in range(threads)]

    def write(self, extent: Extent) -> None:
        buffer = self._buffer()
        buffer[:_STAMP_BYTES].view(torch.int64).fill_(extent.offset)
        self._tier.write(extent, buffer, DeviceEvent())
        self._idle.append(buffer)

    def read(self, extent: Extent) -> None:
        buffer = self._buffer()
        buffer[:_STAMP_BYTES].view(torch.int64).fill_(-1)
        self._tier.read(extent, buffer, DeviceEvent()).synchronize()
        found = int(buffer[:_STAMP_BYTES].view(torch.int64).item())
        if found != extent.offset:
            raise LoadError(
                f"bytes came back changed: at {extent.offset} (stamp {found}, expected {extent.offset})",
                offset=extent.offset,
                nbytes=extent.nbytes,
            )
        self._idle.append(buffer)

    def _buffer(self) -> Tensor:
        try:
            return self._idle.pop()
        except IndexError:
            return self._arena.tensor(EXTENT_BYTES).copy_(self._content)
