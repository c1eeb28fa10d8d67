"""`ssdtrain bench rok`: all strategies with the same bits, one account for all, a budget that is met. Tiny sizes."""

import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

from ssdtrain_plugin.bench import rok_report
from ssdtrain_plugin.bench.fit import largest_that_fits
from ssdtrain_plugin.bench.harness import Strategy, measure_memory
from ssdtrain_plugin.bench.matrix import RokMatrix, Stack, quick_matrix, read_matrix
from ssdtrain_plugin.bench.meter import SavedBytesMeter
from ssdtrain_plugin.bench.models import DecoderShape, create_stack, library_text, recompute_core, recompute_layer
from ssdtrain_plugin.bench.peers import DiskHooks, LeftOut, Traffic, open_peers
from ssdtrain_plugin.bench.rok import EqualBatch, as_dict, measure
from ssdtrain_plugin.bench.step import DecoderWorkload, create_strategy
from ssdtrain_plugin.cli import app
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.integrations import deepspeed_peer

CPU = torch.device("cpu")
SIZES = {"layers": 4, "hidden": 32, "heads": 2, "sequence": 16, "microbatch": 4}
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "bench").glob("*.yaml"))


def stack_of(family, **others):
    return Stack(**{"name": family, "family": family, **SIZES, **others})


def matrix_of(*stacks, **others):
    counts = {"rounds": 1, "warm_up_rounds": 1, "budget_rounds": 1, "budget_warm_up_rounds": 1}
    return RokMatrix(stacks=stacks, host_bytes="64 MiB", **counts, **others, options={"min_tensor_bytes": 1})


# --- the stacks


@pytest.mark.parametrize("family", ["gpt", "bert", "t5"])
@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_recomputation_of_layers_and_of_cores_gives_the_same_bits(family, attention):
    shape = stack_of(family, attention=attention).shape
    model, tokens = create_stack(shape), library_text(4 * shape.row_tokens).view(4, -1)
    found = []
    for run_layer in (None, recompute_layer, recompute_core):
        model.zero_grad()
        loss = model(tokens) if run_layer is None else model(tokens, run_layer)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_an_encoder_sees_what_comes_later_but_not_what_is_masked():
    model = create_stack(stack_of("bert").shape)
    tokens = library_text(17).view(1, -1)
    hidden = []
    model.final_norm.register_forward_hook(lambda module, args, output: hidden.append(output.detach()))
    later, masked = tokens.clone(), tokens.clone()
    later[:, 15] += 1
    masked[:, 14] += 1  # a multiple of seven
    for each in (tokens, later, masked):
        model(each)
    assert not torch.equal(hidden[0][:, 0], hidden[1][:, 0])
    assert torch.equal(hidden[0], hidden[2])


def test_a_decoder_reads_what_its_encoder_read():
    model = create_stack(stack_of("t5").shape)
    tokens = library_text(33).view(1, -1)
    hidden = []
    model.final_norm.register_forward_hook(lambda module, args, output: hidden.append(output.detach()))
    early, late = tokens.clone(), tokens.clone()
    early[:, 0] += 1  # the encoder's
    late[:, 31] += 1  # the last of the decoder's
    for each in (tokens, early, late):
        model(each)
    assert not torch.equal(hidden[0][:, 0], hidden[1][:, 0])
    torch.testing.assert_close(hidden[0][:, :15], hidden[2][:, :15])
    assert not torch.equal(hidden[0][:, 15], hidden[2][:, 15])


def test_cores_of_naive_attention_are_worth_recomputing():
    shape = stack_of("gpt", attention="naive", sequence=64).shape
    workload = DecoderWorkload(shape, microbatches=1, device=CPU)
    assert peak_of(Strategy("selective", run_layer=recompute_core), workload) < peak_of(Strategy("keep"), workload)


# --- one account for all


def peak_of(strategy, workload, steps=1):
    meter = SavedBytesMeter(workload.model)
    with meter.watching():
        measure_memory(strategy, workload, steps=steps)
    return meter.peak_bytes


@pytest.fixture(params=["gpt", "bert", "t5"])
def workload(request):
    return DecoderWorkload(stack_of(request.param).shape, microbatches=1, device=CPU)


def test_the_meter_counts_what_the_plugin_counts(workload):
    """Two accounts that share no code but the question what a weight is."""
    counter = create_strategy("count", path="", options={})
    own = []
    measure_memory(counter, workload, steps=1, on_step=lambda result: own.append(result.stats.peak_activation_bytes))
    assert peak_of(Strategy("keep"), workload) == own[0]
    assert peak_of(counter, workload) == own[0]


def test_recomputation_is_seen_in_backward_and_takes_less(workload):
    keep, recompute = Strategy("keep"), Strategy("recompute", run_layer=recompute_layer)
    layers = sum(1 for each in workload.model.modules() if type(each).__name__ == "_Layer")
    inputs = workload.batches(0)[0].shape[0] * SIZES["sequence"] * SIZES["hidden"] * 4 * layers
    assert inputs < peak_of(recompute, workload) < peak_of(keep, workload)


def test_a_storage_counts_once_and_until_it_dies():
    meter = SavedBytesMeter(nn.Linear(4, 4))
    with meter.watching():
        leaf = torch.ones(100, requires_grad=True)
        middle = leaf * 2
        output = (middle.sin() + middle.cos()).sum()
        assert meter.live_bytes == 400
        del middle
        output.backward()
        first = torch.ones(50, requires_grad=True).exp()
    assert meter.live_bytes == 200
    del first
    gc.collect()
    meter.see(torch.empty(0))
    assert (meter.live_bytes, meter.peak_bytes) == (0, 400)


def test_weights_do_not_count_and_the_hooks_of_others_are_as_before():
    layer = nn.Linear(8, 8)
    meter, enter = SavedBytesMeter(layer), saved_tensors_hooks.__enter__
    packed = []
    with meter.watching(), saved_tensors_hooks(lambda t: (packed.append(t.shape), t.detach())[1], lambda t: t):
        layer(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert meter.peak_bytes == 64
    assert packed
    assert saved_tensors_hooks.__enter__ is enter
    with pytest.raises(ZeroDivisionError), meter.watching():
        raise ZeroDivisionError
    assert saved_tensors_hooks.__enter__ is enter


# --- peers


def test_the_recipe_writes_a_file_a_tensor_and_leaves_none(tmp_path):
    traffic = Traffic()
    hooks = DiskHooks(tmp_path, traffic)
    leaf = torch.randn(2000, requires_grad=True)
    small = torch.randn(10, requires_grad=True)
    with hooks.around():
        output = leaf.sin().sum() + small.sin().sum()
    assert len(list(tmp_path.iterdir())) == 1, "the small one stays in memory"
    output.backward()
    assert torch.equal(leaf.grad, leaf.detach().cos())
    assert torch.equal(small.grad, small.detach().cos())
    del output
    assert list(tmp_path.iterdir()) == []
    stored, loaded = traffic.take()
    assert stored == loaded > leaf.nbytes
    assert traffic.take() == (0, 0)


def test_a_peer_that_does_not_run_here_is_left_out_with_a_reason(tmp_path):
    with open_peers(str(tmp_path), CPU, {"other": "it is not there"}) as found:
        left_out = {each.name: each.reason for each in found if isinstance(each, LeftOut)}
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    assert left_out["other"] == "it is not there"
    assert all("cpu" in left_out[f"{name} OffloadActivations"] for name in ("TRL", "torchtune"))


@pytest.mark.deepspeed
def test_the_reason_for_which_deepspeed_is_left_out_is_true(monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.activation_checkpointing import checkpointing

    assert deepspeed_peer.why_not("cpu")
    assert deepspeed_peer.why_not("cuda") is None
    layer, hidden = nn.LayerNorm(8), torch.randn(2, 8, requires_grad=True)
    before = checkpointing.CPU_CHECKPOINT
    with deepspeed_peer.cpu_checkpointing() as run_layer:
        output = run_layer(layer, hidden)
        assert torch.equal(output, layer(hidden))
        with pytest.raises(RuntimeError, match="size"):
            output.sum().backward()
    assert before == checkpointing.CPU_CHECKPOINT


# --- the search


@given(st.integers(1, 500), st.integers(1, 300), st.integers(0, 3000), st.integers(0, 90000), st.booleans())
def test_the_search_finds_the_largest_that_fits(limit, slope, offset, budget, is_known):
    asked = []

    def peak(microbatch):
        asked.append(microbatch)
        return offset + slope * microbatch

    known = (7, offset + slope * 7) if is_known and limit >= 7 else None
    fit = largest_that_fits(peak, budget_bytes=budget, limit=limit, known=known)
    largest = max((size for size in range(1, limit + 1) if offset + slope * size <= budget), default=0)
    assert fit.microbatch == largest
    assert fit.peak_bytes == (offset + slope * largest if largest else 0)
    assert fit.is_limited == (largest == limit)
    assert fit.num_measured == len(asked) == len(set(asked)) <= 30


def test_a_peak_in_proportion_is_found_in_two_measurements():
    asked = []
    fit = largest_that_fits(
        lambda size: (asked.append(size), 10 * size)[1], budget_bytes=1234, limit=10_000, known=(40, 400)
    )
    assert (fit.microbatch, asked) == (123, [123, 124])


# --- the matrix


def test_the_files_that_come_with_it_can_be_read():
    assert [path.name for path in CONFIGS] == ["cpu.yaml", "gpu.yaml"]
    for path in CONFIGS:
        matrix = read_matrix(path)
        assert matrix.peers
        assert {stack.family for stack in matrix.stacks} == {"gpt", "bert", "t5"}
    assert [stack.family for stack in quick_matrix().stacks] == ["gpt", "bert", "t5"]


def test_operations_are_counted_as_for_a_plan():
    stack = stack_of("gpt")
    tokens, hidden = stack.sequence, stack.hidden
    layer = 24 * tokens * hidden**2 + 4 * tokens**2 * hidden
    assert stack.flops == 3 * (4 * layer + 2 * tokens * hidden * 256)
    assert stack_of("t5").tokens == 2 * tokens


GOOD = {"stacks": [{"name": "gpt", **SIZES}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stacks": []}, "stacks"),
        ({"stacks": [{"name": "gpt", **SIZES, "hidden": 33}]}, "multiple of `heads`"),
        ({"stacks": [{"name": "gpt", **SIZES, "layers": 0}]}, "stacks.0.layers"),
        ({"stacks": [{"name": "gpt", **SIZES, "width": 3}]}, "stacks.0.width: unknown field"),
        ({"stacks": [{"name": "gpt", **SIZES, "family": "llama"}]}, "llama"),
        ({"stacks": [{"name": "t5", **SIZES, "family": "t5", "layers": 1}]}, "t5"),
        ({"stacks": [{"name": "gpt", **SIZES, "attention": "linear"}]}, "linear"),
        ({"stacks": [{"name": "gpt", **SIZES, "dtype": "int8"}]}, "int8"),
        ({"stacks": 2 * GOOD["stacks"]}, "a name of its own"),
        ({"strategies": ["all"]}, "`keep` among them"),
        ({"strategies": ["keep", "magic"]}, "magic"),
        ({"budget": 1.5}, "budget"),
        ({"rounds": 0}, "rounds"),
        ({"host_bytes": "many"}, "host_bytes"),
        ({"options": {"policy": "all"}}, "policy"),
        ({"speed": 3}, "speed: unknown field"),
    ],
)
def test_nonsense_is_one_clear_error(tmp_path, change, said):
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_matrix(path)
    assert said in str(caught.value)
    assert "matrix.yaml" in str(caught.value)


def test_all_faults_are_listed(tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "rounds": 0, "speed": 3, "threads": -1}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_matrix(path)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["[1, 2", "just words", "", "- 1"])
def test_what_is_no_matrix_is_refused(tmp_path, text):
    path = tmp_path / "matrix.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"matrix\.yaml"):
        read_matrix(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        read_matrix(tmp_path / "missing.yaml")


# --- all of it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive")
    matrix = matrix_of(stack_of("gpt"), stack_of("t5"))
    told, totals = [], []
    report = measure(matrix, str(path), others={"other": "no"}, on_step=told.append, on_total=totals.append)
    return report, told, totals, path


def by_name(entries):
    return {each.strategy: each for each in entries}


def test_every_strategy_has_the_gradients_of_keep(run):
    report, told, totals, path = run
    ours = ["keep", "recompute", "selective", "all", "adaptive", "host"]
    for each in report.runs:
        assert [entry.strategy for entry in each.equal_batch] == [*ours, "save_on_cpu", "disk hooks"]
        assert all(entry.summary.is_equal for entry in each.equal_batch)
        assert len({result.digest for result in each.results if result.round_number == 0}) == 1
    assert report.is_equal
    assert [each.name for each in report.left_out][-1] == "other"
    assert len(totals) == 1
    assert told
    assert list(path.iterdir()) == []
    assert torch.autograd.graph.saved_tensors_hooks.__enter__.__qualname__ == "saved_tensors_hooks.__enter__"


def test_peaks_and_bytes_are_those_of_the_strategies(run):
    for each in run[0].runs:
        found = by_name(each.equal_batch)
        keep = found["keep"].peak_bytes
        assert found["keep"].peak_ratio == 1.0
        assert found["recompute"].peak_bytes < keep
        assert found["disk hooks"].peak_bytes < keep
        assert found["save_on_cpu"].peak_bytes == keep, "on a CPU it copies nothing"
        # Stores of tiny tensors may end after their turn; then they are handed back from memory.
        assert all(found[name].peak_bytes <= keep for name in ("all", "adaptive", "host"))
        assert found["disk hooks"].stored_bytes == found["disk hooks"].loaded_bytes > 0
        assert [found[name].stored_bytes for name in ("keep", "recompute", "selective", "save_on_cpu")] == [0] * 4
        for entry in each.equal_batch:
            assert entry.tokens_per_second == pytest.approx(4 * each.stack.tokens / entry.summary.seconds)
            assert entry.flops_per_second == pytest.approx(4 * each.stack.flops / entry.summary.seconds)


def test_what_is_synchronous_fits_the_budget_and_one_more_would_not(run):
    for each in run[0].runs:
        assert each.budget_bytes == pytest.approx(0.4 * by_name(each.equal_batch)["keep"].peak_bytes)
        found = by_name(each.equal_memory)
        assert found["keep"].microbatch == 1  # of 4
        assert found["recompute"].microbatch >= 1
        assert found["disk hooks"].microbatch >= 4 * found["keep"].microbatch
        for name in ("keep", "recompute", "disk hooks"):
            assert found[name].peak_bytes <= each.budget_bytes
            assert found[name].seconds > 0


def test_what_is_written(run, tmp_path):
    report = run[0]
    json.loads(json.dumps(as_dict(report), allow_nan=False))
    console = Console(width=300)
    with console.capture() as capture:
        for table in rok_report.tables_of(report, report.runs[0]):
            console.print(table)
    assert "equal, all bits" in capture.get()
    text = rok_report.markdown(report, command="ssdtrain bench rok DRIVE --quick", date="2026-11-20", picture="rok.png")
    assert text.startswith("# 2026-11-20: `ssdtrain bench rok`")
    for said in (
        "DRIVE --quick",
        "](rok.png)",
        "cores of",
        f"torch {torch.__version__}",
        "Left out",
        "- other: no.",
        "## t5",
        "iB of activations, 40% of keep's peak",
    ):
        assert said in text
    assert str(run[3]) not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows if line.startswith("| disk hooks")} == {9, 14}
    verdicts = list(rok_report.verdicts(report.runs[0]))
    assert len(verdicts) == 6
    assert text.count("- met: ") + text.count("- MISSED: ") == 12


def test_the_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    rok_report.plot(run[0], tmp_path / "rok.png")
    assert (tmp_path / "rok.png").read_bytes().startswith(b"\x89PNG")


def verdict_of(run, **change):
    entry = by_name(run.equal_batch)["all"]
    summary = dataclasses.replace(
        entry.summary, **{name: change.pop(name) for name in ("median_of_ratios",) if name in change}
    )
    new: EqualBatch = dataclasses.replace(entry, summary=summary, **change)
    entries = tuple(new if each.strategy == "all" else each for each in run.equal_batch)
    return [is_met for _, is_met in rok_report.verdicts(dataclasses.replace(run, equal_batch=entries))][:2]


def test_a_target_is_met_or_missed(run):
    one = run[0].runs[0]
    recompute = by_name(one.equal_batch)["recompute"].peak_bytes
    assert verdict_of(one, median_of_ratios=1.02, peak_bytes=recompute - 1) == [True, True]
    assert verdict_of(one, median_of_ratios=1.021, peak_bytes=recompute) == [False, False]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # the command sets it, for good, where it is not set
    path = tmp_path / "matrix.yaml"
    plain = {**GOOD, "strategies": ["keep", "all"], "peers": False, "rounds": 1, "warm_up_rounds": 1}
    plain |= {"budget_rounds": 1, "budget_warm_up_rounds": 1, "options": {"min_tensor_bytes": 1}}
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    (tmp_path / "drive").mkdir()
    return lambda *arguments: CliRunner().invoke(app, ["bench", "rok", str(tmp_path / "drive"), *arguments]), str(path)


def test_the_command_writes_three_files(command, tmp_path):
    pytest.importorskip("matplotlib")
    invoke, matrix = command
    done = invoke(matrix, "--output", str(tmp_path / "out"), "--name", "some")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["some.json", "some.md", "some.png"]
    assert "some.png" in (tmp_path / "out" / "some.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "some.json").read_text(encoding="utf-8"))["matrix"]["strategies"] == [
        "keep",
        "all",
    ]
    assert "equal, all bits" in done.output
    assert list((tmp_path / "drive").iterdir()) == []


def test_the_command_prints_json(command):
    invoke, matrix = command
    assert json.loads(invoke(matrix, "--json").stdout)["runs"][0]["stack"]["name"] == "gpt"


def test_the_command_says_what_is_wrong(command, tmp_path):
    invoke, matrix = command
    for arguments in ((), (matrix, "--quick")):
        refused = invoke(*arguments)
        assert refused.exit_code == 2
        assert "expected one of them" in refused.output
    missing = invoke(str(tmp_path / "none.yaml"))
    assert missing.exit_code == 1
    assert "none.yaml" in missing.output
    assert "Traceback" not in missing.output
    device = invoke(matrix, "--device", "abacus")
    assert device.exit_code == 1
    assert "abacus" in device.output


def test_sizes_of_a_shape_are_checked_where_they_are_made():
    with pytest.raises(ValueError, match="family"):
        DecoderShape(family="mamba")
