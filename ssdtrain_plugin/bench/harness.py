"""Strategies that take turns on one workload in one process: what the end-to-end benchmarks stand on.

Note [One set of weights]. All strategies train the same module: each has a door of its own to
it, and the plugin is attached to the door. Before each step the weights are put back to those of
the round's start, outside of the measured time. So all strategies compute on the same numbers in
the same memory, can be compared bit by bit in every round, and memory does not grow with their
number. Extent files, staging memory and threads stay warm: attachments live as long as the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ssdtrain_plugin.bench.models import CallLayer, call_layer
from ssdtrain_plugin.runtime import Offloader
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.storage.memory import memory_at
from ssdtrain_plugin.units import KIB

__all__ = [
    "Around",
    "Door",
    "StepResult",
    "Strategy",
    "Workload",
    "measure_memory",
    "run_interleaved",
]

_LEARNING_RATE = 0.01

Around = Callable[[], contextlib.AbstractContextManager[object]]


class Workload(Protocol):
    """What is trained.

    Attributes:
        model: Called as ``model(batch, run_layer)``; returns its loss. On the device where it trains.
    """

    model: nn.Module

    def batches(self, round_number: int) -> Sequence[Tensor]:
        """Give the micro-batches of the step of one round, the same whenever it is asked.

        Args:
            round_number: From 0.
        """
        ...


class Door(nn.Module):
    """One strategy's way into the shared model.

    Args:
        model: Of the workload.
        run_layer: How this strategy calls a layer.
        around: Makes a context to enter around each forward.
    """

    def __init__(self, model: nn.Module, run_layer: CallLayer, around: Around = contextlib.nullcontext) -> None:
        """Share the model."""
        super().__init__()
        self.model = model
        self._run_layer = run_layer
        self._around = around

    def forward(self, batch: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            batch: As the workload gives it.
        """
        with self._around():
            loss: Tensor = self.model(batch, self._run_layer)
        return loss


def leave_alone(door: nn.Module) -> None:
    """Attach nothing.

    Args:
        door: Unused.
    """


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way of training, to be compared with others.

    Attributes:
        name: Unique among the strategies of a run.
        attach: Puts an offloader on the door and returns it, or does nothing and returns None.
        run_layer: Calls each layer; recomputation goes here.
        around: Makes a context to enter around each forward; other people's hooks go here.
        batches: In place of the workload's, for a micro-batch of its own; bits can then be
            compared no more.
    """

    name: str
    attach: Callable[[nn.Module], Offloader | None] = leave_alone
    run_layer: CallLayer = call_layer
    around: Around = contextlib.nullcontext
    batches: Callable[[int], Sequence[Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step of one strategy.

    Attributes:
        strategy: Its name.
        round_number: From 0, rounds to warm up included.
        seconds: Wall time of forward, backward, optimizer and the end of the step.
        user_seconds: CPU time of the process outside of the kernel, over all threads.
        system_seconds: CPU time of the process in the kernel, over all threads.
        page_faults: Page faults without I/O.
        loss: Sum over the micro-batches.
        digest: SHA-256 of every bit of the losses and of all gradients.
        stats: Of the plugin; None without it.
    """

    strategy: str
    round_number: int
    seconds: float
    user_seconds: float
    system_seconds: float
    page_faults: int
    loss: float
    digest: str
    stats: StepStats | None


class _Bench:
    """The shared model, its optimizer, and the weights at the start of a round."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.parameters = list(workload.model.parameters())
        self._start = [parameter.detach().clone() for parameter in self.parameters]
        # Without state, so that putting the weights back undoes a step whole.
        self._optimizer = torch.optim.SGD(self.parameters, lr=_LEARNING_RATE)
        self.device = self.parameters[0].device

    def begin_round(self) -> None:
        for start, parameter in zip(self._start, self.parameters, strict=True):
            start.copy_(parameter.detach())

    def put_back(self) -> None:
        with torch.no_grad():
            for start, parameter in zip(self._start, self.parameters, strict=True):
                parameter.copy_(start)

    def step(self, strategy: Strategy, door: nn.Module, offloader: Offloader | None, round_number: int) -> StepResult:
        batches = (strategy.batches or self._workload.batches)(round_number)
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()  # no strategy pays for the garbage of the one before it
        _finish(self.device)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        losses = []
        for batch in batches:
            loss = door(batch)
            loss.backward()
            losses.append(loss.detach())
            del loss
        self._optimizer.step()
        stats = None if offloader is None else offloader.end_step()
        _finish(self.device)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return StepResult(
            strategy=strategy.name,
            round_number=round_number,
            seconds=seconds,
            user_seconds=after.ru_utime - before.ru_utime,
            system_seconds=after.ru_stime - before.ru_stime,
            page_faults=after.ru_minflt - before.ru_minflt,
            loss=sum(float(loss) for loss in losses),
            digest=digest_of([*losses, *gradients]),
            stats=stats,
        )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def digest_of(tensors: Sequence[Tensor]) -> str:
    """Hash every bit of some tensors, and their order.

    Args:
        tensors: Any device and dtype.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        on_host = tensor.detach().cpu().contiguous()
        if on_host.numel():
            digest.update(memory_at(on_host.data_ptr(), on_host.nbytes))
    return digest.hexdigest()


@contextlib.contextmanager
def _cheap_collections() -> Iterator[None]:
    """Leave what exists already out of the garbage collector's work, so that collecting before each step is cheap."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _attached(
    strategies: Sequence[Strategy], model: nn.Module
) -> Iterator[list[tuple[Strategy, Door, Offloader | None]]]:
    """Give every strategy a door with its offloader on; take all off at the end, also when one cannot be attached."""
    with contextlib.ExitStack() as stack:
        doors: list[tuple[Strategy, Door, Offloader | None]] = []
        for strategy in strategies:
            door = Door(model, strategy.run_layer, strategy.around)
            offloader = strategy.attach(door)
            if offloader is not None:
                stack.callback(offloader.detach)
                # The bench ends a step; else each micro-batch of it would be one.
                offloader.hooks.end_step = None
            doors.append((strategy, door, offloader))
        yield doors


def order_of_round(num_strategies: int, round_number: int) -> list[int]:
    """Say who goes when.

    A round and its reverse, then everybody moves up by one: all take every place, and
    nobody has always the same predecessor, whose traces are in caches and in the heap.

    Args:
        num_strategies: How many take turns.
        round_number: From 0.

    Returns:
        Their indices, in the order of this round.
    """
    order = [(position + round_number // 2) % num_strategies for position in range(num_strategies)]
    return order if round_number % 2 == 0 else order[::-1]


def run_interleaved(
    strategies: Sequence[Strategy],
    workload: Workload,
    *,
    rounds: int,
    on_step: Callable[[StepResult], None] | None = None,
) -> list[StepResult]:
    """Run one step of every strategy a round.

    Args:
        strategies: With different names.
        workload: Its weights are those after ``rounds`` steps in the end.
        rounds: Those to warm up included; see :func:`ssdtrain_plugin.bench.comparison.summarize`.
        on_step: Called after each step, outside of the measured time: for a progress
            display, or to change the speed of a tier.

    Returns:
        ``rounds`` times as many results as there are strategies, in the order in which they ran.

    Raises:
        ConfigError: A strategy's options are wrong.
    """
    bench = _Bench(workload)
    results: list[StepResult] = []
    with _attached(strategies, workload.model) as doors, _cheap_collections():
        for round_number in range(rounds):
            bench.begin_round()
            for index in order_of_round(len(doors), round_number):
                bench.put_back()
                results.append(bench.step(*doors[index], round_number))
                if on_step is not None:
                    on_step(results[-1])
    return results


def measure_memory(
    strategy: Strategy, workload: Workload, *, steps: int, on_step: Callable[[StepResult], None] | None = None
) -> int | None:
    """Measure what a strategy adds to the memory that model and process hold already.

    Gradients, activations, staging memory and scratch space are in it. The strategy is attached
    for these steps alone, so that staging memory is counted too, and the highest of them counts.

    Args:
        strategy: Any.
        workload: Its weights are as before in the end.
        steps: How many to run; a policy that learns needs some.
        on_step: Called after each step.

    Returns:
        Bytes: of the device with CUDA; else of the process, or None where the system does not tell.
    """
    bench = _Bench(workload)
    with _attached([strategy], workload.model) as [door], _cheap_collections():
        for parameter in bench.parameters:
            parameter.grad = None
        start_bytes = _forget_peak(bench.device)
        for number in range(steps):
            bench.put_back()
            result = bench.step(*door, number)
            if on_step is not None:
                on_step(result)
        bench.put_back()
        peak_bytes = _peak(bench.device)
    return None if start_bytes is None or peak_bytes is None else peak_bytes - start_bytes


def _forget_peak(device: torch.device) -> int | None:
    """Start a new peak of the device or of the process; return the memory in use now, None if that cannot be done."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need not
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): VmHWM falls to VmRSS
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    return None
