"""In which order a rank runs its passes under each of Megatron's schedules.

Megatron's own functions say how many forwards come first and which micro-batch of which
virtual stage is when (core/pipeline_parallel/schedules.py). A micro-batch in flight is
named by its virtual stage and its number, as ``forward_step`` is told them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from ssdtrain_plugin.integrations.lookahead import Pass

__all__ = ["SCHEDULES", "passes_of"]

Slot = tuple[int, int]

NO_PIPELINING = "forward_backward_no_pipelining"
INTERLEAVED = "forward_backward_pipelining_with_interleaving"
ONE_FORWARD_ONE_BACKWARD = "forward_backward_pipelining_without_interleaving"
SCHEDULES = (NO_PIPELINING, INTERLEAVED, ONE_FORWARD_ONE_BACKWARD)


def passes_of(schedule: str, arguments: Mapping[str, Any]) -> list[Pass]:
    """List the passes of one training step on this rank.

    Args:
        schedule: One of :data:`SCHEDULES`.
        arguments: That it is called with, by name.
    """
    count = arguments["num_microbatches"]
    slots = [(0, number) for number in range(count)]
    if schedule == NO_PIPELINING:
        return _alternate(slots, slots, 0)
    communicator = arguments.get("p2p_communicator")
    if schedule == ONE_FORWARD_ONE_BACKWARD:
        rank, size = _stage(communicator)
        return _alternate(slots, slots, size - rank - 1)
    chunks = arguments["model"]
    group = get_model_config(chunks[0]).microbatch_group_size_per_vp_stage
    _, _, num_warmup, _ = schedules.get_pp_rank_microbatches(count, len(chunks), group, p2p_communicator=communicator)
    table = schedules.get_schedule_table(count, len(chunks), group)
    forwards = [(chunk, number) for number, chunk in table]
    backwards = [(len(chunks) - 1 - chunk, number) for number, chunk in table]
    return _alternate(forwards, backwards, num_warmup)


def _stage(communicator: Any) -> tuple[int, int]:
    """Get this rank's stage and the number of stages."""
    if communicator is None:
        size: int = parallel_state.get_pipeline_model_parallel_world_size()
        return parallel_state.get_pipeline_model_parallel_rank(), size
    if hasattr(communicator, "total_stages"):
        return communicator.current_stage, communicator.total_stages
    return communicator.pp_group.rank(), communicator.pp_group.size()


def _alternate(forwards: list[Slot], backwards: list[Slot], num_warmup: int) -> list[Pass]:
    """Run some forwards, then one backward after each, then the backwards that are left."""
    num_warmup = min(num_warmup, len(forwards))
    passes = [Pass(slot, is_backward=False) for slot in forwards[:num_warmup]]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        passes += Pass(forward, is_backward=False), Pass(backward, is_backward=True)
    return [*passes, *(Pass(slot, is_backward=True) for slot in backwards[len(forwards) - num_warmup :])]
