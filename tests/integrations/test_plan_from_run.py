"""``ssdtrain plan --from-run`` on a real job of two pipeline stages under DeepSpeed, the demo's script unchanged."""

import json
import sys

import pytest
import yaml
from calibration_checks import check_calibration
from processes import REPOSITORY, run_ranks
from stacks import DRIVE, MACHINE
from typer.testing import CliRunner

from ssdtrain_plugin.cli import app

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.deepspeed, pytest.mark.timeout(400)]

MICRO_BATCHES = 4
MODEL = {"layers": 4, "hidden": 64, "heads": 4, "sequence": 64}
# The script slices its table of positions, where an embedding would save indices.
REST = {"vocab": 256, "dropout": False, "precision": "fp32", "position_indices": False}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pp2")
    (directory / "drive").mkdir()
    block = {"paths": [str(directory / "drive")], "policy": "all", "min_tensor_bytes": 4096, "trace_steps": 3}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 1000000,
        "ssdtrain": block | {"stats_path": str(directory / "run")},
    }
    (directory / "ds.json").write_text(json.dumps(config))
    script = [REPOSITORY / "launch" / "train_gpt.py", "--deepspeed_config", directory / "ds.json", "--steps", 5]
    sizes = [word for name, value in MODEL.items() for word in (f"--{name}", value)]
    run_ranks([sys.executable, "-m", "ssdtrain_plugin.run", *script, *sizes], directory, timeout_seconds=300)
    return directory


def plan(directory, *options, **cluster):
    fields = {**MACHINE, "gpus": 2, "parallel": {"pp": 2}, "min_tensor_bytes": 4096}
    fields["batch"] = {"micro_batch": 2, "micro_batches": MICRO_BATCHES}
    (directory / "model.yaml").write_text(yaml.safe_dump(MODEL | REST))
    (directory / "cluster.yaml").write_text(yaml.safe_dump(fields | cluster))
    arguments = [
        "plan",
        directory / "model.yaml",
        directory / "cluster.yaml",
        "--from-run",
        directory / "run",
        *options,
    ]
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


def test_every_number_is_that_of_the_files_and_bytes_are_off_by_nothing(job):
    result = plan(job, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = check_calibration(report, job / "run", micro_batches=MICRO_BATCHES, rated_bytes=DRIVE["rated_write_bytes"])
    assert [stage["in_flight"] for stage in report["stages"]] == [2, 1]
    waits = [
        {term["name"]: term for term in stage["terms"]}["waits for other stages in a step"] for stage in found["stages"]
    ]
    assert all(wait["measured"] > 0 for wait in waits)
    assert waits[1]["planned"] == pytest.approx(report["step"]["bubble_seconds"]), "the last stage is the slowest"


def test_the_table_has_a_part_a_stage(job):
    shown = plan(job).output
    assert "stage 0, rank 0" in shown
    assert "stage 1, rank 1" in shown
    assert shown.count("2 layers one by one: all equal") == 2


def test_a_run_of_other_stages_is_refused(job):
    result = plan(job, gpus=1, parallel={})
    assert result.exit_code == 1
    assert "ranks: 2 (0, 1) (expected gpus, 1, numbered from 0)" in result.output
