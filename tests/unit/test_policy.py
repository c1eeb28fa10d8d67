"""Policies decide from integers; a tier that failed is left alone for a while."""

import pytest

from ssdtrain_plugin.policy.base import PackRequest, Placement, TierHealth
from ssdtrain_plugin.policy.fixed import FractionPolicy


def request(nbytes=10, seen_bytes=0, microbatch_bytes=100, host_free_bytes=0, has_ssd=True):
    return PackRequest(nbytes, seen_bytes, microbatch_bytes, host_free_bytes, has_ssd)


def test_all_offloads_and_none_keeps():
    assert FractionPolicy(1.0).decide(request(seen_bytes=90)) is Placement.SSD
    assert FractionPolicy(0.0).decide(request()) is Placement.KEEP
    assert FractionPolicy(0.0).decide(request(microbatch_bytes=None)) is Placement.KEEP


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_a_share_is_the_first_part(fraction):
    policy = FractionPolicy(fraction)
    decisions = [policy.decide(request(seen_bytes=seen)) for seen in range(0, 100, 10)]
    count = decisions.count(Placement.SSD)
    assert decisions == [Placement.SSD] * count + [Placement.KEEP] * (10 - count)
    assert fraction * 100 <= 10 * count < fraction * 100 + 10


def test_the_first_micro_batch_is_offloaded_whole():
    assert FractionPolicy(0.1).decide(request(seen_bytes=10**9, microbatch_bytes=None)) is Placement.SSD


def test_the_host_is_filled_first():
    policy = FractionPolicy(1.0)
    assert policy.decide(request(host_free_bytes=10)) is Placement.HOST
    assert policy.decide(request(host_free_bytes=9)) is Placement.SSD
    assert policy.decide(request(host_free_bytes=9, has_ssd=False)) is Placement.KEEP


def test_each_policy_explains_itself():
    texts = {FractionPolicy(fraction).explain() for fraction in (0.0, 0.5, 1.0)}
    assert len(texts) == 3
    assert "50%" in FractionPolicy(0.5).explain()


def test_pauses_double_and_one_success_ends_them():
    health, tried = TierHealth(), []
    for step in range(40):
        if health.is_usable(step):
            tried.append(step)
            health.failed(step)
            health.failed(step)  # several at once count once
    assert tried == [0, 1, 3, 7, 15, 31]
    health = TierHealth()
    health.failed(0)
    assert not health.is_usable(0)
    assert health.is_usable(1)
    assert not health.succeeded(0), "it was under way when the other one failed"
    assert health.succeeded(1)
    assert not health.succeeded(1)
    health.failed(1)
    assert health.is_usable(2), "the pause begins at one step again"


def test_a_pause_has_an_end():
    health, step = TierHealth(), 0
    for _ in range(20):
        while not health.is_usable(step):
            step += 1
        health.failed(step)
    assert not health.is_usable(step + 63)
    assert health.is_usable(step + 64)
