"""TensorCache against a model that remembers bytes: anything a graph, a host or a drive may do, in any order.

The model knows what each handle must give back, which saves are the same bytes, and what was asked
of the tiers. It knows nothing of states, logs and budgets. One sequence of steps gives one course
of events: see :mod:`stepping`. A longer search: ``pytest
tests/unit/test_cache_machine.py --machine-runs 10000 --timeout 0``, with a seed of its own each time.
"""

import errno
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from clocks import ManualClock
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stepping import GO, SteppedQueue, SteppedTier
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.errors import CapacityError, LoadError, SavedTensorMutatedError
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import LoadBounds, Placement
from ssdtrain_plugin.records import Record, State
from ssdtrain_plugin.streams import CpuStreams
from ssdtrain_plugin.transfer import Direction

RUNS_IN_CI = 100
STEPS = 60
UNLIMITED = 1 << 40
IO_TIMEOUT_SECONDS = 10.0
SMALL_BYTES = 512  # smaller ones are not offered to the policy
HUGE_ELEMENTS = 1 << 13
PAGE_BYTES = 4096
HANG = -1  # as a verdict: let so much time pass that all who stand at a gate are given up

MOVES = {
    (State.RESIDENT, State.STORING),
    (State.STORING, State.STORED),
    (State.STORING, State.RESIDENT),
    (State.STORED, State.LOADING),
    (State.LOADING, State.LOADED),
    (State.LOADING, State.STORED),
    (State.LOADED, State.STORED),
}

number = st.integers(0, 1 << 10)
verdict = st.sampled_from([*[GO] * 24, errno.EIO, errno.ENOSPC, HANG])
seldom = st.sampled_from([False, False, True])


class Answers:
    """A policy that says what it was told, as far as the tiers have room; remembers the questions."""

    is_learning = False

    def __init__(self, bounds):
        self.answer = Placement.KEEP
        self.asked = []
        self._bounds = bounds

    def decide(self, request):
        self.asked.append(request)
        if self.answer is Placement.HOST and request.nbytes <= request.host_free_bytes:
            return Placement.HOST
        return Placement.SSD if self.answer is not Placement.KEEP and request.has_ssd else Placement.KEEP

    def observe(self, observation):
        """Learn nothing."""

    def load_bounds(self):
        return self._bounds

    def take_remark(self):
        return None

    def explain(self):
        return "as told"


class Source:
    """A storage as the user has it. ``faces`` are tensors of it with a version counter's owner each."""

    def __init__(self, base):
        self.faces = {"base": base, "detached": base.detach(), "data": base.data}
        self.changes = Counter()  # by version counter: a base and what is detached of it share one
        self.reference = StorageWeakRef(base.untyped_storage())
        self.storage_bytes = base.untyped_storage().nbytes()
        self.records = []

    @property
    def is_held(self):
        return bool(self.faces)


@dataclass(eq=False)
class Known:
    """Bytes that were saved once, however often: what the model knows of a record."""

    serial: int
    source: Source
    face: str
    changes: int
    span: tuple[int, int]
    values: torch.Tensor = field(repr=False)
    real: Record = field(repr=False)
    lives: int = 0  # handles
    is_clean: bool = True  # nobody has changed the storage since

    @property
    def is_copy(self):
        return self.span[1] < SMALL_BYTES <= self.source.storage_bytes


@dataclass(eq=False)
class Saved:
    """A handle, and what it must give back."""

    handle: object
    record: Known
    values: torch.Tensor = field(repr=False)
    view: tuple
    changes: int
    is_torn: bool = False  # changed through another counter: autograd itself would not see it


def counter_of(face):
    return "data" if face == "data" else "base"


def bytes_of(tensor):
    """The elements as (n,) uint8, in a storage of their own."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def span_of(tensor, storage_bytes):
    """(first byte, bytes) to be saved: all, or a small part of a large storage from the start of its page."""
    itemsize = tensor.dtype.itemsize
    first = tensor.storage_offset() * itemsize // PAGE_BYTES * PAGE_BYTES
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = (last + 1) * itemsize - first
    return (0, storage_bytes) if 4 * max(nbytes, tensor.nbytes) >= storage_bytes else (first, nbytes)


def cut(base, shape, where):
    """A view of a flat tensor of at least 8 elements."""
    if shape == "transposed":
        return base[: base.numel() // 4 * 4].view(4, -1).t()
    if shape == "half":
        return base[base.numel() // 2 :]
    if shape == "strided":
        return base[::2]
    if shape == "repeated":
        return base[:1].expand(base.numel())
    if shape == "small":
        size = max(1, base.numel() // 16)
        return base[where % (base.numel() - size) :][:size]
    return base


# One draw each: what hypothesis spends on a draw is most of what a run costs.
COURSES = [  # who goes on while training waits, and how
    *[()] * 10,
    *[((1, GO), (1, GO))] * 3,
    ((2, GO),),
    ((0, errno.EIO),),
    ((1, errno.EIO), (0, GO)),
    ((0, GO), (0, errno.ENOSPC)),
    ((0, HANG),),
]
VIEWS = [
    *[("base", shape, 0) for shape in ("whole", "whole", "whole", "transposed", "half", "strided", "repeated")],
    *[("base", "whole", 0)] * 8,
    *[("base", "small", where) for where in (0, 101, 1100, 3000, 5001)],
    *[(face, shape, 40) for face in ("detached", "data") for shape in ("whole", "small")],
]
ANSWERS = [
    *[(answer, ()) for answer in (Placement.SSD, Placement.HOST, Placement.HOST) for _ in range(8)],
    *[(Placement.KEEP, ())] * 3,
    (Placement.SSD, (errno.ENOSPC,)),
    (Placement.HOST, (GO, errno.EIO)),
]
SIZES = [
    *[(torch.float32, elements) for elements in (300, 300, 400, 500, 8, *[HUGE_ELEMENTS] * 3)],
    *[(dtype, 300) for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.complex64)],
    (torch.uint8, 4 * HUGE_ELEMENTS),
]
course = st.sampled_from(COURSES)
save = st.tuples(st.sampled_from(VIEWS), st.sampled_from(ANSWERS), course)
HOST = [
    *["next_microbatch"] * 9,
    *["expect_backward"] * 9,
    *["announce_backward"] * 6,
    *["end_step"] * 6,
    *["settle"] * 6,
    "close",
]
USER = [*["change_in_place"] * 2, *["drop_source"] * 3, *["drop_handles"] * 3, "drop_result", "drop_result"]


class CacheMachine(RuleBasedStateMachine):
    """Each rule is one thing that happens outside of the cache; see the rules for what may."""

    def __init__(self):
        super().__init__()
        self.handles = []
        self.sources = []
        self.results = []
        self.records = {}  # of the model, by serial of the record that it speaks of
        self.microbatches = []
        self.is_closed = False
        self.expected = Counter()
        self.failures = Counter()
        self.seed = 0
        watched.illegal.clear()
        watched.complaints.clear()

    @initialize(
        names=st.sampled_from([("ssd",), ("ssd",), ("host",), *[("host", "ssd")] * 3]),
        capacity_bytes=st.sampled_from([UNLIMITED, UNLIMITED, 6000, 2500]),
        host_bytes=st.sampled_from([12000, 5000, 3000]),
        inflight_bytes=st.sampled_from([UNLIMITED, UNLIMITED, 5000]),
        prefetch_bytes=st.sampled_from([UNLIMITED, 5000, 1]),
        io_threads=st.sampled_from([1, 1, 2]),
        bounds=st.sampled_from([None, None, LoadBounds(4000, 6000)]),
    )
    def build(self, names, capacity_bytes, host_bytes, inflight_bytes, prefetch_bytes, io_threads, bounds):
        self.clock = ManualClock()
        self.queue = SteppedQueue(
            io_threads=1 if len(names) > 1 else io_threads,
            max_inflight_bytes=inflight_bytes,
            timeout_seconds=IO_TIMEOUT_SECONDS,
            clock=self.clock,
        )
        self.inflight_bytes, self.prefetch_bytes = inflight_bytes, prefetch_bytes
        sizes = {"ssd": capacity_bytes, "host": host_bytes}
        self.tiers = {name: SteppedTier(self.queue, name=name, capacity_bytes=sizes[name]) for name in names}
        self.policy = Answers(bounds)
        self.targets = []
        placements = {"ssd": Placement.SSD, "host": Placement.HOST}
        self.cache = TensorCache(
            placer=Placer(self.policy, {placements[name]: tier for name, tier in self.tiers.items()}, SMALL_BYTES, 3),
            queue=self.queue,
            streams=CpuStreams(),
            device=torch.device("cpu"),
            allocate_target=self.allocate_target,
            prefetch_bytes=prefetch_bytes,
            rank=3,
        )
        self.course = []
        self.queue.when_waiting = self.go_on
        self.begin_forward()

    def allocate_target(self, nbytes):
        target = torch.empty(nbytes, dtype=torch.uint8)
        self.targets.append((StorageWeakRef(target.untyped_storage()), nbytes))
        return target

    def go_on(self):
        """Choose who goes on while training waits: as drawn, and then the oldest."""
        chosen, verdict = self.course.pop(0) if self.course else (0, GO)
        self.let_go_on(chosen, verdict)

    def let_go_on(self, chosen, verdict):
        waiting = self.queue.waiting()
        assert waiting, "training would wait for ever"
        if verdict == HANG:
            self.clock.advance(2 * IO_TIMEOUT_SECONDS)
        else:
            self.queue.release(waiting[chosen % len(waiting)], verdict)

    # ------------------------------------------------------------------ forward

    def next_microbatch(self, chosen):
        self.cache.end_forward(0.0, is_whole=bool(chosen % 2))
        self.begin_forward()

    def begin_forward(self):
        self.expected["microbatches"] += 1
        self.microbatches.append(self.cache.begin_forward())

    @rule(saves=st.lists(save, min_size=1, max_size=5), size=st.sampled_from(SIZES), is_held=seldom)
    def save_new(self, saves, size, is_held):
        """Save tensors that were just computed; mostly nobody else holds them for long."""
        dtype, elements = size
        for each in saves:
            self.seed += 1
            values = torch.randint(0, 200, (elements,), generator=torch.Generator().manual_seed(self.seed))
            source = Source(values.to(dtype, copy=True))
            self.sources.append(source)
            self.save(source, *each)
            if not is_held:
                source.faces.clear()

    @rule(where=st.sampled_from([0, 1100, 3000, 5001]), course=course)
    def save_a_part(self, where, course):
        """A small view of a large storage that nobody else holds."""
        self.seed += 1
        values = torch.randint(0, 200, (HUGE_ELEMENTS,), generator=torch.Generator().manual_seed(self.seed))
        source = Source(values.to(torch.float32))
        self.sources.append(source)
        self.save(source, ("base", "small", where), (Placement.SSD, ()), course)
        source.faces.clear()

    @rule(saves=st.lists(save, min_size=1, max_size=5), changed_before=st.integers(0, 9))
    def save_a_layer(self, saves, changed_before):
        """The same storage again and again, whole and in parts, as fused q, k and v; changed between two of them."""
        self.seed += 1
        values = torch.randint(0, 200, (300,), generator=torch.Generator().manual_seed(self.seed))
        source = Source(values.to(torch.float32))
        self.sources.append(source)
        for position, each in enumerate(saves):
            if position == changed_before:
                source.faces["base"].add_(1)
                self.changed(source, "base")
            self.save(source, *each)
        source.faces.clear()

    @precondition(lambda self: any(source.is_held for source in self.sources))
    @rule(chosen=number, each=save)
    def save_again(self, chosen, each):
        self.save(self.held_source(chosen), *each)

    def save(self, source, view, say, course):
        (face, shape, where), (answer, refusal) = view, say
        tensor = cut(source.faces[face], shape, where)
        self.policy.answer = answer
        self.policy.asked.clear()
        self.course = list(course)
        for tier in self.tiers.values():
            tier.refusals, tier.asked = list(refusal), []
        handle = self.cache.put(tensor)
        self.queue.quiesce()
        for tier in self.tiers.values():
            tier.refusals = []
        self.know(handle, source, face, tensor)

    def know(self, handle, source, face, tensor):
        """Compare what became of a save with what the model says of it, and remember its bytes."""
        span = span_of(tensor, source.storage_bytes)
        changes = source.changes[counter_of(face)]
        record = self.find(source, face, changes, span)
        serial = handle.lease.record.serial
        if record is not None:
            assert serial == record.serial, "the same bytes were taken for other ones"
            self.expected["deduplicated_bytes"] += min(tensor.nbytes, record.span[1])
        else:
            assert serial not in self.records, "other bytes were taken for the same"
            storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            values = storage[span[0] :][: span[1]].clone()
            record = Known(serial, source, face, changes, span, values, handle.lease.record)
            self.records[serial] = record
            source.records.append(record)
            self.count_new(span[1])
        record.lives += 1
        view = tensor.dtype, tensor.shape, tensor.stride()
        # Changed through another counter since its bytes were taken: the limit that the README names (`x.data`).
        is_torn = not record.is_clean
        self.handles.append(Saved(handle, record, bytes_of(tensor), view, changes, is_torn))

    def find(self, source, face, changes, span):
        for record in source.records:
            first, nbytes = record.span
            is_inside = first <= span[0] and span[0] + span[1] <= first + nbytes
            if record.lives and (record.face, record.changes) == (face, changes) and is_inside:
                return record
        return None

    def count_new(self, nbytes):
        """Count new bytes as kept, or as refused by the tiers, from what the policy and the tiers were asked."""
        if self.policy.asked:
            assert nbytes >= SMALL_BYTES
            assert self.policy.asked[0].nbytes == nbytes
        asked = [(name, error) for name, tier in self.tiers.items() for _, error in tier.asked]
        is_placed = any(error is None for _, error in asked)
        self.expected["kept_bytes"] += 0 if is_placed else nbytes
        for name, error in asked:
            if error or (error == 0 and not is_placed):
                self.failures[f"{name}: {errno.errorcode[error] if error else 'budget used up'}"] += 1
        if is_placed and self.is_closed:
            raise AssertionError("a closed tier gave room")

    # ------------------------------------------------------------------ what users do with tensors

    @rule(what=st.sampled_from(USER), chosen=number)
    def user(self, what, chosen):
        getattr(self, what)(chosen)

    def held_source(self, chosen):
        held = [source for source in self.sources if source.is_held]
        return held[chosen % len(held)] if held else None

    def change_in_place(self, chosen):
        """Or what a save has given back, as a backward may that writes into it."""
        source = self.held_source(chosen)
        if source is not None and chosen % 3:
            face = ("base", "base", "detached", "data")[chosen % 4]
            source.faces[face].add_(1)
            self.changed(source, counter_of(face))
        elif self.results:
            result, record = self.results[chosen % len(self.results)]
            result.as_strided((1,), (1,), result.storage_offset()).add_(1)
            self.changed(record.source, counter_of(record.face))

    def changed(self, source, counter):
        source.changes[counter] += 1
        for record in source.records:
            record.is_clean = False
        for saved in self.handles:
            # Another counter did not move: torch itself would say nothing, and give either bytes.
            saved.is_torn |= saved.record.source is source and counter_of(saved.record.face) != counter

    def drop_source(self, chosen):
        source = self.held_source(chosen)
        if source is not None:
            source.faces.clear()

    def drop_handles(self, chosen):
        for _ in range(min(1 + chosen % 5, len(self.handles))):
            self.drop(self.handles.pop(chosen % len(self.handles)))

    def drop(self, saved):
        saved.record.lives -= 1
        saved.handle = None

    def drop_result(self, chosen):
        if self.results:
            del self.results[chosen % len(self.results)]

    # ------------------------------------------------------------------ backward

    @precondition(lambda self: self.handles)
    @rule(chosen=number, is_kept=st.booleans(), is_last=st.booleans(), course=course)
    def get(self, chosen, is_kept, is_last, course):
        index = chosen % len(self.handles)
        self.unpack(self.handles[index], course, is_kept=is_kept)
        if is_last:  # as after the backward of a graph that is not retained
            self.drop(self.handles.pop(index))

    @precondition(lambda self: self.handles)
    @rule(chosen=number, are_stored=st.booleans(), is_expected=st.booleans(), is_retained=seldom, course=course)
    def backward(self, chosen, are_stored, is_expected, is_retained, course):
        """All of one micro-batch, the newest first; with nobody else that holds the bytes."""
        if are_stored:
            self.settle()
        microbatch = self.handles[chosen % len(self.handles)].handle.microbatch
        if is_expected:
            self.cache.expect_backward(microbatch)
            self.queue.quiesce()
        for saved in [saved for saved in reversed(self.handles) if saved.handle.microbatch == microbatch]:
            self.unpack(saved, course, is_kept=False)
            if not is_retained:
                self.handles.remove(saved)
                self.drop(saved)
        if is_expected:
            self.cache.end_backward(0.0)

    def unpack(self, saved, course, *, is_kept):
        self.course = list(course)
        num_ended = len(self.queue.ended)
        record = saved.record
        is_mutated = record.source.changes[counter_of(record.face)] != saved.changes
        outcome, result = self.try_to_get(saved.handle)
        self.queue.quiesce()
        if is_mutated:
            assert outcome == "mutated"
            return
        has_failed = any(
            ended.serial == record.serial and ended.direction is Direction.LOAD and not ended.is_move and ended.error
            for ended in self.queue.ended[num_ended:]
        )
        if outcome == "lost":
            assert has_failed or self.is_closed, "no load was told to fail"
            assert not record.source.is_held, "the bytes are in memory"
            return
        assert outcome == "given"
        assert not has_failed, "what was given, although its load failed?"
        assert (result.dtype, result.shape, result.stride()) == saved.view
        assert saved.is_torn or torch.equal(bytes_of(result), saved.values)
        if is_kept:
            self.results.append((result, record))

    def try_to_get(self, handle):
        try:
            return "given", self.cache.get(handle)
        except SavedTensorMutatedError:
            return "mutated", None
        except LoadError:
            return "lost", None

    @rule(what=st.sampled_from(HOST), chosen=number)
    def host(self, what, chosen):
        getattr(self, what)(chosen)

    def expect_backward(self, chosen):
        self.cache.expect_backward(self.microbatches[chosen % len(self.microbatches)])
        self.queue.quiesce()

    def announce_backward(self, chosen):
        self.cache.announce_backward(self.microbatches[chosen % len(self.microbatches)])
        self.queue.quiesce()

    def end_step(self, _=0):
        stats = self.cache.end_step()
        self.queue.quiesce()
        self.count_ended()
        names = ("microbatches", "stored_bytes", "host_bytes", "loaded_bytes", "deduplicated_bytes", "kept_bytes")
        assert {name: getattr(stats, name) for name in names} == {name: self.expected[name] for name in names}
        failures = {cause: number for cause, number in stats.failures.items() if "left alone" not in cause}
        assert failures == self.failures
        assert stats.rank == 3
        self.expected.clear()
        self.failures.clear()

    def count_ended(self):
        """Count what transfers have moved, and how they failed."""
        while self.queue.ended:
            ended = self.queue.ended.pop()
            if ended.direction is Direction.LOAD and not ended.is_move:
                self.expected["loaded_bytes"] += 0 if ended.error else ended.nbytes
                self.count_unread(ended.lane[0], "load", ended.error)
            elif ended.direction is Direction.LOAD:
                if not is_budget(ended.error):
                    self.count_unread("ssd", "promotion", ended.error)
            else:
                self.count_store(ended)

    def count_unread(self, name, what, error):
        if error is not None:
            self.failures[f"{name}: {cause_of(error)}, {what}"] += 1

    def count_store(self, ended):
        name = "ssd" if ended.is_move else ended.lane[0]
        if ended.error is None:
            # A move that came too late has copied nothing.
            nbytes = self.records[ended.serial].span[1] * ended.is_copied if ended.is_move else ended.nbytes
            self.expected["host_bytes" if name == "host" else "stored_bytes"] += nbytes
            return
        self.expected["kept_bytes"] += ended.nbytes  # a move counts none
        if not (ended.is_move and is_budget(ended.error)):
            self.failures[f"{name}: {cause_of(ended.error)}"] += 1

    # ------------------------------------------------------------------ workers

    @rule(course=st.lists(st.tuples(number, verdict), min_size=1, max_size=8))
    def transfers_go_on(self, course):
        for chosen, verdict in course:
            if self.queue.waiting():
                self.let_go_on(chosen, verdict)
                self.queue.give_up_overdue()
                self.queue.quiesce()

    @rule(chosen=number, verdict=st.sampled_from([GO, GO, errno.EIO]))
    def what_was_given_up_returns(self, chosen, verdict):
        late = self.queue.waiting(is_given_up=True)
        if late:
            self.queue.release(late[chosen % len(late)], verdict)

    def settle(self, _=0):
        self.course = []
        self.queue.wait_idle()
        self.queue.quiesce()
        self.look()

    def close(self, _):
        """As after the last backward, or in the middle of one."""
        if self.is_closed:
            return
        self.is_closed = True
        self.queue.close()
        self.queue.quiesce()
        for tier in self.tiers.values():
            tier.close()

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def nobody_did_what_must_not_be(self):
        if not hasattr(self, "queue"):
            return
        assert [defect for tier in self.tiers.values() for defect in tier.defects] == []
        assert watched.illegal == []
        assert watched.complaints == []

    @invariant()
    def every_extent_has_an_owner_and_the_right_bytes(self):
        if not hasattr(self, "queue") or self.is_closed:
            return
        contents = {name: tier.contents() for name, tier in self.tiers.items()}
        owned = {name: set() for name in self.tiers}
        for record in self.records.values():
            real = record.real
            is_out = real.state in (State.STORING, State.STORED, State.LOADING, State.LOADED)
            if real.state is not State.FREED:
                assert (real.extent is not None) == is_out
            if real.state is not State.FREED and is_out:
                assert real.extent.nbytes == record.span[1]
                owned[real.tier.name].add(real.extent)
                if real.state is not State.STORING and record.is_clean:
                    assert torch.equal(contents[real.tier.name][real.extent], record.values), "wrong bytes at rest"
        for parked in self.queue.parked:
            owned[parked.tier.name].add(parked.extent)
            for extent, block in contents.get("host", {}).items():
                if block is parked.memory:
                    owned["host"].add(extent)
        assert {name: set(extents) for name, extents in contents.items()} == owned

    @invariant()
    def no_budget_is_exceeded(self):
        if not hasattr(self, "queue"):
            return
        queued = [record.real.store for record in self.records.values() if record.real.store is not None]
        largest = max((transfer.nbytes for transfer in queued), default=0)
        assert 0 <= self.queue.inflight_bytes <= max(self.inflight_bytes, largest)
        real = [record.real for record in self.records.values()]
        ahead_bytes = sum(each.span.nbytes for each in real if each.is_ahead and each.tier is not None)
        assert self.cache._reloader._ahead_bytes == ahead_bytes

    def look(self):
        """What holds after the cache has looked for handles that died."""
        is_idle = self.cache.is_idle()
        self.queue.quiesce()
        assert is_idle == (not any(record.lives for record in self.records.values()))
        for serial in [serial for serial, record in self.records.items() if record.real.state is State.FREED]:
            assert not self.records[serial].lives
            if not any(each.serial == serial for each in (*self.queue.ended, *self.running())):
                record = self.records.pop(serial)
                record.source.records.remove(record)
        self.check_memory()

    def running(self):
        return [parked.transfer for parked in self.queue.parked]

    def check_memory(self):
        """Nothing holds bytes that are stored; the account is between what must be and what can be there."""
        running = {transfer.serial for transfer in self.running()}
        held = {id(record.source) for _, record in self.results}
        most = 0
        for source in self.sources:
            pinning = [record for record in source.records if self.pins(record)]
            is_used = any(record.serial in running for record in source.records)
            if not (source.is_held or pinning or is_used or id(source) in held):
                assert source.reference.expired(), "stored bytes are still in memory"
            most += 0 if source.reference.expired() else source.storage_bytes
        copies = sum(record.span[1] for record in self.records.values() if record.is_copy and record.lives)
        targets = sum(nbytes for reference, nbytes in self.targets if not reference.expired())
        assert 0 <= self.cache.live_bytes <= most + copies + targets

    def pins(self, record):
        """Whether a record holds the saved storage itself."""
        state = record.real.state
        if record.lives == 0 or record.is_copy:
            return False
        return state in (State.RESIDENT, State.STORING) or (state is State.LOADED and record.real.first_byte == 0)

    def teardown(self):
        if not hasattr(self, "queue"):
            return
        try:
            if sys.exc_info()[0] is None:  # else a rule has failed, and that is what should be read
                self.let_everything_go()
        finally:
            self.queue.end()

    def let_everything_go(self):
        while self.handles:
            self.drop(self.handles.pop())
        self.results.clear()
        for source in self.sources:
            source.faces.clear()
        self.course = []
        self.queue.wait_idle()
        assert self.cache.is_idle()
        while self.queue.parked:
            self.queue.release(self.queue.parked[0])
        self.queue.wait_idle()
        self.nobody_did_what_must_not_be()
        assert self.cache.is_idle()
        assert [tier.used_bytes for tier in self.tiers.values()] == [0] * len(self.tiers)
        assert all(source.reference.expired() for source in self.sources)
        assert self.cache.live_bytes == 0
        assert self.queue.inflight_bytes == 0
        assert self.cache._reloader._ahead_bytes == 0
        assert len(self.cache._reloader.schedule) == 0
        self.end_step()


def is_budget(error):
    return isinstance(error, CapacityError) and error.errno is None


def cause_of(error):
    number = getattr(error, "errno", None)
    return (
        type(error).__name__ if number is None else "timeout" if number == errno.ETIMEDOUT else errno.errorcode[number]
    )


class Watched(logging.Handler):
    """Moves that are not drawn in docs/design.md, and what workers logged as defects of ours."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.illegal = []
        self.complaints = []

    def emit(self, record):
        self.complaints.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")

    def move(self, before, after):
        if (before, after) not in MOVES and after is not State.FREED:
            self.illegal.append((before, after))


watched = Watched()


@pytest.fixture
def watching(monkeypatch, caplog):
    """Look at every move of a record, and listen to the workers."""
    move = Record.move

    def watch(record, operation, to):
        watched.move(record.state, to)
        move(record, operation, to)

    monkeypatch.setattr(Record, "move", watch)
    caplog.set_level(logging.CRITICAL, logger="ssdtrain_plugin.failures")  # a warning a cause and run, unread
    workers = logging.getLogger("ssdtrain_plugin.transfer")
    workers.addHandler(watched)
    yield
    workers.removeHandler(watched)


@pytest.mark.slow
@pytest.mark.timeout(900)  # worker and test change over at each step: slow where cores are busy
def test_whatever_happens_the_cache_gives_back_what_was_saved(watching, request):
    runs = request.config.getoption("--machine-runs")
    options = settings(
        max_examples=runs or RUNS_IN_CI,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=not runs,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
    )
    run_state_machine_as_test(CacheMachine, settings=options)
