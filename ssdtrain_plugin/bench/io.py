"""``ssdtrain bench io``: how fast our engines move bytes, beside fio, in one interleaved run.

Ours is measured through the transfer queue that training uses, with its threads, its
bound on bytes in flight and its recycled extents. Both sides write the same number
of bytes in blocks of the same size, with the same number of transfers at once, out of
buffers in huge pages, into the same file, which was allocated and written before. The
first write into new space is reported on its own.

Each visit of one side is: write all, read all, then write one half while the other
half is read, with all threads of both directions, the bytes over the time until
both are done. All that ours has written is read once more, not timed, and every byte
compared.

Note [Several paths]. Each is measured alone and then all together, in each round. On
drives of their own, the sum of each alone is what striping can reach. Paths on one
drive share its speed, and only fio on all of them at once says what can be reached.

Note [What checksums cost]. An engine takes part twice: as training uses it with ``verify: off``, and
with ``verify: checksum``, each on a file of its own. What the second costs is its throughput
and its CPU time over those of the first, round by round, because both are visited next
to each other in time.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ssdtrain_plugin.bench.fio import FioError, FioJob, Sample, find_fio, with_working_engine
from ssdtrain_plugin.bench.io_report import Figure, IoReport, Place, Row
from ssdtrain_plugin.bench.io_sides import DIRECTIONS, Buffers, Fio, IoOptions, Ours
from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import CapacityError, StorageError
from ssdtrain_plugin.storage.base import Tier
from ssdtrain_plugin.storage.engines import choose_engine, open_drive
from ssdtrain_plugin.storage.extents import round_up
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.probe import DirectoryReport, directory_problem, probe_directory
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.storage.throttled import ThrottledTier
from ssdtrain_plugin.streams import create_streams
from ssdtrain_plugin.transfer import TransferQueue
from ssdtrain_plugin.units import KIB, format_bytes, format_rate

__all__ = ["IoOptions", "measure_io"]

_CPU = torch.device("cpu")
_HUGE_SHARE = 0.9  # a buffer's ends may lie on ordinary pages
_LARGEST_SHARE = 0.95  # of the free space

Progress = Callable[[str, int, int], None]
"""Called with what comes next, the visits done and the visits in all; never while something is timed."""


def measure_io(paths: Sequence[str], options: IoOptions, progress: Progress | None = None) -> IoReport:
    """Measure every path with every engine and with fio, and several paths together. Leaves nothing behind.

    Args:
        paths: Directories.
        options: How.
        progress: Told before each visit.

    Raises:
        StorageError: A directory is of no use, has no room, or a transfer failed or came back changed.
        EnvironmentUnsupportedError: An engine named does not work here.
    """
    engines = tuple(dict.fromkeys(choose_engine(engine, _CPU)[0] for engine in options.engines))
    reports = [_look_at(path) for path in paths]
    verify = tuple(dict.fromkeys(options.verify))
    _check_room(reports, options, num_files=len(engines) * len(verify))
    with contextlib.ExitStack() as stack:
        run = _Run(reports, options, stack, progress or (lambda what, done, total: None))
        for engine in engines:
            for each in verify:
                run.add_ours(engine, each)
        with contextlib.closing(run.queue):
            run.write_first()
            run.add_fio()
            run.go()
        return run.report()


def _look_at(path: str) -> DirectoryReport:
    problem = directory_problem(path)
    if problem is not None:
        hint = "name a directory on a local drive that this user can write to, with free space"
        raise StorageError(f"cannot measure {problem}", path=path, hint=hint)
    try:
        return probe_directory(path)
    except OSError as error:  # it went away between the two
        raise StorageError(f"cannot measure `{path}`: {error.strerror}", errno=error.errno, path=path) from error


def _check_room(reports: Sequence[DirectoryReport], options: IoOptions, num_files: int) -> None:
    """Refuse to fill a file system.

    Raises:
        CapacityError: The files would take nearly all of what is free.
    """
    need_bytes: dict[int, int] = {}
    for report in reports:
        device = os.stat(report.path).st_dev
        need_bytes[device] = need_bytes.get(device, 0) + num_files * options.num_blocks * options.block_bytes
        if need_bytes[device] > _LARGEST_SHARE * report.free_bytes:
            raise CapacityError(
                f"cannot measure `{report.path}`: {format_bytes(need_bytes[device])} for the files of all engines "
                f"({format_bytes(report.free_bytes)} free)",
                path=report.path,
                nbytes=need_bytes[device],
                hint="lower --size",
            )


@dataclass(slots=True, eq=False)
class _Entry:
    """One side at one place, and what it did."""

    place: tuple[int, ...]  # indices of the paths
    engine: str  # whose file it is
    side: Ours | Fio
    first_write: Sample | None = None
    visits: list[dict[str, Sample]] = field(default_factory=list)

    @property
    def has_first_write(self) -> bool:
        return isinstance(self.side, Ours) and len(self.place) == 1

    def rates(self, direction: str) -> list[float]:
        return [visit[direction].bytes_per_second for visit in self.visits]

    def costs(self, direction: str) -> list[float]:
        return [1e3 * visit[direction].cpu_seconds_per_gib for visit in self.visits]

    def median_rate(self, direction: str) -> float:
        return statistics.median(self.rates(direction))


class _Run:
    """Who takes part, and what was measured."""

    def __init__(
        self,
        reports: Sequence[DirectoryReport],
        options: IoOptions,
        stack: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        self._reports = reports
        self._options = options
        self._stack = stack
        self._progress = progress
        self._num_done = 0
        self._throttles = (*[None] * (len(reports) - len(options.throttles)), *options.throttles)
        self._all = tuple(range(len(reports)))
        self._entries: list[_Entry] = []
        self._files: dict[tuple[int, str], int] = {}  # descriptors, by path and engine
        self._remarks = _remarks(reports, self._throttles)
        self._streams = create_streams(_CPU)
        self._arena = HostArena(self._streams)
        stack.callback(self._arena.close)
        self.queue = TransferQueue(
            io_threads=options.threads,
            max_inflight_bytes=OffloadConfig.model_fields["max_inflight_bytes"].default,
        )
        self._buffers = Buffers(self._arena, options.block_bytes, 2 * options.threads * len(reports))
        share = _huge_page_share(self._buffers.addresses)
        if share is not None and share < _HUGE_SHARE:
            self._remarks.append(f"only {share:.0%} of our buffers are in huge pages: host memory is fragmented")

    def add_ours(self, engine: str, verify: str) -> None:
        """Open a drive a path, and stripe them."""
        sides = partial(Ours, engine, queue=self.queue, buffers=self._buffers, options=self._options, verify=verify)
        drives: list[Tier] = []
        for index in self._all:
            drives.append(self._open_tier(index, engine, verify))
            self._stack.callback(drives[-1].close)
            self._entries.append(_Entry((index,), engine, sides(drives[-1])))
        if len(drives) > 1:
            self._entries.append(_Entry(self._all, engine, sides(StripedTier(drives), adapts=True)))

    def _open_tier(self, index: int, engine: str, verify: str) -> Tier:
        report, throttle = self._reports[index], self._throttles[index]
        tier = open_drive(
            report.path,
            engine=engine,
            streams=self._streams,
            arena=self._arena,
            disk_bytes=self._options.num_blocks * round_up(self._options.block_bytes, report.alignment_bytes),
            has_checksums=verify == "checksum",
        )
        # Lent to fio: the file has no name to open it by. Of two it gets the first.
        self._files.setdefault((index, engine), tier._file.fd)
        if throttle is None:
            return tier
        return ThrottledTier(tier, write_bytes_per_second=throttle, read_bytes_per_second=throttle)

    def add_fio(self) -> None:
        """Put fio beside each of ours that is not throttled, for it has no such drive; the files are written by now."""
        program = find_fio()
        if program is None:
            self._remarks.append("fio is not installed: there is no comparison; install it with the system's packages")
            return
        block_bytes = self._options.block_bytes
        for entry in self._first_of_each_file():
            if any(self._throttles[index] is not None for index in entry.place):
                continue
            files = [(self._files[index, entry.engine], self._reports[index].supports_direct) for index in entry.place]
            try:
                program = with_working_engine(
                    program, FioJob(files[0][0], False, 0, block_bytes, files[0][1]), block_bytes
                )
            except FioError as error:
                self._drop_fio(error)
                return
            self._entries.append(_Entry(entry.place, entry.engine, Fio(program, files, self._options)))

    def _first_of_each_file(self) -> list[_Entry]:
        """Leave out the sides that differ from another in ``verify`` only: fio does the same beside both."""
        return list({(entry.place, entry.engine): entry for entry in reversed(self._entries)}.values())[::-1]

    def _drop_fio(self, error: FioError) -> None:
        self._remarks.append(f"there is no comparison: {error.message}")
        self._entries = [entry for entry in self._entries if not isinstance(entry.side, Fio)]

    def write_first(self) -> None:
        """Fill the files: what is measured later goes where bytes were before."""
        for entry in self._entries:
            if isinstance(entry.side, Ours) and entry.has_first_write:
                self._announce(entry)
                entry.first_write = entry.side.first_write()

    def go(self) -> None:
        """Visit all sides in turns: once to warm up, then each round."""
        entries = self._in_order()  # and who goes first changes
        for round_number in range(1 + self._options.rounds):
            for entry in entries if round_number % 2 else reversed(entries):
                self._announce(entry)
                if entry not in self._entries:  # fio failed meanwhile
                    continue
                try:
                    samples = entry.side.visit()
                except FioError as error:
                    self._drop_fio(error)
                    continue
                if round_number:
                    entry.visits.append(samples)
        self._progress("done", self._num_done, self._num_done)

    def _announce(self, entry: _Entry) -> None:
        num_first = sum(entry.has_first_write for entry in self._entries)
        total = num_first + len(self._entries) * (1 + self._options.rounds)
        how = f", {entry.side.verify}" if entry.side.verify != "off" else ""
        self._progress(f"{' + '.join(self._paths(entry.place))}: {entry.side.method}{how}", self._num_done, total)
        self._num_done += 1

    def _in_order(self) -> list[_Entry]:
        """Neighbours in the table, which are neighbours in time."""
        engines = list(dict.fromkeys(entry.engine for entry in self._entries))
        return sorted(self._entries, key=lambda entry: (len(entry.place), entry.place, engines.index(entry.engine)))

    def report(self) -> IoReport:
        """Compare the sides."""
        options = self._options
        fio = next((entry.side for entry in self._entries if isinstance(entry.side, Fio)), None)
        if fio is not None and fio.huge_page_bytes is not None and fio.huge_page_bytes < fio.buffer_bytes * _HUGE_SHARE:
            seen = f"{format_bytes(fio.huge_page_bytes)} of {format_bytes(fio.buffer_bytes)}"
            self._remarks.append(f"only {seen} of fio's buffers are in huge pages: it could be faster")
        places = [(index,) for index in self._all] + ([self._all] if len(self._all) > 1 else [])
        return IoReport(
            size_bytes=options.num_blocks * options.block_bytes,
            block_bytes=options.block_bytes,
            threads=options.threads,
            rounds=options.rounds,
            fio=None if fio is None else fio.how,
            remarks=tuple(self._remarks),
            places=tuple(self._place(place) for place in places),
        )

    def _paths(self, place: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self._reports[index].path for index in place)

    def _place(self, place: tuple[int, ...]) -> Place:
        entries = [entry for entry in self._in_order() if entry.place == place]
        rows = tuple(
            Row(
                method=entry.side.method,
                verify=entry.side.verify,
                how=entry.side.how,
                first_write_bytes_per_second=entry.first_write.bytes_per_second if entry.first_write else None,
                figures={direction: self._figure(entry, direction) for direction in DIRECTIONS},
            )
            for entry in entries
        )
        return Place(self._paths(place), tuple(self._throttles[index] for index in place), rows)

    def _figure(self, entry: _Entry, direction: str) -> Figure:
        rates, rate = entry.rates(direction), entry.median_rate(direction)
        costs, verify = entry.costs(direction), entry.side.verify
        fio = None if isinstance(entry.side, Fio) else self._entry(entry.place, entry.engine, Fio)
        plain = self._entry(entry.place, entry.engine, Ours) if verify != "off" else None
        alone = [self._entry((index,), entry.engine, type(entry.side), verify) for index in entry.place]
        sum_of_alone = sum(other.median_rate(direction) for other in alone if other is not None)
        return Figure(
            bytes_per_second=rate,
            cpu_milliseconds_per_gib=statistics.median(costs),
            bytes_per_second_by_round=tuple(rates),
            cpu_milliseconds_per_gib_by_round=tuple(costs),
            share_of_fio=rate / fio.median_rate(direction) if fio else None,
            median_share_of_fio=_median_ratio(rates, fio.rates(direction)) if fio else None,
            share_of_sum=rate / sum_of_alone if len(entry.place) > 1 else None,
            share_of_unverified=_median_ratio(rates, plain.rates(direction)) if plain else None,
            cpu_over_unverified=_median_ratio(costs, plain.costs(direction)) if plain else None,
        )

    def _entry(
        self, place: tuple[int, ...], engine: str, kind: type[Ours] | type[Fio], verify: str = "off"
    ) -> _Entry | None:
        found = (entry for entry in self._entries if (entry.place, entry.engine) == (place, engine))
        return next((entry for entry in found if isinstance(entry.side, kind) and entry.side.verify == verify), None)


def _median_ratio(ours: Sequence[float], other: Sequence[float]) -> float | None:
    # The clock of CPU time may not move during a small pass: such a round says nothing.
    ratios = [mine / yours for mine, yours in zip(ours, other, strict=True) if yours]
    return statistics.median(ratios) if ratios else None


# What is worth knowing


def _remarks(reports: Sequence[DirectoryReport], throttles: Sequence[int | None]) -> list[str]:
    remarks = [
        f"`{report.path}` is used through the page cache (O_DIRECT {report.direct_reason}): these are figures of memory"
        for report in reports
        if not report.supports_direct
    ]
    disks: dict[str, list[str]] = {}
    for report in reports:
        disks.setdefault(_disk_of(report.path), []).append(f"`{report.path}`")
    remarks += [
        f"{' and '.join(paths)} are on one drive ({disk}): together they are no faster than it is, whatever each "
        "reaches alone; fio on all of them at once shows what can be reached"
        for disk, paths in disks.items()
        if len(paths) > 1
    ]
    remarks += [
        f"`{report.path}` is throttled to {format_rate(throttle)} each way, as a slow drive would be; fio is not"
        for report, throttle in zip(reports, throttles, strict=True)
        if throttle is not None
    ]
    return remarks


def _disk_of(path: str) -> str:
    """Name the drive that a directory is on, as far as the system tells: partitions of one have one name."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    entry = Path("/sys/dev/block", number)
    if not entry.exists():
        return number
    found = entry.resolve()
    return found.parent.name if (found / "partition").exists() else found.name


def _huge_page_share(addresses: Sequence[int]) -> float | None:
    """Find which share of the memory around some addresses is in huge pages, or None if the system does not say."""
    try:
        lines = Path("/proc/self/smaps").read_text("ascii", errors="replace").splitlines()
    except OSError:
        return None
    sizes = {"Rss": 0, "AnonHugePages": 0}
    is_ours = False
    for line in lines:
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            begin, end = (int(bound, 16) for bound in mapping.groups())
            is_ours = any(begin <= address < end for address in addresses)
        name, _, size = line.partition(":")
        if is_ours and name in sizes:
            sizes[name] += int(size.split()[0]) * KIB
    return sizes["AnonHugePages"] / sizes["Rss"] if sizes["Rss"] else None
