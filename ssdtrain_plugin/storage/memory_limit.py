"""How much host memory this process may still take: the machine's, and that of every control group around it.

A container or a job sees the memory of the whole machine in ``/proc/meminfo``, but is
killed at the limit of its control group. Both have to be asked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ssdtrain_plugin.units import KIB

__all__ = ["HostMemory", "available_host_bytes", "host_memory"]

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What is left, and which bound is the tightest.

    Attributes:
        machine_bytes: Left on the machine: ``MemAvailable``; all of its memory where the kernel does not say.
        group_bytes: Left in the tightest control group; None without a limit.
        group_limit_bytes: The limit of that group, or None.
        group: Its directory, or None.
    """

    machine_bytes: int
    group_bytes: int | None
    group_limit_bytes: int | None
    group: str | None

    @property
    def available_bytes(self) -> int:
        """What may still be taken, never negative."""
        return self.machine_bytes if self.group_bytes is None else min(self.machine_bytes, self.group_bytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of one version of control groups."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


# memory.high does not kill, but a process beyond it is put to sleep until pages are reclaimed.
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available_host_bytes(proc_root: Path = _PROC, cgroup_root: Path = _CGROUP) -> int:
    """Count the host memory that this process may still take.

    Args:
        proc_root: Where ``/proc`` is.
        cgroup_root: Where the control groups are mounted.

    Returns:
        The smaller one of ``MemAvailable`` and what the limits of the control groups leave.
    """
    return host_memory(proc_root, cgroup_root).available_bytes


def host_memory(proc_root: Path = _PROC, cgroup_root: Path = _CGROUP) -> HostMemory:
    """Look at the machine and at every control group around this process.

    The page cache that a group has not touched lately (``inactive_file``) counts as
    free: the kernel gives it up before it kills.

    Args:
        proc_root: Where ``/proc`` is.
        cgroup_root: Where the control groups are mounted.
    """
    machine_bytes = _fields(proc_root / "meminfo").get("MemAvailable:")
    if machine_bytes is None:
        machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        machine_bytes *= KIB
    bounds = list(_bounds(proc_root, cgroup_root))
    if not bounds:
        return HostMemory(machine_bytes, None, None, None)
    left_bytes, limit_bytes, group = min(bounds)
    return HostMemory(machine_bytes, left_bytes, limit_bytes, group)


def _bounds(proc_root: Path, cgroup_root: Path) -> list[tuple[int, int, str]]:
    """Return bytes left, limit and directory of every group that has a limit."""
    found = []
    files, root, path = _place(proc_root, cgroup_root)
    for group in _up_to(root, path):
        limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
        used_bytes = _number(group / files.usage)
        if not limits or used_bytes is None:
            continue
        used_bytes -= _fields(group / "memory.stat").get(files.reclaimable, 0)
        # Nothing can be left of more than a group may have; version 1 writes "no limit" as a huge number.
        found.append((max(min(limits) - used_bytes, 0), min(limits), str(group)))
    return found


def _place(proc_root: Path, cgroup_root: Path) -> tuple[_Files, Path, str]:
    """Return which version holds the memory controller, where it is mounted, and our group in it."""
    path = "/"
    for line in _lines(proc_root / "self" / "cgroup"):
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            return _VERSION_1, cgroup_root / "memory", group
        if not controllers:
            path = group
    return _VERSION_2, cgroup_root, path


def _up_to(root: Path, path: str) -> list[Path]:
    """Return the directories of a group and of its parents, the root last.

    Inside a container the path may be that of the host, which is not to be seen there; the
    container's own group is the root then.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    return [folder for end in range(len(parts), -1, -1) if (folder := root.joinpath(*parts[:end])).is_dir()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a group without this controller, or no /proc at all
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None  # "max": no limit


def _fields(path: Path) -> dict[str, int]:
    """Read lines of a name and a whole number."""
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) >= 2 and pair[1].isdecimal()}
