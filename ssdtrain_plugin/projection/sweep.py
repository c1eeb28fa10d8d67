"""Larger micro-batches: what a pipeline pays for them, and what the weights' share gains (SSDTrain, Fig. 8)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.limits import MicroBatchLimits
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.stages import stages_of
from ssdtrain_plugin.projection.times import StepTime, stage_time, step_time

__all__ = ["SweepPoint", "same_micro_batches", "same_sequences"]

_LARGEST = 64
"""Where a sweep ends that nothing else ends: BLOOM and others train with 1 or 2."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One size of micro-batch.

    Attributes:
        micro_batch: Sequences.
        micro_batches: Of a step and replica.
        step: Its time.
        bubble_share: Of the step (0 to 1).
        update_share: Of the step (0 to 1): accumulation, optimizer, exposed exchange.
        speedup: Sequences a second, over the smallest of the sweep.
        write_bytes_per_second: Needed, on the stage that needs most.
        fits: Which of ``keep``, ``recompute`` and ``offload`` have the memory for it.
    """

    micro_batch: int
    micro_batches: int
    step: StepTime
    bubble_share: float
    update_share: float
    speedup: float
    write_bytes_per_second: float
    fits: tuple[str, ...]


def same_sequences(model: ModelSpec, cluster: ClusterSpec, limits: MicroBatchLimits) -> tuple[SweepPoint, ...]:
    """Vary the micro-batch at the given sequences a step, so that larger ones are fewer.

    Args:
        model: What is trained.
        cluster: Mapping, and the sequences.
        limits: Of memory.
    """
    sequences, parallel = cluster.batch.micro_batch * cluster.batch.micro_batches, cluster.parallel
    pairs = []
    for size in sorted({*(1 << power for power in range(sequences.bit_length())), cluster.batch.micro_batch}):
        count, rest = divmod(sequences, size)
        if rest or (parallel.virtual_stages > 1 and count % parallel.pp):
            continue  # no whole number of micro-batches, or none that interleaved stages can schedule
        pairs.append((size, count))
    return _points(model, cluster, limits, pairs)


def same_micro_batches(model: ModelSpec, cluster: ClusterSpec, limits: MicroBatchLimits) -> tuple[SweepPoint, ...]:
    """Vary the micro-batch at the given number of them, so that larger ones make a larger batch.

    Args:
        model: What is trained.
        cluster: Mapping, and the number.
        limits: Of memory.
    """
    given = cluster.batch.micro_batch
    largest = max(given, min(_LARGEST, max(limits.keep, limits.recompute, limits.offload)))
    sizes = sorted({*(1 << power for power in range(largest.bit_length())), given})
    return _points(model, cluster, limits, [(size, cluster.batch.micro_batches) for size in sizes])


def _points(
    model: ModelSpec, cluster: ClusterSpec, limits: MicroBatchLimits, pairs: Iterable[tuple[int, int]]
) -> tuple[SweepPoint, ...]:
    points: list[SweepPoint] = []
    slowest = 0.0
    for size, count in pairs:
        stages = stages_of(model, cluster, micro_batch=size)
        step = step_time(model, cluster, stages, size, count)
        rate = size * count / step.seconds
        slowest = slowest or rate
        write = max(
            2 * stage.offloaded_bytes(cluster.min_tensor_bytes) / stage_time(model, cluster, stage, size).seconds
            for stage in stages
        )
        fits = tuple(name for name in ("keep", "recompute", "offload") if size <= getattr(limits, name))
        points.append(SweepPoint(size, count, step, step.bubble_share, step.update_share, rate / slowest, write, fits))
    return tuple(points)
