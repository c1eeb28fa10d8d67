"""Mounts, drives and their place, read from fake trees of /proc and /sys."""

import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssdtrain_plugin.doctor.accelerators import Gpu, gds_finding, gpu_finding, placement_finding
from ssdtrain_plugin.doctor.drives import drive_findings, find_device, numa_nodes
from ssdtrain_plugin.doctor.findings import chosen_word
from ssdtrain_plugin.doctor.mounts import Mount, find_mount, mount_findings


class Machine:
    """Builds trees as the kernel lays them out."""

    def __init__(self, folder):
        self.proc, self.sys = folder / "proc", folder / "sys"
        (self.proc / "self").mkdir(parents=True)
        for name in ("dev/block", "class/block"):
            (self.sys / name).mkdir(parents=True)

    def mountinfo(self, *lines):
        (self.proc / "self" / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
        return self

    def write(self, folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
        return folder

    def block(self, name, number, *, place="devices/pci0000:00/0000:01:00.0/nvme/nvme0", slaves=(), **files):
        folder = self.write(self.sys / place / name, dev=number, **files)
        (folder / "slaves").mkdir(exist_ok=True)
        for slave in slaves:
            (folder / "slaves" / slave.name).symlink_to(slave)
        (self.sys / "dev" / "block" / number).symlink_to(folder)
        (self.sys / "class" / "block" / name).symlink_to(folder)
        return folder

    def nvme(self, index, *, node=0, model="Fast 1", transport="pcie", **files):
        slot = self.write(self.sys / f"devices/pci0000:0{index}/0000:0{index}:00.0", numa_node=node)
        controller = self.write(slot / f"nvme/nvme{index}", model=f"{model}   ", transport=transport)
        queue = {"queue__rotational": 0, "queue__scheduler": "[none] mq-deadline", "queue__max_sectors_kb": 128}
        files = {**queue, "queue__nr_requests": 1023, **files}
        place = controller.relative_to(self.sys)
        folder = self.block(f"nvme{index}n1", f"259:{index}", place=place, **files)
        (folder / "device").symlink_to(controller)
        return folder

    def virtual(self, name, number, *slaves, **files):
        return self.block(name, number, place="devices/virtual/block", slaves=slaves, **files)

    def look(self, number="259:0", *, kind="ext4", source="/dev/x"):
        mount = Mount(number, "/mnt", kind, source, ("rw",))
        device = find_device(mount, sys_root=self.sys)
        return {finding.name: finding for finding in drive_findings(mount, device)}, device


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# --- mounts


def test_the_longest_mount_point_wins_and_the_last_of_equals(machine, tmp_path):
    machine.mountinfo(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
        f"2 1 8:2 / {tmp_path} rw - ext4 /dev/sdb rw",
        f"3 1 8:3 / {tmp_path} rw,noatime shared:5 - xfs /dev/sdc rw,discard",
        f"4 1 8:4 / {tmp_path}x rw - ext4 /dev/sdd rw",
    )
    mount = find_mount(str(tmp_path / "new" / "folder"), proc_root=machine.proc)
    assert mount == Mount("8:3", str(tmp_path), "xfs", "/dev/sdc", ("rw", "noatime", "discard"))
    assert find_mount("/", proc_root=machine.proc).source == "/dev/sda1"


def test_a_mount_point_with_spaces(machine):
    machine.mountinfo("1 0 8:1 / /a\\040b\\134c rw - ext4 /dev/sda1 rw")
    assert find_mount("/a b\\c/d", proc_root=machine.proc).point == "/a b\\c"


@pytest.mark.parametrize("line", ["", "x", "1 2 3", "1 0 8:1 / / rw", "1 0 8:1 / / rw - ext4", " - "])
def test_a_strange_line_is_passed_over(machine, line):
    machine.mountinfo(line, "1 0 8:1 / / rw - ext4 /dev/sda1 rw")
    assert find_mount("/x", proc_root=machine.proc).file_system == "ext4"


def test_without_a_list_of_mounts_the_file_system_is_unknown(machine):
    assert find_mount("/", proc_root=machine.proc) is None
    (finding,) = mount_findings(None)
    assert finding.fact.startswith("unknown: ")


def judge(kind, *options):
    return {finding.name: finding for finding in mount_findings(Mount("8:1", "/m", kind, "/dev/x", options))}


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_good_file_system_needs_no_advice(kind):
    found = judge(kind, "rw", "relatime")
    assert found["file system"].advice is None
    assert "mount options" not in found


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("btrfs", "copied on write"),
        ("zfs", "copied on write"),
        ("overlay", "volume"),
        ("tmpfs", "host memory"),
        ("nfs4", "bandwidth"),
        ("lustre", "bandwidth"),
        ("fuse.sshfs", "user space"),
    ],
)
def test_another_file_system_gets_advice(kind, word):
    assert word in judge(kind, "rw")["file system"].advice


@pytest.mark.parametrize(
    ("option", "word"), [("sync", "flushed"), ("data=journal", "twice"), ("compress=zstd:3", "compression")]
)
def test_an_option_that_costs_gets_advice(option, word):
    finding = judge("ext4", "rw", option)["mount options"]
    assert word in finding.advice
    assert option in finding.fact


def test_discard_is_shown_without_advice():
    finding = judge("ext4", "rw", "discard")["mount options"]
    assert (finding.fact, finding.advice) == ("discard", None)


# --- drives


def test_a_partition_of_an_nvme_drive(machine):
    drive = machine.nvme(0, node=1)
    partition = machine.write(drive / "nvme0n1p1", partition=1)
    (machine.sys / "dev" / "block" / "259:9").symlink_to(partition)
    found, device = machine.look("259:9")
    assert found["drive"].fact == "nvme0n1 (Fast 1, NVMe)"
    assert found["queue"].fact == "scheduler none, requests of up to 128 KiB, 1023 at once"
    assert not any(finding.advice for finding in found.values())
    assert "array" not in found
    assert numa_nodes(device) == {1}


def test_a_number_that_sys_does_not_know_is_unknown(machine):
    found, device = machine.look("8:77")
    assert device is None
    assert found["drive"].fact.startswith("unknown: ext4")


@pytest.mark.parametrize("kind", ["tmpfs", "overlay", "zfs"])
def test_a_file_system_without_a_device_is_unknown(machine, kind):
    found, _ = machine.look("0:33", kind=kind, source=kind)
    assert kind in found["drive"].fact


def test_btrfs_has_a_number_of_its_own_and_is_found_by_name(machine):
    machine.nvme(0)
    found, _ = machine.look("0:33", kind="btrfs", source="/dev/nvme0n1")
    assert "nvme0n1" in found["drive"].fact


def test_a_mapped_device_is_found_by_its_name(machine):
    drive = machine.nvme(0)
    machine.virtual("dm-3", "252:3", drive, dm__name="group-scratch", dm__uuid="LVM-abc")
    found, _ = machine.look("0:33", kind="btrfs", source="/dev/mapper/group-scratch")
    assert found["array"].fact == "dm-3: LVM"
    assert "nvme0n1" in found["drive"].fact


@pytest.mark.parametrize(
    ("level", "word"),
    [
        ("raid0", None),
        ("raid1", "twice"),
        ("raid10", "twice"),
        ("raid5", "parity"),
        ("raid6", "parity"),
        ("linear", "one drive at a time"),
    ],
)
def test_raid(machine, level, word):
    machine.virtual("md0", "9:0", machine.nvme(0, node=0), machine.nvme(1, node=1), md__level=level)
    found, device = machine.look("9:0")
    assert found["array"].fact == f"md0: {level} of 2"
    assert (word is None and found["array"].advice is None) or word in found["array"].advice
    assert found["drives"].fact == "nvme0n1 (Fast 1, NVMe); nvme1n1 (Fast 1, NVMe)"
    assert numa_nodes(device) == {0, 1}


def test_layers_are_followed_to_the_bottom(machine):
    array = machine.virtual("md0", "9:0", machine.nvme(0), machine.nvme(1), md__level="raid0")
    crypt = machine.virtual("dm-0", "252:0", array, dm__uuid="CRYPT-LUKS2-1")
    machine.virtual("dm-1", "252:1", crypt, dm__uuid="LVM-x")
    found, device = machine.look("252:1")
    assert found["array"].fact == "dm-1: LVM; dm-0: encrypted by dm-crypt; md0: raid0 of 2"
    assert "dm-crypt" in found["array"].advice
    assert [drive.name for drive in device.drives()] == ["nvme0n1", "nvme1n1"]


def test_lvm_over_several_drives_may_be_linear(machine):
    machine.virtual("dm-1", "252:1", machine.nvme(0), machine.nvme(1), dm__uuid="LVM-x")
    found, _ = machine.look("252:1")
    assert "linear" in found["array"].advice


def test_two_partitions_of_one_drive_do_not_add_up(machine):
    drive = machine.nvme(0)
    halves = [machine.write(drive / f"nvme0n1p{index}", partition=index) for index in (1, 2)]
    machine.virtual("md0", "9:0", *halves, md__level="raid0")
    found, device = machine.look("9:0")
    assert "on one drive" in found["array"].advice
    assert [part.name for part in device.drives()] == ["nvme0n1"]


def test_a_rotating_disk_is_too_slow_but_a_virtual_one_only_says_that_it_rotates(machine):
    queue = {"queue__rotational": 1, "queue__scheduler": "[bfq] none"}
    machine.block("sda", "8:0", place="devices/pci0/ata1/block", device__model="Barracuda", **queue)
    machine.block("vda", "254:0", place="devices/pci0/virtio1/block", **queue)
    found, _ = machine.look("8:0")
    assert "rotating" in found["drive"].fact
    assert "too slow" in found["drive"].advice
    assert "bfq sorts" in found["queue"].advice
    found, _ = machine.look("254:0")
    assert found["drive"].fact == "vda (no model name, virtual)"
    assert found["drive"].advice is None


@pytest.mark.parametrize("drive", [{"model": "Amazon Elastic Block Store"}, {"transport": "tcp"}])
def test_a_drive_at_the_other_end_of_a_network(machine, drive):
    machine.nvme(0, **drive)
    found, _ = machine.look("259:0")
    assert "local" in found["drive"].advice


@pytest.mark.parametrize("name", ["zram0", "loop3", "nbd0", "rbd0"])
def test_what_is_no_drive_of_this_machine(machine, name):
    machine.virtual(name, "7:3")
    found, _ = machine.look("7:3")
    assert found["drive"].advice
    assert found["queue"].fact == "unknown: not shown"


def test_drives_that_are_set_differently_are_named(machine):
    drives = [machine.nvme(0), machine.nvme(1), machine.nvme(2, queue__scheduler="none [kyber]")]
    machine.virtual("md0", "9:0", *drives, md__level="raid0")
    found, _ = machine.look("9:0")
    assert found["queue"].fact.startswith("nvme0n1, nvme1n1: scheduler none")
    assert "nvme2n1: scheduler kyber" in found["queue"].fact
    assert "kyber sorts" in found["queue"].advice


def test_with_nvme_multipath_the_node_is_that_of_the_controllers(machine):
    machine.nvme(3, node=1)
    controller = machine.sys / "devices/pci0000:03/0000:03:00.0/nvme/nvme3"
    subsystem = machine.write(machine.sys / "devices/virtual/nvme-subsystem/nvme-subsys3", model="Fast 2")
    (subsystem / "nvme3").symlink_to(controller)
    folder = machine.block("nvme3n2", "259:30", place=subsystem.relative_to(machine.sys))
    (folder / "device").symlink_to(subsystem)
    _, device = machine.look("259:30")
    assert numa_nodes(device) == {1}


@pytest.mark.parametrize("text", ["", "many", "-"])
def test_a_strange_node_is_none(machine, text):
    machine.nvme(0, node=text)
    _, device = machine.look("259:0")
    assert numa_nodes(device) == frozenset()


@given(st.lists(st.sampled_from("abc-xyz"), min_size=1, max_size=5, unique=True), st.data())
def test_the_chosen_word(words, data):
    chosen = data.draw(st.sampled_from(words))
    assert chosen_word(" ".join(f"[{word}]" if word == chosen else word for word in words)) == chosen


def test_a_single_word_is_chosen_and_nothing_is_nothing():
    assert chosen_word("none") == "none"
    assert chosen_word("") is chosen_word(None) is None


# --- GPUs and their nodes


@pytest.fixture
def two_sockets(machine):
    for node in (0, 1):
        (machine.sys / f"devices/system/node/node{node}").mkdir(parents=True)
    (machine.sys / "devices/system/node/online").write_text("0-1\n")
    gpus = [Gpu(index, "H", f"0000:{index:02x}:00.0") for index in range(4)]
    for gpu in gpus:
        machine.write(machine.sys / "bus/pci/devices" / gpu.address, numa_node=gpu.index // 2)
    return machine.sys, gpus


def test_a_drive_is_near_to_the_gpus_of_its_node(two_sockets):
    sys_root, gpus = two_sockets
    finding = placement_finding({1}, gpus, sys_root=sys_root)
    assert finding.fact == "drive on node 1 of 2; near to GPU 2, 3; far from GPU 0, 1"
    assert finding.advice is None


def test_a_drive_that_is_far_from_every_gpu_gets_advice(two_sockets):
    sys_root, gpus = two_sockets
    assert "crosses" in placement_finding({0}, gpus[2:], sys_root=sys_root).advice


def test_an_array_over_two_nodes_gets_advice(two_sockets):
    sys_root, gpus = two_sockets
    finding = placement_finding({0, 1}, gpus, sys_root=sys_root)
    assert "several nodes" in finding.advice
    assert "far" not in finding.fact


@pytest.mark.parametrize("nodes", [set(), {-1}])
def test_a_drive_that_says_no_node_is_unknown(two_sockets, nodes):
    sys_root, gpus = two_sockets
    assert placement_finding(nodes, gpus, sys_root=sys_root).fact.startswith("unknown: ")


def test_on_one_node_everything_is_near(machine):
    (machine.sys / "devices/system/node/node0").mkdir(parents=True)
    assert "one node" in placement_finding({-1}, [], sys_root=machine.sys).fact


def test_gpus_without_an_address_or_a_node(two_sockets):
    sys_root, gpus = two_sockets
    strange = [gpus[3], Gpu(4, "H", None), Gpu(5, "H", "0000:ff:00.0")]
    assert gpu_finding(strange, sys_root=sys_root).fact == (
        "3: H, NUMA node 1; 4: H, NUMA node unknown; 5: H, NUMA node unknown"
    )
    assert placement_finding({0}, strange[1:], sys_root=sys_root).fact == "drive on node 0 of 2"
    assert gpu_finding([], sys_root=sys_root).fact.startswith("none")


# --- GPUDirect Storage


@pytest.fixture
def gds(monkeypatch):
    """Stand in for the module that knows the library."""
    module = types.ModuleType("gds")
    module.problem = module.reason = None
    module.gds_problem = lambda device: module.problem
    module.compatibility_reason = lambda: module.reason
    monkeypatch.setitem(sys.modules, "ssdtrain_plugin.storage.gds", module)
    return module


CUDA = torch.device("cuda", 0)


def mounted(kind="ext4", *options):
    return Mount("259:0", "/m", kind, "/dev/nvme0n1", options)


def test_without_a_gpu_the_library_is_not_even_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssdtrain_plugin.storage.gds", None)  # an import of it would raise
    assert gds_finding(torch.device("cpu"), mounted()).fact.startswith("not available: no GPU")


def test_gds_that_is_not_there_gives_the_reason(gds, machine):
    gds.problem = "no kvikio"
    assert gds_finding(CUDA, mounted(), proc_root=machine.proc).fact == "not available: no kvikio"


def test_compatibility_mode_is_not_called_real(gds, machine):
    gds.reason = "no driver"
    fact = gds_finding(CUDA, mounted(), proc_root=machine.proc).fact
    assert fact == "compatibility mode, through host memory: no driver (no nvidia-fs module)"


def test_real_gds_names_the_driver(gds, machine):
    machine.write(machine.proc / "driver" / "nvidia-fs", version="2.30")
    finding = gds_finding(CUDA, mounted("xfs"), proc_root=machine.proc)
    assert (finding.fact, finding.advice) == ("real, as far as can be told (nvidia-fs 2.30)", None)


@pytest.mark.parametrize(
    ("mount", "word"), [(mounted("btrfs"), "ext4 or xfs"), (mounted("ext4", "data=writeback"), "data=ordered")]
)
def test_real_gds_on_a_mount_that_it_does_not_serve_gets_advice(gds, machine, mount, word):
    assert word in gds_finding(CUDA, mount, proc_root=machine.proc).advice
