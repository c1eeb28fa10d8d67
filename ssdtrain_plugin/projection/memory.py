"""Parameters of a stage, and what they, their gradients and the optimizer take of a GPU's memory.

Sizes as in Rajbhandari et al., "ZeRO" (arXiv 1910.02054), section 3: with mixed precision and Adam a
parameter takes 2 bytes for itself, 2 for its gradient and 12 for the optimizer (fp32 copy, mean, variance);
stage 1 divides the last among replicas, stage 2 the gradients too, stage 3 all.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.model import Block, ModelSpec
from ssdtrain_plugin.projection.stages import Stage

__all__ = [
    "StaticMemory",
    "layer_parameters",
    "model_parameters",
    "optimizer_bytes_per_parameter",
    "stage_parameters",
    "static_memory",
]

_GATHERED_LAYERS = 2
"""ZeRO-3: the layer that computes, and the one that is fetched ahead."""


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """What a rank holds all the time (bytes).

    Attributes:
        weight_bytes: Parameters, and with ZeRO-3 the layers that are gathered.
        gradient_bytes: Their gradients.
        optimizer_bytes: fp32 copies and moments.
    """

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float

    @property
    def nbytes(self) -> float:
        """All of it."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def layer_parameters(model: ModelSpec, block: Block) -> int:
    """Count the parameters of one layer: matrices, norms and, but for llama, biases.

    Args:
        model: Its widths.
        block: Which kind of layer.
    """
    hidden, feedforward = model.hidden, model.feedforward
    queries, keys = model.heads * model.width_of_a_head, model.num_kv_heads * model.width_of_a_head
    has_bias = model.family != "llama"
    norm = hidden * (2 if has_bias else 1)
    attention = 2 * hidden * queries + 2 * hidden * keys + norm
    first = (2 if model.is_gated else 1) * feedforward
    total = attention + hidden * (first + feedforward) + norm
    biases = queries + 2 * keys + hidden
    if block.memory_sequence:
        total += attention
        biases += queries + 2 * keys + hidden
    return total + (biases + first + hidden if has_bias else 0)


def model_parameters(model: ModelSpec) -> int:
    """Count the parameters of the whole model.

    Args:
        model: Its widths.
    """
    head = 0 if model.tied_embeddings else model.vocab * model.hidden
    return sum(layer_parameters(model, block) for block in model.blocks) + _embedding_parameters(model) + head


def _embedding_parameters(model: ModelSpec) -> int:
    has_positions = model.family in ("gpt", "bert")
    return (model.vocab + (model.sequence if has_positions else 0)) * model.hidden


def stage_parameters(model: ModelSpec, stage: Stage, tp: int) -> float:
    """Count what one rank of a stage has, before ZeRO. Both ends of a pipeline have the tied table.

    Args:
        model: Its widths.
        stage: Its layers.
        tp: Ranks that share them.
    """
    total = sum(layer_parameters(model, block) for block in stage.blocks)
    if stage.is_first:
        total += _embedding_parameters(model)
    if stage.is_last and not (model.tied_embeddings and stage.is_first):
        total += model.vocab * model.hidden
    return total / tp


def static_memory(model: ModelSpec, cluster: ClusterSpec, stage: Stage) -> StaticMemory:
    """Say what parameters, gradients and optimizer take on one rank of a stage.

    With SGD there is no state, and the weights are updated in their own precision.

    Args:
        model: Its widths and type.
        cluster: Mapping and optimizer.
        stage: Its layers.
    """
    parallel, element = cluster.parallel, model.weight_bytes
    parameters = stage_parameters(model, stage, parallel.tp)
    shares = [parallel.dp if parallel.zero >= level else 1 for level in (3, 2, 1)]
    gathered = 0.0
    if parallel.zero == 3:
        layer = max(layer_parameters(model, block) for block in stage.blocks)
        gathered = _GATHERED_LAYERS * layer / parallel.tp * element
    return StaticMemory(
        weight_bytes=parameters * element / shares[0] + gathered,
        gradient_bytes=parameters * element / shares[1],
        optimizer_bytes=parameters * optimizer_bytes_per_parameter(model, cluster) / shares[2],
    )


def optimizer_bytes_per_parameter(model: ModelSpec, cluster: ClusterSpec) -> int:
    """Say what the optimizer keeps of one parameter (bytes).

    Args:
        model: Its type: fp32 needs no further copy.
        cluster: Which optimizer.
    """
    if cluster.optimizer == "sgd":
        return 0
    return 8 if model.precision == "fp32" else 12
