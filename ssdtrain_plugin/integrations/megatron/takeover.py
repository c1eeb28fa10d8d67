"""What stands in the place of Megatron's own functions while offloading is on.

All are attributes of modules of megatron-core that it looks up when it calls them, so one
assignment reaches every caller, and one more undoes it:

* ``pipeline_parallel.schedules``: the three schedules, of which one call is one step, and
  ``forward_step`` and ``backward_step``, of which one call is one pass;
* ``tensor_parallel.checkpoint``, through which every region is recomputed.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config, make_viewless_tensor
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import StateError
from ssdtrain_plugin.hooks import active_hooks
from ssdtrain_plugin.integrations.lookahead import ScheduledPasses
from ssdtrain_plugin.integrations.megatron.metrics import write_metrics
from ssdtrain_plugin.integrations.megatron.order import SCHEDULES, passes_of
from ssdtrain_plugin.integrations.megatron.refusals import refuse
from ssdtrain_plugin.integrations.megatron.regions import describe_regions, offers_regions_only
from ssdtrain_plugin.runtime import Offloader, build, make_audible

__all__ = ["MegatronOffload", "enabled"]

logger = logging.getLogger(__name__)

_BACKWARD_STEPS = ("backward_step", "backward_step_multimodule")
_OWNER = "_ssdtrain_owner"
_FIRST = 0, 0  # virtual stage and number of the micro-batch that begins a step under every schedule

Function = Callable[..., Any]


class MegatronOffload:
    """Offloads what is saved under Megatron's schedules, from its making to :meth:`disable`.

    Args:
        config: Checked by :func:`ssdtrain_plugin.preflight.check`.

    Attributes:
        config: As given.
        offloader: Made when the first training step begins; None before.

    Threads:
        That which trains.
    """

    def __init__(self, config: OffloadConfig) -> None:
        """Take the places; nothing else is built before the first training step."""
        self.offloader: Offloader | None = None
        self.config = config
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._passes: ScheduledPasses | None = None
        # Weak, for a schedule of somebody's own may number no micro-batch and run its backward without us.
        self._slots = WeakTensorKeyDictionary()
        # Of the schedule that is running; None while that is none of Megatron's own.
        self._is_training: bool | None = None
        self._has_regions = False
        self._undo: list[Callable[[], None]] = []
        for name in SCHEDULES:
            self._replace(schedules, name, functools.partial(self._step, name))
        self._replace(schedules, "forward_step", self._forward)
        for name in _BACKWARD_STEPS:
            if hasattr(schedules, name):
                self._replace(schedules, name, self._backward)
        self._replace(tensor_parallel, "checkpoint", self._checkpoint)

    def _replace(self, module: Any, name: str, outer: Function) -> None:
        """Have a function called with Megatron's own one in front of the arguments."""
        inner = getattr(module, name)

        @functools.wraps(inner)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            # Who fetched it before `disable` may go on calling it.
            return outer(inner, *args, **kwargs) if self._undo else inner(*args, **kwargs)

        def undo() -> None:
            if getattr(module, name) is replacement:  # else somebody has put something on top since
                setattr(module, name, inner)

        setattr(replacement, _OWNER, self)
        setattr(module, name, replacement)
        self._undo.append(undo)

    def disable(self) -> None:
        """Put Megatron's own functions back, stop the threads, give disk and memory back. Twice does nothing."""
        while self._undo:
            self._undo.pop()()
        if self.offloader is not None:
            self.offloader.detach()

    # ------------------------------------------------------------------ a step

    def _step(self, schedule: str, inner: Function, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("forward_only", False):
            with self._inside(is_training=False):
                return inner(*args, **kwargs)
        offloader, passes = self._prepare(kwargs["model"])
        if offloader.cache.num_microbatches:
            offloader.end_step()  # of a step that was given up in the middle
        passes.start(passes_of(schedule, kwargs))
        with self._inside(is_training=True):
            result = inner(*args, **kwargs)
        offloader.end_step()
        return result

    @contextmanager
    def _inside(self, *, is_training: bool) -> Iterator[None]:
        self._is_training = is_training
        try:
            yield
        finally:
            self._is_training = None
            self._slots.clear()

    def _prepare(self, model: nn.Module | list[nn.Module]) -> tuple[Offloader, ScheduledPasses]:
        """Get to know a model before its first step, and build everything before the first of all."""
        chunks = list(model) if isinstance(model, list | tuple) else [model]
        news = [chunk for chunk in chunks if chunk not in self._models]
        for chunk in news:
            refuse(get_model_config(chunk))
        if self.offloader is None or self._passes is None:
            self.offloader = self._build(chunks)
            self._passes = ScheduledPasses(self.offloader.hooks)
        for number, chunk in enumerate(chunks):
            self.offloader.name_layers(chunk, f"chunk{number}" if len(chunks) > 1 else "")
            # Each time: a distributed optimizer may have moved the parameters into its own buffer since.
            # Megatron's DDP has a list where other modules have the method `buffers`.
            buffers = (buffer for _, buffer in chunk.named_buffers())
            self.offloader.cache.keep_resident((*chunk.parameters(), *buffers))
            self._models.add(chunk)
        self._has_regions = offers_regions_only(get_model_config(chunks[0]), self.config)
        return self.offloader, self._passes

    def _build(self, chunks: list[nn.Module]) -> Offloader:
        make_audible()
        device = next((parameter.device for chunk in chunks for parameter in chunk.parameters()), torch.device("cpu"))
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        speaks = _speaks(rank)
        line = describe_regions(get_model_config(chunks[0]), self.config)
        logger.log(logging.INFO if speaks else logging.DEBUG, "ssdtrain: rank %d: %s", rank, line)
        offloader = build(
            self.config, device=device, rank=rank, speaks=speaks, ends_steps_itself=False, lookahead_events=1
        )
        offloader.on_step(write_metrics)
        return offloader

    # ------------------------------------------------------------------ a pass

    def _forward(self, inner: Function, *args: Any, **kwargs: Any) -> Any:
        slot = kwargs.get("vp_stage") or 0, kwargs.get("current_microbatch")
        if self._is_training is None and torch.is_grad_enabled():
            self._begin_unknown(kwargs["model"] if "model" in kwargs else args[2], slot)
        elif not self._is_training:
            return inner(*args, **kwargs)
        with self._known_passes().forward(slot, offers_all=not self._has_regions):
            result = inner(*args, **kwargs)
        output = _tensor_of(result[0])
        if output is not None:
            # Megatron gives this very object to `backward_step`, also after it has emptied the tensor.
            self._slots[output] = slot
        return result

    def _begin_unknown(self, model: nn.Module | list[nn.Module], slot: tuple[int, int | None]) -> None:
        """Prepare for a schedule that is not Megatron's, or was imported before its place was taken."""
        offloader, passes = self._prepare(model)
        if slot == _FIRST:
            self._slots.clear()  # what a step left that was given up in the middle
        # Between two micro-batches of one step nothing may be alive either, so the number tells, where there is one.
        if slot == _FIRST or (slot[1] is None and offloader.cache.is_idle()):
            if offloader.cache.num_microbatches:
                offloader.end_step()
        passes.forget_order()

    def _known_passes(self) -> ScheduledPasses:
        if self._passes is None:
            raise StateError("a training forward began before its model was prepared")
        return self._passes

    def _backward(self, inner: Function, *args: Any, **kwargs: Any) -> Any:
        output = _tensor_of(kwargs["output_tensor"] if "output_tensor" in kwargs else args[1])
        slot = None if output is None else self._slots.pop(output, None)
        if slot is None or self._passes is None:
            return inner(*args, **kwargs)
        with self._passes.backward(slot):
            return inner(*args, **kwargs)

    # ------------------------------------------------------------------ a region

    def _checkpoint(self, inner: Function, function: Function, distribute_saved_activations: bool, *args: Any) -> Any:
        hooks = active_hooks()
        is_ours = self.offloader is not None and hooks is self.offloader.hooks and self._has_regions
        # Megatron's way is reentrant: without an input that wants a gradient, nothing in the region gets one.
        if hooks is None or not is_ours or not any(torch.is_tensor(arg) and arg.requires_grad for arg in args):
            if hooks is not None and distribute_saved_activations and args[0].is_leaf:
                # Megatron cuts this tensor, and backward makes the one whole that it gets back from autograd: the
                # same object without us. A leaf, such as a stage's input, has to be whole to get its gradient.
                args = (make_viewless_tensor(args[0].view_as(args[0]), True, True), *args[1:])
            return inner(function, distribute_saved_activations, *args)
        with hooks.region():
            return function(*args)


def _tensor_of(output: Any) -> Tensor | None:
    """Find the tensor by which an output of a stage is known: itself, or its first one."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((found for found in map(_tensor_of, output) if found is not None), None)
    return output if isinstance(output, Tensor) else None


def _speaks(rank: int) -> bool:
    """One voice per stage: its other tensor- and data-parallel ranks have the same to say."""
    if not parallel_state.model_parallel_is_initialized():
        return rank == 0
    data_parallel_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return not (parallel_state.get_tensor_model_parallel_rank() or data_parallel_rank)


def enabled() -> MegatronOffload | None:
    """Get what has the places of Megatron's functions now, if anything has."""
    owner: MegatronOffload | None = getattr(schedules.forward_step, _OWNER, None)
    return owner
