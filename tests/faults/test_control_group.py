"""A control group that is smaller than `host_bytes`: fewer bytes go to host memory, and nobody is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import control_groups
import pytest
from control_groups import control_group, group_problem
from group_worker import LAYER_BYTES, NUM_LAYERS
from job_processes import ROOT, run_processes

WORKER = ROOT / "tests" / "faults" / "group_worker.py"
LIMIT_BYTES = 512 << 20


@pytest.fixture
def groups():
    problem = group_problem()
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_host_memory_grows_no_further_than_the_group_allows_and_nobody_is_killed(groups, tmp_path, monkeypatch):
    # By default the allocator keeps what a CPU tensor has freed, and the process grows by all that it has saved.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    drive, log, results = tmp_path / "drive", tmp_path / "log", tmp_path / "result.json"
    drive.mkdir()
    with control_group(LIMIT_BYTES) as group:
        command = [sys.executable, str(WORKER), str(drive), str(group.folder), str(results)]
        finished = run_processes(command, log, limit_seconds=150)
        num_killed = group.num_killed
    assert (finished.code, num_killed) == (0, 0), log.read_text()
    found = json.loads(results.read_text())
    assert found["is_equal"]
    assert 0 < found["host_bytes"] < LIMIT_BYTES < NUM_LAYERS * LAYER_BYTES
    assert found["stored_bytes"] > 0, "the rest goes to the drive"
    assert found["failures"] == {}, "a budget that is used up is none"
    assert log.read_text().count("host memory is short") == 1
    assert list(drive.iterdir()) == []


def test_a_group_goes_when_its_tool_is_ended(groups):
    """Also by SIGTERM, and with the processes in it: a group that has one cannot be removed."""
    code = """
import subprocess
from control_groups import control_group
from job_processes import end_on_sigterm
end_on_sigterm()
with control_group(1 << 30) as group:
    child = subprocess.Popen(group.command(["sleep", "60"]))
    while group.pids() != [child.pid]:
        assert child.poll() is None
    print(group.folder, flush=True)
    child.wait()
"""
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as tool:
        folder = tool.stdout.readline().strip()
        assert Path(folder).is_dir()
        tool.send_signal(signal.SIGTERM)  # the child does not hear of it
        assert tool.wait(30) == 128 + signal.SIGTERM
    assert not Path(folder).exists()


def test_what_is_in_a_group_ends_with_it(groups):
    with control_group(1 << 30) as group:
        child = subprocess.Popen(group.command(["sleep", "60"]))
        while group.pids() != [child.pid]:
            assert child.poll() is None
    assert child.wait(30) == -signal.SIGKILL
    assert not group.folder.exists()


# ---------------------------------------------------------------------- where it is made


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Fake control groups; `member_of` says where this process is."""
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "_PROC", tmp_path / "proc")

    def member_of(*lines, handed_on=()):
        (tmp_path / "proc").write_text("".join(f"{line}\n" for line in lines))
        for folder in (tmp_path / "a" / "b", tmp_path / "a", tmp_path):
            folder.mkdir(parents=True, exist_ok=True)
            text = "cpu memory\n" if folder.relative_to(tmp_path).as_posix() in handed_on else "\n"
            (folder / "cgroup.subtree_control").write_text(text)

    return member_of


def test_version_1_is_beneath_our_own_group(tree, tmp_path):
    tree("4:memory:/a/b", "0::/")
    group = control_groups._group("x")
    assert group.folder == tmp_path / "memory" / "a" / "b" / "x"
    assert group.limit_file == "memory.limit_in_bytes"


@pytest.mark.parametrize(("handed_on", "parent"), [("a/b", "a/b"), ("a", "a")])
def test_version_2_is_where_the_controller_is_handed_on(tree, tmp_path, handed_on, parent):
    tree("0::/a/b", handed_on=(handed_on,))
    group = control_groups._group("x")
    assert group.folder == tmp_path / parent / "x"
    assert group.home == tmp_path / "a" / "b"
    assert group.limit_file == "memory.max"


def test_where_it_cannot_be_made_it_is_said(tree, tmp_path, monkeypatch):
    tree("0::/a/b")
    assert "the memory controller is not handed on" in group_problem()
    monkeypatch.setattr(control_groups, "_PROC", tmp_path / "missing")
    assert "No such file" in group_problem()
