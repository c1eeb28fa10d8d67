"""Published figures. Each row has its source; nothing in the package knows them.

The rows of SSDTrain (arXiv 2408.10013) are outputs of its authors' public model, a fork of llm-analysis, run with
the arguments that its examples give. What that model counts is an input here: `AS_SSDTRAIN`.
"""

import pytest

from ssdtrain_plugin.projection import cluster_from_dict, model_from_dict, project
from ssdtrain_plugin.projection.arithmetic import model_flops
from ssdtrain_plugin.projection.memory import model_parameters
from ssdtrain_plugin.projection.sweep import same_micro_batches
from ssdtrain_plugin.units import GIB, TIB

AS_SSDTRAIN = {
    "precision": "fp16",
    "norm_precision": "fp32",
    "dropout": ["attention_output"],
    "attention_copies": 2,
    "loss_precision": "fp16",
    "head_transform": False,
}
DRIVES = {"drive": "samsung-980-pro-1tb", "drives_per_gpu": 4, "hbm_efficiency": 1.0}


def bert(preset, tp=2, counting=None, **parallel):
    """Table III: batch 16, 1024 tokens, 153 TFLOP/s, sequence split wherever layers are."""
    model = model_from_dict({"preset": preset, **(AS_SSDTRAIN if counting is None else counting)})
    return project(
        model,
        cluster_from_dict(
            {
                **DRIVES,
                "gpu": "a100-pcie-80gb",
                "gpus": tp,
                "parallel": {"tp": tp, "sp": tp > 1, **parallel},
                "batch": {"micro_batch": 16},
                "achieved_tflops": 153,
                "optimizer": "sgd",
            }
        ),
    )


def gpt(gpus, tflops, parallel, micro_batch, micro_batches, **fields):
    """Section III-D: 300 billion tokens on A100; rates are those of Narayanan et al. (arXiv 2104.04473), Table 2."""
    model = model_from_dict({"preset": "gpt3-175b", "vocab": 50_272, **AS_SSDTRAIN, **fields})
    cluster = {
        **DRIVES,
        "gpu": "a100-sxm-80gb",
        "gpus": gpus,
        "parallel": parallel,
        "batch": {"micro_batch": micro_batch, "micro_batches": micro_batches},
        "achieved_tflops": tflops,
    }
    return project(model, cluster_from_dict(cluster))


# Each row: the preset; activations in GiB; bandwidth in GiB/s; forward in seconds.
TABLE_III = [
    ("bert-h8192-l4", 11.13, 19.0, 0.390),
    ("bert-h12288-l3", 12.60, 13.1, 0.643),
    ("bert-h16384-l2", 11.50, 10.0, 0.764),
]


@pytest.mark.parametrize(("preset", "activations", "bandwidth", "forward"), TABLE_III)
def test_table_iii_of_ssdtrain(preset, activations, bandwidth, forward):
    found = bert(preset)
    assert found.worst.saved_bytes / GIB == pytest.approx(activations, rel=0.01)
    assert found.worst.need.write_bytes_per_second / GIB == pytest.approx(bandwidth, rel=0.03)
    assert found.worst.time.forward_seconds == pytest.approx(forward, rel=0.03)


@pytest.mark.parametrize(("tp", "bandwidth"), [(4, 18.3), (8, 16.9)])
def test_more_tensor_parallelism_needs_less_bandwidth(tp, bandwidth):
    """SSDTrain's examples/scale_up_estimate, width 8192."""
    found = bert("bert-h8192-l4", tp).worst.need.write_bytes_per_second / GIB
    assert found == pytest.approx(bandwidth, rel=0.05)


# Each row: GPUs; TFLOP/s; micro-batches; bandwidth in GiB/s; life in years.
TP8_PP12 = [(384, 153, 384, 11.7, 2.6), (768, 149, 192, 11.4, 2.7), (1536, 141, 96, 10.8, 2.8)]


@pytest.mark.parametrize(("gpus", "tflops", "count", "bandwidth", "years"), TP8_PP12)
def test_gpt3_with_tensor_and_pipeline_parallelism(gpus, tflops, count, bandwidth, years):
    """SSDTrain, Fig. 5. Its model divides by the number of stages: the mean; and knows neither bubble nor update."""
    found = gpt(gpus, tflops, {"tp": 8, "sp": True, "pp": 12, "dp": gpus // 96}, 1, count)
    assert found.mean_write_bytes_per_second / GIB == pytest.approx(bandwidth, rel=0.05)
    assert found.worst.need.write_bytes_per_second / GIB == pytest.approx(bandwidth, rel=0.05)
    assert found.worst.busy_life.retention_years == pytest.approx(years, rel=0.05)
    assert found.worst.life.retention_years > found.worst.busy_life.retention_years


# Each row: GPUs; TFLOP/s; micro-batch; bandwidth in GiB/s; life in years; activations of a micro-batch in TiB.
ZERO_3 = [(384, 144, 16, 12.09, 2.5, 1.45), (768, 88, 18, 7.4, 4.1, 1.63), (1536, 44, 19, 3.7, 8.2, 1.72)]


@pytest.mark.parametrize(("gpus", "tflops", "micro_batch", "bandwidth", "years", "activations"), ZERO_3)
def test_gpt3_with_zero_3(gpus, tflops, micro_batch, bandwidth, years, activations):
    """SSDTrain, Fig. 5; the first row is the 12.1 GB/s that its text gives as the most."""
    found = gpt(gpus, tflops, {"dp": gpus, "zero": 3}, micro_batch, 1)
    assert found.worst.saved_bytes / TIB == pytest.approx(activations, rel=0.05)
    assert found.worst.need.write_bytes_per_second / GIB == pytest.approx(bandwidth, rel=0.05)
    assert found.worst.busy_life.retention_years == pytest.approx(years, rel=0.05)
    assert found.limits.keep == 0, "nobody would offload"
    assert 8 <= micro_batch <= found.limits.offload, "8 to 32 fit, says section III-D"


def test_without_the_retention_credit_a_life_is_days():
    life = gpt(384, 144, {"dp": 384, "zero": 3}, 16, 1).worst.busy_life
    assert life.retention_years / life.sequential_years == pytest.approx(86)
    assert life.sequential_years / life.rated_years == pytest.approx(2.5)
    assert 10 < life.sequential_years * 365.25 < 12


def test_what_the_defaults_count_differs_from_ssdtrains_model_by_this_much():
    """Without their assumptions: bf16 norms, all masks, no further attention tensors, fp32 loss, BERT's transform."""
    shares = [bert(preset, counting={}).worst.saved_bytes / GIB / activations for preset, activations, *_ in TABLE_III]
    assert shares == pytest.approx([0.914, 0.919, 0.944], abs=0.001)


def test_micro_batches_of_megatron_with_an_fp32_residual_come_close():
    """41 bytes a token and width in SSDTrain's model; 40 with one copy of attention's output and both masks."""
    physical = {
        "norm_precision": "fp32",
        "dropout": ["attention_output", "feedforward"],
        "attention_copies": 1,
    }
    theirs = gpt(384, 144, {"dp": 384, "zero": 3}, 16, 1).worst
    ours = gpt(384, 144, {"dp": 384, "zero": 3}, 16, 1, **physical).worst
    assert ours.saved_bytes / theirs.saved_bytes == pytest.approx(40 / 41, abs=0.002)


def test_updates_weigh_less_with_larger_micro_batches():
    """SSDTrain, Fig. 8(a): the gain of a larger micro-batch is mostly the time of the update."""
    found = bert("bert-h12288-l3")
    shares = [point.update_share for point in same_micro_batches(found.model, found.cluster, found.limits)]
    assert shares == sorted(shares, reverse=True)
    one, two = shares[:2]
    assert one / (1 - one) == pytest.approx(2 * two / (1 - two), rel=0.1), "inversely proportional"


def test_the_bubble_of_1f1b():
    """Narayanan et al. (arXiv 2104.04473), section 2.2: (p - 1) / (v m) of the ideal time."""
    for virtual_stages in (1, 2):
        parallel = {"tp": 8, "sp": True, "pp": 12, "dp": 4, "virtual_stages": virtual_stages}
        step = gpt(384, 153, parallel, 1, 24).step
        assert step.bubble_seconds / step.compute_seconds == pytest.approx(11 / 24 / virtual_stages)


def test_interleaving_saves_more():
    """Korthikanti et al. (arXiv 2205.05198), section 4.2.3: (1 + (p - 1) / (p v)) times the activations of stage 0."""
    plain, interleaved = (
        gpt(384, 153, {"tp": 8, "pp": 12, "dp": 4, "virtual_stages": parts}, 1, 384).stages[0].in_flight
        for parts in (1, 2)
    )
    assert (plain, interleaved / plain) == (12, pytest.approx(1 + 11 / 24))


def test_the_operations_of_narayanan():
    """Their equation 3 without recomputation: 72 B s l h^2 (1 + s / 6h + V / 12lh)."""
    model = model_from_dict({"preset": "gpt3-175b"})
    s, layers, h, vocab = model.sequence, model.layers, model.hidden, model.vocab
    expected = 72 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert model_flops(model) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("preset", "billions"),
    [  # from the papers that presets.py names
        ("gpt2-xl", 1.558),
        ("gpt3-175b", 174.6),
        ("gpt-530b", 530),
        ("bert-large", 0.335),
        ("t5-11b", 11.3),
        ("llama-2-7b", 6.738),
        ("llama-2-70b", 68.98),
    ],
)
def test_parameters_of_known_models(preset, billions):
    assert model_parameters(model_from_dict({"preset": preset})) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_memory_of_zero(zero, gigabytes):
    """Rajbhandari et al. (arXiv 1910.02054), Fig. 1: 7.5 billion parameters, 64 replicas, Adam."""
    fields = {"layers": 36, "hidden": 4160, "heads": 32, "vocab": 100, "sequence": 128}
    cluster = {**DRIVES, "gpu": "h100-sxm-80gb", "gpus": 64, "parallel": {"dp": 64, "zero": zero}, "efficiency": 0.5}
    found = project(model_from_dict(fields), cluster_from_dict(cluster))
    static = found.worst.static.nbytes - (zero == 3) * 2 * 2 * found.parameters / 36  # the layers that are gathered
    assert found.parameters / 1e9 == pytest.approx(7.5, rel=0.01)
    assert static / 1e9 == pytest.approx(gigabytes, rel=0.03)
