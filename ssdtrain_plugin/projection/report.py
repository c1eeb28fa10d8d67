"""A projection as one JSON object: inputs, assumptions, tensor by tensor, stage by stage."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ssdtrain_plugin.projection.endurance import DriveLife
from ssdtrain_plugin.projection.projection import ASSUMPTIONS, Projection, StagePlan
from ssdtrain_plugin.projection.stages import Group
from ssdtrain_plugin.projection.sweep import SweepPoint

__all__ = ["as_dict"]


def as_dict(found: Projection) -> dict[str, Any]:
    """Turn a projection into what ``--json`` prints; sizes are bytes, times seconds.

    Args:
        found: Of :func:`ssdtrain_plugin.projection.project`.
    """
    return {
        "model": found.model.model_dump(),
        "cluster": found.cluster.model_dump(),
        "assumptions": list(ASSUMPTIONS),
        "parameters": found.parameters,
        "model_flops": found.model_flops,
        "model_utilization": found.model_utilization,
        "stages": [_stage(plan) for plan in found.stages],
        "mean_write_bytes_per_second": found.mean_write_bytes_per_second,
        "step": {**asdict(found.step), "seconds": found.step.seconds},
        "largest_micro_batch": asdict(found.limits),
        "memory_budget_bytes": found.cluster.memory_budget_bytes,
        "host_memory": asdict(found.host),
        "drives_needed": found.need.drives,
        "hidden_share": found.hidden_share,
        "occupied_bytes": found.occupied_bytes,
        "same_sequences": [_point(point) for point in found.sweep],
        "same_micro_batches": [_point(point) for point in found.growth],
        "config": dict(found.config),
    }


def _stage(plan: StagePlan) -> dict[str, Any]:
    return {
        "index": plan.stage.index,
        "layers": len(plan.stage.blocks),
        "saved_bytes": plan.saved_bytes,
        "offloaded_bytes": plan.offloaded_bytes,
        "in_flight": plan.in_flight,
        "groups": [_group(group) for group in plan.stage.groups],
        "time": asdict(plan.time),
        "static_memory": {**asdict(plan.static), "nbytes": plan.static.nbytes},
        "drives": asdict(plan.need),
        "life": _life(plan.life),
        "busy_life": _life(plan.busy_life),
    }


def _life(life: DriveLife) -> dict[str, float | None]:
    """Replace what JSON has no number for: drives that are never written to last for ever, which is None."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(life).items()}


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "count": group.count,
        "nbytes": group.nbytes,
        "tensors": [
            {**asdict(tensor), "element_bytes": tensor.element_bytes, "nbytes": tensor.nbytes}
            for tensor in group.tensors
        ],
    }


def _point(point: SweepPoint) -> dict[str, Any]:
    return {**asdict(point), "seconds": point.step.seconds}
