"""Who made a file, and whether that process has certainly ended."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ssdtrain_plugin.storage.owners import Owner, is_dead, new_name, owner_of, this_process

ME = Owner("a" * 32, 7, 100, 5000)


def proc_with(folder, stats):
    """Make a ``/proc`` with these lines as ``<pid>/stat``."""
    for pid, line in stats.items():
        (folder / str(pid)).mkdir(parents=True)
        (folder / str(pid) / "stat").write_text(line, encoding="utf-8")
    return folder


def stat_line(pid, ticks, *, command="python", state="S"):
    return f"{pid} ({command}) {state} 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {ticks} 1 1\n"


def test_a_name_tells_its_owner_and_nothing_that_can_be_foreseen():
    me = this_process()
    assert me.pid == os.getpid()
    names = {new_name(me) for _ in range(100)}
    assert len(names) == 100
    assert {owner_of(name) for name in names} == {me}
    assert owner_of(new_name(None)) is None


@pytest.mark.parametrize("name", ["", "ssdtrain-1", "checkpoint.pt", new_name(ME) + "x", "x" + new_name(ME)])
def test_other_names_have_no_owner(name):
    assert owner_of(name) is None


def test_this_process_and_its_child_are_alive_and_the_child_then_dead():
    me = this_process()
    assert not is_dead(me, me, is_local=True)
    code = "from ssdtrain_plugin.storage.owners import *; print(new_name(this_process())); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        owner = owner_of(child.stdout.readline().strip())
        assert owner.pid == child.pid
        assert not is_dead(owner, me, is_local=True)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_dead(owner, me, is_local=True), "it has ended, though nobody has waited for it"
    assert is_dead(owner, me, is_local=True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (stat_line(200, 6000), False),
        (stat_line(200, 6001), True),
        (stat_line(200, 6000, state="Z"), True),
        (stat_line(200, 6000, command="a) Z 1 (b"), False),
        ("", True),
    ],
    ids=["alive", "number used again", "zombie", "odd command", "nothing to read"],
)
def test_a_process_is_its_number_and_its_start(tmp_path, line, expected):
    proc = proc_with(tmp_path, {200: line})
    assert is_dead(replace(ME, pid=200, start_ticks=6000), ME, is_local=True, proc=proc) is expected


def test_who_cannot_be_seen_from_here_is_not_taken_for_dead(tmp_path):
    other_container = replace(ME, name_space=8, pid=200)
    assert not is_dead(other_container, ME, is_local=True, proc=tmp_path)
    other_boot = replace(ME, boot="b" * 32, pid=200)
    assert is_dead(other_boot, ME, is_local=True, proc=tmp_path), "this machine has restarted since"
    assert not is_dead(other_boot, ME, is_local=False, proc=tmp_path), "it may run on another machine"


def test_without_proc_nobody_is_known(tmp_path):
    assert this_process(tmp_path) is None
