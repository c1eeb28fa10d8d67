"""Which process made a file, written in the file's name, and whether that process still lives.

A process number alone says nothing: numbers are used again, in other containers by others,
and after a restart by anybody. Boot, name space of process numbers, number and start time
together name one process for ever.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PROC", "Owner", "is_dead", "new_name", "owner_of", "this_process"]

PROC = Path("/proc")

_NAME = re.compile(r"ssdtrain-([0-9a-f]{32})-(\d+)-(\d+)-(\d+)-[0-9a-f]{32}")
_START_TIME_FIELD = 22 - 3  # of /proc/<pid>/stat, counted from the field behind the command


@dataclass(frozen=True, slots=True)
class Owner:
    """A process.

    Attributes:
        boot: Of the kernel that it runs on, 32 hexadecimal digits.
        name_space: Of its number.
        pid: Its number.
        start_ticks: When it began, in clock ticks since the boot.
    """

    boot: str
    name_space: int
    pid: int
    start_ticks: int


def this_process(proc: Path = PROC) -> Owner | None:
    """Tell who we are.

    Args:
        proc: Where ``/proc`` is.

    Returns:
        None if the kernel does not say.
    """
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
        name_space = os.stat(proc / "self/ns/pid").st_ino
    except (OSError, UnicodeDecodeError):
        return None
    ticks = _start_ticks(os.getpid(), proc)
    if ticks is None or re.fullmatch("[0-9a-f]{32}", boot) is None:
        return None
    return Owner(boot, name_space, os.getpid(), ticks)


def _start_ticks(pid: int, proc: Path) -> int | None:
    """Read when a process began; None: there is none with that number, or it has ended and waits for its parent."""
    try:
        text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a command may hold spaces and parentheses
    if len(fields) <= _START_TIME_FIELD or fields[0] in ("Z", "X"):
        return None
    return int(fields[_START_TIME_FIELD])


def new_name(owner: Owner | None) -> str:
    """Make a file name that nobody can foresee and that says whose it is.

    Args:
        owner: From :func:`this_process`; a file of nobody is never taken for stale.
    """
    token = secrets.token_hex(16)
    if owner is None:
        return f"ssdtrain-{token}"
    return f"ssdtrain-{owner.boot}-{owner.name_space}-{owner.pid}-{owner.start_ticks}-{token}"


def owner_of(name: str) -> Owner | None:
    """Read the owner in a name; None if it is none of :func:`new_name`.

    Args:
        name: Of a file.
    """
    match = _NAME.fullmatch(name)
    return None if match is None else Owner(match[1], int(match[2]), int(match[3]), int(match[4]))


def is_dead(owner: Owner, me: Owner, *, is_local: bool, proc: Path = PROC) -> bool:
    """Tell whether a process has certainly ended. In doubt it lives.

    Args:
        owner: The one asked about.
        me: This process.
        is_local: The file system serves this machine only: then who is of another boot
            is gone, else it may run on another machine.
        proc: Where ``/proc`` is.
    """
    if owner.boot != me.boot:
        return is_local
    if owner.name_space != me.name_space:
        return False  # another container, whose processes do not show here
    return _start_ticks(owner.pid, proc) != owner.start_ticks
