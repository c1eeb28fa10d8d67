"""The committed DeepSpeed configs: readable, runnable as their heads say, and alike where they must be."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ssdtrain_plugin import OffloadConfig

hjson = pytest.importorskip("hjson")

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def read(name: str) -> dict[str, Any]:
    text = (ROOT / "configs" / "deepspeed" / name).read_text(encoding="utf-8")
    return dict(hjson.loads(text))


def test_there_are_configs() -> None:
    assert {"gpt_pp2_plain.json", "gpt_pp2_ssdtrain.json"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_head_names_command_machine_and_expected_numbers(file: Path) -> None:
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert "TODO" not in text
    for key in ("# command:", "# machine:", "# expected:"):
        assert key in text
    command = shlex.split(head[head.index("# command:") + 1].removeprefix("#"))
    assert f"configs/deepspeed/{file.name}" in command
    for word in command:
        if re.fullmatch(r"(launch|configs)/\S+", word):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_block_is_valid_and_names_no_path_of_ours(file: Path) -> None:
    config = read(file.name)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["optimizer"]["params"]["torch_adam"] is True
    if "ssdtrain" in config:
        assert OffloadConfig.from_dict(config["ssdtrain"]).paths == ("/mnt/nvme0",)
    else:
        assert "plain" in file.name


def test_the_two_runs_of_the_demo_differ_in_the_block_only() -> None:
    plain, ssdtrain = read("gpt_pp2_plain.json"), read("gpt_pp2_ssdtrain.json")
    del ssdtrain["ssdtrain"]
    assert plain == ssdtrain
