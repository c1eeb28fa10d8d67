"""A control group with a memory limit for one job, removed whatever happens; versions 1 and 2.

It is made beneath the group of this process, so that every bound of that holds for the
job too. Version 2 lets no group have both processes and limited groups beneath it; there
it is made beside the group of this process. :func:`group_problem` says why it cannot be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ControlGroup", "control_group", "group_problem"]

_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self/cgroup")
_GONE_SECONDS = 5.0


@dataclass(frozen=True)
class ControlGroup:
    """A group of ours.

    Attributes:
        folder: Its directory.
        home: That of the group of this process, to which one that went in may return.
        limit_file: What holds its limit.
        no_limit: What stands there without one.
        kills_file: What counts the processes that were killed for memory, in a line ``oom_kill N``.
    """

    folder: Path
    home: Path
    limit_file: str
    no_limit: str
    kills_file: str

    @property
    def num_killed(self) -> int:
        """Processes of the group that the kernel has ended for want of memory."""
        pairs = (line.split() for line in (self.folder / self.kills_file).read_text("ascii").splitlines())
        return sum(int(pair[1]) for pair in pairs if pair[0] == "oom_kill")

    def limit(self, nbytes: int | None) -> None:
        """Set the limit.

        Args:
            nbytes: At most so much memory; None: no bound of its own.

        Raises:
            OSError: The group already has more, and cannot give it back.
        """
        (self.folder / self.limit_file).write_text(self.no_limit if nbytes is None else str(nbytes), "ascii")

    def command(self, command: list[str]) -> list[str]:
        """Let a command start in the group.

        Args:
            command: Program and arguments.
        """
        procs = str(self.folder / "cgroup.procs")
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]

    def pids(self) -> list[int]:
        """List the processes in it."""
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text("ascii").split()]


def _group(name: str) -> ControlGroup:
    """Describe a group that is not there yet.

    Raises:
        OSError: There are no control groups, or none for memory.
    """
    unified = ""
    for line in _PROC.read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            home = _ROOT / "memory" / path.lstrip("/")
            return ControlGroup(home / name, home, "memory.limit_in_bytes", "-1", "memory.oom_control")
        unified = unified if controllers else path
    home = _ROOT / unified.lstrip("/")
    for parent in (home, home.parent) if home != _ROOT else (home,):
        if "memory" in (parent / "cgroup.subtree_control").read_text("ascii").split():
            return ControlGroup(parent / name, home, "memory.max", "max", "memory.events")
    raise OSError(errno.EOPNOTSUPP, "the memory controller is not handed on", str(home))


@contextlib.contextmanager
def control_group(limit_bytes: int | None) -> Iterator[ControlGroup]:
    """Make a group; when this ends, its processes have ended and it is gone.

    A tool calls ``job_processes.end_on_sigterm`` before, so that SIGTERM ends this too.

    Args:
        limit_bytes: Of memory, or None.

    Raises:
        OSError: It cannot be made here.
    """
    group = _group(f"ssdtrain-{uuid.uuid4().hex[:12]}")
    try:
        group.folder.mkdir()
        group.limit(limit_bytes)
        yield group
    finally:
        _remove(group)


def _remove(group: ControlGroup) -> None:
    deadline = time.monotonic() + _GONE_SECONDS
    while group.folder.exists():
        for pid in group.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            group.folder.rmdir()
        except OSError as error:  # the last process is not quite gone
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def group_problem() -> str | None:
    """Say why no process can be put into a group with a limit here, or None."""
    try:
        with control_group(1 << 30) as group:
            command = group.command(["/bin/true"])
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            said = " ".join(done.stderr.split())[-200:]
            return None if done.returncode == 0 else f"no process can enter a control group: {said}"
    except OSError as error:
        return f"no control group with a memory limit: {error.strerror} ({error.filename})"
