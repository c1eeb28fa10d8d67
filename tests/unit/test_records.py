"""The state of a record has few legal moves; all others are a defect and say so."""

import itertools
import weakref
from collections import deque

import pytest
import torch

from ssdtrain_plugin.errors import LoadError, SavedTensorMutatedError, StateError, StoreError
from ssdtrain_plugin.identity import Span, TensorView, version_probe
from ssdtrain_plugin.records import KeptTensor, Lease, Record, SavedTensor, State

LEGAL = {
    ("RESIDENT", "STORING"), ("RESIDENT", "FREED"),
    ("STORING", "STORED"), ("STORING", "RESIDENT"), ("STORING", "FREED"),
    ("STORED", "LOADING"), ("STORED", "FREED"),
    ("LOADING", "LOADED"), ("LOADING", "STORED"), ("LOADING", "FREED"),
    ("LOADED", "STORED"), ("LOADED", "FREED"),
}  # fmt: skip


def make_record():
    return Record(7, 1234, Span(0, 16), 0, weakref.ref(torch.ones(1)))


@pytest.mark.parametrize(("start", "end"), list(itertools.product(State, State)))
def test_only_legal_moves(start, end):
    record = make_record()
    record.state = start
    if (start.name, end.name) in LEGAL:
        record.move("test", end)
        assert record.state is end
        return
    with pytest.raises(StateError, match=rf"cannot test: record 7 of 16 bytes \({start.value} to {end.value}"):
        record.move("test", end)
    assert record.state is start


def test_a_lease_that_dies_lets_go_and_reports_once():
    ended = deque()
    record = make_record()
    record.storage = torch.ones(4).untyped_storage()
    lease = Lease(record, ended)
    del lease
    assert record.storage is None
    assert list(ended) == [record]


def test_a_lease_that_dies_is_found_no_more():
    """Another thread may run inside a finalizer; what it found then, it would give to new handles."""

    class Ended(deque):
        def append(self, record):
            super().append(record.lives())

    ended, record = Ended(), make_record()
    lease = Lease(record, ended)
    assert record.lives() is lease
    del lease
    assert list(ended) == [None]


def test_handles_share_a_lease_and_the_last_one_ends_it():
    ended, tensor = deque(), torch.ones(4)
    record = make_record()
    record.dead_handles = []
    lease = Lease(record, ended)
    handles = [SavedTensor(lease, TensorView.of(tensor), version_probe(tensor), 0, 0) for _ in range(2)]
    del lease
    handles.pop()
    assert not ended
    handles.pop()
    assert list(ended) == [record]


def test_a_kept_tensor_checks_its_version():
    tensor = torch.ones(4)
    kept = KeptTensor(tensor.detach(), tensor._version)
    assert kept.get().data_ptr() == tensor.data_ptr()
    tensor.add_(1)
    with pytest.raises(SavedTensorMutatedError, match=r"\(4,\) torch.float32 on cpu \(version 1, expected 0\)"):
        kept.get()


def test_a_lost_tensor_is_named_with_its_place():
    tensor, record = torch.ones(4, 2), make_record()
    saved = SavedTensor(Lease(record, deque()), TensorView.of(tensor), version_probe(tensor), 0, 0)
    error = saved.lost(StoreError("no bytes", errno=5, path="/p", offset=3, nbytes=4, hint="do"))
    assert isinstance(error, LoadError)
    assert "(4, 2) torch.float32" in str(error)
    assert (error.errno, error.path, error.offset, error.nbytes, error.hint) == (5, "/p", 3, 4, "do")
    assert "ZeroDivisionError" in str(saved.lost(ZeroDivisionError()))


def test_a_record_without_a_place_cannot_be_loaded():
    with pytest.raises(StateError, match="no extent"):
        make_record().place()
