"""One run of the race suite: everything follows from its seed."""

import gc
import importlib
import logging
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch
from race_checks import Checks, WatchedQueue
from race_program import PlainRun, PluginRun, are_same, random_program
from race_scheduler import Aborted, Scheduler, Violation
from race_threading import SimThreading, SimTime, replaced
from race_tier import CheckingTier, Faults

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import LoadBounds, Placement
from ssdtrain_plugin.policy.fixed import FractionPolicy
from ssdtrain_plugin.streams import CpuStreams

__all__ = ["Report", "prepare_process", "race"]

_TIMEOUT_SECONDS = 60.0
_MODULES = tuple(
    importlib.import_module(f"ssdtrain_plugin.{name}")
    for name in ("cache", "deadlines", "ledger", "migration", "records", "reload", "table", "transfer")
)
_LOGGER = logging.getLogger("ssdtrain_plugin")


@dataclass
class Report:
    """What a run was like.

    Attributes:
        seed: Of the run.
        failure: What went wrong, in full; or None.
        digest: Of all points of the scheduler: equal if the run was the same.
        seen: What happened, and how often.
    """

    seed: int
    failure: str | None = None
    digest: int = 0
    seen: Counter = field(default_factory=Counter)


class RandomPolicy:
    """Any place that has room, by chance."""

    is_learning = False

    def __init__(self, chance):
        self._chance = chance
        self._bounds = LoadBounds(chance.choice([1, 200, 1000]), chance.choice([100, 500, 1 << 40]))
        self._bounds = chance.choice([None, self._bounds])

    def decide(self, request):
        places = [Placement.KEEP, *([Placement.SSD] * 2 if request.has_ssd else [])]
        if request.nbytes <= request.host_free_bytes:
            places += [Placement.HOST] * 2
        return self._chance.choice(places)

    def observe(self, observation):
        pass

    def load_bounds(self):
        return self._bounds

    def take_remark(self):
        return None

    def explain(self):
        return "by chance"


class _Loud(logging.Handler):
    """What the package logs as an error is a defect."""

    def __init__(self, scheduler):
        super().__init__(logging.ERROR)
        self._scheduler = scheduler

    def emit(self, record):
        cause = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        if self._scheduler.failure is None and not (record.exc_info and record.exc_info[0] is Aborted):
            self._scheduler.failure = Violation(f"{record.getMessage()}\n{cause}")


class Rig:
    """A cache over checking tiers, by the seed's choice of sizes, faults and policy."""

    def __init__(self, seed, scheduler):
        self.chance = random.Random(f"{seed}/rig")
        self.scheduler = scheduler
        self.threading = SimThreading(scheduler)
        self.has_passed_time = False
        self.is_closed_early = False
        chance = self.chance
        self._can_hang = chance.random() < 0.4
        self.faults = Faults(seed, self._rates(chance))
        self.tiers = self._tiers(chance)
        max_inflight_bytes = chance.choice([1, 200, 500, 1 << 30])
        self.queue = WatchedQueue(
            scheduler,
            io_threads=chance.choice([1, 1, 2, 3]),
            max_inflight_bytes=max_inflight_bytes,
            timeout_seconds=_TIMEOUT_SECONDS if self._can_hang else float("inf"),
            clock=SimTime(scheduler).monotonic,
        )
        self.cache = TensorCache(
            placer=Placer(
                chance.choice([FractionPolicy(1.0), FractionPolicy(0.5), RandomPolicy(chance)]),
                self.tiers,
                chance.choice([1, 1, 1, 90]),
                0,
            ),
            queue=self.queue,
            streams=CpuStreams(),
            device=torch.device("cpu"),
            allocate_target=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
            prefetch_bytes=chance.choice([1, 100, 300, 1 << 30]),
            rank=0,
        )
        self.cache._lock.name = "the cache's lock"
        self.queue._lock.name = "the queue's lock"
        self.checks = Checks(scheduler, self.cache, self.queue, self.tiers, max_inflight_bytes=max_inflight_bytes)

    def _rates(self, chance):
        rates = {}
        if chance.random() < 0.4:
            rates |= {("fail", name): chance.choice([0.0, 0.05, 0.3]) for name in ("write", "read", "allocate")}
        if self._can_hang:
            rates |= {("hang", name): chance.choice([0.0, 0.05, 0.2]) for name in ("write", "read")}
        return rates

    def _tiers(self, chance):
        sizes = {
            Placement.HOST: (chance.choice([256, 512, 1024]), 64),
            Placement.SSD: (chance.choice([1024, 1 << 14, 1 << 14]), chance.choice([16, 64])),
        }
        kept = chance.choice([[Placement.SSD], [Placement.HOST], list(sizes), list(sizes), list(sizes)])
        tiers = {
            place: CheckingTier(
                place.value,
                self.scheduler,
                self.faults,
                capacity_bytes=sizes[place][0],
                alignment=sizes[place][1],
                has_memory=place is Placement.HOST,
            )
            for place in kept
        }
        for tier in tiers.values():
            tier.others = [other for other in tiers.values() if other is not tier]
        return tiers

    def release(self):
        for tier in self.tiers.values():
            tier.release()
        self.scheduler.point("what hangs may go on")

    def let_time_pass(self):
        if self._can_hang:
            self.has_passed_time = True
            self.scheduler.now += _TIMEOUT_SECONDS + 1
            if self.chance.random() < 0.5:
                self.queue.give_up_overdue()

    def close(self):
        self.is_closed_early = True
        self.queue.close()

    def may_be_lost(self, message):
        """Tell whether something that this run does on purpose explains an error of a load."""
        injected = self.faults.injected
        if "injected" in message:
            return injected["fail", "read"] > 0
        if "no end after" in message or "all transfers before it hang" in message:
            return self.has_passed_time or injected["hang", "read"] + injected["hang", "write"] > 0
        return "the offloader was detached" in message and self.is_closed_early

    def finish(self):
        """End all that goes on, in one order or another."""
        releases_first = self.chance.random() < 0.5
        if releases_first:
            self.release()
            for _ in range(2):
                self.cache.is_idle()
                self.queue.wait_idle()
        self.cache.is_idle()
        self.queue.close()
        self.release()
        others = self.scheduler.tasks[1:]
        self.scheduler.block_until(lambda: all(task.is_finished for task in others), "the end of all threads")
        self.cache.is_idle()


def prepare_process():
    """Make runs of this process fast and the same everywhere: one thread a kernel, no collection by itself."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.disable()


def race(seed, threads):
    """Run one seed, on threads that are lent."""
    program = random_program(seed)
    expected = PlainRun(program).run()
    scheduler = Scheduler(seed, threads, traced=[module.__file__ for module in _MODULES])
    report = Report(seed)
    was_enabled = gc.isenabled()
    gc.disable()
    handler, was_propagating = _Loud(scheduler), _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False
    shims = {"threading": SimThreading(scheduler), "time": SimTime(scheduler)}
    try:
        with replaced(_MODULES, **shims), scheduler:
            _run(seed, scheduler, program, expected, report)
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.propagate = was_propagating
        if was_enabled:
            gc.enable()
    report.digest = scheduler.digest
    report.seen["points"], report.seen["preemptions"] = scheduler.num_points, scheduler.num_preemptions
    if scheduler.failure is not None:
        report.failure = _text_of(scheduler.failure, scheduler)
    return report


def _run(seed, scheduler, program, expected, report):
    try:
        rig = Rig(seed, scheduler)
        run = PluginRun(program, rig)
        ours = run.run()
        rig.finish()
        run.steps.append(rig.cache.end_step())
        for number, outcome in expected.items():
            is_same = are_same(ours[number], outcome) or ours[number] == "lost"
            words = [found if isinstance(found, str) else "gradients" for found in (ours[number], outcome)]
            differ = "gradients differ" if words == ["gradients"] * 2 else f"{words[0]}, expected {words[1]}"
            scheduler.check(is_same, f"micro-batch {number}: {differ}\nours {ours[number]}\nexpected {outcome}")
        rig.checks.at_end(run.steps, may_leak=run.num_raised > 0)
        _count(report.seen, rig, run, ours)
    except Aborted:
        pass
    except BaseException as error:  # noqa: BLE001 - any is a failure of the run
        scheduler.failure = scheduler.failure or error


def _count(seen, rig, run, ours):
    seen["with another thread"] += run._other is not None
    for outcome in ours.values():
        seen[outcome.partition(":")[0] if isinstance(outcome, str) else "gradients"] += 1
    for (kind, operation), number in rig.faults.injected.items():
        seen[f"{kind} {operation}"] += number
    for step in run.steps:
        for name in ("stored_bytes", "host_bytes", "loaded_bytes", "forwarded_bytes", "deduplicated_bytes"):
            seen[name] += getattr(step, name)
        for cause, number in step.failures.items():
            seen[cause] += number


def _text_of(error, scheduler):
    text = "".join(traceback.format_exception(error)).rstrip()
    return text if "threads:" in text else f"{text}\n{scheduler.picture()}"
