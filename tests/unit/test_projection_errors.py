"""Bad files and impossible mappings: one error each, with every fault, and no traceback."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdtrain_plugin import OffloadConfig
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.projection import cluster_from_dict, model_from_dict, project, read_cluster, read_model

MODEL = {"layers": 8, "hidden": 512, "heads": 8, "vocab": 1024, "sequence": 256}
CLUSTER = {"gpu": "a100-sxm-80gb", "gpus": 8, "parallel": {"dp": 8}, "efficiency": 0.4, "drive": "samsung-980-pro-1tb"}
DRIVE = {"write_bytes_per_second": 1e9, "read_bytes_per_second": 1e9, "capacity_bytes": 1e12, "rated_write_bytes": 1e15}


def error_of(model=None, cluster=None):
    with pytest.raises(ConfigError) as caught:
        project(model_from_dict({**MODEL, **(model or {})}), cluster_from_dict({**CLUSTER, **(cluster or {})}))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("model", "cluster", "words"),
    [
        (
            {"kv_heads": 1, "ffn": 300},
            {"parallel": {"tp": 3}, "gpus": 3},
            "parallel.tp: 3 (expected a divisor of heads, 8)",
        ),
        ({"ffn": 1026}, {"parallel": {"tp": 8}}, "expected a divisor of ffn, 1026"),
        (
            {"heads": 12, "kv_heads": 4, "head_dim": 32, "ffn": 300},
            {"parallel": {"tp": 3}, "gpus": 3},
            "of kv_heads, 4",
        ),
        ({}, {"parallel": {"pp": 5}, "gpus": 5}, "parallel.pp: 5 (expected a divisor of layers, 8)"),
        (
            {},
            {"parallel": {"pp": 4, "virtual_stages": 3}, "gpus": 4, "batch": {"micro_batches": 4}},
            "parallel.virtual_stages: 3 (expected a divisor of the layers of a stage, 2)",
        ),
        ({}, {"gpus": 9}, "gpus: 9 (expected tp * pp * dp = 1 * 1 * 8 = 8)"),
        ({"sequence": 257}, {"parallel": {"tp": 8, "sp": True}}, "expected sequence, 257, to be a multiple of tp, 8"),
        (
            {"family": "t5", "decoder_sequence": 9},
            {"parallel": {"tp": 8, "sp": True}},
            "expected decoder_sequence, 9, to be a multiple of tp, 8",
        ),
        ({}, {"parallel": {"sp": True, "dp": 8}}, "parallel.sp: does nothing with `tp: 1`"),
        ({}, {"parallel": {"virtual_stages": 2, "dp": 8}}, "does nothing with `pp: 1`"),
        (
            {},
            {"parallel": {"pp": 4, "virtual_stages": 2}, "gpus": 4, "batch": {"micro_batches": 6}},
            "expected a multiple of pp, 4",
        ),
        ({"heads": 16}, {"parallel": {"tp": 16}, "gpus": 16}, "expected at most gpus_per_node, 8"),
        ({}, {"achieved_tflops": 100}, "both given (expected exactly one of them)"),
        ({}, {"efficiency": None}, "neither given"),
        ({}, {"efficiency": None, "achieved_tflops": 400}, "expected at most the GPU's peak, 312"),
        ({"hidden": 500}, {}, "hidden: 500 (expected a multiple of heads, 8, or `head_dim`)"),
        ({"kv_heads": 3}, {}, "kv_heads: 3 (expected a divisor of heads, 8)"),
        ({"decoder_layers": 2}, {}, "decoder_layers: does nothing with `family: gpt`"),
        ({"family": "t5", "decoder_layers": 8}, {}, "decoder_layers: 8 (expected at least 1 and fewer than layers, 8)"),
        ({"fused_activation": True}, {}, "fused_activation: does nothing with `activation: gelu`"),
        ({"hidden": 0}, {}, "hidden: 0 (expected greater than 0)"),
        ({"layers": 10**9}, {}, "layers: 1000000000 (expected less than or equal to 1024)"),
        ({"dropout": ["everywhere"]}, {}, "dropout.0: 'everywhere'"),
        ({"atention": "flash"}, {}, "atention: unknown field (did you mean `attention`?)"),
        ({"preset": "gpt3-175"}, {}, "preset: 'gpt3-175' is unknown (did you mean `gpt3-175b`?)"),
        ({"layers": True}, {}, "layers: True (expected integer)"),
        (
            {},
            {"drive": {**DRIVE, "write_bytes_per_second": 0}},
            "drive.write_bytes_per_second: 0 (expected greater than 0)",
        ),
        ({}, {"drive": {**DRIVE, "read_bytes_per_second": "0 GB/s"}}, "drive.read_bytes_per_second: '0 GB/s'"),
        ({}, {"drive": {**DRIVE, "read_bytes_per_second": "fast"}}, "'fast' is not a size"),
        ({}, {"drive": {"preset": "floppy"}}, "drive.preset: 'floppy' is unknown"),
        ({}, {"drive": {k: v for k, v in DRIVE.items() if k != "capacity_bytes"}}, "drive.capacity_bytes: missing"),
        ({}, {"gpu": "a100"}, "gpu.preset: 'a100' is unknown (did you mean `a100-"),
        ({}, {"gpu": None}, "gpu: None (expected"),
        ({}, {"network_bytes_per_second": float("nan")}, "network_bytes_per_second: nan"),
        ({}, {"efficiency": 1.2}, "efficiency: 1.2 (expected less than or equal to 1)"),
        ({}, {"parallel": {"zero": 4}}, "parallel.zero: 4 (expected 0, 1, 2 or 3)"),
        ({}, {"parallel": {"ep": 2}}, "parallel.ep: unknown field"),
        ({}, {"endurance": {"retention_credit": 0}}, "endurance.retention_credit: 0"),
    ],
)
def test_a_fault_is_named_with_what_is_expected(model, cluster, words):
    error = error_of(model, cluster)
    assert words in str(error)
    assert len(error.problems) == 1, error


def test_all_faults_are_listed():
    error = error_of({"kv_heads": 3}, {"parallel": {"tp": 3, "pp": 5}, "efficiency": None})
    assert len(error.problems) == 6


@pytest.mark.parametrize("read", [read_model, read_cluster])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "while parsing"),
        ("", "file: None (expected a mapping of names to values)"),
        ("- 1", "file: [1]"),
        ("1: 2", "file: {1: 2}"),
        ("a: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, read, text, words):
    path = tmp_path / "it.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"1 problem in `.*it\.yaml`") as caught:
        read(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("read", [read_model, read_cluster])
def test_a_missing_file_is_said(tmp_path, read):
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "missing.yaml")


# --- any mapping: refused for a reason that holds, or planned


SMALL = st.integers(1, 12)
MODELS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(["gpt", "bert", "t5", "llama"]),
        "layers": st.integers(2, 12),
        "hidden": st.sampled_from([96, 128, 192]),
        "heads": st.sampled_from([4, 6, 8, 12]),
        "kv_heads": st.sampled_from([1, 2, 3, 4]),
        "ffn": st.sampled_from([256, 384, 500]),
        "vocab": st.integers(1, 1000),
        "sequence": st.sampled_from([16, 24, 30, 64]),
        "attention": st.sampled_from(["naive", "flash"]),
        "activation": st.sampled_from(["gelu", "relu", "swiglu"]),
        "precision": st.sampled_from(["fp8", "fp16", "fp32"]),
        "recompute": st.sampled_from(["none", "selective", "full"]),
        "attention_copies": st.integers(0, 2),
    }
)
PARALLEL = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 3, 4, 8]),
        "pp": st.sampled_from([1, 2, 3, 4, 6]),
        "dp": SMALL,
        "virtual_stages": st.sampled_from([1, 1, 2, 3]),
        "zero": st.sampled_from([0, 1, 2, 3]),
        "sp": st.booleans(),
    }
)


def is_possible(model, parallel, gpus, micro_batches):
    """The rules once more, in other words than the code's."""
    tp, pp, parts = parallel["tp"], parallel["pp"], parallel["virtual_stages"]
    per_head = all(model[name] % tp == 0 for name in ("heads", "ffn"))
    keys = model["kv_heads"]
    shared = keys % tp == 0 or tp % keys == 0
    layers = model["layers"] % (pp * parts) == 0
    interleaved = parts == 1 or (pp > 1 and micro_batches % pp == 0)
    sequences = not parallel["sp"] or (tp > 1 and model["sequence"] % tp == 0)
    sizes = model["heads"] % keys == 0 and model["hidden"] % model["heads"] == 0
    return sizes and per_head and shared and layers and interleaved and sequences and gpus == tp * pp * parallel["dp"]


@given(MODELS, PARALLEL, st.integers(0, 5), SMALL, SMALL)
@settings(deadline=None)
def test_any_mapping_is_planned_or_refused_for_a_reason(model, parallel, off, micro_batch, micro_batches):
    gpus = parallel["tp"] * parallel["pp"] * parallel["dp"] + (off == 5)
    spec = model_from_dict(model)
    cluster = cluster_from_dict(
        {
            **CLUSTER,
            "gpus": gpus,
            "parallel": parallel,
            "batch": {"micro_batch": micro_batch, "micro_batches": micro_batches},
        }
    )
    if not is_possible(model, parallel, gpus, micro_batches):
        with pytest.raises(ConfigError) as caught:
            project(spec, cluster)
        assert all("(expected " in problem for problem in caught.value.problems)
        return
    check(spec, cluster)


@given(MODELS, PARALLEL, SMALL, SMALL, SMALL)
@settings(deadline=None, max_examples=50)
def test_a_mapping_that_divides_is_planned(model, parallel, layers, micro_batch, rounds):
    tp, pp = parallel["tp"], parallel["pp"]
    parts = parallel["virtual_stages"] if pp > 1 else 1
    sizes = {"heads": 24, "kv_heads": 24, "hidden": 192, "ffn": 384, "sequence": 48}
    spec = model_from_dict({**model, **sizes, "layers": pp * parts * layers + (pp * parts * layers == 1)})
    mapping = {**parallel, "virtual_stages": parts, "sp": parallel["sp"] and tp > 1}
    batch = {"micro_batch": micro_batch, "micro_batches": rounds * pp}
    check(
        spec,
        cluster_from_dict({**CLUSTER, "gpus": tp * pp * parallel["dp"], "parallel": mapping, "batch": batch}),
    )


def check(spec, cluster):
    """What holds of every plan."""
    parallel = cluster.parallel
    found = project(spec, cluster)
    assert sum(len(plan.stage.blocks) for plan in found.stages) == spec.layers
    assert found.step.seconds > 0
    assert 0 <= found.step.bubble_share < 1
    assert 0 < found.step.update_share < 1
    assert 0 < found.hidden_share <= 1
    assert all(0 <= plan.offloaded_bytes <= plan.saved_bytes for plan in found.stages)
    assert all(plan.life.rated_years > 0 for plan in found.stages)
    assert cluster.batch.micro_batch in {point.micro_batch for point in found.sweep}
    OffloadConfig.from_dict(found.config)
    # All ranks of a layer together save what one alone would, or more where they replicate.
    alone = project(
        spec,
        cluster_from_dict({**CLUSTER, "gpus": 1, "parallel": {}, "batch": {"micro_batch": cluster.batch.micro_batch}}),
    )
    together = parallel.tp * sum(plan.saved_bytes for plan in found.stages)
    assert together >= alone.worst.saved_bytes
