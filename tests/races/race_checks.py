"""What must hold in a run: at each point, whenever the cache's state may have changed, and at the end."""

from collections import Counter

from ssdtrain_plugin.records import State
from ssdtrain_plugin.transfer import Direction, TransferQueue

__all__ = ["Books", "Checks", "WatchedQueue"]


class Books:
    """What the tiers saw, apart from what was given up; to be compared with the statistics of the steps."""

    def __init__(self):
        self.bytes = Counter()

    def enter(self, transfer, calls):
        """Take what the tiers did for a transfer; what they did not finish is not among it."""
        is_move = transfer.lane == "moves"
        for tier, operation, nbytes in calls:
            if operation == "write" and tier == "ssd":
                self.bytes["stored"] += nbytes
            elif operation == "write":
                self.bytes["host"] += nbytes
            elif not is_move:
                self.bytes["loaded"] += nbytes

    def differences(self, steps):
        """Compare with the statistics of all steps."""
        for name in ("stored", "host", "loaded"):
            counted = sum(getattr(step, f"{name}_bytes") for step in steps)
            if counted != self.bytes[name]:
                yield f"{name}_bytes are {counted} in the statistics, and the tiers saw {self.bytes[name]}"


class WatchedQueue(TransferQueue):
    """Remembers every transfer that is not settled, and what the tiers did for those that ended well."""

    def __init__(self, scheduler, **options):
        super().__init__(**options)
        self._scheduler = scheduler
        self.books = Books()
        self.unsettled = {}
        self.num_cancelled_by_close = 0

    def submit(self, transfer, *, is_urgent=False):
        with self._lock:
            self._scheduler.point(f"submit {transfer.direction.value}")
            super().submit(transfer, is_urgent=is_urgent)
            self._scheduler.check(transfer not in self.unsettled, "a transfer was submitted twice")
            self.unsettled[transfer] = None

    def cancel(self, transfer):
        self._scheduler.point("cancel")
        return super().cancel(transfer)

    def _cancel_all(self, queue):
        self.num_cancelled_by_close += len(queue)
        super()._cancel_all(queue)

    def _settle(self, transfer):
        self._scheduler.check(transfer in self.unsettled, "a transfer was settled twice, or never submitted")
        del self.unsettled[transfer]
        super()._settle(transfer)

    def _run(self, transfer, lane):
        self._scheduler.current.calls.clear()
        super()._run(transfer, lane)

    def _finish(self, transfer):
        super()._finish(transfer)
        if not transfer.is_given_up:
            self.books.enter(transfer, self._scheduler.current.calls)

    def stores(self):
        """Sizes of the stores in flight."""
        return [transfer.nbytes for transfer in self.unsettled if transfer.direction is Direction.STORE]


class Checks:
    """Looks at the cache of a run."""

    def __init__(self, scheduler, cache, queue, tiers, *, max_inflight_bytes):
        self._scheduler = scheduler
        self._cache = cache
        self._queue = queue
        self._tiers = tiers
        self._max_inflight_bytes = max_inflight_bytes
        self.may_be_ahead_in_vain = False  # a storage that its owner freed and filled again is not loaded ahead
        scheduler.on_point = self._at_point
        cache._lock.on_release = self._at_release

    # At each point

    def _at_point(self):
        queue = self._queue
        if queue._lock.locked():
            return  # it is about to change
        check, stores = self._scheduler.check, queue.stores()
        in_flight = sum(stores)
        check(
            queue._inflight_bytes == in_flight, lambda: f"{queue._inflight_bytes} bytes in flight, really {in_flight}"
        )
        check(queue._num_unfinished == len(queue.unsettled), "transfers were miscounted")
        # One store larger than the budget is admitted when nothing else is in flight.
        is_alone = sum(nbytes > 0 for nbytes in stores) <= 1
        limit = self._max_inflight_bytes
        check(in_flight <= limit or is_alone, lambda: f"{in_flight} bytes in flight, at most {limit} may be: {stores}")

    # Whenever the cache's lock is given back

    def _at_release(self):
        for record in self._records():
            self._check_record(record)
        self._check_account()
        self._check_ahead()
        self._check_places()

    def _records(self):
        return list(self._cache._table._by_serial.values())

    def _check_record(self, record):
        state, check = record.state, self._scheduler.check
        lease = record.lives()  # held to the end: if it were the last one, its death would take the bytes in between
        is_alive = lease is not None
        has_bytes, has_place = record.storage is not None, record.extent is not None

        def says():
            bytes_, place = ("bytes" if has_bytes else "no bytes"), ("a place" if has_place else "no place")
            return f"record {record.serial} is {state.value} with {bytes_} and {place}"

        check(state is not State.FREED, lambda: f"record {record.serial} was freed and is still known")
        check(has_place == (state is not State.RESIDENT), says)
        if state is State.STORED:
            check(not has_bytes, says)
        elif is_alive and record.tier is not None:
            check(has_bytes, says)
        if state is State.STORING:
            check(record.store is not None, says)
            is_reported = record in self._cache._table.ended
            check(not is_reported or not has_bytes, lambda: f"{says()}, though no handle lives")
        if state is State.LOADING:
            check(record.load is not None, says)
        if state is State.STORED and record.is_ahead and is_alive and record.is_original_gone():
            check(record.load is not None or self.may_be_ahead_in_vain, lambda: f"{says()}, and counts as ahead")

    def _check_account(self):
        records, ledger, check = self._records(), self._cache._ledger, self._scheduler.check
        account = ledger.account
        held = sum(record.held_bytes for record in records)
        lingering = sum(nbytes for _, nbytes in account._lingering.values())
        check(
            account.live_bytes == held + lingering,
            lambda: f"the account has {account.live_bytes} live bytes; records hold {held}, {lingering} linger",
        )
        would_be = sum(record.would_be_bytes for record in records)
        check(account.would_be_bytes == would_be, lambda: f"{account.would_be_bytes} would be live, really {would_be}")

    def _check_ahead(self):
        reloader, check = self._cache._reloader, self._scheduler.check
        ahead = [record for record in self._records() if record.is_ahead]
        loaded = [record for record in ahead if record.tier is not None]
        total = sum(record.span.nbytes for record in loaded)
        check(reloader._ahead_bytes == total, lambda: f"{reloader._ahead_bytes} bytes ahead, really {total}")
        number = Counter(record.ahead_of for record in loaded)
        check(dict(reloader._num_ahead) == number, lambda: f"{reloader._num_ahead} records ahead, really {number}")
        kept = Counter()
        for record in ahead:
            if record.tier is None:
                kept[record.ahead_of] += record.span.nbytes
        check(dict(reloader._kept_bytes) == kept, lambda: f"{reloader._kept_bytes} kept bytes ahead, really {kept}")
        # Each micro-batch may have one record over the budget, so that no backward stands still.
        largest = {n: max(r.span.nbytes for r in loaded if r.ahead_of == n) for n in number}
        limit = max(reloader._prefetch_bytes, reloader._bounds.prefetch_bytes) + sum(largest.values())
        check(total <= limit, lambda: f"{total} bytes are loaded ahead, at most {limit} may be")

    def _check_places(self):
        seen = set()
        for record in self._records():
            if record.extent is None:
                continue
            place = record.tier.name, record.extent
            self._scheduler.check(place not in seen, f"two records have the extent {place}")
            seen.add(place)
            self._scheduler.check(
                record.extent in record.tier.extents, f"{record.serial}: its extent is freed: {place}"
            )

    # Between two backwards, when no other runs

    def after_pass(self):
        """Nothing that all handles have had is held for longer."""
        for record in self._records():
            is_done = record.state is State.LOADED and record.pass_number > 0 and not record.num_unpacked
            held = is_done and not record.is_ahead and record.lives() is not None
            self._scheduler.check(
                not held, lambda record=record: f"record {record.serial} is held after all have had it"
            )

    # At the end

    def at_end(self, steps, *, may_leak):
        """All is given back.

        Args:
            steps: Statistics of all steps.
            may_leak: An unpack hook has raised: torch leaks what a waiting node holds then, handles included.
        """
        check, cache, queue = self._scheduler.check, self._cache, self._queue
        for difference in queue.books.differences(steps):
            check(False, difference)
        check(not queue.unsettled, f"{len(queue.unsettled)} transfers never ended")
        check(queue._inflight_bytes == 0, f"{queue._inflight_bytes} bytes are in flight for ever")
        check(not queue._deadlines._runs, "a transfer that has ended has a deadline")
        check(not any(lane.hanging for lane in queue._lanes.values()), "a thread that went on is taken for hung")
        if queue.num_cancelled_by_close:
            return  # what was cancelled then is never told; its places go with the tier
        migrator = cache._migrator
        if migrator is not None:
            check(not any(migrator._moving_bytes.values()), f"bytes on the move for ever: {migrator._moving_bytes}")
            check(migrator._num_drive_loads == 0, f"{migrator._num_drive_loads} loads of the drive never ended")
        is_idle = cache.is_idle()
        records = self._records()
        if may_leak:
            check(all(record.lives() for record in records), "a record without a handle is still known")
        else:
            check(is_idle, lambda: f"{len(records)} records are still known")
            check(cache.live_bytes == 0, f"{cache.live_bytes} bytes are live in the account")
            check(len(cache._reloader.schedule) == 0, "logs are left")
        used = {(record.tier.name, record.extent) for record in records if record.extent is not None}
        for tier in self._tiers.values():
            left = [extent for extent in tier.extents if (tier.name, extent) not in used]
            check(not left, f"{tier.name}: extents that nobody needs are in use: {left}")
