"""Zeros over what was freed, for who does not want activations to stay on the drive.

Note [Why zeros are written]. To punch a hole, or to shorten the file, is quicker, and gives zeros to whoever
reads the file; but nobody can read a file without a name, and on the drive itself the bytes stay.
So they are overwritten, which costs as much writing again, and as much wear. A drive that
moves blocks about keeps old copies all the same, out of reach but for its maker: where that
matters, encrypt it.

It is done by a thread of its own: extents are freed under locks, where nothing may wait.
An extent is given to nobody before it is overwritten.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable

from ssdtrain_plugin.deadlines import ending
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.extent_file import ExtentFile
from ssdtrain_plugin.units import MIB, format_bytes

__all__ = ["Eraser"]

logger = logging.getLogger(__name__)

_BLOCKS_A_CALL = 8
_BYTES_A_SYNC = 64 * MIB


class Eraser:
    """Overwrites extents, then frees them; at the end, all that are still there.

    Args:
        file: Kept open until the end.
        count: Told the bytes written.
        on_end: Called when the file is let go, in the thread of the eraser.

    Threads:
        Any.
    """

    def __init__(self, file: ExtentFile, *, count: Callable[[int], None], on_end: Callable[[], None]) -> None:
        """Start the thread; at interpreter exit it would be too late for that."""
        self._file = file
        self._count = count
        self._on_end = on_end
        self._zeros = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._changed = threading.Condition(threading.RLock())
        self._freed: deque[Extent] = deque()
        self._is_closed = False
        self._written_bytes = 0
        self._unsynced_bytes = 0
        self._has_complained = False
        held = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(held,), name="ssdtrain-erase", daemon=True)
        self._thread.start()
        held.wait()

    def free(self, extent: Extent) -> None:
        """Overwrite an extent soon, then free it.

        Args:
            extent: Live; used by nobody any more.
        """
        with self._changed:
            self._freed.append(extent)
            self._changed.notify()

    def close(self) -> None:
        """Overwrite all that is live, and wait for it as long as it gets on: Note [One allowance for the end].

        Calling it twice does nothing.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if threading.current_thread() is self._thread:
            return
        with ending() as allowance:
            while self._thread.is_alive():
                if not allowance.wait(self._gets_on):
                    self._complain(f"the drive does not answer after {format_bytes(self._written_bytes)}")
                    return

    def _gets_on(self, seconds: float) -> bool:
        before = self._written_bytes
        self._thread.join(seconds)
        return self._written_bytes > before or not self._thread.is_alive()

    def _serve(self, held: threading.Event) -> None:
        with self._file.hold():
            held.set()
            while (extent := self._next()) is not None:
                self._erase(extent)
                self._file.free(extent)
            for extent in self._file.live_extents():
                self._erase(extent)
            try:
                self._sync()
            except OSError as error:
                self._complain(error.strerror or str(error))
        self._on_end()

    def _next(self) -> Extent | None:
        with self._changed:
            while not self._freed and not self._is_closed:
                self._changed.wait()
            return None if self._is_closed else self._freed.popleft()

    def _erase(self, extent: Extent) -> None:
        try:
            for offset, nbytes in extent.ranges(0, extent.reserved_bytes):
                self._overwrite(offset, nbytes)
        except OSError as error:
            self._complain(error.strerror or str(error))

    def _overwrite(self, offset: int, nbytes: int) -> None:
        end = offset + nbytes
        while offset < end:
            part = min(end - offset, _BLOCKS_A_CALL * MIB)
            blocks = [memoryview(self._zeros)[: min(MIB, part - skip)] for skip in range(0, part, MIB)]
            count = os.pwritev(self._file.fd, blocks, offset)
            if count <= 0:
                raise OSError(0, "nothing was written")
            self._written_bytes += count
            self._count(count)
            self._unsynced_bytes += count
            if self._unsynced_bytes >= _BYTES_A_SYNC:
                self._sync()
            offset += count

    def _sync(self) -> None:
        """What sits in the page cache of a closed file is never written. A little at a time, to be seen to get on."""
        os.fdatasync(self._file.fd)
        self._unsynced_bytes = 0

    def _complain(self, reason: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.warning(
                "`zero_on_free`: freed activations in `%s` were not overwritten (%s); hint: look for drive errors in "
                "`dmesg`; training is not affected; said once",
                self._file.path,
                reason,
            )
