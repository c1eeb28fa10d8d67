"""Extents never overlap, are aligned, and coalesce back to an empty range."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.errors import StateError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.extents import ExtentAllocator, round_down, round_up
from ssdtrain_plugin.units import GIB, MIB


@pytest.mark.parametrize(("nbytes", "down", "up"), [(0, 0, 0), (1, 0, 4096), (4096, 4096, 4096), (4097, 4096, 8192)])
def test_rounding(nbytes, down, up):
    assert (round_down(nbytes, 4096), round_up(nbytes, 4096)) == (down, up)


def test_an_extent_is_aligned_and_reserves_whole_units():
    allocator = ExtentAllocator(4096)
    first, second = allocator.allocate(1, 1 << 20), allocator.allocate(4097, 1 << 20)
    assert first == Extent(offset=0, nbytes=1, reserved_bytes=4096)
    assert second == Extent(offset=4096, nbytes=4097, reserved_bytes=8192)
    assert allocator.used_bytes == allocator.high_water_bytes == 12288


def test_the_best_fit_is_taken_and_the_lowest_among_equals():
    allocator = ExtentAllocator(1)
    extents = [allocator.allocate(nbytes, 1000) for nbytes in (50, 1, 20, 1, 20, 1, 30, 1)]
    for index in (0, 2, 4, 6):
        allocator.free(extents[index])
    assert allocator.allocate(20, 1000).offset == extents[2].offset  # exact, lower of two
    assert allocator.allocate(19, 1000).offset == extents[4].offset  # 20 wastes less than 30 and 50
    assert allocator.allocate(31, 1000).offset == extents[0].offset


def test_a_hole_beyond_the_limit_is_not_used():
    allocator = ExtentAllocator(1)
    low, wall, high, _ = (allocator.allocate(nbytes, 100) for nbytes in (30, 10, 20, 10))
    allocator.free(low)
    allocator.free(high)
    assert allocator.allocate(20, 45).offset == 0  # the better fit at 40 ends beyond 45
    assert allocator.allocate(20, 45) is None
    assert wall in allocator


def test_what_does_not_fit_changes_nothing():
    allocator = ExtentAllocator(4096)
    extent = allocator.allocate(4096, 8192)
    assert allocator.allocate(4097, 8192) is None
    assert (allocator.used_bytes, allocator.high_water_bytes, len(allocator)) == (4096, 4096, 1)
    allocator.free(extent)
    assert allocator.allocate(8192, 8192).offset == 0


def test_the_high_water_mark_falls_when_the_last_extents_go():
    allocator = ExtentAllocator(1)
    first, second, third = (allocator.allocate(10, 100) for _ in range(3))
    allocator.free(second)
    assert allocator.high_water_bytes == 30
    allocator.free(third)
    assert allocator.high_water_bytes == 10
    allocator.free(first)
    assert allocator.high_water_bytes == 0


@pytest.mark.parametrize("strange", [Extent(0, 10, 10), Extent(10, 9, 10), Extent(5, 10, 10)])
def test_freeing_what_is_not_allocated_is_refused(strange):
    allocator = ExtentAllocator(1)
    gone, kept = allocator.allocate(10, 100), allocator.allocate(10, 100)
    allocator.free(gone)
    with pytest.raises(StateError, match="not allocated"):
        allocator.free(strange)
    assert allocator.used_bytes == 10
    assert kept in allocator


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_extent_holds_at_least_one_byte(nbytes):
    with pytest.raises(ValueError, match="at least 1"):
        ExtentAllocator(1).allocate(nbytes, 100)


def test_an_alignment_is_positive():
    with pytest.raises(ValueError, match="alignment"):
        ExtentAllocator(0)


def test_an_extent_in_one_piece_has_one_range():
    assert list(Extent(4096, 5000, 8192).ranges(0, 8192)) == [(4096, 8192)]
    assert list(Extent(4096, 5000, 8192).ranges(100, 50)) == [(4196, 50)]


@pytest.mark.parametrize(
    ("start", "nbytes", "ranges"),
    [
        (0, 60, [(100, 10), (200, 20), (300, 30)]),
        (0, 10, [(100, 10)]),
        (5, 10, [(105, 5), (200, 5)]),
        (10, 20, [(200, 20)]),
        (29, 2, [(219, 1), (300, 1)]),
        (30, 30, [(300, 30)]),
    ],
)
def test_a_part_of_an_extent_in_pieces(start, nbytes, ranges):
    extent = Extent(100, 60, 60, pieces=((100, 10), (200, 20), (300, 30)))
    assert list(extent.ranges(start, nbytes)) == ranges


def holes_of(sizes, **options):
    """An allocator with holes of these sizes, one unit apart, and the live extents between them."""
    allocator = ExtentAllocator(1, **options)
    extents = [(allocator.allocate(nbytes, 10_000), allocator.allocate(1, 10_000)) for nbytes in sizes]
    for extent, _ in extents:
        allocator.free(extent)
    return allocator


def test_an_extent_that_no_hole_takes_is_laid_on_the_largest():
    allocator = holes_of((50, 20, 30, 5), min_piece_bytes=10)
    end = allocator.high_water_bytes
    extent = allocator.allocate(75, 10_000)
    assert extent.pieces == ((0, 50), (72, 25))
    assert (extent.offset, allocator.high_water_bytes) == (0, end), "the range has not grown"
    assert allocator.allocate(20, 10_000).offset == 51
    allocator.free(extent)
    assert allocator.allocate(50, 10_000).pieces == ()


@pytest.mark.parametrize(
    ("sizes", "nbytes"),
    [
        ((50, 20, 5), 73),  # 70 bytes on pieces that are large enough
        ((50, 20, 5), 76),  # more than all holes
        ((10,) * 40, 170),  # 17 pieces
    ],
)
def test_pieces_are_neither_small_nor_many(sizes, nbytes):
    allocator = holes_of(sizes, min_piece_bytes=10)
    end = allocator.high_water_bytes
    extent = allocator.allocate(nbytes, 10_000)
    assert (extent.offset, extent.pieces) == (end, ())


@pytest.mark.parametrize("number", [100_000, pytest.param(1_000_000, marks=pytest.mark.exhaustive)])
def test_random_allocations_waste_less_than_a_twentieth(number):
    """Saves of six sequence lengths and three widths come and go at random."""
    sizes = [sequence * 1024 * width for sequence in (512, 1024, 1536, 2048, 3072, 4096) for width in (2, 6, 8)]
    generator = random.Random(0)
    allocator = ExtentAllocator(4096, min_piece_bytes=MIB)
    live, peak_bytes = [], 0
    for _ in range(number):
        while allocator.used_bytes > 4 * GIB:
            index = generator.randrange(len(live))
            live[index], live[-1] = live[-1], live[index]
            allocator.free(live.pop())
        live.append(allocator.allocate(generator.choice(sizes), 1 << 60))
        peak_bytes = max(peak_bytes, allocator.used_bytes)
    assert allocator.high_water_bytes < 1.05 * peak_bytes


_STEPS = st.lists(st.one_of(st.integers(1, 5000), st.integers(-40, -1)), max_size=120)


@settings(deadline=None)
@given(
    steps=_STEPS,
    alignment=st.sampled_from([1, 3, 512, 4096]),
    limit=st.integers(0, 60_000),
    min_piece=st.sampled_from([None, 1, 500, 4096]),
)
def test_invariants_hold_after_every_step(steps, alignment, limit, min_piece):
    """A positive step allocates that many bytes, a negative one frees the n-th live extent."""
    allocator = ExtentAllocator(alignment, min_piece_bytes=min_piece)
    twin = ExtentAllocator(alignment, min_piece_bytes=min_piece)
    live = []
    for step in steps:
        if step > 0:
            extent = allocator.allocate(step, limit)
            assert extent == twin.allocate(step, limit), "the same calls give the same offsets"
            if extent is not None:
                live.append(extent)
            else:
                assert not _has_room(live, round_up(step, alignment), limit), "refused although it fits"
        elif live:
            extent = live.pop(-step % len(live))
            allocator.free(extent)
            twin.free(extent)
        for extent in live:
            assert extent.offset % alignment == 0
            assert extent.reserved_bytes == round_up(extent.nbytes, alignment)
            assert sum(nbytes for _, nbytes in _ranges(extent)) == extent.reserved_bytes
        ranges = sorted(piece for extent in live for piece in _ranges(extent))
        for left, right in itertools.pairwise(ranges):
            assert left[0] + left[1] <= right[0]
        end = sum(ranges[-1]) if ranges else 0
        assert allocator.high_water_bytes == end <= limit
        assert allocator.used_bytes == sum(extent.reserved_bytes for extent in live)
    for extent in live:
        allocator.free(extent)
    assert (allocator.used_bytes, allocator.high_water_bytes, len(allocator)) == (0, 0, 0)
    whole = allocator.allocate(1_000_000, 2_000_000)
    assert whole.offset == 0, "everything coalesced"


def _ranges(extent):
    return list(extent.ranges(0, extent.reserved_bytes))


def _has_room(live, reserved_bytes, limit):
    """Tell whether one piece would fit."""
    cursor = 0
    for offset, nbytes in sorted(piece for extent in live for piece in _ranges(extent)):
        if offset - cursor >= reserved_bytes:
            return True
        cursor = offset + nbytes
    return limit - cursor >= reserved_bytes
