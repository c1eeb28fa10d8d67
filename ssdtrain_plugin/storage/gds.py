"""The engine of GPUDirect Storage, through kvikio: the drive and the device, without host memory between.

Note [When GDS is not GDS]. The same calls work without GPUDirect Storage, in two ways
that do not announce themselves. *kvikio's compatibility mode* goes through host memory of
its own, and copies on a stream that waits for the compute stream and holds it up: it is
taken where libcufile does not load, where /run/udev cannot be read, under WSL, and for a
file that libcufile refuses. *libcufile's own* does about the same one level below, where
the kernel module nvidia-fs is not loaded. Our staging does neither, so ``auto`` takes the
engine ``posix`` there, and a named ``gds`` says in which mode it is. What cannot be seen
from here is libcufile falling back for one file system only, which `allow_compat_mode` in
its cufile.json permits; ``/proc/driver/nvidia-fs/stats`` counts what was direct.

kvikio returns how many bytes it moved, short counts too; they are passed on.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.storage.base import Engine
from ssdtrain_plugin.storage.extents import round_down
from ssdtrain_plugin.storage.memory import BLOCK_ALIGNMENT, HostArena
from ssdtrain_plugin.storage.posix import PosixEngine
from ssdtrain_plugin.storage.probe import DirectoryReport

__all__ = ["GdsEngine", "compatibility_reason", "gds_problem"]

_NUM_THREADS = 8
# What importing and asking a library with native parts may raise.
_LOAD_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, KeyError)
# kvikio tells the error of a system call in its text only.
_TOLD_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EINVAL, errno.ENODEV)


def gds_problem(device: torch.device) -> str | None:
    """Say why kvikio cannot move the bytes of a device. Whether it does so directly: :func:`compatibility_reason`.

    Args:
        device: Where the activations are.

    Returns:
        The reason in a few words, or None if it can.
    """
    if device.type != "cuda":
        return f"activations are on `{device.type}`, and kvikio moves the memory of CUDA devices"
    if importlib.util.find_spec("kvikio") is None:
        return "the package `kvikio` is not installed"
    try:
        _import_kvikio().defaults.is_compat_mode_preferred()
    except _LOAD_ERRORS as error:
        return f"the package `kvikio` does not work: {_first_line(error)}"
    return None


def compatibility_reason() -> str | None:
    """Say why kvikio or libcufile would copy through host memory: Note [When GDS is not GDS].

    Returns:
        The reason in a few words, or None if transfers are direct as far as can be told.

    Ordering:
        :func:`gds_problem` has found nothing.
    """
    kvikio = _import_kvikio()
    if kvikio.defaults.is_compat_mode_preferred():
        return _preferred_reason(kvikio)
    if not kvikio.cufile_driver.get("is_gds_available"):
        return "the kernel module nvidia-fs is not loaded"
    return None


def _preferred_reason(kvikio: Any) -> str:
    if kvikio.defaults.get("compat_mode") == kvikio.CompatMode.ON:
        return "asked for, by KVIKIO_COMPAT_MODE or in the program"
    if kvikio.cufile_driver.libcufile_version() == (0, 0):
        return "the library libcufile.so.0 does not load"
    if not os.access("/run/udev", os.R_OK):
        return "/run/udev cannot be read, as in a container without it"
    return "libcufile is not supported on this system"


def _import_kvikio() -> Any:
    # The package itself imports neither.
    importlib.import_module("kvikio.defaults")
    importlib.import_module("kvikio.cufile_driver")
    return importlib.import_module("kvikio")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _as_os_error(error: Exception) -> OSError:
    text = _first_line(error)
    number = next((number for number in _TOLD_ERRORS if os.strerror(number) in str(error)), errno.EIO)
    return OSError(number, text)


def _adjust(kvikio: Any, num_threads: int) -> None:
    if kvikio.defaults.get("num_threads") < num_threads:
        kvikio.defaults.set("num_threads", num_threads)
    for name in ("auto_direct_io_read", "auto_direct_io_write"):
        with contextlib.suppress(KeyError):  # not in older releases
            # In compatibility mode the page cache would hold a second copy of everything.
            kvikio.defaults.set(name, True)


class GdsEngine(Engine):
    """kvikio on one file, for device memory; system calls for host memory.

    Device memory is moved where it lies, in whole multiples of 4096 bytes. What is
    smaller than kvikio's own threshold is left to staging, which kvikio would do too,
    with the page cache beside it.

    Args:
        fd: Of the file, opened for reading and writing; owned by someone else, who
            outlives the engine.
        report: Of the file's directory.
        arena: Gives staging memory.
        num_threads: kvikio runs the transfers of all callers on threads of its own, one
            unless told otherwise; from now on there are at least this many in the process.

    Raises:
        EnvironmentUnsupportedError: kvikio does not load or does not take the file.

    Ordering:
        kvikio knows nothing of streams: the caller waits until the device has written
        what is stored, and until it has read what a load overwrites.
    """

    name = "gds"

    def __init__(self, fd: int, *, report: DirectoryReport, arena: HostArena, num_threads: int = _NUM_THREADS) -> None:
        """Open the file again, with kvikio."""
        self._host = PosixEngine(fd, report=report, arena=arena)
        try:
            kvikio = _import_kvikio()
            self._reason = compatibility_reason()
            self._file = self._open(kvikio, f"/proc/self/fd/{fd}")
            self._min_bytes = max(int(kvikio.defaults.get("gds_threshold")), BLOCK_ALIGNMENT)
            _adjust(kvikio, num_threads)
        except _LOAD_ERRORS as error:
            raise EnvironmentUnsupportedError(
                f"cannot use io_engine `gds`: kvikio does not take a file in `{report.path}` ({_first_line(error)})",
                hint="set `io_engine` to `posix`",
            ) from error

    def _open(self, kvikio: Any, path: str) -> Any:
        # "r+": the other ways of opening for writing cut the file to nothing.
        if self._reason is None:
            try:
                # Without this kvikio hides that libcufile refuses the file.
                with kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF):
                    return kvikio.CuFile(path, "r+")
            except RuntimeError as error:
                self._reason = f"libcufile refuses the file: {_first_line(error)}"
        return kvikio.CuFile(path, "r+")

    @property
    def is_compatible_mode(self) -> bool:
        """Bytes go through host memory although they need not: Note [When GDS is not GDS]."""
        return self._reason is not None

    def in_place_bytes(self, tensor: Tensor) -> int:
        """Count whole multiples of 4096 of device memory; see :meth:`Engine.in_place_bytes`."""
        if not tensor.is_cuda:
            return self._host.in_place_bytes(tensor)
        nbytes = round_down(tensor.numel(), BLOCK_ALIGNMENT)
        return nbytes if nbytes >= self._min_bytes else 0

    def staging(self, nbytes: int) -> Tensor:
        """Lend a block of the arena; see :meth:`Engine.staging`."""
        return self._host.staging(nbytes)

    def write(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Write from where the memory is; see :meth:`Engine.write`."""
        if not memory.is_cuda:
            return self._host.write(memory, nbytes, offset)
        return self._move(self._file.pwrite, memory, nbytes, offset)

    def read(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Read to where the memory is; see :meth:`Engine.read`."""
        if not memory.is_cuda:
            return self._host.read(memory, nbytes, offset)
        return self._move(self._file.pread, memory, nbytes, offset)

    def _move(self, start: Any, memory: Tensor, nbytes: int, offset: int) -> int:
        with torch.cuda.device(memory.device):
            try:
                return int(start(memory, nbytes, offset).get())
            except RuntimeError as error:
                raise _as_os_error(error) from None

    def describe(self) -> str:
        """Name the way, and why it is not the direct one if so."""
        if self._reason is None:
            return "gds, GPUDirect Storage"
        return f"gds, compatibility mode: {self._reason}"

    def close(self) -> None:
        """Close kvikio's own descriptors of the file; see :meth:`Engine.close`."""
        self._file.close()
