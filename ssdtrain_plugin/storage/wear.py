"""How much was written to each drive on each day, over all runs of a user; and the limit of a day.

Note [The state file]. ``wear.json`` in the user's state directory (``$XDG_STATE_HOME/ssdtrain``, else
``~/.local/state/ssdtrain``) holds bytes by drive and day. All processes of a user add to it:
under a lock on ``wear.lock`` beside it, each reads, adds and puts a new file in its place. Nothing waits
long for the lock; what could not be added is added the next time. The file is a help and
no more: if it is damaged or cannot be written, training goes on, and a line says so.

A day begins at 00:00 UTC, so that it has the same length everywhere and always. The count is that of the
bytes handed to the system; what the drive makes of them is its own affair.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ssdtrain_plugin.documents import read_regular, shown
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["DriveMeter", "DriveRecord", "WearFile", "day_of", "life_line", "state_folder"]

logger = logging.getLogger(__name__)

_VERSION = 1
_KEPT_DAYS = 400
_MOST_BYTES = 16 * MIB  # a thousand drives, of all machines that share a home, with all their days
_MOST_COUNTED = 1 << 64
_RECENT_DAYS = 30
_LOCK_ATTEMPTS = 20
_LOCK_PAUSE_SECONDS = 0.05
_DAYS_OF_A_YEAR = 365.25


def day_of(seconds: float) -> str:
    """Name the day of an instant, in UTC: ``2026-11-20``.

    Args:
        seconds: Since 1970.
    """
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def state_folder(environment: Mapping[str, str]) -> Path | None:
    """Find where the state of this user belongs.

    Args:
        environment: Variables of the process.

    Returns:
        The directory, which may not exist; None if this user has no home.
    """
    base = environment.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the rule of the XDG specification: else it is ignored
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, ".local", "state")
    return Path(base) / "ssdtrain"


@dataclass(slots=True)
class DriveRecord:
    """What is known of one drive.

    Attributes:
        path: Directory on it that was used last.
        since: First day of the record.
        total_bytes: Written since then.
        days: Bytes by day; old days are dropped.
    """

    path: str
    since: str
    total_bytes: int = 0
    days: dict[str, int] = field(default_factory=dict)

    def add(self, nbytes: int, day: str) -> None:
        """Count bytes.

        Args:
            nbytes: How many.
            day: When.
        """
        self.total_bytes += nbytes
        self.days[day] = self.days.get(day, 0) + nbytes
        while len(self.days) > _KEPT_DAYS:
            del self.days[min(self.days)]

    def bytes_a_day(self) -> float:
        """Mean of the last 30 days on which anything was written."""
        recent = [self.days[day] for day in sorted(self.days)[-_RECENT_DAYS:]]
        return sum(recent) / len(recent) if recent else 0.0


def life_line(record: DriveRecord, rated_bytes: int) -> str:
    """Project the life of a drive.

    Args:
        record: Of the drive.
        rated_bytes: Endurance of the drive by its data sheet (TBW).
    """
    rate = record.bytes_a_day()
    head = f"{record.total_bytes / rated_bytes:.1%} of the rated {format_bytes(rated_bytes)} since {record.since}"
    if rate <= 0:
        return head
    days = max(0.0, rated_bytes - record.total_bytes) / rate
    left = f"{days:.0f} days" if days < 2 * _DAYS_OF_A_YEAR else f"{days / _DAYS_OF_A_YEAR:.0f} years"
    return f"{head}; the rest lasts {left} of use like the last {min(len(record.days), _RECENT_DAYS)}"


class WearFile:
    """The counts on disk: Note [The state file].

    Args:
        folder: From :func:`state_folder`.
        wait: Between attempts to get the lock (seconds).

    Attributes:
        path: Of the file.
    """

    def __init__(self, folder: Path, *, wait: Callable[[float], None] = time.sleep) -> None:
        """Touch nothing yet."""
        self.path = folder / "wear.json"
        self._wait = wait

    def read(self) -> dict[str, DriveRecord]:
        """Read all records, by the identity of the drive; none if there is no file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged.
        """
        try:
            data = read_regular(self.path, max_bytes=_MOST_BYTES, flags=os.O_NOFOLLOW)
        except FileNotFoundError:
            return {}
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                kind = "a link" if error.errno == errno.ELOOP else "a directory"
                raise ValueError(f"{kind}, expected a file") from None
            raise
        if data is None or len(data) > _MOST_BYTES:
            what = "a pipe or a device" if data is None else "too large"
            raise ValueError(f"{what}, expected a file of at most {format_bytes(_MOST_BYTES)}")
        try:
            content = json.loads(data.decode("utf-8"))
            if content["version"] != _VERSION:
                raise ValueError(f"version {shown(content['version'])}, expected {_VERSION}")
            return {str(key): _record_of(value) for key, value in content["drives"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not what was written: {error!r}") from error
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def add(self, identity: str, path: str, written: Mapping[str, int]) -> tuple[DriveRecord, str | None]:
        """Add bytes; a damaged file is put aside and a new one begun.

        Args:
            identity: Of the drive.
            path: A directory on it.
            written: Bytes by day, at least one.

        Returns:
            The record of the drive, and what a user should know about the file, or None.

        Raises:
            OSError: It cannot be written, or the lock is not to be had. Nothing was added.
        """
        remark = None
        self.path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        with self._locked():
            try:
                records = self.read()
            except ValueError as error:
                aside = self.path.with_name("wear.json.damaged")
                os.replace(self.path, aside)
                records, remark = {}, f"`{self.path}` is damaged ({error}); kept as `{aside}`, counting starts anew"
            record = records.setdefault(identity, DriveRecord(path, min(written)))
            record.path = path
            for day, nbytes in written.items():
                record.add(nbytes, day)
            self._replace(records)
        return record, remark

    def _replace(self, records: Mapping[str, DriveRecord]) -> None:
        drives = {
            identity: {"path": each.path, "since": each.since, "total_bytes": each.total_bytes, "days": each.days}
            for identity, each in records.items()
        }
        text = json.dumps({"version": _VERSION, "drives": drives}, indent=1)
        new = self.path.with_name(f"wear.json.{secrets.token_hex(8)}")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(new, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path.with_name("wear.lock"), flags, 0o600)
        try:
            for attempt in range(_LOCK_ATTEMPTS):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == _LOCK_ATTEMPTS - 1:
                        raise
                    self._wait(_LOCK_PAUSE_SECONDS)
            yield
        finally:
            os.close(fd)


def _is_day(name: str) -> bool:
    try:
        return datetime.date.fromisoformat(name).isoformat() == name
    except ValueError:
        return False


def _record_of(value: Mapping[str, object]) -> DriveRecord:
    path, since, total_bytes, days = value["path"], value["since"], value["total_bytes"], value["days"]
    if not isinstance(path, str) or not isinstance(since, str) or not isinstance(days, dict):
        raise TypeError("a record has other fields")
    if not all(isinstance(number, int) and 0 <= number <= _MOST_COUNTED for number in (total_bytes, *days.values())):
        raise TypeError("a number is not a count of bytes")
    if len(days) > _KEPT_DAYS or not all(map(_is_day, (since, *days))):
        raise TypeError("a day is none, or there are too many")
    return DriveRecord(path, since, int(str(total_bytes)), {str(day): nbytes for day, nbytes in days.items()})


class DriveMeter:
    """What this process writes to one directory, and whether its drive has had enough for today.

    Args:
        identity: Of the drive, from :func:`ssdtrain_plugin.storage.drive_identity.identity_of`.
        path: The directory.
        folder: From :func:`state_folder`; None: nothing is kept over runs.
        limit_bytes: Of a day, over all processes of the user; or None.
        rated_bytes: Endurance of the drive (TBW), or None.
        clock: Seconds since 1970.

    Threads:
        Any.
    """

    def __init__(
        self,
        identity: str,
        path: str,
        *,
        folder: Path | None,
        limit_bytes: int | None = None,
        rated_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Read what was written before."""
        self._identity = identity
        self._path = path
        self._limit_bytes = limit_bytes
        self._rated_bytes = rated_bytes
        self._clock = clock
        # Reentrant: a collection inside may run a finalizer that comes here again.
        self._lock = threading.RLock()
        self._pending: Counter[str] = Counter()  # bytes by day that the record has not
        self._unsaved: Counter[str] = Counter()  # that the record has, and the file has not
        self._record = DriveRecord(path, self._today())
        self._warned_day = ""
        self._has_complained = False
        self._file = None if folder is None else WearFile(folder)
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):  # the first flush will say it
                self._record = self._file.read().get(identity, self._record)

    def _today(self) -> str:
        return day_of(self._clock())

    def _written_today(self) -> int:
        return self._record.days.get(self._today(), 0) + self._pending[self._today()]

    def add(self, nbytes: int) -> None:
        """Count bytes that were written; say once a day that the limit is reached.

        Args:
            nbytes: How many.

        Threads:
            Workers, with no lock held.
        """
        with self._lock:
            today = self._today()
            self._pending[today] += nbytes
            if not self.is_at_limit or self._warned_day == today:
                return
            self._warned_day = today
        logger.warning(
            "`daily_write_limit` of %s is reached for the drive of `%s`: tensors stay in memory until 00:00 UTC",
            format_bytes(self._limit_bytes or 0),
            self._path,
        )

    @property
    def is_at_limit(self) -> bool:
        """Whether nothing more should be written today."""
        if self._limit_bytes is None:
            return False
        with self._lock:
            return self._written_today() >= self._limit_bytes

    def flush(self) -> None:
        """Add what was written since the last time to the file, and learn what others have added. Never fails."""
        with self._lock:
            for day, nbytes in self._pending.items():
                self._record.add(nbytes, day)  # here too: the file may not take it
            written = self._pending + self._unsaved
            self._pending, self._unsaved = Counter(), Counter()
        if not written:
            return
        if self._file is None:
            self._complain("this user has no home directory")
            return
        try:
            record, remark = self._file.add(self._identity, self._path, written)
        except OSError as error:
            self._unsaved += written
            self._complain(f"`{self._file.path}`: {error.strerror}")
            return
        with self._lock:
            self._record = record
        if remark is not None:
            logger.warning("%s", remark)

    def _complain(self, reason: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.warning(
                "what is written to the drive of `%s` is not recorded over runs (%s); hint: let `XDG_STATE_HOME` name "
                "a writable directory; training is not affected",
                self._path,
                reason,
            )

    def line(self) -> str:
        """Say in a few words what was written, and how long the drive lasts at that rate."""
        with self._lock:
            written_today = self._written_today()
            record = DriveRecord(self._path, self._record.since, self._record.total_bytes, dict(self._record.days))
            for day, nbytes in self._pending.items():
                record.add(nbytes, day)
        limit = "" if self._limit_bytes is None else f" of {format_bytes(self._limit_bytes)}"
        words = f"{format_bytes(written_today)}{limit} written today"
        return words if self._rated_bytes is None else f"{words}, {life_line(record, self._rated_bytes)}"
