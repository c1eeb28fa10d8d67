"""What is left of host memory: the machine says one thing, the control groups another."""

import itertools
import os

import pytest

from ssdtrain_plugin.storage.memory_limit import HostMemory, available_host_bytes, host_memory
from ssdtrain_plugin.units import GIB, KIB, MIB

NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """Fake trees of /proc and of the control groups."""

    def __init__(self, folder):
        self.proc, self.cgroup = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroup.mkdir()

    def meminfo(self, available_bytes):
        text = f"MemTotal:  99999999 kB\nMemFree:  1 kB\nMemAvailable:   {available_bytes // KIB} kB\n"
        (self.proc / "meminfo").write_text(text)
        return self

    def member_of(self, *lines):
        (self.proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        return self

    def group(self, path, **files):
        folder = self.cgroup / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / f"memory.{name}").write_text(f"{value}\n")
        return self

    def left(self):
        return available_host_bytes(self.proc, self.cgroup)

    def look(self):
        return host_memory(self.proc, self.cgroup)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path).meminfo(64 * GIB)


def test_without_control_groups_the_machine_decides(machine):
    assert machine.left() == 64 * GIB
    assert machine.look() == HostMemory(64 * GIB, None, None, None)


def test_a_group_of_version_2_bounds_the_process(machine):
    machine.member_of("0::/job").group("job", max=10 * GIB, current=4 * GIB)
    assert machine.left() == 6 * GIB
    found = machine.look()
    assert (found.machine_bytes, found.group_limit_bytes) == (64 * GIB, 10 * GIB)
    assert found.group == str(machine.cgroup / "job")


def test_max_is_no_limit(machine):
    machine.member_of("0::/job").group("job", max="max", high="max", current=4 * GIB)
    assert machine.left() == 64 * GIB


def test_a_full_machine_bounds_a_roomy_group(machine):
    machine.meminfo(GIB).member_of("0::/job").group("job", max=10 * GIB, current=0)
    assert machine.left() == GIB


@pytest.mark.parametrize("tight", range(4))
def test_the_tightest_of_all_parents_counts(machine, tight):
    machine.member_of("0::/slice/job/step")
    for level, path in enumerate(("", "slice", "slice/job", "slice/job/step")):
        machine.group(path, max=(5 if level == tight else 50) * GIB, current=2 * GIB)
    assert machine.left() == 3 * GIB


def test_a_parent_without_the_files_is_passed_over(machine):
    machine.member_of("0::/slice/job").group("slice").group("job")
    machine.group("slice/job", max=5 * GIB, current=GIB)
    assert machine.left() == 4 * GIB


def test_memory_high_counts_too_because_beyond_it_the_process_sleeps(machine):
    machine.member_of("0::/job").group("job", max=10 * GIB, high=5 * GIB, current=GIB)
    assert machine.left() == 4 * GIB


def test_page_cache_that_nobody_uses_counts_as_free(machine):
    machine.member_of("0::/job").group(
        "job", max=10 * GIB, current=9 * GIB, stat=f"anon 1\ninactive_file {6 * GIB}\nactive_file {2 * GIB}"
    )
    assert machine.left() == 7 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(machine):
    machine.member_of("0::/job").group("job", max=GIB, current=2 * GIB)
    assert machine.left() == 0


def test_version_1_is_used_where_it_has_the_memory_controller(machine):
    machine.member_of("9:name=systemd:/", "4:cpu,memory:/job", "0::/other")
    machine.group("memory/job", limit_in_bytes=8 * GIB, usage_in_bytes=6 * GIB, stat=f"total_inactive_file {GIB}")
    machine.group("other", max=MIB, current=0)
    assert machine.left() == 3 * GIB


def test_no_limit_of_version_1_is_a_huge_number(machine):
    machine.member_of("4:memory:/job")
    machine.group("memory/job", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=GIB)
    assert machine.left() == 64 * GIB


def test_in_a_container_the_path_of_the_host_leads_to_the_root(machine):
    machine.member_of("0::/docker/abc").group("", max=3 * GIB, current=GIB)
    assert machine.left() == 2 * GIB


def test_a_path_out_of_the_namespace_stays_inside_the_tree(machine, tmp_path):
    (tmp_path / "memory.max").write_text("1\n")
    (tmp_path / "memory.current").write_text("0\n")
    machine.member_of("0::/../job").group("job", max=3 * GIB, current=GIB)
    assert machine.left() == 2 * GIB


@pytest.mark.parametrize("text", ["", "\n", "strange", "1:memory", "0::"])
def test_a_strange_list_of_groups_is_no_limit(machine, text):
    (machine.proc / "self" / "cgroup").write_text(text)
    assert machine.left() == 64 * GIB


@pytest.mark.parametrize("limit", ["", "-1", "many", "1.5"])
def test_a_strange_limit_is_none(machine, limit):
    machine.member_of("0::/job").group("job", max=limit, current=0)
    assert machine.left() == 64 * GIB


def test_a_kernel_that_does_not_say_has_what_is_installed(tmp_path):
    machine = Machine(tmp_path)
    assert machine.left() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_this_machine_has_some():
    assert 0 < available_host_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_more_bounds_never_leave_more(machine):
    lefts = [machine.left()]
    machine.member_of("0::/a/b/c")
    for path, nbytes in (("a", 40 * GIB), ("a/b/c", 30 * GIB), ("a/b", 20 * GIB)):
        machine.group(path, max=nbytes, current=0)
        lefts.append(machine.left())
    assert all(before > after for before, after in itertools.pairwise(lefts))
