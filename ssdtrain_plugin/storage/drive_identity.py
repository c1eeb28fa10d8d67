"""Which drive a directory is on, by a name that stays when device numbers and mount points change."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

__all__ = ["identity_of"]


def identity_of(path: str, *, sys_root: Path = Path("/sys"), dev_root: Path = Path("/dev")) -> str:
    """Name the drive, or the array, that holds a directory.

    The drive's own serial number where the kernel shows it, so that all partitions are one drive; else the
    identifier of the file system; else the device number, which may be another one after a restart.

    Args:
        path: An existing directory.
        sys_root: Where ``/sys`` is.
        dev_root: Where ``/dev`` is.

    Raises:
        OSError: The directory cannot be looked at.
    """
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    folder = sys_root / "dev" / "block" / number
    with contextlib.suppress(OSError):
        folder = folder.resolve()
        drive = folder.parent if (folder / "partition").exists() else folder
        for name in ("wwid", "device/wwid", "device/serial", "serial"):
            with contextlib.suppress(OSError):
                serial = " ".join((drive / name).read_text(encoding="utf-8", errors="replace").split())
                if serial:
                    return f"serial:{serial}"
    with contextlib.suppress(OSError):
        for link in sorted((dev_root / "disk" / "by-uuid").iterdir()):
            status = link.stat()
            if stat.S_ISBLK(status.st_mode) and status.st_rdev == device:
                return f"uuid:{link.name}"
    return f"device:{number}"
