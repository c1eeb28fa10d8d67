"""The command: tables, JSON, the picture, and errors without a traceback."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssdtrain_plugin import OffloadConfig
from ssdtrain_plugin.cli import app
from ssdtrain_plugin.projection import project, read_cluster, read_model
from ssdtrain_plugin.projection.rendering import format_life

FILES = Path(__file__).parents[2] / "configs" / "plan"
COMMAND = "# command:  ssdtrain plan "


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


def pairs_of(text):
    return [line.removeprefix(COMMAND).split()[:2] for line in text.splitlines() if line.startswith(COMMAND)]


SAMPLES = sorted({tuple(pair) for file in FILES.glob("*.yaml") for pair in pairs_of(file.read_text())})


def test_every_sample_is_part_of_a_command():
    named = {Path(name).name for pair in SAMPLES for name in pair}
    assert named == {file.name for file in FILES.glob("*.yaml")}


@pytest.mark.parametrize(("model", "cluster"), SAMPLES, ids=lambda path: Path(path).stem)
def test_a_sample_runs_and_its_block_can_be_pasted(model, cluster):
    root = FILES.parents[1]
    result = run(root / model, root / cluster, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    OffloadConfig.from_dict(report["config"])
    assert report["assumptions"]
    assert {"rated_years", "sequential_years", "retention_years"} <= report["stages"][0]["life"].keys()


def test_json_says_what_the_model_says():
    model, cluster = FILES / "gpt3_175b.yaml", FILES / "h100_1024_tp8_pp8.yaml"
    found = project(read_model(model), read_cluster(cluster))
    report = json.loads(run(model, cluster, "--json").stdout)
    assert report["step"]["seconds"] == found.step.seconds
    assert report["largest_micro_batch"]["offload"] == found.limits.offload
    assert report["drives_needed"] == found.need.drives
    for stage, plan in zip(report["stages"], found.stages, strict=True):
        assert stage["saved_bytes"] == plan.saved_bytes == sum(group["nbytes"] for group in stage["groups"])
        for group in stage["groups"]:
            assert group["nbytes"] == group["count"] * sum(tensor["nbytes"] for tensor in group["tensors"])
    assert len(report["same_sequences"]) == len(found.sweep)
    assert report["model"]["preset" if "preset" in report["model"] else "name"] == "gpt3-175b"


def test_the_tables_name_tensors_assumptions_and_both_lives():
    result = run(FILES / "bert_h8192_l4.yaml", FILES / "two_a100_pcie.yaml")
    assert result.exit_code == 0
    for words in (
        "layer.feedforward.activation_input",
        "11.1 GiB",
        "20.29 GB/s",
        "by the rating",
        "+ WAF 2.5 / 1",
        "+ retention 86x",
        "assumptions",
        '"policy": "adaptive"',
    ):
        assert words in result.output, words


def test_a_long_pipeline_shows_its_ends():
    result = run(FILES / "gpt3_175b_as_ssdtrain.yaml", FILES / "a100_384_tp8_pp12.yaml")
    assert "stages 1 to 10 are alike" in result.output


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_drawn(tmp_path, suffix):
    path = tmp_path / f"plan{suffix}"
    result = run(FILES / "gpt3_175b.yaml", FILES / "h100_1024_tp8_pp8.yaml", "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")


def assert_said(result, *words):
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "hint: " in result.output
    for word in words:
        assert word in result.output


@pytest.mark.parametrize("name", ["plan.unknown", "missing/plan.png"])
def test_a_picture_that_cannot_be_written_is_said(tmp_path, name):
    result = run(FILES / "llama2_7b.yaml", FILES / "h200_8_fsdp.yaml", "--plot", tmp_path / name)
    assert_said(result, "cannot draw")


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    path = tmp_path / "plan.png"
    result = run(FILES / "llama2_7b.yaml", FILES / "h200_8_fsdp.yaml", "--plot", path)
    assert_said(result, "matplotlib is not installed", "ssdtrain-plugin[bench]")
    assert not path.exists()


def test_an_impossible_mapping_is_said(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("preset: gpt3-175b\nlayers: 95\n")
    assert_said(run(path, FILES / "h100_1024_tp8_pp8.yaml"), "parallel.pp: 8 (expected a divisor of layers, 95)")


def test_a_file_that_is_no_yaml_is_said(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("a: [")
    assert_said(run(path, FILES / "h100_1024_tp8_pp8.yaml"), "while parsing")


@pytest.mark.parametrize(
    ("years", "text"), [(2.54, "2.5 years"), (0.5, "182.6 days"), (float("inf"), "no limit"), (1.0, "1.0 years")]
)
def test_a_life_reads_well(years, text):
    assert format_life(years) == text


def test_the_example_of_the_docs_is_what_the_command_prints():
    root = FILES.parents[1]
    text = (root / "docs" / "planning.md").read_text(encoding="utf-8")
    blocks = text.partition("## The two files")[0].split("```")[1::2]
    command, *shown = (block.strip("\n").splitlines() for block in blocks)
    model, cluster = command[0].split()[2:4]
    result = CliRunner().invoke(app, ["plan", str(root / model), str(root / cluster)], env={"COLUMNS": "124"})
    printed = [line.rstrip() for line in result.output.splitlines()]
    missing = [line for block in shown for line in block if line not in printed]
    assert not missing, "run the command of docs/planning.md again and paste what changed"
