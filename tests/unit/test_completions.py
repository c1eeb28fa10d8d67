"""The ring of completions: read again after somebody else has fetched it, and never a record twice."""

import ctypes
import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin.storage import completions
from ssdtrain_plugin.storage.aio import _contiguous_bytes
from ssdtrain_plugin.storage.completions import Completion, CompletionRing, create_with_rings

MAGIC = 0xA10A10A1


class Kernel:
    """The other side of a ring: puts records in."""

    def __init__(self, num_records=8, magic=MAGIC, incompatible=0, tail=0):
        self._num_records, self._tail = num_records, tail
        self.memory = ctypes.create_string_buffer(32 + 32 * num_records)
        struct.pack_into("<8I", self.memory, 0, 0, num_records, 0, tail, magic, 1, incompatible, 32)

    @property
    def address(self):
        return ctypes.addressof(self.memory)

    def complete(self, request, result):
        struct.pack_into("<QQqq", self.memory, 32 + 32 * self._tail, 0, request, result, 0)
        self._tail = (self._tail + 1) % self._num_records
        struct.pack_into("<I", self.memory, 12, self._tail)


def test_each_record_is_taken_once():
    kernel = Kernel()
    ring = CompletionRing(kernel.address)
    assert ring.take() == []
    kernel.complete(16, 4096)
    kernel.complete(32, -errno.EIO)
    assert ring.take() == [Completion(16, 4096), Completion(32, -errno.EIO)]
    assert ring.take() == []


def test_what_was_there_before_is_not_taken():
    kernel = Kernel(tail=3)
    assert CompletionRing(kernel.address).take() == []


@settings(deadline=None)
@given(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=30))
def test_the_ring_comes_round(tail, counts):
    kernel = Kernel(tail=tail)
    ring = CompletionRing(kernel.address)
    number = 0
    for count in counts:
        expected = [Completion(number + index, -index) for index in range(count)]
        for completion in expected:
            kernel.complete(*completion)
        assert ring.take() == expected
        number += count


@pytest.mark.parametrize("options", [{"magic": 0}, {"incompatible": 1}])
def test_an_unknown_form_is_refused(options):
    kernel = Kernel(**options)
    with pytest.raises(OSError, match="unknown form") as caught:
        CompletionRing(kernel.address)
    assert caught.value.errno == errno.ENOTSUP


# --- finding them


class Process:
    """A map of memory that grows when somebody makes a context."""

    def __init__(self, path, monkeypatch):
        self._path = path
        self.kernels = []
        self._lines = ["55d0-55d1 r-xp 00000000 fe:00 1 /bin/a file of /[aio]", "7f00-7f01 rw-p 00000000 00:00 0 "]
        monkeypatch.setattr(completions, "_MAPS", str(path))
        self.make(0)

    def make(self, count):
        for _ in range(count):
            kernel = Kernel()
            self.kernels.append(kernel)
            address, inode = f"{kernel.address:x}-{kernel.address + 4096:x}", 100 + len(self.kernels)
            self._lines.append(f"{address} rw-s 00000000 00:13 {inode}     /[aio] (deleted)")
        self._path.write_text("\n".join(self._lines) + "\n")


@pytest.fixture
def process(tmp_path, monkeypatch):
    return Process(tmp_path / "maps", monkeypatch)


def test_the_rings_of_what_was_made_are_found(process):
    process.make(3)
    made, rings = create_with_rings(lambda: process.make(2) or "made", 2)
    assert made == "made"
    for kernel in process.kernels:
        kernel.complete(1, 512)
    assert [ring.take() for ring in rings] == [[Completion(1, 512)], [Completion(1, 512)]]


def test_a_context_that_somebody_else_made_meanwhile_is_never_taken_for_ours(process):
    calls = []

    def make():
        calls.append(len(process.kernels))
        process.make(3 if len(calls) == 1 else 2)

    _, rings = create_with_rings(make, 2)
    assert calls == [0, 3]
    assert {ring._address for ring in rings} == {kernel.address for kernel in process.kernels[3:]}


@pytest.mark.parametrize("found", [0, 1, 3])
def test_another_number_of_rings_is_refused(process, found):
    with pytest.raises(OSError, match=rf"{found} rings of completions in .* \(expected 2\)") as caught:
        create_with_rings(lambda: process.make(found), 2)
    assert caught.value.errno == errno.ENOTSUP


# --- what they add up to


def request(offset):
    """Make the memory of a request; only its offset in the file is looked at."""
    memory = ctypes.create_string_buffer(64)
    struct.pack_into("<q", memory, 40, offset)
    return memory


def test_a_request_says_where_it_began():
    memory = request(1 << 40)
    assert Completion(ctypes.addressof(memory), 0).file_offset == 1 << 40


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=8), st.randoms())
def test_bytes_count_up_to_the_first_gap(results, random):
    """Blocks of 8 bytes from byte 1000 on, each moved as far as ``results`` says, ended in any order."""
    memory = [request(1000 + 8 * index) for index in range(len(results))]
    ended = [Completion(ctypes.addressof(at), result) for at, result in zip(memory, results, strict=True)]
    random.shuffle(ended)
    expected = 0
    for result in results:
        expected += result
        if result < 8:
            break
    assert _contiguous_bytes(ended, 8 * len(results), 1000) == expected


def test_a_request_without_an_end_is_a_gap():
    memory = [request(0), request(16)]
    ended = [Completion(ctypes.addressof(at), 8) for at in memory]
    assert _contiguous_bytes(ended, 24, 0) == 8
    assert _contiguous_bytes(ended[1:], 24, 0) == 0
    assert _contiguous_bytes([], 24, 0) == 0
