"""A drive as a tier: one extent file, and an engine that moves its bytes.

Every byte count is checked and every ``OSError`` is mapped here, once, whatever the
engine. It knows bytes and offsets; when to move them is the transfer queue's business.

Note [Aligned or staged]. O_DIRECT wants memory, offset and length aligned. Extents
are padded, so offset and length always can be. Where the engine can move a tensor's
bytes where they lie, it does; else, and for the last bytes of an odd length, they go
through staging memory of the engine. Padding never runs over memory that may belong
to somebody else.

Note [What is checked]. With checksums, the bytes are hashed where the engine takes them
from and where it has put them: in staging memory, or where they lie. So all that the
engine, the file system and the drive do to them is covered, and a copy between device
and staging memory is not.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssdtrain_plugin.errors import CapacityError, LoadError, StateError, StorageError, StoreError
from ssdtrain_plugin.frames import without_frames
from ssdtrain_plugin.storage.base import Engine, Extent, Rates, Tier
from ssdtrain_plugin.storage.checksums import Checksums, Digest
from ssdtrain_plugin.storage.eraser import Eraser
from ssdtrain_plugin.storage.extent_file import FULL, ExtentFile, cannot_create
from ssdtrain_plugin.storage.extents import round_up
from ssdtrain_plugin.storage.posix import length_alignment
from ssdtrain_plugin.storage.probe import DirectoryReport, probe_directory
from ssdtrain_plugin.storage.retries import Attempts, Retries, ShortTransferError
from ssdtrain_plugin.storage.tally import Tally
from ssdtrain_plugin.storage.wear import DriveMeter
from ssdtrain_plugin.streams import DeviceEvent, Streams
from ssdtrain_plugin.units import GIB, MIB, format_bytes

__all__ = ["DriveTier"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * MIB
_CALL_BYTES = GIB
_MOST_SURVIVED = 64  # of the failures that nobody has taken yet

CreateEngine = Callable[[int, DirectoryReport], Engine]
"""Builds the engine for a descriptor and what is known of its directory."""


class DriveTier(Tier):
    """One extent file in one directory.

    Args:
        path: A directory on the drive.
        create_engine: Builds what moves the bytes.
        streams: Copy between device and staging memory.
        disk_bytes: Bound on the file, or None for the space free now minus 5 %.
        has_checksums: Hash what is stored, and compare at each load: Note [What is checked].
        retries: How patient to be with calls that fail.

    Raises:
        StorageError: No file can be created in the directory.
        EnvironmentUnsupportedError: The engine does not work here.
    """

    name = "ssd"

    def __init__(
        self,
        path: str,
        *,
        create_engine: CreateEngine,
        streams: Streams,
        disk_bytes: int | None = None,
        has_checksums: bool = False,
        retries: Retries | None = None,
    ) -> None:
        """Probe the directory and open the extent file, empty."""
        self._path = path
        self._streams = streams
        try:
            self._report = probe_directory(path)
        except OSError as error:
            raise cannot_create(path, error) from error
        self._file = ExtentFile(self._report, disk_bytes)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._file.close)
            self._engine = create_engine(self._file.fd, self._report)
            on_failure.pop_all()
        if not self._report.supports_direct:
            logger.warning(
                "`%s` is used through the page cache (O_DIRECT %s); hint: choose a directory on ext4 or xfs on a drive",
                path,
                self._report.direct_reason,
            )
        self._length_alignment = length_alignment(self._report)
        self._writes, self._reads = Tally(), Tally()
        self._checksums = Checksums() if has_checksums else None
        self._retries = retries or Retries()
        self._survived: deque[StorageError] = deque(maxlen=_MOST_SURVIVED)
        self._eraser: Eraser | None = None
        self._meter: DriveMeter | None = None

    def zero_what_is_freed(self) -> None:
        """Overwrite with zeros what is freed from now on, and at the end what is left. Before the first store."""
        self._eraser = self._eraser or Eraser(self._file, count=self._count, on_end=self._close_engine_if_unused)

    def give_up_after(self, timeout_seconds: float) -> None:
        """Bound how long the system may take to change the size of the file; else it may take for ever.

        Args:
            timeout_seconds: As for transfers.
        """
        self._file.give_up_after(timeout_seconds)

    def meter_writes(self, meter: DriveMeter) -> None:
        """Count what is written, and refuse stores at the limit of the day. Before the first store.

        Args:
            meter: Of the drive.
        """
        self._meter = meter

    def _count(self, nbytes: int) -> None:
        if self._meter is not None:
            self._meter.add(nbytes)

    @property
    def is_at_write_limit(self) -> bool:
        """Whether the limit of the day is reached."""
        return self._meter is not None and self._meter.is_at_limit

    def path_of(self, extent: Extent) -> str:
        """Name the directory."""
        return self._path

    @property
    def report(self) -> DirectoryReport:
        """What the directory can do."""
        return self._report

    @property
    def is_direct(self) -> bool:
        """The page cache is bypassed."""
        return self._report.supports_direct

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now."""
        return self._file.used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes left of the budget; the drive may have less."""
        return self._file.free_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes taken from the drive."""
        return self._file.file_bytes

    def describe(self) -> str:
        """Name directory, file system, engine and capacity in one line."""
        limit = format_bytes(self._file.limit_bytes)
        checked = "" if self._checksums is None else ", checksums"
        checked += "" if self._eraser is None else ", zeros over what is freed"
        worn = "" if self._meter is None else f", {self._meter.line()}"
        engine = f"{self._engine.describe()}{checked}"
        return f"ssd: `{self._path}` ({self._report.file_system}), {engine}, up to {limit}{worn}"

    def allocate(self, nbytes: int) -> Extent:
        """Reserve room, growing the file if need be; see :meth:`Tier.allocate`."""
        if self.is_at_write_limit:
            raise CapacityError(
                f"cannot store activation: {format_bytes(nbytes)} to `{self._path}` (`daily_write_limit` is reached)",
                path=self._path,
                nbytes=nbytes,
                hint="raise `daily_write_limit`, or wait until tomorrow; the tensor stays in memory meanwhile",
            )
        return self._file.allocate(nbytes)

    def write(self, extent: Extent, source: Tensor, ready: DeviceEvent) -> None:
        """Write all of ``source``; see :meth:`Tier.write`."""
        with self._transfer(extent, source, StoreError):
            digest = None if self._checksums is None else Digest()
            begin = self._engine.in_place_bytes(source)
            if begin:
                ready.synchronize()
                self._digest(digest, source, begin)
                self._move(StoreError, extent, source, 0, begin)
            if begin < extent.nbytes:
                self._write_staged(extent, source, begin, ready, digest)
            if self._checksums is not None and digest is not None:
                self._checksums.remember(extent, digest.value)

    def read(self, extent: Extent, target: Tensor, ready: DeviceEvent) -> DeviceEvent:
        """Read all of ``extent``, again if its checksum is wrong; see :meth:`Tier.read`."""
        with self._transfer(extent, target, LoadError):
            if self._checksums is None:
                return self._read(extent, target, ready, None)
            expected = self._checksums.expected(extent)
            failure: StorageError | None = None
            for pause_seconds in (None, *self._retries.checksum_pauses_seconds):
                if pause_seconds is not None:
                    self._retries.wait(pause_seconds)
                digest = Digest()
                event = self._read(extent, target, ready, digest)
                if digest.value == expected:
                    if failure is not None:
                        self._survived.append(failure)
                    return event
                reason = f"checksum {digest.value:016x}, expected {expected:016x}"
                failure = self._failure(LoadError, extent, extent.offset, extent.nbytes, reason, None)
            raise failure or StateError("a read ended without having been tried")

    def free(self, extent: Extent) -> None:
        """Give an extent back; its bytes in the file are used again."""
        if self._checksums is not None:
            self._checksums.forget(extent)  # before another extent may begin there
        if self._eraser is None:
            self._file.free(extent)
        else:
            self._eraser.free(extent)

    def hangs(self, extent: Extent) -> bool:
        """Leave the file as long as it is until the transfer returns; see :meth:`Tier.hangs`."""
        self._file.hangs(extent)
        return True

    def take_survived(self) -> list[StorageError]:
        """Take the failures of no consequence, and those made good; see :meth:`Tier.take_survived`."""
        return [self._survived.popleft() for _ in range(len(self._survived))]

    def take_rates(self) -> Rates:
        """Tell how fast the engine was; copies to and from staging memory are not in it."""
        return Rates(self._writes.take(), self._reads.take())

    def trim(self) -> None:
        """Give back space that was not in use for long, and note down what was written; see :meth:`Tier.trim`."""
        if self._meter is not None:
            self._meter.flush()
        try:
            self._file.trim()
        except StorageError as error:
            self._survived.append(without_frames(error))

    def close(self) -> None:
        """Let file and space go, at once, with the end of the last transfer, or once all is zero (`zero_on_free`)."""
        self._file.close()
        if self._eraser is not None:
            self._eraser.close()
        if self._meter is not None:
            self._meter.flush()
        self._close_engine_if_unused()

    def _close_engine_if_unused(self) -> None:
        if self._file.is_unused:
            self._engine.close()

    # Transfers

    @contextlib.contextmanager
    def _transfer(self, extent: Extent, tensor: Tensor, kind: type[StorageError]) -> Iterator[None]:
        """Hold the file open for one transfer, and map the lack of staging memory."""
        if tensor.numel() != extent.nbytes or tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            raise StateError(
                f"a transfer of {extent.nbytes} bytes was given a tensor of {tensor.numel()} {tensor.dtype} "
                "(expected as many, uint8, contiguous)"
            )
        with self._file.transfer(extent) as is_open:
            if not is_open:
                raise self._failure(kind, extent, extent.offset, extent.nbytes, "the tier is closed", None)
            try:
                yield
            except CapacityError as error:
                reason = f"no staging memory: {error.message}"
                raise self._failure(kind, extent, extent.offset, extent.nbytes, reason, error.errno) from error
        self._close_engine_if_unused()

    @contextlib.contextmanager
    def _staging(self, count: int, nbytes: int) -> Iterator[list[Tensor]]:
        """Lend ``count`` blocks of at least ``nbytes`` host memory that the engine moves whole.

        The list is emptied at the end: the frames that an exception keeps alive would
        keep the blocks too. So no local variable may name one.
        """
        blocks: list[Tensor] = []
        try:
            for _ in range(count):
                blocks.append(self._engine.staging(nbytes))
            yield blocks
        finally:
            blocks.clear()

    def _chunks(self, extent: Extent, begin: int) -> list[tuple[int, int]]:
        """Cut ``begin`` to the end of the extent in pieces of one staging block."""
        starts = range(begin, extent.nbytes, _CHUNK_BYTES)
        return [(start, min(start + _CHUNK_BYTES, extent.nbytes)) for start in starts]

    def _digest(self, digest: Digest | None, memory: Tensor, nbytes: int) -> None:
        """Add the first bytes of ``memory`` to a digest, if there is one; by way of staging memory from a device."""
        if digest is None:
            return
        memory = memory[:nbytes]
        if memory.is_cpu:
            digest.update(memory)
            return
        with self._staging(1, min(memory.numel(), _CHUNK_BYTES)) as blocks:
            for part in memory.split(_CHUNK_BYTES):
                # All that this part waits for has happened: its bytes were, or are about to be, moved.
                self._streams.copy_to_host(blocks[0][: part.numel()], part, DeviceEvent()).synchronize()
                digest.update(blocks[0][: part.numel()])

    def _write_staged(
        self, extent: Extent, source: Tensor, begin: int, ready: DeviceEvent, digest: Digest | None
    ) -> None:
        """Copy one chunk while the one before it is written."""
        chunks = self._chunks(extent, begin)
        with self._staging(min(len(chunks), 2), min(extent.nbytes - begin, _CHUNK_BYTES)) as blocks:
            copied: list[DeviceEvent] = []
            try:
                for index, (start, end) in enumerate(chunks):
                    # This block's last write has returned: two writes ago.
                    block = blocks[index % 2][: end - start]
                    copied.append(self._streams.copy_to_host(block, source[start:end], ready))
                    del block
                    if index > 0:
                        copied[index - 1].synchronize()
                        self._write_chunk(extent, chunks[index - 1], blocks, index - 1, digest)
                copied[-1].synchronize()
                self._write_chunk(extent, chunks[-1], blocks, len(chunks) - 1, digest)
            finally:
                # Staging may be given to another thread only after the copies into it.
                for event in copied[-2:]:
                    event.synchronize()

    def _write_chunk(
        self, extent: Extent, chunk: tuple[int, int], blocks: list[Tensor], index: int, digest: Digest | None
    ) -> None:
        start, end = chunk
        self._digest(digest, blocks[index % 2], end - start)
        self._move(StoreError, extent, blocks[index % 2], start, round_up(end - start, self._length_alignment))

    def _read(self, extent: Extent, target: Tensor, ready: DeviceEvent, digest: Digest | None) -> DeviceEvent:
        begin = self._engine.in_place_bytes(target)
        if begin:
            ready.synchronize()
            self._move(LoadError, extent, target, 0, begin)
            self._digest(digest, target, begin)
        if begin < extent.nbytes:
            return self._read_staged(extent, target, begin, ready, digest)
        return DeviceEvent()  # the bytes are where they belong

    def _read_staged(
        self, extent: Extent, target: Tensor, begin: int, ready: DeviceEvent, digest: Digest | None
    ) -> DeviceEvent:
        """Read one chunk while the one before it is copied; return with all copies done."""
        chunks = self._chunks(extent, begin)
        with self._staging(min(len(chunks), 2), min(extent.nbytes - begin, _CHUNK_BYTES)) as blocks:
            copied: list[DeviceEvent] = []
            try:
                for index, (start, end) in enumerate(chunks):
                    if index >= 2:
                        copied[index - 2].synchronize()
                    size = round_up(end - start, self._length_alignment)
                    self._move(LoadError, extent, blocks[index % 2], start, size)
                    block = blocks[index % 2][: end - start]
                    self._digest(digest, block, end - start)
                    copied.append(self._streams.copy_to_device(target[start:end], block, ready))
                    del block
            finally:
                # Staging may be given to another thread only after the copies out of it.
                for event in copied[-2:]:
                    event.synchronize()
            return copied[-1]

    def _move(self, kind: type[StorageError], extent: Extent, memory: Tensor, start: int, nbytes: int) -> None:
        """Move ``nbytes`` between the beginning of ``memory`` and byte ``start`` of the extent, or raise."""
        is_store = kind is StoreError
        call, tally = (self._engine.write, self._writes) if is_store else (self._engine.read, self._reads)
        skip = 0
        for offset, size in _calls(extent, start, nbytes):
            attempts: Attempts | None = None
            while True:
                try:
                    with tally.count(size):
                        count = call(memory[skip:] if skip else memory, size, offset)
                        if count != size:
                            raise ShortTransferError(
                                f"{'wrote' if is_store else 'read'} {count} bytes, expected {size}"
                            )
                    if is_store:
                        self._count(size)
                    break
                except OSError as error:
                    attempts = attempts or Attempts(self._retries, is_store=is_store)
                    failure = self._failure(kind, extent, offset, size, error.strerror or str(error), error.errno)
                    if not attempts.again(error):
                        del memory  # frames that an exception keeps alive must not hold staging memory
                        raise failure from error.with_traceback(None)
            if attempts is not None and attempts.has_paused:
                self._survived.append(failure)
            skip += size

    def _failure(
        self,
        kind: type[StorageError],
        extent: Extent,
        offset: int,
        nbytes: int,
        reason: str,
        error_number: int | None,
    ) -> StorageError:
        is_store = kind is StoreError
        outcome = "the tensor stays in memory" if is_store else "the bytes are lost: resume from a checkpoint"
        if error_number in FULL:
            reason = f"{reason}, {self._file.free_words()}"
        return kind(
            f"cannot {'store' if is_store else 'load'} activation: {format_bytes(extent.nbytes)} "
            f"{'to' if is_store else 'from'} `{self._path}` at {offset} ({reason})",
            errno=error_number,
            path=self._path,
            offset=offset,
            nbytes=nbytes,
            hint=f"look for drive errors in `dmesg`; {outcome}",
        )


def _calls(extent: Extent, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut a part of an extent into pairs of offset and bytes, one for each call of the engine."""
    for offset, size in extent.ranges(start, nbytes):
        for skip in range(0, size, _CALL_BYTES):
            yield offset + skip, min(_CALL_BYTES, size - skip)
