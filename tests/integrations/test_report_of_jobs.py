"""Reports on real jobs of two pipeline stages: the numbers, the looks, and what the host's own monitor shows."""

import csv
import json
import os
import subprocess
from pathlib import Path

import browser
import pytest
from processes import DEEPSPEED, EAGER, MEGATRON, environment, fork_ranks
from report_checks import check_page, events_of, lines
from typer.testing import CliRunner

from ssdtrain_plugin.cli import app

pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WORKER = Path(__file__).with_name("report_worker.py")
NEWEST = os.environ.get("SSDTRAIN_MEGATRON_PYTHON")
METRICS = (
    "peak_activation_bytes saved_bytes stored_bytes host_bytes loaded_bytes stall_seconds num_loads_on_demand".split()
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("deepspeed", marks=pytest.mark.deepspeed),
        pytest.param("megatron", marks=pytest.mark.megatron),
    ],
)
def job(request, tmp_path_factory):
    pytest.importorskip({"deepspeed": "deepspeed", "megatron": "megatron.core"}[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    imports = {"deepspeed": DEEPSPEED, "megatron": MEGATRON}[request.param]
    fork_ranks(WORKER, [request.param, directory], directory, imports=imports, timeout_seconds=300, **EAGER)
    arguments = ["report", directory / "run", "--output", directory / "page.html", "--trace", directory / "trace.json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return request.param, directory


def test_every_number_of_the_page_is_that_of_the_files(job):
    _, directory = job
    page = check_page((directory / "page.html").read_text(encoding="utf-8"), directory / "run")
    assert page.numbers["total/ranks"][0] == 2
    assert {key.split("/")[1] for key in page.numbers if key.startswith("timed/")} == {"0", "1"}


def test_the_page_looks_right_in_a_browser(job):
    _, directory = job
    browser.check_looks(directory / "page.html", directory)


@pytest.mark.parametrize("rank", [0, 1])
def test_events_agree_with_the_statistics(job, rank):
    _, directory = job
    kinds = events_of(directory / "run", rank)
    steps = {step["step"]: step for step in lines(directory / "run" / f"rank{rank}.jsonl")}
    assert [event["step"] for event in kinds["step"]] == [2, 3, 4]
    for number in (2, 3, 4):
        memory = [event for event in kinds["memory"] if event["step"] == number]
        passes = [event for event in kinds["pass"] if event["step"] == number]
        assert max(event["device_bytes"] for event in memory) == steps[number]["peak_activation_bytes"]
        assert max(event["would_be_bytes"] for event in memory) == steps[number]["saved_bytes"]
        for kind in ("forward", "backward"):
            own = [event for event in passes if event["kind"] == kind]
            assert len(own) == steps[number]["microbatches"] == 4
            assert all(event["is_exact"] for event in own)
            seconds = sum(event["end"] - event["begin"] for event in own)
            assert seconds == pytest.approx(steps[number][f"{kind}_seconds"], abs=1e-6)


def test_passes_have_the_slots_of_the_schedule(job):
    host, directory = job
    for rank, num_buffers in ((0, 2), (1, 1)):
        passes = [event for event in events_of(directory / "run", rank)["pass"] if event["step"] == 4]
        slots = [event["slot"] for event in passes if event["kind"] == "forward"]
        if host == "megatron":
            assert slots == ["0/0", "0/1", "0/2", "0/3"]
        else:  # the number of a buffer, which goes round
            assert len(set(slots)) >= num_buffers
            assert set(slots) <= {"0", "1"}


def test_the_other_instructions_of_deepspeed_are_recorded(job):
    host, directory = job
    names = {event["name"] for event in events_of(directory / "run", 0)["instruction"]}
    if host == "megatron":
        assert not names
    else:
        assert {"SendActivation", "RecvGrad", "OptimizerStep", "LoadMicroBatch"} <= names


def test_layers_have_the_names_of_the_host(job):
    host, directory = job
    for rank in (0, 1):
        modules = {event["module"] for event in events_of(directory / "run", rank)["save"]}
        wanted = {"megatron": "decoder.layers.0", "deepspeed": "1" if rank == 0 else "3"}[host]
        assert any(module and module.startswith(f"{wanted}.") for module in modules), modules


def test_the_trace_has_a_process_a_rank(job):
    _, directory = job
    events = json.loads((directory / "trace.json").read_text())
    assert {event["pid"] for event in events} == {0, 1}
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "store 0", "load 0"} <= names


# ---------------------------------------------------------------------- the host's own monitor


def test_deepspeeds_monitor_gets_the_numbers_of_the_rank_that_speaks(job):
    host, directory = job
    if host != "deepspeed":
        pytest.skip("a monitor of DeepSpeed")
    steps = lines(directory / "run" / "rank0.jsonl")
    for name in METRICS:
        path = directory / "monitor" / "job" / f"Train_ssdtrain_{name}.csv"
        with path.open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["step", name]
        assert [float(value) for _, value in rows] == [step[name] for step in steps]
        with (path.with_name("Train_Samples_train_loss.csv")).open(newline="") as file:
            samples = [row[0] for row in list(csv.reader(file))[1:]]
        assert [samples_seen for samples_seen, _ in rows] == samples, "over the same samples as the loss"


_MEGATRON = """
import argparse, sys
from megatron.training import global_vars
from ssdtrain_plugin.integrations.megatron.metrics import write_metrics
from ssdtrain_plugin.stats import StepCounter

class Writer:
    def add_scalar(self, *scalar):
        print(*scalar)

stats = StepCounter(stored_bytes=5).freeze(step=3, rank=1, plan="")
write_metrics(stats)
global_vars._GLOBAL_ARGS = argparse.Namespace(curr_iteration=41)
global_vars._GLOBAL_TENSORBOARD_WRITER = Writer()
write_metrics(stats)
"""


@pytest.mark.megatron
@pytest.mark.skipif(not NEWEST, reason="SSDTRAIN_MEGATRON_PYTHON is not set")
def test_megatrons_writer_gets_the_numbers_over_its_own_iterations():
    done = subprocess.run(
        [NEWEST, "-c", _MEGATRON], capture_output=True, text=True, timeout=120, env=environment(**EAGER), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    written = [line for line in done.stdout.splitlines() if line.startswith("Train/ssdtrain/")]
    assert [line.split()[0].rpartition("/")[2] for line in written] == METRICS
    assert "Train/ssdtrain/stored_bytes 5 42" in written
