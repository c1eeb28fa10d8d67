"""Statistics of a step: names, JSON lines."""

import dataclasses
import json
import logging
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from ssdtrain_plugin import stats
from ssdtrain_plugin.errors import StorageError
from ssdtrain_plugin.report.reading import read_run
from ssdtrain_plugin.stats import StatsWriter, StepCounter, StepStats, open_lines
from ssdtrain_plugin.trace import Trace


def test_a_counter_freezes_to_stats_with_the_same_numbers():
    counter = StepCounter(stored_bytes=3, stall_seconds=0.5)
    counter.failures["ssd: EIO"] += 2
    stats = counter.freeze(step=4, rank=1, plan="p")
    assert (stats.step, stats.rank, stats.plan, stats.stored_bytes, stats.stall_seconds) == (4, 1, "p", 3, 0.5)
    assert stats.failures == {"ssd: EIO": 2}
    counter.failures["ssd: EIO"] += 1
    assert stats.failures == {"ssd: EIO": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.step = 5


def test_every_field_stands_in_its_line():
    stats = StepCounter().freeze(step=0, rank=0, plan="none")
    assert set(json.loads(stats.to_json())) == {field.name for field in dataclasses.fields(StepStats)}
    assert "\n" not in stats.to_json()


def test_the_writer_appends_and_flushes(tmp_path):
    directory = tmp_path / "new" / "folder"
    for step in range(2):
        writer = StatsWriter(str(directory), 3)
        writer.write(StepCounter().freeze(step=step, rank=3, plan="x"))
        lines = (directory / "rank3.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))
        writer.close()
        writer.close()
        writer.write(StepCounter().freeze(step=9, rank=3, plan="x"))
    assert len((directory / "rank3.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_the_file_is_its_owners_alone_and_no_link_is_followed(tmp_path):
    before = os.umask(0)
    try:
        StatsWriter(str(tmp_path / "new"), 0).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "rank0.jsonl").stat().st_mode) == 0o600
    precious = tmp_path / "precious"
    precious.write_text("kept", encoding="ascii")
    (tmp_path / "rank1.jsonl").symlink_to(precious)
    with pytest.raises(StorageError, match=r"cannot open the statistics.*symbolic links"):
        StatsWriter(str(tmp_path), 1)
    assert precious.read_text(encoding="ascii") == "kept"


def open_both(directory):
    """Open what lies under `rank0.jsonl` and `rank0.trace.jsonl`; the errors."""
    found = []
    for open_one in (
        lambda: StatsWriter(str(directory), 0),
        lambda: Trace(str(directory), 0, first_step=0, num_steps=1, device="cpu"),
    ):
        try:
            open_one().close()
        except StorageError as error:
            found.append(error)
    return found


def names_in(directory):
    return directory / "rank0.jsonl", directory / "rank0.trace.jsonl"


def refused(directory, why):
    errors = open_both(directory)
    assert len(errors) == 2
    for error, path in zip(errors, names_in(directory), strict=True):
        assert f"cannot open the statistics: `{path}` ({why}" in error.message
        assert error.hint == "remove what is there, or name another directory in `stats_path`"


@pytest.mark.timeout(60)
def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    for path in names_in(tmp_path):
        os.mkfifo(path)
    refused(tmp_path, "no regular file")


def test_a_socket_and_a_directory_are_refused(tmp_path):
    first, second = names_in(tmp_path)
    second.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(first))
        assert len(open_both(tmp_path)) == 2


def test_a_file_with_a_second_name_is_refused_and_left_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept", encoding="ascii")
    for path in names_in(tmp_path):
        os.link(precious, path)
    refused(tmp_path, "a file with 3 names")
    assert precious.read_text(encoding="ascii") == "kept"


def test_a_file_that_everybody_may_change_is_refused(tmp_path):
    for path in names_in(tmp_path):
        path.touch()
        path.chmod(0o666)
    refused(tmp_path, "mode 0666, every user may change it")


def test_a_file_of_another_user_is_refused(tmp_path, monkeypatch):
    for path in names_in(tmp_path):
        path.touch()
    ours = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
    assert open_both(tmp_path) == [], "where a file that we make has that number, it is ours"

    def refuse(**_):
        raise PermissionError

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    refused(tmp_path, f"a file of user {ours}")


def test_a_file_of_our_own_making_is_ours_whatever_mode_the_file_system_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "_problem_of", lambda found, directory: "mode 0777, every user may change it")
    with open_lines(tmp_path / "rank0.jsonl") as file:
        file.write("{}\n")
    with pytest.raises(StorageError, match="mode 0777"):
        open_lines(tmp_path / "rank0.jsonl")


def test_a_file_made_for_a_monitor_is_appended_to(tmp_path):
    for path in names_in(tmp_path):
        path.touch()
        path.chmod(0o664)
    assert open_both(tmp_path) == []
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o664 for path in names_in(tmp_path))


def test_a_part_of_a_line_does_not_take_the_next_run_with_it(tmp_path):
    for step in range(2):
        writer = StatsWriter(str(tmp_path), 0)
        writer.write(StepCounter().freeze(step=step, rank=0, plan="x"))
        writer.close()
        path, trace = names_in(tmp_path)
        if step == 0:
            for each in (path, trace):
                with each.open("a", encoding="utf-8") as file:
                    file.write('{"step": 7, "ra')
    open_both(tmp_path)
    run = read_run(tmp_path)
    assert [each.step for each in run.ranks[0].steps] == [0, 1]
    assert [problem.partition(": left out")[0] for problem in run.problems] == [
        "rank0.jsonl, line 2",
        "rank0.trace.jsonl, line 1",
    ]
    assert run.ranks[0].start is not None


def test_a_full_drive_ends_the_file_and_not_the_training(tmp_path, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    writer = StatsWriter(str(tmp_path), 5)
    writer._file.close()
    writer._file = open("/dev/full", "a", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="ssdtrain_plugin"):
        for step in range(2):
            writer.write(StepCounter().freeze(step=step, rank=5, plan="x"))
        writer.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"statistics of rank 5 are no longer written: `{tmp_path}/rank5.jsonl` (No space left on device); hint: make "
        "room there, or name another directory in `stats_path`; training is not affected"
    )


def test_a_drive_that_fails_when_the_file_is_closed_is_said(tmp_path, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    writer = StatsWriter(str(tmp_path), 5)
    writer._file.close()
    writer._file = open("/dev/full", "a", encoding="utf-8")
    writer._file.write("left in the buffer")
    with caplog.at_level(logging.WARNING, logger="ssdtrain_plugin"):
        writer.close()
        writer.close()
    assert caplog.text.count("statistics of rank 5 are no longer written") == 1
