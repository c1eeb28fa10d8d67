"""fio beside us: the same block, depth, direction and number of bytes, in the same place.

fio is the judge of what a drive can do, so it gets what we have: buffers in huge
pages, O_DIRECT, a file whose blocks are allocated and were written before, and no
work on the contents of its buffers.

Note [The same file]. fio opens ``/dev/fd/N``, a descriptor of ours that it inherits:
the extent file itself. Two files on one drive can differ by a fifth, by where they
lie; so a file of its own would measure the place and not us. And the file was never
given a name, so nothing is left however this process or fio ends.

Note [Huge pages for fio]. fio asks for huge pages only where the administrator has
reserved some (``mem=mmaphuge``). Otherwise it takes its buffers from malloc, and a
tunable of the C library makes malloc ask for transparent ones (``fio_process``).
Whether fio got them is looked up in ``/proc`` while it runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssdtrain_plugin.bench.fio_process import FioError, run_process
from ssdtrain_plugin.units import GIB, KIB, MIB

__all__ = [
    "FioError",
    "FioJob",
    "FioProgram",
    "Sample",
    "find_fio",
    "parse_fio",
    "run_fio",
    "with_working_engine",
]

# Not `--rw=read`: then nothing fills the buffers beforehand, and page faults are measured.
_READ = ("--rw=rw", "--rwmixread=100")
_ENGINES = ("io_uring", "libaio", "psync")  # the first that works is used
_HUGE_PAGE_BYTES = 2 * MIB
_PAGE_BYTES = 4 * KIB
_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed pass, ours or fio's.

    Attributes:
        nbytes: Bytes moved, in both directions together.
        seconds: From the first transfer's start to the last one's end.
        cpu_seconds: User and system time of the process, all threads, meanwhile.
    """

    nbytes: int
    seconds: float
    cpu_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Throughput."""
        return self.nbytes / max(self.seconds, 1e-9)

    @property
    def cpu_seconds_per_gib(self) -> float:
        """Processor time for each GiB moved."""
        return self.cpu_seconds / max(self.nbytes / GIB, 1e-9)


@dataclass(frozen=True, slots=True)
class FioProgram:
    """fio as it is installed.

    Attributes:
        path: The program.
        version: For example ``fio-3.33``.
        engines: Of those that we would use, the ones that its build knows; the best first
            is used.
    """

    path: str
    version: str
    engines: tuple[str, ...]

    @property
    def engine(self) -> str:
        """The engine to use."""
        return self.engines[0]


@dataclass(frozen=True, slots=True)
class FioJob:
    """What one process of fio does.

    Attributes:
        fd: A file of ours, which fio inherits.
        is_write: Otherwise it reads.
        offset: First byte.
        nbytes: Bytes to move, in order.
        is_direct: Past the page cache.
    """

    fd: int
    is_write: bool
    offset: int
    nbytes: int
    is_direct: bool = True


def find_fio() -> FioProgram | None:
    """Find fio and ask it what it can do.

    Returns:
        The program, or None if there is none or it does not start.
    """
    path = shutil.which("fio")
    if path is None:
        return None
    try:
        path = os.path.abspath(path)  # it runs in another directory
        version = _ask(path, "--version").strip()
        known = {line.strip() for line in _ask(path, "--enghelp").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None
    engines = tuple(engine for engine in _ENGINES if engine in known)
    return FioProgram(path, version, engines) if engines else None


def _ask(path: str, option: str) -> str:
    answer = subprocess.run([path, option], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True)
    return answer.stdout


def with_working_engine(program: FioProgram, job: FioJob, block_bytes: int) -> FioProgram:
    """Leave out the engines that the system refuses: containers often forbid io_uring.

    Args:
        program: From :func:`find_fio`.
        job: To try them with.
        block_bytes: Size of one transfer.

    Raises:
        FioError: None works; the last one's error.
    """
    try:
        run_fio(program, [job], block_bytes=block_bytes, depth=1)
    except FioError:
        if len(program.engines) == 1:
            raise
        return with_working_engine(replace(program, engines=program.engines[1:]), job, block_bytes)
    return program


def run_fio(
    program: FioProgram, jobs: Sequence[FioJob], *, block_bytes: int, depth: int, is_watched: bool = False
) -> tuple[Sample, int | None]:
    """Run jobs at the same time and wait for their end.

    Args:
        program: From :func:`find_fio`.
        jobs: At least one.
        block_bytes: Size of one transfer.
        depth: Transfers at once of each job.
        is_watched: Look at its memory while it runs, which disturbs it a little.

    Returns:
        The bytes and processor time of all jobs over the time of the longest; and how
        many bytes of fio's memory were in huge pages, or None if nobody watched or it
        ended too soon to see.

    Raises:
        FioError: fio failed, hung, or moved another number of bytes.
    """
    jobs = [part for job in jobs for part in _split(job, program.engine, block_bytes, depth)]
    expected_bytes = sum(job.nbytes for job in jobs)
    depth = 1 if program.engine == "psync" else depth
    memory_bytes = len(jobs) * (depth * block_bytes + 2 * _HUGE_PAGE_BYTES)
    arguments = [
        [*_options(number, job, program.engine, block_bytes, depth), *_memory_options(memory_bytes)]
        for number, job in enumerate(jobs)
    ]
    fds = {job.fd for job in jobs}
    text, huge_page_bytes = run_process(program.path, arguments, fds, nbytes=expected_bytes, is_watched=is_watched)
    sample = parse_fio(text)
    if sample.nbytes != expected_bytes:
        raise FioError(f"fio moved {sample.nbytes} bytes (expected {expected_bytes})", hint="update fio")
    return sample, huge_page_bytes


def _split(job: FioJob, engine: str, block_bytes: int, depth: int) -> list[FioJob]:
    """Give a synchronous engine its depth by as many processes, each with a part of the bytes."""
    if engine != "psync":
        return [job]
    blocks = job.nbytes // block_bytes
    bounds = [round(blocks * part / depth) * block_bytes for part in range(depth)] + [job.nbytes]
    return [
        replace(job, offset=job.offset + begin, nbytes=end - begin)
        for begin, end in itertools.pairwise(bounds)
        if begin < end
    ]


def _options(number: int, job: FioJob, engine: str, block_bytes: int, depth: int) -> list[str]:
    return [
        f"--name=job{number}",
        f"--filename=/dev/fd/{job.fd}",
        "--allow_file_create=0",
        "--fallocate=none",
        *(("--rw=write",) if job.is_write else _READ),
        f"--offset={job.offset}",
        f"--size={job.nbytes}",
        f"--bs={block_bytes}",
        f"--iodepth={depth}",
        f"--ioengine={engine}",
        f"--direct={int(job.is_direct)}",
        "--scramble_buffers=0",  # by default it writes into each buffer before each transfer
        "--refill_buffers=0",
    ]


def _memory_options(nbytes: int) -> list[str]:
    """See Note [Huge pages for fio]."""
    if _reserved_huge_page_bytes() >= nbytes:
        return ["--mem=mmaphuge"]
    # malloc's block starts some bytes after a huge page does, and fio skips to the next
    # page and then by this. So each transfer starts where a huge page does.
    return [f"--mem_align={_HUGE_PAGE_BYTES - _PAGE_BYTES}"]


def _reserved_huge_page_bytes() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^HugePages_Free:\s+(\d+)$", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
        size = re.search(r"^Hugepagesize:\s+(\d+) kB$", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
        if found and size and int(size.group(1)) * KIB == _HUGE_PAGE_BYTES:
            return int(found.group(1)) * _HUGE_PAGE_BYTES
    return 0


def parse_fio(text: str) -> Sample:
    """Read what ``fio --output-format=json`` has printed.

    Args:
        text: One JSON object; notes may stand before it.

    Returns:
        Bytes and processor time of all jobs, over the time of the longest.

    Raises:
        FioError: It is not that, or a job reports an error.
    """
    try:
        report = json.loads(text[text.index("{") :])
        jobs = report["jobs"]
        faults = [f"{job['jobname']}: {os.strerror(job['error'])}" for job in jobs if job["error"]]
        directions = [job[direction] for job in jobs for direction in ("read", "write")]
        nbytes = sum(int(direction["io_bytes"]) for direction in directions)
        seconds = max(float(direction["runtime"]) for direction in directions) / 1e3
        cpu_seconds = sum(
            (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100 * float(job["job_runtime"]) / 1e3 for job in jobs
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FioError(f"cannot read what fio printed: {error!r}", hint="update fio") from error
    if faults:
        raise FioError(f"fio failed: {'; '.join(faults)}", hint="run fio by hand on the same directory")
    return Sample(nbytes, seconds, cpu_seconds)
