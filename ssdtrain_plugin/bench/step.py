"""``ssdtrain bench step``: one training step of a transformer, kept, offloaded and recomputed, in turns.

A decoder is trained on text: forward, backward, optimizer. In every round each strategy runs the
same step, from the same weights; ratios to the run without the plugin are what is reported.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from rich.table import Table
from torch import Tensor, nn

from ssdtrain_plugin.bench.comparison import StrategySummary, summarize
from ssdtrain_plugin.bench.harness import StepResult, Strategy, measure_memory, run_interleaved
from ssdtrain_plugin.bench.models import DecoderShape, create_stack, library_text, recompute_layer
from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.runtime import Offloader, attach
from ssdtrain_plugin.storage.memory import BLOCK_ALIGNMENT
from ssdtrain_plugin.units import MIB, format_bytes, format_seconds

__all__ = [
    "BASELINE",
    "COUNTER",
    "DEFAULT_OPTIONS",
    "DEFAULT_STRATEGIES",
    "DEFAULT_THREADS",
    "DecoderWorkload",
    "StepBench",
    "StepSettings",
    "ThreadRun",
    "create_strategy",
    "measure",
    "only_warnings",
    "strategy_names",
    "table_of",
]

BASELINE = "keep"
"""The run without the plugin."""

COUNTER = "count"
"""The plugin counts and moves nothing: what the baseline has alive."""

DEFAULT_STRATEGIES = (BASELINE, COUNTER, "all")
"""What is compared unless something else is named."""

DEFAULT_THREADS = (1, 2)
"""Compute threads of the runs."""

DEFAULT_OPTIONS: dict[str, Any] = {"prefetch_bytes": 64 * MIB, "max_inflight_bytes": 64 * MIB}
"""Bounds that fit the size of this model; the plugin's own are meant for larger ones."""

_RECOMPUTE = "recompute"
_SEED = 0
_LARGE_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What to measure.

    Attributes:
        path: A directory on the drive.
        shape: Of the decoder and its micro-batch.
        microbatches: Of a step, one after the other (gradient accumulation).
        strategies: Names of :func:`strategy_names`, the baseline among them.
        rounds: Rounds that count.
        warm_up_rounds: Rounds before them, which pay for the extent file and the staging memory.
        threads: Numbers of compute threads; each is a run of its own.
        device: ``cpu`` or a CUDA device.
        memory_steps: Steps of each strategy, after the rounds, to measure the memory of the
            process or the device with; 0 leaves that out.
        options: More options of the plugin, for every strategy that moves bytes.
    """

    path: str
    shape: DecoderShape = field(default_factory=DecoderShape)
    microbatches: int = 1
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    rounds: int = 5
    warm_up_rounds: int = 2
    threads: tuple[int, ...] = DEFAULT_THREADS
    device: str = "cpu"
    memory_steps: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_OPTIONS))

    def __post_init__(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            ValueError: A strategy is unknown or named twice, the baseline is missing, or there is
                no such device.
        """
        known = strategy_names()
        unknown = [name for name in self.strategies if name not in known]
        if unknown or BASELINE not in self.strategies or len(set(self.strategies)) < len(self.strategies):
            named = ", ".join(self.strategies)
            raise ValueError(f"strategies {named} (expected each once, `{BASELINE}` among them, of {', '.join(known)})")
        if self.device != "cpu" and not (torch.cuda.is_available() and self.device.startswith("cuda")):
            raise ValueError(f"device {self.device!r} (expected cpu, or cuda where torch finds one)")

    @property
    def num_steps(self) -> int:
        """Steps in all, for a progress display."""
        of_one = self.warm_up_rounds + self.rounds + self.memory_steps
        return of_one * len(self.strategies) * len(self.threads)


@dataclass(frozen=True, slots=True)
class ThreadRun:
    """All strategies with one number of compute threads.

    Attributes:
        threads: Compute threads of torch.
        summaries: One a strategy.
        memory_bytes: By strategy, what it adds to the memory of the process or the device;
            see :func:`ssdtrain_plugin.bench.harness.measure_memory`.
        results: Every step, those to warm up included.
    """

    threads: int
    summaries: tuple[StrategySummary, ...]
    memory_bytes: dict[str, int | None]
    results: tuple[StepResult, ...]


@dataclass(frozen=True, slots=True)
class StepBench:
    """The report.

    Attributes:
        settings: What was measured.
        torch_version: Of torch.
        processor: As the system names the machine's architecture.
        is_page_aligned: Large CPU tensors start on a page, so that the drive reads and writes
            them without a copy.
        parameter_bytes: Of the weights.
        runs: One a number of threads.
    """

    settings: StepSettings
    torch_version: str
    processor: str
    is_page_aligned: bool
    parameter_bytes: int
    runs: tuple[ThreadRun, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every strategy gave the baseline's losses and gradients, to the last bit."""
        return all(summary.is_equal for run in self.runs for summary in run.summaries)


class DecoderWorkload:
    """Next-byte prediction on the sources of Python's library.

    Args:
        shape: Of the decoder and its micro-batch.
        microbatches: Of a step.
        device: Where it trains.

    Attributes:
        model: The decoder, with the same weights every time.
    """

    def __init__(self, shape: DecoderShape, *, microbatches: int, device: torch.device) -> None:
        """Draw the weights and read the text."""
        self._shape = shape
        self._microbatches = microbatches
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            self.model: nn.Module = create_stack(shape).to(device=device, dtype=shape.torch_dtype)
        self._device = device
        self._text = library_text(64 * microbatches * shape.microbatch * shape.row_tokens)

    def batches(self, round_number: int) -> Sequence[Tensor]:
        """Give (microbatch, row_tokens) int64 tokens for each micro-batch; see :class:`Workload`."""
        return self.batches_of(self._shape.microbatch, round_number)

    def batches_of(self, microbatch: int, round_number: int) -> Sequence[Tensor]:
        """Give the micro-batches of a round in another size.

        Args:
            microbatch: Sequences of each.
            round_number: From 0.
        """
        columns = self._shape.row_tokens
        span, first = microbatch * columns, round_number * self._microbatches
        # A copy each: a view would make the whole text a saved tensor.
        places = [
            torch.arange((first + number) * span, (first + number + 1) * span) for number in range(self._microbatches)
        ]
        return [self._text[place % self._text.numel()].view(microbatch, columns).to(self._device) for place in places]


def strategy_names() -> tuple[str, ...]:
    """List what can be compared: the baseline, the counter, each policy that moves bytes, and recomputation."""
    policies = get_args(OffloadConfig.model_fields["policy"].annotation)
    return (BASELINE, COUNTER, *sorted(policy for policy in policies if policy != "none"), _RECOMPUTE)


def create_strategy(name: str, *, path: str, options: Mapping[str, Any]) -> Strategy:
    """Make one of :func:`strategy_names`.

    Args:
        name: Of the strategy.
        path: A directory on the drive.
        options: More options of the plugin, if the strategy moves bytes.
    """
    if name == BASELINE:
        return Strategy(name)
    if name == _RECOMPUTE:
        return Strategy(name, run_layer=recompute_layer)
    if name == COUNTER:
        return Strategy(name, attach=partial(_attach, {"policy": "none"}))
    shares = {"offload_fraction": 0.5} if name == "fraction" else {}
    return Strategy(name, attach=partial(_attach, {**shares, **options, "policy": name, "paths": path}))


def _attach(options: Mapping[str, Any], door: nn.Module) -> Offloader:
    return attach(door, options)


def measure(settings: StepSettings, *, on_step: Callable[[str], None] | None = None) -> StepBench:
    """Run all strategies for each number of threads.

    Args:
        settings: What to measure.
        on_step: Called after each step with the name of its strategy.

    Returns:
        The report.

    Raises:
        ConfigError: The directory or an option cannot be used.
    """
    device = torch.device(settings.device)
    workload = DecoderWorkload(settings.shape, microbatches=settings.microbatches, device=device)
    threads_before = torch.get_num_threads()
    runs = []
    try:
        with only_warnings():
            for threads in settings.threads:
                torch.set_num_threads(threads)
                runs.append(_measure_threads(settings, workload, threads, on_step))
    finally:
        torch.set_num_threads(threads_before)
    return StepBench(
        settings=settings,
        torch_version=torch.__version__,
        processor=platform.machine(),
        is_page_aligned=_is_page_aligned(),
        parameter_bytes=sum(parameter.nbytes for parameter in workload.model.parameters()),
        runs=tuple(runs),
    )


def _measure_threads(
    settings: StepSettings, workload: DecoderWorkload, threads: int, on_step: Callable[[str], None] | None
) -> ThreadRun:
    chosen = [create_strategy(name, path=settings.path, options=settings.options) for name in settings.strategies]
    tell = None if on_step is None else lambda result: on_step(result.strategy)
    rounds = settings.warm_up_rounds + settings.rounds
    results = run_interleaved(chosen, workload, rounds=rounds, on_step=tell)
    memory_bytes = {
        strategy.name: measure_memory(strategy, workload, steps=settings.memory_steps, on_step=tell)
        for strategy in chosen
        if settings.memory_steps
    }
    counter = COUNTER if COUNTER in settings.strategies else None
    summaries = summarize(results, baseline=BASELINE, counter=counter, warm_up_rounds=settings.warm_up_rounds)
    return ThreadRun(threads, tuple(summaries), memory_bytes, tuple(results))


def _is_page_aligned() -> bool:
    return all(torch.empty(_LARGE_BYTES, dtype=torch.uint8).data_ptr() % BLOCK_ALIGNMENT == 0 for _ in range(4))


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Send warnings to the error stream, and nothing to where the report goes."""
    logger, handler = logging.getLogger("ssdtrain_plugin"), logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def table_of(run: ThreadRun) -> Table:
    """Set out one run, a column a strategy.

    Args:
        run: Of :func:`measure`.
    """
    rounds = run.summaries[0].rounds
    table = Table(title=f"one training step, {run.threads} compute threads (medians of {rounds} interleaved rounds)")
    table.add_column("")
    for summary in run.summaries:
        table.add_column(summary.strategy, justify="right")
    rows = [_cells(summary, run.memory_bytes.get(summary.strategy)) for summary in run.summaries]
    for name in rows[0]:
        table.add_row(name, *(cells[name] for cells in rows))
    return table


def _cells(summary: StrategySummary, memory_bytes: int | None) -> dict[str, str]:
    """Put one strategy in words, by the name of the row."""
    low, high = summary.first_quartile_of_ratios, summary.third_quartile_of_ratios
    peak_bytes, peak_ratio = summary.peak_activation_bytes, summary.peak_ratio
    return {
        "step time": format_seconds(summary.seconds),
        "range": f"{summary.lowest_seconds:.2f} - {summary.highest_seconds:.2f} s",
        f"x of {BASELINE}, by round": f"{summary.median_of_ratios:.3f}",
        "quartiles": f"{low:.3f} - {high:.3f}",
        "ratio of medians": f"{summary.ratio_of_medians:.3f}",
        f"CPU time, x of {BASELINE}": f"{summary.cpu_ratio:.3f}",
        "CPU time, user": format_seconds(summary.user_seconds),
        "CPU time, system": format_seconds(summary.system_seconds),
        "page faults": f"{summary.page_faults:.0f}",
        "activations, peak": "-" if peak_bytes is None else format_bytes(peak_bytes),
        f"peak, x of {BASELINE}": "-" if peak_ratio is None else f"{peak_ratio:.2f}",
        "memory of a step": "-" if memory_bytes is None else format_bytes(memory_bytes),
        "stored": format_bytes(summary.stored_bytes),
        "loaded": format_bytes(summary.loaded_bytes),
        "forwarded": format_bytes(summary.forwarded_bytes),
        "loads on demand": f"{summary.num_loads_on_demand:.0f}",
        "stalled": format_seconds(summary.stall_seconds),
        "failures": str(summary.num_failures),
        "loss and gradients": "equal, all bits" if summary.is_equal else "DIFFERENT",
    }
