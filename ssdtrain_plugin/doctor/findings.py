"""What a finding is, and how the small files of the kernel are read for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["PROC_ROOT", "SYS_ROOT", "Finding", "chosen_word", "first_line", "unknown"]

PROC_ROOT = Path("/proc")
SYS_ROOT = Path("/sys")


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the report.

    Attributes:
        name: What it is about, a few words.
        fact: What was found, or ``unknown:`` and the reason.
        advice: What to do about it, or None if nothing is to be done.
    """

    name: str
    fact: str
    advice: str | None = None


def unknown(name: str, reason: str) -> Finding:
    """Say that something could not be found out.

    Args:
        name: What it is about.
        reason: Why not.
    """
    return Finding(name, f"unknown: {reason}")


def first_line(path: Path) -> str | None:
    """Read a file of one line, as the kernel has thousands of.

    Args:
        path: Below ``/proc`` or ``/sys``.

    Returns:
        The line without white space around it; None if there is no such file, or it
        cannot be read (a container may hide it).
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return None


def chosen_word(text: str | None) -> str | None:
    """Return the word in brackets of a list of choices, such as ``always [madvise] never``.

    Args:
        text: From :func:`first_line`.

    Returns:
        The chosen word; the whole text if nothing is in brackets; None if there is no text.
    """
    if not text:
        return None
    return text.partition("[")[2].partition("]")[0] or text
