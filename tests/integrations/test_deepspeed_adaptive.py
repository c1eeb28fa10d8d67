"""The adaptive policy under the real launcher: a plan for each stage, loads that are there in time, the same bits."""

import json
import re
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, free_port, run

deepspeed = pytest.importorskip("deepspeed")

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(600)]

# Large enough that a step takes a time which a drive can hide in.
MODEL = ["--layers", "8", "--hidden", "256", "--heads", "4", "--sequence", "256", "--steps", "6"]
WARM_UP = 2


def launch(directory, stages, block, *plugin):
    directory.mkdir()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2 * stages,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 1000000,
    }
    path = directory / "config.json"
    path.write_text(json.dumps(config if block is None else {**config, "ssdtrain": block}))
    launcher = [sys.executable, Path(sys.executable).with_name("deepspeed")]
    launcher += ["--num_gpus", str(stages), "--master_port", free_port(), *plugin]
    script = [REPOSITORY / "launch" / "train_gpt.py", "--deepspeed_config", path, "--stages", str(stages), *MODEL]
    code, output = run([*launcher, *script, "--metrics", directory], directory / "log", timeout_seconds=280)
    assert code == 0, output[-6000:]
    return output, [json.loads((directory / f"rank{rank}.json").read_text())["losses"] for rank in range(stages)]


@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_each_stage_plans_for_itself_and_finds_what_it_needs(tmp_path, stages):
    drive, stats = tmp_path / "drive{local_rank}", tmp_path / "stats"
    for rank in range(stages):
        (tmp_path / f"drive{rank}").mkdir()
    block = {"paths": [str(drive)], "policy": "adaptive", "min_tensor_bytes": "64 KiB", "stats_path": str(stats)}
    output, losses = launch(tmp_path / "with", stages, block, "--module", "ssdtrain_plugin.run")
    _, expected = launch(tmp_path / "without", stages, None)
    assert losses == expected
    assert len(set(losses[0])) == 6
    steps = [
        [json.loads(line) for line in (stats / f"rank{rank}.jsonl").read_text().splitlines()] for rank in range(stages)
    ]
    for rank, of_rank in enumerate(steps):
        assert [step["microbatches"] for step in of_rank] == [2 * stages] * 6
        assert [step["num_loads_on_demand"] for step in of_rank[WARM_UP:]] == [0] * (6 - WARM_UP), of_rank
        assert re.search(rf"ssdtrain: rank {rank}: measuring: offload everything", output)
        assert re.match(r"offload .* of .* a step at .*; peak .* expected|keep everything: ", of_rank[-1]["plan"])
    assert steps[0][-1]["stored_bytes"] > 0, "the first stage holds the most"
    assert len({of_rank[-1]["plan"] for of_rank in steps}) == stages
