"""What a result file says of the machine and the software. No names of hosts or users."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ssdtrain_plugin.units import KIB, format_bytes

__all__ = ["MachineFacts", "machine_facts"]

_PACKAGES = ("ssdtrain-plugin", "torch", "deepspeed", "trl", "torchtune")


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """A machine and what is installed on it.

    Attributes:
        processor: As the kernel names it.
        cores: That this process may use.
        memory_bytes: Of the host.
        gpu: Its name; empty on the CPU.
        system: Of Linux: distribution and kernel.
        python: Its version.
        versions: Of packages that matter, by name; those that are not installed are missing.
        load_average: Processes that ran or wanted to, over the minute before the run.
    """

    processor: str
    cores: int
    memory_bytes: int
    gpu: str
    system: str
    python: str
    versions: dict[str, str]
    load_average: float

    def sentences(self) -> str:
        """Set it out for a result file."""
        gpu = f", {self.gpu}" if self.gpu else ", no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cores} cores of {self.processor}, {format_bytes(self.memory_bytes)}{gpu}, {self.system}. "
            f"Python {self.python}, {versions}. Load average before the run: {self.load_average:.1f}."
        )


def machine_facts(device: torch.device) -> MachineFacts:
    """Look at this machine.

    Args:
        device: Where training runs.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return MachineFacts(
        processor=_line_of("/proc/cpuinfo", "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=int((_line_of("/proc/meminfo", "MemTotal") or "0").split()[0]) * KIB,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        system=f"{_distribution()}, kernel {platform.release()}",
        python=platform.python_version(),
        versions={**versions, "torch": torch.__version__},
        load_average=os.getloadavg()[0],
    )


def _line_of(path: str, field: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()
