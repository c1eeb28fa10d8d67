"""Bytes, rates and durations to and from text: the only arithmetic of units.

Memory and file sizes are written in binary units (KiB, MiB, GiB), device
bandwidth in decimal ones (GB/s), as drive makers and ``fio`` do.
"""

from __future__ import annotations

import re

__all__ = [
    "GIB",
    "KIB",
    "LARGEST_BYTES",
    "MIB",
    "TIB",
    "as_bytes",
    "format_bytes",
    "format_rate",
    "format_seconds",
    "parse_bytes",
]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

LARGEST_BYTES = 2**63 - 1
"""No file and no memory is larger: what the system counts offsets in ends here."""

_FACTORS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 1000,
    "m": MIB,
    "mib": MIB,
    "mb": 1000**2,
    "g": GIB,
    "gib": GIB,
    "gb": 1000**3,
    "t": TIB,
    "tib": TIB,
    "tb": 1000**4,
}
_MOST_DIGITS = 40
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Read a size such as ``"2 GiB"``, ``"512MiB"``, ``"1.5G"`` or ``"4096"``.

    Args:
        text: A number and an optional unit. ``K``, ``M``, ``G`` and ``T`` alone
            are binary; ``kB``, ``MB``, ``GB`` and ``TB`` are decimal.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ValueError: The text is not a size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    # Python refuses numbers of thousands of digits, and a float of hundreds of them is infinite.
    if match is None or factor is None or len(match.group(1)) > _MOST_DIGITS:
        raise ValueError(f"{text!r} is not a size (expected for example '2 GiB')")
    return int(float(match.group(1)) * factor) if "." in match.group(1) else int(match.group(1)) * factor


def as_bytes(value: object) -> object:
    """Read a size that is text; leave everything else to whoever checks it.

    Args:
        value: As a file or a user gave it.

    Raises:
        ValueError: It is text and not a size.
    """
    return parse_bytes(value) if isinstance(value, str) else value


def format_bytes(nbytes: int | float) -> str:
    """Write bytes in the largest binary unit that keeps the number above one.

    Args:
        nbytes: Bytes, negative for a difference.
    """
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(nbytes) >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{int(nbytes)} B"


def format_rate(bytes_per_second: float) -> str:
    """Write a bandwidth in decimal units, as drive makers do.

    Args:
        bytes_per_second: Bytes a second.
    """
    for unit, factor in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_second >= factor:
            return f"{bytes_per_second / factor:.2f} {unit}"
    return f"{bytes_per_second:.0f} B/s"


def format_seconds(seconds: float) -> str:
    """Write a duration with a unit that suits its size.

    Args:
        seconds: Seconds.
    """
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} us"
