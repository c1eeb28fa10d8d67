"""Runs cases of the table of faults, each in real processes, and says what came of them.

A case that the job should survive shares its processes with others of the same host; one
that should end the job has its own. Whatever a job does, it is over after a time limit,
with all its children. Mounts are made in a mount namespace of the job, so that they and
their loop devices go with its last process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from control_groups import ControlGroup, control_group, group_problem
from fault_cases import END_STEP, NUM_STEPS, PLAIN, FaultCase, Outcome, Place
from job_processes import ROOT, Finished, launcher, run_processes

__all__ = ["Ended", "Job", "Row", "judge", "loop_devices", "mount_problem", "run_cases", "wait_for_loop_devices"]

WORKER = ROOT / "tests" / "faults" / "fault_worker.py"
_SMALL_BYTES = 96 << 20  # sparse; a directory with less than 64 MiB is refused
_THIN_BYTES = 6 << 20
# What a host tier leaves to the process (`storage.memory`): it gets nothing, and the job has enough to go on.
_GROUP_BYTES = 256 << 20
_LIMIT_SECONDS = 120.0
_SECONDS_A_CASE = 20.0
_SETTLED_SECONDS = 30.0  # a job that takes longer to end hangs, whatever it does in the end
_GONE_SECONDS = 5.0
_KEPT, _MOVED = "the tensor stays in memory", "has moved the bytes"
# The last line of a traceback; torch puts the rank before it.
_LOST = re.compile(r"^(\[rank\d+\]: )?\S*\bLoadError: cannot load", re.MULTILINE)
_REFUSED = re.compile(r"^(\[rank\d+\]: )?\S*\b(Config|Storage)Error: ", re.MULTILINE)
_INTERRUPTIONS = ("EINTR", "EAGAIN")

# Positional: mount point, image, outer mount point or "", size of the outer file system; then the command.
_IN_NAMESPACE = """set -e
mount_point=$1 image=$2 outer=$3 outer_bytes=$4; shift 4
if [ -n "$outer" ]; then
  mount -t tmpfs -o size="$outer_bytes" none "$outer"
  truncate -s 128M "$image"
  mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1 -m 0 "$image"
fi
mount -t ext4 -o loop "$image" "$mount_point"
rmdir "$mount_point/lost+found"
mkdir "$mount_point/drive"
exec "$@"
"""


@dataclass
class Row:
    """What came of one case under one host.

    Attributes:
        case: What went wrong.
        host: Where.
        outcome: What was observed; None: not run, see ``remark``.
        remark: What else there is to say.
        are_equal: Gradients and losses of every step that ended, to the last bit; None: no step did.
        leftovers: What was found afterwards.
        seconds: From the first fault to the end of the step that met it, or of the job.
    """

    case: FaultCase
    host: str
    outcome: Outcome | None
    remark: str = ""
    are_equal: bool | None = False
    leftovers: list[str] = field(default_factory=list)
    seconds: float | None = None

    @property
    def is_good(self) -> bool:
        """It was skipped for a reason, or all is as it should be."""
        is_kept_instead = self.case.may_be_kept and self.outcome is Outcome.KEPT
        is_as_expected = (self.outcome is self.case.expected or is_kept_instead) and not self.leftovers
        # Who is refused at the start, or stopped in the first step, has taken no step; all others must show it.
        may_have_none = self.case.expected is Outcome.REFUSED or (self.case.ends_the_job and self.case.first_step == 0)
        has_numbers = self.are_equal or (self.are_equal is None and may_have_none)
        return self.outcome is None or (is_as_expected and bool(has_numbers))


@dataclass
class Ended:
    """A job that is over.

    Attributes:
        code: Exit code; None: it ran into its time limit.
        at: When its last process had ended, by ``time.monotonic``.
        text: What was printed, by the launcher where there is one.
        rank_texts: What each rank printed, under a launcher.
        events: What the workers wrote, see ``fault_worker``.
        leftovers: What was found afterwards.
    """

    code: int | None
    at: float
    text: str
    rank_texts: dict[int, str]
    events: list[dict[str, Any]]
    leftovers: list[str]


class Job:
    """One set of processes with its directories; everything is gone after :meth:`run`.

    Args:
        work: A directory on a drive.
        host: ``PLAIN`` or ``PIPELINE``.
        place: Where its extent files are.
        cases: Run one after the other.
    """

    def __init__(self, work: Path, host: str, place: Place, cases: Sequence[FaultCase]) -> None:
        """Make a directory of its own."""
        self.host, self.place, self.cases = host, place, cases
        self.directory = Path(tempfile.mkdtemp(dir=work))
        self.mount, self.outer = self.directory / "mount", self.directory / "outer"
        self.drive = (self.mount if place in (Place.SMALL, Place.THIN) else self.directory) / "drive"
        self.image = (self.outer if place is Place.THIN else self.directory) / "image"
        self.results = self.directory / "results"

    def run(self) -> Ended:
        """Run all cases in one set of processes."""
        for folder in (self.results, self.directory / "drive", self.mount, self.outer):
            folder.mkdir()
        with control_group(_GROUP_BYTES) if self.place is Place.GROUP else contextlib.nullcontext() as group:
            ended = self._run(group)
        shutil.rmtree(self.directory, ignore_errors=True)
        return ended

    def _run(self, group: ControlGroup | None) -> Ended:
        request = self.directory / "request.json"
        names = {"host": self.host, "cases": [case.name for case in self.cases]}
        paths = {name: str(getattr(self, name)) for name in ("drive", "mount", "outer", "image", "results")}
        places = {} if group is None else {"group": str(group.folder), "home": str(group.home)}
        request.write_text(json.dumps(names | paths | places), encoding="utf-8")
        command = self.mounted(self._command(request))
        limit_seconds = _LIMIT_SECONDS + _SECONDS_A_CASE * len(self.cases)
        log = self.directory / "log"
        finished = run_processes(command, log, limit_seconds=limit_seconds)
        return Ended(
            finished.code,
            finished.at,
            log.read_text(errors="replace"),
            {rank: _text_of_rank(self.results, rank) for rank in (0, 1)},
            list(_events(self.results)),
            self._leftovers(finished),
        )

    def _command(self, request: Path) -> list[str]:
        if self.host == PLAIN:
            return [sys.executable, str(WORKER), str(request)]
        return [*launcher(self.results), str(WORKER), str(request)]

    def mounted(self, command: list[str]) -> list[str]:
        """Put a command into a mount namespace of its own, with the job's file system, if it has one.

        Args:
            command: Program and arguments.
        """
        if self.place not in (Place.SMALL, Place.THIN):
            return command
        if self.place is Place.SMALL:
            _make_file_system(self.image)
        outer = str(self.outer) if self.place is Place.THIN else ""
        places = [str(self.mount), str(self.image), outer, str(_THIN_BYTES)]
        return ["unshare", "--mount", "--", "/bin/sh", "-c", _IN_NAMESPACE, "sh", *places, *command]

    def _leftovers(self, finished: Finished) -> list[str]:
        left = [f"process {pid}" for pid in finished.left]
        left += [f"loop device {loop}" for loop in wait_for_loop_devices(self.directory)]
        left += [f"mount {point}" for point in (self.mount, self.outer) if os.path.ismount(point)]
        folder = self.directory / "drive"
        return left + [f"file {path}" for path in folder.rglob("*") if path.is_file()]


def _make_file_system(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(_SMALL_BYTES)
    command = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", str(image)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def wait_for_loop_devices(directory: Path) -> list[str]:
    """Wait a little until no loop device has a file of a directory; list those that still have.

    Args:
        directory: Of a job that has ended. Its namespace ends a moment after its last process.
    """
    deadline = time.monotonic() + _GONE_SECONDS
    while (loops := loop_devices(directory)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return loops


def loop_devices(directory: Path) -> list[str]:
    """List the loop devices whose file is in a directory.

    Args:
        directory: Of a job.
    """
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if str(directory) in backing.read_text():
                found.append(backing.parents[1].name)
        except OSError:
            continue
    return found


def _text_of_rank(results: Path, rank: int) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(results.glob(f"*_rank{rank}.log")))


def _events(results: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(results.glob("rank*.jsonl")):
        rank = int(path.stem.removeprefix("rank"))
        for line in path.read_text().splitlines():
            try:
                yield {"rank": rank, **json.loads(line)}
            except json.JSONDecodeError:  # killed while it wrote
                continue


# What came of it


def judge(case: FaultCase, host: str, ended: Ended) -> Row:
    """Say what came of a case from what its job left.

    Args:
        case: One of the job.
        host: Of the job.
        ended: The job.
    """
    has_survived = not case.ends_the_job or (case.may_be_kept and ended.code == 0)
    return (_judge_survivor if has_survived else _judge_ended)(case, host, ended)


def _is_abort(ended: Ended) -> bool:
    """Tell whether any process died; a launcher has an exit code and a log of its own."""
    texts = (ended.text, *ended.rank_texts.values())
    has_said_so = any(words in text for text in texts for words in ("Fatal Python error", "terminate called"))
    return ended.code is not None and (ended.code < 0 or ended.code >= 128 or has_said_so)


def _judge_survivor(case: FaultCase, host: str, ended: Ended) -> Row:
    events = [event for event in ended.events if event.get("case") == case.name]
    ends = [event for event in events if event["event"] == "end"]
    if len(ends) < (1 if host == PLAIN else 2):
        if not any(event["event"] == "begin" for event in events):
            return Row(case, host, Outcome.OTHER, "not run: an earlier case ended the job")
        outcome = Outcome.HANG if ended.code is None else Outcome.ABORT if _is_abort(ended) else Outcome.OTHER
        return Row(case, host, outcome, ended.text[-1500:])
    left = [*(name for end in ends for name in end["leftovers"]), *ended.leftovers]
    row = Row(case, host, None, leftovers=left)
    steps = [event for event in events if event["event"] == "step"]
    row.are_equal = len(steps) == NUM_STEPS * len(ends) and all(event["is_equal"] for event in steps)
    row.seconds = _seconds_of_step(events)
    row.outcome = _outcome_of_survivor(case, ends, row.are_equal)
    return row


def _seconds_of_step(events: Iterable[dict[str, Any]]) -> float | None:
    """From a rank's first fault to the end of the step that met it; the longest of all ranks."""
    found = []
    began: dict[int, float] = {}
    for event in events:
        rank = event["rank"]
        if event["event"] == "fault":
            began[rank] = event["at"]
        elif event["event"] == "step" and rank in began:
            found.append(event["at"] - began.pop(rank))
    return max(found, default=None)


def _outcome_of_survivor(case: FaultCase, ends: list[dict[str, Any]], are_equal: bool) -> Outcome:
    if not any(end["num_injected"] for end in ends):
        return Outcome.UNREACHED
    if not are_equal:
        return Outcome.SILENT
    messages = "\n".join(text for end in ends for text in end["messages"])
    failures = {cause for end in ends for cause in end["failures"]}
    # Not in each step: a last stage may forward all that it has just saved.
    is_used_again = all(any(stored and loaded for stored, loaded in end["moved"][END_STEP:]) for end in ends)
    if _KEPT in messages and failures:
        return Outcome.KEPT if is_used_again else Outcome.OTHER
    if not is_used_again:
        return Outcome.SILENT
    if (_MOVED in messages and failures) or case.kind in _INTERRUPTIONS:
        return Outcome.RETRIED  # an interrupted call is made again without a word
    if case.kind == "DELAY":
        return Outcome.WAITED
    # What an engine was told must be heard of; what was done beside it need not matter.
    return Outcome.UNTOUCHED if case.kind in ("deleted", "RLIMIT_NOFILE") else Outcome.SILENT


def _judge_ended(case: FaultCase, host: str, ended: Ended) -> Row:
    steps = [event for event in ended.events if event["event"] == "step"]
    faults = [event["at"] for event in ended.events if event["event"] == "fault"]
    row = Row(case, host, None, leftovers=ended.leftovers)
    row.are_equal = all(event["is_equal"] for event in steps) if steps else None
    row.seconds = ended.at - min(faults) if faults else None
    texts = {rank: text for rank, text in ended.rank_texts.items() if text} or {0: ended.text}
    lost = [rank for rank, text in texts.items() if _LOST.search(text)]
    refused = [rank for rank, text in texts.items() if _REFUSED.search(text)]
    # The traceback leads from a line of the user to the error, and ends in the hint.
    is_clear = all(
        "Traceback" in texts[rank] and "in run\n" in texts[rank] and "hint: " in texts[rank] for rank in lost + refused
    )
    if ended.code is None or (row.seconds is not None and row.seconds > _SETTLED_SECONDS):
        row.outcome = Outcome.HANG
    elif not faults:
        row.outcome = Outcome.UNREACHED
    elif _is_abort(ended):
        row.outcome = Outcome.ABORT
    elif ended.code == 0:
        row.outcome = Outcome.SILENT
    elif (lost or refused) and is_clear:
        row.outcome = Outcome.STOPPED if lost else Outcome.REFUSED
        row.remark = _who_ended(host, lost or refused, ended.code)
    else:
        row.outcome, row.remark = Outcome.OTHER, (ended.text + "".join(texts.values()))[-1500:]
    return row


def _who_ended(host: str, ranks: list[int], code: int) -> str:
    if host == PLAIN:
        return f", exit code {code}"
    which = " and ".join(f"rank {rank}" for rank in ranks)
    return f" on {which}, the launcher ends all with exit code {code}"


# The runs


def mount_problem(work: Path) -> str | None:
    """Say why no file system can be mounted here, or None.

    Args:
        work: A directory for the attempt.
    """
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("unshare", "mount", "mkfs.ext4") if shutil.which(tool) is None]
    if missing:
        return f"`{missing[0]}` is missing"
    job = Job(work, PLAIN, Place.SMALL, ())
    job.mount.mkdir()
    try:
        command = job.mounted(["true"])
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return None if done.returncode == 0 else " ".join(done.stderr.split())[-200:]
    finally:
        shutil.rmtree(job.directory, ignore_errors=True)


def run_cases(cases: Sequence[FaultCase], host: str, work: Path) -> Iterator[Row]:
    """Run cases under one host; yield a row for each as soon as it is known.

    Args:
        cases: Of that host.
        host: ``PLAIN`` or ``PIPELINE``.
        work: A directory on a drive, for all files; what is made in it is removed.
    """
    problems = {
        "mount": mount_problem(work) if any(case.needs_mount for case in cases) else None,
        "group": group_problem() if any(case.needs_group for case in cases) else None,
    }
    survivors: dict[Place, list[FaultCase]] = {}
    left_out: list[FaultCase] = []
    for case in cases:
        problem = problems["mount"] if case.needs_mount else problems["group"] if case.needs_group else None
        if problem is not None:
            left_out.append(case)
            yield Row(case, host, None, f"not run: {problem}")
        elif not case.ends_the_job:
            survivors.setdefault(case.place, []).append(case)
    for place, together in survivors.items():
        ended = Job(work, host, place, together).run()
        yield from (judge(case, host, ended) for case in together)
    for case in cases:
        if case.ends_the_job and case not in left_out:
            yield judge(case, host, Job(work, host, case.place, [case]).run())
