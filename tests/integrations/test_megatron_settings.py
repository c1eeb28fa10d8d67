"""What Megatron's settings mean to the plugin: which it refuses, what it says of others, in which order passes run.

Real configs and real schedules, of this interpreter's megatron-core and, where ``SSDTRAIN_MEGATRON_PYTHON`` names
another one, of that interpreter's.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import EAGER, run

pytest.importorskip("megatron.core")

from megatron_settings_worker import LAYOUTS, SETTINGS

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.integrations.megatron import enable
from ssdtrain_plugin.integrations.megatron.refusals import refuse
from ssdtrain_plugin.integrations.megatron.regions import describe_regions, offers_regions_only
from ssdtrain_plugin.integrations.megatron.takeover import enabled

pytestmark = [pytest.mark.megatron, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("megatron_settings_worker.py")
NEWEST = os.environ.get("SSDTRAIN_MEGATRON_PYTHON")
PYTHONS = [
    pytest.param(sys.executable, id="this"),
    pytest.param(
        NEWEST, id="newest", marks=pytest.mark.skipif(not NEWEST, reason="SSDTRAIN_MEGATRON_PYTHON is not set")
    ),
]
FREES = "it frees its output while that is being stored"
LAYERNORM = f"--recompute-modules layernorm: {FREES} (expected without `layernorm`; what it saves is offloaded anyway)"
MLP = (
    "--recompute-modules mlp: with biases Megatron's own backward calls itself until memory is used up (expected "
    "without `mlp`, or with `--disable-bias-linear`)"
)
FINE_GRAINED = (
    "--fine-grained-activation-offloading: it offloads the same tensors to host memory (expected without it; "
    "`--ssdtrain-host-bytes` gives a host tier)"
)
GRAPHS = (
    "CUDA graphs: what a graph saves is seen only once, when it is captured (expected `--cuda-graph-impl none`, "
    "without `--enable-cuda-graph` and `--external-cuda-graph`)"
)
REFUSED = {
    "layernorm": [LAYERNORM],
    **{name: [LAYERNORM.replace("layernorm", name)] for name in ("moe_act", "mla_up_proj", "gdn_norm_out")},
    "mlp": [MLP],
    "fine_grained": [FINE_GRAINED],
    "cpu_offloading": [
        "--cpu-offloading-num-layers: it offloads the same tensors to host memory (expected without it; "
        "`--ssdtrain-host-bytes` gives a host tier)"
    ],
    "combined": [
        "--overlap-moe-expert-parallel-comm: its combined 1F1B schedule frees inputs that are being stored (expected "
        "without it)"
    ],
    **{f"graph_{name}": [GRAPHS] for name in ("local", "transformer_engine", "full_iteration", "enabled", "external")},
    "paged_stash": ["--moe-paged-stash: it takes what experts save before it can be offloaded (expected without it)"],
    "several": [LAYERNORM, MLP, FINE_GRAINED],
}
ALLOWED = ("plain", "full", "full_fp8", "selective", "core_attn", "mlp_without_bias", "moe")
SINCE_0_17 = {"gdn_norm_out", "graph_full_iteration", "paged_stash"}


@pytest.fixture(scope="module", params=PYTHONS)
def found(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("settings")
    code, text = run([request.param, WORKER, directory / "found.json"], directory / "log", timeout_seconds=250, **EAGER)
    assert code == 0, text
    return json.loads((directory / "found.json").read_text())


# ---------------------------------------------------------------------- refusals


def test_every_setting_is_judged():
    assert {*REFUSED, *ALLOWED} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_real_config_is_refused_in_these_words_or_not_at_all(found, name):
    problems = found["problems"][name]
    if problems is None:  # this release has no such setting
        assert name in SINCE_0_17
        assert found["problems"]["plain"] == []
    else:
        assert problems == REFUSED.get(name, [])


def flags(**given):
    """Flags as Megatron's parser leaves them, with its defaults."""
    defaults = {
        "recompute_granularity": None,
        "recompute_modules": None,
        "add_bias_linear": True,
        "fine_grained_activation_offloading": False,
        "cpu_offloading_num_layers": 0,
        "overlap_moe_expert_parallel_comm": False,
        "cuda_graph_impl": "none",
        "enable_cuda_graph": False,
        "external_cuda_graph": False,
        "moe_paged_stash": False,
    }
    return Namespace(**defaults | given)


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({}, []),
        ({"recompute_granularity": "full", "recompute_modules": ["layernorm", "mlp"]}, []),
        ({"recompute_modules": ["layernorm"]}, []),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, REFUSED["layernorm"]),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, REFUSED["mlp"]),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"], "add_bias_linear": False}, []),
        ({"fine_grained_activation_offloading": True}, REFUSED["fine_grained"]),
        ({"cpu_offloading_num_layers": 2}, REFUSED["cpu_offloading"]),
        ({"overlap_moe_expert_parallel_comm": True}, REFUSED["combined"]),
        ({"enable_cuda_graph": True}, [GRAPHS]),
        ({"external_cuda_graph": True}, [GRAPHS]),
        ({"cuda_graph_impl": "full_iteration"}, [GRAPHS]),
        ({"moe_paged_stash": True}, REFUSED["paged_stash"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_parsed_flags_are_refused_in_the_same_words(given, problems):
    if not problems:
        refuse(flags(**given))
        return
    with pytest.raises(ConfigError) as caught:
        refuse(flags(**given))
    assert list(caught.value.problems) == problems


def test_the_whole_message():
    with pytest.raises(ConfigError) as caught:
        refuse(flags(moe_paged_stash=True, cuda_graph_impl="local"))
    assert str(caught.value) == (
        "2 problems in Megatron's settings together with --ssdtrain:\n"
        f"  {GRAPHS}\n"
        f"  {REFUSED['paged_stash'][0]}\n"
        "\n"
        "hint: change the settings above, or train without `--ssdtrain`"
    )


def test_refused_flags_leave_megatron_as_it_is(tmp_path):
    args = flags(moe_paged_stash=True, ssdtrain=True, ssdtrain_paths=[str(tmp_path)])
    with pytest.raises(ConfigError, match="--moe-paged-stash"):
        enable(args)
    assert enabled() is None


def test_refused_settings_do_not_matter_without_the_switch():
    assert enable(flags(moe_paged_stash=True, ssdtrain=False)) is None
    assert enabled() is None


# ---------------------------------------------------------------------- what recompute flags mean

OFFLOAD, RECOMPUTE = OffloadConfig(policy="none"), OffloadConfig(policy="none", checkpointing="recompute")


def model_config(granularity=None, **more):
    return SimpleNamespace(recompute_granularity=granularity, **more)


BLOCK = {"recompute_method": "block", "recompute_num_layers": 3}
BLOCK_TEXT = "--recompute-granularity full --recompute-method block --recompute-num-layers 3: these layers are"


@pytest.mark.parametrize(
    ("settings", "config", "line", "only_regions"),
    [
        (
            model_config(),
            OFFLOAD,
            "no --recompute-granularity: all that forward saves may be offloaded",
            False,
        ),
        (
            model_config("selective", recompute_modules=["core_attn", "moe"]),
            OFFLOAD,
            "--recompute-granularity selective (core_attn moe): recomputed as before; all that is saved may be "
            "offloaded",
            False,
        ),
        (
            model_config("selective", recompute_modules=None),
            RECOMPUTE,
            "--recompute-granularity selective (core_attn): recomputed as before; all that is saved may be offloaded",
            False,
        ),
        (
            model_config("full", **BLOCK),
            OFFLOAD,
            f"{BLOCK_TEXT} offloaded, none is recomputed, and the rest is kept (`--ssdtrain-checkpointing recompute` "
            "recomputes them and offloads their inputs)",
            True,
        ),
        (
            model_config("full", **BLOCK),
            RECOMPUTE,
            f"{BLOCK_TEXT} recomputed as before, their inputs may be offloaded (`--ssdtrain-checkpointing offload` "
            "offloads them and recomputes none)",
            False,
        ),
        (
            model_config("full", **BLOCK, fp8="hybrid"),
            OFFLOAD,
            f"{BLOCK_TEXT} recomputed as before by TransformerEngine (FP8, FP4), their inputs may be offloaded",
            False,
        ),
        (
            model_config("full", **BLOCK, fp4="e2m1"),
            RECOMPUTE,
            f"{BLOCK_TEXT} recomputed as before by TransformerEngine (FP8, FP4), their inputs may be offloaded",
            False,
        ),
    ],
    ids=["none", "selective", "selective_default", "full", "full_recompute", "fp8", "fp4"],
)
def test_one_line_says_what_recompute_flags_mean(settings, config, line, only_regions):
    assert describe_regions(settings, config) == line
    assert offers_regions_only(settings, config) is only_regions


# ---------------------------------------------------------------------- order of passes


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number]))
def test_passes_run_in_the_order_that_is_looked_ahead_by(found, number):
    stages, chunks, microbatches, *_ = LAYOUTS[number]
    ranks = found["orders"][number]
    assert len(ranks) == stages
    for rank in ranks:
        assert rank["ran"] == rank["expected"]
        assert len(rank["ran"]) == 2 * microbatches * (chunks or 1)
