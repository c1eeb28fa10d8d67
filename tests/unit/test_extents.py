"""Extents never overlap, are aligned, and coalesce back to an empty range."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.errors import StateError
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.extents import ExtentAllocator, round_down, round_up


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


_STEPS = st.lists(st.one_of(st.integers(1, 5000), st.integers(-40, -1)), max_size=120)


@settings(deadline=None)
@given(steps=_STEPS, alignment=st.sampled_from([1, 3, 512, 4096]), limit=st.integers(0, 60_000))
def test_invariants_hold_after_every_step(steps, alignment, limit):
    """A positive step allocates that many bytes, a negative one frees the n-th live extent."""
    allocator, twin = ExtentAllocator(alignment), ExtentAllocator(alignment)
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
        ordered = sorted(live, key=lambda extent: extent.offset)
        for extent in ordered:
            assert extent.offset % alignment == 0
            assert extent.reserved_bytes == round_up(extent.nbytes, alignment)
        for left, right in itertools.pairwise(ordered):
            assert left.offset + left.reserved_bytes <= right.offset
        end = ordered[-1].offset + ordered[-1].reserved_bytes if ordered else 0
        assert allocator.high_water_bytes == end <= limit
        assert allocator.used_bytes == sum(extent.reserved_bytes for extent in live)
    for extent in live:
        allocator.free(extent)
    assert (allocator.used_bytes, allocator.high_water_bytes, len(allocator)) == (0, 0, 0)
    whole = allocator.allocate(1_000_000, 2_000_000)
    assert whole.offset == 0, "everything coalesced"


def _has_room(live, reserved_bytes, limit):
    cursor = 0
    for extent in sorted(live, key=lambda extent: extent.offset):
        if extent.offset - cursor >= reserved_bytes:
            return True
        cursor = extent.offset + extent.reserved_bytes
    return limit - cursor >= reserved_bytes
