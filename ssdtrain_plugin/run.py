"""Run an unchanged DeepSpeed script with the plugin: ``python -m ssdtrain_plugin.run script.py ...``.

Under the launcher: ``deepspeed --module ssdtrain_plugin.run script.py ...``. The
script's own ``deepspeed.initialize`` then reads the ``"ssdtrain"`` block.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from ssdtrain_plugin.errors import ConfigError

__all__ = ["main"]

_USAGE = "usage: python -m ssdtrain_plugin.run SCRIPT [ARGUMENTS...]"


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Find the script among the arguments.

    The launcher puts ``--local_rank=N`` before the script; the script expects it
    among its own arguments.

    Args:
        arguments: After the name of this module.

    Returns:
        The script, or None; and the arguments for it.
    """
    for position, argument in enumerate(arguments):
        if not argument.startswith("-"):
            return argument, arguments[:position] + arguments[position + 1 :]
    return None, arguments


def main(arguments: list[str] | None = None) -> None:
    """Put our ``initialize`` into ``deepspeed`` and run the script as ``__main__``.

    Args:
        arguments: Script and its arguments; by default those of the process.
    """
    script, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
    if script is None:
        sys.exit(_USAGE)
    if not Path(script).is_file():
        sys.exit(f"cannot run `{script}`: no such file\n\n{_USAGE}")
    # Page-aligned CPU tensors go to the drive and come back without a copy. torch
    # reads this at its first large allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    import deepspeed

    from ssdtrain_plugin.integrations.deepspeed import initialize

    deepspeed.initialize = initialize
    sys.argv = [script, *rest]
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11; then there is no such entry
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except ConfigError as error:
        # The user's settings, not the user's code: the message says all.
        sys.exit(f"ssdtrain: {error}")


if __name__ == "__main__":
    main()
