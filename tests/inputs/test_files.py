"""Files that users write: options, models, clusters, matrices. Accepted, or one error that names the file."""

import json
import os

import pytest
import yaml
from hostile import (
    MONSTROUS_FILES,
    accepted_or_refused,
    changed,
    check_answer,
    each_input,
    plain_values,
    raw_files,
)
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ssdtrain_plugin import OffloadConfig
from ssdtrain_plugin.bench.matrix import read_matrix
from ssdtrain_plugin.doctor import ModelShape
from ssdtrain_plugin.documents import MAX_YAML_BYTES
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.projection import cluster_from_dict, model_from_dict, project, read_cluster, read_model
from ssdtrain_plugin.projection.rendering import tables
from ssdtrain_plugin.projection.report import as_dict

READERS = [OffloadConfig.from_yaml, read_model, read_cluster, read_matrix, ModelShape.from_yaml]
every_reader = pytest.mark.parametrize("read", READERS, ids=["options", "model", "cluster", "matrix", "shape"])

MODEL = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 2048, "vocab": 1024, "sequence": 256}
DRIVE = {
    "write_bytes_per_second": "5 GB/s",
    "read_bytes_per_second": 1e9,
    "capacity_bytes": 1e12,
    "rated_write_bytes": 1e15,
}
CLUSTER = {"gpu": "a100-sxm-80gb", "gpus": 8, "parallel": {"dp": 8}, "efficiency": 0.4, "drive": DRIVE}
STACK = {"name": "s", "layers": 2, "hidden": 64, "heads": 2, "sequence": 16, "microbatch": 1}
MATRIX = {"stacks": [STACK], "rounds": 1, "budget": 0.4, "host_bytes": "1 GiB", "options": {}, "strategies": ["keep"]}
SHAPE = {"layers": 2, "hidden": 64, "heads": 2, "sequence": 16, "micro_batch": 1, "tflops": 1.0}
OPTIONS = {"paths": ["/mnt/x"], "io_threads": 4}
TABLES = {
    OffloadConfig.from_yaml: OPTIONS,
    read_model: MODEL,
    read_cluster: CLUSTER,
    read_matrix: MATRIX,
    ModelShape.from_yaml: SHAPE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def _use(found):
    """What a command does with it before it measures anything."""
    if isinstance(found, ModelShape):
        assert found.saved_bytes > 0
        assert 0 < found.forward_seconds < float("inf")
    elif hasattr(found, "stacks"):
        assert all(stack.flops > 0 for stack in found.stacks)


@each_input()
@given(st.data())
def test_a_file_of_anything(folder, data):
    read, path = data.draw(st.sampled_from(READERS)), folder / "it.yaml"
    path.write_bytes(data.draw(raw_files))
    _use(accepted_or_refused(lambda: read(path), f"`{path}`"))


@each_input()
@given(st.data())
def test_a_table_with_wrong_fields(folder, data):
    read, path = data.draw(st.sampled_from(READERS)), folder / "it.yaml"
    table = data.draw(changed(TABLES[read], plain_values) | plain_values)
    try:
        text = yaml.safe_dump(table, allow_unicode=data.draw(st.booleans()))
    except ValueError:  # a number that Python does not write
        text = "layers: " + "9" * 10_000
    path.write_bytes(text.encode(errors="surrogatepass"))
    _use(accepted_or_refused(lambda: read(path), f"`{path}`"))


@each_input()
@given(st.data())
def test_a_plan(data):
    model = data.draw(changed(MODEL) | st.just(MODEL))
    cluster = data.draw(changed(CLUSTER))
    for part, table in (
        ("drive", DRIVE),
        ("parallel", {"tp": 1, "pp": 1, "dp": 8, "zero": 0}),
        ("batch", {"micro_batch": 1}),
    ):
        if data.draw(st.booleans()):
            cluster[part] = data.draw(changed(table))
    found = accepted_or_refused(lambda: project(model_from_dict(model), cluster_from_dict(cluster)), " in ")
    if found is not None:
        json.dumps(as_dict(found), allow_nan=False)
        with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
            Console(file=nowhere, width=200).print(tables(found))


@pytest.mark.parametrize(
    ("model", "cluster"),
    [
        ({"layers": 1024}, {}),
        ({"layers": 1024, "family": "t5"}, {"gpus": 128, "parallel": {"pp": 128}}),
        ({name: 10**9 for name in ("hidden", "heads", "kv_heads", "ffn", "vocab", "sequence")}, {}),
        ({}, {"batch": {"micro_batch": 10**9, "micro_batches": 10**9}}),
        ({}, {"efficiency": 1e-6, "drive": {name: 1e-6 for name in DRIVE}, "network_bytes_per_second": 1e-6}),
        ({}, {"drive": {name: 1e24 for name in DRIVE}}),
        ({}, {"endurance": {"rating_waf": 1e24, "workload_waf": 1e-6, "retention_credit": 1e24}}),
    ],
    ids=["layers", "stages", "sizes", "batch", "slow", "fast", "wear"],
)
@pytest.mark.timeout(60)
def test_the_ends_of_every_range_are_planned(model, cluster):
    found = project(model_from_dict({**MODEL, **model}), cluster_from_dict({**CLUSTER, **cluster}))
    json.dumps(as_dict(found), allow_nan=False)


# ---------------------------------------------------------------------- what is no file of settings


@every_reader
@pytest.mark.parametrize("name", MONSTROUS_FILES)
@pytest.mark.timeout(30)
def test_a_monstrous_file_is_refused_in_time(tmp_path, read, name):
    path = tmp_path / "it.yaml"
    path.write_bytes(MONSTROUS_FILES[name])
    assert accepted_or_refused(lambda: read(path), f"`{path}`") is None


@every_reader
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "a directory (expected a file)"),
        (lambda path: os.mkfifo(path), "a pipe or a device (expected a file)"),
        (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device (expected a file)"),
        (lambda path: path.symlink_to("/dev/null"), "a pipe or a device (expected a file)"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    ],
    ids=["missing", "directory", "pipe", "zeros", "null", "loop", "memory"],
)
@pytest.mark.timeout(30)
def test_what_is_no_file_is_neither_waited_for_nor_read_for_ever(tmp_path, read, make, words):
    path = tmp_path / "it.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        read(path)
    check_answer(str(caught.value), f"`{path}`", words)


@every_reader
@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000, ""], ids=["null", "surrogate", "long", "empty"])
def test_what_is_no_path_is_refused(read, path):
    assert accepted_or_refused(lambda: read(path)) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_a_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "it.yaml"
    path.write_text("layers: 1")
    path.chmod(0o600)
    child = os.fork()
    if not child:
        os.seteuid(65534)
        try:
            read_model(path)
        except ConfigError as error:
            os._exit(0 if "Permission denied" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---------------------------------------------------------------------- one clear error each, to the letter


def _answer(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_bad_yaml(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("layers: 8\nhidden: [512\n")
    assert _answer(lambda: read_model(path)) == (
        f"1 problem in `{path}`:\n"
        "  while parsing a flow sequence, expected ',' or ']', but got '<stream end>' (line 3, column 1)\n"
        "\nhint: check that it holds YAML"
    )


@pytest.mark.parametrize(
    ("model", "cluster", "problem"),
    [
        (
            {"kv_heads": 1, "ffn": 300},
            {"parallel": {"tp": 3}, "gpus": 3},
            "parallel.tp: 3 (expected a divisor of heads, 8)",
        ),
        ({}, {"parallel": {"pp": 5}, "gpus": 5}, "parallel.pp: 5 (expected a divisor of layers, 8)"),
    ],
    ids=["heads by TP", "layers by PP"],
)
def test_impossible_parallelism(model, cluster, problem):
    answer = _answer(lambda: project(model_from_dict({**MODEL, **model}), cluster_from_dict({**CLUSTER, **cluster})))
    head, line, empty, hint = answer.split("\n")
    assert line == f"  {problem}"
    assert head.startswith("1 problem in ")
    assert hint.startswith("hint: ")
    assert not empty


def test_zero_bandwidth():
    cluster = {**CLUSTER, "drive": {**DRIVE, "write_bytes_per_second": 0}}
    answer = _answer(lambda: cluster_from_dict(cluster, source="`cluster.yaml`"))
    head, line, _, hint = answer.split("\n")
    assert head == "1 problem in `cluster.yaml`:"
    assert line == "  drive.write_bytes_per_second: 0 (expected greater than 0)"
    assert hint.startswith("hint: the fields are name, gpu, gpus, ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers: 1\nlayers: 2\n", "the key 'layers' is there twice (line 2, column 1)"),
        ("layers: 2001-02-30\n", "'2001-02-30' is no valid timestamp (line 1, column 9)"),
        ("[" * 3000, "nested too deeply (expected a few levels)"),
        ("a: 1\n" * MAX_YAML_BYTES, "too large (expected at most 64.0 KiB)"),
    ],
)
def test_other_bad_yaml(tmp_path, text, words):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    assert f"1 problem in `{path}`:\n  {words}\n\nhint: " in _answer(lambda: read_model(path))


def test_keys_that_are_merged_may_be_given_again(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("<<: &it {layers: 4, hidden: 64, heads: 2, vocab: 8, sequence: 16}\nlayers: 8\n")
    assert read_model(path).layers == 8
