"""The option table as flags: ``--ssdtrain``, and ``--ssdtrain-<name>`` for every option."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import yaml

from ssdtrain_plugin.config import OffloadConfig

__all__ = ["SOURCE", "add_flags", "options_of"]

logger = logging.getLogger(__name__)

SOURCE = "the --ssdtrain flags"
_SWITCH = "enabled"  # the option that `--ssdtrain` itself is


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a group with every option to a parser; one that has them already is left as it is.

    Values are checked later, all at once, by the option table.

    Args:
        parser: Of Megatron or of a script.

    Returns:
        The parser.
    """
    known = parser._option_string_actions
    if "--ssdtrain" in known:
        return parser
    group = parser.add_argument_group("ssdtrain", "activation offloading to NVMe drives")
    group.add_argument("--ssdtrain", action="store_true", help="Offload activations; the flags below say how.")
    for name, field in OffloadConfig.model_fields.items():
        if name == _SWITCH:
            continue
        group.add_argument(
            f"--ssdtrain-{name.replace('_', '-')}",
            nargs="+" if name == "paths" else None,
            type=_reader(name),
            metavar=_metavar(name, field.annotation),
            help=f"{field.description} Default: {field.default or 'none'}.".replace("%", "%%"),
        )
    if "--local_rank" not in known:
        # The `deepspeed` launcher adds it in this spelling; Megatron knows another one only.
        group.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _reader(name: str) -> Callable[[str], Any]:
    """Get what reads the text of a flag: directories are text, everything else a number or a word."""
    return str if name in ("paths", "stats_path") else _read_scalar


def _read_scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the option table says what was expected


def _metavar(name: str, annotation: Any) -> str:
    if name == "paths":
        return "DIRECTORY"
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    return name.rpartition("_")[2].upper()


def options_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Collect the options that were given.

    Args:
        args: Parsed by a parser with :func:`add_flags`.

    Returns:
        Option names and values as in the table, or None without ``--ssdtrain``.
    """
    given = {name: getattr(args, f"ssdtrain_{name}", None) for name in OffloadConfig.model_fields if name != _SWITCH}
    options = {name: value for name, value in given.items() if value is not None}
    if getattr(args, "ssdtrain", False):
        return options
    if options:
        names = ", ".join(f"`--ssdtrain-{name.replace('_', '-')}`" for name in options)
        logger.warning("%s: ignored without `--ssdtrain`", names)
    return None
