"""What the kernel says about asynchronous I/O, read where it says it.

Note [The ring]. A context of io_submit(2) is memory that the kernel shares with the
process: a header, then a ring of records, one for each request that has ended, with the
bytes it moved or a negative error number. Fetching a record does not erase it; it stays
until the ring has come round. So the results can be read here although somebody else has
fetched them, and thrown them away. Header and records are an interface that libaio relies
on itself, with a magic number and a list of incompatible features in front.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

__all__ = ["Completion", "CompletionRing", "create_with_rings"]

_MAGIC = 0xA10A10A1
_RECORD_BYTES = 32
_NUM_ATTEMPTS = 10
_MAPS = "/proc/self/maps"

# The rings belong to the process, and so does the right to make some: of two threads that do
# so at once, each would find the rings of the other among its own.
_CREATION = threading.Lock()

Created = TypeVar("Created")


class Completion(NamedTuple):
    """One request that has ended.

    Attributes:
        request: Address of the request, which its owner keeps until the next one.
        result: Bytes moved, or a negative error number.
    """

    request: int
    result: int

    @property
    def file_offset(self) -> int:
        """Where in the file it began, as the request says; read it before the next request."""
        return int(ctypes.c_int64.from_address(self.request + 40).value)


class CompletionRing:
    """The ring of one context, which exists as long as this is used.

    Args:
        address: Of the header.

    Raises:
        OSError: There is no ring that this can read.

    Threads:
        That which waits for the requests.
    """

    def __init__(self, address: int) -> None:
        """Start after the records that are there."""
        self._address = address
        self._header = (ctypes.c_uint32 * 8).from_address(address)
        _, self._num_records, _, _, magic, _, incompatible, self._header_bytes = self._header
        if magic != _MAGIC or incompatible:
            raise OSError(errno.ENOTSUP, f"the ring of completions has an unknown form ({magic:#x}, {incompatible:#x})")
        self._next = self._tail

    @property
    def _tail(self) -> int:
        return int(self._header[3])

    def take(self) -> list[Completion]:
        """Read the records of the requests that have ended since the last call.

        There are fewer than the ring holds: it has room for more than all requests that
        may be under way.
        """
        taken, tail = [], self._tail
        while self._next != tail:
            at = self._address + self._header_bytes + self._next * _RECORD_BYTES
            _, request, result, _ = (ctypes.c_int64 * 4).from_address(at)
            taken.append(Completion(request, result))
            self._next = (self._next + 1) % self._num_records
        return taken


def create_with_rings(create: Callable[[], Created], num_rings: int) -> tuple[Created, list[CompletionRing]]:
    """Create something that makes contexts of its own, and find their rings.

    Calls wait for each other. A context that somebody else makes at the same moment would be
    taken for one of them; then there are too many, and all is done again.

    Args:
        create: Makes the thing; called again if need be, after the one before was dropped.
        num_rings: How many contexts it makes.

    Raises:
        OSError: The rings cannot be found or not be read.
    """
    found = 0
    for _ in range(_NUM_ATTEMPTS):
        with _CREATION:
            before = _ring_mappings()
            created = create()
            new = _ring_mappings() - before
        if len(new) == num_rings:
            return created, [CompletionRing(address) for address, _ in sorted(new)]
        found = len(new)
        del created
    raise OSError(errno.ENOTSUP, f"{found} rings of completions in {_MAPS} (expected {num_rings})")


def _ring_mappings() -> set[tuple[int, int]]:
    """Return address and inode of every ring of this process; the inode tells two at one address apart."""
    with open(_MAPS, encoding="ascii", errors="replace") as maps:
        lines = [line.split() for line in maps]
    return {(int(fields[0].partition("-")[0], 16), int(fields[4])) for fields in lines if fields[5:6] == ["/[aio]"]}
