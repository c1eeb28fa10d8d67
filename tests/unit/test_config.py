"""OffloadConfig: right settings are read, wrong ones are all listed at once."""

import copy
import pickle
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from ssdtrain_plugin.config import OffloadConfig, expand_path
from ssdtrain_plugin.errors import ConfigError, OffloadError
from ssdtrain_plugin.units import GIB, KIB, MIB

MISSING = "paths: missing (expected at least one directory on a drive)"


def problems_of(**options):
    with pytest.raises(ConfigError) as caught:
        OffloadConfig(**options)
    return list(caught.value.problems)


def problem_of(name, value):
    """Build with one wrong option; return the one problem found."""
    found = problems_of(**{"paths": ["/mnt/x"], name: value})
    assert len(found) == 1, found
    return found[0]


# --- right settings


def test_paths_alone_are_enough():
    config = OffloadConfig(paths=["/mnt/a"])
    assert config.paths == ("/mnt/a",)
    assert config.enabled
    assert config.policy == "adaptive"
    assert config.io_engine == "auto"
    assert config.checkpointing == "offload"


@pytest.mark.parametrize("paths", ["/mnt/a", Path("/mnt/a"), ["/mnt/a"], ("/mnt/a",), [Path("/mnt/a")]])
def test_paths_are_taken_in_every_usual_form(paths):
    assert OffloadConfig(paths=paths).paths == ("/mnt/a",)


@pytest.mark.parametrize(
    ("value", "nbytes"), [(4096, 4096), ("4096", 4096), ("2 GiB", 2 * GIB), ("1.5M", 3 * MIB // 2), (5e8, 500_000_000)]
)
def test_sizes_are_numbers_or_text(value, nbytes):
    assert OffloadConfig(paths="/mnt/x", prefetch_bytes=value).prefetch_bytes == nbytes


@pytest.mark.parametrize("option", ["host_bytes", "min_tensor_bytes"])
def test_these_sizes_may_be_zero(option):
    assert getattr(OffloadConfig(paths="/mnt/x", **{option: 0}), option) == 0


@pytest.mark.parametrize("options", [{"enabled": False}, {"policy": "none"}, {"host_bytes": "1 GiB"}])
def test_paths_may_be_left_out_where_no_drive_is_used(options):
    assert OffloadConfig(**options).paths == ()


@pytest.mark.parametrize("fraction", [0, 0.0, 0.5, 1, 1.0])
def test_a_fraction_is_taken_from_nought_to_one(fraction):
    assert OffloadConfig(paths="/mnt/x", policy="fraction", offload_fraction=fraction).offload_fraction == fraction


def test_every_default_is_itself_valid():
    defaults = {name: field.default for name, field in OffloadConfig.model_fields.items()}
    given = {**defaults, "paths": "/mnt/x", "policy": "fraction"}
    assert OffloadConfig(**given) == OffloadConfig(paths="/mnt/x", policy="fraction")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"paths": "/mnt/x", "offload_fraction": 0.5}, "offload_fraction"),
        ({"paths": "/mnt/x", "policy": "none", "offload_fraction": 0.5}, "offload_fraction"),
        ({"host_bytes": "1 GiB", "disk_bytes": "1 GiB"}, "disk_bytes"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, name):
    with pytest.raises(ConfigError, match=f"{name}: does nothing"):
        OffloadConfig(**options)


def test_a_config_is_frozen():
    config = OffloadConfig(paths="/mnt/x")
    with pytest.raises(ValidationError):
        config.io_threads = 8
    assert config.io_threads == 4


def test_a_config_can_be_hashed_copied_and_sent_to_another_process():
    config = OffloadConfig(paths="/mnt/x", host_bytes="8 KiB")
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) == hash(copy.deepcopy(config))
    assert config.host_bytes == 8 * KIB


# --- wrong settings


def test_all_faults_are_listed_at_once():
    found = problems_of(
        paths=[7],
        policy="most",
        offload_fraction=1.5,
        prefetch_bytes="lots",
        io_threads=0,
        checkpointing=None,
        io_thread=3,
    )
    assert [line.split(":")[0] for line in found] == [
        "paths.0",
        "policy",
        "offload_fraction",
        "prefetch_bytes",
        "io_threads",
        "checkpointing",
        "io_thread",
    ]


def test_faults_and_missing_paths_are_listed_together():
    assert problems_of(io_threads=0, plicy="all") == [
        "io_threads: 0 (expected greater than or equal to 1)",
        "plicy: unknown option (did you mean `policy`?)",
        MISSING,
    ]


def test_missing_paths_are_not_claimed_where_the_faults_leave_no_need_for_them():
    assert problems_of(policy="none", io_threads=0) == ["io_threads: 0 (expected greater than or equal to 1)"]
    assert problems_of(enabled=False, io_threads=0) == ["io_threads: 0 (expected greater than or equal to 1)"]
    assert problems_of(host_bytes="1 GiB", io_threads=0) == ["io_threads: 0 (expected greater than or equal to 1)"]


@pytest.mark.parametrize("options", [{"paths": 3}, {"paths": [""]}, {"host_bytes": "lots"}])
def test_a_wrong_place_to_store_is_not_also_a_missing_one(options):
    assert len(problems_of(**options)) == 1


@pytest.mark.parametrize("options", [{}, {"paths": []}, {"paths": (), "host_bytes": "0 GiB"}, {"host_bytes": 0}])
def test_paths_are_needed_otherwise(options):
    assert problems_of(**options) == [MISSING]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("path", "paths"),
        ("min_tensor_size", "min_tensor_bytes"),
        ("prefetch_byte", "prefetch_bytes"),
        ("io_thread", "io_threads"),
        ("activation_checkpointing", "checkpointing"),
        ("enable", "enabled"),
    ],
)
def test_a_near_miss_suggests_the_right_name(typed, meant):
    assert problem_of(typed, 1) == f"{typed}: unknown option (did you mean `{meant}`?)"


@pytest.mark.parametrize("typed", ["zzz", "self", "", "model_config"])
def test_what_is_far_from_every_name_gets_no_suggestion(typed):
    assert problem_of(typed, 1) == f"{typed}: unknown option"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("enabled", "yes", "enabled: 'yes' (expected true or false)"),
        ("enabled", 1, "enabled: 1 (expected true or false)"),
        ("paths", 3, "paths: 3 (expected a directory, or a list of them)"),
        ("paths", None, "paths: None (expected a directory, or a list of them)"),
        ("paths", [3], "paths.0: 3 (expected text)"),
        ("paths", [""], "paths.0: '' (expected text that is not empty)"),
        ("policy", "most", "policy: 'most' (expected 'adaptive', 'all', 'fraction' or 'none')"),
        ("policy", None, "policy: None (expected 'adaptive', 'all', 'fraction' or 'none')"),
        ("offload_fraction", "0.5", "offload_fraction: '0.5' (expected a number)"),
        ("offload_fraction", -0.1, "offload_fraction: -0.1 (expected greater than or equal to 0)"),
        ("offload_fraction", 1.1, "offload_fraction: 1.1 (expected less than or equal to 1)"),
        ("offload_fraction", float("nan"), "offload_fraction: nan (expected a finite number)"),
        ("min_tensor_bytes", -1, "min_tensor_bytes: -1 (expected greater than or equal to 0)"),
        ("host_bytes", 1.5, "host_bytes: 1.5 (expected a whole number)"),
        ("host_bytes", "-1 GiB", "host_bytes: '-1 GiB' is not a size (expected for example '2 GiB')"),
        ("disk_bytes", 0, "disk_bytes: 0 (expected greater than 0)"),
        ("disk_bytes", "0 GiB", "disk_bytes: '0 GiB' (expected greater than 0)"),
        ("max_inflight_bytes", 0, "max_inflight_bytes: 0 (expected greater than 0)"),
        ("max_inflight_bytes", True, "max_inflight_bytes: True (expected a whole number)"),
        ("prefetch_bytes", 0, "prefetch_bytes: 0 (expected greater than 0)"),
        ("prefetch_bytes", "lots", "prefetch_bytes: 'lots' is not a size (expected for example '2 GiB')"),
        ("prefetch_bytes", float("inf"), "prefetch_bytes: inf (expected a whole number)"),
        ("prefetch_bytes", None, "prefetch_bytes: None (expected a whole number)"),
        ("io_engine", "spdk", "io_engine: 'spdk' (expected 'auto', 'posix', 'gds' or 'aio')"),
        ("io_threads", 0, "io_threads: 0 (expected greater than or equal to 1)"),
        ("io_threads", 65, "io_threads: 65 (expected less than or equal to 64)"),
        ("io_threads", "4", "io_threads: '4' (expected a whole number)"),
        ("checkpointing", "keep", "checkpointing: 'keep' (expected 'offload' or 'recompute')"),
        ("stats_path", 3, "stats_path: 3 (expected text)"),
        ("stats_path", "", "stats_path: '' (expected text that is not empty)"),
    ],
)
def test_a_wrong_value_is_named_quoted_and_answered(name, value, problem):
    assert problem_of(name, value) == problem


def test_the_error_is_ours_and_says_where_the_settings_came_from():
    with pytest.raises(OffloadError) as caught:
        OffloadConfig(io_threads=0)
    assert str(caught.value).startswith("2 problems in the ssdtrain options:\n  ")
    assert isinstance(caught.value, ValueError)
    assert caught.value.__suppress_context__, "the reader must not see pydantic's own text first"


# --- from a mapping


def test_a_mapping_is_read():
    assert OffloadConfig.from_dict({"paths": ["/mnt/x"], "io_threads": 2}).io_threads == 2


@pytest.mark.parametrize("options", [None, 3, "paths", ["/mnt/x"], {1: 2}])
def test_what_is_no_mapping_of_names_is_refused(options):
    with pytest.raises(ConfigError, match="expected a mapping of option names to values"):
        OffloadConfig.from_dict(options)


# --- from YAML


def write(tmp_path, text):
    path = tmp_path / "ssdtrain.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    ["paths: [/mnt/x]\nhost_bytes: 2 GiB\n", "ssdtrain:\n  paths: /mnt/x\n  host_bytes: 2147483648\n"],
    ids=["top level", "under the ssdtrain key"],
)
def test_a_yaml_file_is_read(tmp_path, text):
    config = OffloadConfig.from_yaml(write(tmp_path, text))
    assert config.paths == ("/mnt/x",)
    assert config.host_bytes == 2 * GIB


def test_faults_in_a_file_name_the_file(tmp_path):
    path = write(tmp_path, "path: /mnt/x\nio_threads: 0\n")
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.from_yaml(path)
    assert caught.value.source == f"`{path}`"
    assert list(caught.value.problems) == [
        "io_threads: 0 (expected greater than or equal to 1)",
        "path: unknown option (did you mean `paths`?)",
        MISSING,
    ]


@pytest.mark.parametrize(
    "text", ["paths: [unclosed", b"\xff\xfe\x00", "a: b: c"], ids=["open bracket", "not text", "two colons"]
)
def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.from_yaml(str(path))
    assert caught.value.source == f"`{path}`"
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert caught.value.hint.startswith("check that it ")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory"):
        OffloadConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["", "- paths\n", "ssdtrain:\n", "ssdtrain: 3\n"])
def test_a_file_without_a_table_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="expected a mapping"):
        OffloadConfig.from_yaml(write(tmp_path, text))


def test_yaml_cannot_build_objects(tmp_path):
    marker = tmp_path / "made"
    with pytest.raises(ConfigError):
        OffloadConfig.from_yaml(write(tmp_path, f"paths: !!python/object/apply:os.mkdir ['{marker}']\n"))
    assert not marker.exists()


# --- placeholders


def test_placeholders_are_replaced():
    node = socket.gethostname()
    assert expand_path("/mnt/nvme{local_rank}/{node}", local_rank=3) == f"/mnt/nvme3/{node}"


def test_other_braces_stay():
    assert expand_path("/mnt/{x}/{", local_rank=0) == "/mnt/{x}/{"


@pytest.mark.parametrize("text", ["verify: off", "verify: 'off'"])
def test_yaml_takes_the_word_off_for_false_and_so_do_we(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(f"policy: none\n{text}\n")
    assert OffloadConfig.from_yaml(file).verify == "off"


def test_a_switch_is_read_from_the_text_of_a_command_line():
    assert OffloadConfig(paths="/mnt", zero_on_free="True").zero_on_free is True
    assert OffloadConfig(paths="/mnt", zero_on_free="false").zero_on_free is False
    with pytest.raises(ConfigError, match=r"zero_on_free: 'maybe' \(expected true or false\)"):
        OffloadConfig(paths="/mnt", zero_on_free="maybe")


@pytest.mark.parametrize("name", ["zero_on_free", "daily_write_limit", "rated_write_bytes"])
def test_what_is_about_drives_is_refused_without_one(name):
    with pytest.raises(ConfigError, match=f"{name}: does nothing without `paths`"):
        OffloadConfig(host_bytes="1 GiB", **{name: "2 TB" if name != "zero_on_free" else True})


def test_sizes_of_drive_makers_are_understood():
    config = OffloadConfig(paths="/mnt", daily_write_limit="2 TB", rated_write_bytes="0.6 TB")
    assert (config.daily_write_limit, config.rated_write_bytes) == (2 * 10**12, 6 * 10**11)
