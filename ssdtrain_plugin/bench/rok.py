"""``ssdtrain bench rok``: recompute, offload or keep, and other people's ways, in one interleaved run.

The curve is SSDTrain's (arXiv 2408.10013, figure 7): how fast a step is over how much memory its
activations take. First all strategies train the same micro-batch. Then each gets the same budget
of activation memory and trains the largest micro-batch that fits it, which is found by measuring.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ssdtrain_plugin.bench.comparison import StrategySummary, summarize
from ssdtrain_plugin.bench.fit import largest_that_fits
from ssdtrain_plugin.bench.harness import StepResult, Strategy, measure_memory, run_interleaved
from ssdtrain_plugin.bench.machine import MachineFacts, machine_facts
from ssdtrain_plugin.bench.matrix import RokMatrix, Stack
from ssdtrain_plugin.bench.meter import SavedBytesMeter
from ssdtrain_plugin.bench.models import CallLayer, recompute_core
from ssdtrain_plugin.bench.peers import LeftOut, Peer, Traffic, open_peers
from ssdtrain_plugin.bench.step import DecoderWorkload, create_strategy, only_warnings
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.runtime import Offloader, attach

__all__ = ["EqualBatch", "EqualMemory", "RokBench", "StackRun", "as_dict", "measure"]

BASELINE = "keep"

_ABOUT = {
    "keep": "autograd keeps what it saves; no plugin",
    "recompute": "torch.utils.checkpoint around each layer",
    "selective": "torch.utils.checkpoint around the core of each attention",
    "all": "the plugin, `policy: all`, to the drive",
    "adaptive": "the plugin, `policy: adaptive`, to the drive",
    "host": "the plugin, `policy: all`, to host memory alone",
}
# Before a peak counts: `adaptive` learns, the others grow their extent file and their staging memory.
_WARM_UP_STEPS = {"adaptive": 3, "all": 1, "host": 1}
_PROBES = 3  # of the search for a micro-batch, about


@dataclass(frozen=True, slots=True)
class EqualBatch:
    """One strategy at the micro-batch of the stack.

    Attributes:
        strategy: Its name.
        about: What it does.
        summary: Over the rounds that count, with ratios to ``keep``.
        tokens_per_second: At the median step.
        flops_per_second: Of the model, so that recomputation does not count, at the median step.
        peak_bytes: Of live saved bytes on the device: the higher one of the benchmark's account
            and the plugin's own.
        peak_ratio: ``peak_bytes`` over that of ``keep``.
        memory_bytes: What a step adds to the memory of the process or the device, or None.
        stored_bytes: Moved out of device memory a step; None if nobody counts.
        loaded_bytes: Moved back a step; None if nobody counts.
    """

    strategy: str
    about: str
    summary: StrategySummary
    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int
    peak_ratio: float
    memory_bytes: int | None
    stored_bytes: float | None
    loaded_bytes: float | None


@dataclass(frozen=True, slots=True)
class EqualMemory:
    """One strategy at the largest micro-batch that fits the budget.

    Attributes:
        strategy: Its name.
        microbatch: Sequences; 0 if not even one fits, and then nothing else is known.
        is_limited: The search ended at its limit, and more might fit.
        num_measured: How many sizes were tried.
        peak_bytes: As measured in the search.
        run_peak_bytes: Highest in the timed rounds by the plugin's own account, or None.
        seconds: Of a step, median.
        lowest_seconds: Of a step.
        highest_seconds: Of a step.
        tokens_per_second: At the median step.
        flops_per_second: Of the model, at the median step.
    """

    strategy: str
    microbatch: int
    is_limited: bool
    num_measured: int
    peak_bytes: int
    run_peak_bytes: int | None = None
    seconds: float = 0.0
    lowest_seconds: float = 0.0
    highest_seconds: float = 0.0
    tokens_per_second: float = 0.0
    flops_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class StackRun:
    """All strategies on one stack.

    Attributes:
        stack: What was trained.
        num_parameters: Of the stack.
        equal_batch: One a strategy, in the order of the report.
        budget_bytes: Of activations, for the second part.
        equal_memory: One a strategy.
        results: Every step at the same micro-batch, those to warm up included.
    """

    stack: Stack
    num_parameters: int
    equal_batch: tuple[EqualBatch, ...]
    budget_bytes: float
    equal_memory: tuple[EqualMemory, ...]
    results: tuple[StepResult, ...]


@dataclass(frozen=True, slots=True)
class RokBench:
    """The report.

    Attributes:
        matrix: What was asked for.
        device: Where it trained.
        machine: What it ran on.
        left_out: Peers that do not run here.
        runs: One a stack.
    """

    matrix: RokMatrix
    device: str
    machine: MachineFacts
    left_out: tuple[LeftOut, ...]
    runs: tuple[StackRun, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every strategy gave the gradients of ``keep``, to the last bit."""
        return all(each.summary.is_equal for run in self.runs for each in run.equal_batch)


def as_dict(report: RokBench) -> dict[str, Any]:
    """Turn a report into what JSON can hold.

    Args:
        report: Of :func:`measure`.
    """
    plain = asdict(report)
    plain["matrix"] = report.matrix.model_dump(mode="json")
    for written, run in zip(plain["runs"], report.runs, strict=True):
        written["stack"] = run.stack.model_dump(mode="json")
    return plain


@dataclass(frozen=True, slots=True)
class _Contender:
    strategy: Strategy
    about: str
    traffic: Traffic | None = None

    @property
    def name(self) -> str:
        return self.strategy.name


def measure(
    matrix: RokMatrix,
    path: str,
    *,
    device: str = "cpu",
    others: Mapping[str, CallLayer | str] | None = None,
    on_step: Callable[[str], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> RokBench:
    """Run all strategies on all stacks.

    Args:
        matrix: What to run.
        path: A directory on the drive.
        device: ``cpu`` or a CUDA device.
        others: Peers that hosts offer; see :func:`ssdtrain_plugin.bench.peers.open_peers`.
        on_step: Called after each step with what it was.
        on_total: Called once with how many steps there will be, about.

    Raises:
        ConfigError: The directory or an option cannot be used, or there is no such device.
    """
    if device != "cpu" and not (torch.cuda.is_available() and device.startswith("cuda")):
        problem = f"--device: {device!r} (expected cpu, or cuda where torch finds one)"
        raise ConfigError("the command", [problem], hint="leave `--device` out, or install a torch that finds the GPU")
    where = torch.device(device)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(matrix.threads)
        stack.enter_context(only_warnings())
        ours = [_our_contender(name, matrix, path) for name in matrix.strategies]
        found = stack.enter_context(open_peers(path, where, dict(others or {}))) if matrix.peers else []
        peers = [each for each in found if isinstance(each, Peer)]
        contenders = [*ours, *(_Contender(peer.strategy, peer.about, peer.traffic) for peer in peers)]
        if on_total is not None:
            on_total(len(matrix.stacks) * _steps_of_a_stack(matrix, contenders))
        before = machine_facts(where)
        runs = [_Measurement(matrix, each, contenders, where, on_step).run() for each in matrix.stacks]
    return RokBench(
        matrix=matrix,
        device=device,
        machine=before,
        left_out=tuple(each for each in found if isinstance(each, LeftOut)),
        runs=tuple(runs),
    )


def _our_contender(name: str, matrix: RokMatrix, path: str) -> _Contender:
    if name == "selective":
        return _Contender(Strategy(name, run_layer=recompute_core), _ABOUT[name])
    if name == "host":
        options = {**matrix.options, "policy": "all", "host_bytes": matrix.host_bytes}
        return _Contender(Strategy(name, attach=partial(_attach, options)), _ABOUT[name])
    return _Contender(create_strategy(name, path=path, options=matrix.options), _ABOUT[name])


def _attach(options: Mapping[str, Any], door: nn.Module) -> Offloader:
    return attach(door, options)


def _steps_of_a_stack(matrix: RokMatrix, contenders: Sequence[_Contender]) -> int:
    rounds = matrix.warm_up_rounds + matrix.rounds + matrix.budget_warm_up_rounds + matrix.budget_rounds
    peaks = sum((1 + _PROBES) * (1 + _WARM_UP_STEPS.get(each.name, 0)) for each in contenders)
    return len(contenders) * rounds + peaks


class _Measurement:
    """One stack and all that try it."""

    def __init__(
        self,
        matrix: RokMatrix,
        stack: Stack,
        contenders: Sequence[_Contender],
        device: torch.device,
        on_step: Callable[[str], None] | None,
    ) -> None:
        self._matrix = matrix
        self._stack = stack
        self._contenders = contenders
        self._on_step = on_step
        self._workload = DecoderWorkload(stack.shape, microbatches=1, device=device)
        self._meter = SavedBytesMeter(self._workload.model)

    def run(self) -> StackRun:
        results, moved = self._same_batch()
        peaks = {each.name: self._peak_of(each, "peak", self._stack.microbatch) for each in self._contenders}
        summaries = summarize(results, baseline=BASELINE, counter=None, warm_up_rounds=self._matrix.warm_up_rounds)
        by_name = {summary.strategy: summary for summary in summaries}
        equal_batch = tuple(
            self._equal_batch(each, by_name[each.name], peaks, moved[each.name]) for each in self._contenders
        )
        budget_bytes = self._matrix.budget * equal_batch[self._matrix.strategies.index(BASELINE)].peak_bytes
        return StackRun(
            stack=self._stack,
            num_parameters=sum(parameter.numel() for parameter in self._workload.model.parameters()),
            equal_batch=equal_batch,
            budget_bytes=budget_bytes,
            equal_memory=self._equal_memory(budget_bytes, {each.strategy: each.peak_bytes for each in equal_batch}),
            results=tuple(results),
        )

    def _tell(self, part: str, result: StepResult) -> None:
        if self._on_step is not None:
            self._on_step(f"{self._stack.name}, {part}: {result.strategy}")

    def _same_batch(self) -> tuple[list[StepResult], dict[str, list[tuple[int, int] | None]]]:
        """Run the interleaved rounds; also give what each strategy moved in each round that counts."""
        traffic = {each.name: each.traffic for each in self._contenders}
        moved: dict[str, list[tuple[int, int] | None]] = {each.name: [] for each in self._contenders}

        def note(result: StepResult) -> None:
            counter = traffic[result.strategy]
            step: tuple[int, int] | None = None if counter is None else counter.take()
            if result.stats is not None:
                step = (result.stats.stored_bytes + result.stats.host_bytes, result.stats.loaded_bytes)
            elif result.strategy in _ABOUT:
                step = (0, 0)  # what keeps or recomputes moves nothing
            if result.round_number >= self._matrix.warm_up_rounds:
                moved[result.strategy].append(step)
            self._tell("same micro-batch", result)

        rounds = self._matrix.warm_up_rounds + self._matrix.rounds
        strategies = [each.strategy for each in self._contenders]
        return run_interleaved(strategies, self._workload, rounds=rounds, on_step=note), moved

    def _peak_of(self, contender: _Contender, part: str, microbatch: int) -> tuple[int, int | None]:
        """Measure the peak of live saved bytes, and of the memory of process or device."""
        peaks = []

        def note(result: StepResult) -> None:
            own_bytes = 0 if result.stats is None else result.stats.peak_activation_bytes
            # The plugin's account sees what is being loaded, the meter what is recomputed.
            peaks.append(max(own_bytes, self._meter.peak_bytes))
            self._meter.restart()
            self._tell(part, result)

        strategy = replace(contender.strategy, batches=partial(self._workload.batches_of, microbatch))
        steps = 1 + _WARM_UP_STEPS.get(contender.name, 0)
        self._meter.restart()
        with self._meter.watching():
            memory_bytes = measure_memory(strategy, self._workload, steps=steps, on_step=note)
        return peaks[-1], memory_bytes

    def _equal_batch(
        self,
        contender: _Contender,
        summary: StrategySummary,
        peaks: Mapping[str, tuple[int, int | None]],
        moved: Sequence[tuple[int, int] | None],
    ) -> EqualBatch:
        peak_bytes = max(peaks[contender.name][0], summary.peak_activation_bytes or 0)
        counted = [step for step in moved if step is not None]
        rows = self._stack.microbatch / summary.seconds
        return EqualBatch(
            strategy=contender.name,
            about=contender.about,
            summary=summary,
            tokens_per_second=rows * self._stack.tokens,
            flops_per_second=rows * self._stack.flops,
            peak_bytes=peak_bytes,
            peak_ratio=peak_bytes / peaks[BASELINE][0],
            memory_bytes=peaks[contender.name][1],
            stored_bytes=statistics.median(step[0] for step in counted) if counted else None,
            loaded_bytes=statistics.median(step[1] for step in counted) if counted else None,
        )

    def _equal_memory(self, budget_bytes: float, peaks: Mapping[str, int]) -> tuple[EqualMemory, ...]:
        limit = self._matrix.largest_factor * self._stack.microbatch
        fits = {}
        for each in self._contenders:
            fits[each.name] = largest_that_fits(
                lambda microbatch, each=each: self._peak_of(each, f"micro-batch of {microbatch}", microbatch)[0],  # type: ignore[misc]
                budget_bytes=budget_bytes,
                limit=limit,
                known=(self._stack.microbatch, peaks[each.name]),
            )
        strategies = [
            replace(each.strategy, batches=partial(self._workload.batches_of, fits[each.name].microbatch))
            for each in self._contenders
            if fits[each.name].microbatch
        ]
        warm_up_rounds = self._matrix.budget_warm_up_rounds
        rounds = warm_up_rounds + self._matrix.budget_rounds
        results = run_interleaved(strategies, self._workload, rounds=rounds, on_step=partial(self._tell, "same memory"))
        steps = {
            name: [step for step in results if step.strategy == name and step.round_number >= warm_up_rounds]
            for name in fits
        }
        return tuple(
            self._fitted(
                EqualMemory(name, fit.microbatch, fit.is_limited, fit.num_measured, fit.peak_bytes), steps[name]
            )
            for name, fit in fits.items()
        )

    def _fitted(self, found: EqualMemory, steps: Sequence[StepResult]) -> EqualMemory:
        if not steps:
            return found
        seconds = statistics.median(step.seconds for step in steps)
        rows = found.microbatch / seconds
        own = [step.stats.peak_activation_bytes for step in steps if step.stats is not None]
        return replace(
            found,
            run_peak_bytes=max(own, default=None),
            seconds=seconds,
            lowest_seconds=min(step.seconds for step in steps),
            highest_seconds=max(step.seconds for step in steps),
            tokens_per_second=rows * self._stack.tokens,
            flops_per_second=rows * self._stack.flops,
        )
