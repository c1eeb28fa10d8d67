"""Where the accelerators are, seen from the drives: NUMA nodes, and GPUDirect Storage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ssdtrain_plugin.doctor.findings import PROC_ROOT, SYS_ROOT, Finding, first_line, unknown
from ssdtrain_plugin.doctor.mounts import Mount

__all__ = ["Gpu", "gds_finding", "gpu_finding", "placement_finding", "training_device", "visible_gpus"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use.

    Attributes:
        index: As CUDA counts them; of the ones in ``CUDA_VISIBLE_DEVICES``, where that is set.
        name: Of the model.
        address: On the PCI bus, for example ``0000:3b:00.0``; None if torch does not say.
    """

    index: int
    name: str
    address: str | None


def training_device() -> torch.device:
    """Return what a training on this machine would use: the GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def visible_gpus() -> list[Gpu]:
    """List the GPUs that this process may use; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        # Releases before 2.8 know no address.
        domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
        address = None if bus is None else f"{domain:04x}:{bus:02x}:{slot:02x}.0"
        gpus.append(Gpu(index, properties.name, address))
    return gpus


def _node_of(gpu: Gpu, sys_root: Path) -> int | None:
    """Return the NUMA node of a GPU, -1 for none in particular, None if nobody says."""
    if gpu.address is None:
        return None
    text = first_line(sys_root / "bus" / "pci" / "devices" / gpu.address / "numa_node")
    return int(text) if text is not None and text.lstrip("-").isdecimal() else None


def gpu_finding(gpus: Sequence[Gpu], *, sys_root: Path = SYS_ROOT) -> Finding:
    """Tell which GPUs there are and at which node.

    Args:
        gpus: From :func:`visible_gpus`.
        sys_root: Where ``/sys`` is.
    """
    if not gpus:
        return Finding("GPUs", "none that torch can use")
    facts = [f"{gpu.index}: {gpu.name}, {_node_text(_node_of(gpu, sys_root))}" for gpu in gpus]
    return Finding("GPUs", "; ".join(facts))


def _node_text(node: int | None) -> str:
    if node is None:
        return "NUMA node unknown"
    return f"NUMA node {node}" if node >= 0 else "no NUMA node"


def placement_finding(drive_nodes: Collection[int], gpus: Sequence[Gpu], *, sys_root: Path = SYS_ROOT) -> Finding:
    """Tell which GPUs are as near to the drives as can be.

    Args:
        drive_nodes: NUMA nodes of the drives, -1 for none in particular.
        gpus: From :func:`visible_gpus`.
        sys_root: Where ``/sys`` is.
    """
    name = "NUMA node"
    num_nodes = len(list((sys_root / "devices" / "system" / "node").glob("node[0-9]*")))
    if num_nodes == 1:
        return Finding(name, "the machine has one node: every drive is near")
    known = sorted(node for node in drive_nodes if node >= 0)
    if not known:
        return unknown(name, "the drive does not say")
    where = f"drive on node {' and '.join(map(str, known))}" + (f" of {num_nodes}" if num_nodes else "")
    near = [str(gpu.index) for gpu in gpus if _node_of(gpu, sys_root) in known]
    far = [str(gpu.index) for gpu in gpus if (node := _node_of(gpu, sys_root)) is not None and node not in known]
    if near:
        where += f"; near to GPU {', '.join(near)}"
    if far:
        where += f"; far from GPU {', '.join(far)}"
    advice = None
    if far and not near:
        advice = "every transfer crosses the link between the sockets; use a drive on the node of the GPU"
    elif len(known) > 1:
        advice = "the drives are on several nodes; one array, or one list in `paths`, per node keeps transfers near"
    return Finding(name, where, advice)


def gds_finding(device: torch.device, mount: Mount | None, *, proc_root: Path = PROC_ROOT) -> Finding:
    """Tell whether the drive and the device memory exchange bytes without host memory between them.

    Args:
        device: Where the activations would be.
        mount: Of the directory.
        proc_root: Where ``/proc`` is.
    """
    name = "GPUDirect Storage"
    if device.type != "cuda":
        return Finding(name, "not available: no GPU that torch can use")
    # It loads the library, which takes long.
    from ssdtrain_plugin.storage.gds import compatibility_reason, gds_problem

    problem = gds_problem(device)
    if problem is not None:
        return Finding(name, f"not available: {problem}")
    driver = first_line(proc_root / "driver" / "nvidia-fs" / "version")
    module = "no nvidia-fs module" if driver is None else f"nvidia-fs {driver}"
    reason = compatibility_reason()
    if reason is not None:
        return Finding(name, f"compatibility mode, through host memory: {reason} ({module})")
    fact = f"real, as far as can be told ({module})"
    advice = None
    if mount is not None and mount.file_system not in ("ext4", "xfs"):
        advice = f"a local file system must be ext4 or xfs for it; this is {mount.file_system}"
    elif mount is not None and mount.file_system == "ext4" and {"data=journal", "data=writeback"} & set(mount.options):
        advice = "ext4 must be mounted with `data=ordered` for it"
    return Finding(name, fact, advice)
