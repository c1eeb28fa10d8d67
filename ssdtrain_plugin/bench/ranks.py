"""Several ranks on one drive: each a process that saves the same tensors, kept and offloaded in turns."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError

import torch
from torch import Tensor, nn

from ssdtrain_plugin.bench.step import only_warnings
from ssdtrain_plugin.errors import EnvironmentUnsupportedError, OffloadError
from ssdtrain_plugin.runtime import Offloader, attach
from ssdtrain_plugin.units import MIB

__all__ = ["RankPass", "RankTask", "run_ranks"]

_TIMEOUT_SECONDS = 300.0  # of one pass, on a machine that is busy
_END_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RankTask:
    """What each rank does.

    Attributes:
        path: A directory on the drive.
        tensors: Saved in a pass.
        tensor_bytes: Of each.
        passes: In all, those to warm up included.
    """

    path: str
    tensors: int
    tensor_bytes: int
    passes: int


@dataclass(frozen=True, slots=True)
class RankPass:
    """One forward and backward of one rank, while all others do the same.

    Attributes:
        rank: From 0.
        number: Of the pass, from 0.
        is_offloaded: Whether the plugin was on.
        seconds: Wall time.
        cpu_seconds: Of the process, all threads, user and system.
        moved_bytes: Stored and loaded.
        stall_seconds: That training waited for transfers.
    """

    rank: int
    number: int
    is_offloaded: bool
    seconds: float
    cpu_seconds: float
    moved_bytes: int
    stall_seconds: float


class _Chain(nn.Module):
    """Saves its input again and again, changed each time."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def forward(self, start: Tensor) -> Tensor:
        for _ in range(self._length):
            start = start.sin()
        return start.sum()


def run_ranks(count: int, task: RankTask, *, on_pass: Callable[[], None]) -> list[RankPass]:
    """Run so many ranks at once and wait for them.

    Args:
        count: Processes.
        task: Of each.
        on_pass: Called when the first rank has ended a pass.

    Returns:
        All passes of all ranks.

    Raises:
        EnvironmentUnsupportedError: A rank failed, or does not answer.
    """
    context = multiprocessing.get_context("spawn")  # a fork has our locks without our threads
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    ranks = [
        context.Process(target=_rank, args=(rank, task, barrier, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for rank, (_, sender) in zip(ranks, pipes, strict=True):
            rank.start()
            sender.close()  # so that the end of a rank is the end of its pipe
        return _listen([receiver for receiver, _ in pipes], task, on_pass)
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.join(_END_SECONDS)
                rank.kill()
                rank.join()
            rank.close()
        for receiver, _ in pipes:
            receiver.close()


def _listen(receivers: list[Connection], task: RankTask, on_pass: Callable[[], None]) -> list[RankPass]:
    passes: list[RankPass] = []
    left = {rank: 2 * task.passes for rank in range(len(receivers))}
    while left:
        ready = wait([receivers[rank] for rank in left], _TIMEOUT_SECONDS)
        if not ready:
            raise _failed(f"no rank has answered for {_TIMEOUT_SECONDS:g} s")
        for rank in [rank for rank in left if receivers[rank] in ready]:
            try:
                message: RankPass | str = receivers[rank].recv()
            except EOFError:
                raise _failed(f"rank {rank} ended before its last pass") from None
            if isinstance(message, str):
                raise _failed(message)
            passes.append(message)
            left[rank] -= 1
            if not left[rank]:
                del left[rank]
            if rank == 0 and message.is_offloaded:
                on_pass()
    return passes


def _failed(reason: str) -> EnvironmentUnsupportedError:
    return EnvironmentUnsupportedError(
        f"cannot measure several ranks: {reason} (expected an answer of each)", hint="try fewer `--ranks`"
    )


def _rank(rank: int, task: RankTask, barrier: Barrier, sender: Connection) -> None:
    """Be one rank. Top of its process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        options = {"paths": task.path, "policy": "all", "min_tensor_bytes": 1, "prefetch_bytes": 64 * MIB}
        plain, offloaded = _Chain(task.tensors), _Chain(task.tensors)
        with only_warnings(), attach(offloaded, {**options, "max_inflight_bytes": 64 * MIB}) as offloader:
            offloader.hooks.end_step = None  # the bench ends a step
            for number in range(task.passes):
                for chain, books in ((plain, None), (offloaded, offloader)):
                    barrier.wait(_TIMEOUT_SECONDS)
                    sender.send(_pass(rank, number, chain, books, task.tensor_bytes))
    except OffloadError as error:
        sender.send(f"rank {rank}: {error}")
        barrier.abort()
    except BrokenBarrierError:
        pass  # another rank has failed and says why
    finally:
        sender.close()


def _pass(rank: int, number: int, chain: _Chain, offloader: Offloader | None, tensor_bytes: int) -> RankPass:
    start = torch.ones(max(1, tensor_bytes // 4), requires_grad=True)
    cpu_started, started = time.process_time(), time.perf_counter()
    chain(start).backward()
    stats = None if offloader is None else offloader.end_step()
    return RankPass(
        rank=rank,
        number=number,
        is_offloaded=offloader is not None,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        moved_bytes=0 if stats is None else stats.stored_bytes + stats.loaded_bytes,
        stall_seconds=0.0 if stats is None else stats.stall_seconds,
    )
