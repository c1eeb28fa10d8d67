"""What is attached can be taken off again, and says what it did."""

import gc
import json
import logging
import os
import threading

import pytest
import torch
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin import runtime
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.preflight import check, find_local_rank, prepare
from ssdtrain_plugin.runtime import build


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x).exp().sum()


def options(tmp_path, **changes):
    return ssdtrain.OffloadConfig(**({"paths": [str(tmp_path)], "policy": "all", "min_tensor_bytes": 1} | changes))


def step(model):
    model(torch.randn(4, 16)).backward()


def test_attach_steps_report_detach(tmp_path):
    model = Model()
    offloader = ssdtrain.attach(model, options(tmp_path))
    for _ in range(3):
        step(model)
        stats = offloader.end_step()
        assert stats.microbatches == 1
        assert stats.saved_bytes > 0
    text = offloader.report()
    assert "3 steps" in text
    assert str(tmp_path) in text
    offloader.detach()
    offloader.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    step(model)


def test_steps_end_by_themselves(tmp_path):
    model = Model()
    with ssdtrain.attach(model, options(tmp_path)) as offloader:
        for _ in range(4):
            step(model)
        # The last step has no forward after it; the report ends it.
        assert "4 steps" in offloader.report()
        assert "4 steps" in offloader.report()


def test_the_context_manager_detaches_after_an_exception(tmp_path):
    model = Model()
    step(model)
    with pytest.raises(ValueError, match="on purpose"), ssdtrain.attach(model, options(tmp_path)):
        raise ValueError("on purpose")
    assert not model._forward_hooks


def test_disabled_is_as_if_it_were_not_there(tmp_path):
    model = Model()
    with ssdtrain.attach(model, options(tmp_path, enabled=False)) as offloader:
        step(model)
        assert not model._forward_hooks
        assert offloader.end_step().microbatches == 0


def test_stats_are_written_a_line_a_step(tmp_path):
    model = Model()
    config = options(tmp_path, stats_path=str(tmp_path / "stats_{local_rank}"))
    with ssdtrain.attach(model, config) as offloader:
        for _ in range(2):
            step(model)
            offloader.end_step()
    lines = (tmp_path / "stats_0" / "rank0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


@pytest.mark.parametrize("name", ["rank0.jsonl", "rank0.trace.jsonl"])
def test_statistics_that_are_refused_are_so_before_anything_is_allocated(tmp_path, monkeypatch, name):
    (tmp_path / name).symlink_to(tmp_path / "precious")
    monkeypatch.setattr(runtime, "_build_tiers", lambda *_: pytest.fail("a drive was opened"))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ssdtrain.OffloadError, match="cannot open the statistics") as caught:
        ssdtrain.attach(Model(), options(tmp_path, stats_path=str(tmp_path), trace_steps=1))
    assert len(os.listdir("/proc/self/fd")) == before, "while the error is held"
    assert caught.value.hint
    assert not (tmp_path / "precious").exists()


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_statistics_where_every_user_may_change_names_are_refused_as_paths_are(tmp_path, below):
    stats = tmp_path / "stats"
    stats.mkdir()
    stats.chmod(0o777)
    with pytest.raises(ConfigError, match=r"stats_path: .*mode 0777, every user may rename .* `chmod \+t`"):
        check({"policy": "none", "stats_path": str(stats / below)}, source="here", local_rank=0)
    stats.chmod(0o1777)
    check({"policy": "none", "stats_path": str(stats / below)}, source="here", local_rank=0)
    assert list(stats.iterdir()) == []


def test_all_faults_of_options_and_paths_are_listed_at_once(tmp_path):
    wrong = {"paths": [str(tmp_path / "missing")], "io_threads": 0, "polcy": "all"}
    with pytest.raises(ssdtrain.ConfigError) as caught:
        check(wrong, source="here", local_rank=0)
    text = str(caught.value)
    assert "3 problems in here" in text
    assert "missing" in text
    assert "io_threads" in text
    assert "did you mean `policy`" in text


@pytest.mark.parametrize(("said", "rank"), [("2", 2), ("", 5), ("-1", 5)])
def test_a_local_rank_that_says_there_is_no_launcher_says_nothing(monkeypatch, said, rank):
    monkeypatch.setenv("LOCAL_RANK", said)
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert find_local_rank() == rank
    monkeypatch.delenv("SLURM_LOCALID")
    assert find_local_rank() == (rank if rank == 2 else 0)


def test_placeholders_are_expanded_and_paths_checked(tmp_path):
    (tmp_path / "drive3").mkdir()
    config = ssdtrain.OffloadConfig(paths=[str(tmp_path / "drive{local_rank}")])
    assert prepare(config, local_rank=3).paths == (str(tmp_path / "drive3"),)
    with pytest.raises(ssdtrain.ConfigError, match="drive4"):
        prepare(config, local_rank=4)


@pytest.mark.parametrize("speaks", [True, False])
def test_after_warm_up_one_line_is_said(tmp_path, caplog, speaks):
    model = Model()
    level = logging.INFO if speaks else logging.DEBUG
    with (
        caplog.at_level(logging.DEBUG, "ssdtrain_plugin.runtime"),
        build(options(tmp_path), device=torch.device("cpu"), rank=2, speaks=speaks) as offloader,
    ):
        for _ in range(4):
            with offloader.hooks.forward():
                loss = model(torch.randn(4, 16))
            offloader.cache._queue.wait_idle()
            loss.backward()
            offloader.end_step()
    started, warmed_up = [record for record in caplog.records if record.name == "ssdtrain_plugin.runtime"]
    assert (started.levelno, warmed_up.levelno) == (level, level)
    assert "rank 2" in started.getMessage()
    assert str(tmp_path) in started.getMessage()
    assert "moved" in warmed_up.getMessage()


def test_nothing_moved_is_a_warning(tmp_path, caplog):
    model = Model()
    config = options(tmp_path, min_tensor_bytes=1 << 30)
    with ssdtrain.attach(model, config) as offloader, caplog.at_level(logging.WARNING):
        for _ in range(3):
            step(model)
            offloader.end_step()
    assert sum("nothing was moved" in record.getMessage() for record in caplog.records) == 1


def test_a_model_that_is_dropped_gives_everything_back(tmp_path):
    before = threading.active_count()
    model = Model()
    ssdtrain.attach(model, options(tmp_path))
    step(model)
    del model
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("ssdtrain-"):
            thread.join(10)
    assert threading.active_count() <= before


# Several drives, and memory that is not there


def test_several_paths_are_several_drives(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        os.mkdir(path)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    with ssdtrain.attach(model, {"paths": paths, "min_tensor_bytes": 1}) as offloader:
        model(torch.randn(64, 256)).sum().backward()
        report = offloader.report()
    assert all(path in report for path in paths)


def test_a_directory_listed_twice_is_refused(tmp_path):
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="listed twice"):
        check({"paths": [str(tmp_path), str(tmp_path / "again")]}, source="the test", local_rank=0)


def test_more_host_memory_than_there_is_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"host_bytes: 65536\.0 TiB \(expected at most .* free host memory\)"):
        check({"host_bytes": 64 << 50}, source="the test", local_rank=0)


@pytest.mark.parametrize("speaks", [True, False])
def test_the_numbers_of_each_step_are_logged_for_who_asks_by_the_rank_that_speaks(tmp_path, caplog, speaks):
    model, told = Model(), []
    with (
        caplog.at_level(logging.DEBUG, "ssdtrain_plugin.steps"),
        build(options(tmp_path), device=torch.device("cpu"), rank=2, speaks=speaks) as offloader,
    ):
        offloader.on_step(told.append)
        for _ in range(2):
            with offloader.hooks.forward():
                loss = model(torch.randn(4, 16))
            loss.backward()
            offloader.end_step()
    lines = [record.getMessage() for record in caplog.records if record.name == "ssdtrain_plugin.steps"]
    assert len(lines) == (2 if speaks else 0)
    assert all(line.startswith("rank 2: step ") and "loads on demand" in line for line in lines)
    assert [stats.step for stats in told] == [0, 1]
