"""Several drives as one tier: each extent goes whole to one of them, by load and measured speed.

It knows extents, seconds and failures; files and system calls are its drives' business.

Note [Which drive]. All that is stored in forward is read in backward. So a drive owes two times: for what waits to be
written, and for what it holds and will read back. An extent goes to the drive that would be done with both first::

    (pending_bytes + nbytes) / write_rate  +  (held_bytes + nbytes) / owed_rate

The first term keeps the queues of the drives equally long in seconds, the second gives each its share of what is
held: by read rates, by write rates, or between, whichever makes forward and backward together shortest. A rate that
is not known yet is taken to be the best known of the others, so that a new drive is tried, unless its first transfers
show less. A drive that is so slow that it gets nothing would never be measured again; so it gets one extent, a probe,
when many have gone elsewhere and a probe takes 1 % of the time at most.

Note [A drive that fails]. A failed store goes to another drive, and the caller sees a success; the error is kept for
whoever counts them. The drive gets nothing for a pause that doubles with each failure, then one extent on trial. A
store that succeeds ends that. A failed load pauses the drive too, but raises: its bytes are lost.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ssdtrain_plugin.errors import CapacityError, LoadError, StateError, StorageError, StoreError
from ssdtrain_plugin.frames import without_frames
from ssdtrain_plugin.storage.base import Extent, Rates, Tier
from ssdtrain_plugin.storage.extent_file import FULL
from ssdtrain_plugin.storage.meter import Meter
from ssdtrain_plugin.storage.shares import assumed_rates, owed_rates
from ssdtrain_plugin.streams import DeviceEvent
from ssdtrain_plugin.units import format_bytes, format_rate

__all__ = ["StripedTier"]

_ALIGNMENT = 4096  # an offset is a name here, not a place, but it looks like one
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 64.0
_PROBE_ALLOCATIONS = 256
_PROBE_TIME_SHARE = 0.01


class _Drive:
    """One drive: its speed, what it holds, and whether it is left alone. Its owner locks."""

    def __init__(self, index: int, tier: Tier, clock: Callable[[], float]) -> None:
        self.index = index
        self.tier = tier
        self.writes = Meter(clock=clock)
        self.reads = Meter(clock=clock)
        self.held_bytes = 0  # of all places on it, written or not
        self.pending_bytes = 0  # of the places that are not written
        self.chosen_at = clock()
        self.rates = Rates(None, None)  # when last asked
        self.chosen_at_turn = 0
        self.num_failures = 0
        self.error_number: int | None = None
        self._pause_seconds = 0.0
        self._paused_until = 0.0

    def is_paused(self, now: float) -> bool:
        return self._pause_seconds > 0 and now < self._paused_until

    def is_usable(self, now: float) -> bool:
        """Whether one more extent may go here; after a pause only one at a time, on trial."""
        return self._pause_seconds == 0 or (now >= self._paused_until and self.pending_bytes == 0)

    def failed(self, error_number: int | None, now: float) -> None:
        # Several transfers under way fail together; that is one failure and one pause.
        if not self.is_paused(now):
            self._pause_seconds = min(max(_FIRST_PAUSE_SECONDS, 2 * self._pause_seconds), _LONGEST_PAUSE_SECONDS)
            self._paused_until = now + self._pause_seconds
        self.num_failures += 1
        self.error_number = error_number

    def succeeded(self, num_failures_before: int) -> None:
        # A store that began before the last failure says nothing about the time after it.
        if num_failures_before == self.num_failures:
            self._pause_seconds = 0.0

    def has_rested(self, turn: int, now: float, seconds: float) -> bool:
        """Whether a probe that takes ``seconds`` is due; never more than a small share of the time."""
        is_long_ago = turn - self.chosen_at_turn > _PROBE_ALLOCATIONS
        return is_long_ago and self.pending_bytes == 0 and seconds <= _PROBE_TIME_SHARE * (now - self.chosen_at)

    def reserve(self, nbytes: int) -> None:
        self.held_bytes += nbytes
        self.pending_bytes += nbytes

    def release(self, nbytes: int, *, is_pending: bool) -> None:
        self.held_bytes -= nbytes
        if is_pending:
            self.pending_bytes -= nbytes

    def describe(self, now: float) -> str:
        """What was noticed of it, to follow the line of its tier."""
        rates = {"write": self.writes.bytes_per_second, "read": self.reads.bytes_per_second}
        noticed = "".join(f", {name} {format_rate(rate)}" for name, rate in rates.items() if rate is not None)
        return noticed + (", paused after a failure" if self.is_paused(now) else "")


@dataclass(slots=True, eq=False)
class _Place:
    """Where the bytes of one extent are, or will be: an extent of a drive."""

    drive: _Drive
    extent: Extent
    is_pending: bool = True


class StripedTier(Tier):
    """Several drives, none of which a run depends on; see the notes above.

    Its extents have names of their own, and stay the same when their bytes go to
    another drive. ``Extent.drive`` is the index of the drive chosen at first.

    Args:
        drives: At least one. They belong to this tier, which closes them.
        clock: Seconds, never going back.

    Raises:
        ValueError: There is no drive.

    Threads:
        Any. No lock is held while a drive is asked for anything.
    """

    name = "ssd"

    def __init__(self, drives: Sequence[Tier], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing measured."""
        if not drives:
            raise ValueError("drives: none (expected at least 1)")
        self._clock = clock
        self._drives = tuple(_Drive(index, tier, clock) for index, tier in enumerate(drives))
        # Reentrant: a collection inside a locked region may run the finalizer that closes the tier.
        self._lock = threading.RLock()
        self._live: dict[int, tuple[Extent, _Place]] = {}  # by offset
        self._survived: list[StorageError] = []
        self._turn = 0
        self._num_named = 0
        self._is_closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now, on all drives."""
        return sum(drive.tier.used_bytes for drive in self._drives)

    @property
    def free_bytes(self) -> int:
        """Bytes left of all drives' budgets; an extent needs room on a single one."""
        return 0 if self._is_closed else sum(drive.tier.free_bytes for drive in self._drives)

    @property
    def is_at_write_limit(self) -> bool:
        """Whether every drive is; one that is refuses, and the others go on."""
        return all(drive.tier.is_at_write_limit for drive in self._drives)

    def describe(self) -> str:
        """Name each drive, with its measured speed where it is known, in one line."""
        with self._lock:
            now = self._clock()
            noticed = [drive.describe(now) for drive in self._drives]
        lines = [drive.tier.describe().removeprefix(f"{drive.tier.name}: ") for drive in self._drives]
        drives = [f"[{index}] {line}{more}" for index, (line, more) in enumerate(zip(lines, noticed, strict=True))]
        return f"{self.name}: {len(drives)} drives by load and speed: {'; '.join(drives)}"

    def allocate(self, nbytes: int) -> Extent:
        """Reserve room on the drive that Note [Which drive] names; see :meth:`Tier.allocate`.

        Raises:
            CapacityError: No drive has room or may be used; with ``errno`` if the reason is no budget of any.
        """
        refusals: list[StorageError] = []
        place = None if self._is_closed else self._find_place(nbytes, set(), refusals)
        if place is None:
            raise self._no_room(nbytes, refusals) from (refusals[-1] if refusals else None)
        with self._lock:
            self._survived.extend(error for error in refusals if _is_failure(error))
            self._num_named += 1
            offset = self._num_named * _ALIGNMENT
            extent = Extent(offset, nbytes, place.extent.reserved_bytes, place.drive.index)
            self._live[offset] = extent, place
            return extent

    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        """Write to the extent's drive or, if that fails or is paused, to another; see :meth:`Tier.write`.

        Raises:
            StorageError: The last drive's error, when no drive took the bytes; a :class:`StoreError`
                or :class:`CapacityError`. The extent is as good as before.
        """
        own = self._place_of(extent, StoreError)
        ready.synchronize()  # a drive is not slow because kernels are
        failures: list[StorageError] = []
        for place in self._places_to_try(own):
            is_stored = False
            try:
                is_stored = self._try_write(place, source, ready, failures)
            finally:
                if not is_stored and place is not own:
                    self._release(place)
            if is_stored:
                self._settle(extent, place)
                with self._lock:
                    self._survived.extend(failures)
                return
        raise failures.pop()

    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        """Read from where the bytes are; see :meth:`Tier.read`."""
        place = self._place_of(extent, LoadError)
        drive, has_moved = place.drive, False
        with self._lock:
            drive.reads.begin(extent.nbytes)
        try:
            event = drive.tier.read(place.extent, target, ready)
            has_moved = True
        except LoadError as error:
            with self._lock:
                drive.failed(error.errno, self._clock())
            raise
        finally:
            with self._lock:
                drive.reads.end(extent.nbytes, has_moved=has_moved)
        return event

    def free(self, extent: Extent) -> None:
        """Give an extent back to its drive.

        Raises:
            StateError: It was freed before, or is not from here.
        """
        with self._lock:
            live, place = self._live.get(extent.offset, (None, None))
            if place is None or live != extent:
                if self._is_closed:
                    return
                raise StateError(
                    f"cannot free extent: {extent.reserved_bytes} bytes at {extent.offset} "
                    "(not allocated, expected a live extent)"
                )
            del self._live[extent.offset]
        self._release(place)

    def path_of(self, extent: Extent) -> str | None:
        """Name the directory of the drive that has an extent, or was chosen for it."""
        _, place = self._live.get(extent.offset, (None, None))
        return None if place is None else place.drive.tier.path_of(place.extent)

    def hangs(self, extent: Extent) -> bool:
        """Leave the drive alone as after a failure; while a store on it hangs, its bytes stay pending."""
        with self._lock:
            _, place = self._live.get(extent.offset, (None, None))
            if place is not None:
                place.drive.failed(errno.ETIMEDOUT, self._clock())
        if place is not None:
            place.drive.tier.hangs(place.extent)
        return False

    def take_survived(self) -> list[StorageError]:
        """Take the errors of stores that then went to another drive; see :meth:`Tier.take_survived`."""
        with self._lock:
            survived, self._survived = self._survived, []
        return survived + [error for drive in self._drives for error in drive.tier.take_survived()]

    def take_rates(self) -> Rates:
        """Add up the drives, each with its last rate in each direction: they work side by side."""
        for drive in self._drives:
            drive.rates = Rates(*(new or old for new, old in zip(drive.tier.take_rates(), drive.rates, strict=True)))
        totals = (sum(rate for rate in rates if rate) for rates in zip(*(d.rates for d in self._drives), strict=True))
        return Rates(*(total or None for total in totals))

    def trim(self) -> None:
        """Let each drive give back what it has not needed; see :meth:`Tier.trim`."""
        for drive in self._drives:
            drive.tier.trim()

    def close(self) -> None:
        """Close all drives, also if closing one of them fails."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with contextlib.ExitStack() as drives:
            for drive in self._drives:
                drives.callback(drive.tier.close)

    # Choice

    def _find_place(self, nbytes: int, avoid: set[_Drive], refusals: list[StorageError]) -> _Place | None:
        """Reserve room on the best drive that has some, or return None.

        Args:
            nbytes: Bytes needed.
            avoid: Drives not to ask; those that were asked are added.
            refusals: The errors of those that refused are added.
        """
        while (drive := self._choose(nbytes, avoid)) is not None:
            avoid.add(drive)
            extent = None
            try:
                extent = drive.tier.allocate(nbytes)
                return _Place(drive, extent)
            except CapacityError as error:
                refusals.append(without_frames(error))
                if _is_failure(error):
                    with self._lock:
                        drive.failed(error.errno, self._clock())
            finally:
                if extent is None:
                    with self._lock:
                        drive.release(nbytes, is_pending=True)
        return None

    def _choose(self, nbytes: int, avoid: set[_Drive]) -> _Drive | None:
        """Name the drive to ask next, and reserve the bytes there; see Note [Which drive]."""
        with self._lock:
            now = self._clock()
            usable = [drive for drive in self._drives if drive not in avoid and drive.is_usable(now)]
            if not usable:
                return None
            write_rates, read_rates = self._rates()
            shared_rates = owed_rates(write_rates, read_rates)

            def seconds(drive: _Drive, write_bytes: int, read_bytes: int) -> float:
                return write_bytes / write_rates[drive.index] + read_bytes / shared_rates[drive.index]

            chosen = min(usable, key=lambda each: seconds(each, each.pending_bytes + nbytes, each.held_bytes + nbytes))
            self._turn += 1
            for drive in usable:
                if drive.has_rested(self._turn, now, seconds(drive, nbytes, nbytes)):
                    chosen = drive
                    chosen.writes.expire()
                    chosen.reads.expire()
                    break
            chosen.chosen_at, chosen.chosen_at_turn = now, self._turn
            chosen.reserve(nbytes)
            return chosen

    def _rates(self) -> tuple[list[float], list[float]]:
        """Bytes per second of each drive, stores and loads, with assumptions for what is not known."""
        writes = assumed_rates([drive.writes for drive in self._drives])
        if all(drive.reads.bytes_per_second is None for drive in self._drives):
            return writes, writes  # the first forward: a drive that is slow at one is slow at the other
        return writes, assumed_rates([drive.reads for drive in self._drives])

    # Places

    def _place_of(self, extent: Extent, kind: type[StorageError]) -> _Place:
        with self._lock:
            if self._is_closed:
                is_store = kind is StoreError
                raise kind(
                    f"cannot {'store' if is_store else 'load'} activation: {format_bytes(extent.nbytes)} "
                    f"{'to' if is_store else 'from'} drive {extent.drive} (the tier is closed)",
                    offset=extent.offset,
                    nbytes=extent.nbytes,
                )
            live, place = self._live.get(extent.offset, (None, None))
            if place is None or live != extent:
                raise StateError(f"a transfer at {extent.offset} uses an extent that is not allocated")
            return place

    def _places_to_try(self, own: _Place) -> Iterator[_Place]:
        """Give the place that was reserved, then places on other drives; a paused drive comes last."""
        with self._lock:
            is_paused = own.drive.is_paused(self._clock())
        if not is_paused:
            yield own
        avoid: set[_Drive] = {own.drive}
        while (place := self._find_place(own.extent.nbytes, avoid, [])) is not None:
            yield place
        if is_paused:
            yield own

    def _try_write(self, place: _Place, source: Tensor, ready: DeviceEvent, failures: list[StorageError]) -> bool:
        """Write to one drive; return whether it worked, else add the error to ``failures``."""
        drive, nbytes, has_moved, is_drive_at_fault = place.drive, place.extent.nbytes, False, False
        with self._lock:
            num_failures = drive.num_failures
            drive.writes.begin(nbytes)
        try:
            drive.tier.write(place.extent, source, ready)
            has_moved = True
        except (StoreError, CapacityError) as error:
            failures.append(without_frames(error))
            is_drive_at_fault = isinstance(error, StoreError) or error.errno is not None
        finally:
            with self._lock:
                drive.writes.end(nbytes, has_moved=has_moved)
                if has_moved:
                    drive.succeeded(num_failures)
                elif is_drive_at_fault:
                    drive.failed(failures[-1].errno, self._clock())
        return has_moved

    def _settle(self, extent: Extent, place: _Place) -> None:
        """Note that the bytes of ``extent`` are at ``place``; give the place reserved at first back."""
        with self._lock:
            _, own = self._live[extent.offset]
            if place.is_pending:
                place.is_pending = False
                place.drive.pending_bytes -= extent.nbytes
            self._live[extent.offset] = extent, place
        if place is not own:
            self._release(own)

    def _release(self, place: _Place) -> None:
        with self._lock:
            place.drive.release(place.extent.nbytes, is_pending=place.is_pending)
        place.drive.tier.free(place.extent)

    def _no_room(self, nbytes: int, refusals: Sequence[StorageError]) -> CapacityError:
        if self._is_closed:
            reason, hint, error_number = "the tier is closed", "close it after the last store", None
        else:
            with self._lock:
                now = self._clock()
                paused = [drive for drive in self._drives if not drive.is_usable(now)]
            used_bytes, left_bytes = self.used_bytes, self.free_bytes
            pieces = "in pieces, " if left_bytes >= nbytes else ""
            reason = f"{format_bytes(left_bytes)} left {pieces}of {format_bytes(used_bytes + left_bytes)}"
            hint = "raise `disk_bytes` or lower `offload_fraction`"
            numbers = [error.errno for error in refusals]
            if paused:
                reason += f", {len(paused)} of {len(self._drives)} paused after failures"
                hint = "look for drive errors in `dmesg`"
                numbers += [drive.error_number for drive in paused]
            # A budget frees itself, so while one was the reason the tier as a whole has not failed.
            error_number = numbers[-1] if numbers and None not in numbers else None
        return CapacityError(
            f"cannot store activation: {format_bytes(nbytes)} to {len(self._drives)} drives ({reason})",
            errno=error_number,
            nbytes=nbytes,
            hint=f"{hint}; the tensor stays in memory meanwhile",
        )


def _is_failure(refusal: StorageError) -> bool:
    """Tell a drive that fails from one that is full."""
    return refusal.errno is not None and refusal.errno not in FULL
