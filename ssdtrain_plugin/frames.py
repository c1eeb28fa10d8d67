"""Errors that are kept must not keep what was in hand when they were raised."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["without_frames"]

AnyError = TypeVar("AnyError", bound=BaseException)


def without_frames(error: AnyError) -> AnyError:
    """Take the frames off an error and its causes: they hold tensors, and whoever keeps the error in a cycle.

    Args:
        error: Changed, and returned.
    """
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
