"""Questions to the machine about the options, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdtrain_plugin.config import OffloadConfig, expand_path
from ssdtrain_plugin.documents import shown
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.storage.memory_limit import available_host_bytes
from ssdtrain_plugin.storage.probe import directory_problem, stranger_problem
from ssdtrain_plugin.units import format_bytes

__all__ = ["check", "expanded", "find_local_rank", "find_rank", "prepare"]

_MOST_DIGITS = 10
_NO_LAUNCHER = ("", "-1")  # the second one by scripts that also run without one


def find_local_rank() -> int:
    """Get the rank of this process on its node, as the launcher says it; 0 without a launcher."""
    return _first_of("LOCAL_RANK", "SLURM_LOCALID")


def find_rank() -> int:
    """Get the rank of this process in its job, as the launcher says it; 0 without a launcher."""
    return _first_of("RANK", "SLURM_PROCID")


def _first_of(*variables: str) -> int:
    for variable in variables:
        if os.environ.get(variable, "") not in _NO_LAUNCHER:
            return _number_of(variable, default=0, least=0)
    return 0


def _number_of(variable: str, *, default: int, least: int) -> int:
    """Read what a launcher says in a variable.

    Raises:
        ConfigError: It is no such number.
    """
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS and int(text) >= least):
        problem = f"{variable}: {shown(text)} (expected a whole number of at least {least})"
        raise ConfigError("the environment", [problem], hint=f"let the launcher set {variable}, or unset it")
    return int(text)


def check(options: Mapping[str, Any], *, source: str, local_rank: int) -> OffloadConfig:
    """Read the options and ask the file system about the paths, before anything is built.

    Args:
        options: As in the option table.
        source: Where they came from, for the message.
        local_rank: Rank of this process on its node, for ``{local_rank}``.

    Returns:
        The options with every placeholder replaced.

    Raises:
        ConfigError: Lists every fault of the options and of the paths at once.
    """
    problems: list[str] = []
    config: OffloadConfig | None = None
    try:
        config = OffloadConfig.from_dict(options)
    except ConfigError as error:
        problems.extend(error.problems)
    is_used = config is None or (config.enabled and config.policy != "none")
    faults = _path_faults(options.get("paths", ()), local_rank=local_rank, is_used=is_used)
    problems.extend(f"paths: {fault}" for fault in faults)
    stats_path = options.get("stats_path")
    if config is not None and is_used:
        problems.extend(_memory_problems(config))
    if isinstance(stats_path, str):
        fault = _stats_problem(Path(expand_path(stats_path, local_rank=local_rank)))
        if fault is not None:
            problems.append(f"stats_path: {fault}")
    if problems or config is None:
        raise ConfigError(source, problems, hint="correct the lines above; `ssdtrain doctor PATH` tests a directory")
    return expanded(config, local_rank=local_rank)


def expanded(config: OffloadConfig, *, local_rank: int) -> OffloadConfig:
    """Replace every placeholder; the machine is not asked.

    Args:
        config: Any.
        local_rank: Rank of this process on its node.
    """
    paths = tuple(expand_path(path, local_rank=local_rank) for path in config.paths)
    stats_path = None if config.stats_path is None else expand_path(config.stats_path, local_rank=local_rank)
    return config.model_copy(update={"paths": paths, "stats_path": stats_path})


def _path_faults(paths: object, *, local_rank: int, is_used: bool) -> list[str]:
    """Say what is wrong with the paths, whose placeholders are replaced."""
    if isinstance(paths, str | os.PathLike):
        paths = (paths,)
    found: list[str] = []
    faults: list[str] = []
    for path in paths if isinstance(paths, list | tuple) else ():
        if not isinstance(path, str | os.PathLike):
            continue
        found.append(expand_path(str(path), local_rank=local_rank))
        fault = directory_problem(found[-1]) if is_used else None
        if fault is not None:
            faults.append(fault)
        elif os.path.realpath(found[-1]) in {os.path.realpath(other) for other in found[:-1]}:
            faults.append(f"`{found[-1]}`: listed twice (expected one directory per drive)")
    return faults


def _memory_problems(config: OffloadConfig) -> list[str]:
    # All ranks of a node ask at about the same time, before any of them has taken its share.
    num_ranks = _number_of("LOCAL_WORLD_SIZE", default=1, least=1)
    share_bytes = available_host_bytes() // num_ranks if config.host_bytes else 0
    if config.host_bytes <= share_bytes:
        return []
    sharing = f" shared by {num_ranks} ranks" if num_ranks > 1 else ""
    share = f"{format_bytes(share_bytes)}, free host memory{sharing}"
    return [f"host_bytes: {format_bytes(config.host_bytes)} (expected at most {share})"]


def _stats_problem(directory: Path) -> str | None:
    """Say why no file can be written, or is safe, in a directory that may not exist yet."""
    try:
        parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        mode = parent.stat().st_mode
    except OSError as error:
        return f"`{directory}`: {error.strerror} (expected a writable directory)"
    if not parent.is_dir():
        return f"`{directory}`: `{parent}` is a file (expected a directory)"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"`{directory}`: `{parent}` cannot be written to (expected a writable directory)"
    stranger = stranger_problem(mode)
    return None if stranger is None else f"`{directory}`: `{parent}` has {stranger}"


def prepare(config: OffloadConfig, *, local_rank: int) -> OffloadConfig:
    """Check the paths of options that are already read; see :func:`check`.

    Args:
        config: Any.
        local_rank: Rank of this process on its node.

    Raises:
        ConfigError: Lists every path that cannot be used.
    """
    return check(config.model_dump(exclude_unset=True), source=OffloadConfig.SOURCE, local_rank=local_rank)
