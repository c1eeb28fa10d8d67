"""One run of fio as a process: all jobs begin at once, and it has ended when the call ends, whatever happens.

Note [One start]. Each job of fio is a process that fills its buffers and then begins,
and starts its clock, without waiting for the others. On a busy machine one may be done
before the other begins, and both look as fast as if they were alone. So each job runs a
command first that tells us it is ready and then waits for the end of a pipe, which
comes for all at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

from ssdtrain_plugin.errors import OffloadError
from ssdtrain_plugin.units import KIB

__all__ = ["FioError", "run_process"]

_SAMPLING_SECONDS = 0.01
_TERMINATION_SECONDS = 5.0
_START_SECONDS = 30.0
_LEAST_TIMEOUT_SECONDS = 60.0
_SLOWEST_BYTES_PER_SECOND = 10e6  # slower than any drive: then fio hangs
_HUGE_PAGE_TUNABLE = "glibc.malloc.hugetlb=1"
_HUGE_PAGES_OF_PROCESS = re.compile(r"^(?:AnonHugePages|Private_Hugetlb):\s+(\d+) kB$", re.MULTILINE)


class FioError(OffloadError):
    """fio cannot be run, or did not do what it was asked. Ours goes on without a comparison."""


def run_process(
    path: str, jobs: Sequence[Sequence[str]], fds: Collection[int], *, nbytes: int, is_watched: bool
) -> tuple[str, int | None]:
    """Run fio to its end.

    Args:
        path: The program.
        jobs: Options of each job, beginning with its name.
        fds: Files that it inherits.
        nbytes: That it moves, for how long to wait.
        is_watched: Look at its memory meanwhile.

    Returns:
        What it printed; and the most memory that its jobs had in huge pages together, or
        None if nobody watched or they ended too soon.

    Raises:
        FioError: It does not start, fails, or does not end.
    """
    timeout_seconds = _LEAST_TIMEOUT_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(contextlib.closing(_Start())) if len(jobs) > 1 else None
        command = [path, "--output-format=json", "--eta=never"]
        for job in jobs:
            command += [*job, *(start.options if start else ())]
        # Files and not pipes: nobody reads while it runs.
        output, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        inherited = {*fds, *(start.inherited if start else ())}
        # The output of what it runs first goes to files in its directory.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ssdtrain-fio-"))
        with _started(command, inherited, folder, output, errors) as process:
            if start is not None:
                start.release(len(jobs))
            huge_page_bytes = _wait(process, timeout_seconds, _SAMPLING_SECONDS if is_watched else timeout_seconds)
        output.seek(0)
        errors.seek(0)
        text, complaints = output.read(), errors.read().strip()
    if process.returncode != 0:
        complaints = complaints or _error_lines(text) or f"exit status {process.returncode}"
        raise FioError(f"fio failed: {complaints.splitlines()[-1]}", hint="run fio by hand on the same directory")
    return text, huge_page_bytes


class _Start:
    """Holds jobs back until all are ready: Note [One start]."""

    def __init__(self) -> None:
        self._ready, its_ready = os.pipe()
        its_go, self._go = os.pipe()
        self.inherited = (its_ready, its_go)
        self.options = (f"--exec_prerun=echo > /dev/fd/{its_ready}; read go < /dev/fd/{its_go}; true",)
        self._open = {self._ready, self._go, its_ready, its_go}

    def release(self, count: int) -> None:
        """Wait for ``count`` jobs, or the end of fio, or not longer than is reasonable; then let them go."""
        for fd in self.inherited:
            self._close(fd)
        deadline = time.monotonic() + _START_SECONDS
        try:
            while count > 0 and select.select([self._ready], [], [], max(0.0, deadline - time.monotonic()))[0]:
                said = os.read(self._ready, count)
                if not said:  # it has ended
                    break
                count -= len(said)
        finally:  # also after an interrupt: jobs that wait cannot be ended
            self._close(self._go)

    def close(self) -> None:
        for fd in list(self._open):
            self._close(fd)

    def _close(self, fd: int) -> None:
        self._open.remove(fd)
        os.close(fd)


@contextlib.contextmanager
def _started(
    command: list[str], fds: Collection[int], folder: str, output: IO[str], errors: IO[str]
) -> Iterator[subprocess.Popen[str]]:
    """Start fio; at the end it does not run any more."""
    tunables = [text for text in (os.environ.get("GLIBC_TUNABLES"), _HUGE_PAGE_TUNABLE) if text]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            pass_fds=tuple(fds),
            env={**os.environ, "GLIBC_TUNABLES": ":".join(tunables)},
            cwd=folder,
        )
    except OSError as error:
        raise FioError(f"cannot run fio: `{command[0]}` ({error.strerror})", hint="install fio again") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # fio ends its own processes then
            try:
                process.wait(_TERMINATION_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in (*_children(process.pid), process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen[str], timeout_seconds: float, sampling_seconds: float) -> int | None:
    """Wait for the end; return the most bytes in huge pages that were seen meanwhile."""
    deadline = time.monotonic() + timeout_seconds
    most: int | None = None
    while True:
        try:
            process.wait(sampling_seconds)
            return most
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                hint = "look for drive errors in `dmesg`"
                raise FioError(f"fio does not end: waited {timeout_seconds:.0f} s", hint=hint) from None
        seen = _huge_page_bytes_of_children(process.pid)
        if seen is not None:
            most = max(most or 0, seen)


def _children(pid: int) -> list[int]:
    """List the processes that fio has started, one a job."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    return []


def _huge_page_bytes_of_children(pid: int) -> int | None:
    total: int | None = None
    for child in _children(pid):
        with contextlib.suppress(OSError):  # it has just ended
            memory = Path(f"/proc/{child}/smaps_rollup").read_text("ascii")
            total = (total or 0) + sum(int(size) * KIB for size in _HUGE_PAGES_OF_PROCESS.findall(memory))
    return total


def _error_lines(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("fio:"))
