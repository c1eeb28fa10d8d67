"""Megatron-core where there is no GPU: what it asks for on device "cuda" is made on the CPU, and nothing else changes.

Megatron-core writes ``device="cuda"`` and ``torch.cuda.current_device()`` at many places, also where it runs with
gloo. The shim moves that device to the CPU: factories, ``.to`` and ``.cuda`` give CPU tensors, memory is not pinned,
waiting for the device returns at once (a CPU operation is finished when its call returns), and the CPU's random
generator plays that of the device. No arithmetic, no schedule and no communication of Megatron is replaced, and
``torch.cuda.is_available()`` stays false. It proves nothing about the order of streams, copies from pinned memory,
NCCL, TransformerEngine or the allocator of CUDA.

    with megatron_shim.on_cpu():             # or megatron_shim.install() at the top of a worker script
        ...

``streams=True`` adds streams and events that do nothing, for Megatron's DDP from 0.17 on and the all-to-all of experts.
``extra=True`` adds what a training loop asks the device: how many there are, and how much memory is in use (none).

``pretrain`` of megatron.training refuses to run without CUDA and compiles what its wheel holds already. The functions
below the line are about these refusals. They are no part of the shim, and nothing but ``pretrain`` needs them.

Known good: megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12).
Threads: The mode that moves factories belongs to the thread that enters it; backward on CPU runs in that thread too.
"""

import atexit
import contextlib
import os
import resource
import sys
from collections import defaultdict
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

ANNOUNCEMENT = 'megatron shim: what is asked for on device "cuda" is made on the CPU; nothing else is changed'
ADDRESS_SPACE_BYTES = 12 * 1024**3


def limit_address_space(limit_bytes=ADDRESS_SPACE_BYTES):
    """Bound the memory of this process and its children: a recursion in Megatron would take all of the machine's."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


@contextlib.contextmanager
def on_cpu(*, streams=False, extra=False):
    """Run Megatron-core on the CPU inside of the context.

    Args:
        streams: Also stand in for streams and events.
        extra: Also stand in for device counts, memory statistics and the like.
    """
    # Here: it takes three seconds, and not every user of this module gets this far.
    from megatron.core.tensor_parallel import random as megatron_random

    sys.stderr.write(f"{ANNOUNCEMENT}\n")
    names = _ALWAYS | (_STREAMS if streams else {}) | (_EXTRA if extra else {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **names))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", _get_rng_state))
        replaced = {"_get_cuda_rng_state": _get_rng_state, "_set_cuda_rng_state": _set_rng_state}
        stack.enter_context(mock.patch.multiple(megatron_random, **replaced))
        stack.enter_context(_CudaIsCpu())
        yield


def install(*, streams=False, extra=False):
    """Enter :func:`on_cpu` until the end of the process; the result's ``close`` leaves it.

    Args:
        streams: As there.
        extra: As there.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(on_cpu(streams=streams, extra=extra))
    atexit.register(stack.close)  # keeps it alive too: dropped, it would be left at once
    return stack


# ---------------------------------------------------------------------- device "cuda" is the CPU


def _is_cuda(value):
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        kwargs.pop("pin_memory", None)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to:
            args = tuple(torch.device("cpu") if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _get_rng_state(device="cuda", clone=False, graph_safe=False):
    return torch.get_rng_state()


def _set_rng_state(new_state, device=-1, graph_safe=False):
    torch.set_rng_state(new_state)


def _giving(result=None):
    """Make a function; a new one for each name, since torch.compile refuses one function under two names."""
    return lambda *args, **kwargs: result


_ALWAYS = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": _giving(),
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
}


class _NullStream:
    """A stream, and the context that makes it current. All work is finished when it is called, so nothing waits."""

    def __init__(self, *args, **kwargs):
        pass

    wait_stream = wait_event = synchronize = _giving()

    def record_event(self, event=None):
        return event or _NullEvent()

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


class _NullEvent:
    def __init__(self, *args, **kwargs):
        pass

    record = wait = synchronize = _giving()
    elapsed_time = _giving(0.0)

    def query(self):
        return True


_STREAM = _NullStream()
_STREAMS = {
    "Stream": _NullStream,
    "Event": _NullEvent,
    "stream": lambda stream: stream or _STREAM,
    "current_stream": _giving(_STREAM),
    "default_stream": _giving(_STREAM),
    "set_stream": _giving(),
    "is_current_stream_capturing": _giving(False),
}
_EXTRA = {
    "set_device": _giving(),
    "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))),
    "empty_cache": _giving(),
    "memory_stats": lambda device=None: defaultdict(int),
    "reset_peak_memory_stats": _giving(),
    "memory_allocated": _giving(0),
    "max_memory_allocated": _giving(0),
    "memory_reserved": _giving(0),
    "max_memory_reserved": _giving(0),
    "device_memory_used": _giving(0),
}


# ---------------------------------------------------------------------- for `pretrain` only; not part of the shim


def let_pretrain_run_without_cuda():
    """Give ``initialize_megatron`` the argument ``allow_no_cuda``, without which it asserts that CUDA is there."""
    import megatron.training
    from megatron.training import initialize, training

    inner = initialize.initialize_megatron

    def initialize_megatron(*args, **kwargs):
        return inner(*args, **{**kwargs, "allow_no_cuda": True})

    for module in (initialize, training, megatron.training):
        module.initialize_megatron = initialize_megatron


def let_pretrain_skip_compiling_its_dataset_helpers():
    """Do not run ``make`` in the installed package: the wheel has the compiled file, but no Makefile."""
    from megatron.training import initialize

    initialize._compile_dependencies = _giving()


def let_pretrain_know_an_architecture(major=9):
    """Answer for the architecture of a device, which argument checks ask for when tensors are parallel.

    Args:
        major: Major compute capability to answer.
    """
    from megatron.training import arguments, utils

    for module in (arguments, utils):
        module.get_device_arch_version = lambda: major
