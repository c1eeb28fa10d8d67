"""A failed store costs memory, never a gradient. A failed load raises where the tensor was needed."""

import errno
import logging
import os

import pytest
import torch
from fakes import CacheRig, FlakyTier, causes_of, load_error, store_error
from torch.autograd.graph import saved_tensors_hooks
from training import assert_nothing_held, assert_same, train
from workloads import WORKLOADS

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.errors import CapacityError, LoadError

GPT = WORKLOADS["gpt dropout"]


def full():
    return CapacityError("cannot store activation: injected", errno=errno.ENOSPC)


def budget():
    return CapacityError("cannot store activation: no budget")


STORE_FAULTS = {
    "every write": ({"fail_write": lambda n: store_error()}, "ssd: EIO"),
    "every third write": ({"fail_write": lambda n: store_error() if n % 3 == 1 else None}, "ssd: EIO"),
    "an OSError": ({"fail_write": lambda n: OSError(errno.EROFS, "read-only") if n == 2 else None}, "ssd: EROFS"),
    "a defect": ({"fail_write": lambda n: ZeroDivisionError("defect") if n == 0 else None}, "ssd: ZeroDivisionError"),
    "a full drive": ({"fail_allocate": lambda n: full() if n > 3 else None}, "ssd: ENOSPC"),
    "no budget": ({"fail_allocate": lambda n: budget() if n % 2 else None}, "ssd: budget used up"),
}


def run(rig, *, must_load):
    model = GPT.build()
    found = []
    for number in range(3):
        torch.manual_seed(number)
        if rig is None:
            loss = model(*GPT.batch(number))
        else:
            rig.cache.begin_forward()
            with saved_tensors_hooks(rig.cache.put, rig.cache.get):
                loss = model(*GPT.batch(number))
            rig.cache.end_forward(0.0)
            if must_load:
                rig.settle()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        if rig is not None:
            rig.settle()
            assert rig.cache.live_bytes == 0
            assert rig.cache.is_idle()
            rig.stats.append(rig.cache.end_step())
    return found


@pytest.mark.parametrize("must_load", [True, False])
@pytest.mark.parametrize("fault", list(STORE_FAULTS))
def test_failed_stores_keep_the_gradients(fault, must_load, caplog):
    rules, cause = STORE_FAULTS[fault]
    expected = run(None, must_load=False)
    with CacheRig(FlakyTier(**rules), io_threads=2) as rig, caplog.at_level(logging.WARNING):
        rig.stats = []
        assert_same(run(rig, must_load=must_load), expected)
        assert rig.tier.used_bytes == 0
    if must_load:
        assert causes_of(rig.stats[0]) == {cause}
        assert rig.stats[0].kept_bytes > 0
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1, "one warning per cause"
        assert "gradients are not affected" in warnings[0].getMessage()


def test_a_tier_that_failed_is_left_alone_and_tried_again():
    fails = [True]
    tier = FlakyTier(fail_write=lambda n: store_error() if fails[0] else None)
    written = []
    with CacheRig(tier) as rig:
        for step in range(8):
            fails[0] = step < 2
            before = tier.calls["write"]
            handle = rig.cache.put(torch.randn(8))
            rig.settle()
            written.append(tier.calls["write"] - before)
            del handle
            rig.cache.end_step()
    # Fails in steps 0 and 1, is left alone in step 2, works from step 3 on.
    assert written == [1, 1, 0, 1, 1, 1, 1, 1]


def test_pauses_grow_while_the_tier_keeps_failing():
    tier = FlakyTier(fail_write=lambda n: store_error())
    tried = []
    with CacheRig(tier) as rig:
        for step in range(70):
            before = tier.calls["write"]
            handles = [rig.cache.put(torch.randn(8)) for _ in range(3)]
            rig.settle()
            if tier.calls["write"] > before:
                tried.append(step)
            del handles
            rig.cache.end_step()
    assert tried == [0, 1, 3, 7, 15, 31, 63]


def test_a_failed_load_names_the_tensor_and_the_place():
    with CacheRig(FlakyTier(fail_read=lambda n: load_error())) as rig:
        x = torch.randn(8, 4, requires_grad=True)
        with saved_tensors_hooks(rig.cache.put, rig.cache.get):
            loss = (x * 1).exp().sum()
        rig.settle()
        with pytest.raises(LoadError, match=r"\(8, 4\) torch.float32") as caught:
            loss.backward(retain_graph=True)
        error = caught.value
        assert (error.errno, error.path, error.offset) == (5, "/nowhere", 4096)
        assert error.__cause__ is not None
        with pytest.raises(LoadError):
            loss.backward(retain_graph=True)


def test_a_load_that_fails_once_may_be_tried_again():
    with CacheRig(FlakyTier(fail_read=lambda n: load_error() if n == 0 else None)) as rig:
        tensor = torch.randn(8)
        expected = tensor.clone()
        handle = rig.cache.put(tensor)
        rig.settle()
        del tensor
        with pytest.raises(LoadError):
            rig.cache.get(handle)
        assert torch.equal(rig.cache.get(handle), expected)
        del handle
        assert rig.cache.is_idle()
        assert rig.tier.used_bytes == 0
        assert rig.cache.live_bytes == 0


def test_a_failed_load_gives_its_extent_back():
    with CacheRig(FlakyTier(fail_read=lambda n: load_error())) as rig:
        handle = rig.cache.put(torch.randn(8))
        rig.settle()
        with pytest.raises(LoadError):
            rig.cache.get(handle)
        del handle
        assert rig.cache.is_idle()
        assert rig.tier.used_bytes == 0
        assert rig.cache.live_bytes == 0


def test_a_load_of_another_kind_of_error_is_a_load_error():
    with CacheRig(FlakyTier(fail_read=lambda n: ZeroDivisionError("defect"))) as rig:
        handle = rig.cache.put(torch.randn(8))
        rig.settle()
        with pytest.raises(LoadError, match="ZeroDivisionError"):
            rig.cache.get(handle)


def test_an_unused_prefetch_that_fails_does_not_stop_training():
    """Only bytes that backward needs and that are really lost stop it."""
    with CacheRig(FlakyTier(fail_read=lambda n: load_error() if n == 0 else None)) as rig:
        handles = [rig.cache.put(torch.full((8,), float(i))) for i in range(3)]
        rig.settle()
        rig.cache.expect_backward(0)  # reads handle 2 first, and fails
        rig.settle()
        handles.pop()
        assert torch.equal(rig.cache.get(handles[1]), torch.full((8,), 1.0))
        assert torch.equal(rig.cache.get(handles[0]), torch.full((8,), 0.0))


SYSCALL_FAULTS = {
    "ENOSPC": (lambda real: _raiser(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), "ssd: ENOSPC"),
    "EIO": (lambda real: _raiser(OSError(errno.EIO, os.strerror(errno.EIO))), "ssd: EIO"),
    "short write": (lambda real: lambda fd, buffers, offset: real(fd, buffers, offset) - 1, "ssd: StoreError"),
    "nothing written": (lambda real: lambda fd, buffers, offset: 0, "ssd: StoreError"),
}


def _raiser(error):
    def call(*_):
        raise error

    return call


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fault", list(SYSCALL_FAULTS))
def test_faults_of_the_real_drive_keep_the_gradients(fault, make_config, monkeypatch):
    make, cause = SYSCALL_FAULTS[fault]
    expected, _ = train(GPT)
    monkeypatch.setattr(os, "pwritev", make(os.pwritev))
    ours, stats = train(GPT, make_config("ssd"), must_load=True)
    assert_same(ours, expected)
    assert causes_of(stats[0]) == {cause}
    assert stats[0].stored_bytes == 0
    assert stats[0].kept_bytes > 0


@pytest.mark.parametrize("count", [0, 100], ids=["end of file", "short"])
def test_a_short_read_of_the_real_drive_raises(count, make_config, monkeypatch):
    model = GPT.build()
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        loss = model(*GPT.batch(0))
        offloader.cache._queue.wait_idle()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_: count)
            with pytest.raises(LoadError, match=r"cannot load the activation \(.*read \d+ bytes, expected") as caught:
                loss.backward()
        assert caught.value.path is not None
        assert caught.value.offset is not None


def test_a_drive_that_fails_between_steps_and_comes_back(make_config, monkeypatch, caplog):
    # Three failures mean pauses of at most 1 + 2 + 4 steps, however the writes fall.
    expected, _ = train(GPT, steps=12)
    real, number = os.pwritev, [0]

    def flaky(*arguments):
        number[0] += 1
        if 10 < number[0] < 14:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "pwritev", flaky)
    with caplog.at_level(logging.INFO, "ssdtrain_plugin"):
        ours, stats = train(GPT, make_config("ssd"), must_load=True, steps=12)
    assert "rank 0: `ssd` takes activations again" in caplog.text
    assert_same(ours, expected)
    assert sum(number for step in stats for cause, number in step.failures.items() if "ssd: EIO at /" in cause) == 3
    assert stats[-1].stored_bytes > 0
    assert stats[-1].failures == {}


def test_a_disk_budget_too_small_for_a_step_keeps_the_rest(make_config):
    expected, _ = train(GPT)
    ours, stats = train(GPT, make_config("ssd", disk_bytes=64 * 1024), must_load=True)
    assert_same(ours, expected)
    for step in stats:
        assert causes_of(step) == {"ssd: budget used up"}
        assert step.stored_bytes > 0, "a budget frees itself: the tier is used in every step"


def test_exception_in_forward_under_a_failing_tier_leaves_nothing(make_config, monkeypatch):
    monkeypatch.setattr(os, "pwritev", _raiser(OSError(errno.EIO, "injected")))

    class Raises(torch.nn.Linear):
        def forward(self, x):
            super().forward(x).exp()
            raise ValueError("on purpose")

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Raises(8, 8))
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.randn(4, 8))
        offloader.cache._queue.wait_idle()
        offloader.end_step()
        assert_nothing_held(offloader)
