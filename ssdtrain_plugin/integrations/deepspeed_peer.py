"""DeepSpeed's ``cpu_checkpointing`` without an engine, for the benchmark that compares the plugin with it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

from torch import Tensor

__all__ = ["NAME", "cpu_checkpointing", "why_not"]

NAME = "DeepSpeed cpu_checkpointing"
"""In the report."""


def why_not(device: str) -> str | None:
    """Say why it cannot be compared here, or give None if it can.

    Args:
        device: Where training runs, as torch names it.
    """
    if not device.startswith("cuda"):
        # `copy_to_device(args, "cpu")` gives the tensor itself, and `get_cpu_activations_for_backward` empties it.
        return (
            "its copy to host memory is the tensor itself on a CPU, and it empties what it has copied: backward fails"
        )
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return None


@contextlib.contextmanager
def cpu_checkpointing() -> Iterator[Callable[..., Tensor]]:
    """Have DeepSpeed's checkpointing hold inputs in host memory, as its JSON block would; undo it at the end.

    Yields:
        What runs a layer on its inputs, to be recomputed in backward.
    """
    from deepspeed.runtime.activation_checkpointing import checkpointing  # seconds

    def run_layer(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        # It empties the tensors that it was given; another layer may get the same ones.
        output: Tensor = checkpointing.checkpoint(layer, *(each.view_as(each) for each in inputs))
        return output

    # What `configure` would set; it also wants a process group, for a line in the log.
    before = checkpointing.CPU_CHECKPOINT
    checkpointing.CPU_CHECKPOINT = True
    try:
        yield run_layer
    finally:
        checkpointing.reset()
        checkpointing.CPU_CHECKPOINT = before
