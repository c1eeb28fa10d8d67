"""What of Megatron does not go together with offloading, found before training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ssdtrain_plugin.errors import ConfigError

__all__ = ["refuse"]

# All users of CheckpointWithoutOutput up to 0.19: it throws their output away with `resize_(0)`, while its store may
# be running.
_FREEING_MODULES = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")


class _Refusal(NamedTuple):
    """One combination.

    Attributes:
        applies: Given a config or the parsed flags, by attribute.
        problem: What it is and why; what to do is in the parentheses.
    """

    applies: Callable[[Callable[[str], Any]], bool]
    problem: str


def _selects(module: str) -> Callable[[Callable[[str], Any]], bool]:
    def applies(get: Callable[[str], Any]) -> bool:
        return get("recompute_granularity") == "selective" and module in (get("recompute_modules") or ())

    return applies


def _frees(module: str) -> _Refusal:
    return _Refusal(
        _selects(module),
        f"--recompute-modules {module}: it frees its output while that is being stored (expected without `{module}`; "
        "what it saves is offloaded anyway)",
    )


def _recurses(get: Callable[[str], Any]) -> bool:
    # The bias is returned out of the checkpoint, so what leads to it in backward is the checkpoint itself, again.
    # The flag is `--disable-bias-linear`; in the config it is `add_bias_linear`.
    return _selects("mlp")(get) and get("add_bias_linear") is not False


def _uses_graphs(get: Callable[[str], Any]) -> bool:
    is_on = bool(get("enable_cuda_graph")) or bool(get("external_cuda_graph"))
    return is_on or get("cuda_graph_impl") not in (None, "none")


_REFUSALS = (
    *(_frees(module) for module in _FREEING_MODULES),
    _Refusal(
        _recurses,
        "--recompute-modules mlp: with biases Megatron's own backward calls itself until memory is used up (expected "
        "without `mlp`, or with `--disable-bias-linear`)",
    ),
    _Refusal(
        lambda get: bool(get("fine_grained_activation_offloading")),
        "--fine-grained-activation-offloading: it offloads the same tensors to host memory (expected without it; "
        "`--ssdtrain-host-bytes` gives a host tier)",
    ),
    _Refusal(
        lambda get: bool(get("cpu_offloading")) or bool(get("cpu_offloading_num_layers")),
        "--cpu-offloading-num-layers: it offloads the same tensors to host memory (expected without it; "
        "`--ssdtrain-host-bytes` gives a host tier)",
    ),
    _Refusal(
        lambda get: bool(get("overlap_moe_expert_parallel_comm")),
        "--overlap-moe-expert-parallel-comm: its combined 1F1B schedule frees inputs that are being stored (expected "
        "without it)",
    ),
    _Refusal(
        _uses_graphs,
        "CUDA graphs: what a graph saves is seen only once, when it is captured (expected `--cuda-graph-impl none`, "
        "without `--enable-cuda-graph` and `--external-cuda-graph`)",
    ),
    _Refusal(
        lambda get: bool(get("moe_paged_stash")),
        "--moe-paged-stash: it takes what experts save before it can be offloaded (expected without it)",
    ),
)


def refuse(settings: Any) -> None:
    """Raise if something is switched on that offloading cannot be combined with.

    Args:
        settings: A config of Megatron, or its parsed flags.

    Raises:
        ConfigError: Lists every such setting.
    """

    def get(name: str) -> Any:
        return getattr(settings, name, None)

    problems = [refusal.problem for refusal in _REFUSALS if refusal.applies(get)]
    if problems:
        raise ConfigError(
            "Megatron's settings together with --ssdtrain",
            problems,
            hint="change the settings above, or train without `--ssdtrain`",
        )
