"""Every gradient and every parameter equals, to the last bit, those of the run without the plugin."""

from functools import cache

import pytest
from training import CONFIGS, assert_same, train
from workloads import WORKLOADS


@cache
def plain(name):
    return train(WORKLOADS[name])[0]


@pytest.mark.parametrize("must_load", [True, False], ids=["stored", "racing"])
@pytest.mark.parametrize("config_name", list(CONFIGS))
@pytest.mark.parametrize("name", list(WORKLOADS))
def test_training_is_bit_equal(name, config_name, must_load, make_config):
    ours, stats = train(WORKLOADS[name], make_config(config_name), must_load=must_load)
    assert_same(ours, plain(name))
    moved_bytes = [step.stored_bytes + step.host_bytes for step in stats]
    if config_name == "none":
        assert not any(moved_bytes)
    elif config_name.startswith("adaptive"):
        assert moved_bytes[0] + stats[0].forwarded_bytes, "it begins with all; what it takes to hide is up to the clock"
    elif must_load:
        assert all(moved_bytes), "the test is vacuous: nothing was moved"
        assert all(step.loaded_bytes for step in stats), "the test is vacuous: nothing was loaded"
