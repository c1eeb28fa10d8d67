"""Which storage, which bytes of it, which counter, and is it a parameter?"""

import gc
import os
import resource
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.identity import (
    SPAN_ALIGNMENT_BYTES,
    ResidentStorages,
    Span,
    TensorView,
    is_parameter,
    is_plain,
    owner_of,
    revive,
    span_of,
    version_probe,
)


def saved_by(function, question=is_parameter):
    """Pairs (tensor, answer at pack) of what autograd saves."""
    seen = []

    def pack(tensor):
        seen.append((tensor, question(tensor)))
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return seen, result


def test_a_parameter_arrives_as_itself():
    weight, x = nn.Parameter(torch.ones(4)), torch.ones(4, requires_grad=True)
    seen, _ = saved_by(lambda: x * weight)
    assert {tensor is weight: found for tensor, found in seen} == {True: True, False: False}


@pytest.mark.parametrize(
    "view",
    [lambda w: w.t(), lambda w: w[1:, :2], lambda w: w.view(-1)[3:7].view(2, 2), lambda w: w.chunk(2)[1].t()],
    ids=["t", "slice", "view of view", "chunk"],
)
def test_a_view_of_a_parameter_is_one(view):
    assert is_parameter(view(nn.Parameter(torch.ones(4, 4))))
    assert not is_parameter(view(torch.ones(4, 4, requires_grad=True)))


def test_the_copy_that_autocast_makes_of_a_weight_is_known():
    linear, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    resident = ResidentStorages()
    resident.add(linear.parameters())

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return linear(linear(x))

    seen, _ = saved_by(run, resident.has_cast)
    copies = [tensor for tensor, found in seen if found]
    assert len(copies) >= 1
    assert all(tensor.dtype is torch.bfloat16 and tensor.shape == (4, 4) for tensor in copies)
    assert all(found == (tensor.shape == (4, 4)) for tensor, found in seen)


def test_a_cast_of_a_weight_turned_round_reshaped_or_in_parts_on_other_ranks_is_known():
    weight = nn.Parameter(torch.ones(4, 8))
    resident, partitioned = ResidentStorages(), ResidentStorages()
    resident.add([weight])
    partitioned.add([nn.Parameter(torch.empty(0))])  # as ZeRO-3 leaves it between its uses
    of_experts = weight.view(2, 2, 8).to(torch.bfloat16)
    turned = weight.t().to(torch.float16), weight.to(torch.bfloat16).t()
    for tensor in (weight.to(torch.bfloat16), of_experts, *turned):
        assert resident.has_cast(tensor)
        assert partitioned.has_cast(tensor)


def test_activations_computed_from_weights_are_not_parameters():
    weight = nn.Parameter(torch.ones(4, 4))
    resident = ResidentStorages()
    resident.add([weight])
    for tensor in (weight * 2, weight.exp().t(), weight @ weight, weight.sum(), weight.clone()):
        assert not is_parameter(tensor)
        assert not resident.has_cast(tensor)
        assert not resident.has_cast(tensor.to(torch.bfloat16))
    leaf = torch.ones(4, 4, requires_grad=True)
    assert not resident.has_cast(leaf.to(torch.bfloat16))
    assert not resident.has_cast(torch.ones(4, 4))


_LONG_CHAIN = """
import torch
from fakes import CacheRig, MemoryTier
from torch.autograd.graph import saved_tensors_hooks

precision = {precision}
weight = torch.nn.Parameter(torch.ones(2, 2))
with CacheRig(MemoryTier(), min_tensor_bytes=1 << 20) as rig, saved_tensors_hooks(rig.cache.put, rig.cache.get):
    rig.cache.keep_resident([weight])
    x = torch.ones(3, 2)
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        x = torch.nn.functional.linear(x, weight)
        for _ in range(80_000):
            x = x.tanh()
    assert x.dtype is precision
    del x
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_a_very_long_chain_can_be_freed(precision):
    done = subprocess.run(
        [sys.executable, "-c", _LONG_CHAIN.format(precision=precision)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=_without_core_file,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"


def _without_core_file():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shape=SHAPES, data=st.data())
def test_a_span_holds_every_byte_of_its_view_and_views_come_back(shape, data):
    storage_elements = data.draw(st.integers(1, 6)) * 4096
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]))
    stride = [data.draw(st.integers(0, 300)) for _ in shape]
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    offset = data.draw(st.integers(0, max(0, storage_elements - reach)))
    if offset + reach > storage_elements:
        return
    base = torch.arange(storage_elements).to(dtype)
    view = base.as_strided(shape, stride, offset)
    storage_bytes = base.untyped_storage().nbytes()
    span = span_of(view, storage_bytes)
    assert span.first_byte % SPAN_ALIGNMENT_BYTES == 0
    assert span.first_byte <= offset * base.itemsize
    assert (offset + reach) * base.itemsize <= span.first_byte + span.nbytes <= storage_bytes
    copy = span.bytes_of(base.untyped_storage()).clone().untyped_storage()
    again = TensorView.of(view).apply(copy, span.first_byte)
    assert (again.dtype, again.shape, again.stride()) == (view.dtype, view.shape, view.stride())
    assert torch.equal(again, view)


def test_spans_cover():
    assert Span(0, 100).covers(Span(0, 100))
    assert Span(0, 100).covers(Span(40, 60))
    assert not Span(0, 100).covers(Span(40, 61))
    assert not Span(10, 100).covers(Span(0, 20))


def test_a_probe_holds_no_bytes_and_sees_changes():
    tensor = torch.ones(1000)
    probe = version_probe(tensor)
    reference = StorageWeakRef(tensor.untyped_storage())
    version = probe._version
    tensor[3:].mul_(2)
    assert probe._version == version + 1 == tensor._version
    del tensor
    assert reference.expired()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_probes_of_every_dtype(dtype):
    tensor = torch.zeros(4).to(dtype)
    probe = version_probe(tensor)
    tensor.copy_(tensor.clone())
    assert probe._version == tensor._version > 0


def test_who_stands_for_a_version_counter():
    x = torch.zeros(8)
    assert owner_of(x) is x
    assert owner_of(x[2:]) is x
    assert owner_of(x[2:].view(2, 3)) is x
    # Another counter, or one that cannot be told apart: never the same owner.
    assert owner_of(x.data) is not x
    assert owner_of(x.detach()) is not x
    a, b = torch.unsafe_chunk(x, 2)
    assert owner_of(a) is not owner_of(b)


def test_the_owner_is_one_object_although_python_forgot_it():
    x = torch.ones(4)
    view, owner = x[1:], weakref.ref(x)
    del x  # now only the view, in C++, holds its base
    gc.collect()
    assert owner() is not None
    assert owner_of(view) is owner()


def test_revive_gives_the_same_storage_or_none():
    tensor = torch.ones(3)
    reference = StorageWeakRef(tensor.untyped_storage())
    assert revive(reference).data_ptr() == tensor.data_ptr()
    del tensor
    assert revive(reference) is None


def test_resident_storages_are_known_by_any_view_and_never_mistaken():
    resident, weight = ResidentStorages(), nn.Linear(8, 8).weight
    resident.add([weight])
    assert weight.detach()[2:].untyped_storage() in resident
    assert weight.clone().untyped_storage() not in resident
    del weight
    # The address of the dead storage is given to none of these: the weak reference holds it.
    others = [torch.ones(8, 8) for _ in range(200)]
    assert not any(other.untyped_storage() in resident for other in others)


def test_plain_tensors():
    class Sub(torch.Tensor):
        pass

    z = torch.ones(3, dtype=torch.complex64)
    assert is_plain(torch.ones(3).expand(2, 3))
    assert is_plain(nn.Parameter(torch.ones(3)))
    assert is_plain(z)
    for odd in (z.conj(), z.conj().imag, torch.eye(3).to_sparse(), torch.ones(3).as_subclass(Sub)):
        assert not is_plain(odd)
    seen = []
    torch.func.vmap(lambda t: seen.append(is_plain(t)) or t)(torch.ones(3, 2))
    assert seen == [False]
