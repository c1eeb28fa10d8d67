"""What Megatron's recompute flags mean while offloading is on."""

from __future__ import annotations

from typing import Any

from ssdtrain_plugin.config import OffloadConfig

__all__ = ["describe_regions", "offers_regions_only"]


def offers_regions_only(model_config: Any, config: OffloadConfig) -> bool:
    """Tell whether the layers that Megatron would recompute are offloaded instead, and they alone.

    Args:
        model_config: TransformerConfig of the model.
        config: The options.
    """
    return (
        getattr(model_config, "recompute_granularity", None) == "full"
        and config.checkpointing == "offload"
        and not _uses_other_checkpoint(model_config)
    )


def _uses_other_checkpoint(model_config: Any) -> bool:
    """Under FP8 and FP4 full recomputation is TransformerEngine's, whose place is not taken."""
    return bool(getattr(model_config, "fp8", None) or getattr(model_config, "fp4", None))


def describe_regions(model_config: Any, config: OffloadConfig) -> str:
    """Say in one line what the recompute flags mean now, and what else they could.

    Args:
        model_config: TransformerConfig of the model.
        config: The options.
    """
    granularity = getattr(model_config, "recompute_granularity", None)
    if granularity is None:
        return "no --recompute-granularity: all that forward saves may be offloaded"
    if granularity == "selective":
        modules = " ".join(getattr(model_config, "recompute_modules", None) or ["core_attn"])
        return (
            f"--recompute-granularity selective ({modules}): recomputed as before; all that is saved may be offloaded"
        )
    flags = (
        f"--recompute-granularity full --recompute-method {model_config.recompute_method} "
        f"--recompute-num-layers {model_config.recompute_num_layers}"
    )
    if offers_regions_only(model_config, config):
        return (
            f"{flags}: these layers are offloaded, none is recomputed, and the rest is kept "
            "(`--ssdtrain-checkpointing recompute` recomputes them and offloads their inputs)"
        )
    reason = " by TransformerEngine (FP8, FP4)" if _uses_other_checkpoint(model_config) else ""
    return f"{flags}: these layers are recomputed as before{reason}, their inputs may be offloaded" + (
        "" if reason else " (`--ssdtrain-checkpointing offload` offloads them and recomputes none)"
    )
