"""What each extent was given, as a hash: so that bytes that come back wrong are noticed.

Drives, file systems and libraries report success for bytes that are not there: a bit
turned over, a block that was never written, a write that was lost. XXH3 (64 bits) finds
all of these and is about as fast as memory. It is no defence against a person.
"""

from __future__ import annotations

import xxhash
from torch import Tensor

from ssdtrain_plugin.errors import StateError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.memory import memory_at
from ssdtrain_plugin.units import MIB

__all__ = ["Checksums", "Digest"]

_PART_BYTES = 8 * MIB  # the interpreter's lock may be held for one update


class Digest:
    """The hash of the bytes of one transfer, given in order, in parts of any size.

    Threads:
        One.
    """

    __slots__ = ("_state",)

    def __init__(self) -> None:
        """Start with no bytes."""
        self._state = xxhash.xxh3_64()

    def update(self, memory: Tensor) -> None:
        """Add bytes.

        Args:
            memory: (n,), uint8, CPU, contiguous.
        """
        address, nbytes = memory.data_ptr(), memory.numel()
        for start in range(0, nbytes, _PART_BYTES):
            self._state.update(memory_at(address + start, min(_PART_BYTES, nbytes - start)))

    @property
    def value(self) -> int:
        """The hash of the bytes so far, 0 to 2**64 - 1."""
        return self._state.intdigest()


class Checksums:
    """The hashes of the extents of one drive.

    Threads:
        Any; each extent has one writer, and readers come after it. Every method is one
        operation on a dictionary, which the interpreter does in one go.
    """

    def __init__(self) -> None:
        """Know no extent."""
        self._values: dict[int, int] = {}

    def remember(self, extent: Extent, value: int) -> None:
        """Note what was stored.

        Args:
            extent: All of it was written.
            value: Of its bytes.
        """
        self._values[extent.offset] = value

    def expected(self, extent: Extent) -> int:
        """Get what was stored.

        Args:
            extent: Live.

        Raises:
            StateError: Nothing was.
        """
        value = self._values.get(extent.offset)
        if value is None:
            raise StateError(f"cannot check {extent.nbytes} bytes at {extent.offset}: they were never stored")
        return value

    def forget(self, extent: Extent) -> None:
        """Forget what was stored.

        Args:
            extent: Freed, or about to be.
        """
        self._values.pop(extent.offset, None)
