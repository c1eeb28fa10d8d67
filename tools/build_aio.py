"""Compile DeepNVMe's extension before the tests need it: it takes minutes once, and no test should pay for it."""

from __future__ import annotations

import importlib
import sys

from ssdtrain_plugin.storage.aio import aio_problem


def main() -> None:
    """Compile it, or say why the tests of the engine `aio` will be skipped."""
    problem = aio_problem()
    if problem is not None:
        sys.stdout.write(f"the tests of io_engine `aio` will be skipped: {problem}\n")
        return
    sys.stdout.write("loading DeepNVMe's extension (the first time it is compiled, which takes some minutes) ...\n")
    sys.stdout.flush()
    importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
