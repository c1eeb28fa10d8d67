"""The table of records: which bytes are known, and at which version."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from ssdtrain_plugin.identity import StorageKey, StorageRegistry, shares_version, span_of, version_probe
from ssdtrain_plugin.records import Lease, Record

__all__ = ["RecordTable"]


class RecordTable:
    """Finds the record of a tensor's bytes, and makes one where there is none.

    Threads:
        Not safe; its owner locks. ``is_resident`` alone needs no lock.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._registry = StorageRegistry()
        self._serials = itertools.count()
        self._by_serial: dict[int, Record] = {}
        self._by_key: dict[StorageKey, list[Record]] = {}
        self._ended: deque[Record] = deque()

    def keep_resident(self, tensors: Iterable[Tensor]) -> None:
        """Remember storages that never move; see :meth:`StorageRegistry.keep_resident`."""
        self._registry.keep_resident(tensors)

    def is_resident(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether a storage never moves."""
        return self._registry.is_resident(storage)

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
        key = self._registry.find(storage)
        for record in () if key is None else self._by_key[key]:
            lease = record.lives()
            if lease is None or record.version != version or record.probe._version != version:
                continue
            storage_bytes = storage.nbytes()
            is_inside = record.span.nbytes == storage_bytes or record.span.covers(span_of(tensor, storage_bytes))
            if is_inside and shares_version(tensor, record.probe):
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
        key = self._registry.find(storage)
        if key is None:
            key, original = self._registry.add(storage)
            siblings = self._by_key[key] = []
        else:
            original, siblings = self._registry.reference(storage), self._by_key[key]
        storage_bytes = storage.nbytes()
        span = span_of(tensor, storage_bytes)
        record = Record(next(self._serials), key, span, version_probe(tensor), version, original)
        # Saved at two versions or in two spans, a storage is in memory only once.
        record.would_be_bytes = 0 if siblings else storage_bytes
        siblings.append(record)
        self._by_serial[record.serial] = record
        lease = Lease(record, self._ended)
        record.lease = weakref.ref(lease)
        return lease

    def pop_ended(self) -> Record | None:
        """Take a record whose last handle died, and forget it."""
        if not self._ended:
            return None
        record = self._ended.popleft()
        del self._by_serial[record.serial]
        siblings = self._by_key[record.key]
        siblings.remove(record)
        if not siblings:
            del self._by_key[record.key]
            self._registry.forget(record.original)
        return record

    def has_siblings(self, record: Record) -> bool:
        """Tell whether other records are of the same storage.

        Args:
            record: Forgotten already.
        """
        return record.key in self._by_key

    def __getitem__(self, serial: int) -> Record:
        """Get a record by its number."""
        return self._by_serial[serial]

    def __len__(self) -> int:
        """Count the records that are not forgotten yet."""
        return len(self._by_serial)
