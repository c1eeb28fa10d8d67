"""DeepSpeed's two checkpoint functions, ``CheckpointFunction`` and ``non_reentrant_checkpoint``.

Both bypass outer saved-tensor hooks, so their place is taken; outside of our
forward passes they do what they did
(deepspeed/runtime/activation_checkpointing/checkpointing.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing

from ssdtrain_plugin.hooks import active_hooks, checkpoint
from ssdtrain_plugin.runtime import Offloader

__all__ = ["shadow", "take_checkpointing"]


def shadow(owner: object, name: str, value: object, offloader: Offloader) -> None:
    """Set an instance attribute over the class's own, and take it off again on detach.

    Args:
        owner: Of the host framework.
        name: Of the attribute.
        value: To be seen until then.
        offloader: Undoes it.
    """
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    offloader.on_detach(undo)


class _CheckpointFunction:
    """Stands for DeepSpeed's ``CheckpointFunction`` inside its checkpoint function.

    Args:
        inner: DeepSpeed's own, used outside of our forward passes.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def apply(self, function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Run the region; fill ``all_outputs`` as DeepSpeed's function does."""
        # Reentrant means: without an input that wants a gradient, nothing in the region gets one.
        if active_hooks() is None or not any(torch.is_tensor(arg) and arg.requires_grad for arg in args):
            return self._inner.apply(function, all_outputs, *args)
        outputs = _checkpoint(function, *args)
        all_outputs += [outputs] if torch.is_tensor(outputs) else outputs
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _TrackedRandomStates:
    """The named random states of DeepSpeed's tracker as they were before a region.

    torch's checkpoint restores the default generators for a recomputation; DeepSpeed's
    restores these too, and dropout inside of ``get_cuda_rng_tracker().fork()`` draws
    from them. Entered once per recomputation.

    Args:
        states: By name, before the region ran.
    """

    def __init__(self, states: dict[str, Any]) -> None:
        self._before_region = states
        self._outside: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        tracker = ds_checkpointing.get_cuda_rng_tracker()
        self._outside.append(tracker.get_states())
        tracker.set_states(dict(self._before_region))

    def __exit__(self, *raised: object) -> None:
        ds_checkpointing.get_cuda_rng_tracker().set_states(self._outside.pop())


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Run a region as DeepSpeed's checkpoint functions would, with saves that our hooks see."""
    states = ds_checkpointing.get_cuda_rng_tracker().get_states()
    if not states:
        return checkpoint(function, *args)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _TrackedRandomStates(states)

    return checkpoint(function, *args, context_fn=contexts)


class _CheckpointTakeover:
    """Has our checkpoint in the place of DeepSpeed's two functions while an engine is attached.

    The name ``checkpoint`` may have been imported anywhere; what it calls is looked
    up in its module, so that is what is replaced. The module is shared by all engines
    of the process, which come and go in any order.
    """

    def __init__(self) -> None:
        self._num_engines = 0

    def acquire(self) -> None:
        """Count one more engine; the first one replaces."""
        self._num_engines += 1
        if self._num_engines > 1:
            return
        self._function = ds_checkpointing.CheckpointFunction
        self._non_reentrant = inner = ds_checkpointing.non_reentrant_checkpoint

        def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
            return inner(function, *args) if active_hooks() is None else _checkpoint(function, *args)

        ds_checkpointing.CheckpointFunction = _CheckpointFunction(self._function)
        ds_checkpointing.non_reentrant_checkpoint = non_reentrant_checkpoint

    def release(self) -> None:
        """Count one engine less; the last one puts DeepSpeed's own back."""
        self._num_engines -= 1
        if not self._num_engines:
            ds_checkpointing.CheckpointFunction = self._function
            ds_checkpointing.non_reentrant_checkpoint = self._non_reentrant


_takeover = _CheckpointTakeover()


def take_checkpointing(module: torch.nn.Module, offloader: Offloader) -> None:
    """Have the regions that a module checkpoints with DeepSpeed's functions offloaded.

    Args:
        module: Of the engine.
        offloader: Of the engine; undoes it.
    """
    own: Any = getattr(module, "activation_checkpoint_func", None)
    is_non_reentrant = own is ds_checkpointing.non_reentrant_checkpoint
    _takeover.acquire()
    # Detached or collected, whichever comes first; a second call does nothing.
    release = weakref.finalize(offloader, _takeover.release)
    release.atexit = False
    offloader.on_detach(release)
    if not isinstance(module, PipelineModule) or own is ds_checkpointing.checkpoint:
        return  # looks up what was replaced

    def activation_checkpoint_func(function: Callable[..., Any], *args: Any) -> Any:
        return own(function, *args) if active_hooks() is None else _checkpoint(function, *args)

    # DeepSpeed asks by identity whether the function is its non-reentrant one.
    taken = ds_checkpointing.non_reentrant_checkpoint if is_non_reentrant else activation_checkpoint_func
    shadow(module, "activation_checkpoint_func", taken, offloader)
