"""When, in the compute time of a step, each micro-batch saved and needed its bytes. Observes; decides nothing.

Compute time is the host's clock less the time that training waited for transfers,
so a slow drive does not make the model look slow. On a device whose kernels run
behind the host, the times inside a pass are stretched to what the device needed for
the pass (see :class:`ssdtrain_plugin.streams.Mark`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ssdtrain_plugin.streams import Mark

__all__ = ["MicrobatchProfile", "SaveProfile", "StepProfile", "StepProfiler"]


@dataclass(frozen=True, slots=True)
class SaveProfile:
    """One storage that autograd saved and that could be offloaded.

    Attributes:
        nbytes: Its size.
        saved_seconds: When it was saved, from the begin of its forward.
        needed_seconds: When backward first asked for it, from the begin of its backward;
            None if it did not ask.
        is_movable: Large enough, and such as can be offloaded.
    """

    nbytes: int
    saved_seconds: float
    needed_seconds: float | None
    is_movable: bool = True

    def scaled(self, factor: float) -> SaveProfile:
        """Return the same save with its times multiplied by ``factor``."""
        needed_seconds = None if self.needed_seconds is None else factor * self.needed_seconds
        return SaveProfile(self.nbytes, factor * self.saved_seconds, needed_seconds, self.is_movable)


@dataclass(frozen=True, slots=True)
class MicrobatchProfile:
    """One micro-batch, in compute seconds from the begin of the step.

    Attributes:
        forward_begin: When its forward began.
        forward_end: When it ended.
        backward_begin: When its backward began.
        backward_end: When it ended.
        saves: In the order in which they were saved, each storage once.
    """

    forward_begin: float
    forward_end: float
    backward_begin: float
    backward_end: float
    saves: tuple[SaveProfile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all saves."""
        return sum(save.nbytes for save in self.saves)


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One step.

    Attributes:
        microbatches: In the order of their forwards.
        seconds: Compute time from the first forward to the end of the last backward.
    """

    microbatches: tuple[MicrobatchProfile, ...]
    seconds: float

    def scaled(self, factor: float) -> StepProfile:
        """Return the same step with all times multiplied.

        Args:
            factor: More than 0.
        """
        microbatches = tuple(
            MicrobatchProfile(
                factor * each.forward_begin,
                factor * each.forward_end,
                factor * each.backward_begin,
                factor * each.backward_end,
                tuple(save.scaled(factor) for save in each.saves),
            )
            for each in self.microbatches
        )
        return StepProfile(microbatches, factor * self.seconds)


@dataclass(frozen=True, slots=True)
class _Point:
    """A moment: the host's compute time, the device's mark, and the stalls before it."""

    host_seconds: float
    mark: Mark
    stalled_seconds: float

    def since(self, start: _Point) -> float | None:
        """Return the compute time of the device since ``start``; None if it is not there yet."""
        seconds = self.mark.seconds_since(start.mark)
        if seconds is None:
            return None
        return max(0.0, seconds - (self.stalled_seconds - start.stalled_seconds))


@dataclass(slots=True)
class _Pass:
    """One forward or backward."""

    begin: _Point
    end: _Point | None = None


@dataclass(slots=True)
class _Save:
    """One save, in host seconds."""

    nbytes: int
    is_movable: bool
    saved_at: float
    needed_at: float | None = None


@dataclass(slots=True)
class _Microbatch:
    forward: _Pass
    backward: _Pass | None = None
    saves: dict[int, _Save] = field(default_factory=dict)  # by serial


class StepProfiler:
    """Collects one step.

    Args:
        clock: Host seconds.
        mark: Marks the present end of the compute stream.
        is_on: Collect; else every call returns at once.

    Threads:
        Not safe; its owner locks.
    """

    def __init__(self, clock: Callable[[], float], mark: Callable[[], Mark], *, is_on: bool = True) -> None:
        """Start with an empty step."""
        self._is_on = is_on
        self._clock = clock
        self._mark = mark
        self._stalled_seconds = 0.0
        self._microbatches: dict[int, _Microbatch] = {}
        self._owner: dict[int, int] = {}  # serial -> micro-batch
        self._current: int | None = None
        self._backward: int | None = None
        self._last_ask: _Point | None = None

    def _now(self) -> float:
        return self._clock() - self._stalled_seconds

    def _point(self) -> _Point:
        return _Point(self._now(), self._mark(), self._stalled_seconds)

    def stalled(self, seconds: float) -> None:
        """Take the time that training waited for a transfer off the clock.

        Args:
            seconds: The wait, just over.
        """
        if not self._is_on:
            return
        self._stalled_seconds += seconds

    def begin_forward(self, microbatch: int) -> None:
        """Note that a forward begins.

        Args:
            microbatch: Its number.
        """
        if not self._is_on:
            return
        self._end_backward()
        self._microbatches[microbatch] = _Microbatch(_Pass(self._point()))
        self._current = microbatch

    def end_forward(self) -> None:
        """Note that the forward has ended."""
        if not self._is_on:
            return
        current = self._microbatches.get(-1 if self._current is None else self._current)
        if current is not None:
            current.forward.end = self._point()
        self._current = None

    def saved(self, serial: int, nbytes: int, *, is_movable: bool) -> None:
        """Note a save.

        Args:
            serial: Of the record.
            nbytes: Its size.
            is_movable: Large enough, and such as can be offloaded.
        """
        if not self._is_on:
            return
        if self._current is not None:
            self._microbatches[self._current].saves[serial] = _Save(nbytes, is_movable, self._now())
            self._owner[serial] = self._current

    def needed(self, serial: int, microbatch: int) -> None:
        """Note that backward asks for a record; its first ask counts.

        Args:
            serial: Of the record.
            microbatch: Whose backward asks.
        """
        if not self._is_on:
            return
        self._begin_backward(microbatch)
        owner = self._owner.get(serial)
        if owner is not None:
            save = self._microbatches[owner].saves[serial]
            if save.needed_at is None:
                save.needed_at = self._now()
        self._last_ask = self._point()

    def _begin_backward(self, microbatch: int) -> None:
        if self._backward == microbatch:
            return
        self._end_backward()
        entry = self._microbatches.get(microbatch)
        if entry is not None and entry.backward is None:
            entry.backward = _Pass(self._point())
        self._backward = microbatch

    def end_backward(self) -> None:
        """Note that the present backward has just ended; else it is taken to end with its last ask."""
        if not self._is_on:
            return
        self._last_ask = self._point()
        self._end_backward()

    def _end_backward(self) -> None:
        entry = self._microbatches.get(-1 if self._backward is None else self._backward)
        if entry is not None and entry.backward is not None and entry.backward.end is None:
            entry.backward.end = self._last_ask
        self._backward = None

    def take(self) -> StepProfile | None:
        """Close the step and open the next.

        Returns:
            The profile; None if a micro-batch had no backward, or the device has not
            finished yet.
        """
        self._end_backward()
        entries = list(self._microbatches.values())
        self._microbatches, self._owner, self._current = {}, {}, None
        self._stalled_seconds = 0.0
        if not entries:
            return None
        profiles = [_profile(entry, entries[0].forward.begin) for entry in entries]
        whole = tuple(profile for profile in profiles if profile is not None)
        if len(whole) < len(entries):
            return None
        return StepProfile(whole, max(profile.backward_end for profile in whole))


def _profile(entry: _Microbatch, start: _Point) -> MicrobatchProfile | None:
    forward = _span(entry.forward, start)
    backward = None if entry.backward is None else _span(entry.backward, start)
    if entry.backward is None or forward is None or backward is None:
        return None
    saves = tuple(
        SaveProfile(
            save.nbytes,
            (save.saved_at - entry.forward.begin.host_seconds) * forward.stretch,
            None
            if save.needed_at is None
            else max(0.0, save.needed_at - entry.backward.begin.host_seconds) * backward.stretch,
            save.is_movable,
        )
        for save in entry.saves.values()
    )
    return MicrobatchProfile(forward.begin, forward.end, backward.begin, backward.end, saves)


class _Span(NamedTuple):
    begin: float
    end: float
    stretch: float  # device seconds per host second


def _span(one: _Pass, start: _Point) -> _Span | None:
    """Place a pass on the device's time; None if it has not ended there."""
    begin = one.begin.since(start)
    end = None if one.end is None else one.end.since(start)
    if begin is None or end is None or one.end is None:
        return None
    host_seconds = one.end.host_seconds - one.begin.host_seconds
    return _Span(begin, end, (end - begin) / host_seconds if host_seconds > 0 else 1.0)
