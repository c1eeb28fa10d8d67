"""Puts the question to the policy: what is known of a storage, and which tiers can take it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace

import torch

from ssdtrain_plugin.failures import FailureLog
from ssdtrain_plugin.policy.base import OffloadPolicy, PackRequest, Placement
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.transfer import Transfer

__all__ = ["Placer"]

# The size of a micro-batch is taken to be the largest of the last ones, so that one
# short sequence does not make the next long one stay in memory.
_RECENT_MICROBATCHES = 16

# torch aligns its own allocations to this. Foreign memory (numpy, files) may not
# be, and a kernel's last bit may depend on it: such storages are kept.
_TORCH_ALIGNMENT_BYTES = 64


class Placer:
    """Chooses a tier for each new storage.

    Args:
        policy: Decides.
        tiers: At most one per placement.
        min_tensor_bytes: Smaller ones are kept without asking.
        rank: Global rank of the process, for the log.

    Threads:
        Not safe; its owner locks.

    Attributes:
        policy: As given.
        tiers: As given.
        failures: Of the tiers.
    """

    def __init__(
        self, policy: OffloadPolicy, tiers: Mapping[Placement, Tier], min_tensor_bytes: int, rank: int
    ) -> None:
        """Start before the first micro-batch."""
        self.policy = policy
        self.failures = FailureLog((tier.name for tier in tiers.values()), rank)
        self._passed_over: set[str] = set()
        self.tiers = dict(tiers)
        self._min_tensor_bytes = min_tensor_bytes
        self._seen_bytes = 0
        self._slot = -1
        self._is_first = True
        self._recent_bytes: deque[int] = deque(maxlen=_RECENT_MICROBATCHES)

    def begin_forward(self) -> None:
        """Start to count the bytes of a micro-batch."""
        self._seen_bytes = 0
        self._slot += 1
        self._is_first = True

    def end_step(self, counts: Counter[str]) -> None:
        """Number the micro-batches from 0 again; count which tiers were passed over.

        Args:
            counts: Failures of this step by cause; one is added for each tier and cause.
        """
        self._slot = -1
        counts.update(self._passed_over)
        self._passed_over.clear()

    def end_forward(self) -> None:
        """Remember the size of the micro-batch for the next ones."""
        self._recent_bytes.append(self._seen_bytes)

    def is_movable(self, storage: torch.UntypedStorage, nbytes: int) -> bool:
        """Tell whether the policy is asked about a storage; otherwise it is kept.

        Args:
            storage: On the training device.
            nbytes: Of its span that is saved.
        """
        return nbytes >= self._min_tensor_bytes and storage.data_ptr() % _TORCH_ALIGNMENT_BYTES == 0

    def choose(self, nbytes: int, step: int, *, is_movable: bool, inflight_bytes: int) -> Tier | None:
        """Choose where a new storage goes.

        Args:
            nbytes: Of its span that is saved.
            step: Number of the present step.
            is_movable: From :meth:`is_movable`.
            inflight_bytes: Of stores that are queued or running.

        Returns:
            The tier that the policy wants, even if it is full; or None to keep it in device memory.
        """
        seen_bytes = self._seen_bytes
        self._seen_bytes += nbytes
        if not is_movable:
            return None
        is_first, self._is_first = self._is_first, False
        host, ssd = self.usable(Placement.HOST, step), self.usable(Placement.SSD, step)
        request = PackRequest(
            nbytes=nbytes,
            seen_bytes=seen_bytes,
            microbatch_bytes=max(self._recent_bytes, default=None),
            host_free_bytes=0 if host is None else host.free_bytes,
            has_ssd=ssd is not None,
            slot=self._slot,
            is_first=is_first,
            inflight_bytes=inflight_bytes,
        )
        placement = self.policy.decide(request)
        if placement is Placement.SSD and host is not None and nbytes > request.host_free_bytes:
            # Does it want the drive, or has it no other choice? Then room is worth making, see `Migrator`.
            with_room = replace(request, host_free_bytes=nbytes, is_first=False)
            placement = Placement.HOST if self.policy.decide(with_room) is Placement.HOST else placement
        return None if placement is Placement.KEEP else self.tiers[placement]

    def candidates(self, chosen: Tier | None, step: int) -> list[Tier]:
        """List the tiers to try for one storage: the chosen one, then whatever else works.

        Args:
            chosen: From :meth:`choose`.
            step: Number of the present step.
        """
        others = [self.usable(placement, step) for placement in self.tiers]
        tiers = [chosen, *(tier for tier in others if tier is not chosen)]
        return [tier for tier in tiers if tier is not None]

    def hangs(self, tier: Tier, extent: Extent | None, transfer: Transfer) -> None:
        """Note a store that was given up: its tier is left alone until it returns.

        Args:
            tier: Of the extent.
            extent: Where the store goes; None if it hangs before it has a place.
            transfer: The store.
        """
        if extent is None or tier.hangs(extent):
            self.failures.leave_alone(tier.name, lambda: transfer.has_returned)

    def pins_more_than_it_saves(self, nbytes: int, storage_bytes: int) -> bool:
        """Tell whether keeping a small view would keep a large storage in memory.

        Args:
            nbytes: Of the span of the view.
            storage_bytes: Of the whole storage.
        """
        return nbytes < min(storage_bytes, self._min_tensor_bytes) and storage_bytes >= self._min_tensor_bytes

    def usable(self, placement: Placement, step: int) -> Tier | None:
        """Get a tier if there is one and a store to it may be tried.

        Args:
            placement: Which one.
            step: Number of the present step.
        """
        tier = self.tiers.get(placement)
        if tier is None:
            return None
        obstacle = "daily_write_limit" if tier.is_at_write_limit else self.failures.obstacle(tier.name, step)
        if obstacle is None:
            return tier
        self._passed_over.add(f"{tier.name}: {obstacle}")
        return None
