"""DeepSpeed: the ``"ssdtrain"`` block, the pipeline's instructions, and its checkpoint functions.

``initialize`` has the signature and the result of ``deepspeed.initialize``. What
it touches, all on instances and all undone by ``Offloader.detach``:

* ``PipelineEngine._INSTRUCTION_MAP``: the forward instruction, which computes the
  loss too, and the backward instruction (runtime/pipe/engine.py);
* ``PipelineEngine._train_schedule``, to know which instruction comes next;
* ``train_batch``, or ``step`` of a plain engine: a step ends with it;
* ``destroy``, which detaches;
* ``PipelineModule.activation_checkpoint_func``.

One thing is shared by the process: DeepSpeed's two checkpoint functions, see
:mod:`ssdtrain_plugin.integrations.deepspeed_checkpointing`.
"""

from __future__ import annotations

import base64
import difflib
import functools
import inspect
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import hjson
import torch
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger as ds_logger
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.documents import read_text, shown
from ssdtrain_plugin.errors import ConfigError, printable
from ssdtrain_plugin.hooks import ModuleHooks
from ssdtrain_plugin.integrations.deepspeed_checkpointing import shadow, take_checkpointing
from ssdtrain_plugin.integrations.lookahead import Pass, ScheduledPasses
from ssdtrain_plugin.preflight import check, find_local_rank
from ssdtrain_plugin.runtime import Offloader, build, make_audible
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.summary import metrics_of
from ssdtrain_plugin.trace import Trace
from ssdtrain_plugin.units import MIB

__all__ = ["initialize", "offloader_of", "read_block"]

logger = logging.getLogger(__name__)

BLOCK = "ssdtrain"
_ATTRIBUTE = "ssdtrain_offloader"
_MAX_FILE_BYTES = 16 * MIB
_LONGEST_KEY = 40
_original_initialize = deepspeed.initialize

Instruction = Callable[..., None]


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Build a DeepSpeed engine and, if its config has an enabled block, offload its activations.

    Args:
        *args: As for ``deepspeed.initialize``.
        **kwargs: As for ``deepspeed.initialize``.

    Returns:
        What ``deepspeed.initialize`` returns.

    Raises:
        ConfigError: The block has faults; raised before the engine is built.
    """
    config = read_block(_config_argument(args, kwargs))
    result: tuple[Any, ...] = _original_initialize(*args, **kwargs)
    if config is not None and config.enabled:
        _attach(result[0], config)
    return result


def offloader_of(engine: Any) -> Offloader | None:
    """Get what :func:`initialize` attached to an engine.

    Args:
        engine: As returned by :func:`initialize`.
    """
    offloader: Offloader | None = getattr(engine, _ATTRIBUTE, None)
    return offloader


# ---------------------------------------------------------------------- the config block


def _config_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    given = inspect.signature(_original_initialize).bind_partial(*args, **kwargs).arguments
    for name in ("config", "config_params"):
        if given.get(name) is not None:
            return given[name]
    return getattr(given.get("args"), "deepspeed_config", None)


def _parse(config: object) -> tuple[Mapping[str, Any], str]:
    """Read a DeepSpeed config as DeepSpeed does: a mapping, a file, or base64 text."""
    if isinstance(config, Mapping):
        return config, "the DeepSpeed config"
    if not isinstance(config, str | os.PathLike):
        return {}, ""
    path = Path(config)
    if os.path.isfile(path):  # unlike Path.is_file it takes base64 text of any length
        text, source = read_text(path, max_bytes=_MAX_FILE_BYTES), f"`{path}`"
    else:
        try:
            text, source = base64.urlsafe_b64decode(str(config)).decode("utf-8"), "the DeepSpeed config"
        except ValueError:
            return {}, ""  # not ours to judge: DeepSpeed says what is wrong with it
    try:
        parsed = hjson.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(source, [f"{reason} (expected JSON)"], hint="check that it holds JSON") from None
    return (parsed, source) if isinstance(parsed, Mapping) else ({}, "")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice, as DeepSpeed does."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} is there twice")
        found[name] = value
    return found


def read_block(config: object) -> OffloadConfig | None:
    """Read and check the ``"ssdtrain"`` block of a DeepSpeed config.

    Args:
        config: A mapping, a path, or base64 text, as DeepSpeed takes it.

    Returns:
        The options, or None if there is no block.

    Raises:
        ConfigError: Lists every fault of the block, or the sections in which it was put by mistake.
    """
    parsed, source = _parse(config)
    if misplaced := list(_misplaced(parsed)):
        problems = [f"{place}: DeepSpeed does not look there (expected at the top level)" for place in misplaced]
        raise ConfigError(
            source, problems, hint=f'move the "{BLOCK}" block out of the section, beside "zero_optimization"'
        )
    if BLOCK not in parsed:
        for key in (key for key in parsed if isinstance(key, str) and len(key) <= _LONGEST_KEY):
            if BLOCK in key.lower() or difflib.SequenceMatcher(None, BLOCK, key.lower()).ratio() > 0.7:
                logger.warning('`%s` in %s is ignored (did you mean `"%s"`?)', printable(key), printable(source), BLOCK)
        return None
    block = parsed[BLOCK]
    source = f'the "{BLOCK}" block of {source}'
    if not isinstance(block, Mapping):
        problem = f"{shown(block)} (expected a mapping of option names to values)"
        raise ConfigError(source, [problem], hint=f'write `"{BLOCK}": {{"paths": ["DIRECTORY"]}}`, or leave it out')
    defaults = _defaults(parsed)
    if "host_bytes" in block:
        defaults.pop("paths", None)  # host memory alone was asked for
    return check({**defaults, **block}, source=source, local_rank=find_local_rank())


def _misplaced(parsed: Mapping[str, Any], *sections: str) -> Iterator[str]:
    """Find blocks that stand inside of other sections, where they would be ignored without a word."""
    for key, value in parsed.items():
        if not isinstance(value, Mapping):
            continue  # a note of the user's own in a section of their own
        if sections and key == BLOCK:
            yield ".".join((*sections, key))
        elif key != BLOCK:
            yield from _misplaced(value, *sections, str(key))


def _defaults(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Take what the user already told DeepSpeed about the drive."""
    defaults: dict[str, Any] = {}
    zero = parsed.get("zero_optimization")
    for section in ("offload_param", "offload_optimizer"):
        offload = zero.get(section) if isinstance(zero, Mapping) else None
        path = offload.get("nvme_path") if isinstance(offload, Mapping) and offload.get("device") == "nvme" else None
        if path and isinstance(path, str | os.PathLike):
            defaults.setdefault("paths", [str(path)])
    aio = parsed.get("aio")
    if isinstance(aio, Mapping):
        threads = aio.get("intra_op_parallelism", aio.get("thread_count"))
        if isinstance(threads, int) and threads > 1:
            defaults["io_threads"] = min(threads, 64)
    return defaults


# ---------------------------------------------------------------------- the engine


def _attach(engine: Any, config: OffloadConfig) -> None:
    make_audible(ds_logger.handlers[0].formatter if ds_logger.handlers else None)
    # One voice per stage: the other data- and tensor-parallel ranks have the same to say.
    is_speaker = engine.global_rank == 0
    if engine.mpu:
        is_speaker = engine.mpu.get_data_parallel_rank() == 0 and bwc_tensor_model_parallel_rank(engine.mpu) == 0
    offloader = build(
        config,
        device=torch.device(engine.device),
        rank=engine.global_rank,
        speaks=is_speaker,
        ends_steps_itself=False,
        lookahead_events=1 if isinstance(engine, PipelineEngine) else 0,
    )
    module = engine.module
    offloader.name_layers(module)
    if is_speaker and engine.monitor.enabled:
        offloader.on_step(functools.partial(_write_events, engine.monitor, weakref.ref(engine)))
    offloader.cache.keep_resident((*module.parameters(), *module.buffers()))
    if isinstance(engine, PipelineEngine):
        _wrap_pipeline(engine, offloader)
    else:
        offloader.on_detach(ModuleHooks(module, offloader.hooks, offloader).remove)
        _end_steps_with(engine, "step", offloader)
    take_checkpointing(module, offloader)
    _detach_with(engine, offloader)
    setattr(engine, _ATTRIBUTE, offloader)
    offloader.on_detach(lambda: engine.__dict__.pop(_ATTRIBUTE, None))


def _write_events(monitor: Any, engine: weakref.ref[Any], stats: StepStats) -> None:
    """Write the numbers of a step where the user has DeepSpeed write its own, over the same samples."""
    alive = engine()
    if alive is not None:
        monitor.write_events([(name, value, alive.global_samples) for name, value in metrics_of(stats).items()])


def _end_steps_with(engine: Any, method: str, offloader: Offloader) -> None:
    inner = getattr(engine, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        before = engine.global_steps
        result = inner(*args, **kwargs)
        # Whoever decides where the accumulation ends, the engine counts it here.
        if engine.global_steps != before:
            offloader.end_step()
        return result

    shadow(engine, method, outer, offloader)


def _detach_with(engine: Any, offloader: Offloader) -> None:
    """Let ``engine.destroy`` give back threads, disk and memory too."""
    inner = engine.destroy

    def destroy() -> None:
        offloader.detach()
        inner()

    shadow(engine, "destroy", destroy, offloader)


# ---------------------------------------------------------------------- the pipeline


def _slot(kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Name a micro-batch in flight: ``buffer_id`` is a ring index, and DualPipeV adds a ``phase``."""
    return kwargs.get("phase"), kwargs.get("buffer_id")


class _KnownSchedule:
    """A pipe schedule whose instruction list was read before it runs."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule
        self.steps = [list(commands) for commands in schedule]

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)


def _wrap_pipeline(engine: Any, offloader: Offloader) -> None:
    passes = ScheduledPasses(offloader.hooks)
    make_schedule = engine._train_schedule

    def train_schedule() -> _KnownSchedule:
        known = _KnownSchedule(make_schedule())
        passes.start(map(_pass_of, filter(_is_pass, itertools.chain.from_iterable(known.steps))))
        return known

    instructions = dict(engine._INSTRUCTION_MAP)
    for kind in list(instructions):
        if issubclass(kind, ds_schedule.ForwardPass):
            instructions[kind] = _forward_instruction(instructions[kind], passes)
        elif issubclass(kind, ds_schedule.BackwardPass):
            instructions[kind] = _backward_instruction(instructions[kind], passes)
        elif offloader.hooks.trace is not None:
            instructions[kind] = _other_instruction(instructions[kind], kind.__name__, offloader.hooks.trace)
    shadow(engine, "_train_schedule", train_schedule, offloader)
    shadow(engine, "_INSTRUCTION_MAP", instructions, offloader)
    _end_steps_with(engine, "train_batch", offloader)


def _is_pass(instruction: Any) -> bool:
    return isinstance(instruction, ds_schedule.ForwardPass | ds_schedule.BackwardPass)


def _pass_of(instruction: Any) -> Pass:
    return Pass(_slot(instruction.kwargs), isinstance(instruction, ds_schedule.BackwardPass))


def _forward_instruction(inner: Instruction, passes: ScheduledPasses) -> Instruction:
    def forward_pass(engine: Any, **kwargs: Any) -> None:
        with passes.forward(_slot(kwargs)):
            inner(engine, **kwargs)

    return forward_pass


def _backward_instruction(inner: Instruction, passes: ScheduledPasses) -> Instruction:
    def backward_pass(engine: Any, **kwargs: Any) -> None:
        with passes.backward(_slot(kwargs)):
            inner(engine, **kwargs)

    return backward_pass


def _other_instruction(inner: Instruction, name: str, trace: Trace) -> Instruction:
    def instruction(engine: Any, **kwargs: Any) -> None:
        begin = trace.clock()
        inner(engine, **kwargs)
        trace.instruction(name, begin)

    return instruction
