"""What happened in one step, in bytes and seconds. Observes; decides nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from ssdtrain_plugin.errors import StorageError

__all__ = ["WARM_UP_STEPS", "StatsWriter", "StepCounter", "StepStats", "open_lines"]

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
"""The first step pays for the extent file and the staging memory; the second shows what the run will be like."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of one rank.

    Attributes:
        step: Number of the step, from 0.
        rank: Global rank of the process.
        microbatches: Micro-batches whose forward ran.
        stored_bytes: Bytes written to the drive, from device memory or spilled from the host tier.
        loaded_bytes: Bytes brought back to device memory, from the drive or the host tier.
        forwarded_bytes: Offloaded bytes handed back from memory, without a read.
        deduplicated_bytes: Saves of a storage that was already known.
        kept_bytes: Bytes that stayed in device memory, by decision or because a store failed.
        host_bytes: Bytes copied from device memory to the host tier.
        peak_activation_bytes: Live saved bytes in device memory, at their highest. What a
            checkpointed region saves while backward recomputes it is not seen.
        saved_bytes: What would have been live without the plugin, at its highest.
        num_loads_on_demand: Loads that no prefetch had started when backward asked.
        stall_seconds: Time that training waited for transfers, both directions.
        store_seconds: Time that workers spent in stores and in spills, summed over threads.
        load_seconds: Time that workers spent in loads, summed over threads. What is promoted
            from the drive to the host tier counts in neither its bytes nor its seconds.
        forward_seconds: Host time in forward passes.
        backward_seconds: Host time in backward passes.
        failures: What went wrong, by cause: failed or refused stores, failed loads and
            promotions, attempts that another one made good, and space that a drive did not take
            back, as often as each happened; and once a step each tier that was passed over
            (left alone, or at its daily limit).
        plan: The policy's decision in one line.
    """

    step: int
    rank: int
    microbatches: int
    stored_bytes: int
    loaded_bytes: int
    forwarded_bytes: int
    deduplicated_bytes: int
    kept_bytes: int
    host_bytes: int
    peak_activation_bytes: int
    saved_bytes: int
    num_loads_on_demand: int
    stall_seconds: float
    store_seconds: float
    load_seconds: float
    forward_seconds: float
    backward_seconds: float
    failures: dict[str, int]
    plan: str

    def to_json(self) -> str:
        """Write one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(slots=True)
class StepCounter:
    """The running numbers of the present step. Guarded by the lock of its owner."""

    microbatches: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    forwarded_bytes: int = 0
    deduplicated_bytes: int = 0
    kept_bytes: int = 0
    host_bytes: int = 0
    peak_activation_bytes: int = 0
    saved_bytes: int = 0
    num_loads_on_demand: int = 0
    stall_seconds: float = 0.0
    store_seconds: float = 0.0
    load_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    def freeze(self, *, step: int, rank: int, plan: str) -> StepStats:
        """Close the step.

        Args:
            step: Its number.
            rank: Global rank of the process.
            plan: The policy's one line.
        """
        values = {name: getattr(self, name) for name in self.__slots__}
        values["failures"] = dict(self.failures)
        return StepStats(step=step, rank=rank, plan=plan, **values)


def open_lines(path: Path) -> IO[str]:
    """Open a file of statistics for appending, in a directory that is created if it is missing.

    Its name can be foreseen, so somebody may have been there first. A new file is readable by its
    owner only. A file that is there already is appended to and keeps its mode, if it is a regular
    file of ours that nobody else may change; no link is followed, and nothing is waited for.

    Args:
        path: Of the file.

    Raises:
        StorageError: It cannot be opened, or is none of ours.
    """
    # To be read too, for its last byte. Without O_NONBLOCK a FIFO is opened when its other side is.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        path.parent.mkdir(mode=0o775, parents=True, exist_ok=True)
        fd, is_new = _open(path, flags)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, fd)
            found = os.fstat(fd)
            problem = None if is_new else _problem_of(found, path.parent)
            if problem is not None:
                raise _cannot_open(path, problem, None)
            is_cut = found.st_size > 0 and os.pread(fd, 1, found.st_size - 1) != b"\n"
            on_failure.pop_all()
    except OSError as error:
        raise _cannot_open(path, error.strerror or str(error), error.errno) from error
    file = os.fdopen(fd, "a", encoding="utf-8")
    if is_cut:
        file.write("\n")  # a run that was killed, or met a full drive, has left a part of a line
    return file


def _open(path: Path, flags: int) -> tuple[int, bool]:
    """Open a file; tell whether we made it: some file systems show modes of their own."""
    try:
        return os.open(path, flags | os.O_EXCL, 0o600), True
    except FileExistsError:
        return os.open(path, flags, 0o600), False


def _problem_of(found: os.stat_result, directory: Path) -> str | None:
    """Say what is wrong with a file that is there already, or None."""
    if not stat.S_ISREG(found.st_mode):
        return "no regular file"
    if found.st_uid != os.geteuid() and found.st_uid != _number_in(directory):
        return f"a file of user {found.st_uid}"
    if found.st_nlink != 1:
        return f"a file with {found.st_nlink} names"
    if found.st_mode & stat.S_IWOTH:
        return f"mode {stat.S_IMODE(found.st_mode):04o}, every user may change it"
    return None


def _number_in(directory: Path) -> int | None:
    """Tell whose a file is that we make in a directory: a network file system may call us otherwise."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def _cannot_open(path: Path, problem: str, error_number: int | None) -> StorageError:
    return StorageError(
        f"cannot open the statistics: `{path}` ({problem}, expected a regular file of our own, with one name, "
        "that nobody else may change, or none)",
        errno=error_number,
        path=str(path),
        hint="remove what is there, or name another directory in `stats_path`",
    )


class StatsWriter:
    """Appends StepStats to ``<directory>/rank<N>.jsonl``, a line a step, until the drive takes no more.

    Args:
        directory: Created if it is missing.
        rank: Global rank of the process.

    Raises:
        StorageError: The file cannot be opened, see :func:`open_lines`.
    """

    def __init__(self, directory: str, rank: int) -> None:
        """Open the file for appending."""
        self._rank = rank
        self._path = Path(directory) / f"rank{rank}.jsonl"
        self._file: IO[str] | None = open_lines(self._path)

    def write(self, stats: StepStats) -> None:
        """Append one line and flush it, so that a killed run keeps its last step; a failure ends the file, not the run.

        Args:
            stats: The step.
        """
        if self._file is None:
            return
        try:
            self._file.write(stats.to_json() + "\n")
            self._file.flush()
        except OSError as error:
            self._complain(error)
            self._let_go()

    def close(self) -> None:
        """Close the file; a failure is said and not raised. Calling it twice does nothing."""
        error = self._let_go()
        if error is not None:
            self._complain(error)

    def _let_go(self) -> OSError | None:
        """Close the file, once; return what the system said to it."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()  # also when it fails, and it does where a line is left that could not be written
        except OSError as error:
            return error
        return None

    def _complain(self, error: OSError) -> None:
        logger.warning(
            "statistics of rank %d are no longer written: `%s` (%s); hint: make room there, or name another directory "
            "in `stats_path`; training is not affected",
            self._rank,
            self._path,
            error.strerror or error,
        )
