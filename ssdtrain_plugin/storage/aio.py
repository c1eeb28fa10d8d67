"""The engine of DeepNVMe: DeepSpeed's ``aio_handle``, whose every transfer is checked here.

Note [What aio does not say]. The library throws the results of its I/O away: a full
drive, a medium error and a transfer cut short read as success. So the engine takes them
from the kernel, with Note [The ring]: a request that failed is raised with its error
number, and otherwise the bytes that were moved are counted up to the first gap.

Looking at the memory instead would not do. A random number that is put there before a read
and is gone afterwards proves nothing: the kernel may have written zeros for the bytes that
it could not read (its loop device does), or what a bounce buffer held. Nor does reading a
part of what was written back: another part may be what failed.

The library ends the process (a C assertion) where others report: on a read beyond the end
of the file, when no memory can be locked, when the kernel has no contexts to give.
These are tried, or compared, first. It also must not be inside a call when the interpreter
ends: Note [The end of the interpreter].
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssdtrain_plugin.deadlines import ending
from ssdtrain_plugin.errors import EnvironmentUnsupportedError, StateError
from ssdtrain_plugin.storage.base import Engine
from ssdtrain_plugin.storage.completions import Completion, create_with_rings
from ssdtrain_plugin.storage.extents import round_down, round_up
from ssdtrain_plugin.storage.locked import LockedPool
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.posix import PosixEngine, length_alignment
from ssdtrain_plugin.storage.probe import DirectoryReport
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["AioEngine", "aio_problem"]

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2 * MIB
_QUEUE_DEPTH = 16
_NUM_CONTEXTS = 2  # of a handle with one thread: one it never uses, and the thread's
# What loading an extension may raise: the compiler, the linker and the library's own checks.
_LOAD_ERRORS = (RuntimeError, ImportError, OSError, TypeError, AttributeError)


def aio_problem() -> str | None:
    """Say why DeepNVMe cannot be used here. Builds nothing.

    Returns:
        The reason in a few words, or None if it can be loaded, perhaps after a compilation.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return "the package `deepspeed` is not installed"
    try:
        builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
        if importlib.util.find_spec(builder.absolute_name()) is not None:
            return None  # compiled when DeepSpeed was installed
        return _compiler_problem() or (None if builder.is_compatible() else "libaio cannot be linked")
    except _LOAD_ERRORS as error:
        return f"`deepspeed.ops` does not work: {_first_line(error)}"


def _compiler_problem() -> str | None:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: `{compiler[0]}` is not on the PATH"
    if shutil.which("ninja") is None:
        return "the build tool `ninja` is not on the PATH"
    command = [*compiler, "-E", "-x", "c++", "-"]
    done = subprocess.run(command, input=b"#include <libaio.h>\n", capture_output=True, check=False)
    if done.returncode != 0:
        return "the header `libaio.h` is missing (package libaio-dev or libaio-devel)"
    if torch.cuda.is_available() and importlib.import_module("torch.utils.cpp_extension").CUDA_HOME is None:
        return "the CUDA toolkit is missing, which DeepSpeed compiles with (CUDA_HOME)"
    return None


def _load_library() -> Any:
    """Load the extension, and compile it first if that was never done.

    Raises:
        EnvironmentUnsupportedError: It does not load.
    """
    logger.info("loading DeepNVMe's async_io; the first time it is compiled, which takes some minutes")
    try:
        return importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().load(verbose=False)
    except _LOAD_ERRORS as error:
        reason = aio_problem() or _first_line(error)
        raise EnvironmentUnsupportedError(
            f"cannot use io_engine `aio`: {reason}", hint="set `io_engine` to `posix`"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_contexts(library: Any, num_requests: int) -> None:
    """Raise what the kernel says about one more asynchronous I/O context; the library would end the process.

    Raises:
        OSError: There is none.
    """
    aio = ctypes.CDLL(library.__file__)  # finds the symbols of libaio, which the extension is linked to
    context = ctypes.c_void_p()
    result = aio.io_queue_init(num_requests, ctypes.byref(context))
    if result < 0:
        raise OSError(-result, f"{os.strerror(-result)}: no asynchronous I/O context; see sysctl fs.aio-max-nr")
    aio.io_queue_release(context)


class _Handle:
    """A handle of the library, and the results of its requests. One thread at a time uses it.

    It is destroyed in its own process only: the destructor joins a thread, which a forked
    child has not got, and would die of a bad address. There it is kept for ever instead.

    Args:
        library: The extension.
        block_bytes: What the library gives the kernel at once.
        queue_depth: Requests under way at once.

    Raises:
        OSError: The kernel has no contexts for it, or does not show their results.
    """

    def __init__(self, library: Any, block_bytes: int, queue_depth: int) -> None:
        _check_contexts(library, _NUM_CONTEXTS * queue_depth)
        self._pid = os.getpid()
        self._call_bytes = block_bytes * queue_depth  # with more, requests are used again in one call
        self.real, self._rings = create_with_rings(
            lambda: library.aio_handle(block_bytes, queue_depth, False, False, 1), _NUM_CONTEXTS
        )

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Destroy it: join its thread and give its contexts back. Calling this twice does nothing."""
        real = self.__dict__.pop("real", None)
        if real is not None and os.getpid() != self._pid:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(real))

    def write(self, memory: Tensor, path: str, offset: int) -> int:
        """Write ``memory``; return how many bytes, from the first, are in the file."""
        return self._move(self.real.sync_pwrite, memory, path, offset)

    def read(self, memory: Tensor, path: str, offset: int) -> int:
        """Read all of ``memory``; return how many bytes, from the first, have arrived."""
        return self._move(self.real.sync_pread, memory, path, offset)

    def _move(self, call: Any, memory: Tensor, path: str, offset: int) -> int:
        moved_bytes = 0
        for piece in memory.split(self._call_bytes):
            self._take()  # what an interrupted call has left
            num_owners = _count_owners(piece)
            num_calls = call(piece, path, offset + moved_bytes)
            while _count_owners(piece) > num_owners:
                time.sleep(0)  # Note [The end of the interpreter]: its thread lets go a moment later
            completions = self._take()
            for completion in completions:
                if completion.result < 0:
                    raise OSError(-completion.result, os.strerror(-completion.result))
            if num_calls != 1:
                raise OSError(errno.EIO, f"DeepNVMe refused the call (it returned {num_calls}, and printed why)")
            piece_bytes = _contiguous_bytes(completions, piece.numel(), offset + moved_bytes)
            moved_bytes += piece_bytes
            if piece_bytes < piece.numel():
                break
        return moved_bytes

    def _take(self) -> list[Completion]:
        return [completion for ring in self._rings for completion in ring.take()]


def _count_owners(tensor: Tensor) -> int:
    """Count the references of C++ code; a torch that does not tell is one where dropping them needs no lock."""
    count: Callable[[], int] | None = getattr(tensor, "_use_count", None)
    return 0 if count is None else count()


def _contiguous_bytes(completions: list[Completion], nbytes: int, offset: int) -> int:
    """Count the bytes that were moved from ``offset`` on up to the first gap."""
    if sum(completion.result for completion in completions) == nbytes:
        return nbytes
    end = offset
    for start, result in sorted((completion.file_offset, completion.result) for completion in completions):
        if start > end:
            break
        end = max(end, start + result)
    return min(end - offset, nbytes)


class _Handles:
    """Lends handles, one to a thread; makes as many as there are threads at once.

    Note [The end of the interpreter]. A thread that wants the interpreter's lock when the
    interpreter is ending is unwound on the spot, and through C++ code that ends the process
    with SIGABRT. Two kinds of thread may want it: a worker that comes back from a call, and
    the library's own thread, which lets go of the call's tensor a moment after the call has
    returned. So a call is over only when that has happened too; before the end new calls
    are refused, those under way are waited for, and the handles are destroyed, which joins
    their threads. Nobody does so later: a worker would be inside a destructor. A forked
    child does nothing: it has no threads.
    """

    def __init__(self, library: Any, block_bytes: int) -> None:
        self._library = library
        self._block_bytes = block_bytes
        self._changed = threading.Condition()
        self._idle: list[_Handle] = []
        self._num_active = 0
        self._is_closed = False
        self._has_ended = False
        self._pid = os.getpid()

    @contextlib.contextmanager
    def lend(self) -> Iterator[_Handle]:
        """Lend a handle.

        Raises:
            OSError: The engine is closed or of another process, or no handle can be made.
        """
        if os.getpid() != self._pid:
            raise OSError(errno.ESHUTDOWN, "the engine belongs to another process, which forked this one")
        with self._changed:
            if self._is_closed:
                raise OSError(errno.ESHUTDOWN, "the engine is closed")
            self._num_active += 1
            handle = self._idle.pop() if self._idle else None
        try:
            if handle is None:
                handle = _Handle(self._library, self._block_bytes, _QUEUE_DEPTH)
            yield handle
        finally:
            with self._changed:
                if handle is not None:
                    self._idle.append(handle)
                    self._destroy_refused()
                self._num_active -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse new calls and drop the handles that are not in use."""
        with self._changed:
            self._is_closed = True
            self._destroy_refused()

    def end(self) -> None:
        """Refuse new calls, wait for those under way, and destroy the handles."""
        if os.getpid() != self._pid:
            return
        with self._changed, ending() as allowance:
            self._is_closed = self._has_ended = True
            if not allowance.wait(partial(self._changed.wait_for, lambda: self._num_active == 0)):
                logger.warning("%d transfers of DeepNVMe hang at the end of the process", self._num_active)
            self._destroy_idle()

    def _destroy_refused(self) -> None:
        if self._is_closed and not self._has_ended:
            self._destroy_idle()

    def _destroy_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


class AioEngine(Engine):
    """DeepNVMe on one file, opened again through its descriptor.

    The library moves nothing where it lies but memory that itself, or CUDA, has locked:
    on CPU all bytes are staged.

    Args:
        fd: Of the file, opened with O_DIRECT; owned by someone else, who outlives the engine.
        report: Of the file's directory.
        arena: Gives staging memory where it is pinned for a device.
        block_bytes: What the library gives the kernel at once, a multiple of 4096.

    Raises:
        EnvironmentUnsupportedError: The library does not load, or O_DIRECT does not work.

    Threads:
        As of :class:`Engine`. The first engine of a process may compile for minutes.
    """

    name = "aio"

    def __init__(self, fd: int, *, report: DirectoryReport, arena: HostArena, block_bytes: int = _BLOCK_BYTES) -> None:
        """Load the library."""
        if not report.supports_direct:
            raise EnvironmentUnsupportedError(
                f"cannot use io_engine `aio`: in `{report.path}` O_DIRECT {report.direct_reason} (expected to work)",
                hint="set `io_engine` to `posix`",
            )
        self._fd = fd
        self._path = f"/proc/self/fd/{fd}"
        self._alignment = length_alignment(report)
        self._block_bytes = round_up(block_bytes, self._alignment)
        self._host = PosixEngine(fd, report=report, arena=arena)
        library = _load_library()
        try:
            self._memory_owner = _Handle(library, self._block_bytes, 1)
        except OSError as error:
            raise EnvironmentUnsupportedError(
                f"cannot use io_engine `aio`: {error.strerror}", hint="set `io_engine` to `posix`"
            ) from error
        # The library warns about writes, once, and two threads that come to this point together
        # wait for each other for ever. So write nothing, now, while there is one thread.
        self._memory_owner.real.sync_pwrite(torch.empty(0, dtype=torch.uint8), self._path, 0)
        self._locked = LockedPool(self._memory_owner.real, self._alignment)
        self._handles = _Handles(library, self._block_bytes)
        self._end = weakref.finalize(self, self._handles.end)

    def in_place_bytes(self, tensor: Tensor) -> int:
        """Nothing: the library would copy it, in the calling thread; see :meth:`Engine.in_place_bytes`."""
        return 0

    def staging(self, nbytes: int) -> Tensor:
        """Lend memory that the library takes as it is; see :meth:`Engine.staging`."""
        if torch.cuda.is_available():
            block = self._host.staging(nbytes)
            if self._memory_owner.real.is_pinned(block):
                return block
        return self._locked.tensor(nbytes)

    def write(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Write, and find out how much was written; see :meth:`Engine.write`."""
        self._check_alignment(nbytes, offset)
        with self._handles.lend() as handle:
            return handle.write(memory[:nbytes], self._path, offset)

    def read(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Read, and find out how much was read; see :meth:`Engine.read`."""
        self._check_alignment(nbytes, offset)
        left_bytes = round_down(max(os.fstat(self._fd).st_size - offset, 0), self._alignment)
        nbytes = min(nbytes, left_bytes)
        if nbytes == 0:
            return 0
        with self._handles.lend() as handle:
            return handle.read(memory[:nbytes], self._path, offset)

    def _check_alignment(self, nbytes: int, offset: int) -> None:
        if nbytes < 1 or nbytes % self._alignment or offset % self._alignment:
            raise StateError(
                f"a transfer of {nbytes} bytes at {offset} is not aligned (expected multiples of {self._alignment})"
            )

    def describe(self) -> str:
        """Name the library and what it takes at once."""
        return f"aio, DeepNVMe in blocks of {format_bytes(self._block_bytes)}"

    def close(self) -> None:
        """Drop the handles and the staging memory; see :meth:`Engine.close`."""
        self._handles.close()
        self._locked.close()
