"""Which engine moves the bytes to a drive, why that one, and a drive that uses it, and its meter."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.storage.base import Engine
from ssdtrain_plugin.storage.drive import DriveTier
from ssdtrain_plugin.storage.drive_identity import identity_of
from ssdtrain_plugin.storage.extent_file import cannot_create
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.posix import PosixEngine
from ssdtrain_plugin.storage.probe import DirectoryReport
from ssdtrain_plugin.storage.retries import Retries
from ssdtrain_plugin.storage.wear import DriveMeter, state_folder
from ssdtrain_plugin.streams import Streams

__all__ = ["choose_engine", "meter_of", "open_drive"]


def choose_engine(wanted: str, device: torch.device) -> tuple[str, str]:
    """Choose an engine for a training device.

    Args:
        wanted: The option ``io_engine``. A named engine is used or refused; ``auto``
            takes ``gds`` where it is direct, else ``posix``.
        device: Where the activations are.

    Returns:
        The engine, and the reason in a few words.

    Raises:
        EnvironmentUnsupportedError: The engine named does not work here.
    """
    if wanted == "auto":
        if device.type != "cuda":
            return "posix", "fastest for tensors in host memory"
        from ssdtrain_plugin.storage.gds import compatibility_reason, gds_problem

        obstacle = gds_problem(device) or compatibility_reason()
        return (
            ("gds", "GPUDirect Storage works") if obstacle is None else ("posix", f"no GPUDirect Storage: {obstacle}")
        )
    problem = _problem_of(wanted, device)
    if problem is not None:
        raise EnvironmentUnsupportedError(
            f"cannot use io_engine `{wanted}`: {problem}", hint="set `io_engine` to `auto`, which takes what works"
        )
    return wanted, "asked for"


def _problem_of(engine: str, device: torch.device) -> str | None:
    if engine == "gds":
        from ssdtrain_plugin.storage.gds import gds_problem

        return gds_problem(device)
    if engine == "aio":
        from ssdtrain_plugin.storage.aio import aio_problem

        return aio_problem()
    return None


def open_drive(
    path: str,
    *,
    engine: str,
    streams: Streams,
    arena: HostArena,
    disk_bytes: int | None = None,
    has_checksums: bool = False,
    wrap_engine: Callable[[Engine], Engine] | None = None,
    retries: Retries | None = None,
) -> DriveTier:
    """Open the extent file of one directory, with an engine.

    Args:
        path: A directory on the drive.
        engine: Its name, from :func:`choose_engine`.
        streams: Copy between device and staging memory.
        arena: Gives staging memory.
        disk_bytes: Bound on the file, or None for the space free now minus 5 %.
        has_checksums: Hash what is stored, and compare at each load.
        wrap_engine: Puts something around the engine, such as faults; or None.
        retries: How patient to be with calls that fail.

    Raises:
        StorageError: No file can be created in the directory.
        EnvironmentUnsupportedError: The engine does not work here.
    """

    def create(fd: int, report: DirectoryReport) -> Engine:
        # The libraries of the optional engines take long to load.
        if engine == "aio":
            from ssdtrain_plugin.storage.aio import AioEngine

            return AioEngine(fd, report=report, arena=arena)
        if engine == "gds":
            from ssdtrain_plugin.storage.gds import GdsEngine

            return GdsEngine(fd, report=report, arena=arena)
        return PosixEngine(fd, report=report, arena=arena)

    def create_wrapped(fd: int, report: DirectoryReport) -> Engine:
        engine = create(fd, report)
        return engine if wrap_engine is None else wrap_engine(engine)

    return DriveTier(
        path,
        create_engine=create_wrapped,
        streams=streams,
        disk_bytes=disk_bytes,
        has_checksums=has_checksums,
        retries=retries,
    )


def meter_of(path: str, limit_bytes: int | None, rated_bytes: int | None, *, clock: Callable[[], float]) -> DriveMeter:
    """Make the meter of the drive that a directory is on.

    Args:
        path: The directory.
        limit_bytes: That may be written in a day, or None.
        rated_bytes: Endurance of the drive (TBW), or None.
        clock: Seconds since 1970.

    Raises:
        StorageError: The directory is gone.
    """
    try:
        identity = identity_of(path)
    except OSError as error:
        raise cannot_create(path, error) from error
    folder = state_folder(os.environ)
    return DriveMeter(identity, path, folder=folder, limit_bytes=limit_bytes, rated_bytes=rated_bytes, clock=clock)
