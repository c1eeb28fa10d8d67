"""What a tier is, a place that holds bytes, and what an engine is, a way of moving them to a file.

Neither knows of tensors' meaning or of time.

The sequence for one piece of data is ``allocate``, ``write``, any number of
``read``, ``free``. The transfer queue calls ``write`` and ``read`` from its
worker threads and guarantees that a read starts after the write it needs has
ended and that an extent is freed only when nothing uses it. The tier owes: all
bytes moved or an exception, never a count to check.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ssdtrain_plugin.errors import StorageError
from ssdtrain_plugin.streams import DeviceEvent

__all__ = ["Engine", "Extent", "Rates", "Tier"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A reserved range of a tier.

    Attributes:
        offset: First byte, a multiple of the tier's alignment.
        nbytes: Bytes that the owner asked for.
        reserved_bytes: Bytes taken from the tier, ``nbytes`` rounded up to the alignment.
        drive: Which drive of the tier it is on. Each drive has transfer threads of its
            own, so that a slow one does not hold up the others.
        pieces: The ranges (offset, bytes) that it lies on, in order, if they are more
            than one; together ``reserved_bytes``.
    """

    offset: int
    nbytes: int
    reserved_bytes: int
    drive: int = 0
    pieces: tuple[tuple[int, int], ...] = ()

    def ranges(self, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Cut a part of the extent into ranges that are contiguous on the tier.

        Args:
            start: First byte of the part, counted from the beginning of the extent.
            nbytes: Its length; the end is at most ``reserved_bytes``.

        Returns:
            Pairs of offset and bytes, in order.
        """
        for offset, size in self.pieces or ((self.offset, self.reserved_bytes),):
            if nbytes > 0 and start < size:
                count = min(size - start, nbytes)
                yield offset + start, count
                start, nbytes = 0, nbytes - count
            else:
                start -= min(start, size)


class Rates(NamedTuple):
    """Bytes for each second in which at least one transfer was under way; None where nothing was moved.

    Attributes:
        write_bytes_per_second: Of stores.
        read_bytes_per_second: Of loads.
    """

    write_bytes_per_second: float | None
    read_bytes_per_second: float | None


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
            source: (extent.nbytes,), uint8, contiguous, on the training device. A drive
                takes host memory as well, whatever the training device.
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
            target: (extent.nbytes,), uint8, contiguous, on the training device; or host
                memory, as for :meth:`write`.
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

    def memory_of(self, extent: Extent) -> Tensor | None:
        """Get the host memory that an extent lies in, so that another tier may copy from or to it.

        Args:
            extent: Live; not freed while the memory is used.

        Returns:
            (extent.nbytes,), uint8, CPU, contiguous; or None if it lies elsewhere or the
            tier is closed.

        Threads:
            Any.
        """
        return None

    def path_of(self, extent: Extent) -> str | None:
        """Name the directory that has an extent, for messages; None if it is in memory.

        Args:
            extent: Live.
        """
        return None

    def hangs(self, extent: Extent) -> bool:
        """Note that a transfer of an extent does not return.

        Args:
            extent: Live, and so until the transfer returns.

        Returns:
            Whether the whole tier should get no store until then; else it sees to that itself.

        Threads:
            Any.
        """
        return True

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes reserved now."""

    @property
    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that :meth:`allocate` may still give, as far as the budget says."""

    def take_survived(self) -> list[StorageError]:
        """Take the failures, since the last call, that the tier has made good by itself, or that cost nothing.

        A tier of several drives stores elsewhere what one of them refused, and space that a
        drive does not take back is used on; whoever keeps count of failures asks here.
        Called after each store.
        """
        return []

    def take_rates(self) -> Rates:
        """Tell how fast the tier was, while it worked, since the last call."""
        return Rates(None, None)

    def trim(self) -> None:
        """Give back to the system what has not been needed since the last call.

        Called now and then between steps: sequence lengths fall, evaluation ends. Never
        raises: what the system does not take is kept, see :meth:`take_survived`.
        """
        return None

    @property
    def is_at_write_limit(self) -> bool:
        """Whether as much was written as may be today: no store should be tried before tomorrow."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """Say in one line where the bytes go and how, for the start-up log."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back to the system. Calling it twice does nothing."""


class Engine(ABC):
    """A way of moving bytes between memory and one open file: system calls, a library.

    It knows no extents, budgets or meanings. It reports how many bytes it has moved, and
    the drive's tier compares. What it cannot move where it lies is staged by the tier in
    memory that the engine gives.

    Attributes:
        name: As in the option ``io_engine``.
    """

    name: str

    @abstractmethod
    def in_place_bytes(self, tensor: Tensor) -> int:
        """Count the bytes, from the first, that can be moved without staging.

        Args:
            tensor: (n,), uint8, contiguous, on the training device.

        Returns:
            0 to n; or more, if the memory after the end is nobody's and the whole is
            moved in one piece.
        """

    @abstractmethod
    def staging(self, nbytes: int) -> Tensor:
        """Lend host memory that can be moved whole; it comes back when the tensor dies.

        Args:
            nbytes: At least 1.

        Returns:
            (m,), uint8, CPU, contiguous; m is ``nbytes`` rounded up to what a transfer
            must be a multiple of.

        Raises:
            CapacityError: There is none.
        """

    @abstractmethod
    def write(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Write to the file.

        Args:
            memory: Begins with the bytes; from :meth:`staging`, or accepted by :meth:`in_place_bytes`.
            nbytes: How many.
            offset: Where in the file.

        Returns:
            Bytes written, as far as can be told; less than ``nbytes`` is a failure.

        Raises:
            OSError: The system or the library refused.

        Threads:
            Workers; several at once.
        """

    @abstractmethod
    def read(self, memory: Tensor, nbytes: int, offset: int) -> int:
        """Read from the file; as :meth:`write`."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words how bytes are moved, for example ``posix, O_DIRECT``."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the library holds; the file stays open. No transfer is under way."""
