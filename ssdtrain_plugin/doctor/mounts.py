"""The mount that holds a directory: which file system, from what, with which options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ssdtrain_plugin.doctor.findings import PROC_ROOT, Finding, unknown

__all__ = ["Mount", "find_mount", "mount_findings"]

_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))

_SLOW = "every block is copied on write and hashed, often compressed; use ext4 or xfs on the drive"
_HOST_MEMORY = "this is host memory, not a drive; `host_bytes` uses it with less work"
_NETWORK = "not a local drive; all ranks of all nodes share its bandwidth"
_ADVICE = {
    "btrfs": _SLOW,
    "zfs": _SLOW,
    "bcachefs": _SLOW,
    "overlay": "the writable layer of a container; mount a volume that lies on the drive",
    "tmpfs": _HOST_MEMORY,
    "ramfs": _HOST_MEMORY,
    **dict.fromkeys(("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "lustre", "gpfs", "beegfs"), _NETWORK),
}
# What an option does to us; None: worth showing, nothing to be done.
_OPTIONS = {
    "discard": None,
    "sync": "`sync` makes every write wait for the drive's cache to be flushed; mount without it",
    "dirsync": None,
    "data=journal": "`data=journal` writes everything twice and switches O_DIRECT off; mount with `data=ordered`",
    "nodatacow": None,
    "nodatasum": None,
}


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the kernel's list of mounts.

    Attributes:
        device_number: ``major:minor``; the major number is 0 for a file system without a block device of its own.
        point: Where it is mounted.
        file_system: Its type.
        source: What is mounted, often ``/dev/...``.
        options: Of the mount and of the file system.
    """

    device_number: str
    point: str
    file_system: str
    source: str
    options: tuple[str, ...]


def find_mount(path: str, *, proc_root: Path = PROC_ROOT) -> Mount | None:
    """Find the mount that holds a path: the longest mount point, the last of equals.

    Args:
        path: Relative or absolute.
        proc_root: Where ``/proc`` is.

    Returns:
        The mount, or None if the kernel's list cannot be read.
    """
    real = os.path.realpath(path)
    best: Mount | None = None
    try:
        lines = os.fsdecode((proc_root / "self" / "mountinfo").read_bytes()).splitlines()
    except OSError:
        return None
    for line in lines:
        mount = _parse(line)
        if mount is None:
            continue
        is_parent = mount.point == "/" or real == mount.point or real.startswith(mount.point + "/")
        if is_parent and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def _parse(line: str) -> Mount | None:
    left, _, right = line.partition(" - ")
    own, of_file_system = left.split(" "), right.split(" ")
    if len(own) < 6 or len(of_file_system) < 3:
        return None
    options = dict.fromkeys([*own[5].split(","), *of_file_system[2].split(",")])
    return Mount(own[2], _unescape(own[4]), of_file_system[0], _unescape(of_file_system[1]), tuple(options))


def _unescape(text: str) -> str:
    for code, character in _ESCAPES:
        text = text.replace(code, character)
    return text


def mount_findings(mount: Mount | None) -> list[Finding]:
    """Judge file system and mount options.

    Args:
        mount: From :func:`find_mount`.
    """
    if mount is None:
        return [unknown("file system", "the list of mounts cannot be read")]
    kind = mount.file_system
    advice = _ADVICE.get(kind)
    if advice is None and kind.startswith("fuse"):
        advice = "every transfer passes through a process in user space; use ext4 or xfs on the drive"
    findings = [Finding("file system", f"{kind}, mounted at {mount.point} from {mount.source}", advice)]
    known = [option for option in mount.options if option in _OPTIONS or option.startswith("compress")]
    advices = [advice for option in known if (advice := _OPTIONS.get(option))]
    if any(option.startswith("compress") for option in known):
        advices.append("compression costs CPU and gains little on activations; mount without it")
    if known:
        findings.append(Finding("mount options", ", ".join(known), "; ".join(advices) or None))
    return findings
