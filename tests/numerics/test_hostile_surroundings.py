"""What models, users and hosts do to saved tensors and to the process that holds them."""

import gc
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn
from training import assert_nothing_held

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.errors import LoadError, SavedTensorMutatedError
from ssdtrain_plugin.hooks import active_hooks
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.transfer import Direction, Transfer


class WritesInBackward(torch.autograd.Function):
    """Writes into its saved tensor in backward, as Megatron's vocabulary cross entropy does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return x.mul_(gradient)


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_backward_that_writes_into_what_another_one_saved(tmp_path, is_stored):
    """1. Two nodes save one tensor. 2. One backward writes into it. 3. The other must not use that in silence."""

    class Model(nn.Module):
        def forward(self, x):
            h = x.exp()
            return h.sin().sum() + WritesInBackward.apply(h).sum()

    x = torch.linspace(0.0, 1.0, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Model()(x).backward()
    model = Model()
    with ssdtrain.attach(
        model, ssdtrain.OffloadConfig(paths=str(tmp_path), policy="all", min_tensor_bytes=1)
    ) as offloader:
        loss = model(x)
        if is_stored:
            offloader.cache._queue.wait_idle()
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()


def test_a_second_backward_after_one_that_wrote_raises_as_autograd_does(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), Apply(WritesInBackward))
    x = torch.linspace(0.0, 1.0, 64)
    with ssdtrain.attach(model, {"paths": str(tmp_path), "policy": "all", "min_tensor_bytes": 1}):
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(SavedTensorMutatedError):
            loss.backward()


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def test_a_storage_freed_under_us_and_filled_again_before_backward(tmp_path):
    """A module may free an output with resize_(0) and recompute it before backward asks."""
    held = []

    class Model(nn.Module):
        def forward(self, x):
            h = x.exp()
            held.append(h)
            return h.sin().sum()

    x = torch.linspace(0.0, 1.0, 4096, requires_grad=True)
    Model()(x).backward()
    expected, x.grad = x.grad, None
    held.clear()
    model = Model()
    with ssdtrain.attach(
        model, ssdtrain.OffloadConfig(paths=str(tmp_path), policy="all", min_tensor_bytes=1)
    ) as offloader:
        loss = model(x)
        storage, nbytes = held[0].untyped_storage(), held[0].nbytes
        storage.resize_(0)
        offloader.cache._queue.wait_idle()
        storage.resize_(nbytes)
        with torch.no_grad():
            torch.exp(x, out=held[0].detach().data)
        loss.backward()
        assert torch.equal(x.grad, expected)


def test_threads_that_run_one_model_do_not_close_each_other(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    inputs = [torch.randn(4, 16) for _ in range(4)]
    expected = [torch.autograd.grad(model(x).sum(), list(model.parameters())) for x in inputs]
    barrier, found, errors = threading.Barrier(4, timeout=60), [None] * 4, []

    def work(index):
        try:
            for _ in range(20):
                barrier.wait()
                loss = model(inputs[index]).sum()
                found[index] = torch.autograd.grad(loss, list(model.parameters()))
        except (RuntimeError, threading.BrokenBarrierError) as error:
            errors.append(error)
            barrier.abort()

    with ssdtrain.attach(
        model, ssdtrain.OffloadConfig(paths=str(tmp_path), policy="all", min_tensor_bytes=1)
    ) as offloader:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not errors
        for ours, plain in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        found.clear()
        offloader.end_step()
        assert_nothing_held(offloader)


@pytest.mark.parametrize("sizes", [(1, 64), (64, 1, 128), (8, 8, 256)])
def test_all_offloads_all_whatever_the_batches_before(tmp_path, sizes):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    with ssdtrain.attach(
        model, ssdtrain.OffloadConfig(paths=str(tmp_path), policy="all", min_tensor_bytes=1)
    ) as offloader:
        for size in sizes:
            model(torch.randn(size, 64)).sum().backward()
            assert offloader.end_step().kept_bytes == 0


def test_what_the_host_tier_cannot_take_goes_to_the_drive(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            for _ in range(8):
                x = x.exp().tanh()
            return x.sum()

    model, x = Model(), torch.zeros(1 << 16, requires_grad=True)
    config = ssdtrain.OffloadConfig(paths=str(tmp_path), policy="all", host_bytes=5 << 18, min_tensor_bytes=1)
    with ssdtrain.attach(model, config) as offloader:
        loss = model(x)
        offloader.cache._queue.wait_idle()
        loss.backward()
        stats = offloader.end_step()
    assert stats.host_bytes > 0
    assert stats.stored_bytes > 0
    assert (stats.kept_bytes, stats.failures) == (0, {})


def test_a_fork_with_stores_in_flight_ends_without_waiting(tmp_path):
    """A DataLoader's worker has none of our threads, and locks that may be held for ever."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh())
    offloader = ssdtrain.attach(model, {"paths": str(tmp_path), "policy": "all", "min_tensor_bytes": 1})
    loss = model(torch.randn(512, 256)).sum()
    child = os.fork()
    if child == 0:
        offloader._finalizer()
        os._exit(7)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0] == child, "the child did not end"
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    loss.backward()
    offloader.detach()


def test_detaching_under_a_live_graph_is_named_where_it_hurts(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    offloader = ssdtrain.attach(model, {"paths": str(tmp_path), "policy": "all", "min_tensor_bytes": 1})
    loss = model(torch.randn(4, 16)).square().sum()
    offloader.cache._queue.wait_idle()
    offloader.detach()
    with pytest.raises(LoadError, match="detached"):
        loss.backward()
    del loss
    gc.collect()


def test_attaching_twice_is_refused(tmp_path):
    model = nn.Linear(4, 4)
    config = {"paths": str(tmp_path)}
    with ssdtrain.attach(model, config):
        with pytest.raises(ssdtrain.StateError, match="attached already"):
            ssdtrain.attach(model, config)
    ssdtrain.attach(model, config).detach()


def test_detaching_inside_a_forward_leaves_nothing_on(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    offloader = ssdtrain.attach(model, {"paths": str(tmp_path), "policy": "all", "min_tensor_bytes": 1})
    model[1].register_forward_hook(lambda *_: offloader.detach())
    model(torch.randn(4, 16))
    assert active_hooks() is None
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    model[1]._forward_hooks.clear()
    with ssdtrain.attach(model, {"paths": str(tmp_path), "policy": "all", "min_tensor_bytes": 1}) as again:
        model(torch.randn(4, 16)).sum().backward()
        assert again.end_step().microbatches == 1


def test_a_collection_inside_the_arena_does_not_stop_the_backward(tmp_path, monkeypatch):
    """1. Only the loss of an attached model is left. 2. A load takes memory. 3. A collection closes the arena there."""

    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        offloader = ssdtrain.attach(model, {"paths": str(tmp_path), "policy": "all", "min_tensor_bytes": 1})
        loss = model(torch.randn(8, 64)).square().sum()
        offloader.cache._queue.wait_idle()
        return loss

    real = HostArena._take

    def collecting(arena, nbytes):
        gc.collect()
        return real(arena, nbytes)

    monkeypatch.setattr(HostArena, "_take", collecting)
    with pytest.raises(LoadError, match="detached"):
        build().backward()


@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_a_storage_freed_before_its_store_begins_is_not_read(tmp_path, tier):
    held = []

    class Model(nn.Module):
        def forward(self, x):
            held.append(x.exp())
            return held[-1].sin().sum()

    model = Model()
    options = {"host_bytes": "64 MiB"} if tier == "host" else {"paths": str(tmp_path)}
    with ssdtrain.attach(model, {**options, "policy": "all", "min_tensor_bytes": 1, "io_threads": 1}) as offloader:
        gate = threading.Event()
        queue = offloader.cache._queue
        queue.submit(Transfer(Direction.STORE, 1, lambda: gate.wait(60) and None, lambda transfer: None, (tier, 0)))
        loss = model(torch.ones(1 << 16, requires_grad=True))
        held[0].untyped_storage().resize_(0)
        gate.set()
        queue.wait_idle()
        with pytest.raises(LoadError, match="its storage was freed"):
            loss.backward()
        del loss
        assert sum(offloader.end_step().failures.values()) == 1
