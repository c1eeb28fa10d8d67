"""One directory, looked at from all sides: what it is, what it can do, how fast it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssdtrain_plugin.doctor.accelerators import gds_finding, placement_finding, training_device, visible_gpus
from ssdtrain_plugin.doctor.drives import drive_findings, find_device, numa_nodes
from ssdtrain_plugin.doctor.findings import PROC_ROOT, SYS_ROOT, Finding
from ssdtrain_plugin.doctor.measurement import EXTENT_BYTES, Bandwidth, Progress, measure
from ssdtrain_plugin.doctor.mounts import find_mount, mount_findings
from ssdtrain_plugin.doctor.wear import wear_findings
from ssdtrain_plugin.errors import StorageError
from ssdtrain_plugin.storage.engines import choose_engine
from ssdtrain_plugin.storage.probe import DirectoryReport, directory_problem, probe_directory
from ssdtrain_plugin.units import format_bytes, format_rate

__all__ = ["Diagnosis", "examine"]

_DEFAULT_FREE_FRACTION = 0.95  # as the extent file has it; a test compares


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is known of one directory.

    Attributes:
        path: As given.
        is_usable: Activations can be offloaded to it.
        problem: Why not, or None.
        directory: What it can do, or None if it cannot be looked at.
        bandwidth: What was measured, or None.
        engine: What ``io_engine: auto`` picks, or None.
        engine_reason: Why that one.
        findings: What was found out about file system, drives and their place.
        verdict: One line.
    """

    path: str
    is_usable: bool
    problem: str | None
    directory: DirectoryReport | None
    bandwidth: Bandwidth | None
    engine: str | None
    engine_reason: str
    findings: tuple[Finding, ...]
    verdict: str

    @property
    def advices(self) -> tuple[str, ...]:
        """What is to be done, one sentence each."""
        return tuple(finding.advice for finding in self.findings if finding.advice)


def examine(
    path: str,
    *,
    nbytes: int,
    threads: int = 4,
    progress: Progress | None = None,
    rated_bytes: int | None = None,
    proc_root: Path = PROC_ROOT,
    sys_root: Path = SYS_ROOT,
) -> Diagnosis:
    """Probe a directory and measure it. Leaves nothing behind.

    Args:
        path: A directory.
        nbytes: Bytes to write, clipped to a quarter of the free space and rounded to whole
            extents; at least one extent.
        threads: Transfers at once.
        progress: Told after every transfer.
        rated_bytes: Endurance of a drive by its data sheet (TBW), or None.
        proc_root: Where ``/proc`` is.
        sys_root: Where ``/sys`` is.
    """
    problem = directory_problem(path)
    if problem is not None:
        return _unusable(path, problem, None)
    try:
        directory = probe_directory(path)
    except OSError as error:  # it went away between the two
        return _unusable(path, f"`{path}`: {error.strerror}", None)
    extents = max(1, min(nbytes, directory.free_bytes // 4) // EXTENT_BYTES)
    try:
        bandwidth = measure(path, extents, threads, progress or (lambda phase, done, total: None))
    except StorageError as error:
        return _unusable(path, error.message, directory)
    findings = tuple(_findings(path, directory, rated_bytes, proc_root, sys_root))
    engine, engine_reason = choose_engine("auto", training_device())
    rates = (
        f"{format_rate(bandwidth.write_bytes_per_second)} write, {format_rate(bandwidth.read_bytes_per_second)} read"
    )
    has_reservations = any(finding.advice for finding in findings)
    return Diagnosis(
        path=path,
        is_usable=True,
        problem=None,
        directory=directory,
        bandwidth=bandwidth,
        engine=engine,
        engine_reason=engine_reason,
        findings=findings,
        verdict=f"usable{', with reservations' if has_reservations else ''}: {rates}",
    )


def _unusable(path: str, problem: str, directory: DirectoryReport | None) -> Diagnosis:
    return Diagnosis(path, False, problem, directory, None, None, "", (), f"not usable: {problem}")


def _findings(
    path: str, directory: DirectoryReport, rated_bytes: int | None, proc_root: Path, sys_root: Path
) -> list[Finding]:
    mount = find_mount(path, proc_root=proc_root)
    device = None if mount is None else find_device(mount, sys_root=sys_root)
    nodes = frozenset() if device is None else numa_nodes(device)
    return [
        *mount_findings(mount),
        *drive_findings(mount, device),
        *wear_findings(path, device, rated_bytes),
        placement_finding(nodes, visible_gpus(), sys_root=sys_root),
        *_directory_findings(directory),
        gds_finding(training_device(), mount, proc_root=proc_root),
    ]


def _directory_findings(directory: DirectoryReport) -> list[Finding]:
    """Turn what the probe tried into findings."""
    advice = None
    if not directory.supports_direct:
        advice = "bytes go through the page cache, and the rates below are those of host memory"
    nameless = "yes" if directory.supports_tmpfile else "no; a file has a name for a moment, in a directory of our own"
    limit_bytes = int(directory.free_bytes * _DEFAULT_FREE_FRACTION)
    space = f"{format_bytes(directory.free_bytes)} of {format_bytes(directory.total_bytes)}"
    return [
        Finding("O_DIRECT", f"{'yes' if directory.supports_direct else 'no'}: {directory.direct_reason}", advice),
        Finding("O_TMPFILE", nameless),
        Finding("free space", f"{space}; `disk_bytes` of a rank would be {format_bytes(limit_bytes)}"),
    ]
