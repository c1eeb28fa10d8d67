"""What was written to a drive: by us, as our own record says, and by all, as the drive says where it may be asked."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ssdtrain_plugin.doctor.drives import BlockDevice
from ssdtrain_plugin.doctor.findings import Finding, unknown
from ssdtrain_plugin.storage.drive_identity import identity_of
from ssdtrain_plugin.storage.wear import WearFile, life_line, state_folder
from ssdtrain_plugin.units import format_bytes

__all__ = ["Health", "parse_health", "wear_findings"]

_NVME_IOCTL_ADMIN_CMD = 0xC0484E41
_GET_LOG_PAGE = 0x02
_HEALTH_LOG = 0x02
_LOG_BYTES = 512
_ALL_NAME_SPACES = 0xFFFFFFFF
_UNIT_BYTES = 512_000
_NAME_SPACE = re.compile(r"(nvme\d+)n\d+")


class _AdminCommand(ctypes.Structure):
    """``struct nvme_admin_cmd`` of ``linux/nvme_ioctl.h``."""

    _fields_ = (
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint16),
        ("name_space", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("metadata_bytes", ctypes.c_uint32),
        ("data_bytes", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Health:
    """What an NVMe drive says of itself.

    Attributes:
        used_percent: Of its rated life; may be over 100.
        written_bytes: By its host, in its whole life.
    """

    used_percent: int
    written_bytes: int


def parse_health(log: bytes) -> Health:
    """Read the log page "SMART / health information" of an NVMe drive.

    Args:
        log: 512 bytes.

    Raises:
        ValueError: It is shorter.
    """
    if len(log) < _LOG_BYTES:
        raise ValueError(f"log: {len(log)} bytes (expected {_LOG_BYTES})")
    return Health(log[5], int.from_bytes(log[48:64], "little") * _UNIT_BYTES)


def _ask(drive: str, dev_root: Path) -> Health | str:
    """Ask a drive; return why not if that fails. Needs root."""
    match = _NAME_SPACE.fullmatch(drive)
    if match is None:
        return f"{drive} is no NVMe drive"
    log = ctypes.create_string_buffer(_LOG_BYTES)
    command = _AdminCommand(
        opcode=_GET_LOG_PAGE,
        name_space=_ALL_NAME_SPACES,
        address=ctypes.addressof(log),
        data_bytes=_LOG_BYTES,
        cdw10=_HEALTH_LOG | (_LOG_BYTES // 4 - 1) << 16,
    )
    try:
        fd = os.open(dev_root / match[1], os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = fcntl.ioctl(fd, _NVME_IOCTL_ADMIN_CMD, command)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{match[1]}: {error.strerror}; root may ask"
    return parse_health(log.raw) if status == 0 else f"{match[1]}: refused with status {status:#x}"


def wear_findings(
    path: str, device: BlockDevice | None, rated_bytes: int | None, *, dev_root: Path = Path("/dev")
) -> list[Finding]:
    """Say what was written and how long the drive lasts.

    Args:
        path: An existing directory.
        device: That it is on, if it is known.
        rated_bytes: Endurance of the drive by its data sheet (TBW), or None.
        dev_root: Where ``/dev`` is.
    """
    findings = [_recorded(path, rated_bytes)]
    for drive in () if device is None else device.drives():
        health = _ask(drive.name, dev_root)
        if isinstance(health, str):
            findings.append(unknown("wear", health))
        else:
            written = f"{drive.name}: {health.used_percent} % of its life used, {format_bytes(health.written_bytes)}"
            advice = "its rated life is over; replace it" if health.used_percent >= 100 else None
            findings.append(Finding("wear", f"{written} written by all in its life", advice))
    return findings


def _recorded(path: str, rated_bytes: int | None) -> Finding:
    folder = state_folder(os.environ)
    if folder is None:
        return unknown("written by us", "this user has no home directory")
    try:
        record = WearFile(folder).read().get(identity_of(path))
    except (OSError, ValueError) as error:
        return unknown("written by us", f"`{folder}`: {error}")
    if record is None:
        return Finding("written by us", "nothing so far")
    fact = f"{format_bytes(record.total_bytes)} since {record.since}, {format_bytes(record.bytes_a_day())} a day of use"
    return Finding("written by us", fact if rated_bytes is None else f"{fact}; {life_line(record, rated_bytes)}")
