"""Operations of matrix products.

Counted as by Narayanan et al. (arXiv 2104.04473), appendix: two for each multiplication and addition, all of a
causal mask's scores, nothing for norms, activations and softmax.
"""

from __future__ import annotations

from ssdtrain_plugin.projection.model import Block, ModelSpec

__all__ = ["head_flops", "layer_flops", "model_flops"]


def layer_flops(model: ModelSpec, block: Block) -> float:
    """Count the forward of one layer on one sequence.

    Args:
        model: Its widths.
        block: Which kind of layer.
    """
    hidden, tokens, memory = model.hidden, block.sequence, block.memory_sequence
    queries, keys = model.heads * model.width_of_a_head, model.num_kv_heads * model.width_of_a_head
    products = 2 * tokens * (2 * hidden * queries + 2 * hidden * keys)
    products += 2 * tokens * (3 if model.is_gated else 2) * hidden * model.feedforward
    cores = 4 * tokens * tokens * queries
    if memory:
        products += 2 * tokens * 2 * hidden * queries + 2 * memory * 2 * hidden * keys
        cores += 4 * tokens * memory * queries
    return float(products + cores)


def head_flops(model: ModelSpec) -> float:
    """Count the forward of the head on one sequence.

    Args:
        model: Its widths.
    """
    columns = model.vocab * model.hidden + (model.hidden**2 if model.has_head_transform else 0)
    return 2.0 * model.output_sequence * columns


def model_flops(model: ModelSpec) -> float:
    """Count forward and backward of one sequence through the whole model, without what is recomputed.

    Args:
        model: Its widths.
    """
    return 3.0 * (sum(layer_flops(model, block) for block in model.blocks) + head_flops(model))
