"""Tiers that wait or fail on command, so that a test decides what happens when."""

import threading
from collections import Counter

import torch

from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.errors import CapacityError, LoadError, StoreError
from ssdtrain_plugin.placement import Placer
from ssdtrain_plugin.policy.base import Placement
from ssdtrain_plugin.storage.base import Extent, Tier
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.transfer import TransferQueue

TIMEOUT_SECONDS = 20.0


class Gate:
    """Open or shut; who passes a shut gate waits, but not for ever."""

    def __init__(self, is_open=True):
        self._event = threading.Event()
        self._arrived = threading.Semaphore(0)
        if is_open:
            self._event.set()

    def open(self):
        self._event.set()

    def shut(self):
        """Let nobody pass from now on; who passed before has not arrived for :meth:`wait_for_arrival`."""
        while self._arrived.acquire(blocking=False):
            pass
        self._event.clear()

    def pass_through(self):
        self._arrived.release()
        if not self._event.wait(TIMEOUT_SECONDS):
            raise TimeoutError("nobody opened the gate")

    def wait_for_arrival(self):
        """Return when one more worker stands at the gate, or has passed it."""
        assert self._arrived.acquire(timeout=TIMEOUT_SECONDS), "nobody came to the gate"


class MemoryTier(Tier):
    """Bytes in a dictionary. Checks that its owner keeps to the sequence of a tier."""

    def __init__(self, name="ssd", capacity_bytes=1 << 40):
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.counts = Counter()
        self.order = []
        self._lock = threading.Lock()
        self._next_offset = 0
        self._live = {}
        self._is_closed = False

    @property
    def used_bytes(self):
        with self._lock:
            return sum(extent.nbytes for extent, _ in self._live.values())

    @property
    def free_bytes(self):
        return self.capacity_bytes - self.used_bytes

    def allocate(self, nbytes):
        if nbytes > self.free_bytes:
            raise CapacityError(f"cannot store activation: {nbytes} bytes (no room)", nbytes=nbytes)
        with self._lock:
            extent = Extent(self._next_offset, nbytes, nbytes)
            self._next_offset += nbytes
            self._live[extent.offset] = (extent, None)
        return extent

    def write(self, extent, source, ready):
        ready.synchronize()
        with self._lock:
            self.counts["write"] += 1
            self.order.append(("write", extent.offset))
            assert self._live[extent.offset][0] == extent
            self._live[extent.offset] = (extent, source.clone())

    def read(self, extent, target, ready):
        ready.synchronize()
        with self._lock:
            self.counts["read"] += 1
            self.order.append(("read", extent.offset))
            _, data = self._live[extent.offset]
            assert data is not None, "read before the write ended"
            target.copy_(data)
        return DeviceEvent()

    def free(self, extent):
        with self._lock:
            if not self._is_closed:
                self.counts["free"] += 1
                live, _ = self._live.pop(extent.offset)  # KeyError: freed twice
                assert live == extent

    def describe(self):
        return f"{self.name}: a dictionary"

    def close(self):
        with self._lock:
            self._is_closed = True
            self._live.clear()


class GatedTier(MemoryTier):
    """Writes and reads wait at a gate each; the bytes are copied after it."""

    def __init__(self, *, writes_open=True, reads_open=True, **options):
        super().__init__(**options)
        self.writes = Gate(writes_open)
        self.reads = Gate(reads_open)

    def write(self, extent, source, ready):
        self.writes.pass_through()
        super().write(extent, source, ready)

    def read(self, extent, target, ready):
        self.reads.pass_through()
        return super().read(extent, target, ready)

    def close(self):
        self.writes.open()
        self.reads.open()
        super().close()


class FlakyTier(MemoryTier):
    """Fails when told: ``fail_write(n)``, ``fail_read(n)``, ``fail_allocate(n)`` give an error or None, n from 0."""

    def __init__(self, *, fail_allocate=None, fail_write=None, fail_read=None, **options):
        super().__init__(**options)
        self._rules = {"allocate": fail_allocate, "write": fail_write, "read": fail_read}
        self.calls = Counter()

    def _maybe_fail(self, name):
        with self._lock:
            number = self.calls[name]
            self.calls[name] += 1
        rule = self._rules[name]
        error = rule(number) if rule is not None else None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or the traceback and this frame would hold each other, and the caller's locals

    def allocate(self, nbytes):
        self._maybe_fail("allocate")
        return super().allocate(nbytes)

    def write(self, extent, source, ready):
        self._maybe_fail("write")
        super().write(extent, source, ready)

    def read(self, extent, target, ready):
        self._maybe_fail("read")
        return super().read(extent, target, ready)


def store_error(number=5):
    return StoreError("cannot store activation: injected", errno=number, path="/nowhere", offset=4096, nbytes=1)


def load_error(number=5):
    return LoadError("cannot load activation: injected", errno=number, path="/nowhere", offset=4096, nbytes=1)


class AlwaysOffload:
    """Everything to one placement."""

    is_learning = False

    def __init__(self, placement=Placement.SSD):
        self._placement = placement
        self.observed = []

    def decide(self, request):
        has_room = request.has_ssd if self._placement is Placement.SSD else request.nbytes <= request.host_free_bytes
        return self._placement if has_room else Placement.KEEP

    def observe(self, observation):
        self.observed.append(observation.stats)

    def load_bounds(self):
        return None

    def take_remark(self):
        return None

    def explain(self):
        return f"everything to {self._placement.value}"


class CacheRig:
    """A cache over one fake tier, and what it is made of. A context manager: closes the queue."""

    def __init__(
        self,
        tier,
        *,
        io_threads=1,
        max_inflight_bytes=1 << 40,
        prefetch_bytes=1 << 40,
        min_tensor_bytes=1,
        policy=None,
        rank=0,
        **queue_options,
    ):
        self.tier = tier
        self.queue = TransferQueue(io_threads=io_threads, max_inflight_bytes=max_inflight_bytes, **queue_options)
        placement = Placement.HOST if tier.name == "host" else Placement.SSD
        self.policy = policy or AlwaysOffload(placement)
        self.cache = TensorCache(
            placer=Placer(self.policy, {placement: tier}, min_tensor_bytes, rank),
            queue=self.queue,
            streams=CpuStreams(),
            device=torch.device("cpu"),
            allocate_target=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
            prefetch_bytes=prefetch_bytes,
            rank=rank,
        )

    def __enter__(self):
        self.cache.begin_forward()
        return self

    def __exit__(self, *_):
        for gate in ("writes", "reads"):
            if hasattr(self.tier, gate):
                getattr(self.tier, gate).open()
        self.queue.close()
        self.tier.close()

    def settle(self):
        """Return when no transfer is queued or running."""
        self.queue.wait_idle()


def causes_of(stats):
    """What failed in a step, without the paths, and without the pauses that followed."""
    return {cause.partition(" at /")[0] for cause in stats.failures if "left alone" not in cause}


def ahead_bytes(cache):
    """Bytes loaded or held for a backward that has not asked yet."""
    return cache._reloader._ahead_bytes
