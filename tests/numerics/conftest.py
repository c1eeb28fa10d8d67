"""What the tests of numerics share."""

import pytest
import torch
from training import CONFIGS

import ssdtrain_plugin as ssdtrain


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(tmp_path):
    """Build the options of a name in CONFIGS, with changes."""

    def make(name="ssd", **changes):
        options = {"policy": "all"} | CONFIGS[name] | changes
        if options.pop("paths", False):
            options["paths"] = [str(tmp_path)]
        return ssdtrain.OffloadConfig(**options)

    return make


@pytest.fixture(params=["ssd", "ssd, no room", "half", "host"])
def config(request, make_config):
    return make_config(request.param)
