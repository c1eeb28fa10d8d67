"""The rows of the table of faults: what goes wrong, which way, and what must come of it. Imports nothing heavy."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = [
    "ALL_CASES",
    "BAD",
    "END_STEP",
    "FIRST_STEP",
    "NUM_STEPS",
    "PIPELINE",
    "PLAIN",
    "FaultCase",
    "Outcome",
    "Place",
]

PLAIN, PIPELINE = "plain", "DeepSpeed PP=2"

# Step 0 goes well. A fault begins in a later one and ends, so that the last steps show the drive in use again.
FIRST_STEP, END_STEP, NUM_STEPS = 1, 3, 9


class Outcome(enum.Enum):
    """What came of a fault, as it was observed."""

    KEPT = "kept in memory; the drive is used again afterwards"
    RETRIED = "tried again, moved"
    WAITED = "waited for"
    UNTOUCHED = "goes on, the drive stays in use"
    STOPPED = "`LoadError`"
    REFUSED = "refused at the start, with a hint"
    SILENT = "silent"
    HANG = "hang"
    ABORT = "abort"
    OTHER = "another error"
    UNREACHED = "not reached"


BAD = frozenset({Outcome.SILENT, Outcome.HANG, Outcome.ABORT, Outcome.OTHER, Outcome.UNREACHED})


class Place(enum.Enum):
    """What the directory of the extent file is, and what is around the job."""

    DIRECTORY = "a directory"
    SMALL = "a loop-mounted ext4"
    THIN = "a loop-mounted ext4 whose backing file cannot grow"
    GROUP = "a directory; a control group is there to go into"


@dataclass(frozen=True)
class FaultCase:
    """One fault in one direction.

    Attributes:
        fault: Name for the table.
        direction: ``store``, ``load`` or ``both``.
        calls: Which calls of the engine get it, in words; for real faults what is done.
        expected: What must come of it.
        kind: Of ``FaultKind``, or the real thing that ``fault_hosts`` does.
        first: Number of the first call concerned, after the fault has begun.
        count: How many calls from there on; None: all.
        every: The same again so many calls later; None: once.
        first_step: In which step it begins.
        place: Where the extent file is.
        options: Of the config.
        ranks: Which ranks of a pipeline have it; None: all.
        hosts: Under which hosts it is run.
        may_be_kept: It is as good if all stores concerned fail and the job goes on: the order of sizes decides.
    """

    fault: str
    direction: str
    calls: str
    expected: Outcome
    kind: str
    first: int = 0
    count: int | None = None
    every: int | None = None
    first_step: int = FIRST_STEP
    place: Place = Place.DIRECTORY
    options: tuple[tuple[str, object], ...] = ()
    ranks: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = (PLAIN, PIPELINE)
    may_be_kept: bool = False

    @property
    def name(self) -> str:
        """Names the case in requests and results."""
        ranks = "" if self.ranks is None else f", rank {self.ranks[0]}"
        return f"{self.fault}, {self.direction}, {self.calls}{ranks}"

    @property
    def ends_the_job(self) -> bool:
        """The process is expected to end with an error, so it needs one of its own."""
        return self.expected in (Outcome.STOPPED, Outcome.REFUSED)

    @property
    def needs_mount(self) -> bool:
        """Only root can run it, where there are loop devices."""
        return self.place in (Place.SMALL, Place.THIN)

    @property
    def needs_group(self) -> bool:
        """It can be run only where control groups can be made."""
        return self.place is Place.GROUP


_ERRORS = ("EIO", "ENOSPC", "EINTR", "EAGAIN", "EACCES")
_LOUD = (("short", "SHORT"), *((name, name) for name in _ERRORS))
_SILENT = (("flipped bit", "FLIPPED_BIT"), ("torn block", "TORN_BLOCK"), ("stale extent", "STALE"))
_ONE_THREAD = (("io_threads", 1), ("prefetch_bytes", 4096))  # so that the next attempt is the next call
_CHECKED = (("verify", "checksum"),)
_HOST = (("host_bytes", "512 MiB"),)  # more than the limit of the control group
_IMPATIENT = (("io_timeout_seconds", 0.2),)
_EVERY = "every call"
_SEVENTH = "every 7th call"


def _stores() -> list[FaultCase]:
    kept = [FaultCase(name, "store", _EVERY, Outcome.KEPT, kind) for name, kind in _LOUD]
    retried = [
        FaultCase(name, "store", _SEVENTH, Outcome.RETRIED, kind, count=1, every=7, options=_ONE_THREAD)
        for name, kind in _LOUD
        if kind in ("SHORT", "EINTR", "EAGAIN")
    ]
    return [
        *kept,
        *retried,
        FaultCase("hung call", "store", "one call", Outcome.KEPT, "HANG", first=3, count=1, options=_IMPATIENT),
        FaultCase("hung call", "store", _EVERY, Outcome.KEPT, "HANG", options=_IMPATIENT),
        FaultCase("delay of 20 ms", "store", _SEVENTH, Outcome.WAITED, "DELAY", count=1, every=7),
        *(FaultCase(name, "store", _EVERY, Outcome.STOPPED, kind, options=_CHECKED) for name, kind in _SILENT),
    ]


def _loads() -> list[FaultCase]:
    retried = [
        FaultCase(name, "load", _SEVENTH, Outcome.RETRIED, kind, count=1, every=7, options=_ONE_THREAD + _CHECKED)
        for name, kind in (*_LOUD, *_SILENT)
    ]
    # The rank of a pipeline that fails: the first, which computes no loss; for one fault also the last.
    lost = [
        FaultCase(name, "load", _EVERY, Outcome.STOPPED, kind, options=_CHECKED, ranks=(0,))
        for name, kind in (*_LOUD, *_SILENT)
    ]
    return [
        *retried,
        FaultCase("delay of 20 ms", "load", _SEVENTH, Outcome.WAITED, "DELAY", count=1, every=7),
        *lost,
        FaultCase("EIO", "load", _EVERY, Outcome.STOPPED, "EIO", options=_CHECKED, ranks=(1,), hosts=(PIPELINE,)),
        FaultCase("hung call", "load", _EVERY, Outcome.STOPPED, "HANG", options=_IMPATIENT, ranks=(0,)),
    ]


def _real() -> list[FaultCase]:
    small = (("disk_bytes", "256 MiB"),)
    return [
        FaultCase(
            "file system full", "store", "a small ext4 fills", Outcome.KEPT, "full", first_step=0, place=Place.SMALL,
            options=small,
        ),
        # A loop device calls a write complete of which its file took only a part. Where that happens, which depends
        # on the order of sizes, nobody but a checksum can tell.
        FaultCase(
            "drive has no blocks left", "store", "the file behind a loop device cannot grow", Outcome.KEPT, "thin",
            first_step=0, place=Place.THIN, options=_CHECKED + small, hosts=(PLAIN,),
        ),
        FaultCase(
            "drive has no blocks left", "both", "the same, and the device takes a part and says all", Outcome.STOPPED,
            "thin", first_step=0, place=Place.THIN, options=_CHECKED + small, ranks=(0,), hosts=(PIPELINE,),
            may_be_kept=True,
        ),
        FaultCase(
            "drive loses its bytes", "load", "the file behind a loop device is truncated", Outcome.STOPPED,
            "truncated", place=Place.SMALL, options=_CHECKED + small,
        ),
        FaultCase("directory deleted", "both", "`rmdir` while training", Outcome.UNTOUCHED, "deleted"),
        FaultCase("RLIMIT_FSIZE", "store", "64 KiB from step 1 on", Outcome.KEPT, "RLIMIT_FSIZE"),
        FaultCase("RLIMIT_NOFILE", "both", "no more files from step 1 on", Outcome.UNTOUCHED, "RLIMIT_NOFILE"),
        FaultCase("RLIMIT_NOFILE", "both", "no more files before the start", Outcome.REFUSED, "no files"),
        # The ranks of a pipeline would share the group, and one of them says it all.
        FaultCase(
            "cgroup memory limit", "store", "the limit falls before step 0; little disk", Outcome.KEPT, "group",
            first_step=0, place=Place.GROUP, options=(*_HOST, ("disk_bytes", "128 KiB")), hosts=(PLAIN,),
        ),
        FaultCase(
            "cgroup memory limit", "both", "below `host_bytes` at the start", Outcome.REFUSED, "small group",
            place=Place.GROUP, options=_HOST, hosts=(PLAIN,),
        ),
    ]  # fmt: skip


ALL_CASES: tuple[FaultCase, ...] = (*_stores(), *_loads(), *_real())
