"""Where in an address range the next extent goes. No I/O and no memory: only integers.

The same allocator places extents in the file of a drive and blocks in a slab of
host memory. It does not know how long the range really is: the caller says how
far it may reach, and grows the file or maps another slab when the answer is None.
"""

from __future__ import annotations

from sortedcontainers import SortedList

from ssdtrain_plugin.errors import StateError
from ssdtrain_plugin.storage.base import Extent

__all__ = ["ExtentAllocator", "round_down", "round_up"]

_MAX_PIECES = 16


def round_up(nbytes: int, alignment: int) -> int:
    """Return the smallest multiple of ``alignment`` that is at least ``nbytes``.

    Args:
        nbytes: Bytes, not negative.
        alignment: Bytes, positive.
    """
    return -(-nbytes // alignment) * alignment


def round_down(nbytes: int, alignment: int) -> int:
    """Return the largest multiple of ``alignment`` that is at most ``nbytes``.

    Args:
        nbytes: Bytes, not negative.
        alignment: Bytes, positive.
    """
    return nbytes - nbytes % alignment


class ExtentAllocator:
    """Best fit with coalescing over one address range that starts at 0.

    Training repeats the same sizes in the same order, so the holes of one step
    fit the extents of the next and the range stops growing after the first. Among
    holes of one size the lowest is taken, which keeps the range short. The same
    calls give the same offsets on every run.

    Note [Extents in pieces]. Sizes that do not repeat, such as those of mixed sequence
    lengths, leave holes that none of the next fits: a tenth to a quarter of the range,
    measured. Where pieces are allowed, an extent that no single hole can take is laid
    on several of the largest before the range grows.

    Every operation is O(log n) in the number of holes, and linear in the pieces, which
    are at most 16.

    Args:
        alignment: Offsets and reserved sizes are multiples of it (bytes).
        min_piece_bytes: Smallest piece of an extent laid on several holes; None: each
            extent is one piece.

    Raises:
        ValueError: ``alignment`` is not positive.

    Threads:
        One at a time; the owner locks.
    """

    def __init__(self, alignment: int, *, min_piece_bytes: int | None = None) -> None:
        """Start with an empty range."""
        if alignment < 1:
            raise ValueError(f"alignment: {alignment} (expected at least 1 byte)")
        self._alignment = alignment
        self._min_piece_bytes = min_piece_bytes
        self._live: dict[int, Extent] = {}
        # Holes lie below the high-water mark, are never empty and never touch.
        self._holes: SortedList[tuple[int, int]] = SortedList()  # (nbytes, offset): best fit, lowest first
        self._hole_at: dict[int, int] = {}  # offset -> end
        self._hole_to: dict[int, int] = {}  # end -> offset
        self._high_water_bytes = 0
        self._used_bytes = 0

    @property
    def alignment(self) -> int:
        """Offsets and reserved sizes are multiples of this many bytes."""
        return self._alignment

    @property
    def used_bytes(self) -> int:
        """Bytes reserved by live extents."""
        return self._used_bytes

    @property
    def high_water_bytes(self) -> int:
        """End of the range in use now: no live extent lies beyond it."""
        return self._high_water_bytes

    def live(self) -> list[Extent]:
        """List the extents that are not freed."""
        return list(self._live.values())

    def __contains__(self, extent: Extent) -> bool:
        """Tell whether ``extent`` was allocated here and not freed since."""
        return self._live.get(extent.offset) == extent

    def __len__(self) -> int:
        """Count the live extents."""
        return len(self._live)

    def allocate(self, nbytes: int, limit_bytes: int) -> Extent | None:
        """Reserve room for ``nbytes`` below ``limit_bytes``.

        Args:
            nbytes: Bytes needed, at least 1.
            limit_bytes: No extent may end beyond it.

        Returns:
            The extent, or None if it does not fit; then nothing has changed.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes: {nbytes} (expected at least 1)")
        reserved_bytes = round_up(nbytes, self._alignment)
        pieces: tuple[tuple[int, int], ...] = ()
        offset = self._take_hole(reserved_bytes, limit_bytes)
        if offset is None:
            pieces = self._take_pieces(reserved_bytes)
            if pieces:
                offset = pieces[0][0]
            elif self._high_water_bytes + reserved_bytes > limit_bytes:
                return None
            else:
                offset = self._high_water_bytes
                self._high_water_bytes += reserved_bytes
        extent = Extent(offset=offset, nbytes=nbytes, reserved_bytes=reserved_bytes, pieces=pieces)
        self._live[offset] = extent
        self._used_bytes += reserved_bytes
        return extent

    def free(self, extent: Extent) -> None:
        """Give an extent back and merge it with the holes beside it.

        Args:
            extent: From :meth:`allocate`, freed once.

        Raises:
            StateError: It was freed before, or is not from here.
        """
        if extent not in self:
            raise StateError(
                f"cannot free extent: {extent.reserved_bytes} bytes at {extent.offset} "
                "(not allocated, expected a live extent)"
            )
        del self._live[extent.offset]
        self._used_bytes -= extent.reserved_bytes
        for offset, size in extent.pieces or ((extent.offset, extent.reserved_bytes),):
            self._give_back(offset, offset + size)

    def _give_back(self, begin: int, end: int) -> None:
        if begin in self._hole_to:
            begin = self._remove_hole(self._hole_to[begin])[0]
        if end in self._hole_at:
            end = self._remove_hole(end)[1]
        if end == self._high_water_bytes:
            self._high_water_bytes = begin
        else:
            self._add_hole(begin, end)

    def _take_hole(self, reserved_bytes: int, limit_bytes: int) -> int | None:
        # Only the first candidate is looked at unless the limit has shrunk since.
        for _, begin in self._holes.islice(self._holes.bisect_left((reserved_bytes, 0))):
            if begin + reserved_bytes > limit_bytes:
                continue
            begin, end = self._remove_hole(begin)
            if begin + reserved_bytes < end:
                self._add_hole(begin + reserved_bytes, end)
            return begin
        return None

    def _take_pieces(self, reserved_bytes: int) -> tuple[tuple[int, int], ...]:
        """Take the largest holes; nothing if too many would be needed."""
        if self._min_piece_bytes is None or self._high_water_bytes - self._used_bytes < reserved_bytes:
            return ()
        chosen: list[tuple[int, int]] = []
        left_bytes = reserved_bytes
        for size, begin in self._holes.islice(max(0, len(self._holes) - _MAX_PIECES), reverse=True):
            if size < self._min_piece_bytes:
                return ()
            chosen.append((begin, min(size, left_bytes)))
            left_bytes -= chosen[-1][1]
            if left_bytes == 0:
                break
        if left_bytes:
            return ()
        for begin, size in chosen:
            _, end = self._remove_hole(begin)
            if begin + size < end:
                self._add_hole(begin + size, end)
        return tuple(sorted(chosen))

    def _add_hole(self, begin: int, end: int) -> None:
        self._holes.add((end - begin, begin))
        self._hole_at[begin] = end
        self._hole_to[end] = begin

    def _remove_hole(self, begin: int) -> tuple[int, int]:
        end = self._hole_at.pop(begin)
        del self._hole_to[end]
        self._holes.remove((end - begin, begin))
        return begin, end
