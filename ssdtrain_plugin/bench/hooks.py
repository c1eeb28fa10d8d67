"""``ssdtrain bench hooks``: what the hooks cost, without any I/O.

A chain of tiny operators that save one tensor each is run forward and backward.
All variants take turns in one run, and medians are compared, because machines are
shared and noisy.

A kept tensor costs the bookkeeping alone. An offloaded one also costs the hand-over
to a worker thread and back, which on CPU competes with the chain for Python's lock;
it is offloaded only from ``min_tensor_bytes`` on, where moving it takes far longer.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.hooks import SavedTensorHooks
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.policy.fixed import FractionPolicy
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.transfer import TransferQueue

__all__ = ["IDENTITY", "HookCost", "Variant", "measure", "open_variants"]

IDENTITY = "identity hooks"
"""The variant that the others are compared with."""


@dataclass(frozen=True, slots=True)
class HookCost:
    """One variant.

    Attributes:
        name: What was done with each saved tensor.
        median_microseconds: Of forward plus backward, per saved tensor.
        over_identity_microseconds: The same, less the variant :data:`IDENTITY`.
        rounds: How many times it was measured.
    """

    name: str
    median_microseconds: float
    over_identity_microseconds: float
    rounds: int


class _NoBytesTier(Tier):
    """Takes every store and moves nothing; the chain itself keeps the tensors alive."""

    name = "ssd"

    def __init__(self) -> None:
        self._offsets = itertools.count(step=4096)

    def allocate(self, nbytes: int) -> Extent:
        return Extent(next(self._offsets), nbytes, nbytes)

    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        return None

    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        return ready

    def free(self, extent: Extent) -> None:
        return None

    @property
    def used_bytes(self) -> int:
        return 0

    @property
    def free_bytes(self) -> int:
        return 1 << 60

    def describe(self) -> str:
        return "nothing is moved"

    def close(self) -> None:
        return None


def measure(*, num_tensors: int = 1000, rounds: int = 21, on_round: Callable[[], None] | None = None) -> list[HookCost]:
    """Measure every variant.

    Args:
        num_tensors: Saved tensors per pass.
        rounds: Passes of each variant, interleaved.
        on_round: Called after each round, for a progress display.

    Returns:
        One entry a variant; the first is the run without hooks.
    """
    with open_variants() as variants:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in range(rounds + 1):
            for name, variant in variants.items():
                elapsed = variant.run(num_tensors)
                if round_number:  # the first round warms caches and starts threads
                    seconds[name].append(elapsed)
            for variant in variants.values():
                variant.end_step()
            if on_round is not None:
                on_round()
    medians = {name: 1e6 * statistics.median(times) / num_tensors for name, times in seconds.items()}
    return [HookCost(name, median, median - medians[IDENTITY], rounds) for name, median in medians.items()]


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing to do with saved tensors.

    Attributes:
        context: Makes what a forward runs in.
        cache: Whose step is to be ended, or None.
    """

    context: Callable[[], contextlib.AbstractContextManager[object]]
    cache: TensorCache | None = None

    def run(self, num_tensors: int) -> float:
        """Time one forward and backward of a chain.

        Args:
            num_tensors: That it saves; all are live at its turn.

        Returns:
            Seconds.
        """
        return _run(self.context, num_tensors)

    def end_step(self) -> None:
        """Close the books of the plugin, if it has any."""
        if self.cache is not None:
            self.cache.end_step()


@contextlib.contextmanager
def open_variants() -> Iterator[dict[str, Variant]]:
    """Make all variants ready; the first is the run without hooks, the second hooks that do nothing."""
    with contextlib.ExitStack() as stack:
        small = stack.enter_context(_cache(1.0, min_tensor_bytes=1 << 20))
        kept = stack.enter_context(_cache(0.0, min_tensor_bytes=1))
        moved = stack.enter_context(_cache(1.0, min_tensor_bytes=1))
        yield {
            "no hooks": Variant(contextlib.nullcontext),
            IDENTITY: Variant(lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)),
            "kept: smaller than min_tensor_bytes": _of_cache(small),
            "kept: by the policy": _of_cache(kept),
            "offloaded: to a tier that moves nothing": _of_cache(moved),
        }


def _of_cache(cache: TensorCache) -> Variant:
    return Variant(SavedTensorHooks(cache, checkpointing="offload").forward, cache)


@contextlib.contextmanager
def _cache(fraction: float, *, min_tensor_bytes: int) -> Iterator[TensorCache]:
    queue = TransferQueue(io_threads=1, max_inflight_bytes=1 << 40)
    cache = TensorCache(
        placer=Placer(FractionPolicy(fraction), {Placement.SSD: _NoBytesTier()}, min_tensor_bytes, 0),
        queue=queue,
        streams=CpuStreams(),
        device=torch.device("cpu"),
        allocate_target=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        prefetch_bytes=1 << 40,
        rank=0,
    )
    try:
        yield cache
    finally:
        queue.close()


def _run(context: Callable[[], contextlib.AbstractContextManager[object]], num_tensors: int) -> float:
    """Time one forward and backward of a chain that saves ``num_tensors`` tensors."""
    leaf = torch.ones(16, requires_grad=True)
    chain = [leaf]
    started = time.perf_counter()
    with context():
        for _ in range(num_tensors):
            chain.append(chain[-1].sin())
    loss = chain[-1].sum()
    loss.backward()
    seconds = time.perf_counter() - started
    # Now the list frees the chain, newest first. From its end alone torch would free it by recursion, since
    # Python has seen `grad_fn` of each tensor, and some ten thousand nodes overflow the stack.
    del loss
    return seconds
