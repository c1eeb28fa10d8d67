"""The ``"ssdtrain"`` block: how it is found, and what is said about its faults before an engine is built."""

import argparse
import base64
import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
from torch import nn

deepspeed = pytest.importorskip("deepspeed")

import ssdtrain_plugin.integrations.deepspeed as ssdtrain_ds  # noqa: E402
from ssdtrain_plugin import ConfigError  # noqa: E402

pytestmark = pytest.mark.deepspeed

ENGINE_OPTIONS = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """Engines that were built; the real classes are not needed to see that they are not."""
    built = []
    for name in ("DeepSpeedEngine", "PipelineEngine", "DualPipeVEngine", "DeepSpeedHybridEngine"):
        monkeypatch.setattr(deepspeed, name, lambda *args, **kwargs: built.append(kwargs))
    return built


@pytest.fixture
def fault(built):
    """The message of the error that `initialize` raises for a block, with no engine built and no group joined."""

    def message(block, **more):
        with pytest.raises(ConfigError) as caught:
            ssdtrain_ds.initialize(model=nn.Linear(1, 1), config={**ENGINE_OPTIONS, **more, "ssdtrain": block})
        assert built == []
        assert not deepspeed.comm.is_initialized()
        return str(caught.value)

    return message


def _mount_tmpfs(directory, options):
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@pytest.fixture
def mounted(tmp_path):
    """Mount a small file system; unmounted afterwards."""
    if os.geteuid():
        pytest.skip("only root mounts")
    points = []

    def mount(options):
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        _mount_tmpfs(point, options)
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", point], check=True)


# ---------------------------------------------------------------------- faults


def test_all_faults_are_listed_at_once(fault, tmp_path):
    missing = tmp_path / "missing"
    message = fault({"paths": [str(missing)], "polcy": "all", "io_threads": "four", "prefetch_bytes": 0})
    assert 'the "ssdtrain" block of the DeepSpeed config' in message
    assert "polcy: unknown option (did you mean `policy`?)" in message
    assert "io_threads: 'four' (expected a whole number)" in message
    assert "prefetch_bytes: 0 (expected" in message
    assert str(missing) in message
    assert "hint: " in message


def test_a_value_of_that_name_in_a_section_of_the_users_own_is_no_block(tmp_path):
    config = {"notes": {"ssdtrain": "on since May"}, "ssdtrain": {"paths": [str(tmp_path)]}}
    assert ssdtrain_ds.read_block(config) is not None


@pytest.mark.parametrize("section", ["zero_optimization", "activation_checkpointing"])
def test_a_block_in_another_section_is_a_fault_that_names_the_place(built, tmp_path, section):
    config = {**ENGINE_OPTIONS, section: {"ssdtrain": {"paths": [str(tmp_path)]}}}
    with pytest.raises(ConfigError) as caught:
        ssdtrain_ds.initialize(model=nn.Linear(1, 1), config=config)
    message = str(caught.value)
    assert f"{section}.ssdtrain: DeepSpeed does not look there (expected at the top level)" in message
    assert 'hint: move the "ssdtrain" block' in message
    assert built == []


def test_a_block_deep_in_another_section_is_a_fault_even_beside_a_good_one(tmp_path):
    block = {"paths": [str(tmp_path)]}
    config = {**ENGINE_OPTIONS, "ssdtrain": block, "zero_optimization": {"offload_param": {"ssdtrain": block}}}
    with pytest.raises(ConfigError, match=r"zero_optimization\.offload_param\.ssdtrain: "):
        ssdtrain_ds.read_block(config)


@pytest.mark.parametrize("option", ["disk_bytes", "max_inflight_bytes", "prefetch_bytes"])
def test_a_budget_of_zero_is_a_fault(fault, tmp_path, option):
    assert f"{option}: 0 (expected greater than 0)" in fault({"paths": [str(tmp_path)], option: 0})


def test_no_path_is_a_fault(fault):
    assert "paths: missing" in fault({})


def test_a_file_as_path_is_a_fault(fault, tmp_path):
    file = tmp_path / "file"
    file.touch()
    message = fault({"paths": [str(file)]})
    assert f"{file}" in message
    assert "directory" in message


def test_a_directory_that_refuses_files_is_a_fault(fault):
    # /proc refuses them to root too.
    assert "/proc" in fault({"paths": ["/proc"]})


@pytest.mark.skipif(os.geteuid() == 0, reason="root passes access bits")
def test_a_directory_without_the_right_to_write_is_a_fault(fault, tmp_path):
    directory = tmp_path / "locked"
    directory.mkdir(mode=0o555)
    assert str(directory) in fault({"paths": [str(directory)]})


def test_a_read_only_file_system_is_a_fault(fault, mounted):
    point = mounted("ro,size=128m")
    message = fault({"paths": [str(point)]})
    assert str(point) in message
    assert "ead-only" in message


def test_a_full_file_system_is_a_fault(fault, mounted):
    point = mounted("size=1m")
    (point / "filler").write_bytes(bytes(1024 * 1024))
    message = fault({"paths": [str(point)]})
    assert str(point) in message
    assert "is full" in message


@pytest.mark.parametrize("block", [None, True, "yes", ["/mnt"], 3])
def test_a_block_that_is_no_mapping_is_a_fault(fault, block):
    assert "expected a mapping of option names to values" in fault(block)


@pytest.mark.parametrize("name", ["ssdtrian", "ssd_train", "SSDTrain", "ssdtrain_plugin"])
def test_a_near_miss_of_the_name_of_the_block_is_told(caplog, name):
    with caplog.at_level(logging.WARNING, logger="ssdtrain_plugin"):
        assert ssdtrain_ds.read_block({**ENGINE_OPTIONS, name: {"paths": ["/"]}}) is None
    assert f'`{name}` in the DeepSpeed config is ignored (did you mean `"ssdtrain"`?)' in caplog.text


def test_deepspeeds_own_sections_are_no_near_miss(caplog):
    sections = ("train_batch_size", "zero_optimization", "steps_per_print", "sparse_attention", "aio", "tensorboard")
    assert ssdtrain_ds.read_block(dict.fromkeys(sections)) is None
    assert caplog.text == ""


# ---------------------------------------------------------------------- where the config comes from

HJSON = """
# DeepSpeed reads comments, and commas at the end
{
  "train_micro_batch_size_per_gpu": 1,
  "ssdtrain": {"paths": ["%s"], "io_threads": 7,},  // ours
}
"""


def _sources(tmp_path):
    config = {**ENGINE_OPTIONS, "ssdtrain": {"paths": [str(tmp_path)], "io_threads": 7}}
    path = tmp_path / "config.json"
    path.write_text(HJSON % tmp_path)
    config["filler"] = "x" * 5000  # no file name is as long as this
    return {
        "mapping": config,
        "path": str(path),
        "pathlib": path,
        "base64": base64.urlsafe_b64encode(json.dumps(config).encode()).decode(),
    }


@pytest.mark.parametrize("source", ["mapping", "path", "pathlib", "base64"])
def test_the_block_is_read_from_whatever_deepspeed_reads(tmp_path, source):
    config = ssdtrain_ds.read_block(_sources(tmp_path)[source])
    assert config is not None
    assert (config.paths, config.io_threads) == ((str(tmp_path),), 7)


@pytest.mark.parametrize("how", ["config", "config_params", "args", "position"])
def test_the_config_is_found_in_every_argument(tmp_path, how):
    path = tmp_path / "config.json"
    path.write_text('{"ssdtrain": {"pathz": []}}')
    model, config = nn.Linear(1, 1), str(path)
    args = argparse.Namespace(deepspeed_config=config)
    calls = {
        "config": lambda: ssdtrain_ds.initialize(model=model, config=config),
        "config_params": lambda: ssdtrain_ds.initialize(model=model, config_params=config),
        "args": lambda: ssdtrain_ds.initialize(args=args, model=model),
        "position": lambda: ssdtrain_ds.initialize(args, model),
    }
    with pytest.raises(ConfigError, match=r"pathz: unknown option \(did you mean `paths`\?\)") as caught:
        calls[how]()
    assert f"`{path}`" in str(caught.value)


@pytest.mark.parametrize("config", [None, "no such file", "bm90IGpzb24=", {}, '{"not": "a path"}'])
def test_a_config_without_a_block_is_left_to_deepspeed(config):
    assert ssdtrain_ds.read_block(config) is None


def test_a_disabled_block_needs_no_directory():
    config = ssdtrain_ds.read_block({"ssdtrain": {"enabled": False, "paths": ["/no/such/drive"]}})
    assert config is not None
    assert not config.enabled


# ---------------------------------------------------------------------- what is filled in


def test_local_rank_expands(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    (tmp_path / "nvme3").mkdir()
    block = {"paths": [f"{tmp_path}/nvme{{local_rank}}"], "stats_path": f"{tmp_path}/stats{{local_rank}}"}
    config = ssdtrain_ds.read_block({"ssdtrain": block})
    assert config is not None
    assert config.paths == (f"{tmp_path}/nvme3",)
    assert config.stats_path == f"{tmp_path}/stats3"


def test_a_path_that_only_one_rank_lacks_is_its_fault(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "nvme0").mkdir()
    assert f"{tmp_path}/nvme1" in fault({"paths": [f"{tmp_path}/nvme{{local_rank}}"]})


def test_the_drive_that_deepspeed_knows_is_the_default(tmp_path):
    config = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}},
        "aio": {"intra_op_parallelism": 6},
        "ssdtrain": {},
    }
    found = ssdtrain_ds.read_block(config)
    assert found is not None
    assert (found.paths, found.io_threads) == ((str(tmp_path),), 6)


def test_the_block_wins_over_defaults(tmp_path):
    config = {
        "zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/no/such/drive"}},
        "aio": {"intra_op_parallelism": 6},
        "ssdtrain": {"paths": [str(tmp_path)], "io_threads": 2},
    }
    found = ssdtrain_ds.read_block(config)
    assert found is not None
    assert (found.paths, found.io_threads) == ((str(tmp_path),), 2)


@pytest.mark.parametrize("threads", [1, 1000, "many", None])
def test_an_aio_section_made_for_other_ends_is_no_fault(tmp_path, threads):
    config = {"aio": {"intra_op_parallelism": threads}, "ssdtrain": {"paths": str(Path(tmp_path))}}
    found = ssdtrain_ds.read_block(config)
    assert found is not None
    assert 2 <= found.io_threads <= 64
