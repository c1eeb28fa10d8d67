"""Run an unchanged training script with the plugin: ``python -m ssdtrain_plugin.run script.py ...``.

Under a launcher: ``deepspeed --module ssdtrain_plugin.run script.py ...`` or ``torchrun -m
ssdtrain_plugin.run script.py ...``. A DeepSpeed script's own ``deepspeed.initialize`` then
reads the ``"ssdtrain"`` block; a Megatron script's own parser knows the ``--ssdtrain`` flags.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ssdtrain_plugin.errors import ConfigError, printable

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


class _AfterImport(MetaPathFinder):
    """Changes a module right after its import, whoever imports it; one that nobody imports stays unloaded.

    Args:
        actions: By name of the module; each is run once, with the module.
    """

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions
        self._searched: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as if this finder were not there, and have its loader run the action too.

        Who only asks whether there is such a module, as many packages do, gets a spec as well, and
        throws it away: so the action waits until a module was really loaded.
        """
        if fullname not in self._actions or fullname in self._searched:
            return None
        self._searched.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searched.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            action = self._actions.pop(fullname, None)
            if action is not None:
                action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _prepare_deepspeed(deepspeed: ModuleType) -> None:
    from ssdtrain_plugin.integrations.deepspeed import initialize

    deepspeed.initialize = initialize  # type: ignore[attr-defined]


def _prepare_megatron(arguments: ModuleType) -> None:
    from ssdtrain_plugin.integrations.megatron import prepare_script

    prepare_script(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the hosts for when the script imports them, and run it as ``__main__``.

    Args:
        arguments: Script and its arguments; by default those of the process.
    """
    script, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
    if script is None and not {"-h", "--help"}.isdisjoint(rest):
        sys.stdout.write(f"{_USAGE}\n\nRuns an unchanged training script with the plugin, here or under a launcher.\n")
        sys.exit(0)
    if script is None:
        sys.exit(f"ssdtrain: no script was named (expected SCRIPT)\n\nhint: {_USAGE}")
    if not Path(script).is_file():
        sys.exit(f"ssdtrain: cannot run `{printable(script)}`: no such file\n\nhint: {_USAGE}")
    # Page-aligned CPU tensors go to the drive and come back without a copy. torch
    # reads this at its first large allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    hosts = {"deepspeed": _prepare_deepspeed, "megatron.training.arguments": _prepare_megatron}
    for name in hosts.keys() & sys.modules.keys():
        hosts.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(hosts))
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
