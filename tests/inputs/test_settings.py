"""Options in Python, in a DeepSpeed config and as Megatron's flags: accepted, or one error of ours."""

import argparse
import base64
import contextlib
import io
import json
import logging
import os

import pytest
from hostile import (
    HOSTILE_TEXTS,
    OPTIONS,
    accepted_or_refused,
    blocks,
    check_answer,
    each_input,
    misspelt,
    plain_values,
    texts,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin import OffloadConfig
from ssdtrain_plugin.errors import ConfigError, StateError
from ssdtrain_plugin.preflight import check, find_local_rank


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    return tmp_path_factory.mktemp("drive")


@pytest.fixture(autouse=True)
def nothing_is_written(drive):
    yield
    assert os.listdir(drive) == []


@each_input()
@given(st.data())
def test_options_in_python(drive, data):
    options = data.draw(blocks(drive) | values)
    found = accepted_or_refused(lambda: OffloadConfig.from_dict(options), "the ssdtrain options")
    if found is not None:
        accepted_or_refused(lambda: check(options, source="the test", local_rank=0), "the test")


@each_input()
@given(st.data())
def test_a_deepspeed_config(drive, data):
    read_block = pytest.importorskip("ssdtrain_plugin.integrations.deepspeed").read_block
    neighbours = data.draw(
        st.dictionaries(
            st.sampled_from(["aio", "zero_optimization", "fp16", "train_batch_size"]) | misspelt(["ssdtrain"]),
            plain_values,
            max_size=3,
        )
    )
    offload = data.draw(st.sampled_from(["offload_param", "offload_optimizer"]))
    if data.draw(st.booleans()):
        neighbours["zero_optimization"] = {offload: {"device": "nvme", "nvme_path": data.draw(values)}}
    config = {**neighbours, "ssdtrain": data.draw(blocks(drive) | values)}
    accepted_or_refused(lambda: read_block(config), 'the "ssdtrain" block of the DeepSpeed config')
    accepted_or_refused(lambda: read_block(data.draw(values)))


@each_input()
@given(st.data())
def test_a_file_of_deepspeed(drive, tmp_path_factory, data):
    read_block = pytest.importorskip("ssdtrain_plugin.integrations.deepspeed").read_block
    block = data.draw(blocks(drive, plain_values) | plain_values)
    try:
        text = json.dumps({"aio": data.draw(plain_values), "ssdtrain": block})
    except ValueError:  # a number that Python does not write
        text = '{"ssdtrain": ' + "9" * 10_000 + "}"
    how = data.draw(st.sampled_from(["whole", "cut", "twice", "deep", "swapped", "noise"]))
    at = data.draw(st.integers(0, len(text)))
    text = {
        "whole": text,
        "cut": text[:at],
        "twice": text[:-1] + ', "ssdtrain": {}}',
        "deep": '{"ssdtrain": ' + "[" * 20_000,
        "swapped": text[at:] + text[:at],
        "noise": text[:at] + data.draw(texts) + text[at:],
    }[how]
    path = tmp_path_factory.getbasetemp() / "ds_config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    accepted_or_refused(lambda: read_block(path), f"`{path}`")
    encoded = base64.urlsafe_b64encode(text.encode(errors="surrogatepass")).decode()
    accepted_or_refused(lambda: read_block(encoded), "the DeepSpeed config")


@each_input()
@given(st.data())
def test_flags_of_megatron(drive, data):
    pytest.importorskip("megatron.core")
    from ssdtrain_plugin.integrations.megatron.arguments import SOURCE, add_flags, options_of

    name = misspelt(OPTIONS).map(lambda option: f"--ssdtrain-{option.replace('_', '-')}")
    words = data.draw(st.lists(st.tuples(name, st.lists(texts, max_size=1)), max_size=4))
    argv = [
        *data.draw(
            st.sampled_from([[], ["--ssdtrain"], ["--ssdtrain=yes"], ["--ssdtrain", "--ssdtrain-paths", str(drive)]])
        )
    ]
    for flag, given_values in words:
        argv += [flag, *given_values]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            flags = add_flags(argparse.ArgumentParser(prog="pretrain", allow_abbrev=False)).parse_args(argv)
    except SystemExit:
        answer = said.getvalue().partition("error: ")[2]
        # A word that belongs to no flag is for the parser itself, which is the host's, to refuse.
        if "--ssdtrain" in answer or not answer.startswith("unrecognized arguments: "):
            check_answer(answer, "--ssdtrain")
        return
    options = accepted_or_refused(lambda: options_of(flags), SOURCE)
    if options is not None:
        accepted_or_refused(lambda: check(options, source=SOURCE, local_rank=0), SOURCE)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize(
    "text",
    [text for text in HOSTILE_TEXTS if text.strip() and "\0" not in text and "\ud800" not in text and text != "0"],
)
def test_what_a_launcher_says_of_itself(monkeypatch, name, text):
    for other in ("LOCAL_RANK", "SLURM_LOCALID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, text)
    call = (
        (lambda: check({"host_bytes": 1}, source="x", local_rank=0)) if name == "LOCAL_WORLD_SIZE" else find_local_rank
    )
    with pytest.raises(ConfigError) as caught:
        call()
    check_answer(str(caught.value), name)


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize("text", ["abc", "1.5", "-2", "9" * 5000, "\x1b[2J"])
def test_what_a_launcher_says_of_the_global_rank(monkeypatch, tmp_path, name, text):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError) as caught:
        ssdtrain.attach(nn.Linear(2, 2), {"paths": str(tmp_path)})
    check_answer(str(caught.value), name)


@pytest.mark.parametrize(("rank", "process", "found"), [("3", "5", 3), ("", "5", 5), ("-1", "5", 5), ("", "-1", 0)])
def test_the_global_rank_is_that_of_the_launcher_that_says_one(monkeypatch, tmp_path, rank, process, found):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("SLURM_PROCID", process)
    with ssdtrain.attach(nn.Linear(2, 2), {"paths": str(tmp_path)}) as offloader:
        assert offloader.end_step().rank == found


@pytest.mark.parametrize("path", [None, 0, ["a.yaml"], {}])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.from_yaml(path)
    check_answer(str(caught.value), str(path))


@pytest.mark.parametrize("model", [None, nn.Linear, {}, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_refused(tmp_path, model):
    with pytest.raises(StateError) as caught:
        ssdtrain.attach(model, {"paths": str(tmp_path)})
    check_answer(str(caught.value), type(model).__name__, "torch.nn.Module")


# ---------------------------------------------------------------------- some of them, to the letter


def test_a_path_cannot_begin_a_line_of_a_log(caplog):
    with pytest.raises(ConfigError) as caught:
        OffloadConfig(paths=["/mnt/x\nhint: all is well\x1b[2J"])
    assert str(caught.value) == (
        "1 problem in the ssdtrain options:\n"
        r"  paths.0: '/mnt/x\nhint: all is well\x1b[2J' (expected a path without control characters)"
        "\n\nhint: correct the lines above; the user guide lists every option"
    )
    deepspeed = pytest.importorskip("ssdtrain_plugin.integrations.deepspeed")
    with caplog.at_level(logging.WARNING):
        deepspeed.read_block({"ssdtrain\n\x1b": {}})
    assert r"`ssdtrain\n\x1b`" in caplog.text


def test_a_name_that_is_no_text_is_unknown():
    with pytest.raises(ConfigError) as caught:
        OffloadConfig(policy="none", **{"\ud800": 1})
    assert caught.value.problems == (r"\ud800: unknown option",)


def test_a_key_that_is_there_twice_is_refused_as_deepspeed_does(tmp_path):
    deepspeed = pytest.importorskip("ssdtrain_plugin.integrations.deepspeed")
    path = tmp_path / "ds.json"
    path.write_text('{"ssdtrain": {"policy": "none"}, "ssdtrain": {"policy": "all"}}')
    with pytest.raises(ConfigError, match="the key 'ssdtrain' is there twice"):
        deepspeed.read_block(path)


def test_a_size_larger_than_any_drive_is_refused():
    with pytest.raises(ConfigError, match=r"disk_bytes: a number of 1329 bits \(expected less than or equal to 922"):
        OffloadConfig(paths="/mnt/x", disk_bytes=10**400)


def test_many_faults_are_counted_and_the_first_are_shown():
    with pytest.raises(ConfigError) as caught:
        OffloadConfig(policy="none", **{f"x{number}": 1 for number in range(1000)})
    assert len(caught.value.problems) == 1000
    assert "... and 980 more" in str(caught.value)
    check_answer(str(caught.value), "1000 problems")


def test_a_value_that_is_missing_gets_a_hint_and_a_flag_that_is_not_there_its_neighbour(capsys):
    pytest.importorskip("megatron.core")
    from ssdtrain_plugin.integrations.megatron.arguments import add_flags

    for words, text in (
        (["--ssdtrain-policy"], "error: argument --ssdtrain-policy: expected one argument"),
        (
            ["--ssdtrain-polcy=all"],
            "error: unrecognized arguments: --ssdtrain-polcy=all (did you mean `--ssdtrain-policy`?)",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            add_flags(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)
        assert caught.value.code == 2
        assert capsys.readouterr().err.endswith(f"{text}\n\nhint: `--help` describes the --ssdtrain flags\n")
