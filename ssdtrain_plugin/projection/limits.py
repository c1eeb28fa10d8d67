"""The largest micro-batch that device memory allows: keeping, recomputing, offloading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.memory import static_memory
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.stages import Stage, stages_of

__all__ = ["MeasuredShare", "MicroBatchLimits", "in_flight", "micro_batch_limits", "resident_bytes"]

_RESIDENT_LAYERS = 2
"""SSDTrain, III-D: with offloading two consecutive layers are in device memory."""

_MOST_SEQUENCES = 1 << 16


@dataclass(frozen=True, slots=True)
class MicroBatchLimits:
    """Largest micro-batches (sequences) that fit the memory budget on every stage; 0 if none does.

    Attributes:
        keep: Everything stays in device memory.
        recompute: Each layer's input stays, the rest is computed again.
        offload: Two layers stay, see :data:`ASSUMPTIONS`.
    """

    keep: int
    recompute: int
    offload: int


@dataclass(frozen=True, slots=True)
class MeasuredShare:
    """What a run had on one stage, over what was planned for it.

    Attributes:
        saved: Of what a micro-batch saves.
        resident: Of what is in device memory with offloading.
    """

    saved: float = 1.0
    resident: float = 1.0


def in_flight(cluster: ClusterSpec, index: int) -> float:
    """Count micro-batches of a stage between forward and backward, in whole ones.

    1F1B: as many as stages are left (Narayanan et al., arXiv 2104.04473); interleaved, ``(p - 1) / v`` more
    (Korthikanti et al., arXiv 2205.05198, section 4.2.3).

    Args:
        cluster: Mapping and batch.
        index: Of the stage.
    """
    parallel = cluster.parallel
    more = (parallel.pp - 1) / parallel.virtual_stages if parallel.virtual_stages > 1 else 0.0
    return min(float(cluster.batch.micro_batches), parallel.pp - index + more)


def resident_bytes(stage: Stage, cluster: ClusterSpec) -> float:
    """Say what is in device memory with offloading: two layers, the head, and of all micro-batches what is too small.

    Args:
        stage: What it saves.
        cluster: Mapping, batch and the smallest size.
    """
    small = stage.saved_bytes - stage.offloaded_bytes(cluster.min_tensor_bytes)
    least = min(stage.saved_bytes, _RESIDENT_LAYERS * stage.layer_bytes + stage.head_bytes)
    return least + small * in_flight(cluster, stage.index)


def micro_batch_limits(
    model: ModelSpec, cluster: ClusterSpec, measured: Sequence[MeasuredShare] | None = None
) -> MicroBatchLimits:
    """Find the largest micro-batches.

    Args:
        model: What is trained.
        cluster: Mapping and memory.
        measured: Of each stage, to plan with what a run had; recomputation was not run, and stays as planned.
    """
    full = model.model_copy(update={"recompute": "full"})
    shares = measured or [MeasuredShare()] * cluster.parallel.pp
    budget = cluster.memory_budget_bytes
    return MicroBatchLimits(
        keep=_largest(lambda size: _kept_bytes(model, cluster, size, shares), budget),
        recompute=_largest(lambda size: _recompute_bytes(model, full, cluster, size), budget),
        offload=_largest(lambda size: _offload_bytes(model, cluster, size, shares), budget),
    )


def _largest(needed: Callable[[int], float], budget_bytes: float) -> int:
    """Find the largest size whose need, which grows with it, is within a budget."""
    if needed(1) > budget_bytes:
        return 0
    low, high = 1, 2
    while high < _MOST_SEQUENCES and needed(high) <= budget_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= budget_bytes else (low, middle)
    return low


def _kept_bytes(model: ModelSpec, cluster: ClusterSpec, size: int, shares: Sequence[MeasuredShare]) -> float:
    return max(
        static_memory(model, cluster, stage).nbytes + share.saved * stage.saved_bytes * in_flight(cluster, stage.index)
        for stage, share in zip(stages_of(model, cluster, micro_batch=size), shares, strict=True)
    )


def _recompute_bytes(model: ModelSpec, full: ModelSpec, cluster: ClusterSpec, size: int) -> float:
    """All inputs, and one layer that was computed again."""
    inputs = stages_of(full, cluster, micro_batch=size)
    everything = stages_of(model, cluster, micro_batch=size)
    return max(
        static_memory(model, cluster, stage).nbytes
        + stage.saved_bytes * in_flight(cluster, stage.index)
        + whole.layer_bytes
        for stage, whole in zip(inputs, everything, strict=True)
    )


def _offload_bytes(model: ModelSpec, cluster: ClusterSpec, size: int, shares: Sequence[MeasuredShare]) -> float:
    return max(
        static_memory(model, cluster, stage).nbytes + share.resident * resident_bytes(stage, cluster)
        for stage, share in zip(stages_of(model, cluster, micro_batch=size), shares, strict=True)
    )
