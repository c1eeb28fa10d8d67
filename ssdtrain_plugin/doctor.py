"""What ``ssdtrain doctor`` finds out: can a directory hold activations, and how fast.

It writes and reads through the same tier as training does, so its figures are
those that training will see. It prints nothing; :mod:`ssdtrain_plugin.cli` does.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ssdtrain_plugin.errors import LoadError, StorageError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.engines import choose_engine
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.posix import PosixTier
from ssdtrain_plugin.storage.probe import DirectoryReport, directory_problem, probe_directory
from ssdtrain_plugin.streams import DeviceEvent, create_streams
from ssdtrain_plugin.units import MIB, format_rate

__all__ = ["EXTENT_BYTES", "Bandwidth", "Diagnosis", "examine"]

EXTENT_BYTES = 16 * MIB
"""Size of one transfer of the measurement."""

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
_NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.sshfs", "9p", "virtiofs"})
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


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is known of one directory.

    Attributes:
        path: As given.
        is_usable: Activations can be offloaded to it.
        problem: Why not, or None.
        directory: What it can do, or None if it cannot be looked at.
        bandwidth: What was measured, or None.
        engine: What ``io_engine: auto`` picks, or None.
        engine_reason: Why that one.
        remarks: What is worth knowing, one sentence each.
        verdict: One line.
    """

    path: str
    is_usable: bool
    problem: str | None
    directory: DirectoryReport | None
    bandwidth: Bandwidth | None
    engine: str | None
    engine_reason: str
    remarks: tuple[str, ...]
    verdict: str


def examine(path: str, *, nbytes: int, threads: int = 4, progress: Progress | None = None) -> Diagnosis:
    """Probe a directory and measure it. Leaves nothing behind.

    Args:
        path: A directory.
        nbytes: Bytes to write, clipped to a quarter of the free space and rounded to whole
            extents; at least one extent.
        threads: Transfers at once.
        progress: Told after every transfer.
    """
    problem = directory_problem(path)
    if problem is not None:
        return _unusable(path, problem, None)
    try:
        directory = probe_directory(path)
    except OSError as error:  # it went away between the two
        return _unusable(path, f"`{path}`: {error.strerror}", None)
    extents = max(1, min(nbytes, directory.free_bytes // 4) // EXTENT_BYTES)
    try:
        bandwidth = _measure(path, extents, threads, progress or (lambda phase, done, total: None))
    except StorageError as error:
        return _unusable(path, error.message, directory)
    remarks = _remarks(directory)
    engine, engine_reason = choose_engine("auto", directory)
    rates = (
        f"{format_rate(bandwidth.write_bytes_per_second)} write, {format_rate(bandwidth.read_bytes_per_second)} read"
    )
    return Diagnosis(
        path=path,
        is_usable=True,
        problem=None,
        directory=directory,
        bandwidth=bandwidth,
        engine=engine,
        engine_reason=engine_reason,
        remarks=remarks,
        verdict=f"usable{', with reservations' if remarks else ''}: {rates}",
    )


def _unusable(path: str, problem: str, directory: DirectoryReport | None) -> Diagnosis:
    return Diagnosis(path, False, problem, directory, None, None, "", (), f"not usable: {problem}")


def _remarks(directory: DirectoryReport) -> tuple[str, ...]:
    remarks = []
    if not directory.supports_direct:
        remarks.append(
            f"O_DIRECT: {directory.direct_reason}; the figures are those of the page cache, and so of host memory"
        )
    if directory.file_system in _MEMORY_FILE_SYSTEMS:
        remarks.append(f"{directory.file_system} is host memory, not a drive; `host_bytes` uses it with less work")
    if directory.file_system in _NETWORK_FILE_SYSTEMS:
        remarks.append(f"{directory.file_system} is not a local drive; every rank shares its bandwidth")
    return tuple(remarks)


def _measure(path: str, num_extents: int, threads: int, progress: Progress) -> Bandwidth:
    """Write, write again and read ``num_extents`` extents.

    Raises:
        StorageError: A transfer failed, or bytes came back changed.
    """
    device = torch.device("cpu")
    streams = create_streams(device)
    arena = HostArena(streams)
    total_bytes = num_extents * EXTENT_BYTES
    rates = []
    quiet = logging.getLogger("ssdtrain_plugin.storage.posix")
    was_disabled = quiet.disabled
    quiet.disabled = True  # the remarks say the same
    try:
        tier = PosixTier(path, streams=streams, arena=arena, disk_bytes=total_bytes, device=device)
    finally:
        quiet.disabled = was_disabled
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


class _Worker:
    """Moves one extent from, or to, a recycled buffer, stamped so that a mix-up shows."""

    def __init__(self, tier: PosixTier, arena: HostArena, threads: int) -> None:
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
