"""The public names are a promise. Changing this list is a decision and a line in CHANGELOG.md."""

import re
from pathlib import Path

import pytest

import ssdtrain_plugin
from ssdtrain_plugin import errors, version

PUBLIC = ["OffloadConfig", "Offloader", "StepStats", "__version__", "attach", "checkpoint", *errors.__all__]


def test_the_public_names_are_exactly_these():
    assert sorted(ssdtrain_plugin.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists(name):
    assert getattr(ssdtrain_plugin, name) is not None


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_is_the_same_class_under_both_names(name):
    assert getattr(ssdtrain_plugin, name) is getattr(errors, name)


def test_the_version_is_one():
    assert ssdtrain_plugin.__version__ == version.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.__version__)


def test_the_changelog_knows_the_version():
    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version.__version__ in text


def test_step_stats_has_the_promised_fields():
    assert list(ssdtrain_plugin.StepStats.__dataclass_fields__) == [
        "step",
        "rank",
        "microbatches",
        "stored_bytes",
        "loaded_bytes",
        "forwarded_bytes",
        "deduplicated_bytes",
        "kept_bytes",
        "host_bytes",
        "peak_activation_bytes",
        "saved_bytes",
        "num_loads_on_demand",
        "stall_seconds",
        "store_seconds",
        "load_seconds",
        "forward_seconds",
        "backward_seconds",
        "failures",
        "plan",
    ]
