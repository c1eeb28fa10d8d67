"""What offloading needs and gains on a cluster, before anything runs: the analytic model of ``ssdtrain plan``.

``planner/`` plans one measured step, transfer by transfer. This package plans a purchase.
"""

from ssdtrain_plugin.projection.cluster import (
    BatchSpec,
    ClusterSpec,
    DriveSpec,
    EnduranceSpec,
    GpuSpec,
    ParallelSpec,
)
from ssdtrain_plugin.projection.files import cluster_from_dict, model_from_dict, read_cluster, read_model
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.projection import Projection, project
from ssdtrain_plugin.projection.stages import stages_of
from ssdtrain_plugin.projection.tensors import SavedTensor

__all__ = [
    "BatchSpec",
    "ClusterSpec",
    "DriveSpec",
    "EnduranceSpec",
    "GpuSpec",
    "ModelSpec",
    "ParallelSpec",
    "Projection",
    "SavedTensor",
    "cluster_from_dict",
    "model_from_dict",
    "project",
    "read_cluster",
    "read_model",
    "stages_of",
]
