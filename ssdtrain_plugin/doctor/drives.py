"""The drives behind a mount, through every layer of partitions, RAID, LVM and encryption.

Everything comes from ``/sys``, which shows it without root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssdtrain_plugin.doctor.findings import SYS_ROOT, Finding, chosen_word, first_line, unknown
from ssdtrain_plugin.doctor.mounts import Mount

__all__ = ["BlockDevice", "drive_findings", "find_device", "numa_nodes"]

_LAYERS = {"CRYPT": "encrypted by dm-crypt", "LVM": "LVM", "mpath": "several paths to one drive", "DMRAID": "BIOS RAID"}
_PARITY = frozenset({"raid4", "raid5", "raid6"})
_MIRRORS = frozenset({"raid1", "raid10"})
_VIRTUAL = ("vd", "xvd")
_NO_DRIVE = {
    "zram": "zram is compressed host memory, not a drive",
    "loop": "a loop device puts a second file system below; use a directory of the drive itself",
    "nbd": "a drive of another machine; use a local one",
    "rbd": "a drive of another machine; use a local one",
}
_OF_A_NETWORK = ("Amazon Elastic Block Store",)
_FINE_SCHEDULERS = frozenset({"none", "mq-deadline", "noop"})
_INSTEAD = "activations need no redundancy: use RAID 0, or name one directory per drive in `paths`"


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A block device and what it is made of.

    Attributes:
        name: As the kernel calls it.
        folder: Its directory in ``/sys``, resolved.
        layer: What it does with its parts, ``raid5`` for example; empty for a drive.
        parts: What it is made of; empty for a drive.
    """

    name: str
    folder: Path
    layer: str
    parts: tuple[BlockDevice, ...]

    def drives(self) -> Iterator[BlockDevice]:
        """Walk over the drives at the bottom, each once."""
        if not self.parts:
            yield self
        seen = set()
        for part in self.parts:
            for drive in part.drives():
                if drive.name not in seen:
                    seen.add(drive.name)
                    yield drive

    def layers(self) -> Iterator[BlockDevice]:
        """Walk over everything that is not a drive, from the top."""
        if self.parts:
            yield self
        for part in self.parts:
            yield from part.layers()


def find_device(mount: Mount, *, sys_root: Path = SYS_ROOT) -> BlockDevice | None:
    """Find the block device of a mount.

    Args:
        mount: Any.
        sys_root: Where ``/sys`` is.

    Returns:
        The device, or None: the file system has none (tmpfs, overlay, network), or names it in a way of its own (zfs).
    """
    if not mount.device_number.startswith("0:"):
        folder = sys_root / "dev" / "block" / mount.device_number
    elif mount.source.startswith("/dev/"):
        name = Path(mount.source).name
        folder = sys_root / "class" / "block" / name
        for mapped in sorted((sys_root / "class" / "block").glob("dm-*")):
            if first_line(mapped / "dm" / "name") == name:
                folder = mapped
    else:
        return None
    return _device(folder.resolve()) if folder.is_dir() else None


def _device(folder: Path) -> BlockDevice:
    if (folder / "partition").exists():
        folder = folder.parent
    slaves = folder / "slaves"
    parts = tuple(_device(slave.resolve()) for slave in sorted(slaves.iterdir())) if slaves.is_dir() else ()
    level = first_line(folder / "md" / "level")
    if level is None:
        kind = (first_line(folder / "dm" / "uuid") or "").partition("-")[0]
        level = _LAYERS.get(kind, "device mapper") if parts else ""
    return BlockDevice(folder.name, folder, level if parts else "", parts)


def numa_nodes(device: BlockDevice) -> frozenset[int]:
    """Return the NUMA nodes of the drives; -1 stands for a drive that is near no node in particular.

    Args:
        device: Any.
    """
    return frozenset(node for drive in device.drives() for node in _nodes_of(drive.folder))


def _nodes_of(folder: Path) -> list[int]:
    # With NVMe multipath the drive hangs under a subsystem, and only its controllers under PCI.
    below = sorted((folder / "device").glob("nvme*"))
    controllers = [path.resolve() for path in below if (path / "transport").exists()]
    nodes = []
    for start in (folder, *controllers):
        for place in (start, *start.parents):
            text = first_line(place / "numa_node")
            if text is not None and text.lstrip("-").isdecimal():
                nodes.append(int(text))
                break
    return nodes


def drive_findings(mount: Mount | None, device: BlockDevice | None) -> list[Finding]:
    """Judge the drives behind a directory.

    Args:
        mount: Of the directory.
        device: Of the mount.
    """
    if device is None:
        kind = "the mount" if mount is None else mount.file_system
        return [unknown("drive", f"{kind} shows no block device")]
    drives = list(device.drives())
    findings = [_drive_finding(drives)]
    layers = list(device.layers())
    if layers:
        findings.append(_layer_finding(layers))
    findings.append(_queue_finding(drives))
    return findings


def _drive_finding(drives: list[BlockDevice]) -> Finding:
    descriptions, advice = [], None
    for drive in drives:
        description, complaint = _judge(drive)
        descriptions.append(description)
        advice = advice or complaint
    return Finding("drive" if len(drives) == 1 else "drives", "; ".join(descriptions), advice)


def _judge(drive: BlockDevice) -> tuple[str, str | None]:
    """Describe a drive, and complain if it is none, is far away or rotates."""
    model = first_line(drive.folder / "device" / "model")
    transport = first_line(drive.folder / "device" / "transport")
    is_nvme = drive.name.startswith("nvme")
    is_virtual = drive.name.startswith(_VIRTUAL)
    words = [model or "no model name"]
    advice = next((text for prefix, text in _NO_DRIVE.items() if drive.name.startswith(prefix)), None)
    if is_nvme:
        words.append("NVMe" if transport in (None, "pcie") else f"NVMe over {transport}")
        if transport not in (None, "pcie") or (model or "").startswith(_OF_A_NETWORK):
            advice = "a drive at the other end of a network; use a local one"
    elif is_virtual:
        words.append("virtual")
    rotational = first_line(drive.folder / "queue" / "rotational")
    if rotational == "1" and not is_virtual:  # virtual drives often say so whatever is below
        words.append("rotating")
        advice = advice or "a rotating disk is far too slow; use an NVMe drive"
    return f"{drive.name} ({', '.join(words)})", advice


def _layer_finding(layers: list[BlockDevice]) -> Finding:
    facts, advices = [], []
    for layer in layers:
        count = f" of {len(layer.parts)}" if len(layer.parts) > 1 or layer.layer.startswith("raid") else ""
        facts.append(f"{layer.name}: {layer.layer}{count}")
        if layer.layer in _MIRRORS:
            advices.append(f"{layer.layer} writes every byte twice, and {_INSTEAD}")
        elif layer.layer in _PARITY:
            advices.append(f"{layer.layer} computes and writes parity, and {_INSTEAD}")
        elif layer.layer == "linear":
            advices.append("linear RAID uses one drive at a time; name one directory per drive in `paths`")
        elif layer.layer == _LAYERS["CRYPT"]:
            advices.append("dm-crypt encrypts every byte on the CPU; a directory outside of it is faster")
        elif layer.layer == _LAYERS["LVM"] and len(layer.parts) > 1:
            advices.append("whether LVM stripes over its drives shows to root only (`lvs --segments`); linear does not")
        if len(layer.parts) > len(list(layer.drives())):
            advices.append(f"several parts of {layer.name} are on one drive, so they do not add up")
    return Finding("array", "; ".join(facts), "; ".join(dict.fromkeys(advices)) or None)


def _queue_finding(drives: list[BlockDevice]) -> Finding:
    """Tell how requests reach the drives: those that are set alike are named once."""
    settings: dict[str, list[str]] = {}
    slow = set()
    for drive in drives:
        queue = drive.folder / "queue"
        scheduler = chosen_word(first_line(queue / "scheduler"))
        size, depth = first_line(queue / "max_sectors_kb"), first_line(queue / "nr_requests")
        if scheduler is None:
            settings.setdefault("unknown: not shown", []).append(drive.name)
            continue
        if scheduler not in _FINE_SCHEDULERS:
            slow.add(scheduler)
        text = f"scheduler {scheduler}, requests of up to {size or 'unknown'} KiB, {depth or 'unknown'} at once"
        settings.setdefault(text, []).append(drive.name)
    many = len(settings) > 1
    fact = "; ".join(f"{', '.join(names)}: {text}" if many else text for text, names in settings.items())
    advice = None
    if slow:
        advice = f"{', '.join(sorted(slow))} sorts requests, which costs CPU; set the scheduler to `none`, as root"
    return Finding("queue", fact, advice)
