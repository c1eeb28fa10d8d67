"""Sizes, rates and durations to and from text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssdtrain_plugin.units import GIB, KIB, MIB, TIB, format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", KIB),
        ("1KiB", KIB),
        ("1kB", 1000),
        ("512 MiB", 512 * MIB),
        ("1MB", 10**6),
        ("2 GiB", 2 * GIB),
        ("2g", 2 * GIB),
        ("2GB", 2 * 10**9),
        ("1.5G", 3 * GIB // 2),
        ("0.5 KiB", 512),
        ("3 TiB", 3 * TIB),
        ("3TB", 3 * 10**12),
        ("  7 MiB  ", 7 * MIB),
        ("0.3B", 0),
    ],
)
def test_a_size_is_read(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", " ", "GiB", "-1", "-1 GiB", "1e9", "1,5G", "2 GiBs", "1 2", "0x10", "nan", "1.", "2 PiB"]
)
def test_what_is_no_size_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "2 GiB" in str(caught.value)


@given(st.integers(min_value=0, max_value=2**62))
def test_whole_numbers_are_read_exactly(nbytes):
    assert parse_bytes(str(nbytes)) == nbytes
    assert parse_bytes(f"{nbytes}KiB") == nbytes * KIB


@given(st.integers(min_value=0, max_value=2**53))
def test_what_is_written_reads_back_within_the_digits_shown(nbytes):
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.05)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (MIB, "1.0 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (2 * TIB, "2.0 TiB"),
        (-MIB, "-1.0 MiB"),
        (-5, "-5 B"),
        (2.5 * MIB, "2.5 MiB"),
    ],
)
def test_sizes_are_written_in_binary_units(nbytes, text):
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0 B/s"), (999.0, "999 B/s"), (1.5e3, "1.50 kB/s"), (2.0e6, "2.00 MB/s"), (8.04e9, "8.04 GB/s")],
)
def test_rates_are_written_in_decimal_units(rate, text):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 us"),
        (2.5e-6, "2.5 us"),
        (0.0125, "12.5 ms"),
        (1.0, "1.00 s"),
        (119.0, "119.00 s"),
        (185.0, "3 min 5 s"),
    ],
)
def test_durations_are_written_in_a_unit_that_suits_them(seconds, text):
    assert format_seconds(seconds) == text


def test_no_duration_shows_sixty_seconds():
    assert format_seconds(179.7) == "3 min 0 s"
