"""The largest micro-batch that device memory allows: keeping, recomputing, offloading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.memory import static_memory
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.stages import stages_of

__all__ = ["MIN_TENSOR_BYTES", "MicroBatchLimits", "in_flight", "micro_batch_limits"]

MIN_TENSOR_BYTES = int(OffloadConfig.model_fields["min_tensor_bytes"].default)
"""Smaller tensors are not offloaded, unless the option is changed."""

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


def micro_batch_limits(model: ModelSpec, cluster: ClusterSpec) -> MicroBatchLimits:
    """Find the largest micro-batches.

    Args:
        model: What is trained.
        cluster: Mapping and memory.
    """
    full = model.model_copy(update={"recompute": "full"})
    return MicroBatchLimits(
        keep=_largest(lambda size: _kept_bytes(model, cluster, size), cluster.memory_budget_bytes),
        recompute=_largest(lambda size: _recompute_bytes(model, full, cluster, size), cluster.memory_budget_bytes),
        offload=_largest(lambda size: _offload_bytes(model, cluster, size), cluster.memory_budget_bytes),
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


def _kept_bytes(model: ModelSpec, cluster: ClusterSpec, size: int) -> float:
    return max(
        static_memory(model, cluster, stage).nbytes + stage.saved_bytes * in_flight(cluster, stage.index)
        for stage in stages_of(model, cluster, micro_batch=size)
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


def _offload_bytes(model: ModelSpec, cluster: ClusterSpec, size: int) -> float:
    """Two layers, the head, and of all micro-batches in flight what is too small to be offloaded."""
    return max(
        static_memory(model, cluster, stage).nbytes
        + min(stage.saved_bytes, _RESIDENT_LAYERS * stage.layer_bytes + stage.head_bytes)
        + (stage.saved_bytes - stage.offloaded_bytes(MIN_TENSOR_BYTES)) * in_flight(cluster, stage.index)
        for stage in stages_of(model, cluster, micro_batch=size)
    )
