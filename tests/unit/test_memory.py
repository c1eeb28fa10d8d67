"""Host memory is aligned, recycled by itself, bounded, pinned once a slab."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ssdtrain_plugin.errors import CapacityError, StateError
from ssdtrain_plugin.storage.host import HostTier
from ssdtrain_plugin.storage.memory import _SPARE_BYTES as SPARE_BYTES
from ssdtrain_plugin.storage.memory import BLOCK_ALIGNMENT, HostArena, memory_at
from ssdtrain_plugin.streams import CpuStreams
from ssdtrain_plugin.units import MIB


class PinningStreams(CpuStreams):
    """Records what is pinned; refuses on demand."""

    def __init__(self, *, refuses=False):
        self.pinned, self.calls, self.refuses = {}, 0, refuses

    def pin(self, address, nbytes):
        self.calls += 1
        if self.refuses:
            raise RuntimeError("CUDA error: out of\nmemory")
        self.pinned[address] = nbytes

    def unpin(self, address):
        del self.pinned[address]


@pytest.fixture
def arena():
    arena = HostArena(CpuStreams(), slab_bytes=4 * MIB)
    yield arena
    arena.close()


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, MIB, 4 * MIB, 4 * MIB + 1, 9 * MIB])
def test_a_tensor_is_bytes_on_an_aligned_block(arena, nbytes):
    tensor = arena.tensor(nbytes)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((nbytes,), torch.uint8, "cpu")
    assert tensor.data_ptr() % BLOCK_ALIGNMENT == 0
    assert arena.used_bytes == -(-nbytes // 4096) * 4096
    tensor.fill_(7)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * nbytes


def test_a_slab_begins_on_a_huge_page(arena):
    assert arena.tensor(1).data_ptr() % (2 * MIB) == 0


def test_live_tensors_never_share_memory(arena):
    tensors = [arena.tensor(1 + 5000 * index) for index in range(60)]
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(tensors))


def test_a_block_comes_back_when_its_last_view_dies(arena):
    tensor = arena.tensor(10_000)
    address, view = tensor.data_ptr(), tensor[100:200].view(torch.int32)
    del tensor
    assert arena.used_bytes == 12_288
    del view
    assert arena.used_bytes == 0
    assert arena.tensor(9_000).data_ptr() == address


def test_a_block_comes_back_from_another_thread(arena):
    held = [arena.tensor(4096)]
    thread = threading.Thread(target=held.clear, name="test-dropper")
    thread.start()
    thread.join()
    assert arena.used_bytes == 0


def test_a_dying_tensor_takes_no_lock(arena):
    """Note [Blocks come back by themselves]: a finalizer may run while this very thread holds the lock.

    1. The lock is held, as in the middle of any call. 2. A tensor dies. 3. With a lock
    in the finalizer this would never return.
    """
    tensor = arena.tensor(4096)
    with arena._lock:
        del tensor
    assert arena.used_bytes == 0


def test_memory_is_recycled_not_mapped_anew(arena):
    for _ in range(50):
        arena.tensor(3 * MIB)
    assert arena.reserved_bytes == 4 * MIB


def test_the_limit_bounds_what_is_mapped():
    arena = HostArena(CpuStreams(), slab_bytes=4 * MIB, limit_bytes=6 * MIB)
    first, second = arena.tensor(3 * MIB), arena.tensor(2 * MIB)
    with pytest.raises(CapacityError, match=r"cannot reserve host memory: 2\.0 MiB") as caught:
        arena.tensor(2 * MIB)
    assert caught.value.nbytes == 2 * MIB
    assert arena.reserved_bytes <= 6 * MIB
    del first
    third = arena.tensor(2 * MIB)
    assert arena.reserved_bytes <= 6 * MIB
    assert len({second.data_ptr(), third.data_ptr()}) == 2


def test_no_more_is_mapped_than_the_process_may_still_take(caplog):
    """Half of what is left beyond a reserve; a refusal is said once, and holds for its size until the next trim."""
    left = [SPARE_BYTES + 20 * MIB]
    asked = []

    def available():
        asked.append(left[0])
        return left[0]

    arena = HostArena(CpuStreams(), slab_bytes=64 * MIB, limit_bytes=512 * MIB, available=available)
    assert arena.bound_bytes == 512 * MIB
    first = arena.tensor(4 * MIB)
    assert arena.reserved_bytes == 10 * MIB
    left[0] = SPARE_BYTES + 2 * MIB - 2
    second = arena.tensor(4 * MIB)  # from what is mapped: nobody asks
    assert len(asked) == 1
    for _ in range(3):
        with pytest.raises(CapacityError, match="too little left for the process") as caught:
            arena.tensor(4 * MIB)
        assert caught.value.errno is None, "a budget that is used up, not a tier that failed"
    assert len(asked) == 2
    assert arena.bound_bytes == (10 + 1) * MIB - 4096
    assert arena.tensor(MIB // 2).numel() == MIB // 2, "for this there is room"
    del first
    first = arena.tensor(4 * MIB)  # what it has is used again
    assert len(caplog.messages) == 1
    assert "host memory is short: 4.0 MiB wanted, 258.0 MiB left" in caplog.text

    left[0] = 1 << 40
    arena.trim()
    assert arena.bound_bytes == 512 * MIB
    third = arena.tensor(4 * MIB)
    assert arena.reserved_bytes == (10 + 64) * MIB
    assert {first.numel(), second.numel(), third.numel()} == {4 * MIB}
    left[0] = 0
    with pytest.raises(CapacityError):
        arena.tensor(65 * MIB)
    assert len(caplog.messages) == 1
    arena.close()


def test_one_block_too_large_for_what_is_left_is_refused_alone():
    left = SPARE_BYTES + 80 * MIB
    arena = HostArena(CpuStreams(), slab_bytes=8 * MIB, limit_bytes=512 * MIB, available=lambda: left)
    with pytest.raises(CapacityError):
        arena.tensor(41 * MIB)
    assert arena.bound_bytes == 40 * MIB
    assert arena.tensor(MIB).numel() == MIB
    assert arena.bound_bytes == 40 * MIB
    arena.close()


def test_pages_that_nobody_has_touched_are_counted_as_taken():
    """The system does not count them yet."""
    arena = HostArena(CpuStreams(), slab_bytes=8 * MIB, limit_bytes=512 * MIB, available=lambda: SPARE_BYTES + 40 * MIB)
    held = [arena.tensor(4 * MIB) for _ in range(6)]
    assert arena.reserved_bytes == 24 * MIB
    with pytest.raises(CapacityError):  # 16 MiB are left by our account, 40 MiB by that of the system
        held += [arena.tensor(4 * MIB) for _ in range(4)]
    arena.close()


def test_a_host_tier_has_as_much_free_as_it_could_give_while_memory_is_short():
    """Else a policy would go on to ask for what is not there."""
    left = [SPARE_BYTES + 16 * MIB]
    tier = HostTier(512 * MIB, streams=CpuStreams(), available=lambda: left[0])
    assert tier.free_bytes == 512 * MIB
    extent = tier.allocate(6 * MIB)
    left[0] = 0
    with pytest.raises(CapacityError, match=r"2\.0 MiB left of 512\.0 MiB"):
        tier.allocate(4 * MIB)
    assert tier.free_bytes == 2 * MIB
    tier.free(extent)
    assert tier.free_bytes == 8 * MIB
    tier.close()


def test_free_slabs_make_room_for_a_larger_one_under_a_limit():
    arena = HostArena(CpuStreams(), slab_bytes=2 * MIB, limit_bytes=8 * MIB)
    small = [arena.tensor(2 * MIB) for _ in range(4)]
    small.clear()
    assert arena.tensor(7 * MIB).numel() == 7 * MIB
    assert arena.reserved_bytes <= 8 * MIB


def test_trim_gives_back_free_slabs_that_were_not_needed_since_the_last_time(arena):
    kept, gone, also_gone = (arena.tensor(4 * MIB) for _ in range(3))
    kept.fill_(3)
    del gone, also_gone
    assert arena.trim() == 0, "they were in use since the last call"
    again = arena.tensor(4 * MIB)
    del again
    assert arena.trim() == 4 * MIB, "two were in use at once"
    assert arena.reserved_bytes == 8 * MIB
    assert arena.trim() == 4 * MIB
    assert bool((kept == 3).all())
    assert arena.trim() == 0
    assert arena.reserved_bytes == 4 * MIB


def test_tensors_outlive_the_arena():
    arena = HostArena(CpuStreams())
    tensor = arena.tensor(5 * MIB)
    tensor.fill_(9)
    arena.close()
    arena.close()
    del arena
    gc.collect()
    assert bool((tensor == 9).all())


def test_a_closed_arena_gives_nothing():
    arena = HostArena(CpuStreams())
    arena.close()
    with pytest.raises(StateError, match="closed"):
        arena.tensor(1)


def test_each_slab_is_pinned_once_and_unpinned():
    streams = PinningStreams()
    arena = HostArena(streams, slab_bytes=4 * MIB)
    tensors = [arena.tensor(MIB) for _ in range(6)]
    assert sorted(streams.pinned.values()) == [4 * MIB, 4 * MIB]
    starts = sorted(streams.pinned)
    for tensor in tensors:
        assert any(start <= tensor.data_ptr() < start + 4 * MIB for start in starts)
    del tensors[4:], tensor
    arena.trim()
    arena.trim()
    assert list(streams.pinned.values()) == [4 * MIB]
    arena.close()
    assert streams.pinned == {}


def test_memory_that_cannot_be_pinned_is_used_and_said_once(caplog):
    streams = PinningStreams(refuses=True)
    arena = HostArena(streams, slab_bytes=2 * MIB)
    tensors = [arena.tensor(2 * MIB) for _ in range(3)]
    arena.close()
    assert len(tensors) == streams.calls == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "out of memory" in caplog.text


def test_a_refused_mapping_is_a_capacity_error(arena):
    with pytest.raises(CapacityError) as caught:
        arena.tensor(1 << 60)
    assert caught.value.errno is not None
    assert arena.tensor(10).numel() == 10


def test_only_all_of_a_live_block_counts_as_a_block(arena):
    tensor = arena.tensor(5000)
    assert arena.is_block(tensor)
    assert arena.is_block(tensor.view(5, 1000).view(-1))
    assert not arena.is_block(tensor[:4000])
    assert not arena.is_block(tensor[1:])
    assert not arena.is_block(torch.empty(5000, dtype=torch.uint8))


def test_the_address_of_a_dead_block_means_nothing(arena):
    tensor = arena.tensor(5000)
    array = memory_at(tensor.data_ptr(), 5000)
    del tensor
    assert not arena.is_block(torch.frombuffer(array, dtype=torch.uint8))


def test_many_threads_share_an_arena(arena):
    def churn(seed):
        for turn in range(100):
            tensor = arena.tensor(1 + (seed * 7919 + turn * 104_729) % 300_000)
            tensor.fill_(seed)
            if not bool((tensor == seed).all()):
                return False
        return True

    with ThreadPoolExecutor(8, thread_name_prefix="test-arena") as pool:
        assert all(pool.map(churn, range(8)))
    assert arena.used_bytes == 0
