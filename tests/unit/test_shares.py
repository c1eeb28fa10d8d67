"""Shares of several drives: both phases together as short as they can be."""

import pytest

from ssdtrain_plugin.storage.shares import owed_rates


def shares(writes, reads):
    rates = owed_rates(writes, reads)
    assert sum(rates) == pytest.approx(sum(reads))
    return [rate / sum(rates) for rate in rates]


def seconds(parts, writes, reads):
    return sum(max(part / rate for part, rate in zip(parts, rates, strict=True)) for rates in (writes, reads))


def test_equal_drives_have_equal_shares():
    assert shares([2.0, 2.0], [1.0, 1.0]) == pytest.approx([0.5, 0.5])


def test_drives_that_differ_alike_in_both_directions_share_by_speed():
    assert shares([3.0, 1.0], [1.5, 0.5]) == pytest.approx([0.75, 0.25])


def test_a_drive_that_writes_much_slower_does_not_hold_up_storing():
    """Shares by what both directions cost each drive gave it an eighth, and storing took twice as long as needed."""
    writes, reads = [6.5, 0.5], [2.9, 0.5]
    parts = shares(writes, reads)
    assert parts[1] == pytest.approx(0.5 / 7.0)
    assert seconds(parts, writes, reads) < seconds([0.875, 0.125], writes, reads)
    assert seconds(parts, writes, reads) <= seconds([2.9 / 3.4, 0.5 / 3.4], writes, reads)


def test_a_drive_that_reads_much_slower_does_not_hold_up_loading():
    writes, reads = [2.0, 2.0], [2.0, 0.2]
    assert shares(writes, reads)[1] < 0.25
