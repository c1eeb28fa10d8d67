"""The whole plan of one model on one cluster: sizes, times, drives and the options to paste. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.projection.arithmetic import model_flops
from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.endurance import DriveLife, DriveNeed, drive_life, drive_need
from ssdtrain_plugin.projection.limits import MicroBatchLimits, in_flight, micro_batch_limits
from ssdtrain_plugin.projection.memory import StaticMemory, model_parameters, static_memory
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.stages import Stage, stages_of
from ssdtrain_plugin.projection.sweep import SweepPoint, same_micro_batches, same_sequences
from ssdtrain_plugin.projection.times import StageTime, StepTime, stage_time, step_time
from ssdtrain_plugin.units import MIB

__all__ = [
    "ASSUMPTIONS",
    "HostMemory",
    "Projection",
    "StagePlan",
    "project",
]

ASSUMPTIONS = (
    "layers are pre-norm; a norm is one kernel that saves its input and its row statistics",
    "backward does twice the arithmetic of forward; a causal mask saves no arithmetic",
    "matrix products run at the given rate whatever the micro-batch; norms, activations and additions at the memory's",
    "communication of tensor parallelism hides behind nothing; ZeRO-3 gathers layer by layer, behind compute",
    "exchange of gradients hides behind the last backward; sends between pipeline stages take no time",
    "drives run at their data sheet's sequential rates, and no two ranks share one",
    "with offloading two layers of activations, and on the last stage the head's, are in device memory",
    "a life counts training without a pause; with WAF and retention it rests on these inputs, not on a rating",
)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of the pipeline, on one rank.

    Attributes:
        stage: Its tensors.
        saved_bytes: What a micro-batch saves.
        offloaded_bytes: Of these, what is large enough to be offloaded.
        in_flight: Micro-batches between forward and backward, under 1F1B.
        time: Of one micro-batch.
        static: Weights, gradients, optimizer.
        need: Of its drives.
        life: Of its drives, by what a step writes in a step's time.
        busy_life: Of its drives, if micro-batches followed each other without bubble and update.
    """

    stage: Stage
    saved_bytes: int
    offloaded_bytes: int
    in_flight: float
    time: StageTime
    static: StaticMemory
    need: DriveNeed
    life: DriveLife
    busy_life: DriveLife


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory of one node (bytes).

    Attributes:
        staging_bytes: Between GPU and drives, at most: the bounds on stores and loads in flight of all ranks.
        tier_bytes: If host memory takes everything instead.
        fits: Whether the node has so much; None if that is not known.
    """

    staging_bytes: float
    tier_bytes: float
    fits: bool | None


@dataclass(frozen=True, slots=True)
class Projection:
    """What ``ssdtrain plan`` says.

    Attributes:
        model: The input.
        cluster: The input.
        parameters: Of the whole model.
        model_flops: Of a step and all replicas, without what is recomputed.
        stages: One each.
        step: Of the slowest stage.
        limits: Of the micro-batch.
        host: Of one node.
        mean_write_bytes_per_second: Over stages: all bytes over half of all times, as SSDTrain's model counts.
        sweep: Over sizes of micro-batch, at the same sequences a step: what pipelines pay for larger ones.
        growth: The same at the same number of micro-batches a step: what the weights' share gains.
        config: Options of the plugin.
    """

    model: ModelSpec
    cluster: ClusterSpec
    parameters: int
    model_flops: float
    stages: tuple[StagePlan, ...]
    step: StepTime
    limits: MicroBatchLimits
    host: HostMemory
    mean_write_bytes_per_second: float
    sweep: tuple[SweepPoint, ...]
    growth: tuple[SweepPoint, ...]
    config: Mapping[str, Any]

    @property
    def worst(self) -> StagePlan:
        """The stage whose drives have most to write for each second."""
        return max(self.stages, key=lambda plan: plan.need.write_bytes_per_second)

    @property
    def need(self) -> DriveNeed:
        """Of the stage that needs most drives."""
        return max((plan.need for plan in self.stages), key=lambda need: need.drives)

    @property
    def hidden_share(self) -> float:
        """What the given drives hide (0 to 1), on the stage where it is least."""
        return min(plan.need.hidden_share for plan in self.stages)

    @property
    def occupied_bytes(self) -> float:
        """Room on the drives of a rank, on the stage that needs most."""
        return max(plan.need.occupied_bytes for plan in self.stages)

    @property
    def model_utilization(self) -> float:
        """Arithmetic that the model needs over what the GPUs could do in the step (0 to 1): MFU."""
        could = self.cluster.gpus * self.cluster.gpu.peak_flops_per_second * self.step.seconds
        return self.model_flops / could


def project(model: ModelSpec, cluster: ClusterSpec) -> Projection:
    """Plan.

    Args:
        model: What is trained.
        cluster: On what, and how.

    Raises:
        ConfigError: The model or the mapping is impossible; all faults are listed.
    """
    problems = [*model.problems(), *cluster.problems(model)]
    if problems:
        raise ConfigError(
            f"model {model.name!r} on cluster {cluster.name!r}", problems, hint="change the mapping or the sizes"
        )
    micro_batch, micro_batches = cluster.batch.micro_batch, cluster.batch.micro_batches
    stages = stages_of(model, cluster)
    step = step_time(model, cluster, stages, micro_batch, micro_batches)
    plans = tuple(_stage_plan(model, cluster, stage, step) for stage in stages)
    limits, options = micro_batch_limits(model, cluster), _config(cluster, plans)
    return Projection(
        model=model,
        cluster=cluster,
        parameters=model_parameters(model),
        model_flops=model_flops(model) * cluster.parallel.dp * micro_batch * micro_batches,
        stages=plans,
        step=step,
        limits=limits,
        host=_host(cluster, plans, options),
        mean_write_bytes_per_second=sum(plan.offloaded_bytes for plan in plans)
        / sum(plan.time.seconds / 2 for plan in plans),
        sweep=same_sequences(model, cluster, limits),
        growth=same_micro_batches(model, cluster, limits),
        config=options,
    )


def _stage_plan(model: ModelSpec, cluster: ClusterSpec, stage: Stage, step: StepTime) -> StagePlan:
    time = stage_time(model, cluster, stage, cluster.batch.micro_batch)
    offloaded = stage.offloaded_bytes(cluster.min_tensor_bytes)
    flight, count = in_flight(cluster, stage.index), cluster.batch.micro_batches
    return StagePlan(
        stage=stage,
        saved_bytes=stage.saved_bytes,
        offloaded_bytes=offloaded,
        in_flight=flight,
        time=time,
        static=static_memory(model, cluster, stage),
        need=drive_need(cluster, offloaded, time.forward_seconds, time.backward_seconds, flight),
        life=drive_life(cluster, offloaded * count, step.seconds),
        busy_life=drive_life(cluster, offloaded, time.seconds),
    )


def _host(cluster: ClusterSpec, plans: tuple[StagePlan, ...], options: Mapping[str, Any]) -> HostMemory:
    ranks = min(cluster.gpus, cluster.gpus_per_node)
    names = ("max_inflight_bytes", "prefetch_bytes")
    staging = float(ranks * sum(options.get(name, OffloadConfig.model_fields[name].default) for name in names))
    tier = ranks * max(plan.need.occupied_bytes for plan in plans)
    fits = None if cluster.host_memory_bytes is None else tier <= cluster.host_memory_bytes
    return HostMemory(staging, tier, fits)


def _config(cluster: ClusterSpec, plans: tuple[StagePlan, ...]) -> dict[str, Any]:
    """Write the options that differ from their defaults, and the paths."""
    names = [f"/mnt/nvme{{local_rank}}_{index}" for index in range(cluster.drives_per_gpu)]
    paths = list(cluster.paths) or (names if cluster.drives_per_gpu > 1 else ["/mnt/nvme{local_rank}"])
    occupied = max(plan.need.occupied_bytes for plan in plans)
    options: dict[str, Any] = {"paths": paths, "policy": "adaptive"}
    if occupied:
        options["disk_bytes"] = math.ceil(1.05 * occupied / MIB) * MIB  # 5 % for the gaps between extents
    if cluster.min_tensor_bytes != OffloadConfig.model_fields["min_tensor_bytes"].default:
        options["min_tensor_bytes"] = cluster.min_tensor_bytes
    layer = max(plan.stage.layer_bytes for plan in plans)
    for name in ("max_inflight_bytes", "prefetch_bytes"):
        # One layer must fit, or the next layer's stores wait for this one's.
        if layer > OffloadConfig.model_fields[name].default:
            options[name] = math.ceil(layer / MIB) * MIB
    return options
