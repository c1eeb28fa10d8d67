"""A random training program: micro-batches and what happens to them, as data; run with or without us."""

import contextlib
import ctypes
import gc
import random
from dataclasses import dataclass, field

import torch
from random_graphs import BINARY, COLUMNS, IN_PLACE, ROWS, UNARY, backward, leaves, loss_of, run_steps
from torch.autograd.graph import saved_tensors_hooks

from ssdtrain_plugin.errors import LoadError, OffloadError, SavedTensorMutatedError

__all__ = ["Lost", "Microbatch", "PlainRun", "PluginRun", "Program", "are_same", "random_program"]

_NUM_SHARED = 3
_KINDS = ("unary", "unary", "unary", "binary", "shared", "in place")
_NAMES = {"unary": sorted(UNARY), "binary": sorted(BINARY), "in place": sorted(IN_PLACE), "shared": ["mul"]}
_EXTRAS = {
    "expect": 4, "announce": 4, "settle": 2, "mutate": 1, "mutate shared": 1.5, "replace shared": 2, "forget": 2,
    "end step": 1, "collect": 1, "release": 1, "time passes": 1, "discard": 3, "ask": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Microbatch:
    """What forward does, and how its graph ends.

    Attributes:
        steps: As of :func:`random_graphs.run_steps`; or ``shared``: times a tensor of all micro-batches.
        passes: How often backward runs over its graph.
        keeps_pool: Who trains holds the results until told to forget them, as a pipeline does.
        is_elsewhere: Its backward, or its death, is in another thread.
    """

    steps: tuple
    passes: int
    keeps_pool: bool
    is_elsewhere: bool


@dataclass(frozen=True)
class Program:
    """Micro-batches, and the order of events: pairs of a word and a number."""

    microbatches: tuple
    events: tuple


def random_program(seed):
    """Make a program."""
    chance = random.Random(f"{seed}/program")
    has_other_thread = chance.random() < 0.5
    microbatches = tuple(_random_microbatch(chance, has_other_thread) for _ in range(chance.randint(1, 4)))
    return Program(microbatches, tuple(_random_events(chance, microbatches, has_other_thread)))


def _random_microbatch(chance, has_other_thread):
    steps = []
    for _ in range(chance.randint(3, 9)):
        kind = chance.choice(_KINDS)
        if kind == "in place" and chance.random() < 0.6:
            kind = "unary"
        steps.append((kind, chance.choice(_NAMES[kind]), chance.randint(0, 9), chance.randint(0, 9)))
    return Microbatch(
        steps=tuple(steps),
        passes=chance.choice([1, 1, 1, 2]),
        keeps_pool=chance.random() < 0.5,
        is_elsewhere=has_other_thread and chance.random() < 0.6,
    )


def _random_events(chance, microbatches, has_other_thread):
    most_open = chance.randint(1, 3)
    extra_rate = chance.choice([0.0, 0.3, 0.6])
    closes_early = chance.random() < 0.05
    order = chance.choice(["first", "last", "any"])
    waiting, is_open = list(range(len(microbatches)))[::-1], []
    while waiting or is_open:
        while is_open and chance.random() < extra_rate:
            word = chance.choices(list(_EXTRAS), list(_EXTRAS.values()))[0]
            if word == "mutate shared" and has_other_thread:
                continue  # which of two threads comes first would change what is right
            yield word, chance.choice(is_open)
        if waiting and len(is_open) < most_open and (not is_open or chance.random() < 0.6):
            is_open.append(waiting.pop())
            yield "forward", is_open[-1]
            continue
        if closes_early and not waiting:
            closes_early = False
            yield "close", 0
        index = {"first": 0, "last": -1, "any": chance.randrange(len(is_open))}[order]
        yield ("drop" if chance.random() < 0.15 else "backward"), is_open.pop(index)


@dataclass
class _Graph:
    loss: torch.Tensor
    inputs: list
    pool: list | None
    number: int = -1


class Lost(Exception):  # noqa: N818 - an outcome, no error
    """Bytes are lost, and a fault that was injected says why."""


@dataclass
class PlainRun:
    """Runs a program by autograd alone.

    Attributes:
        outcomes: Of each micro-batch: gradients, or a word for what went wrong.
    """

    program: Program
    outcomes: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(5)
        self.shared = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(_NUM_SHARED)]
        self.graphs = {}
        self._num_replaced = 0

    def run(self):
        for word, number in self.program.events:
            method = getattr(self, f"do_{word.replace(' ', '_')}", None)
            if method is not None and (number in self.graphs or word in ("forward", "close")):
                method(number)
        return self.outcomes

    # Events

    def do_forward(self, number):
        torch.manual_seed(11 + number)
        try:
            self.graphs[number] = self.forward(number)
        except RuntimeError as error:
            self.outcomes[number] = f"forward: {str(error)[:40]}"

    def do_backward(self, number):
        graph, work = self.graphs.pop(number), self.program.microbatches[number]
        if not graph.loss.requires_grad:
            self.outcomes[number] = "no gradient"
            return
        graph.pool = None
        self.outcomes[number] = "dropped"
        self.elsewhere(self.backward, number, work, [graph])

    def do_drop(self, number):
        self.outcomes[number] = "dropped"
        graph, work = self.graphs.pop(number), self.program.microbatches[number]
        self.elsewhere(lambda _, graphs: graphs.clear(), number, work, [graph])

    def do_mutate(self, number):
        pool = self.graphs[number].pool
        if pool:
            with contextlib.suppress(RuntimeError):  # elements that share memory: refused, and nothing has changed
                pool[number % len(pool)].detach().mul_(1.25)

    def do_mutate_shared(self, number):
        self.shared[number % _NUM_SHARED].mul_(0.75)

    def do_replace_shared(self, number):
        """What graphs have saved of the old one is alive on a tier only."""
        self._num_replaced += 1
        generator = torch.Generator().manual_seed(100 + self._num_replaced)
        self.shared[number % _NUM_SHARED] = torch.randn(ROWS, COLUMNS, generator=generator)

    def do_forget(self, number):
        self.graphs[number].pool = None

    # Parts

    def make_pool(self, number, inputs):
        pool = [x * 1.0 for x in inputs]
        for step in self.program.microbatches[number].steps:
            kind, _, first, second = step
            if kind == "shared":
                pool.append(pool[first % len(pool)] * self.shared[second % _NUM_SHARED])
            else:
                run_steps([step], pool)
        return pool

    def forward(self, number):
        inputs = leaves()
        pool = self.make_pool(number, inputs)
        loss = loss_of(pool)
        return _Graph(loss, inputs, pool if self.program.microbatches[number].keeps_pool else None)

    def elsewhere(self, work, number, microbatch, graphs):
        work(number, graphs)

    def backward(self, number, graphs):
        passes = self.program.microbatches[number].passes
        try:
            self.outcomes[number] = backward(graphs[0].loss, graphs[0].inputs, passes, self.after_pass)
        except RuntimeError as error:
            self.outcomes[number] = self.word_for(error)
        graphs.clear()

    def after_pass(self):
        pass

    def word_for(self, error):
        if "modified by an inplace operation" in str(error) or "has been modified inplace" in str(error):
            return "mutated"  # of views of a split torch says it in other words, and looks at other times
        return f"backward: {str(error)[:60]}"


class PluginRun(PlainRun):
    """Runs a program with the cache under autograd, in a thread or two of the scheduler."""

    def __init__(self, program, rig):
        self.rig = rig
        self.steps = []
        self.num_raised = 0
        self._num_in_backward = 0
        self._jobs = []
        self._is_over = False
        self._other = None
        super().__init__(program)

    def run(self):
        rig = self.rig
        if any(work.is_elsewhere for work in self.program.microbatches):
            self._other = rig.threading.Thread(target=self._serve, name="other")
            self._other.start()
        super().run()
        for number in list(self.graphs):
            self.do_drop(number)
        if self._other is not None:
            self._is_over = True
            self._other.join()
        return self.outcomes

    def _serve(self):
        while True:
            self.rig.scheduler.block_until(lambda: self._jobs or self._is_over, "a job")
            if not self._jobs:
                return
            work, number, graphs = self._jobs.pop(0)
            work(number, graphs)
            del work, graphs

    def elsewhere(self, work, number, microbatch, graphs):
        if microbatch.is_elsewhere:
            self._jobs.append((work, number, graphs))
            self.rig.scheduler.point("a job is given")
        else:
            work(number, graphs)

    def forward(self, number):
        cache, inputs = self.rig.cache, leaves()
        index = cache.begin_forward()
        is_whole = False
        try:
            with saved_tensors_hooks(cache.put, cache.get):
                pool = self.make_pool(number, inputs)
                loss = loss_of(pool)
            is_whole = True
        finally:
            cache.end_forward(0.0, is_whole=is_whole)
        return _Graph(loss, inputs, pool if self.program.microbatches[number].keeps_pool else None, index)

    def backward(self, number, graphs):
        chance, index = self.rig.chance, graphs[0].number
        is_announced = chance.random() < 0.5
        if is_announced:
            self.rig.cache.expect_backward(index)
        self._num_in_backward += 1
        super().backward(number, graphs)
        self._num_in_backward -= 1
        if is_announced:
            self.rig.cache.end_backward(0.0)

    def after_pass(self):
        if self._num_in_backward == 1:
            self.rig.checks.after_pass()

    def word_for(self, error):
        self.num_raised += 1
        if isinstance(error, SavedTensorMutatedError):
            return "mutated"
        if isinstance(error, LoadError) and self.rig.may_be_lost(str(error)):
            return "lost"
        if isinstance(error, OffloadError):
            raise error
        return super().word_for(error)

    # Events that autograd alone knows nothing of

    def do_expect(self, number):
        self.rig.cache.expect_backward(self.graphs[number].number)

    def do_announce(self, number):
        self.rig.cache.announce_backward(self.graphs[number].number)

    def do_settle(self, number):
        self.rig.queue.wait_idle()

    def do_end_step(self, number):
        self.steps.append(self.rig.cache.end_step())

    def do_collect(self, number):
        gc.collect()

    def do_release(self, number):
        self.rig.release()

    def do_ask(self, number):
        self.rig.cache.is_idle()
        self.rig.cache.live_bytes  # noqa: B018 - a property with work

    def do_time_passes(self, number):
        self.rig.let_time_pass()

    def do_close(self, number):
        self.rig.close()

    def do_discard(self, number):
        """Free the memory of a result for a while, as a host that recomputes it does, and fill it again elsewhere."""
        pool = self.graphs[number].pool
        if not pool:
            return
        tensor = pool[self.rig.chance.randrange(len(pool))]
        storage = tensor.untyped_storage()
        nbytes, address = storage.nbytes(), storage.data_ptr()
        saved = ctypes.string_at(address, nbytes)
        self.rig.checks.may_be_ahead_in_vain = True
        storage.resize_(0)
        self.rig.scheduler.point("memory is freed")
        if self.rig.chance.random() < 0.5:
            self.rig.queue.wait_idle()
        self.rig.scheduler.check(storage.nbytes() == 0, "a storage that its owner freed has memory again")
        taken = []
        storage.resize_(nbytes)
        while (
            storage.data_ptr() == address
        ):  # the same place again cannot be noticed: a limit that docs/design.md names
            storage.resize_(0)
            taken.append(torch.empty(nbytes, dtype=torch.uint8))
            storage.resize_(nbytes)
        ctypes.memmove(storage.data_ptr(), saved, nbytes)


def are_same(ours, expected):
    """Compare the outcomes of one micro-batch, to the last bit."""
    if isinstance(ours, str) or isinstance(expected, str):
        return ours == expected
    return len(ours) == len(expected) and all(_is_same(a, b) for a, b in zip(ours, expected, strict=True))


def _is_same(a, b):
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))
