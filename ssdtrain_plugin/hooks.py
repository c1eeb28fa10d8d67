"""Where the cache meets autograd: the hooks, the modules they are put around, and ``checkpoint``."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.trace import Trace

__all__ = ["ModuleHooks", "SavedTensorHooks", "active_hooks", "checkpoint"]

_MEGATRON = "megatron.core.tensor_parallel"  # imported by whoever calls in Megatron's form

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
        trace: What records some steps, or None.
    """

    def __init__(self, cache: TensorCache, *, checkpointing: str) -> None:
        """Bind the cache; nothing is hooked yet."""
        self.cache = cache
        self.checkpointing = checkpointing
        self.end_step: weakref.WeakMethod[Callable[[], StepStats]] | None = None
        self.trace: Trace | None = None

    @contextlib.contextmanager
    def forward(self, *, offers_all: bool = True) -> Iterator[int | None]:
        """Offload what is saved inside; yields the number of the micro-batch.

        Without grad mode, inside a backward, or inside another such context
        nothing is hooked, and None is yielded.

        Args:
            offers_all: The policy decides about all that is saved; else only about what
                a :meth:`region` saves, and the rest is kept.
        """
        if not torch.is_grad_enabled() or _is_in_backward() or _active.get() is not None:
            yield None
            return
        self._end_step_if_idle()
        microbatch = self.cache.begin_forward()
        _active.set(self)
        started = time.perf_counter()
        is_whole = False
        try:
            put = self.cache.put if offers_all else partial(self.cache.put, is_offered=False)
            with saved_tensors_hooks(put, self.cache.get):
                yield microbatch
            is_whole = True
        finally:
            _active.set(None)
            self.cache.end_forward(time.perf_counter() - started, is_whole=is_whole)

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Have the policy decide about what is saved inside, in a forward that does not offer all."""
        with saved_tensors_hooks(self.cache.put, self.cache.get):
            yield

    def _end_step_if_idle(self) -> None:
        end_step = None if self.end_step is None else self.end_step()
        if end_step is not None and self.cache.num_microbatches and self.cache.is_idle():
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
        owner: Kept alive as long as the module is hooked.
    """

    def __init__(self, module: nn.Module, hooks: SavedTensorHooks, owner: object) -> None:
        """Register both hooks."""
        self._hooks: SavedTensorHooks | None = hooks
        self._owner: object = owner
        self._local = threading.local()
        self._num_open = 0
        self._count_lock = threading.RLock()
        # First in, last out, so that other hooks' saves are covered as well; and
        # called when forward raises, so that no context is left open.
        self._handles: tuple[RemovableHandle, ...] = (
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        )

    @classmethod
    def _inert(cls) -> ModuleHooks:
        hooks = cls.__new__(cls)
        hooks._hooks, hooks._owner, hooks._local, hooks._handles = None, None, threading.local(), ()
        hooks._num_open, hooks._count_lock = 0, threading.RLock()
        return hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHooks:
        """Make a copy of the model, an average of its weights for example, one that is not attached."""
        return self._inert()

    def __reduce__(self) -> tuple[Callable[[], ModuleHooks], tuple[()]]:
        """Make a pickled model one that is not attached."""
        return ModuleHooks._inert, ()

    @property
    def _open(self) -> list[tuple[FrameType, contextlib.ExitStack]]:
        """The contexts that this thread is inside of."""
        stacks: list[tuple[FrameType, contextlib.ExitStack]] = self._local.__dict__.setdefault("open", [])
        return stacks

    @staticmethod
    def are_on(module: nn.Module) -> bool:
        """Tell whether a module is attached already.

        Args:
            module: Any.
        """
        owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
        return any(isinstance(owner, ModuleHooks) and owner._hooks is not None for owner in owners)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._hooks is None:
            return
        self._close_stale()
        stack = contextlib.ExitStack()
        stack.enter_context(self._hooks.forward())
        self._open.append((sys._getframe(1), stack))
        with self._count_lock:
            self._num_open += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open:
            self._close_last()

    def _close_last(self) -> None:
        self._open.pop()[1].close()
        with self._count_lock:
            self._num_open -= 1
        self._remove_if_unused()

    def _remove_if_unused(self) -> None:
        """Take the leave-hook off when nothing is left to leave: detach may come from inside a forward."""
        with self._count_lock:
            if self._hooks is None and not self._num_open:
                for handle in self._handles:
                    handle.remove()

    def _close_stale(self) -> None:
        """Leave contexts whose forward was interrupted: torch calls no hook on Ctrl-C."""
        while self._open and not _is_running(self._open[-1][0]):
            self._close_last()

    def remove(self) -> None:
        """Take both hooks off, or let the forwards that are running do it. Calling it twice does nothing."""
        self._close_stale()
        self._hooks = None
        self._remove_if_unused()


def _is_running(frame: FrameType) -> bool:
    current: FrameType | None = sys._getframe()
    while current is not None and current is not frame:
        current = current.f_back
    return current is frame


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """Run a region as ``torch.utils.checkpoint.checkpoint`` would, or offload it instead.

    Inside the forward of an attached model with ``checkpointing: offload`` the
    region is simply run: its saved tensors go to the drive and nothing is
    recomputed. With ``recompute``, and outside of an attached model, it is
    checkpointed; its inputs are then what is offloaded.

    Megatron's form, ``checkpoint(function, distribute_saved_activations, *args)``, is
    taken as well where Megatron is in use: a bool in front of inputs that ``function`` can do
    with alone is not one of them. Give a function its own bool by keyword.

    Args:
        function: The region; called as ``function(*args, **kwargs)``.
        *args: Its inputs.
        use_reentrant: Which of torch's two ways to use when it is recomputed.
        **kwargs: Its inputs, and torch's own options (``preserve_rng_state`` and so on).

    Returns:
        What ``function`` returns.
    """
    hooks, is_megatron = _active.get(), _has_megatron_form(function, args, kwargs)
    inputs = args[1:] if is_megatron else args
    # Megatron's is reentrant: without an input that wants a gradient, nothing in the region gets one.
    is_blind = is_megatron and not any(torch.is_tensor(value) and value.requires_grad for value in inputs)
    if hooks is not None and hooks.checkpointing == "offload" and not is_blind:
        options = ("preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
        with hooks.region():  # also where the host has all that is outside of regions kept
            return function(*inputs, **{name: value for name, value in kwargs.items() if name not in options})
    if is_megatron:
        # Megatron's own restores the random states of its tensor-parallel regions too.
        return sys.modules[_MEGATRON].checkpoint(function, *args)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)


def _has_megatron_form(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether the first input is Megatron's ``distribute_saved_activations``."""
    if not args or not isinstance(args[0], bool) or kwargs or _MEGATRON not in sys.modules:
        return False
    try:
        inspect.signature(function).bind(*args[1:])
    except TypeError:
        return False
    return True


def active_hooks() -> SavedTensorHooks | None:
    """Get the hooks that the calling thread is inside of, if any."""
    return _active.get()
