"""Megatron's own training loop: a script that is not changed, flags only, and the same numbers in its log.

The newest release runs in the interpreter that ``SSDTRAIN_MEGATRON_PYTHON`` names. 0.17, the last with the older call
form, runs in this one, from the directory ``SSDTRAIN_MEGATRON_017``. ``make test`` makes both.
"""

import importlib.util
import os
import re
import sys

import pytest
from megatron_jobs import (
    DOOR,
    EVALUATED_EVERY,
    FAILING,
    FLAGS,
    FULL,
    INFLIGHT_BYTES,
    MIB,
    MICROBATCHES,
    NEWEST,
    PP2,
    PREFETCH_BYTES,
    RELEASE_017,
    SCRIPT,
    STEPS,
    THROUGH,
    TP2,
    Job,
    plugin_flags,
    table_of,
    torchrun,
    train_with,
    train_without,
    variables,
)
from processes import free_port, run, run_ranks

pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(500)]

NUM_WARM_UP_STEPS = 2


def _why_no_017():
    if not RELEASE_017:
        return "SSDTRAIN_MEGATRON_017 is not set"
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    if sys.version_info < (3, 11):
        return "megatron.training 0.17 needs Python 3.11"
    return ""


needs_newest = pytest.mark.skipif(not NEWEST, reason="SSDTRAIN_MEGATRON_PYTHON is not set")
needs_017 = [pytest.mark.skipif(bool(_why_no_017()), reason=_why_no_017()), pytest.mark.deepspeed]

# Each release, each way in, and each of the two together with the newest release.
BY_FLAGS = Job("PP2 x TP2, full recompute flags", 4, (*PP2, *TP2, *FULL))
BY_DOOR = Job("PP2, door", 2, (*PP2,), script=DOOR, is_through_run=False, compiles=True)
JOBS = [BY_FLAGS, BY_DOOR, Job("PP2, 0.17, deepspeed", 2, (*PP2,), is_017=True)]
MORE_JOBS = [
    Job("PP2", 2, (*PP2,)),
    Job("PP2, 0.17, deepspeed, door", 2, (*PP2,), is_017=True, script=DOOR, is_through_run=False),
]


def _param(job, *marks):
    return pytest.param(job, id=job.name, marks=[*(needs_017 if job.is_017 else [needs_newest]), *marks])


each_job = pytest.mark.parametrize(
    "job", [*map(_param, JOBS), *(_param(job, pytest.mark.exhaustive) for job in MORE_JOBS)]
)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Train without the plugin, once for all jobs with the same flags."""
    found = {}

    def get(job):
        key = job.flags, job.is_017, job.compiles
        if key not in found:
            found[key] = train_without(job, tmp_path_factory.mktemp("without"))
            assert found[key].code == 0, found[key].output[-8000:]
        return found[key]

    return get


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory):
    """Train a job with the plugin, once."""
    found = {}

    def get(job):
        if job.name not in found:
            found[job.name] = train_with(job, tmp_path_factory.mktemp("with"))
            assert found[job.name].code == 0, found[job.name].output[-8000:]
        return found[job.name]

    return get


@each_job
def test_the_log_shows_the_losses_and_norms_of_the_run_without_the_plugin(without, with_plugin, job):
    expected, evaluations = without(job).printed()
    assert [int(number) for number, *_ in expected] == list(range(1, STEPS + 1))
    losses = [re.search(r"lm loss: (\S+)", line)[1] for *_, line in expected]
    assert len(set(losses)) > STEPS // 2, "nothing was trained"
    assert all(re.search(r"grad norm: \d+\.\d+ \|", line) for *_, line in expected)
    assert len(evaluations) == STEPS // EVALUATED_EVERY + 2  # at the end on both sets
    assert with_plugin(job).printed() == (expected, evaluations)


@each_job
def test_what_goes_out_comes_back_ahead_of_backward(with_plugin, job):
    ranks = with_plugin(job).steps
    assert len(ranks) == job.num_ranks
    for rank, steps in enumerate(ranks):
        assert [step["rank"] for step in steps] == [rank] * STEPS, "a step of the loop is a step in the books"
        assert {step["microbatches"] for step in steps} == {MICROBATCHES}, "evaluation counts nowhere"
        assert all(step["stored_bytes"] > 0 for step in steps)
        assert [step["num_loads_on_demand"] for step in steps[NUM_WARM_UP_STEPS:]] == [0] * (STEPS - NUM_WARM_UP_STEPS)
        assert not any(step["failures"] for step in steps)


@each_job
def test_live_activations_stay_within_the_windows(with_plugin, job):
    for steps in with_plugin(job).steps:
        for step in steps[NUM_WARM_UP_STEPS:]:
            kept_bytes = 2 * step["kept_bytes"] // MICROBATCHES  # two micro-batches are in flight at most
            assert step["peak_activation_bytes"] <= kept_bytes + INFLIGHT_BYTES + PREFETCH_BYTES + MIB // 2
            assert step["peak_activation_bytes"] < step["saved_bytes"]


@each_job
def test_nothing_is_left(with_plugin, job):
    result = with_plugin(job)
    assert result.files == ()
    for word in ("terminate called", "Exception ignored", "Traceback"):
        assert word not in result.output


@needs_newest
def test_a_table_shows_bytes_peak_and_stall_of_every_rank(with_plugin):
    jobs = [BY_FLAGS, BY_DOOR]
    results = {job.name: with_plugin(job) for job in jobs}
    table = table_of(results)
    sys.stdout.write(f"\n{table}\n")
    lines = table.splitlines()[2:]
    assert len(lines) == sum(job.num_ranks for job in jobs)
    assert all(re.fullmatch(r"\| [^|]+ \| \d( \| \d+\.\d\d){3} \| \d+% \| \d+\.\d \| 0 \|", line) for line in lines)


@needs_newest
def test_the_log_says_what_the_recompute_flags_mean_now(with_plugin):
    output = with_plugin(BY_FLAGS).output
    line = f"{' '.join(FULL)}: these layers are offloaded, none is recomputed, and the rest is kept"
    assert output.count(line) == 2, "one voice a stage"
    assert "no --recompute-granularity: all that forward saves may be offloaded" in with_plugin(BY_DOOR).output


# ---------------------------------------------------------------------- flags that cannot be obeyed

# Through the plugin's `run` and through the door; the launcher's own flag stands in front of the script or behind it.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
BAD_FLAGS = {
    "door": (
        [DOOR],
        ["--ssdtrain", "--ssdtrain-paths", "/no/such/drive", "--ssdtrain-policy", "everything"],
        ["2 problems in the --ssdtrain flags", "policy: 'everything'", "`/no/such/drive`: no such directory"],
    ),
    "no switch": (
        [*THROUGH, SCRIPT],
        ["--ssdtrain-policy", "all", "--local_rank=0"],
        ["1 problem in the --ssdtrain flags", "`--ssdtrain-policy`: does nothing without `--ssdtrain`"],
    ),
    "refused": (
        [*THROUGH, "--local_rank=0", SCRIPT],
        [
            "--ssdtrain",
            "--ssdtrain-policy",
            "none",
            "--recompute-granularity",
            "selective",
            "--recompute-modules",
            "mlp",
        ],
        ["1 problem in Megatron's settings together with --ssdtrain", "--recompute-modules mlp: "],
    ),
}


@needs_newest
@pytest.mark.parametrize("name", BAD_FLAGS)
def test_one_message_says_what_is_wrong_before_a_model_is_built(tmp_path, name):
    start, flags, words = BAD_FLAGS[name]
    common = {**ALONE, "MASTER_PORT": str(free_port()), **variables()}
    code, output = run([NEWEST, *start, *FLAGS, *flags], tmp_path / "log", **common)
    assert code == 1, output[-6000:]
    assert output.count("ssdtrain: ") == 1
    message = output[output.index("ssdtrain: ") :]
    assert "hint: " in message
    for word in words:
        assert word in message
    for word in ("Traceback", "building GPT model", "number of parameters"):
        assert word not in output


# ---------------------------------------------------------------------- a rank that fails


@needs_newest
def test_a_killed_rank_ends_the_job_and_leaves_nothing(tmp_path):
    command = [*torchrun(NEWEST, 2), *THROUGH, FAILING, *FLAGS, *PP2, *plugin_flags(tmp_path)]
    code, output = run(command, tmp_path / "log", FAILS_BY="kill", **variables())
    assert code not in (0, None)
    assert "Signal 9 (SIGKILL)" in output
    iterations = re.findall(rf"iteration +(\d+)/ +{STEPS} \|", output)
    assert iterations in (["1"], ["1", "2"]), "the last line may be lost with its rank"
    assert os.listdir(tmp_path / "drive") == []


@needs_newest
def test_a_rank_that_raises_ends_by_itself_with_its_own_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS_BY", "raise")
    command = [NEWEST, *THROUGH, FAILING, *FLAGS, *PP2, *plugin_flags(tmp_path)]
    with pytest.raises(AssertionError, match="---- rank 1, exit code 1\n") as caught:
        run_ranks(command, tmp_path, timeout_seconds=100)
    limit = 12 * 1024**3
    assert f"ValueError: out of data, with at most {limit} bytes" in str(caught.value)
    assert os.listdir(tmp_path / "drive") == []
