"""Running sums over the log of a micro-batch, so that a plan asks about any prefix in constant time.

All times of a curve count from the begin of the micro-batch's forward (stores) or of
its backward (loads). ``end`` is a position in the log: the prefix ``saves[:end]``.
"""

from __future__ import annotations

import bisect
import math
import operator
from collections import deque
from collections.abc import Callable, Collection

from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.timeline import Profile

__all__ = ["Curve", "last_true"]


def last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Find the greatest number in a range for which a condition holds.

    Args:
        holds: True up to some number, false beyond.
        low: Taken for true.
        high: The last candidate.
    """
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


class Curve:
    """What offloading a prefix of one log takes.

    Store number j of a prefix can begin when it is saved and when the store
    before has ended. With Y the running sum of store times, it ends at
    Y[j] + max(queue free, max over i <= j of (saved[i] - Y[i-1])); the second
    maximum is ``delay``. Loads run in reverse. If they may begin at t, save j is
    back at t + L[end] - L[j-1], so all are in time if t + L[end] is at most the
    minimum of needed[j] + L[j-1], which is ``slack``.

    Args:
        profile: Of the micro-batch.
        machine: What moves bytes.
        refused: Saves that are kept although they lie in the prefix.

    Attributes:
        profile: As given.
        moved_bytes: Bytes of each prefix that are offloaded.
        store_seconds: Y, for the drive.
        last_store_seconds: How long the last store of each prefix takes.
        load_seconds: L, for the drive.
        host_seconds: The same for the host tier, in either direction.
        delay: For the drive, see above.
        slack: For the drive, see above.
        largest_bytes: Of the movable saves.
    """

    __slots__ = (
        "_moves",
        "delay",
        "host_seconds",
        "largest_bytes",
        "last_store_seconds",
        "load_seconds",
        "moved_bytes",
        "profile",
        "slack",
        "store_seconds",
    )

    def __init__(self, profile: Profile, machine: Machine, refused: Collection[int] = ()) -> None:
        """Sum up once."""
        self.profile = profile
        self._moves = [save.is_movable and index not in refused for index, save in enumerate(profile.saves)]
        moved_bytes = 0
        store_seconds = load_seconds = host_seconds = last_store_seconds = 0.0
        delay, slack = -math.inf, math.inf
        self.moved_bytes, self.last_store_seconds = [0], [0.0]
        self.store_seconds, self.load_seconds, self.host_seconds = [0.0], [0.0], [0.0]
        self.delay, self.slack = [delay], [slack]
        per_write, per_read = 1.0 / machine.write_bytes_per_second, 1.0 / machine.read_bytes_per_second
        per_host, latency = 1.0 / machine.host_bytes_per_second, machine.latency_seconds
        for save, moves in zip(profile.saves, self._moves, strict=True):
            if moves:
                nbytes = save.nbytes
                moved_bytes += nbytes
                # Plain comparisons: this loop is most of the cost of a plan.
                if save.saved_seconds - store_seconds > delay:
                    delay = save.saved_seconds - store_seconds
                if save.needed_seconds + load_seconds < slack:
                    slack = save.needed_seconds + load_seconds
                last_store_seconds = latency + nbytes * per_write
                store_seconds += last_store_seconds
                load_seconds += latency + nbytes * per_read
                host_seconds += nbytes * per_host
            self.moved_bytes.append(moved_bytes)
            self.store_seconds.append(store_seconds)
            self.last_store_seconds.append(last_store_seconds)
            self.load_seconds.append(load_seconds)
            self.host_seconds.append(host_seconds)
            self.delay.append(delay)
            self.slack.append(slack)
        sizes = (save.nbytes for save, moves in zip(profile.saves, self._moves, strict=True) if moves)
        self.largest_bytes = max(sizes, default=0)

    def __len__(self) -> int:
        """Count the saves."""
        return len(self._moves)

    def first_difference(self, other: Curve) -> int:
        """Find the first save that one curve moves and the other keeps; the length if there is none."""
        pairs = zip(self._moves, other._moves, strict=True)
        return next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), len(self))

    def store_end(self, end: int, free_seconds: float) -> float:
        """When the stores of a prefix have ended.

        Args:
            end: Of the prefix.
            free_seconds: When the drive has done all that was queued before.
        """
        return self.store_seconds[end] + max(free_seconds, self.delay[end])

    def stored(self, end: int, free_seconds: float, seconds: float) -> int:
        """How much of a prefix is stored at a time.

        Args:
            end: Of the prefix.
            free_seconds: When the drive has done all that was queued before.
            seconds: The time.

        Returns:
            End of the part that is stored.
        """
        if self.store_end(end, free_seconds) <= seconds:
            return end
        return last_true(lambda middle: self.store_end(middle, free_seconds) <= seconds, 0, end)

    def refusals(self, free_seconds: float, waiting_bytes: int, machine: Machine) -> set[int]:
        """Find the saves that find too much in flight, if all others are offloaded.

        Args:
            free_seconds: When the drive has done all that was queued before.
            waiting_bytes: What was queued before and is not stored when forward begins.
            machine: Gives the bound and the rate.

        Returns:
            Their numbers.
        """
        queue: deque[tuple[float, int]] = deque([(free_seconds, waiting_bytes)])
        inflight_bytes = waiting_bytes
        refused = set()
        for index, (save, moves) in enumerate(zip(self.profile.saves, self._moves, strict=True)):
            while queue and queue[0][0] <= save.saved_seconds:
                inflight_bytes -= queue.popleft()[1]
            if not moves:
                continue
            if inflight_bytes and inflight_bytes + save.nbytes > machine.max_inflight_bytes:
                refused.add(index)
                continue
            begin_seconds = queue[-1][0] if queue else save.saved_seconds
            queue.append((begin_seconds + machine.store_seconds(save.nbytes), save.nbytes))
            inflight_bytes += save.nbytes
        return refused

    def residue(self, end: int, free_seconds: float) -> tuple[int, float]:
        """Most bytes of this micro-batch in memory during its forward.

        Args:
            end: Of the prefix that is offloaded.
            free_seconds: When the drive has done all that was queued before.

        Returns:
            Bytes, and when.
        """
        most_bytes, most_seconds, done, done_bytes = 0, 0.0, 0, 0
        ends = map(operator.add, self.store_seconds[1 : end + 1], _at_least(free_seconds, self.delay[1 : end + 1]))
        next_end = next(ends, math.inf)
        for logged_bytes, save in zip(self.profile.logged_bytes[1:], self.profile.saves, strict=True):
            while next_end <= save.saved_seconds:
                done += 1
                done_bytes = self.moved_bytes[done]
                next_end = next(ends, math.inf)
            if logged_bytes - done_bytes > most_bytes:
                most_bytes, most_seconds = logged_bytes - done_bytes, save.saved_seconds
        return most_bytes, most_seconds

    def lead(self, end: int, host_end: int, done_by_seconds: float) -> tuple[int, int]:
        """How far ahead of backward loads must run, at least, to be in time.

        Each load begins as late as it can. What is at hand then and has not been
        asked for must fit into the bounds.

        Args:
            end: Of the prefix on the drive.
            host_end: Of what is offloaded, on the drive or the host.
            done_by_seconds: When the loads from the drive must have ended.

        Returns:
            Bytes that were offloaded, and bytes with those that were kept.
        """
        logged_bytes, moved_bytes = self.profile.logged_bytes, self.moved_bytes
        asked_seconds, saves, moves = self.profile.asked_seconds, self.profile.saves, self._moves
        length, offloaded_bytes = len(self), moved_bytes[host_end]
        ahead_bytes = window_bytes = 0
        for first, stop, seconds in ((0, end, self.load_seconds), (end, host_end, self.host_seconds)):
            reached, begin_seconds = first, done_by_seconds if first == 0 else math.inf
            for index in range(first, stop):
                if not moves[index]:
                    continue
                needed_seconds = saves[index].needed_seconds
                if needed_seconds < begin_seconds:
                    begin_seconds = needed_seconds
                begin_seconds -= seconds[index + 1] - seconds[index]
                if reached <= index:
                    reached = index + 1
                while reached < length and asked_seconds[reached] > begin_seconds:
                    reached += 1
                ahead = (moved_bytes[reached] if reached < host_end else offloaded_bytes) - moved_bytes[index]
                if ahead > ahead_bytes:
                    ahead_bytes = ahead
                if logged_bytes[reached] - logged_bytes[index] > window_bytes:
                    window_bytes = logged_bytes[reached] - logged_bytes[index]
        return ahead_bytes, window_bytes

    def host_store_end(self, end: int, host_end: int, free_seconds: float) -> float:
        """When the stores of a range of the log have ended in the host tier.

        Args:
            end: Where the range begins.
            host_end: Where it ends.
            free_seconds: When the host tier has done all that was queued before.
        """
        now_seconds = free_seconds
        for index in range(end, host_end):
            if self._moves[index]:
                duration_seconds = self.host_seconds[index + 1] - self.host_seconds[index]
                now_seconds = max(now_seconds, self.profile.saves[index].saved_seconds) + duration_seconds
        return now_seconds

    def host_load_begin(self, end: int, host_end: int, done_by_seconds: float) -> float:
        """When the loads of a range of the log must begin in the host tier.

        Args:
            end: Where the range begins.
            host_end: Where it ends.
            done_by_seconds: When they must have ended.
        """
        seconds = self.host_seconds
        latest_seconds = done_by_seconds + seconds[end] - seconds[host_end]
        for index in range(end, host_end):
            if self._moves[index]:
                needed_seconds = self.profile.saves[index].needed_seconds
                latest_seconds = min(latest_seconds, needed_seconds + seconds[index] - seconds[host_end])
        return latest_seconds

    def unasked(self, end: int, seconds: float) -> int:
        """Find the position in a prefix up to which backward has not asked at a time."""
        asked_seconds = self.profile.asked_seconds
        return last_true(lambda middle: asked_seconds[middle - 1] > seconds, 0, end)


def _at_least(low: float, values: list[float]) -> list[float]:
    """Raise what is below ``low`` to it; the values rise."""
    first = bisect.bisect_left(values, low)
    return [low] * first + values[first:]
