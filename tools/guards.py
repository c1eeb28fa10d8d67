"""The guards of the core, each as the edit of the source that takes it out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GUARDS", "Guard"]


@dataclass(frozen=True)
class Guard:
    """One edit.

    Attributes:
        name: What the guard does.
        file: In the package.
        before: The source, which stands in the file exactly once.
        after: What takes its place.
        why_missed: Why the race suite cannot notice, or None: it may.
        held_by: The test that fails without it where the race suite may not notice, as pytest names it, or None.
    """

    name: str
    file: str
    before: str
    after: str
    why_missed: str | None = None
    held_by: str | None = None

    def removed_from(self, source: str) -> str:
        """Take the guard out.

        Args:
            source: Of the file.

        Raises:
            ValueError: The edit does not fit exactly once.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(f"{self.name}: stands in {self.file} {count} times (expected once)")
        return source.replace(self.before, self.after)


GUARDS = (
    Guard(
        "versions are compared at unpack",
        "cache.py",
        "            saved.check_version()\n",
        "",
    ),
    Guard(
        "versions of kept tensors are compared",
        "records.py",
        "if self._tensor._version != self._version:",
        "if False:",
    ),
    Guard(
        "a kept tensor is detached",
        "cache.py",
        "return KeptTensor(tensor.detach(), version, lease, self._microbatch)",
        "return KeptTensor(tensor, version, lease, self._microbatch)",
    ),
    Guard(
        "the version is part of the identity",
        "table.py",
        "lease is None or record.version != version or record.owner",
        "lease is None or record.owner",
    ),
    Guard(
        "a dying lease is found no more",
        "records.py",
        "        record.lease = weakref.ref(self, partial(_let_go, record, ended))\n",
        "        record.lease = weakref.ref(self)\n        record.ended = ended\n\n"
        "    def __del__(self):\n        _let_go(self.record, self.record.ended, None)\n",
    ),
    Guard(
        "bytes are let go when the last handle dies",
        "records.py",
        "    record.storage = None\n    ended.append(record)\n",
        "    ended.append(record)\n",
    ),
    Guard(
        "the lock in `put`",
        "cache.py",
        "        with self._lock:\n            self._drain()\n            lease = self._share",
        "        if True:\n            self._drain()\n            lease = self._share",
    ),
    Guard(
        "the lock around the start of a store",
        "cache.py",
        "        with self._lock:\n            try:\n                self._queue.submit(transfer)",
        "        if True:\n            try:\n                self._queue.submit(transfer)",
    ),
    Guard(
        "the lock in `_on_stored`",
        "cache.py",
        "        with self._lock:\n            self._ledger.count_store(",
        "        if True:\n            self._ledger.count_store(",
    ),
    Guard(
        "the lock in `get`",
        "cache.py",
        "        while True:\n            with self._lock:\n",
        "        while True:\n            if True:\n",
    ),
    Guard(
        "the lock in `_on_loaded`",
        "reload.py",
        "        with self._lock:\n            self._ledger.count_load(transfer)",
        "        if True:\n            self._ledger.count_load(transfer)",
    ),
    Guard(
        "the lock at the end of a move",
        "migration.py",
        "        with self._lock:\n            record = move.record\n            record.is_moving = False",
        "        if True:\n            record = move.record\n            record.is_moving = False",
    ),
    Guard(
        "the lock when a transfer is settled",
        "transfer.py",
        "            with self._lock:\n                transfer.state = TransferState.DONE",
        "            if True:\n                transfer.state = TransferState.DONE",
    ),
    Guard(
        "bytes that are loading are waited for",
        "reload.py",
        "return None if state is State.LOADING else record.storage",
        "return record.storage",
    ),
    Guard(
        "a load under way is not started again",
        "reload.py",
        "        if record.state is State.LOADING and record.load is not None:\n            return record.load\n",
        "",
    ),
    Guard(
        "a running transfer keeps its place after the death of the record",
        "cache.py",
        "record.num_transfers = is_pending + record.is_moving",
        "record.num_transfers = 0",
    ),
    Guard(
        "a move counts among the transfers that use a place",
        "cache.py",
        "record.num_transfers = is_pending + record.is_moving",
        "record.num_transfers = int(is_pending)",
    ),
    Guard(
        "only the last transfer gives the place back",
        "records.py",
        "        if self.num_transfers == 0:\n",
        "        if True:\n",
        held_by="tests/unit/test_migration.py"
        "::test_a_graph_dropped_under_a_spill_and_a_load_frees_its_place_with_the_last",
    ),
    Guard(
        "a transfer that ends late frees what its record left",
        "reload.py",
        "            if record.state is State.FREED:\n                record.end_transfer()\n            elif transfer",
        "            if record.state is State.FREED:\n                pass\n            elif transfer",
    ),
    Guard(
        "a transfer that runs cannot be cancelled",
        "transfer.py",
        "            if transfer.state is not TransferState.QUEUED:\n                return False\n",
        "",
    ),
    Guard(
        "a cancelled transfer is skipped",
        "transfer.py",
        "                    if transfer.state is TransferState.QUEUED:\n            ",
        "                    if True:\n            ",
    ),
    Guard(
        "a store that was cancelled leaves its record resident",
        "reload.py",
        "self._queue.cancel(record.store):\n            self.stay_resident(record)\n",
        "self._queue.cancel(record.store):\n            pass\n",
    ),
    Guard(
        "what was forwarded stays resident when its store ends",
        "cache.py",
        "elif transfer.error is not None or record.is_forwarded:",
        "elif transfer.error is not None:",
    ),
    Guard(
        "bytes that moved under their store are noticed at its end",
        "cache.py",
        "record.storage is not None and record.has_moved(record.storage):",
        "False:",
        held_by="tests/unit/test_cache.py::test_bytes_that_move_under_their_store_stay_in_memory",
    ),
    Guard(
        "bytes that moved before their store are noticed",
        "records.py",
        "        if self.has_moved(storage):\n            raise freed_meanwhile()\n",
        "",
        held_by="tests/numerics/test_hostile_surroundings.py::test_a_storage_freed_before_its_store_begins_is_not_read",
    ),
    Guard(
        "a freed storage is not taken for the original",
        "records.py",
        "return storage if storage is not None and storage.nbytes() >= end else None",
        "return storage",
        why_missed="who fills the storage again before backward does not need it; who does not would crash "
        "without us, so no program of the suite does it",
        held_by="tests/unit/test_cache.py::test_a_storage_that_is_alive_but_freed_is_loaded",
    ),
    Guard(
        "stores wait for room in the budget",
        "transfer.py",
        "return self._inflight_bytes == 0 or self._inflight_bytes + nbytes <= self._max_inflight_bytes",
        "return True",
    ),
    Guard(
        "loads ahead stay within their budget",
        "schedule.py",
        "                if nbytes > budget_bytes and not (at_least_one and not taken):\n                    break\n",
        "",
    ),
    Guard(
        "who has arrived is ahead no more",
        "cache.py",
        "        self._reloader.arrive(record)\n        # What pins",
        "        # What pins",
    ),
    Guard(
        "what is dead is not loaded ahead",
        "reload.py",
        "            if record.lives() is None:\n                continue\n            if not record.is_ahead:",
        "            if not record.is_ahead:",
        why_missed="it saves a read for nothing; whoever frees the record stops or outwaits its load",
    ),
    Guard(
        "a freed record leaves the logs",
        "cache.py",
        "        if record.tier is not None:\n            self._reloader.schedule.forget(record.serial)\n",
        "",
    ),
    Guard(
        "loaded bytes are let go when all handles have had them",
        "reload.py",
        "if record.all_unpacked(saved) and record.state is State.LOADED:",
        "if record.all_unpacked(saved) and False:",
    ),
    Guard(
        "a settled transfer wakes who waits",
        "transfer.py",
        "        self._num_unfinished -= 1\n        self._changed.notify_all()\n",
        "        self._num_unfinished -= 1\n",
    ),
    Guard(
        "a new transfer wakes a thread",
        "transfer.py",
        "            lane.ready.notify()\n",
        "",
    ),
    Guard(
        "a transfer that begins tells who waits without end",
        "transfer.py",
        "                            self._changed.notify_all()  # who waits without end has something to wait for\n",
        "                            pass\n",
        held_by="tests/unit/test_deadlines.py::test_who_waits_without_end_learns_of_a_deadline",
    ),
    Guard(
        "a late transfer does not end twice",
        "transfer.py",
        "            is_in_time = self._deadlines.end(transfer)\n",
        "            is_in_time = self._deadlines.end(transfer) or True\n",
    ),
    Guard(
        "what stands behind hung transfers is given up",
        "transfer.py",
        "        if len(lane.hanging) < self._io_threads:\n            return []\n",
        "        return []\n",
    ),
    Guard(
        "a hung transfer keeps its place until it returns",
        "records.py",
        "            _call_after(self.hanging, partial(self.tier.free, self.extent))\n",
        "            self.tier.free(self.extent)\n",
    ),
    Guard(
        "a store that was given up is left its place",
        "cache.py",
        "                record.leave_to(transfer)\n",
        "",
    ),
    Guard(
        "a load that was given up is left its place",
        "reload.py",
        "                record.leave_to(transfer)\n",
        "",
    ),
    Guard(
        "a move that was given up is left both places",
        "migration.py",
        "        move.record.leave_to(transfer)\n",
        "",
    ),
    Guard(
        "a record moves once at a time",
        "migration.py",
        "record.state is State.STORED and not record.is_moving and",
        "record.state is State.STORED and",
    ),
    Guard(
        "a move that nobody wants any more changes nothing",
        "migration.py",
        "elif move.is_copied and self._is_wanted(move):",
        "elif move.is_copied:",
    ),
    Guard(
        "the copy of a move in vain is freed",
        "migration.py",
        "            else:\n                self._free_copy(move)\n",
        "",
    ),
    Guard(
        "an heir takes over the bytes of a storage",
        "cache.py",
        "            heir.held_bytes += record.held_bytes\n",
        "            pass\n",
    ),
    Guard(
        "a load that was cancelled is told to the migrator",
        "cache.py",
        "        if state is State.LOADING and not is_pending:\n            self._reloader.load_ended(record.tier)",
        "",
        held_by="tests/unit/test_migration.py::test_the_end_of_a_cancelled_load_lets_promotions_go_on",
    ),
)
