"""The cache over a tier with gates: what is where, who waits for what, and what is given back when."""

import errno
import gc
import threading

import pytest
import torch
from fakes import TIMEOUT_SECONDS, CacheRig, FlakyTier, GatedTier, MemoryTier, ahead_bytes, store_error
from torch.autograd.graph import saved_tensors_hooks

from ssdtrain_plugin.errors import CapacityError, LoadError, OffloadError, SavedTensorMutatedError
from ssdtrain_plugin.records import KeptTensor


def settled(rig):
    """Statistics after everything under way has ended."""
    rig.settle()
    return rig.cache.end_step()


def assert_empty(rig):
    rig.settle()
    assert rig.cache.is_idle()
    rig.settle()
    assert rig.cache.is_idle()
    assert rig.cache.live_bytes == 0
    assert rig.tier.used_bytes == 0
    assert ahead_bytes(rig.cache) == 0


def test_round_trip_through_the_tier():
    with CacheRig(MemoryTier()) as rig:
        tensor = torch.randn(5, 7).t()
        expected = tensor.clone()
        handle = rig.cache.put(tensor)
        rig.settle()
        assert rig.cache.live_bytes == tensor.untyped_storage().nbytes(), "the caller still holds it"
        del tensor
        assert rig.cache.live_bytes == 0
        back = rig.cache.get(handle)
        assert torch.equal(back, expected)
        assert back.stride() == (1, 7)
        del back, handle
        stats = settled(rig)
        assert (stats.stored_bytes, stats.loaded_bytes) == (140, 140)
        assert_empty(rig)


def test_forwarding_while_storing():
    tier = GatedTier(writes_open=False)
    with CacheRig(tier) as rig:
        tensor = torch.randn(8)
        handle = rig.cache.put(tensor)
        tier.writes.wait_for_arrival()
        back = rig.cache.get(handle)
        assert back.data_ptr() == tensor.data_ptr()
        tier.writes.open()
        rig.settle()
        assert rig.cache.get(handle).data_ptr() == tensor.data_ptr(), "it stays in memory then"
        assert tier.used_bytes == 0
        del handle, back
        stats = settled(rig)
        assert (stats.forwarded_bytes, stats.loaded_bytes) == (32, 0)
        assert_empty(rig)


def test_a_queued_store_is_cancelled_when_its_tensor_is_forwarded():
    tier = GatedTier(writes_open=False)
    with CacheRig(tier) as rig:
        first, second = torch.randn(8), torch.randn(16)
        handles = [rig.cache.put(first), rig.cache.put(second)]
        tier.writes.wait_for_arrival()
        assert rig.cache.get(handles[1]).data_ptr() == second.data_ptr()
        assert rig.queue.inflight_bytes == 32
        tier.writes.open()
        stats = settled(rig)
        # Its unpack begins a backward, so what runs is forwarded too: it is wanted next.
        assert (stats.stored_bytes, stats.forwarded_bytes) == (32, 96)
        handles.clear()
        del first, second
        assert_empty(rig)


def test_a_queued_store_is_cancelled_when_its_graph_is_dropped():
    tier = GatedTier(writes_open=False)
    with CacheRig(tier) as rig:
        handles = [rig.cache.put(torch.randn(8)) for _ in range(3)]
        tier.writes.wait_for_arrival()
        handles.clear()
        assert rig.cache.is_idle()
        assert rig.queue.inflight_bytes == 32
        tier.writes.open()
        assert settled(rig).stored_bytes == 32
        assert tier.counts["write"] == 1
        assert_empty(rig)


def test_bytes_that_move_under_their_store_stay_in_memory():
    """1. A store runs. 2. Its storage gets other memory, and its values later. 3. What was written is neither."""
    tier = GatedTier(writes_open=False)
    with CacheRig(tier) as rig:
        tensor = torch.randn(8)
        expected = tensor.clone()
        handle = rig.cache.put(tensor)
        tier.writes.wait_for_arrival()
        tensor.untyped_storage().resize_(2 * tensor.nbytes)  # elsewhere: the old memory is freed after it
        tensor.data.zero_()
        tier.writes.open()
        rig.settle()
        assert tier.counts["write"] == 1
        tensor.data.copy_(expected)
        del tensor
        assert torch.equal(rig.cache.get(handle), expected)
        del handle
        assert_empty(rig)


def test_bytes_in_memory_because_somebody_holds_them_are_not_read():
    with CacheRig(MemoryTier()) as rig:
        tensor = torch.randn(8)
        handle = rig.cache.put(tensor)
        rig.settle()
        assert rig.cache.get(handle).data_ptr() == tensor.data_ptr()
        stats = settled(rig)
        assert (stats.stored_bytes, stats.loaded_bytes, stats.forwarded_bytes) == (32, 0, 32)
        del handle, tensor
        assert_empty(rig)


def test_a_storage_that_is_alive_but_freed_is_loaded():
    with CacheRig(MemoryTier()) as rig:
        tensor = torch.randn(8)
        expected = tensor.clone()
        handle = rig.cache.put(tensor)
        rig.settle()
        tensor.untyped_storage().resize_(0)
        assert torch.equal(rig.cache.get(handle), expected)
        assert tensor.untyped_storage().nbytes() == 0, "it is its owner who fills it again"
        del handle, tensor
        assert settled(rig).loaded_bytes == 32
        assert_empty(rig)


def test_one_storage_is_stored_once():
    with CacheRig(MemoryTier()) as rig:
        base = torch.randn(4, 12)
        q, k, v = base.chunk(3, 1)
        handles = [rig.cache.put(view) for view in (q, k, v, base.t(), q.t(), base)]
        expected = [view.clone() for view in (q, k, v, base.t(), q.t(), base)]
        rig.settle()
        assert rig.tier.counts["write"] == 1
        del base, q, k, v
        for handle, values in zip(handles, expected, strict=True):
            assert torch.equal(rig.cache.get(handle), values)
        del handle
        handles.clear()
        stats = settled(rig)
        assert stats.stored_bytes == 4 * 12 * 4
        assert stats.deduplicated_bytes > 0
        assert_empty(rig)


def test_a_detached_alias_is_stored_again_because_its_counter_cannot_be_compared():
    with CacheRig(MemoryTier()) as rig:
        base = torch.randn(4, 12)
        handles = [rig.cache.put(base), rig.cache.put(base.detach()), rig.cache.put(base.data)]
        rig.settle()
        assert rig.tier.counts["write"] == 3
        for handle in handles:
            assert torch.equal(rig.cache.get(handle), base)
        del base, handle
        handles.clear()
        assert settled(rig).saved_bytes == 4 * 12 * 4, "in memory it is there only once"
        assert_empty(rig)


def test_a_small_view_of_a_huge_storage_is_stored_alone():
    with CacheRig(MemoryTier()) as rig:
        huge = torch.randn(1 << 16)
        view = huge[40000:40100].view(10, 10).t()
        expected = view.clone()
        handle = rig.cache.put(view)
        rig.settle()
        del huge, view
        assert rig.cache.live_bytes == 0
        back = rig.cache.get(handle)
        assert torch.equal(back, expected)
        assert back.stride() == (1, 10)
        assert settled(rig).stored_bytes < 8192
        del back, handle
        assert_empty(rig)


def test_a_kept_small_view_does_not_keep_a_huge_storage():
    with CacheRig(MemoryTier(), min_tensor_bytes=4096) as rig:
        huge = torch.randn(1 << 16)
        view = huge[40000:40100]
        expected = view.clone()
        handle = rig.cache.put(view)
        del huge, view
        assert rig.cache.live_bytes < 8192
        assert torch.equal(rig.cache.get(handle), expected)
        del handle
        assert_empty(rig)


def test_prefetch_stays_within_its_budget_and_goes_backwards():
    tier = GatedTier(reads_open=False)
    with CacheRig(tier, prefetch_bytes=64) as rig:
        handles = [rig.cache.put(torch.full((8,), float(i))) for i in range(5)]
        rig.settle()
        rig.cache.expect_backward(0)
        assert ahead_bytes(rig.cache) == 64
        tier.reads.open()
        rig.settle()
        assert tier.counts["read"] == 2
        assert rig.cache.live_bytes == 64
        while handles:
            value = float(len(handles) - 1)
            assert torch.equal(rig.cache.get(handles.pop()), torch.full((8,), value))
            assert ahead_bytes(rig.cache) <= 64
        stats = settled(rig)
        assert stats.num_loads_on_demand == 0
        assert stats.loaded_bytes == 5 * 32
        assert_empty(rig)


def test_one_tensor_over_the_whole_prefetch_budget_is_brought_back():
    with CacheRig(MemoryTier(), prefetch_bytes=1) as rig:
        handles = [rig.cache.put(torch.full((8,), float(i))) for i in range(4)]
        rig.settle()
        rig.cache.expect_backward(0)
        while handles:
            value = float(len(handles) - 1)
            assert torch.equal(rig.cache.get(handles.pop()), torch.full((8,), value))
        assert settled(rig).num_loads_on_demand == 0


def test_what_is_loaded_for_the_backward_after_it_does_not_hold_up_the_present_one():
    with CacheRig(MemoryTier(), prefetch_bytes=64) as rig:
        present = [rig.cache.put(torch.randn(size)) for size in (24, 8, 8)]
        rig.cache.begin_forward()
        later = [rig.cache.put(torch.randn(8)) for _ in range(3)]
        rig.settle()
        rig.cache.expect_backward(0)
        rig.cache.announce_backward(1)
        for handles in (present, later):
            while handles:
                # When the first tensor has gone out, the next one is over the budget and one of the other fits in.
                rig.cache.get(handles.pop())
                assert ahead_bytes(rig.cache) <= 96 + 32
            rig.cache.expect_backward(1)
        assert settled(rig).num_loads_on_demand == 0


def test_the_first_unpack_announces_the_rest_of_its_micro_batch():
    with CacheRig(MemoryTier()) as rig:
        handles = [rig.cache.put(torch.randn(8)) for _ in range(6)]
        rig.settle()
        while handles:
            rig.cache.get(handles.pop())
        stats = settled(rig)
        assert stats.num_loads_on_demand == 1  # the very first: nobody had announced it
        assert stats.loaded_bytes == 6 * 32


def test_a_record_in_two_micro_batches_counts_once_as_ahead():
    with CacheRig(MemoryTier()) as rig:
        shared = torch.randn(8)
        handles = [rig.cache.put(shared)]
        rig.settle()
        rig.cache.begin_forward()
        handles.append(rig.cache.put(shared))
        del shared
        rig.cache.expect_backward(0)
        rig.cache.expect_backward(1)
        assert ahead_bytes(rig.cache) == 32
        for handle in handles:
            rig.cache.get(handle)
        assert ahead_bytes(rig.cache) == 0
        del handle
        handles.clear()
        assert_empty(rig)


def test_a_load_under_way_is_waited_for_not_started_again():
    tier = GatedTier(reads_open=False)
    with CacheRig(tier) as rig:
        handle = rig.cache.put(torch.arange(8.0))
        rig.settle()
        rig.cache.expect_backward(0)
        tier.reads.wait_for_arrival()
        found = []
        reader = threading.Thread(target=lambda: found.append(rig.cache.get(handle)))
        reader.start()
        tier.reads.open()
        reader.join(TIMEOUT_SECONDS)
        assert torch.equal(found[0], torch.arange(8.0))
        assert tier.counts["read"] == 1
        assert settled(rig).num_loads_on_demand == 0


def test_a_graph_dropped_while_its_load_runs_gives_its_extent_back():
    tier = GatedTier(reads_open=False)
    with CacheRig(tier) as rig:
        handles = [rig.cache.put(torch.randn(8)) for _ in range(3)]
        rig.settle()
        rig.cache.expect_backward(0)
        tier.reads.wait_for_arrival()
        handles.clear()
        assert rig.cache.is_idle()
        tier.reads.open()
        assert_empty(rig)
        assert tier.counts["read"] == 1, "those queued were cancelled"


def test_a_prefetch_that_fails_is_said_although_the_next_attempt_works(caplog):
    tier = FlakyTier(
        fail_read=lambda number: LoadError("read failed", errno=errno.EIO, path="/d") if not number else None
    )
    with CacheRig(tier, rank=5) as rig:
        handle = rig.cache.put(torch.arange(8.0))
        rig.settle()
        rig.cache.expect_backward(0)
        rig.settle()
        assert torch.equal(rig.cache.get(handle), torch.arange(8.0))
        del handle
        stats = settled(rig)
        assert stats.failures == {"ssd: EIO at /d, load": 1}
        assert "rank 5: read failed" in caplog.text
        assert stats.rank == 5
        assert_empty(rig)


def test_no_memory_for_a_load_that_backward_waits_for_is_a_load_error():
    with CacheRig(MemoryTier()) as rig:
        handle = rig.cache.put(torch.arange(8.0))
        rig.settle()
        allocate, rig.cache._reloader._allocate_target = rig.cache._reloader._allocate_target, refuse
        with pytest.raises(LoadError, match=r"cannot load the activation \(8,\) .*: no memory\n\nhint: free some"):
            rig.cache.get(handle)
        rig.cache._reloader._allocate_target = allocate
        assert torch.equal(rig.cache.get(handle), torch.arange(8.0))
        del handle
        assert_empty(rig)


def refuse(nbytes):
    raise CapacityError("no memory", nbytes=nbytes, hint="free some")


def test_what_an_earlier_backward_still_holds_is_not_read_again():
    """1. Backward asks for `last` and `first`; `first` is held on. 2. Another one asks for `last`, and looks ahead."""
    tier = MemoryTier()
    with CacheRig(tier) as rig:
        tensors = [torch.randn(8), torch.randn(8)]
        expected = tensors[0].clone()
        first, last = map(rig.cache.put, tensors)
        tensors.clear()
        rig.settle()
        rig.cache.get(last)
        held = rig.cache.get(first)
        rig.settle()
        assert tier.counts["read"] == 2
        rig.cache.get(last)
        rig.settle()
        assert tier.counts["read"] == 3
        assert rig.cache.live_bytes == 32
        pointer = held.data_ptr()
        del held
        again = rig.cache.get(first)
        assert again.data_ptr() == pointer
        assert torch.equal(again, expected)
        del again, first, last
        assert settled(rig).loaded_bytes == 96
        assert_empty(rig)


def test_a_retained_graph_does_not_hold_what_was_brought_back():
    with CacheRig(MemoryTier()) as rig:
        x = torch.randn(16, 16, requires_grad=True)
        with saved_tensors_hooks(rig.cache.put, rig.cache.get):
            y = (x * 1).exp()
            loss = (y.sin() * y.cos()).sum()
        del y
        rig.settle()
        held = []
        for _ in range(3):
            loss.backward(retain_graph=True)
            rig.settle()
            held.append(rig.cache.live_bytes)
        assert held == [0, 0, 0]
        assert rig.tier.used_bytes > 0
        del loss
        assert_empty(rig)


def test_handles_die_in_any_thread():
    with CacheRig(MemoryTier(), io_threads=4) as rig:
        batches = [[rig.cache.put(torch.randn(32)) for _ in range(40)] for _ in range(4)]
        stop = threading.Event()

        def drop(handles):
            while handles:
                handles.pop()

        def look():
            while not stop.is_set():
                rig.cache.is_idle()
                rig.cache.expect_backward(0)

        watcher = threading.Thread(target=look)
        watcher.start()
        workers = [threading.Thread(target=drop, args=(handles,)) for handles in batches]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT_SECONDS)
        stop.set()
        watcher.join(TIMEOUT_SECONDS)
        assert_empty(rig)


def test_several_threads_pack_and_unpack_at_once():
    with CacheRig(MemoryTier(), io_threads=2, prefetch_bytes=500, max_inflight_bytes=500) as rig:
        wrong = []

        def work(seed):
            values = [torch.full((16,), float(100 * seed + i)) for i in range(30)]
            handles = [rig.cache.put(value.clone()) for value in values]
            while handles:
                if not torch.equal(rig.cache.get(handles.pop()), values[len(handles)]):
                    wrong.append(seed)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT_SECONDS)
            assert not worker.is_alive()
        assert wrong == []
        assert_empty(rig)


def test_a_garbage_collected_cycle_frees_its_extents():
    with CacheRig(MemoryTier()) as rig:
        cycle = [rig.cache.put(torch.randn(8))]
        cycle.append(cycle)
        rig.settle()
        del cycle
        gc.collect()
        assert_empty(rig)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Parameter(torch.randn(8)),
        lambda: torch.nn.Parameter(torch.randn(8))[2:],
        lambda: torch.randn(0),
        lambda: torch.randn(3, 3).to_sparse(),
        lambda: torch.randn(3, dtype=torch.complex64).conj(),
        lambda: torch.empty(4, device="meta"),
    ],
    ids=["weight", "view of a weight", "no elements", "sparse", "conjugated", "another device"],
)
def test_what_is_never_offloaded(make):
    with CacheRig(MemoryTier()) as rig:
        tensor = make()
        handle = rig.cache.put(tensor)
        assert isinstance(handle, KeptTensor)
        assert rig.cache.get(handle).shape == tensor.shape
        assert rig.cache.is_idle()
        assert rig.tier.counts["write"] == 0


def test_storages_of_the_model_stay():
    with CacheRig(MemoryTier()) as rig:
        buffer = torch.randn(8)
        rig.cache.keep_resident([buffer])
        assert isinstance(rig.cache.put(buffer[1:].detach()), KeptTensor)


def test_foreign_memory_that_is_not_aligned_stays():
    with CacheRig(MemoryTier()) as rig:
        raw = bytearray(64 + 256)
        tensor = torch.frombuffer(raw, dtype=torch.uint8)
        skip = (-tensor.data_ptr()) % 64 + 4
        odd = torch.frombuffer(raw, dtype=torch.uint8, offset=skip, count=200)
        handle = rig.cache.put(odd)
        rig.settle()
        assert rig.tier.counts["write"] == 0
        assert torch.equal(rig.cache.get(handle), odd)


def test_the_handle_does_not_keep_a_saved_output_in_a_cycle():
    with CacheRig(MemoryTier(), min_tensor_bytes=1 << 30) as rig:
        x = torch.randn(8, requires_grad=True)
        with saved_tensors_hooks(rig.cache.put, rig.cache.get):
            y = x.exp()
        gc.disable()
        try:
            del y
            assert rig.cache.is_idle(), "freed by counting references alone"
        finally:
            gc.enable()


def test_versions_of_one_storage_are_told_apart():
    with CacheRig(MemoryTier()) as rig:
        tensor = torch.zeros(8)
        old = rig.cache.put(tensor)
        rig.settle()
        tensor.add_(1)
        new = rig.cache.put(tensor)
        rig.settle()
        del tensor
        assert torch.equal(rig.cache.get(new), torch.ones(8))
        with pytest.raises(SavedTensorMutatedError):
            rig.cache.get(old)
        del old, new
        assert_empty(rig)


def test_load_targets_that_cannot_be_allocated_leave_a_state_that_can_be_tried_again():
    """Out of device memory at a load: an error now, and the right bytes later."""
    with CacheRig(MemoryTier()) as rig:
        handle = rig.cache.put(torch.arange(8.0))
        rig.settle()
        reloader = rig.cache._reloader
        real = reloader._allocate_target

        def fail(nbytes):
            raise MemoryError("on purpose")

        reloader._allocate_target = fail
        for _ in range(2):
            with pytest.raises((MemoryError, OffloadError)):
                rig.cache.get(handle)
        reloader._allocate_target = real
        assert torch.equal(rig.cache.get(handle), torch.arange(8.0))
        del handle
        assert_empty(rig)


def test_closing_with_a_load_queued_raises_at_unpack_and_does_not_spin():
    tier = GatedTier(reads_open=False)
    with CacheRig(tier) as rig:
        handles = [rig.cache.put(torch.randn(8)) for _ in range(2)]
        rig.settle()
        rig.cache.expect_backward(0)
        tier.reads.wait_for_arrival()
        closer = threading.Thread(target=rig.queue.close)
        closer.start()
        for _ in range(2):
            with pytest.raises(OffloadError, match="closed"):
                rig.cache.get(handles[0])
        tier.reads.open()
        closer.join(TIMEOUT_SECONDS)
        del handles


def test_waiting_for_room_is_counted():
    tier = GatedTier(writes_open=False)
    with CacheRig(tier, max_inflight_bytes=32) as rig:
        handles = [rig.cache.put(torch.randn(8))]
        tier.writes.wait_for_arrival()
        second = threading.Thread(target=lambda: handles.append(rig.cache.put(torch.randn(8))))
        second.start()
        assert rig.queue.inflight_bytes == 32
        tier.writes.open()
        second.join(TIMEOUT_SECONDS)
        assert len(handles) == 2
        handles.clear()
        assert settled(rig).stall_seconds >= 0
        assert_empty(rig)


def test_stored_is_loaded_forwarded_or_freed():
    """The bytes balance, re-derived from the tier's own counts."""
    with CacheRig(FlakyTier(fail_write=lambda n: store_error() if n == 4 else None), io_threads=2) as rig:
        handles = [rig.cache.put(torch.randn(8)) for _ in range(12)]
        rig.settle()
        for handle in handles[6:]:
            rig.cache.get(handle)
        del handle
        handles.clear()
        stats = settled(rig)
        assert stats.stored_bytes == 32 * rig.tier.counts["write"]
        assert stats.loaded_bytes == 32 * rig.tier.counts["read"]
        assert stats.kept_bytes + stats.stored_bytes == 12 * 32
        assert_empty(rig)
