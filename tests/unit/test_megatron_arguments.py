"""The ``--ssdtrain`` flags are the option table: every option, its values, its words."""

import argparse

import pytest

pytest.importorskip("megatron.core")

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.integrations.megatron import add_args
from ssdtrain_plugin.integrations.megatron.arguments import SOURCE, add_flags, options_of
from ssdtrain_plugin.preflight import check
from ssdtrain_plugin.units import GIB, KIB, MIB

pytestmark = pytest.mark.megatron

NAMES = [name for name in OffloadConfig.model_fields if name != "enabled"]
# One text for each option, as a user types it, and what the table makes of it.
EXAMPLES = {
    "paths": ("/mnt/nvme0 /mnt/nvme1", ("/mnt/nvme0", "/mnt/nvme1")),
    "policy": ("fraction", "fraction"),
    "offload_fraction": ("5e-1", 0.5),
    "min_tensor_bytes": ("64KiB", 64 * KIB),
    "host_bytes": ("1GiB", GIB),
    "disk_bytes": ("1e9", 1_000_000_000),
    "max_inflight_bytes": ("1073741824", GIB),
    "prefetch_bytes": ("1.5MiB", 3 * MIB // 2),
    "io_engine": ("posix", "posix"),
    "io_threads": ("8", 8),
    "io_timeout_seconds": ("2.5", 2.5),
    "verify": ("checksum", "checksum"),
    "zero_on_free": ("true", True),
    "daily_write_limit": ("2TB", 2 * 10**12),
    "rated_write_bytes": ("600TB", 600 * 10**12),
    "checkpointing": ("recompute", "recompute"),
    "stats_path": ("7", "7"),
    "trace_steps": ("3", 3),
}
# What some options do nothing without.
COMPANIONS = {"offload_fraction": {"policy": "fraction"}, "trace_steps": {"stats_path": "/tmp"}}


def flag(name):
    return f"--ssdtrain-{name.replace('_', '-')}"


def parser_with(*adders):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for add in adders:
        parser = add(parser)
    return parser


def parse(*words):
    return parser_with(add_flags).parse_args(words)


def test_every_option_has_a_flag_and_every_flag_an_option():
    given = {text for text in parser_with(add_flags)._option_string_actions if text.startswith("--ssdtrain")}
    assert given == {"--ssdtrain", *map(flag, NAMES)}
    assert set(NAMES) <= set(EXAMPLES), "a new option wants an example here"


@pytest.mark.parametrize("name", NAMES)
def test_the_table_understands_what_the_flag_reads(name):
    text, value = EXAMPLES[name]
    options = options_of(parse("--ssdtrain", flag(name), *text.split()))
    assert set(options) == {name}
    others = {"paths": ("/mnt/nvme0",)} | COMPANIONS.get(name, {})
    assert getattr(OffloadConfig(**(others | options)), name) == value


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        (name, choice)
        for name, field in OffloadConfig.model_fields.items()
        for choice in getattr(field.annotation, "__args__", ())
        if isinstance(choice, str)
    ],
)
def test_every_word_of_the_table_is_a_word_on_the_command_line(name, choice):
    # `off` and `none` are words here, though other notations read more into them.
    assert options_of(parse("--ssdtrain", flag(name), choice)) == {name: choice}


def test_only_what_was_given_is_handed_on():
    assert options_of(parse("--ssdtrain")) == {}
    assert options_of(parse("--ssdtrain", "--ssdtrain-io-threads=2")) == {"io_threads": 2}


def test_placeholders_reach_the_table(tmp_path):
    (tmp_path / "3").mkdir()
    options = options_of(parse("--ssdtrain", "--ssdtrain-paths", str(tmp_path / "{local_rank}")))
    assert check(options, source=SOURCE, local_rank=3).paths == (str(tmp_path / "3"),)


def test_every_fault_is_listed_at_once():
    words = ["--ssdtrain-io-threads", "many", "--ssdtrain-policy", "most", "--ssdtrain-disk-bytes", "5 parsecs"]
    with pytest.raises(ConfigError) as caught:
        check(options_of(parse("--ssdtrain", *words)), source=SOURCE, local_rank=0)
    assert caught.value.message == (
        "4 problems in the --ssdtrain flags:\n"
        "  policy: 'most' (expected 'adaptive', 'all', 'fraction' or 'none')\n"
        "  disk_bytes: '5 parsecs' is not a size (expected for example '2 GiB')\n"
        "  io_threads: 'many' (expected a whole number)\n"
        "  paths: missing (expected at least one directory on a drive)"
    )


def test_help_says_of_every_option_what_it_means_and_its_default():
    text = " ".join(parser_with(add_flags).format_help().split())
    for name in NAMES:
        assert flag(name) in text
        assert " ".join(OffloadConfig.model_fields[name].description.split()) in text, name
    for words in ("Default: 2.0 GiB.", "Default: 1.0 MiB.", "Default: 0 B.", "Default: none.", "Default: adaptive."):
        assert words in text
    for metavar in (
        "DIRECTORY [DIRECTORY ...]",
        "{adaptive,all,fraction,none}",
        "-host-bytes BYTES",
        "-threads THREADS",
    ):
        assert metavar in text


def test_adding_twice_is_adding_once():
    assert parser_with(add_args, add_flags, add_args).format_help() == parser_with(add_args).format_help()


def test_it_stands_beside_flags_of_a_script():
    def add_own(parser):
        parser.add_argument("--own", type=int)
        return parser

    for order in ((add_own, add_args), (add_args, add_own, add_args)):
        args = parser_with(*order).parse_args(["--own", "3", "--ssdtrain", "--ssdtrain-paths", "/a", "/b", "--own=4"])
        assert args.own == 4
        assert options_of(args) == {"paths": ["/a", "/b"]}


def add_as_megatron_does(parser):
    parser.add_argument("--local-rank", type=int, default=5)
    return parser


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 5),
        (["--local_rank=3"], 3),
        (["--local-rank=3"], 3),
        (["--local_rank", "3"], 3),
        (["--local-rank=1", "--local_rank=3"], 3),
    ],
)
def test_the_spelling_of_the_launcher_fills_megatrons_own_flag(words, expected):
    assert parser_with(add_as_megatron_does, add_flags).parse_args(words).local_rank == expected


def test_a_script_that_knows_the_launchers_spelling_keeps_its_own():
    def add_own(parser):
        parser.add_argument("--local_rank", type=int, default=-1)
        return parser

    assert parser_with(add_own, add_flags).parse_args([]).local_rank == -1


def test_the_launchers_spelling_is_not_in_the_help():
    assert "local_rank " not in parser_with(add_flags).format_help()
    assert not hasattr(parse(), "local_rank")


def test_nothing_is_switched_on_without_the_switch():
    assert options_of(parse()) is None
    assert options_of(argparse.Namespace()) is None


def test_flags_without_the_switch_are_refused_by_name():
    args = parse("--ssdtrain-paths", "/mnt/nvme0", "--ssdtrain-io-threads", "2")
    with pytest.raises(ConfigError) as caught:
        options_of(args)
    assert str(caught.value) == (
        "2 problems in the --ssdtrain flags:\n"
        "  `--ssdtrain-paths`: does nothing without `--ssdtrain`\n"
        "  `--ssdtrain-io-threads`: does nothing without `--ssdtrain`\n"
        "\nhint: add `--ssdtrain`, or leave the flags above out"
    )
