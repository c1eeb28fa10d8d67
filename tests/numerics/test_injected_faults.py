"""Faults of every kind under a real model: gradients to the last bit, or a loud error, and never a wrong number."""

import logging
import random

import pytest
import torch
from fakes import causes_of
from training import assert_nothing_held, assert_same, one_step, train
from workloads import WORKLOADS

from ssdtrain_plugin.errors import LoadError
from ssdtrain_plugin.runtime import Parts, attach_with
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan
from ssdtrain_plugin.storage.retries import Retries

GPT = WORKLOADS["gpt dropout"]
LOUD_STORES = ["SHORT", "EIO", "ENOSPC", "EINTR", "EAGAIN", "EACCES"]
SILENT = ["FLIPPED_BIT", "TORN_BLOCK", "STALE"]


ONE_THREAD = "ssd, one thread"  # so that the next attempt is the next call


def now_and_then(kinds, operation, *, count=1, seed=0):
    """Faults of some kinds, far enough apart that no transfer has more of them than it is tried again."""
    chosen = random.Random(seed)
    return [Fault(chosen.choice(kinds), operation, first=call, count=count, is_zero=True) for call in range(0, 2000, 7)]


def parts_of(*faults, seed=0):
    plan = FaultPlan(faults, seed=seed)
    return Parts(wrap_engine=plan.wrap, retries=Retries(wait=lambda seconds: None)), plan


@pytest.fixture(scope="module")
def expected():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(GPT)[0]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("probability", [0.2, 1.0])
@pytest.mark.parametrize("kind", LOUD_STORES)
def test_stores_that_fail_keep_the_gradients(kind, probability, make_config, expected, caplog):
    parts, plan = parts_of(Fault(FaultKind[kind], "write", probability=probability), seed=3)
    with caplog.at_level(logging.WARNING):
        ours, stats = train(GPT, make_config("ssd"), must_load=True, parts=parts)
    assert plan.injected
    assert_same(ours, expected)
    if probability == 1.0:
        assert stats[0].stored_bytes == 0
        cause = "ssd: StoreError" if kind == "SHORT" else f"ssd: {kind}"
        assert causes_of(stats[0]) == {cause}
        warned = [record for record in caplog.records if "said once per cause" in record.getMessage()]
        assert len(warned) == 1


def test_a_load_tried_again_in_the_last_backward_is_said(make_config, caplog):
    parts, plan = parts_of(Fault(FaultKind.EIO, "read", count=1))
    _, stats = train(GPT, make_config(ONE_THREAD), must_load=True, parts=parts, steps=1)
    assert len(plan.injected) == 1
    assert causes_of(stats[0]) == {"ssd: EIO"}
    assert "has moved the bytes" in caplog.text


@pytest.mark.parametrize("kind", LOUD_STORES)
def test_loads_that_fail_now_and_then_are_tried_again(kind, make_config, expected, caplog):
    parts, plan = parts_of(*now_and_then([FaultKind[kind]], "read", count=3))
    with caplog.at_level(logging.WARNING):
        ours, stats = train(GPT, make_config(ONE_THREAD), must_load=True, parts=parts)
    assert plan.injected
    assert_same(ours, expected)
    is_said = kind not in ("EINTR", "EAGAIN")
    assert any(step.failures for step in stats) == is_said
    assert ("has moved the bytes" in caplog.text) == is_said


@pytest.mark.parametrize("kind", SILENT)
def test_bytes_read_wrong_now_and_then_are_read_again(kind, make_config, expected):
    parts, plan = parts_of(*now_and_then([FaultKind[kind]], "read", count=2))
    ours, _ = train(GPT, make_config(ONE_THREAD, verify="checksum"), must_load=True, parts=parts)
    assert plan.injected
    assert_same(ours, expected)


@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize("first", [0, 5, 40])
def test_bytes_stored_wrong_stop_training_and_never_spoil_it(kind, first, make_config, expected, tmp_path):
    parts, plan = parts_of(Fault(FaultKind[kind], "write", first=first, count=1, is_zero=True))
    losses = []

    def step(*arguments, **options):
        loss = one_step(*arguments, **options)
        losses.append(loss.detach().clone())
        return loss

    with pytest.raises(LoadError, match=r"cannot load the activation .*checksum") as caught:
        train(GPT, make_config("ssd", verify="checksum"), must_load=True, parts=parts, step=step)
    assert caught.value.path == str(tmp_path)
    assert [injected.call for injected in plan.injected] == [first]
    assert_same(losses, expected["losses"][: len(losses)])


def test_a_model_whose_loads_all_fail_stops_with_one_error_and_leaves_nothing(make_config):
    parts, _ = parts_of(Fault(FaultKind.EIO, "read"))
    model = GPT.build()
    with attach_with(model, make_config("ssd"), parts) as offloader:
        with pytest.raises(LoadError, match="Input/output error"):
            one_step(model, GPT, 0, offloader, must_load=True)
        offloader.end_step()
        assert_nothing_held(offloader)


@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once(seed, make_config, expected):
    """Every kind that can be survived, at random, in both directions."""
    loud = [FaultKind[kind] for kind in LOUD_STORES]
    silent = [FaultKind[kind] for kind in SILENT]
    faults = now_and_then(loud, "write", seed=seed) + now_and_then(loud + silent, "read", seed=seed)
    parts, plan = parts_of(*faults, seed=seed)
    ours, _ = train(GPT, make_config(ONE_THREAD, verify="checksum"), must_load=True, parts=parts)
    assert len({injected.fault.kind for injected in plan.injected}) > 3
    assert_same(ours, expected)
