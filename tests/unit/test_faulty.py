"""The fault plan: each fault does what it says, the same seed does it again, and the source is left alone."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clocks import ManualClock
from fakes import Gate

from ssdtrain_plugin.storage.base import Engine
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan

PAGE = 4096
SIZE = 16 * PAGE


class FileInMemory(Engine):
    """Moves bytes between memory and a tensor."""

    name = "memory"

    def __init__(self, nbytes=4 * SIZE):
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8)
        self.num_calls = 0
        self.is_closed = False

    def in_place_bytes(self, tensor):
        return tensor.numel()

    def staging(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def write(self, memory, nbytes, offset):
        self.num_calls += 1
        self.bytes[offset : offset + nbytes] = memory[:nbytes]
        return nbytes

    def read(self, memory, nbytes, offset):
        self.num_calls += 1
        memory[:nbytes] = self.bytes[offset : offset + nbytes]
        return nbytes

    def describe(self):
        return "a tensor"

    def close(self):
        self.is_closed = True


def random_bytes(seed=0, nbytes=SIZE):
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def with_faults(*faults, **options):
    inner = FileInMemory()
    plan = FaultPlan(faults, **options)
    return plan.wrap(inner), inner, plan


@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EINTR", "EAGAIN", "EACCES"])
def test_an_error_is_raised_with_its_number_and_nothing_moves(name, operation):
    engine, inner, _ = with_faults(Fault(FaultKind[name], operation))
    with pytest.raises(OSError, match=r"\[Errno \d+\]") as caught:
        getattr(engine, operation)(random_bytes(), SIZE, 0)
    assert caught.value.errno == getattr(errno, name)
    assert inner.num_calls == 0


@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize(("nbytes", "moved"), [(SIZE, SIZE // 2), (3 * PAGE, PAGE), (PAGE, 0)])
def test_a_short_call_moves_what_it_reports(operation, nbytes, moved):
    engine, inner, _ = with_faults(Fault(FaultKind.SHORT, operation))
    source, old = random_bytes(1, nbytes), random_bytes(2, nbytes)
    if operation == "write":
        inner.bytes[:nbytes] = old
        assert engine.write(source, nbytes, 0) == moved
        found = inner.bytes[:nbytes]
    else:
        inner.bytes[:nbytes] = source
        found = old.clone()
        assert engine.read(found, nbytes, 0) == moved
    assert torch.equal(found, torch.cat([source[:moved], old[moved:]]))


@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_is_one_bit(operation, seed):
    engine, inner, _ = with_faults(Fault(FaultKind.FLIPPED_BIT, operation), seed=seed)
    source, target = random_bytes(seed), torch.zeros(SIZE, dtype=torch.uint8)
    assert engine.write(source, SIZE, PAGE) == SIZE
    assert torch.equal(source, random_bytes(seed)), "the source is not changed"
    assert engine.read(target, SIZE, PAGE) == SIZE
    wrong = (target ^ source).tolist()
    assert sum(byte.bit_count() for byte in wrong) == 1
    assert torch.equal(inner.bytes[PAGE : PAGE + SIZE], source) == (operation == "read")


@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize("block_bytes", [512, 4096])
@pytest.mark.parametrize("is_zero", [True, False])
def test_a_torn_block_is_one_block_of_old_bytes_or_zeros(operation, block_bytes, is_zero):
    engine, inner, _ = with_faults(Fault(FaultKind.TORN_BLOCK, operation, block_bytes=block_bytes, is_zero=is_zero))
    source, old = random_bytes(1), random_bytes(2)
    inner.bytes[:SIZE] = old
    assert engine.write(source, SIZE, 0) == SIZE
    target = old.clone()
    assert engine.read(target, SIZE, 0) == SIZE
    assert torch.equal(source, random_bytes(1)), "the source is not changed"
    torn = [start for start in range(0, SIZE, 512) if not torch.equal(target[start:][:512], source[start:][:512])]
    assert len(torn) * 512 == block_bytes
    start = torn[0]
    assert start % block_bytes == 0
    expected = torch.zeros(block_bytes, dtype=torch.uint8) if is_zero else old[start : start + block_bytes]
    assert torch.equal(target[start : start + block_bytes], expected)


@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_stale_call_moves_nothing_and_reports_all(operation):
    engine, inner, _ = with_faults(Fault(FaultKind.STALE, operation))
    memory = random_bytes(1)
    assert getattr(engine, operation)(memory, SIZE, 0) == SIZE
    assert inner.num_calls == 0
    assert torch.equal(memory, random_bytes(1))
    assert not inner.bytes.any()


@pytest.mark.parametrize("tail", [1, 511, 4095])
def test_wrong_bytes_are_never_in_the_padding(tail):
    """In place, the memory ends before the padded call does."""
    nbytes = PAGE + tail
    for seed in range(40):
        engine, inner, _ = with_faults(Fault(FaultKind.FLIPPED_BIT, "write"), seed=seed)
        inner.write = lambda memory, nbytes, offset, inner=inner: setattr(inner, "bytes", memory.clone()) or nbytes
        source = random_bytes(seed, nbytes)
        engine.write(source, 2 * PAGE, 0)
        assert not torch.equal(inner.bytes[:nbytes], source)


@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_call_that_hangs_goes_on_when_it_is_let(operation):
    gate = Gate(is_open=False)
    engine, inner, _ = with_faults(Fault(FaultKind.HANG, operation, count=1), hang=gate.pass_through)
    with ThreadPoolExecutor(1, thread_name_prefix="test-hang") as pool:
        call = pool.submit(getattr(engine, operation), random_bytes(), SIZE, 0)
        gate.wait_for_arrival()
        assert not call.done()
        assert inner.num_calls == 0
        assert getattr(engine, operation)(random_bytes(), SIZE, SIZE) == SIZE, "the next call does not hang"
        gate.open()
        assert call.result() == SIZE
    assert inner.num_calls == 2


def test_release_lets_all_calls_go_on():
    engine, _, plan = with_faults(Fault(FaultKind.HANG, "write"))
    threads = [threading.Thread(target=engine.write, args=(random_bytes(), SIZE, 0)) for _ in range(3)]
    for thread in threads:
        thread.start()
    plan.release()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_delay_is_by_the_clock_of_the_plan():
    clock = ManualClock()
    engine, inner, _ = with_faults(Fault(FaultKind.DELAY, "read", seconds=3.0), clock=clock)
    with ThreadPoolExecutor(1, thread_name_prefix="test-delay") as pool:
        call = pool.submit(engine.read, random_bytes(), SIZE, 0)
        clock.wait_for_sleepers(1)
        clock.advance(2.5)
        assert inner.num_calls == 0
        clock.advance(0.5)
        assert call.result() == SIZE


# --- which calls


def failed_calls(plan_options, faults, operation="write", num_calls=200):
    engine, _, plan = with_faults(*faults, **plan_options)
    failed = []
    for number in range(num_calls):
        try:
            getattr(engine, operation)(random_bytes(0, PAGE), PAGE, 0)
        except OSError as error:
            failed.append((number, error.errno))
    assert [injected.call for injected in plan.injected] == [number for number, _ in failed]
    assert plan.num_calls(operation) == num_calls
    return failed


def test_the_nth_call_and_the_directions_are_counted_apart():
    fault = Fault(FaultKind.EIO, "write", first=3, count=2)
    assert [number for number, _ in failed_calls({}, [fault])] == [3, 4]
    assert failed_calls({}, [fault], "read") == []


def test_a_probability_depends_on_the_seed_alone():
    faults = [Fault(FaultKind.EIO, "write", probability=0.3)]
    first, again, other = (failed_calls({"seed": seed}, faults) for seed in (1, 1, 2))
    assert first == again != other
    assert 30 < len(first) < 90, "about 60 of 200"


def test_threads_do_not_change_which_calls_fail():
    engine, _, plan = with_faults(Fault(FaultKind.STALE, "write", probability=0.3), seed=1)
    with ThreadPoolExecutor(4, thread_name_prefix="test-plan") as pool:
        list(pool.map(lambda _: engine.write(random_bytes(0, PAGE), PAGE, 0), range(200)))
    alone = failed_calls({"seed": 1}, [Fault(FaultKind.EIO, "write", probability=0.3)])
    assert [injected.call for injected in plan.injected] == [number for number, _ in alone]


def test_the_first_fault_that_comes_true_is_taken():
    faults = [Fault(FaultKind.EIO, "write", first=1, count=1), Fault(FaultKind.ENOSPC, "write", count=3)]
    assert failed_calls({}, faults) == [(0, errno.ENOSPC), (1, errno.EIO), (2, errno.ENOSPC)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"operation": "store"},
        {"probability": 1.5},
        {"probability": -0.1},
        {"first": -1},
        {"count": 0},
        {"seconds": -1.0},
        {"block_bytes": 1000},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fault(**{"kind": FaultKind.EIO, "operation": "write"} | wrong)


def test_the_wrapped_engine_says_so_and_closes():
    engine, inner, _ = with_faults()
    assert engine.describe() == "a tensor, with injected faults"
    assert engine.name == "memory"
    engine.close()
    assert inner.is_closed
