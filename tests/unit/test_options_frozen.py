"""The names of the options are a promise: adding, renaming or dropping one is a decision.

Change this list together with docs/design.md (Decisions) and CHANGELOG.md.
"""

import pytest

from ssdtrain_plugin.config import OffloadConfig

OPTIONS = [
    "enabled",
    "paths",
    "policy",
    "offload_fraction",
    "min_tensor_bytes",
    "host_bytes",
    "disk_bytes",
    "max_inflight_bytes",
    "prefetch_bytes",
    "io_engine",
    "io_threads",
    "io_timeout_seconds",
    "verify",
    "zero_on_free",
    "daily_write_limit",
    "rated_write_bytes",
    "checkpointing",
    "stats_path",
    "trace_steps",
]


def test_the_options_are_exactly_these():
    assert list(OffloadConfig.model_fields) == OPTIONS


def test_every_option_is_described():
    for name, field in OffloadConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_every_option_but_paths_has_a_default():
    assert not [name for name, field in OffloadConfig.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_name_says_its_unit(name):
    field = OffloadConfig.model_fields[name]
    is_number = field.annotation in (int, float)
    if is_number and name not in ("io_threads", "trace_steps"):
        assert name.endswith(("_bytes", "_seconds", "_bytes_per_second", "_fraction")), name
