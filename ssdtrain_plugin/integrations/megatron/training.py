"""The doors: a parser that gets the flags, a loop of one's own, and Megatron's own training loop."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.integrations.megatron.arguments import SOURCE, add_flags, options_of
from ssdtrain_plugin.integrations.megatron.refusals import refuse
from ssdtrain_plugin.integrations.megatron.takeover import MegatronOffload, enabled
from ssdtrain_plugin.preflight import check, expanded, find_local_rank

__all__ = ["add_args", "enable", "prepare_script"]

_TRAINING = "megatron.training.training"
_IS_ARMED = "_ssdtrain_is_armed"
_LOST = (
    "ssdtrain: the --ssdtrain flags were dropped: Megatron takes no flags beside `--yaml-cfg`\n\n"
    "hint: put `ssdtrain: true` and `ssdtrain_paths: [DIRECTORY]` into that file"
)


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--ssdtrain`` flags; with Megatron's training loop they are then obeyed.

    Give it to Megatron as ``extra_args_provider``: of ``pretrain`` up to 0.17, of
    ``parse_and_validate_args`` from 0.18 on. A loop of one's own on megatron-core calls
    :func:`enable` with the parsed flags.

    Args:
        parser: Of Megatron or of a script.

    Returns:
        The parser.
    """
    if _TRAINING in sys.modules:
        _arm(sys.modules[_TRAINING])
    return add_flags(parser)


def enable(settings: argparse.Namespace | Mapping[str, Any] | OffloadConfig) -> MegatronOffload | None:
    """Offload what Megatron's schedules save from now on; the models are met when they train.

    Args:
        settings: Parsed flags of :func:`add_args`, or the options themselves.

    Returns:
        What undoes it, or None if nothing was switched on. A second call returns the
        first's, if it says the same or nothing.

    Raises:
        ConfigError: An option is wrong, a path cannot be used, something of Megatron's
            settings cannot be combined with offloading, or an earlier call said something
            else; all are listed.
    """
    present, found = enabled(), _options(settings)
    if found is None:
        return present
    options, source = found
    if present is not None:
        _refuse_others(options, present.config)
        return present
    config = check(options, source=source, local_rank=find_local_rank())
    return MegatronOffload(config) if config.enabled else None


def _refuse_others(options: Mapping[str, Any], present: OffloadConfig) -> None:
    """Refuse options that differ from those that are in force, of which the machine was asked when it had room."""
    config = expanded(OffloadConfig.from_dict(options), local_rank=find_local_rank())
    problems = [
        f"{name}: {getattr(config, name)!r} (expected {getattr(present, name)!r}, which is in force)"
        for name in OffloadConfig.model_fields
        if getattr(config, name) != getattr(present, name)
    ]
    if problems:
        hint = "enable once; to change options, call `disable()` on what the first `enable` returned"
        raise ConfigError("a second `enable`", problems, hint=hint)


def _options(settings: argparse.Namespace | Mapping[str, Any] | OffloadConfig) -> tuple[Mapping[str, Any], str] | None:
    """Get the options and where they came from; None if there are none."""
    if isinstance(settings, OffloadConfig):
        return settings.model_dump(exclude_unset=True), OffloadConfig.SOURCE
    if isinstance(settings, Mapping):
        return settings, OffloadConfig.SOURCE
    options = options_of(settings)
    if options is None:
        return None
    refuse(settings)
    return options, SOURCE


def prepare_script(arguments: Any) -> None:
    """Have Megatron's parser know the flags, for a script that is not changed.

    Args:
        arguments: The module ``megatron.training.arguments``.
    """
    add_own = arguments.add_megatron_arguments

    @functools.wraps(add_own)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        importlib.import_module(_TRAINING)
        return add_args(add_own(parser))

    arguments.add_megatron_arguments = add_megatron_arguments


def _arm(training: Any) -> None:
    """Have Megatron's training loop call :func:`enable` before it builds a model.

    Flags that cannot be obeyed end the process with the message alone, as argparse does.
    """
    inner = training.setup_model_and_optimizer
    if getattr(inner, _IS_ARMED, False):
        return

    @functools.wraps(inner)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        flags = training.get_args()
        if not hasattr(flags, "ssdtrain") and any(argument.startswith("--ssdtrain") for argument in sys.argv):
            sys.exit(_LOST)
        try:
            enable(flags)
        except ConfigError as error:
            sys.exit(f"ssdtrain: {error}")
        return inner(*args, **kwargs)

    setattr(setup_model_and_optimizer, _IS_ARMED, True)
    training.setup_model_and_optimizer = setup_model_and_optimizer
