"""Memory, limits and permissions, each from what the system says or refuses."""

import errno
import resource
import signal
import subprocess

import pytest

from ssdtrain_plugin.doctor import examine_machine
from ssdtrain_plugin.doctor.machine import (
    file_limit_finding,
    huge_page_finding,
    io_uring_finding,
    locked_memory_finding,
    memory_finding,
)
from ssdtrain_plugin.units import GIB, KIB, MIB


def test_this_machine_can_be_looked_at():
    found = examine_machine()
    assert [finding.name for finding in found] == [
        "GPUs",
        "host memory",
        "huge pages",
        "memlock limit",
        "file limits",
        "io_uring",
        "Megatron",
        "NVIDIA apex",
    ]
    assert all(finding.fact for finding in found)


def test_nothing_fails_where_proc_and_sys_are_empty(tmp_path):
    assert len(examine_machine(proc_root=tmp_path, sys_root=tmp_path)) == 8


# --- memory


def fake_memory(folder, available_bytes, limit_bytes=None):
    proc, cgroup = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemAvailable: {available_bytes // KIB} kB\n")
    cgroup.mkdir()
    if limit_bytes is not None:
        (proc / "self" / "cgroup").write_text("0::/\n")
        (cgroup / "memory.max").write_text(f"{limit_bytes}\n")
        (cgroup / "memory.current").write_text("0\n")
    return proc, cgroup


def test_the_machine_bounds_memory(tmp_path):
    finding = memory_finding(*fake_memory(tmp_path, 64 * GIB))
    assert finding.fact.startswith("64.0 GiB available; `host_bytes`")
    assert finding.advice is None


def test_a_control_group_bounds_memory_and_is_named(tmp_path):
    proc, cgroup = fake_memory(tmp_path, 64 * GIB, 8 * GIB)
    assert f"8.0 GiB available, left of the limit of 8.0 GiB of {cgroup}" in memory_finding(proc, cgroup).fact


def test_a_roomy_control_group_is_not_named(tmp_path):
    assert "limit" not in memory_finding(*fake_memory(tmp_path, 4 * GIB, 8 * GIB)).fact


def test_little_memory_gets_advice(tmp_path):
    assert memory_finding(*fake_memory(tmp_path, GIB)).advice


def test_huge_pages(tmp_path):
    assert huge_page_finding(tmp_path).fact.startswith("unknown: ")
    folder = tmp_path / "kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text("always [madvise] never\n")
    assert huge_page_finding(tmp_path).fact == "madvise, as staging memory asks for them"
    (folder / "defrag").write_text("always defer [never]\n")
    assert huge_page_finding(tmp_path).fact.endswith("; defrag never")
    (folder / "enabled").write_text("always madvise [never]\n")
    assert "halve" in huge_page_finding(tmp_path).advice


# --- limits


def test_memory_that_may_be_locked():
    assert locked_memory_finding(resource.RLIM_INFINITY).fact == "none"
    assert locked_memory_finding(8 * MIB).fact.startswith("8.0 MiB, ")


@pytest.mark.parametrize(
    ("size_bytes", "count", "words"),
    [
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
        (resource.RLIM_INFINITY, 1024, None),
        (1 << 50, 1024, None),
        (GIB, 1024, ["ulimit -f"]),
        (resource.RLIM_INFINITY, 64, ["ulimit -n"]),
        (GIB, 64, ["ulimit -f", "ulimit -n"]),
    ],
)
def test_limits_of_files(size_bytes, count, words):
    advice = file_limit_finding(size_bytes, count).advice
    assert (advice is None) == (words is None)
    assert all(word in advice for word in words or ())


# --- io_uring


@pytest.mark.parametrize(
    ("setting", "outcome", "words"),
    [
        ("0", errno.EFAULT, "allowed; "),
        ("0", errno.EINVAL, "allowed; "),
        ("2", errno.EPERM, "not allowed: kernel.io_uring_disabled is 2"),
        ("0", errno.EPERM, "not allowed: a seccomp filter"),
        (None, errno.EPERM, "not allowed: a seccomp filter"),
        (None, errno.ENOSYS, "not allowed: the kernel has none"),
        ("0", -signal.SIGSYS, "not allowed: a seccomp filter ends"),
        ("0", errno.EIO, "unknown: "),
        ("0", -signal.SIGKILL, "unknown: the call ended with signal 9"),
    ],
)
def test_io_uring_is_tried(tmp_path, setting, outcome, words):
    (tmp_path / "sys/kernel").mkdir(parents=True)
    if setting is not None:
        (tmp_path / "sys/kernel/io_uring_disabled").write_text(f"{setting}\n")
    assert io_uring_finding(tmp_path, lambda: outcome).fact.startswith(words)


@pytest.mark.parametrize("error", [OSError("no process"), subprocess.TimeoutExpired("x", 1.0)])
def test_io_uring_that_cannot_be_tried_is_unknown(tmp_path, error):
    def fails():
        raise error

    assert io_uring_finding(tmp_path, fails).fact.startswith("unknown: ")


def test_the_attempt_itself_ends_in_an_answer():
    fact = io_uring_finding(examine_machine.__kwdefaults__["proc_root"]).fact
    assert fact.startswith(("allowed", "not allowed"))
