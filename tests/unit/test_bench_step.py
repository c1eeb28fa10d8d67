"""`ssdtrain bench step` compares the same step, bit by bit and turn by turn. No timing is asserted."""

import dataclasses
import itertools
import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from ssdtrain_plugin.bench import harness, step
from ssdtrain_plugin.bench.comparison import summarize
from ssdtrain_plugin.bench.harness import Door, StepResult, Strategy, measure_memory, order_of_round, run_interleaved
from ssdtrain_plugin.bench.models import VOCABULARY, Decoder, DecoderShape, library_text, recompute_layer
from ssdtrain_plugin.bench.step import (
    DecoderWorkload,
    StepSettings,
    create_strategy,
    measure,
    strategy_names,
    table_of,
)
from ssdtrain_plugin.cli import app
from ssdtrain_plugin.errors import ConfigError, StateError
from ssdtrain_plugin.stats import StepCounter

TINY = DecoderShape(layers=2, hidden=16, heads=2, sequence=8, microbatch=2)
CPU = torch.device("cpu")
ALL_OPTIONS = {"min_tensor_bytes": 1}


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture
def workload():
    return DecoderWorkload(TINY, microbatches=2, device=CPU)


@pytest.fixture
def make(tmp_path):
    return lambda name: create_strategy(name, path=str(tmp_path), options=ALL_OPTIONS)


def weights_of(workload):
    return [parameter.detach().clone() for parameter in workload.model.parameters()]


def are_equal(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# --- the model and its text


def test_a_decoder_predicts_from_what_came_before_alone():
    model = Decoder(TINY)
    hidden = []
    model.final_norm.register_forward_hook(lambda module, args, output: hidden.append(output))
    tokens = library_text(18).view(2, 9)
    later = tokens.clone()
    later[:, 5:] = 0
    model(tokens)
    model(later)
    torch.testing.assert_close(hidden[0][:, :5], hidden[1][:, :5])
    assert not torch.equal(hidden[0][:, 5:], hidden[1][:, 5:])


def test_recomputation_saves_less_and_gives_the_same_bits():
    model, tokens = Decoder(TINY), library_text(18).view(2, 9)
    saved = {"kept": 0, "recomputed": 0}
    for name, run_layer in {"kept": lambda layer, hidden: layer(hidden), "recomputed": recompute_layer}.items():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, name=name: (saved.__setitem__(name, saved[name] + 1), tensor)[1], lambda tensor: tensor
        ):
            loss = model(tokens, run_layer)
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert are_equal(gradients, saved.setdefault("gradients", gradients))
    assert saved["recomputed"] < saved["kept"]


def test_the_same_weights_and_text_every_time(workload):
    other = DecoderWorkload(TINY, microbatches=2, device=CPU)
    assert are_equal(weights_of(workload), weights_of(other))
    for number in (0, 1, 63, 64, 1000):
        batches = workload.batches(number)
        assert [batch.shape for batch in batches] == [(2, 9), (2, 9)]
        assert are_equal(batches, other.batches(number))
    assert not torch.equal(*workload.batches(0))
    assert not torch.equal(workload.batches(0)[1], workload.batches(1)[0])


def test_the_type_of_the_weights_is_chosen():
    bfloat16 = DecoderWorkload(dataclasses.replace(TINY, dtype="bfloat16"), microbatches=1, device=CPU)
    assert {parameter.dtype for parameter in bfloat16.model.parameters()} == {torch.bfloat16}
    assert bfloat16.model(*bfloat16.batches(0)).dtype == torch.float32


def test_making_a_workload_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    DecoderWorkload(TINY, microbatches=1, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_text_is_bytes_and_starts_again_when_it_ends():
    text = library_text(100)
    assert text.dtype == torch.int64
    assert 0 <= int(text.min()) <= int(text.max()) < VOCABULARY
    much = library_text(100_000_000)
    assert much.numel() == 100_000_000
    assert torch.equal(much[:100], text)


@pytest.mark.parametrize(
    "sizes", [{"layers": 0}, {"hidden": 17}, {"microbatch": -1}, {"dtype": "int8"}, {"dtype": "x"}]
)
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(TINY, **sizes)


# --- turns


@given(st.integers(1, 7), st.integers(0, 50))
def test_every_round_everybody_goes_once(num_strategies, round_number):
    assert sorted(order_of_round(num_strategies, round_number)) == list(range(num_strategies))


@given(st.integers(1, 7))
def test_everybody_takes_every_place(num_strategies):
    rounds = [order_of_round(num_strategies, number) for number in range(2 * num_strategies)]
    for place in zip(*rounds, strict=True):
        assert set(place) == set(range(num_strategies))


@given(st.integers(3, 7))
def test_nobody_has_always_the_same_predecessor(num_strategies):
    order = [index for number in range(2 * num_strategies) for index in order_of_round(num_strategies, number)]
    predecessors = {index: set() for index in range(num_strategies)}
    for before, after in itertools.pairwise(order):
        predecessors[after].add(before)
    assert all(len(others - {index}) > 1 for index, others in predecessors.items())


def test_all_strategies_run_the_same_step_from_the_same_weights(workload, make):
    seen = []
    strategies = [make(name) for name in ("keep", "count", "all", "fraction", "recompute")]
    results = run_interleaved(strategies, workload, rounds=3, on_step=seen.append)
    assert results == seen
    assert len(results) == 15
    by_round = {number: {r.digest for r in results if r.round_number == number} for number in range(3)}
    assert all(len(digests) == 1 for digests in by_round.values())
    assert len(set.union(*by_round.values())) == 3, "training went on from round to round"
    stats = {r.strategy: r.stats for r in results if r.round_number == 2}
    assert stats["keep"] is None
    assert stats["count"].stored_bytes == 0
    assert stats["all"].stored_bytes + stats["all"].forwarded_bytes > stats["fraction"].stored_bytes
    assert stats["all"].microbatches == 2


def test_a_run_is_as_many_steps_of_training_as_rounds(workload):
    alone = DecoderWorkload(TINY, microbatches=2, device=CPU)
    run_interleaved([Strategy("a"), Strategy("b"), Strategy("c")], workload, rounds=4)
    run_interleaved([Strategy("alone")], alone, rounds=4)
    assert are_equal(weights_of(workload), weights_of(alone))


class OneBitOff(torch.autograd.Function):
    """Gives a gradient that differs from the right one by the last bit of one number."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        wrong = gradient.clone()
        wrong.view(torch.int32).view(-1)[7] ^= 1
        return wrong


def test_one_wrong_bit_of_a_gradient_is_seen_and_stays_with_its_strategy(workload, make):
    wrong = Strategy("wrong", run_layer=lambda layer, hidden: OneBitOff.apply(layer(hidden)))
    results = run_interleaved([make("keep"), wrong, make("all")], workload, rounds=1)
    loss = {result.strategy: result.loss for result in results}
    assert loss["wrong"] == loss["keep"], "only the gradient is wrong"
    summaries = summarize(results, baseline="keep", counter=None, warm_up_rounds=0)
    assert {summary.strategy: summary.is_equal for summary in summaries} == {"keep": True, "wrong": False, "all": True}


def test_everything_is_detached_when_a_strategy_cannot_be_attached(workload, make, tmp_path):
    hopeless = create_strategy("all", path=str(tmp_path / "missing"), options={})
    doors = []

    def attach(door):
        doors.append(door)
        return make("all").attach(door)

    with pytest.raises(ConfigError):
        run_interleaved([Strategy("first", attach=attach), hopeless], workload, rounds=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssdtrain-")]
    offloader = make("all").attach(doors[0])  # or it would be attached still
    offloader.detach()


def test_one_model_has_a_door_for_each_offloader(workload, make):
    first, second = Door(workload.model, recompute_layer), Door(workload.model, recompute_layer)
    with make("count").attach(first), make("count").attach(second), pytest.raises(StateError):
        make("count").attach(first)


# --- memory


class Ballast(nn.Module):
    """Holds ``nbytes`` of its own from forward to backward."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes = nbytes
        self.held = []

    def __call__(self, layer, hidden):
        self.held.append(torch.ones(self.nbytes, dtype=torch.uint8))
        output = layer(hidden)
        output.register_hook(lambda gradient: self.held.clear())
        return output


def test_the_memory_of_a_step_is_that_of_its_strategy(workload):
    before = weights_of(workload)
    ballast = Ballast(64 << 20)
    plain = measure_memory(Strategy("plain"), workload, steps=1)
    heavy = measure_memory(Strategy("heavy", run_layer=ballast), workload, steps=1)
    again = measure_memory(Strategy("plain"), workload, steps=1)
    if plain is None:
        pytest.skip("this system does not tell the peak of a process")
    assert heavy - max(plain, again) > 100 << 20, "two layers hold it at once"
    assert are_equal(weights_of(workload), before)


def test_a_system_that_does_not_tell_is_no_error(workload, monkeypatch):
    monkeypatch.setattr(harness, "_forget_peak", lambda device: None)
    assert measure_memory(Strategy("plain"), workload, steps=1) is None


# --- the comparison


def result(strategy, number, seconds, *, digest="same", peak_bytes=None):
    stats = None
    if peak_bytes is not None:
        counter = StepCounter(peak_activation_bytes=peak_bytes, saved_bytes=100, stored_bytes=7)
        counter.failures["disk full"] = 2
        stats = counter.freeze(step=number, rank=0, plan="a plan")
    return StepResult(strategy, number, seconds, 0.5, 0.25, 10, 1.0, digest, stats)


def results_of(*rows):
    """A round a row, in seconds: the baseline's, the counter's and the strategy's."""
    return [
        one
        for number, (keep, count, offload) in enumerate(rows)
        for one in (
            result("keep", number, keep),
            result("count", number, count, peak_bytes=100),
            result("all", number, offload, peak_bytes=20),
        )
    ]


def test_ratios_are_of_the_same_round_and_rounds_to_warm_up_do_not_count():
    results = results_of((1.0, 1.0, 50.0), (1.0, 1.0, 2.0), (2.0, 2.0, 4.0), (10.0, 10.0, 10.0))
    keep, _, offload = summarize(results, baseline="keep", counter="count", warm_up_rounds=1)
    assert (offload.rounds, offload.seconds, offload.lowest_seconds, offload.highest_seconds) == (3, 4.0, 2.0, 10.0)
    assert (offload.median_of_ratios, offload.ratio_of_medians) == (2.0, 2.0)
    assert (offload.first_quartile_of_ratios, offload.third_quartile_of_ratios) == (1.5, 2.0)
    assert (offload.cpu_ratio, offload.stored_bytes, offload.num_failures) == (1.0, 7, 6)
    assert (keep.median_of_ratios, keep.ratio_of_medians) == (1.0, 1.0)


def test_the_peak_of_the_baseline_is_that_of_the_counter():
    results = results_of((1.0, 1.0, 1.0))
    keep, count, offload = summarize(results, baseline="keep", counter="count", warm_up_rounds=0)
    assert (keep.peak_activation_bytes, keep.peak_ratio, count.peak_ratio) == (100, 1.0, 1.0)
    assert (offload.peak_activation_bytes, offload.peak_ratio) == (20, 0.2)
    keep, _, offload = summarize(results, baseline="keep", counter=None, warm_up_rounds=0)
    assert (keep.peak_activation_bytes, keep.peak_ratio) == (None, None)
    assert (offload.peak_activation_bytes, offload.peak_ratio) == (20, None)


def test_a_difference_while_warming_up_counts():
    results = [*results_of((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))]
    results[2] = dataclasses.replace(results[2], digest="other")
    summaries = summarize(results, baseline="keep", counter=None, warm_up_rounds=1)
    assert [summary.is_equal for summary in summaries] == [True, True, False]


def test_nothing_left_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        summarize(results_of((1.0, 1.0, 1.0)), baseline="keep", counter=None, warm_up_rounds=1)
    with pytest.raises(ValueError, match="at least one"):
        summarize(results_of((1.0, 1.0, 1.0)), baseline="absent", counter=None, warm_up_rounds=0)


# --- all of it


@pytest.mark.parametrize("names", [("all",), ("keep", "some"), ("keep", "all", "all")])
def test_strategies_that_cannot_be_compared_are_refused(names):
    with pytest.raises(ValueError, match="expected each once"):
        StepSettings(path=".", strategies=names)


def test_what_is_measured_and_what_is_printed(tmp_path, capsys):
    steps = []
    settings = StepSettings(
        path=str(tmp_path),
        shape=TINY,
        strategies=strategy_names(),
        rounds=1,
        warm_up_rounds=1,
        threads=(1,),
        memory_steps=1,
        options=ALL_OPTIONS,
    )
    report = measure(settings, on_step=steps.append)
    assert len(steps) == settings.num_steps
    assert capsys.readouterr().out == "", "the report has the output stream to itself"
    (run,) = report.runs
    assert [summary.strategy for summary in run.summaries] == list(strategy_names())
    assert all(summary.is_equal for summary in run.summaries)
    assert set(run.memory_bytes) == set(strategy_names())
    written = json.loads(json.dumps(dataclasses.asdict(report)))
    assert written["settings"]["shape"]["hidden"] == TINY.hidden
    assert written["runs"][0]["results"][0]["stats"] is None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table_of(report.runs[0]))
    assert "equal, all bits" in capture.get()
    assert "DIFFERENT" not in capture.get()


def test_each_number_of_threads_is_a_run_of_its_own(tmp_path):
    seen = []
    settings = StepSettings(
        path=str(tmp_path), shape=TINY, strategies=("keep",), rounds=1, warm_up_rounds=0, threads=(2, 1), memory_steps=0
    )
    report = measure(settings, on_step=lambda name: seen.append((name, torch.get_num_threads())))
    assert seen == [("keep", 2), ("keep", 1)]
    assert [(run.threads, run.memory_bytes) for run in report.runs] == [(2, {}), (1, {})]


TINY_MODEL = [f"--model={field.name}={getattr(TINY, field.name)}" for field in dataclasses.fields(TINY)]


@pytest.fixture
def run_command(tmp_path, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # the command sets it, for good, where it is not set

    def run(*arguments, path=tmp_path):
        command = ["bench", "step", str(path), *TINY_MODEL, "--rounds", "1", "--threads", "1", *arguments]
        return CliRunner().invoke(app, command)

    return run


def test_the_command_prints_a_table_or_json(run_command):
    table = run_command("--strategy", "keep", "--strategy", "all")
    assert table.exit_code == 0, table.output
    assert "equal, all bits" in table.output
    as_json = run_command("--option", "min_tensor_bytes=1 KiB", "--json")
    report = json.loads(as_json.stdout)
    assert report["settings"]["options"]["min_tensor_bytes"] == "1 KiB"
    assert [row["strategy"] for row in report["runs"][0]["summaries"]] == ["keep", "count", "all"]


def test_the_command_fails_if_a_bit_differs(run_command, monkeypatch):
    wrong = Strategy("all", run_layer=lambda layer, hidden: OneBitOff.apply(layer(hidden)))
    right = step.create_strategy
    monkeypatch.setattr(step, "create_strategy", lambda name, **rest: wrong if name == "all" else right(name, **rest))
    table = run_command()
    assert table.exit_code == 1
    assert "DIFFERENT" in table.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "all"], "among them"),
        (["--model", "width=3"], "width"),
        (["--model", "hidden=wide"], "whole sizes"),
        (["--model", "hidden"], "expected NAME=VALUE"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_options(run_command, arguments, said):
    refused = run_command(*arguments)
    assert refused.exit_code == 2
    assert said in refused.output


def test_what_the_plugin_refuses_is_said(run_command, tmp_path):
    for refused in (run_command("--option", "io_threads=many"), run_command(path=tmp_path / "missing")):
        assert refused.exit_code == 1
        assert "io_threads" in refused.output or "missing" in refused.output


def test_every_policy_but_none_is_a_strategy():
    names = strategy_names()
    assert names[:2] == ("keep", "count")
    assert {"all", "fraction", "recompute"} <= set(names)
    assert "none" not in names
