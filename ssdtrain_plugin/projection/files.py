"""Model and cluster from YAML files, with presets filled in. One error lists every fault of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ssdtrain_plugin.documents import checked, nearest, read_yaml, shown
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.presets import DRIVES, GPUS, MODELS

__all__ = ["cluster_from_dict", "model_from_dict", "read_cluster", "read_model"]

_Spec = TypeVar("_Spec", bound=BaseModel)


def read_model(path: str | Path) -> ModelSpec:
    """Read a model.

    Args:
        path: A YAML file; its fields are those of :class:`ModelSpec`, and ``preset``.

    Raises:
        ConfigError: It cannot be read, is not YAML, or has faults; all are listed.
    """
    return model_from_dict(read_yaml(path), source=f"`{path}`")


def read_cluster(path: str | Path) -> ClusterSpec:
    """Read a cluster.

    Args:
        path: A YAML file; its fields are those of :class:`ClusterSpec`. ``gpu`` and ``drive`` may be the name
            of a preset, or a mapping with a ``preset`` and what differs from it.

    Raises:
        ConfigError: It cannot be read, is not YAML, or has faults; all are listed.
    """
    return cluster_from_dict(read_yaml(path), source=f"`{path}`")


def model_from_dict(fields: Any, *, source: str = "the model") -> ModelSpec:
    """Check the fields of a model.

    Args:
        fields: As in the file.
        source: For the error.

    Raises:
        ConfigError: It has faults; all are listed.
    """
    values = _mapping(fields, source)
    if isinstance(values.get("preset"), str):
        values.setdefault("name", values["preset"])
    return _checked(ModelSpec, _filled(values, MODELS, source, "preset"), source)


def cluster_from_dict(fields: Any, *, source: str = "the cluster") -> ClusterSpec:
    """Check the fields of a cluster.

    Args:
        fields: As in the file.
        source: For the error.

    Raises:
        ConfigError: It has faults; all are listed.
    """
    values = _mapping(fields, source)
    for name, presets in (("gpu", GPUS), ("drive", DRIVES)):
        part = values.get(name)
        part = {"preset": part} if isinstance(part, str) else part
        if isinstance(part, Mapping):
            part = {**part}
            if isinstance(part.get("preset"), str):
                part.setdefault("name", part["preset"])
            values[name] = _filled(part, presets, source, f"{name}.preset")
    return _checked(ClusterSpec, values, source)


def _mapping(fields: Any, source: str) -> dict[str, Any]:
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        problem = f"file: {shown(fields)} (expected a mapping of names to values)"
        raise ConfigError(source, [problem], hint="see configs/plan/")
    return dict(fields)


def _filled(values: dict[str, Any], presets: Mapping[str, dict[str, Any]], source: str, field: str) -> dict[str, Any]:
    """Put the values over those of the preset that they name."""
    if "preset" not in values:
        return values
    name = values.pop("preset")
    if not isinstance(name, str) or name not in presets:
        meant = nearest(name, presets, cutoff=0.4) if isinstance(name, str) else ""
        raise ConfigError(
            source, [f"{field}: {shown(name)} is unknown{meant}"], hint=f"the presets are {', '.join(presets)}"
        )
    return {**presets[name], **values}


def _checked(kind: type[_Spec], values: dict[str, Any], source: str) -> _Spec:
    return checked(kind, values, source=source, hint=f"the fields are {', '.join(kind.model_fields)}")
