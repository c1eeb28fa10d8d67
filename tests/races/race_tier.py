"""A tier over memory, laid out by the allocator of the drives, that checks all that its owner promises."""

import random
from collections import Counter

import torch

from ssdtrain_plugin.errors import CapacityError, LoadError, StoreError
from ssdtrain_plugin.storage.base import Tier
from ssdtrain_plugin.storage.extents import ExtentAllocator
from ssdtrain_plugin.streams import DeviceEvent

__all__ = ["CheckingTier", "Faults"]

_FREED = 0xDB
_GONE = 0xEE
_MIN_PIECE_BYTES = 64


class Faults:
    """Which calls of a tier fail, and which hang, by chance."""

    def __init__(self, seed, rates):
        self._chance = random.Random(f"{seed}/faults")
        self._rates = rates
        self.injected = Counter()

    def draw(self, operation):
        """Return ``fail``, ``hang`` or None."""
        value = self._chance.random()
        for kind in ("fail", "hang"):
            rate = self._rates.get((kind, operation), 0.0)
            if value < rate:
                self.injected[kind, operation] += 1
                return kind
            value -= rate
        return None


class _Use:
    """What is going on at one extent."""

    def __init__(self, extent):
        self.extent = extent
        self.writers = 0
        self.readers = 0
        self.is_written = False


class CheckingTier(Tier):
    """Bytes in memory; each call is three points of the scheduler, and copies in two halves.

    Args:
        has_memory: Other tiers may copy from and to its memory, as from the host tier's.
    """

    def __init__(self, name, scheduler, faults, *, capacity_bytes, alignment, has_memory):
        self.name = name
        self._scheduler = scheduler
        self._faults = faults
        self._capacity_bytes = capacity_bytes
        self._allocator = ExtentAllocator(alignment, min_piece_bytes=None if has_memory else _MIN_PIECE_BYTES)
        self._memory = torch.full((capacity_bytes,), _FREED, dtype=torch.uint8)
        self._has_memory = has_memory
        self._uses = {}
        self._owner_of_block = {}
        self._hung = []
        self._is_closed = False
        self.others = ()
        self.counts = Counter()

    # What a test may ask

    @property
    def extents(self):
        return set(self._uses)

    def release(self):
        """Let what hangs go on."""
        for hung in self._hung:
            hung.append(True)
        self._hung.clear()

    def use_of(self, memory):
        """Find what is going on at the extent that a piece of memory is; None if it is not of this tier."""
        offset = memory.data_ptr() - self._memory.data_ptr()
        if not 0 <= offset < self._capacity_bytes:
            return None
        found = [use for use in self._uses.values() if use.extent.offset == offset]
        self._scheduler.check(found, f"{self.name}: memory at {offset} is used by a move, and is not allocated")
        return found[0]

    # A tier

    @property
    def used_bytes(self):
        return self._allocator.used_bytes

    @property
    def free_bytes(self):
        return self._capacity_bytes - self._allocator.used_bytes

    def allocate(self, nbytes):
        self._scheduler.point(f"{self.name}: allocate")
        if self._faults.draw("allocate"):
            raise CapacityError("cannot store activation: injected", errno=28, nbytes=nbytes)
        extent = self._allocator.allocate(nbytes, self._capacity_bytes)
        if extent is None:
            raise CapacityError(f"cannot store activation: {nbytes} bytes (no room)", nbytes=nbytes)
        check = self._scheduler.check
        check(extent.nbytes == nbytes <= extent.reserved_bytes, f"{self.name}: {extent} for {nbytes} bytes")
        for offset, size in self._ranges(extent):
            check(offset + size <= self._capacity_bytes, f"{self.name}: {extent} lies beyond the end")
            for block in range(offset // self._allocator.alignment, (offset + size) // self._allocator.alignment):
                other = self._owner_of_block.setdefault(block, extent)
                check(other is extent, lambda other=other: f"{self.name}: extents overlap: {extent} and {other}")
        self._uses[extent] = _Use(extent)
        self.counts["allocated"] += 1
        self._scheduler.point(f"{self.name}: allocated")
        return extent

    def write(self, extent, source, ready):
        kind = self._begin("write", extent, source)
        use = self._uses[extent]
        self._scheduler.check(use.readers == use.writers == 0, f"{self.name}: written while it is used: {extent}")
        lender = self._lender_of(source)
        use.writers += 1
        lender.readers += 1
        try:
            self._run(kind, "write", StoreError)
            data = torch.empty(extent.nbytes, dtype=torch.uint8)
            half = extent.nbytes // 2
            self._copy(data, source, 0, half)
            self._scheduler.point(f"{self.name}: half written")
            self._copy(data, source, half, extent.nbytes)
            self._scheduler.check(extent in self._uses, f"{self.name}: freed under a write: {extent}")
            skip = 0
            for offset, size in extent.ranges(0, extent.nbytes):
                self._memory[offset : offset + size] = data[skip : skip + size]
                skip += size
            use.is_written = True
        finally:
            use.writers -= 1
            lender.readers -= 1
        self._end("write", extent)

    def read(self, extent, target, ready):
        kind = self._begin("read", extent, target)
        use = self._uses[extent]
        self._scheduler.check(use.writers == 0, f"{self.name}: read while it is written: {extent}")
        self._scheduler.check(use.is_written, f"{self.name}: read before the write ended: {extent}")
        borrower = self._lender_of(target)
        use.readers += 1
        borrower.writers += 1
        try:
            self._run(kind, "read", LoadError)
            ranges = list(extent.ranges(0, extent.nbytes))
            skip = 0
            for index, (offset, size) in enumerate(ranges):
                for start, end in ((0, size // 2), (size // 2, size)):
                    target[skip + start : skip + end] = self._memory[offset + start : offset + end]
                    if (index, end) == (0, size // 2):
                        self._scheduler.point(f"{self.name}: half read")
                skip += size
            self._scheduler.check(self._uses.get(extent) is use, f"{self.name}: freed under a read: {extent}")
            borrower.is_written = True
        finally:
            use.readers -= 1
            borrower.writers -= 1
        self._end("read", extent)
        return DeviceEvent()

    def free(self, extent):
        if self._is_closed:
            return
        check = self._scheduler.check
        use = self._uses.pop(extent, None)
        check(use is not None, f"{self.name}: freed twice, or never allocated: {extent}")
        check(use.writers == use.readers == 0, f"{self.name}: freed while it is used: {extent}")
        for offset, size in self._ranges(extent):
            self._memory[offset : offset + size] = _FREED
            for block in range(offset // self._allocator.alignment, (offset + size) // self._allocator.alignment):
                del self._owner_of_block[block]
        self._allocator.free(extent)
        self.counts["freed"] += 1
        self._scheduler.point(f"{self.name}: free")

    def memory_of(self, extent):
        if not self._has_memory or self._is_closed:
            return None
        self._scheduler.check(extent in self._uses, f"{self.name}: memory of what is not allocated: {extent}")
        return self._memory[extent.offset : extent.offset + extent.nbytes]

    def path_of(self, extent):
        return f"/{self.name}"

    def describe(self):
        return f"{self.name}: memory that is watched"

    def close(self):
        self._is_closed = True

    # Inside

    def _ranges(self, extent):
        return extent.pieces or ((extent.offset, extent.reserved_bytes),)

    def _lender_of(self, memory):
        """Find the extent of another tier that lends its memory; or one of nobody."""
        found = [use for use in (tier.use_of(memory) for tier in self.others) if use is not None]
        return found[0] if found else _Use(None)

    def _begin(self, operation, extent, memory):
        check = self._scheduler.check
        check(extent in self._uses, f"{self.name}: {operation} of what is not allocated: {extent}")
        check(memory.numel() == extent.nbytes, f"{self.name}: {operation} of {memory.numel()} bytes: {extent}")
        self._scheduler.point(f"{self.name}: {operation} begins")
        check(extent in self._uses, f"{self.name}: freed before a {operation} that was to come: {extent}")
        return self._faults.draw(operation)

    def _run(self, kind, operation, error):
        if kind == "hang":
            self._hang(operation)
        if kind == "fail":
            raise error(f"cannot {operation}: injected", errno=5, path=f"/{self.name}", offset=0, nbytes=1)

    def _hang(self, operation):
        scheduler, released = self._scheduler, []
        self._hung.append(released)
        scheduler.num_hanging += 1
        try:
            scheduler.block_until(lambda: bool(released), f"the end of a {operation} that hangs")
        finally:
            scheduler.num_hanging -= 1

    def _copy(self, data, source, start, end):
        """Copy as a drive would: what has no memory behind it any more gives anything."""
        if source.untyped_storage().nbytes() >= (source.storage_offset() + source.numel()):
            data[start:end] = source[start:end]
        else:
            data[start:end] = _GONE

    def _end(self, operation, extent):
        self._scheduler.current.calls.append((self.name, operation, extent.nbytes))
        self._scheduler.point(f"{self.name}: {operation} ended")
