"""The numbers of a step in the TensorBoard that Megatron's training loop writes, if it writes one."""

from __future__ import annotations

import sys

from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.summary import metrics_of

__all__ = ["write_metrics"]

_GLOBALS = "megatron.training.global_vars"


def write_metrics(stats: StepStats) -> None:
    """Write the numbers of a step over Megatron's own iterations.

    Only the last rank has a writer, so it is the last stage that is seen. A loop of
    one's own on megatron-core has none.

    Args:
        stats: Of the step.
    """
    training = sys.modules.get(_GLOBALS)
    writer = None if training is None else training.get_tensorboard_writer()
    if training is None or writer is None:
        return
    iteration = getattr(training.get_args(), "curr_iteration", stats.step) + 1  # as its own log counts
    for name, value in metrics_of(stats).items():
        writer.add_scalar(name, value, iteration)
