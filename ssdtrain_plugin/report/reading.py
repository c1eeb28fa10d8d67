"""Reads the statistics and the events of all ranks of a run. A line that is damaged is named and left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.events import (
    Event,
    InstructionEvent,
    MemoryEvent,
    PassEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    TransferEvent,
    WaitEvent,
)
from ssdtrain_plugin.stats import StepStats
from ssdtrain_plugin.units import LARGEST_BYTES, MIB, format_bytes

__all__ = ["RankRecord", "Run", "read_files", "read_run"]

_NAME = re.compile(r"rank(\d+)(\.trace)?\.jsonl")
_STEPS: TypeAdapter[StepStats] = TypeAdapter(StepStats)
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])

# Of a file that is no JSON at all, only so many lines are named.
_NAMED_PROBLEMS = 20

# A file that is no text at all may be one line of gigabytes.
_LONGEST_LINE_BYTES = 4 * MIB
_LARGEST_SECONDS = 1e15
_NAMED_DIGITS = 30

Line = TypeVar("Line")


@dataclass(slots=True)
class RankRecord:
    """What one rank wrote. Times of events are as they stand in the file.

    Attributes:
        rank: Global rank.
        steps: In their order.
        start: When it began to record; None if it did not.
        passes: And so on: the events of each kind, in the order in which they were written.
    """

    rank: int
    steps: list[StepStats] = field(default_factory=list)
    start: StartEvent | None = None
    passes: list[PassEvent] = field(default_factory=list)
    instructions: list[InstructionEvent] = field(default_factory=list)
    saves: list[SaveEvent] = field(default_factory=list)
    transfers: list[TransferEvent] = field(default_factory=list)
    waits: list[WaitEvent] = field(default_factory=list)
    memory: list[MemoryEvent] = field(default_factory=list)
    traced_steps: list[StepEvent] = field(default_factory=list)

    @property
    def offset_seconds(self) -> float:
        """Seconds between the clock of this rank's events and 1970."""
        return 0.0 if self.start is None else self.start.wall_seconds - self.start.clock_seconds


@dataclass(slots=True)
class Run:
    """All ranks of a run.

    Attributes:
        directory: Where it was read.
        ranks: In the order of their numbers; at least one.
        problems: What could not be read, one line each.
        num_earlier: Runs in the same files before this one, which are left out.
        origin_seconds: When the first recorded step of any rank began, since 1970; 0 if none was.
    """

    directory: Path
    ranks: list[RankRecord]
    problems: list[str]
    num_earlier: int = 0
    origin_seconds: float = 0.0

    def seconds_of(self, rank: RankRecord, clock_seconds: float) -> float:
        """Put a time of one rank on the time line of all.

        Args:
            rank: Of this run.
            clock_seconds: Of one of its events.

        Returns:
            Seconds since ``origin_seconds``.
        """
        # The two large numbers are subtracted first: their difference is exact to less than a microsecond.
        return clock_seconds + (rank.offset_seconds - self.origin_seconds)

    @property
    def traced(self) -> list[RankRecord]:
        """The ranks that have recorded at least one whole step."""
        return [rank for rank in self.ranks if rank.traced_steps]


def read_run(directory: str | Path) -> Run:
    """Read what the option ``stats_path`` had all ranks write.

    The files are looked for in the directory, or else in the directories in it, one for
    each node.

    Args:
        directory: The value of ``stats_path``.

    Raises:
        ConfigError: There is no directory, no file, no line that can be used, or a rank twice.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise _unusable(folder, "no such directory (expected the one of `stats_path`)")
    files = _files(folder.iterdir()) or _files(folder.glob("*/*"))
    if not any(not is_trace for _, is_trace, _ in files):
        raise _unusable(folder, "no file `rank<N>.jsonl` (expected one a rank)")
    return _read(folder, files)


def read_files(paths: Sequence[str | Path]) -> Run:
    """Read the statistics of some ranks, and the events that lie beside them.

    Args:
        paths: Files of JSON lines, one a rank, under any name. A trace is looked for as ``<name>.trace.jsonl``.

    Raises:
        ConfigError: A file is missing or has no line that can be used, or a rank is there twice.
    """
    files: list[tuple[int, bool, Path]] = []
    for path in map(Path, paths):
        problems: list[str] = []
        if not path.is_file():
            raise _unusable(path, "no such file (expected one of `stats_path`, or its directory)")
        first = next(_lines(path, _STEPS, problems), None)
        if first is None:
            raise _unusable(path, f"no finished step (expected at least one){_first_of(problems)}")
        files.append((first.rank, False, path))
        trace = path.with_name(f"{path.stem}.trace.jsonl")
        if trace.is_file():
            files.append((first.rank, True, trace))
    return _read(Path(paths[0]).parent, sorted(files))


def _read(folder: Path, files: Sequence[tuple[int, bool, Path]]) -> Run:
    seen: dict[tuple[int, bool], Path] = {}
    problems: list[str] = []
    records: dict[int, RankRecord] = {}
    num_earlier = 0
    for rank, is_trace, path in files:
        if (rank, is_trace) in seen:
            other = seen[rank, is_trace]
            raise _unusable(folder, f"rank {rank} twice: `{other}` and `{path}` (expected the files of one run)")
        seen[rank, is_trace] = path
        record = records.setdefault(rank, RankRecord(rank))
        if is_trace:
            _take_events(record, _lines(path, _EVENTS, problems))
        else:
            num_earlier = max(num_earlier, _take_steps(record, _lines(path, _STEPS, problems)))
    ranks = [records[rank] for rank in sorted(records)]
    if not any(record.steps for record in ranks):
        raise _unusable(folder, f"no finished step in {len(files)} files (expected at least one){_first_of(problems)}")
    begins = [record.traced_steps[0].begin + record.offset_seconds for record in ranks if record.traced_steps]
    return Run(folder, ranks, problems, num_earlier, min(begins, default=0.0))


def _first_of(problems: Sequence[str]) -> str:
    return "".join(f"; {problem}" for problem in problems[:1])


def _unusable(folder: Path, problem: str) -> ConfigError:
    hint = "train with the option `stats_path`, and `trace_steps` for time lines; then name that directory"
    return ConfigError(f"`{folder}`", [problem], hint=hint)


def _files(paths: Iterator[Path]) -> list[tuple[int, bool, Path]]:
    found = []
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is not None and path.is_file():
            found.append((int(match.group(1)), match.group(2) is not None, path))
    return sorted(found)


def _lines(path: Path, adapter: TypeAdapter[Line], problems: list[str]) -> Iterator[Line]:
    num_problems = 0
    with _opened(path) as file:
        for number, text in enumerate(_bounded_lines(file), 1):
            if not text.strip():
                continue
            try:
                yield adapter.validate_python(_parsed(text))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"]))
                reason = f"{where}: {first['msg']}" if where else str(first["msg"])
            except (ValueError, RecursionError) as error:
                # A process that was killed leaves half a line at the end.
                is_cut = not text.endswith(b"\n") and not _is_too_long(text)
                reason = "cut off" if is_cut else f"not JSON: {error}"
            else:
                continue
            num_problems += 1
            if num_problems <= _NAMED_PROBLEMS:
                problems.append(f"{path.name}, line {number}: left out ({reason})")
    if num_problems > _NAMED_PROBLEMS:
        problems.append(f"{path.name}: {num_problems - _NAMED_PROBLEMS} more lines left out")


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unusable(path, f"{error.strerror} (expected a file that can be read)") from None


def _bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Read line by line; a line that is too long is one without an end of line, and what is left of it is skipped."""
    while text := file.readline(_LONGEST_LINE_BYTES):
        yield text
        while _is_too_long(text):
            text = file.readline(_LONGEST_LINE_BYTES)


def _is_too_long(text: bytes) -> bool:
    return len(text) == _LONGEST_LINE_BYTES and not text.endswith(b"\n")


def _parsed(text: bytes) -> Any:
    if _is_too_long(text):
        raise ValueError(f"longer than {format_bytes(_LONGEST_LINE_BYTES)}")
    return json.loads(text, parse_constant=_refuse, parse_int=_whole, parse_float=_real)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant[:_NAMED_DIGITS]} is no number that we write")


def _whole(text: str) -> int:
    if len(text) > len(str(LARGEST_BYTES)) or abs(int(text)) > LARGEST_BYTES:
        _refuse(text)
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_NAMED_DIGITS]} is no finite number")
    if abs(value) > _LARGEST_SECONDS:
        _refuse(text)
    return value


def _take_steps(record: RankRecord, steps: Iterator[StepStats]) -> int:
    """Take the last run of a file to which several were appended; return how many came before."""
    num_earlier = 0
    for step in steps:
        if record.steps and step.step <= record.steps[-1].step:
            num_earlier += 1
            record.steps.clear()
        record.steps.append(step)
    return num_earlier


def _take_events(record: RankRecord, events: Iterator[Event]) -> None:
    places: dict[type[Any], list[Any]] = {}
    for event in events:
        if isinstance(event, StartEvent):
            record.start = event
            places = {
                PassEvent: record.passes,
                InstructionEvent: record.instructions,
                SaveEvent: record.saves,
                TransferEvent: record.transfers,
                WaitEvent: record.waits,
                MemoryEvent: record.memory,
                StepEvent: record.traced_steps,
            }
            for place in places.values():
                place.clear()
        elif places:  # without the start it cannot be said when anything was
            places[type(event)].append(event)
