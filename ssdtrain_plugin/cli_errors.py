"""How the command line refuses: one error, what is wrong with what, and one thing to do. Never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ssdtrain_plugin.errors import ConfigError, EnvironmentUnsupportedError, OffloadError, printable

__all__ = ["Commands", "in_directory", "to_file"]

# What a wrong command line raises. Newer releases of typer carry a click of their own, so it has no other name.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]
_HELP_IS_SHOWN = "NoArgsIsHelpError"


class Commands(TyperGroup):
    """Commands that end with 2 for a wrong command line, and with 1 for an error of ours."""

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run, and end the process as its outcome says."""
        ends_process = settings.get("standalone_mode", True)
        settings["standalone_mode"] = False
        if not ends_process:
            return super().main(*args, **settings)
        try:
            code = super().main(*args, **settings)
        except _UsageError as error:
            _print_usage_error(error)
            sys.exit(error.exit_code)
        except OffloadError as error:
            typer.echo(str(error), err=True)
            sys.exit(1)
        except typer.Abort:
            typer.echo("aborted", err=True)
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _print_usage_error(error: Any) -> None:
    if type(error).__name__ == _HELP_IS_SHOWN:
        error.show()
        return
    command = "ssdtrain" if error.ctx is None else error.ctx.command_path
    hint = f"`{command} --help` lists what can be given"
    typer.echo(f"error: {printable(str(error.format_message()))}\n\nhint: {hint}", err=True)


def in_directory(path: Path | None) -> None:
    """Make sure that files can be written to a directory, before what they are to hold is measured.

    Args:
        path: Created if it is missing; None stands for no output.

    Raises:
        ConfigError: It is no directory, or not ours to write to.
    """
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(path, os.W_OK | os.X_OK) else "no permission to write"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem is not None:
        said = f"--output: `{path}`: {problem} (expected a writable directory)"
        raise ConfigError("the command", [said], hint="name another directory")


@contextlib.contextmanager
def to_file(option: str, path: Path | None) -> Iterator[None]:
    """Name the option whose file cannot be written.

    Args:
        option: As typed.
        path: Its value.

    Raises:
        EnvironmentUnsupportedError: In place of the system's error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentUnsupportedError(
            f"cannot write {option}: `{path}` ({reason}, expected a file in a directory that is there)",
            hint="name another file",
        ) from None
