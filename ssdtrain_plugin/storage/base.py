"""What a tier is: a place that holds bytes. It knows nothing of tensors' meaning or of time.

The sequence for one piece of data is ``allocate``, ``write``, any number of
``read``, ``free``. The transfer queue calls ``write`` and ``read`` from its
worker threads and guarantees that a read starts after the write it needs has
ended and that an extent is freed only when nothing uses it. The tier owes: all
bytes moved or an exception, never a count to check.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ssdtrain_plugin.streams import DeviceEvent

__all__ = ["Extent", "Tier"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A reserved range of a tier.

    Attributes:
        offset: First byte, a multiple of the tier's alignment.
        nbytes: Bytes that the owner asked for.
        reserved_bytes: Bytes taken from the tier, ``nbytes`` rounded up to the alignment.
    """

    offset: int
    nbytes: int
    reserved_bytes: int


class Tier(ABC):
    """A blocking, thread-safe byte store with room for a bounded number of bytes.

    Attributes:
        name: ``ssd`` or ``host``; used in reports and warnings.
    """

    name: str

    @abstractmethod
    def allocate(self, nbytes: int) -> Extent:
        """Reserve room.

        Args:
            nbytes: Bytes needed, at least 1.

        Returns:
            An extent that belongs to the caller until it is freed.

        Raises:
            CapacityError: There is no room, by budget or because the drive is full
                (then with ``errno``). Nothing was reserved.

        Threads:
            Any.
        """

    @abstractmethod
    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        """Copy all of ``source`` to ``extent``; return when the bytes are there.

        Args:
            extent: Where to; ``extent.nbytes == source.numel()``.
            source: (extent.nbytes,), uint8, contiguous, on the training device.
            ready: Reached when ``source`` holds its values.

        Raises:
            StoreError: Not every byte was written.

        Threads:
            Workers; several at once, on different extents.
        """

    @abstractmethod
    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        """Copy all of ``extent`` to ``target``.

        Args:
            extent: Where from; written before.
            target: (extent.nbytes,), uint8, contiguous, on the training device.
            ready: Reached when ``target`` may be written.

        Returns:
            An event that the compute stream must wait for before it reads ``target``.

        Raises:
            LoadError: Not every byte was read.

        Threads:
            Workers; several at once.
        """

    @abstractmethod
    def free(self, extent: Extent) -> None:
        """Give an extent back. No transfer uses it any more.

        Args:
            extent: From :meth:`allocate`, freed once.
        """

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes reserved now."""

    @property
    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that :meth:`allocate` may still give, as far as the budget says."""

    @abstractmethod
    def describe(self) -> str:
        """Say in one line where the bytes go and how, for the start-up log."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back to the system. Calling it twice does nothing."""
