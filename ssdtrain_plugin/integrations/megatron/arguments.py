"""The option table as flags: ``--ssdtrain``, and ``--ssdtrain-<name>`` for every option."""

from __future__ import annotations

import argparse
from typing import Any, Literal, NoReturn, get_args, get_origin

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.documents import nearest
from ssdtrain_plugin.errors import ConfigError, printable
from ssdtrain_plugin.units import format_bytes

__all__ = ["SOURCE", "add_flags", "options_of"]

SOURCE = "the --ssdtrain flags"
_SWITCH = "enabled"  # the option that `--ssdtrain` itself is
_PATHS = ("path", "paths")  # endings of options that are text, also where it looks like a number


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
            nargs="+" if name == "paths" else "?" if field.annotation is bool else None,
            const=True if field.annotation is bool else None,
            type=str if name.endswith(_PATHS) else _read_value,
            metavar=_metavar(name, field.annotation),
            help=f"{field.description} Default: {_describe(name, field.default)}.".replace("%", "%%"),
        )
    _add_hints(parser)
    if "--local_rank" not in known:
        # The `deepspeed` launcher adds it in this spelling; Megatron knows another one only.
        group.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_hints(parser: argparse.ArgumentParser) -> None:
    """Have the parser's own errors about our flags, such as a value that is missing, end in one thing to do."""
    say = parser.error

    def error(message: str) -> NoReturn:
        ours = [word.partition("=")[0] for word in message.replace(":", " ").split() if word.startswith("--ssdtrain")]
        if not ours:
            say(message)
        flags = [name for name in parser._option_string_actions if name.startswith("--ssdtrain")]
        meant = "" if ours[0] in flags else nearest(ours[0], flags)
        say(f"{printable(message)}{meant}\n\nhint: `--help` describes the --ssdtrain flags")

    parser.error = error  # type: ignore[method-assign]


def _read_value(text: str) -> bool | int | float | str:
    """Read a number or a truth value where the text is one; the option table says what was expected instead."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _describe(name: str, default: object) -> str:
    if default is None or default == ():
        return "none"
    return format_bytes(default) if isinstance(default, int) and name.endswith("_bytes") else str(default)


def _metavar(name: str, annotation: Any) -> str:
    if name == "paths":
        return "DIRECTORY"
    if annotation is bool:
        return "{true,false}"
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    return name.rpartition("_")[2].upper()


def options_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Collect the options that were given.

    Args:
        args: Parsed by a parser with :func:`add_flags`.

    Returns:
        Option names and values as in the table, or None without ``--ssdtrain``.

    Raises:
        ConfigError: There are options, but no ``--ssdtrain``; all are listed.
    """
    given = {name: getattr(args, f"ssdtrain_{name}", None) for name in OffloadConfig.model_fields if name != _SWITCH}
    options = {name: value for name, value in given.items() if value is not None}
    if getattr(args, "ssdtrain", False):
        return options
    if options:
        flags = [f"`--ssdtrain-{name.replace('_', '-')}`" for name in options]
        problems = [f"{flag}: does nothing without `--ssdtrain`" for flag in flags]
        raise ConfigError(SOURCE, problems, hint="add `--ssdtrain`, or leave the flags above out")
    return None
