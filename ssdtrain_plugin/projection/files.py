"""Model and cluster from YAML files, with presets filled in. One error lists every fault of a file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.model import ModelSpec
from ssdtrain_plugin.projection.presets import DRIVES, GPUS, MODELS

__all__ = ["cluster_from_dict", "model_from_dict", "read_cluster", "read_model"]

_LONGEST = 60
"""Of a value in an error (characters)."""

_Spec = TypeVar("_Spec", bound=BaseModel)


def read_model(path: str | Path) -> ModelSpec:
    """Read a model.

    Args:
        path: A YAML file; its fields are those of :class:`ModelSpec`, and ``preset``.

    Raises:
        ConfigError: It cannot be read, is not YAML, or has faults; all are listed.
    """
    return model_from_dict(_load(path), source=f"`{path}`")


def read_cluster(path: str | Path) -> ClusterSpec:
    """Read a cluster.

    Args:
        path: A YAML file; its fields are those of :class:`ClusterSpec`. ``gpu`` and ``drive`` may be the name
            of a preset, or a mapping with a ``preset`` and what differs from it.

    Raises:
        ConfigError: It cannot be read, is not YAML, or has faults; all are listed.
    """
    return cluster_from_dict(_load(path), source=f"`{path}`")


def _load(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"`{path}`", [reason], hint="check the path and that it holds YAML") from None


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
        problem = f"file: {repr(fields)[:_LONGEST]} (expected a mapping of names to values)"
        raise ConfigError(source, [problem], hint="see configs/plan/")
    return dict(fields)


def _filled(values: dict[str, Any], presets: Mapping[str, dict[str, Any]], source: str, field: str) -> dict[str, Any]:
    """Put the values over those of the preset that they name."""
    if "preset" not in values:
        return values
    name = values.pop("preset")
    if not isinstance(name, str) or name not in presets:
        near = difflib.get_close_matches(str(name), presets, n=1, cutoff=0.4)
        meant = f" (did you mean `{near[0]}`?)" if near else ""
        raise ConfigError(
            source, [f"{field}: {name!r} is unknown{meant}"], hint=f"the presets are {', '.join(presets)}"
        )
    return {**presets[name], **values}


def _checked(kind: type[_Spec], values: dict[str, Any], source: str) -> _Spec:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, dict(fault)) for fault in error.errors()]
        raise ConfigError(source, problems, hint=f"the fields are {', '.join(kind.model_fields)}") from None


def _problem(kind: type[BaseModel], fault: dict[str, Any]) -> str:
    names = [str(part) for part in fault["loc"] if not str(part).startswith("function")]
    name = ".".join(names) or "file"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], kind.model_fields, n=1) if len(names) == 1 else []
        return f"{name}: unknown field" + (f" (did you mean `{near[0]}`?)" if near else "")
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "value_error":
        return f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    wanted = fault["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{name}: {repr(fault['input'])[:_LONGEST]} (expected {wanted})"
