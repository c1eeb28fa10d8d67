"""The one place where objects are wired together, and what a user holds of them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.deadlines import ending
from ssdtrain_plugin.errors import StateError
from ssdtrain_plugin.hooks import ModuleHooks, SavedTensorHooks
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.adaptive import AdaptivePolicy
from ssdtrain_plugin.policy.base import OffloadPolicy, Placement
from ssdtrain_plugin.policy.fixed import FractionPolicy
from ssdtrain_plugin.preflight import find_local_rank, find_rank, prepare
from ssdtrain_plugin.stats import WARM_UP_STEPS, StatsWriter, StepStats
from ssdtrain_plugin.storage.base import Engine, Tier
from ssdtrain_plugin.storage.engines import choose_engine, meter_of, open_drive
from ssdtrain_plugin.storage.host import HostTier
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.retries import Retries
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.streams import Streams, create_streams
from ssdtrain_plugin.summary import RunTotals, after_warm_up, step_line
from ssdtrain_plugin.trace import Trace, open_records
from ssdtrain_plugin.tracing import TracedCache, TracedQueue
from ssdtrain_plugin.transfer import TransferQueue

__all__ = ["Offloader", "Parts", "attach", "attach_with", "build", "make_audible"]

logger = logging.getLogger(__name__)
_steps_logger = logging.getLogger("ssdtrain_plugin.steps")  # by itself, so that it can be switched on by itself

# Space on the drive and host memory that so many steps did not need goes back.
_TRIM_STEPS = 32


@dataclass(frozen=True, slots=True)
class Parts:
    """What an experiment puts in place of the usual parts.

    Attributes:
        wrap_drive: Puts something around the drive's tier, such as a bound on its speed.
        policy: Decides, whatever the option says.
        wrap_engine: Puts something around the engine of each drive, such as
            :meth:`ssdtrain_plugin.storage.faulty.FaultPlan.wrap`.
        retries: How patient drives are with calls that fail.
        clock: Seconds, never going back: by it transfers are given up.
        wall_clock: Seconds since 1970: by it the day of ``daily_write_limit`` ends.
    """

    wrap_drive: Callable[[Tier], Tier] = lambda tier: tier
    policy: OffloadPolicy | None = None
    wrap_engine: Callable[[Engine], Engine] | None = None
    retries: Retries | None = None
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time


class Offloader:
    """What is attached to a model: owns the cache, the threads, the tiers and the statistics.

    Usable as a context manager; leaving it detaches.

    Args:
        cache: Under autograd through ``hooks``.
        hooks: Entered around each forward.
        queue: Closed on detach.
        tiers: Closed on detach, after the queue.
        arenas: Host memory, closed last.
        writer: Gets every step, or None.
        rank: Global rank of the process.
        speaks: Whether to say what a user should read once; else it goes to the log at DEBUG.
    """

    def __init__(
        self,
        *,
        cache: TensorCache,
        hooks: SavedTensorHooks,
        queue: TransferQueue,
        tiers: Mapping[Placement, Tier],
        arenas: tuple[HostArena, ...],
        writer: StatsWriter | None,
        rank: int,
        speaks: bool,
    ) -> None:
        """Take ownership of the parts."""
        self.cache = cache
        self.hooks = hooks
        self._tiers = dict(tiers)
        self._arenas = arenas
        self._writer = writer
        self._rank = rank
        self._speaks = speaks
        self._undo: list[Callable[[], None]] = []
        self._totals = RunTotals(rank)
        self._on_step: list[Callable[[StepStats], None]] = []
        # Also runs at interpreter exit, so that no worker is inside a system call then.
        self._finalizer = weakref.finalize(self, _close, os.getpid(), queue, tuple(tiers.values()), arenas, writer)

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Register how to take something off the host again.

        Args:
            undo: Called once by :meth:`detach`, last registered first.
        """
        self._undo.append(undo)

    def on_step(self, tell: Callable[[StepStats], None]) -> None:
        """Register who wants to know the numbers of every step.

        Args:
            tell: Called at the end of each step, in the thread that trains.
        """
        self._on_step.append(tell)

    def name_layers(self, model: nn.Module, prefix: str = "") -> None:
        """Tell the trace, if steps are recorded, the names of the layers.

        Args:
            model: Its modules are held weakly.
            prefix: In front of each name.
        """
        if self.hooks.trace is not None:
            self.hooks.trace.name_modules(model, prefix)

    def end_step(self) -> StepStats:
        """Close the account of the present step.

        Optional without a host framework: else a step ends when nothing saved is
        alive and a forward begins.

        Returns:
            The numbers of the step.
        """
        stats = self.cache.end_step()
        self._totals.add(stats)
        if self._writer is not None:
            self._writer.write(stats)
        if self._speaks and _steps_logger.isEnabledFor(logging.DEBUG):
            _steps_logger.debug("rank %d: %s", self._rank, step_line(stats))
        for tell in self._on_step:
            tell(stats)
        remark = self.cache.take_remark()
        if remark is not None:
            logger.log(logging.WARNING if self._speaks else logging.DEBUG, "rank %d: %s", self._rank, remark)
        if self._totals.num_steps % _TRIM_STEPS == 0:
            for tier in self._tiers.values():
                tier.trim()
            for arena in self._arenas:
                arena.trim()
        if self._totals.num_steps == WARM_UP_STEPS:
            line, has_moved = after_warm_up(stats)
            level = logging.WARNING if self._tiers and not has_moved else logging.INFO
            logger.log(level if self._speaks else logging.DEBUG, "%s", line)
        return stats

    def report(self) -> str:
        """Say what moved, what it saved and what it cost, over all steps so far.

        A step whose graphs are all gone is ended first, so that the last one counts.
        """
        if self.cache.num_microbatches and self.cache.is_idle():
            self.end_step()
        return self._totals.report([tier.describe() for tier in self._tiers.values()])

    def detach(self) -> None:
        """Take every hook off, stop the threads, give disk and memory back.

        A graph that was built before can still run backward only as far as its
        tensors are in memory. Calling this twice does nothing.
        """
        while self._undo:
            self._undo.pop()()
        self._finalizer()

    def __enter__(self) -> Offloader:
        """Return the offloader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach, whatever happened inside."""
        self.detach()


def _close(
    owner_pid: int,
    queue: TransferQueue,
    tiers: tuple[Tier, ...],
    arenas: tuple[HostArena, ...],
    writer: StatsWriter | None,
) -> None:
    if os.getpid() != owner_pid:
        return  # a fork has none of the threads, and its copies of locks may be held for ever
    with ending():
        queue.close()
        for tier in tiers:
            tier.close()
    for arena in arenas:
        arena.close()
    if writer is not None:
        writer.close()


def build(
    config: OffloadConfig,
    *,
    device: torch.device,
    rank: int,
    speaks: bool = True,
    ends_steps_itself: bool = True,
    lookahead_events: int = 0,
    parts: Parts | None = None,
) -> Offloader:
    """Wire everything for one device of one rank.

    Args:
        config: Checked by :func:`ssdtrain_plugin.preflight.check`.
        device: Where the activations are.
        rank: Global rank of the process.
        speaks: Whether to log at INFO what a user should read once; ranks that have
            the same to say as another one do not speak.
        ends_steps_itself: End a step when nothing saved is alive and a forward
            begins. Hosts that know when a step ends pass False.
        lookahead_events: How many forward or backward passes ahead the host announces a backward.
        parts: Of an experiment, in place of what the options say.

    Raises:
        EnvironmentUnsupportedError: The engine named does not work here.
        StorageError: A directory has gone, or a file of statistics cannot be opened or is none of ours.
    """
    parts = parts or Parts()
    streams = create_streams(device)
    arena = HostArena(streams)
    num_traced = config.trace_steps if config.enabled else 0
    # What may be refused comes before what takes space.
    with open_records(config.stats_path, rank, num_steps=num_traced, device=str(device)) as (writer, trace):
        tiers, engine_line = _build_tiers(config, streams, arena, device, parts)
    if Placement.SSD in tiers:
        tiers[Placement.SSD] = parts.wrap_drive(tiers[Placement.SSD])
    policy = parts.policy or _create_policy(config, tiers, lookahead_events)
    queue = _create_queue(config, parts.clock, trace)
    create_cache: Callable[..., TensorCache] = TensorCache if trace is None else partial(TracedCache, trace)
    cache = create_cache(
        placer=Placer(policy, tiers, config.min_tensor_bytes, rank),
        queue=queue,
        streams=streams,
        device=device,
        allocate_target=_target_allocator(device, arena),
        prefetch_bytes=config.prefetch_bytes,
        rank=rank,
    )
    hooks = SavedTensorHooks(cache, checkpointing=config.checkpointing)
    hooks.trace = trace
    offloader = Offloader(
        cache=cache,
        hooks=hooks,
        queue=queue,
        tiers=tiers,
        arenas=(arena,),
        writer=writer,
        rank=rank,
        speaks=speaks,
    )
    if ends_steps_itself:
        hooks.end_step = weakref.WeakMethod(offloader.end_step)
    where = "; ".join(tier.describe() for tier in tiers.values()) or "nowhere, only counting"
    if config.enabled:
        line = f"ssdtrain: rank {rank}: {policy.explain()}, to {where}{engine_line}"
        logger.log(logging.INFO if speaks else logging.DEBUG, "%s", line)
    return offloader


def _build_tiers(
    config: OffloadConfig, streams: Streams, arena: HostArena, device: torch.device, parts: Parts
) -> tuple[dict[Placement, Tier], str]:
    """Open what the options name; return it with a few words on the engine."""
    tiers: dict[Placement, Tier] = {}
    if not config.enabled or config.policy == "none":
        return tiers, ""
    line = ""
    if config.paths:
        engine, reason = choose_engine(config.io_engine, device)
        line = f"; io_engine {config.io_engine}: {engine}, {reason}"
        with contextlib.ExitStack() as opened:
            drives: list[Tier] = []
            open_one = partial(
                open_drive,
                engine=engine,
                streams=streams,
                arena=arena,
                disk_bytes=None if config.disk_bytes is None else config.disk_bytes // len(config.paths),
                has_checksums=config.verify == "checksum",
                wrap_engine=parts.wrap_engine,
                retries=parts.retries,
            )
            for path in config.paths:
                drive = open_one(path)
                drives.append(drive)
                opened.callback(drive.close)
                drive.give_up_after(config.io_timeout_seconds)
                drive.meter_writes(
                    meter_of(path, config.daily_write_limit, config.rated_write_bytes, clock=parts.wall_clock)
                )
                if config.zero_on_free:
                    drive.zero_what_is_freed()
            opened.pop_all()
        tiers[Placement.SSD] = drives[0] if len(drives) == 1 else StripedTier(drives)
    if config.host_bytes:
        tiers[Placement.HOST] = HostTier(config.host_bytes, streams=streams)
    return tiers, line


def _create_queue(config: OffloadConfig, clock: Callable[[], float], trace: Trace | None) -> TransferQueue:
    create: Callable[..., TransferQueue] = TransferQueue if trace is None else partial(TracedQueue, trace)
    return create(
        io_threads=config.io_threads,
        max_inflight_bytes=config.max_inflight_bytes,
        timeout_seconds=config.io_timeout_seconds,
        clock=clock,
    )


def make_audible(formatter: logging.Formatter | None = None) -> None:
    """Let our INFO lines be seen, unless the user has configured logging.

    The lines that say what was done are the answer to "did it do anything?", and a
    logger that nobody configured prints no INFO.

    Args:
        formatter: Of the host, so that the lines look like its own.
    """
    ours = logging.getLogger("ssdtrain_plugin")
    if ours.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    # Whoever configures logging later gets the lines through the root logger, and only there.
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    ours.addHandler(handler)
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)


def _create_policy(config: OffloadConfig, tiers: Mapping[Placement, Tier], lookahead_events: int) -> OffloadPolicy:
    if config.policy == "adaptive" and tiers:
        return AdaptivePolicy(
            max_inflight_bytes=config.max_inflight_bytes,
            prefetch_bytes=config.prefetch_bytes,
            host_bytes=config.host_bytes,
            has_drive=Placement.SSD in tiers,
            lookahead_events=lookahead_events,
        )
    shares = {"all": 1.0, "none": 0.0, "adaptive": 0.0}
    return FractionPolicy(shares.get(config.policy, config.offload_fraction))


def _target_allocator(device: torch.device, arena: HostArena) -> Callable[[int], Tensor]:
    if device.type == "cpu":
        # Recycled huge pages: a fresh buffer per load costs a storm of page faults.
        return arena.tensor

    def allocate(nbytes: int) -> Tensor:
        # On the compute stream of the caller, see Note [Ordering on the device].
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    return allocate


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def attach(model: nn.Module, config: OffloadConfig | Mapping[str, Any]) -> Offloader:
    """Offload what the model's forward saves for backward.

    What is computed outside of ``model.forward``, a loss for example, is not seen;
    wrap it into the module, or accept that it stays in memory.

    Args:
        model: On the device where it trains. Not changed; :meth:`Offloader.detach` undoes all.
        config: The options; a mapping is read as :meth:`OffloadConfig.from_dict` does.

    Returns:
        The offloader, also usable as a context manager.

    Raises:
        ConfigError: An option is wrong or a path cannot be used; all are listed.
        StateError: The model is attached already, or is no module.
    """
    return attach_with(model, config, None)


def attach_with(model: nn.Module, config: OffloadConfig | Mapping[str, Any], parts: Parts | None) -> Offloader:
    """Attach as :func:`attach` does, with parts of an experiment.

    Args:
        model: As for :func:`attach`.
        config: As for :func:`attach`.
        parts: In place of the usual ones.
    """
    if not isinstance(model, nn.Module):
        raise StateError(
            f"cannot attach: the model (a {type(model).__name__}, expected a torch.nn.Module)",
            hint="pass the module first and the options second",
        )
    if ModuleHooks.are_on(model):
        raise StateError(
            f"cannot attach: this {type(model).__name__} is attached already (expected one offloader a model)",
            hint="call `detach()` of the first offloader",
        )
    if not isinstance(config, OffloadConfig):
        config = OffloadConfig.from_dict(config)
    make_audible()
    config = prepare(config, local_rank=find_local_rank())
    offloader = build(config, device=_device_of(model), rank=find_rank(), parts=parts)
    if config.enabled:
        offloader.cache.keep_resident((*model.parameters(), *model.buffers()))
        offloader.name_layers(model)
        offloader.on_detach(ModuleHooks(model, offloader.hooks, offloader).remove)
    return offloader
