"""The one place where objects are wired together, and what a user holds of them."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.config import OffloadConfig, expand_path
from ssdtrain_plugin.errors import ConfigError, StateError
from ssdtrain_plugin.hooks import ModuleHooks, SavedTensorHooks
from ssdtrain_plugin.policy.base import OffloadPolicy, Placement
from ssdtrain_plugin.policy.fixed import FractionPolicy
from ssdtrain_plugin.stats import StatsWriter, StepStats
from ssdtrain_plugin.storage.base import Tier
from ssdtrain_plugin.storage.engines import choose_engine
from ssdtrain_plugin.storage.host import HostTier
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.posix import PosixTier
from ssdtrain_plugin.storage.probe import directory_problem
from ssdtrain_plugin.streams import create_streams
from ssdtrain_plugin.summary import RunTotals, after_warm_up
from ssdtrain_plugin.transfer import TransferQueue

__all__ = ["Offloader", "attach", "build", "check", "make_audible", "prepare"]

logger = logging.getLogger(__name__)

# The first step pays for the extent file and the staging memory; the second shows
# what the run will be like.
_WARM_UP_STEPS = 2


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
        self._writer = writer
        self._rank = rank
        self._speaks = speaks
        self._undo: list[Callable[[], None]] = []
        self._totals = RunTotals(rank)
        # Also runs at interpreter exit, so that no worker is inside a system call then.
        self._finalizer = weakref.finalize(self, _close, os.getpid(), queue, tuple(tiers.values()), arenas, writer)

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Register how to take something off the host again.

        Args:
            undo: Called once by :meth:`detach`, last registered first.
        """
        self._undo.append(undo)

    def end_step(self) -> StepStats:
        """Close the account of the present step.

        Optional without a host framework: else a step ends when nothing saved is
        alive and a forward begins.

        Returns:
            The numbers of the step.
        """
        stats = self.cache.end_step(self._rank)
        self._totals.add(stats)
        if self._writer is not None:
            self._writer.write(stats)
        if self._totals.num_steps == _WARM_UP_STEPS:
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
    queue.close()
    for tier in tiers:
        tier.close()
    for arena in arenas:
        arena.close()
    if writer is not None:
        writer.close()


def check(options: Mapping[str, Any], *, source: str, local_rank: int) -> OffloadConfig:
    """Read the options and ask the file system about the paths, before anything is built.

    Args:
        options: As in the option table.
        source: Where they came from, for the message.
        local_rank: Rank of this process on its node, for ``{local_rank}``.

    Returns:
        The options with every placeholder replaced.

    Raises:
        ConfigError: Lists every fault of the options and of the paths at once.
    """
    problems: list[str] = []
    config: OffloadConfig | None = None
    try:
        config = OffloadConfig.from_dict(options)
    except ConfigError as error:
        problems.extend(error.problems)
    paths, stats_path = options.get("paths", ()), options.get("stats_path")
    if isinstance(paths, str | os.PathLike):
        paths = (paths,)
    expanded: list[str] = []
    is_used = config is None or (config.enabled and config.policy != "none")
    for path in paths if isinstance(paths, list | tuple) else ():
        if isinstance(path, str | os.PathLike):
            expanded.append(expand_path(str(path), local_rank=local_rank))
            fault = directory_problem(expanded[-1]) if is_used else None
            if fault is not None:
                problems.append(f"paths: {fault}")
    if isinstance(stats_path, str):
        fault = _stats_problem(Path(expand_path(stats_path, local_rank=local_rank)))
        if fault is not None:
            problems.append(f"stats_path: {fault}")
    if problems or config is None:
        raise ConfigError(source, problems, hint="correct the lines above; `ssdtrain doctor PATH` tests a directory")
    if config.stats_path is not None:
        stats_path = expand_path(config.stats_path, local_rank=local_rank)
    return config.model_copy(update={"paths": tuple(expanded), "stats_path": stats_path})


def _stats_problem(directory: Path) -> str | None:
    """Say why no file can be written in a directory that may not exist yet."""
    try:
        parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    except OSError as error:
        return f"`{directory}`: {error.strerror} (expected a writable directory)"
    if not parent.is_dir():
        return f"`{directory}`: `{parent}` is a file (expected a directory)"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"`{directory}`: `{parent}` cannot be written to (expected a writable directory)"
    return None


def prepare(config: OffloadConfig, *, local_rank: int) -> OffloadConfig:
    """Check the paths of options that are already read; see :func:`check`.

    Args:
        config: Any.
        local_rank: Rank of this process on its node.

    Raises:
        ConfigError: Lists every path that cannot be used.
    """
    return check(config.model_dump(exclude_unset=True), source=OffloadConfig.SOURCE, local_rank=local_rank)


def build(
    config: OffloadConfig,
    *,
    device: torch.device,
    rank: int,
    speaks: bool = True,
    ends_steps_itself: bool = True,
) -> Offloader:
    """Wire everything for one device of one rank.

    Args:
        config: Checked by :func:`check`.
        device: Where the activations are.
        rank: Global rank of the process.
        speaks: Whether to log at INFO what a user should read once; ranks that have
            the same to say as another one do not speak.
        ends_steps_itself: End a step when nothing saved is alive and a forward
            begins. Hosts that know when a step ends pass False.
    """
    streams = create_streams(device)
    arena = HostArena(streams)
    tiers: dict[Placement, Tier] = {}
    moves = config.enabled and config.policy != "none"
    if config.host_bytes and moves:
        tiers[Placement.HOST] = HostTier(config.host_bytes, streams=streams)
    if config.paths and moves:
        tiers[Placement.SSD] = PosixTier(
            config.paths[0], streams=streams, arena=arena, disk_bytes=config.disk_bytes, device=device
        )
    policy = _create_policy(config)
    queue = TransferQueue(io_threads=config.io_threads, max_inflight_bytes=config.max_inflight_bytes)
    cache = TensorCache(
        policy=policy,
        queue=queue,
        streams=streams,
        device=device,
        tiers=tiers,
        allocate_target=_target_allocator(device, arena),
        min_tensor_bytes=config.min_tensor_bytes,
        prefetch_bytes=config.prefetch_bytes,
    )
    writer = None if config.stats_path is None else StatsWriter(config.stats_path, rank)
    hooks = SavedTensorHooks(cache, checkpointing=config.checkpointing)
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
        line = f"ssdtrain: rank {rank}: {policy.explain()}, to {where}{_engine_line(config, tiers)}"
        logger.log(logging.INFO if speaks else logging.DEBUG, "%s", line)
    return offloader


def _engine_line(config: OffloadConfig, tiers: Mapping[Placement, Tier]) -> str:
    tier = tiers.get(Placement.SSD)
    if not isinstance(tier, PosixTier):
        return ""
    engine, reason = choose_engine(config.io_engine, tier.report)
    return f"; io_engine {config.io_engine}: {engine}, {reason}"


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


def _create_policy(config: OffloadConfig) -> OffloadPolicy:
    shares = {"all": 1.0, "none": 0.0}
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
        StateError: The model is attached already.
    """
    if ModuleHooks.are_on(model):
        raise StateError(
            f"cannot attach: this {type(model).__name__} is attached already (expected one offloader a model)",
            hint="call `detach()` of the first offloader",
        )
    if not isinstance(config, OffloadConfig):
        config = OffloadConfig.from_dict(config)
    make_audible()
    local_rank, rank = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("RANK", "0"))
    config = prepare(config, local_rank=local_rank)
    offloader = build(config, device=_device_of(model), rank=rank)
    if config.enabled:
        offloader.cache.keep_resident((*model.parameters(), *model.buffers()))
        offloader.on_detach(ModuleHooks(model, offloader.hooks, offloader).remove)
    return offloader
