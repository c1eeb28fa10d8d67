"""Activation offloading to NVMe SSDs for LLM training.

Importing this touches no CUDA device and no host framework.
"""

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import (
    CapacityError,
    ConfigError,
    EnvironmentUnsupportedError,
    LoadError,
    OffloadError,
    QueueClosedError,
    SavedTensorMutatedError,
    StateError,
    StorageError,
    StoreError,
)
from ssdtrain_plugin.hooks import checkpoint
from ssdtrain_plugin.runtime import Offloader, attach
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.version import __version__

__all__ = [
    "CapacityError",
    "ConfigError",
    "EnvironmentUnsupportedError",
    "LoadError",
    "OffloadConfig",
    "OffloadError",
    "Offloader",
    "QueueClosedError",
    "SavedTensorMutatedError",
    "StateError",
    "StepStats",
    "StorageError",
    "StoreError",
    "__version__",
    "attach",
    "checkpoint",
]
