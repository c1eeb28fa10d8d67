"""The exception tree. Every message names the thing, its numbers and one way out.

::

    OffloadError(RuntimeError)
      ConfigError(OffloadError, ValueError)   the user's settings; lists every fault at once
      EnvironmentUnsupportedError             the machine cannot do what was asked
      StorageError                            errno, path, offset, nbytes as attributes
        StoreError                            training goes on, the tensor stays in memory
        LoadError                             training stops where the tensor was needed
        CapacityError                         no room left; the tensor stays in memory
      SavedTensorMutatedError                 changed in place between pack and unpack
      StateError                              a defect of this package: an illegal transition
      QueueClosedError                        work was submitted after close
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CapacityError",
    "ConfigError",
    "EnvironmentUnsupportedError",
    "LoadError",
    "OffloadError",
    "QueueClosedError",
    "SavedTensorMutatedError",
    "StateError",
    "StorageError",
    "StoreError",
]  # every one is a public name of the package

_LONGEST_LINE = 400
_LONGEST_MESSAGE = 4000
_MOST_PROBLEMS = 20


def printable(text: str, *, longest: int = _LONGEST_LINE) -> str:
    """Put text of unknown origin on one line of bounded length.

    Control characters of a path or a value must not move the cursor of a terminal or begin a line of a log.

    Args:
        text: Any.
        longest: Characters; of a longer text the middle is left out.

    Returns:
        The text, with everything that is not printable written as an escape sequence.
    """
    if len(text) > longest:
        head = 3 * longest // 4
        text = f"{text[:head]} ... {text[head - longest :]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class OffloadError(RuntimeError):
    """Base of every error of this package.

    Args:
        message: ``<what failed>: <which, size, path> (<got>, expected <want>)``.
        hint: One action the reader can take now; printed after the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Join message and hint into the text that a traceback shows."""
        self._say(printable(message, longest=_LONGEST_MESSAGE), hint)

    def _say(self, message: str, hint: str | None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from text and attributes: constructors differ, and ranks send errors to each other."""
        return _restore, (type(self), self.args), self.__dict__


def _restore(kind: type[OffloadError], args: tuple[object, ...]) -> OffloadError:
    return kind.__new__(kind, *args)


class ConfigError(OffloadError, ValueError):
    """The settings are wrong. Lists every fault found, not only the first.

    Args:
        source: Where the settings came from, for example ``the "ssdtrain" block of ds.json``.
        problems: One line each, ``<option>: <got> (expected <want>)``.
        hint: One action the reader can take now.
    """

    def __init__(self, source: str, problems: Sequence[str], *, hint: str | None = None) -> None:
        """Compose the list of problems into one message."""
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = [printable(problem) for problem in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"... and {len(problems) - _MOST_PROBLEMS} more")
        self._say(f"{count} in {printable(source)}:" + "".join(f"\n  {line}" for line in lines), hint)
        self.source = source
        self.problems = tuple(problems)


class EnvironmentUnsupportedError(OffloadError):
    """The machine or an installed package cannot do what was asked."""


class StorageError(OffloadError):
    """A tier failed. The numbers are attributes, so callers need not parse text.

    Args:
        message: As in :class:`OffloadError`.
        errno: The operating system's error number, or None if it reported none.
        path: Directory or file concerned, or None.
        offset: Byte offset in the file, or None.
        nbytes: Bytes asked for, or None.
        hint: One action the reader can take now.
    """

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        path: str | None = None,
        offset: int | None = None,
        nbytes: int | None = None,
        hint: str | None = None,
    ) -> None:
        """Keep the numbers beside the text."""
        super().__init__(message, hint=hint)
        self.errno = errno
        self.path = path
        self.offset = offset
        self.nbytes = nbytes


class StoreError(StorageError):
    """Bytes did not reach the tier. The tensor is still in memory and stays there."""


class LoadError(StorageError):
    """Bytes could not be read back. Training cannot go on with a right gradient."""


class CapacityError(StorageError):
    """The tier has no room for the bytes. The tensor is still in memory and stays there."""


class SavedTensorMutatedError(OffloadError):
    """A tensor saved for backward was changed in place before backward used it."""


class StateError(OffloadError):
    """An illegal transition of a storage's state: a defect of this package."""


class QueueClosedError(OffloadError):
    """Work was submitted to a queue that is closed."""
