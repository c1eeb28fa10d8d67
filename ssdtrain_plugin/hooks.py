"""Where the cache meets autograd: the hooks, the modules they are put around, and ``checkpoint``."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.stats import StepStats

__all__ = ["ModuleHooks", "SavedTensorHooks", "checkpoint"]

_active: ContextVar[SavedTensorHooks | None] = ContextVar("ssdtrain_active_hooks", default=None)


class SavedTensorHooks:
    """Puts a cache under autograd for the length of a forward pass.

    Note [Leave before backward]. Only the innermost hooks fire, and hooks that are
    still active in backward also see what a reentrant checkpoint recomputes. So
    the context spans a forward pass and nothing else, and is not entered inside a
    backward.

    Args:
        cache: Gets what autograd saves.
        checkpointing: ``offload`` or ``recompute``, see the option.

    Attributes:
        end_step: Weak reference of what to call when a forward begins and no graph
            holds anything, or None.
    """

    def __init__(self, cache: TensorCache, *, checkpointing: str) -> None:
        """Bind the cache; nothing is hooked yet."""
        self.cache = cache
        self.checkpointing = checkpointing
        self.end_step: weakref.WeakMethod[Callable[[], StepStats]] | None = None

    @contextlib.contextmanager
    def forward(self) -> Iterator[int | None]:
        """Offload what is saved inside; yields the number of the micro-batch.

        Without grad mode, inside a backward, or inside another such context
        nothing is hooked, and None is yielded.
        """
        if not torch.is_grad_enabled() or _is_in_backward() or _active.get() is not None:
            yield None
            return
        self._end_step_if_idle()
        microbatch = self.cache.begin_forward()
        token = _active.set(self)
        started = time.perf_counter()
        try:
            with saved_tensors_hooks(self.cache.put, self.cache.get):
                yield microbatch
        finally:
            _active.reset(token)
            self.cache.end_forward(time.perf_counter() - started)

    def _end_step_if_idle(self) -> None:
        end_step = None if self.end_step is None else self.end_step()
        if end_step is not None and self.cache.has_counted() and self.cache.is_idle():
            end_step()

    @contextlib.contextmanager
    def backward(self, microbatch: int | None) -> Iterator[None]:
        """Tell the cache whose backward runs inside, and how long it took.

        Args:
            microbatch: As yielded by :meth:`forward`; None does nothing.
        """
        if microbatch is None:
            yield
            return
        self.cache.expect_backward(microbatch)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.cache.end_backward(time.perf_counter() - started)


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class ModuleHooks:
    """Runs every forward of one module inside :meth:`SavedTensorHooks.forward`.

    Only forward hooks are used. A full-backward hook would turn the module's
    output into a view, which pipeline engines do not expect.

    Args:
        module: Any module; its class and its forward are not changed.
        hooks: Entered around its forward.
    """

    def __init__(self, module: nn.Module, hooks: SavedTensorHooks) -> None:
        """Register both hooks."""
        self._hooks = hooks
        self._open: list[contextlib.ExitStack] = []
        # First in, last out, so that other hooks' saves are covered as well; and
        # called when forward raises, so that no context is left open.
        self._before = module.register_forward_pre_hook(self._enter, prepend=True)
        self._after = module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(self._hooks.forward())
        self._open.append(stack)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - user's type
        if self._open:
            self._open.pop().close()

    def remove(self) -> None:
        """Take both hooks off. Calling it twice does nothing."""
        self._before.remove()
        self._after.remove()


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401 - takes the place of torch's function
    """Run a region as ``torch.utils.checkpoint.checkpoint`` would, or offload it instead.

    Inside the forward of an attached model with ``checkpointing: offload`` the
    region is simply run: its saved tensors go to the drive and nothing is
    recomputed. With ``recompute``, and outside of an attached model, it is
    checkpointed; its inputs are then what is offloaded.

    Args:
        function: The region; called as ``function(*args, **kwargs)``.
        *args: Its inputs.
        use_reentrant: Which of torch's two ways to use when it is recomputed.
        **kwargs: Its inputs, and torch's own options (``preserve_rng_state`` and so on).

    Returns:
        What ``function`` returns.
    """
    hooks = _active.get()
    if hooks is not None and hooks.checkpointing == "offload":
        options = ("preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
        return function(*args, **{name: value for name, value in kwargs.items() if name not in options})
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)


def active_hooks() -> SavedTensorHooks | None:
    """Get the hooks that the calling thread is inside of, if any."""
    return _active.get()
