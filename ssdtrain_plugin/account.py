"""The account of activation bytes: what is live in device memory, and what would have been."""

from __future__ import annotations

from collections import OrderedDict

from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["ActivationAccount"]

_CHECKS_PER_CALL = 8


class ActivationAccount:
    """Counts bytes of saved storages, each once, and remembers the highest counts.

    Bytes that were let go still count while something else holds the storage:
    the operator that is running, or the user. So the account never claims memory
    that has not really been freed.

    Threads:
        Not safe; its owner locks.

    Attributes:
        live_bytes: Saved bytes in device memory now.
        would_be_bytes: What would be live now without the plugin.
        peak_live_bytes: Highest ``live_bytes`` since :meth:`start_step`.
        peak_would_be_bytes: Highest ``would_be_bytes`` since :meth:`start_step`.
    """

    __slots__ = (
        "_lingering",
        "live_bytes",
        "peak_live_bytes",
        "peak_would_be_bytes",
        "would_be_bytes",
    )

    def __init__(self) -> None:
        """Start at zero."""
        self.live_bytes = 0
        self.would_be_bytes = 0
        self.peak_live_bytes = 0
        self.peak_would_be_bytes = 0
        # By address, which is the storage's own as long as the weak reference is here.
        self._lingering: OrderedDict[int, tuple[StorageWeakRef, int]] = OrderedDict()

    def admit(self, would_be_bytes: int, held_bytes: int, address: int) -> None:
        """Count a storage that autograd saved.

        Args:
            would_be_bytes: What it would pin without the plugin.
            held_bytes: What it pins now.
            address: Of the storage. If it lingers, saved before and still held by
                the user, it is not counted twice.
        """
        if held_bytes and address in self._lingering:
            self.live_bytes -= self._lingering.pop(address)[1]
        self.would_be_bytes += would_be_bytes
        self.peak_would_be_bytes = max(self.peak_would_be_bytes, self.would_be_bytes)
        self.hold(held_bytes)

    def dismiss(self, would_be_bytes: int) -> None:
        """Take off a storage that the graph has let go.

        Args:
            would_be_bytes: As given to :meth:`admit`.
        """
        self.would_be_bytes -= would_be_bytes

    def hold(self, nbytes: int) -> None:
        """Count bytes that are in device memory from now on.

        Args:
            nbytes: How many.
        """
        self.live_bytes += nbytes
        self.peak_live_bytes = max(self.peak_live_bytes, self.live_bytes)

    def drop(self, nbytes: int) -> None:
        """Take off bytes that no graph holds any more.

        Args:
            nbytes: As given to :meth:`hold`.
        """
        self.live_bytes -= nbytes

    def release(self, reference: StorageWeakRef, nbytes: int) -> None:
        """Let go of bytes that the graph still needs; take them off once they are really gone.

        Args:
            reference: Of their storage.
            nbytes: As given to :meth:`hold`.
        """
        if reference.expired():
            self.live_bytes -= nbytes
            return
        _, more_bytes = self._lingering.pop(reference.cdata, (None, 0))
        self._lingering[reference.cdata] = reference, nbytes + more_bytes

    def settle(self, *, is_thorough: bool = False) -> None:
        """Take off what has gone since it was released.

        Args:
            is_thorough: Look at all of it, not only at the next few.
        """
        lingering = self._lingering
        if not lingering:
            return
        for _ in range(len(lingering) if is_thorough else min(len(lingering), _CHECKS_PER_CALL)):
            address, (reference, nbytes) = lingering.popitem(last=False)
            if reference.expired():
                self.live_bytes -= nbytes
            else:
                lingering[address] = reference, nbytes

    def forgive(self) -> None:
        """Take off all that lingers: no graph needs it, so it is not an activation any more."""
        while self._lingering:
            self.live_bytes -= self._lingering.popitem()[1][1]

    def start_step(self) -> None:
        """Forget the highest counts."""
        self.peak_live_bytes = self.live_bytes
        self.peak_would_be_bytes = self.would_be_bytes
