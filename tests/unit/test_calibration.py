"""``ssdtrain plan --from-run``: against real runs of small stacks, against the lines of their files, and its errors."""

import json
import re
import shutil

import pytest
import torch
import yaml
from calibration_checks import check_calibration
from report_checks import lines
from stacks import DRIVE, MACHINE, fields_of
from typer.testing import CliRunner

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.bench.models import DecoderShape, create_stack, library_text
from ssdtrain_plugin.cli import app
from ssdtrain_plugin.projection.endurance import YEAR_SECONDS

SMALLEST = 4096


def shape_of(family="gpt", attention="flash", **sizes):
    sizes = {"layers": 4, "hidden": 32, "heads": 2, "sequence": 32, "microbatch": 2} | sizes
    return DecoderShape(family=family, attention=attention, **sizes)


def train(directory, shape, *, steps=6, **options):
    """Train a stack as rank 0, a micro-batch a step; return the directory of its files."""
    torch.manual_seed(1)
    stack = create_stack(shape)
    tokens = library_text(shape.microbatch * shape.row_tokens).view(shape.microbatch, -1)
    common = {"policy": "all", "paths": [str(directory)], "min_tensor_bytes": SMALLEST, "trace_steps": 3}
    with ssdtrain.attach(stack, common | {"stats_path": str(directory / "run")} | options) as offloader:
        for _ in range(steps):
            stack(tokens).backward()
            offloader.end_step()
    return directory / "run"


def write(directory, shape, *, model=None, cluster=None):
    """Write both files of a plan."""
    batch = {"micro_batch": shape.microbatch, "micro_batches": 1}
    machine = {**MACHINE, "batch": batch, "min_tensor_bytes": SMALLEST} | (cluster or {})
    (directory / "model.yaml").write_text(yaml.safe_dump(fields_of(shape) | (model or {})))
    (directory / "cluster.yaml").write_text(yaml.safe_dump(machine))
    return directory / "model.yaml", directory / "cluster.yaml"


def plan(files, *paths, options=()):
    arguments = [*files, *options, *(word for path in paths for word in ("--from-run", path))]
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


def calibrated(files, *paths):
    result = plan(files, *paths, options=["--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def terms_of(report, stage=0):
    return {term["name"]: term for term in report["calibration"]["stages"][stage]["terms"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the small decoder."""
    return train(tmp_path_factory.mktemp("decoder"), shape_of())


@pytest.fixture
def files(tmp_path):
    return write(tmp_path, shape_of())


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("family", ["gpt", "bert", "t5"])
def test_every_number_is_that_of_the_files_and_bytes_are_off_by_nothing(tmp_path, family, attention):
    shape = shape_of(family, attention)
    directory = train(tmp_path, shape)
    report = calibrated(write(tmp_path, shape), directory)
    check_calibration(report, directory, micro_batches=1, rated_bytes=DRIVE["rated_write_bytes"])


def test_the_table_says_what_the_json_says(run, files):
    shown = plan(files, run).output
    report = calibrated(files, run)
    saved = terms_of(report)["saved in a micro-batch"]["measured"]
    row = next(line for line in shown.splitlines() if line.startswith("saved in a micro-batch"))
    assert row.split()[4:] == [f"{saved / 1024:.1f}", "KiB"] * 2 + ["0"]
    assert "4 layers one by one: all equal" in shown
    assert report["calibration"]["fields"] in shown
    assert "nothing is missing" in shown
    assert "medians of 4 steps, 3 traced" in shown
    assert "mind" not in shown.splitlines()


def test_files_are_as_good_as_their_directory(run, files, tmp_path):
    by_directory = calibrated(files, run)
    assert calibrated(files, run / "rank0.jsonl") == by_directory
    other = tmp_path / "stats.jsonl"
    shutil.copy(run / "rank0.jsonl", other)
    alone = terms_of(calibrated(files, other))
    for name, term in terms_of(by_directory).items():
        assert alone[name]["measured"] in (term["measured"], None), name


def test_without_a_trace_it_says_what_is_missing_and_why(tmp_path, files):
    directory = train(tmp_path, shape_of(), trace_steps=0)
    report = calibrated(files, directory)
    missing = {name for name, term in terms_of(report).items() if term["measured"] is None}
    assert missing == {"write reached", "read reached", "life of the drives, in a step's time"}
    assert all("trace_steps" in terms_of(report)[name]["reason"] for name in missing)
    assert terms_of(report)["saved in a micro-batch"]["off_by"] == 0
    found = report["calibration"]
    assert found["step"]["measured"] is None
    assert found["stages"][0]["tensors"] is None
    assert found["reached"]["achieved_tflops"]
    assert found["reached"]["write_bytes_per_second"] is None
    assert "trace_steps" in found["warnings"][0], "where it ran is not known either"
    shown = plan(files, directory).output
    assert "write reached, read reached, life of the drives, in a step's time, step: no steady step" in shown


def rewrite(directory, target, change, *, is_trace=False):
    """Copy the files of a run, with each line changed."""
    target.mkdir(exist_ok=True)
    for path in directory.iterdir():
        rows = lines(path)
        if path.name.endswith(".trace.jsonl") == is_trace:
            rows = [change(dict(row)) for row in rows]
        (target / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_times_of_a_host_that_runs_ahead_are_not_taken(run, files, tmp_path):
    directory = rewrite(
        run,
        tmp_path / "gpu",
        lambda row: row | ({"device": "cuda:0"} if row["event"] == "start" else {}),
        is_trace=True,
    )
    report = calibrated(files, directory)
    missing = {name: term["reason"] for name, term in terms_of(report).items() if term["measured"] is None}
    assert missing.keys() == {
        "forward of a micro-batch",
        "backward of a micro-batch",
        "write needed",
        "read needed",
        "life of the drives, without a pause",
    }
    assert all("cuda:0" in reason for reason in missing.values())
    found = report["calibration"]
    # What the plan now takes for a step is what the run took.
    assert found["calibrated"]["step"]["seconds"] == pytest.approx(found["step"]["measured"], rel=1e-3)


def test_replicas_are_compared_by_their_median_with_the_range(run, tmp_path):
    directory = tmp_path / "run"
    for rank, factor in enumerate((1, 3, 2)):
        rewrite(
            run,
            tmp_path / "one",
            lambda row, rank=rank, factor=factor: (
                row | {"rank": rank, "forward_seconds": factor * row["forward_seconds"]}
            ),
        )
        directory.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "one" / "rank0.jsonl", directory / f"rank{rank}.jsonl")
    files = write(tmp_path, shape_of(), cluster={"gpus": 3, "parallel": {"dp": 3}})
    term = terms_of(calibrated(files, directory))["forward of a micro-batch"]
    assert term["highest"] == pytest.approx(3 * term["lowest"])
    assert term["measured"] == pytest.approx(2 * term["lowest"])
    assert "lowest rank" in plan(files, directory).output
    several = [directory / f"rank{rank}.jsonl" for rank in range(3)]
    assert terms_of(calibrated(files, *several))["forward of a micro-batch"] == term


def test_the_first_steps_do_not_count(run, files, tmp_path):
    directory = rewrite(run, tmp_path / "slow", lambda row: row | ({"stall_seconds": 99.0} if row["step"] < 2 else {}))
    assert terms_of(calibrated(files, directory)) == terms_of(calibrated(files, run))
    directory = rewrite(run, tmp_path / "slower", lambda row: row | {"stall_seconds": 99.0 + row["step"]})
    # Steps 2 to 5 are left.
    assert terms_of(calibrated(files, directory))["stalls in a step"]["measured"] == 99.0 + 3.5


# ---------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("family", "model", "differences"),
    [
        ("gpt", {"attention_mask": False}, {("_", False, 1024, 4)}),
        ("gpt", {"dropout": ["feedforward"]}, {("layer.feedforward.dropout_mask", True, 2048, 4)}),
        ("t5", {"position_indices": False}, {("position_embedding", False, 256, 2)}),
        ("bert", {"statistics_precision": "bf16"}, {("_", False, 256, 18), ("_", True, 128, 18)}),
    ],
)
def test_tensors_of_one_side_are_listed_with_their_layers(tmp_path, family, model, differences):
    shape = shape_of(family, "naive")
    directory = train(tmp_path, shape)
    (stage,) = calibrated(write(tmp_path, shape, model=model), directory)["calibration"]["stages"]
    found = stage["tensors"]["differences"]
    named = {name for name, *_ in differences}
    seen = {}
    for each in found:
        name = each["name"] if each["name"] in named else "_"
        key = name, each["is_planned"], each["nbytes"]
        seen[key] = seen.get(key, 0) + each["count"]
    assert {(*key, count) for key, count in seen.items()} == differences
    layers = {"gpt": {f"layers.{index}" for index in range(4)}}.get(family)
    if layers:
        assert {place for each in found for place in each["places"]} == layers


def test_a_run_of_another_model_is_told(run, tmp_path):
    wider = write(tmp_path, shape_of(hidden=64))
    report = calibrated(wider, run)
    assert terms_of(report)["saved in a micro-batch"]["off_by"] < -0.4
    (warning,) = report["calibration"]["warnings"]
    assert "probably not of the same model" in warning
    assert f"- {warning}" in plan(wider, run).output.splitlines()
    # What is off by less than a hundredth is shown, and no more is made of it.
    near = calibrated(write(tmp_path, shape_of(), model={"position_indices": False}), run)
    assert 0 < terms_of(near)["saved in a micro-batch"]["off_by"] < 0.01
    assert near["calibration"]["warnings"] == []


# ---------------------------------------------------------------------- the plan with what was reached


def test_fields_that_are_pasted_give_the_plan_that_was_shown(run, files, tmp_path):
    report = calibrated(files, run)
    found = report["calibration"]
    fields = yaml.safe_load(found["fields"])
    cluster = yaml.safe_load(files[1].read_text())
    del cluster["efficiency"]
    cluster["drive"] |= fields.pop("drive")
    files[1].write_text(yaml.safe_dump(cluster | fields))
    again = CliRunner().invoke(app, ["plan", *map(str, files), "--json"])
    again = json.loads(again.stdout)
    for name in ("step", "drives_needed", "hidden_share", "mean_write_bytes_per_second", "config"):
        assert again[name] == found["calibrated"][name], name
    terms = terms_of(report)
    passes = terms["forward of a micro-batch"]["measured"] + terms["backward of a micro-batch"]["measured"]
    time = again["stages"][0]["time"]
    assert time["forward_seconds"] + time["backward_seconds"] == pytest.approx(passes, rel=1e-3)
    assert cluster["drive"]["write_bytes_per_second"] == pytest.approx(terms["write reached"]["measured"], rel=1e-3)
    assert cluster["drive"]["read_bytes_per_second"] == pytest.approx(terms["read reached"]["measured"], rel=1e-3)


def test_operations_a_second_are_those_of_the_model_over_its_time(run, files):
    report = calibrated(files, run)
    terms = terms_of(report)
    passes = terms["forward of a micro-batch"]["measured"] + terms["backward of a micro-batch"]["measured"]
    reached = report["calibration"]["reached"]
    assert reached["flops_per_second"] == pytest.approx(report["model_flops"] / passes)
    # Products must be a little faster than all of it.
    assert reached["achieved_tflops"] * 1e12 > reached["flops_per_second"] * 0.999


@pytest.mark.parametrize("factor", [1e-9, 1e12])
def test_a_run_that_no_rate_explains_is_said(run, files, tmp_path, factor):
    names = ("forward_seconds", "backward_seconds")
    run = rewrite(run, tmp_path / "other", lambda row: row | {name: factor * row[name] for name in names})
    reached = calibrated(files, run)["calibration"]["reached"]
    assert reached["achieved_tflops"] is None
    assert "hbm_bytes_per_second" in reached["reasons"][0]
    assert "hbm_bytes_per_second" in plan(files, run).output


def test_the_largest_micro_batch_follows_the_bytes_of_the_run(run, files, tmp_path):
    planned = calibrated(files, run)
    found = planned["calibration"]
    assert found["largest_micro_batch"]["keep"] == planned["largest_micro_batch"]["keep"], "bytes were as planned"
    heavier = rewrite(
        run,
        tmp_path / "heavier",
        lambda row: row | {name: 2 * row[name] for name in ("saved_bytes", "peak_activation_bytes")},
    )
    (heavier / "rank0.trace.jsonl").unlink()
    twice = calibrated(files, heavier)["calibration"]["largest_micro_batch"]
    assert twice["keep"] == pytest.approx(found["largest_micro_batch"]["keep"] / 2, rel=0.01)
    assert twice["offload"] == pytest.approx(found["largest_micro_batch"]["offload"] / 2, rel=0.01)
    assert twice["recompute"] == planned["largest_micro_batch"]["recompute"], "it was not run"


def test_drives_that_are_never_written_to_last_for_ever(run, files, tmp_path):
    directory = rewrite(run, tmp_path / "idle", lambda row: row | {"stored_bytes": 0, "kept_bytes": row["saved_bytes"]})
    term = terms_of(calibrated(files, directory))["life of the drives, without a pause"]
    assert term["measured"] is None
    assert not term["reason"]
    assert "no limit" in plan(files, directory).output


def test_a_life_is_in_years(run, files):
    report = calibrated(files, run)
    terms = terms_of(report)
    written = terms["stored on drives in a step"]["measured"]
    seconds = report["calibration"]["step"]["measured"]
    years = DRIVE["rated_write_bytes"] / written * seconds / YEAR_SECONDS
    assert terms["life of the drives, in a step's time"]["measured"] == pytest.approx(years)


# ---------------------------------------------------------------------- errors


def assert_refused(result, *words):
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert len(re.findall("hint: ", result.output)) == 1
    for word in words:
        assert word in result.output, result.output


def test_other_numbers_of_ranks_are_refused(run, tmp_path):
    files = write(tmp_path, shape_of(), cluster={"gpus": 2, "parallel": {"dp": 2}})
    assert_refused(plan(files, run), "ranks: 1 (0) (expected gpus, 2, numbered from 0)", "all ranks")


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (
            {"batch": {"micro_batch": 2, "micro_batches": 4}},
            "micro-batches: 1 a step (expected batch.micro_batches, 4)",
        ),
        (
            {
                "gpus": 2,
                "parallel": {"pp": 2, "virtual_stages": 2},
                "batch": {"micro_batch": 2, "micro_batches": 2},
            },
            "micro-batches: 1 a step (expected batch.micro_batches, 2, times 2 virtual stages)",
        ),
    ],
)
def test_other_numbers_of_micro_batches_are_refused(run, tmp_path, cluster, words):
    directory = tmp_path / "run"
    directory.mkdir()
    for rank in range(cluster.get("gpus", 1)):
        text = (run / "rank0.jsonl").read_text().replace('"rank":0', f'"rank":{rank}')
        (directory / f"rank{rank}.jsonl").write_text(text)
    assert_refused(plan(write(tmp_path, shape_of(), cluster=cluster), directory), words, "the batch of the run")


def test_a_run_without_steps_after_the_warm_up_is_refused(run, files, tmp_path):
    first = (run / "rank0.jsonl").read_text().splitlines(keepends=True)[:2]
    path = tmp_path / "rank0.jsonl"
    path.write_text("".join(first))
    assert_refused(plan(files, path), "rank 0: 2 finished steps (expected more than 2, the warm-up)", "train 3 steps")


def test_a_run_with_policy_none_is_refused(tmp_path, files):
    directory = train(tmp_path, shape_of(), policy="none")
    assert_refused(plan(files, directory), "rank 0: policy none (expected one that offloads)", "policy: adaptive")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no finished step"),
        ("no JSON at all\n{}\n", "no finished step (expected at least one); stats.jsonl, line 1: left out (not JSON"),
        ('{"step": 0, "rank"', "cut off"),
        ('{"step": 0, "rank": 0, "stall_seconds": 1e999}\n', "1e999 is no finite number"),
    ],
)
def test_files_without_a_line_that_can_be_used_are_refused(files, tmp_path, text, words):
    path = tmp_path / "stats.jsonl"
    path.write_text(text)
    assert_refused(plan(files, path), words, "stats_path")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(path, folder / "rank0.jsonl")
    assert_refused(plan(files, folder), "no finished step")


def test_damaged_lines_are_named_and_left_out(run, files, tmp_path):
    directory = rewrite(run, tmp_path / "run", lambda row: row)
    with (directory / "rank0.jsonl").open("a") as file:
        file.write('{"step": 6, "ra')
    result = plan(files, directory)
    assert result.exit_code == 0
    assert "warning: rank0.jsonl, line 7: left out (cut off)" in result.stderr
    assert terms_of(json.loads(plan(files, directory, options=["--json"]).stdout)) == terms_of(calibrated(files, run))


@pytest.mark.parametrize("name", ["missing", "missing.jsonl", "."])
def test_a_path_without_statistics_is_refused(files, tmp_path, name):
    assert_refused(plan(files, tmp_path / name), "1 problem in")


def test_a_rank_twice_is_refused(run, files):
    path = run / "rank0.jsonl"
    assert_refused(plan(files, path, path), "rank 0 twice")
