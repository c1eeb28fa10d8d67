"""Every gradient and every parameter equals, to the last bit, those of the run without the plugin."""

from functools import cache

import pytest
from training import CONFIGS, assert_same, train
from workloads import WORKLOADS


@cache
def plain(name):
    return train(WORKLOADS[name])[0]


def combinations():
    """Every model with every config, stored; racing as well, with each model and each config some of the others."""
    for row, name in enumerate(WORKLOADS):
        for column, config_name in enumerate(CONFIGS):
            yield pytest.param(name, config_name, True, id=f"{name}-{config_name}-stored")
            marks = [pytest.mark.exhaustive] if (row + column) % 3 else []
            yield pytest.param(name, config_name, False, marks=marks, id=f"{name}-{config_name}-racing")


@pytest.mark.parametrize(("name", "config_name", "must_load"), list(combinations()))
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
