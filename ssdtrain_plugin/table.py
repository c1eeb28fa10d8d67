"""The table of records: which bytes are known, and at which version."""

from __future__ import annotations

import itertools
import weakref
from collections import deque

import torch
from torch import Tensor

from ssdtrain_plugin.identity import owner_of, span_of
from ssdtrain_plugin.records import Lease, Record

__all__ = ["RecordTable"]


class RecordTable:
    """Finds the record of a tensor's bytes, and makes one where there is none.

    Threads:
        Not safe; its owner locks.

    Attributes:
        ended: Records whose last handle died; appended to by finalizers in any thread.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._serials = itertools.count()
        self._by_serial: dict[int, Record] = {}
        # By the address of the storage object, which is its own as long as a record
        # holds a weak reference to it: Note [Identity].
        self._by_storage: dict[int, list[Record]] = {}
        self.ended: deque[Record] = deque()

    def find(self, storage: torch.UntypedStorage, tensor: Tensor, version: int) -> Lease | None:
        """Look for a live record that holds the bytes of a tensor.

        Args:
            storage: Of ``tensor``.
            tensor: Being saved.
            version: Of ``tensor`` now. A change in place makes other bytes of the
                same storage, so the version is part of the identity.

        Returns:
            The lease of the record, or None.
        """
        for record in self._by_storage.get(storage._cdata, ()):
            lease = record.lives()
            # Equal numbers of different counters prove nothing, so the counter must be the same.
            if lease is None or record.version != version or record.owner() is not owner_of(tensor):
                continue
            storage_bytes = storage.nbytes()
            if record.span.nbytes == storage_bytes or record.span.covers(span_of(tensor, storage_bytes)):
                return lease
        return None

    def add(self, storage: torch.UntypedStorage, tensor: Tensor, version: int) -> Lease:
        """Make a resident record for bytes that :meth:`find` does not know.

        Args:
            storage: Of ``tensor``.
            tensor: Being saved.
            version: Of ``tensor`` now.

        Returns:
            The lease; when the last handle lets it go, :meth:`pop_ended` gives the record.
        """
        storage_bytes = storage.nbytes()
        siblings = self._by_storage.setdefault(storage._cdata, [])
        owner = weakref.ref(owner_of(tensor))
        record = Record(next(self._serials), storage._cdata, span_of(tensor, storage_bytes), version, owner)
        # Saved at two versions or in two spans, a storage is in memory only once.
        is_known = bool(siblings) and any(sibling.lives() for sibling in siblings)
        record.would_be_bytes = 0 if is_known else storage_bytes
        siblings.append(record)
        self._by_serial[record.serial] = record
        return Lease(record, self.ended)

    def pop_ended(self) -> Record:
        """Take a record whose last handle died, from :attr:`ended`, and forget it."""
        record = self.ended.popleft()
        record.lease = None  # which holds the record
        del self._by_serial[record.serial]
        address = record.address
        siblings = self._by_storage[address]
        siblings.remove(record)
        if not siblings:
            del self._by_storage[address]
        return record

    def find_heir(self, record: Record) -> Record | None:
        """Find another record whose handles keep the same storage in memory.

        Args:
            record: Forgotten already.
        """
        for sibling in self._by_storage.get(record.address, ()):
            if sibling.tier is None and sibling.storage is None:
                return sibling
        return None

    def __getitem__(self, serial: int) -> Record:
        """Get a record by its number."""
        return self._by_serial[serial]

    def __len__(self) -> int:
        """Count the records that are not forgotten yet."""
        return len(self._by_serial)
