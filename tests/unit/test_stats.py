"""Statistics of a step: names, JSON lines."""

import dataclasses
import json
import os
import stat

import pytest

from ssdtrain_plugin.errors import StorageError
from ssdtrain_plugin.stats import StatsWriter, StepCounter, StepStats


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
