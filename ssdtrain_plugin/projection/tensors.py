"""What autograd saves, tensor by tensor.

Note [Where the list comes from]. Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models" (arXiv 2205.05198), section 4, walk through a GPT layer: with
sequence ``s``, micro-batch ``b``, width ``h``, ``a`` heads and 2-byte elements it saves
``s b h (34 + 5 a s / h)`` bytes; with ``t`` tensor-parallel ranks each has
``s b h (10 + 24 / t + 5 a s / (h t))``, and a t-th of all with sequence parallelism. Their
section 4.3 adds, outside of the layers, the mask of the embedding's dropout, the inputs of
the last norm and of the logits, and the fp32 logits. The list here is theirs, with shapes
instead of a sum, so that it holds also for other widths, grouped heads, gated activations,
cross-attention and other types. Beyond theirs it has what is small: one or two numbers a row
for each norm, the log-sum-exp of a flash kernel (Dao, arXiv 2307.08691), and indices.

A tensor that two operations save is listed once: it is one storage, and it is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ssdtrain_plugin.projection.model import ELEMENT_BYTES, Block, ModelSpec

__all__ = [
    "SavedTensor",
    "Split",
    "embedding_tensors",
    "head_tensors",
    "layer_tensors",
    "norm_tensors",
    "split_of",
    "total_bytes",
]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor that one rank saves in the forward of one micro-batch.

    Attributes:
        name: Part of the layer and what it is, for example ``feedforward.activation_input``.
        shape: On one rank.
        dtype: ``bf16``, ``fp16``, ``fp32``, ``bool`` or ``int64``.
        count: How many of them, for one layer or for the whole of an embedding or head.
        reader: Whose backward reads it.
        storage: Whose allocation it may lie in: tensors that name the same one are, in a fused
            implementation, views of one storage.
        is_row_statistic: It has a few numbers for each token, and papers leave it out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    reader: str
    count: int = 1
    storage: str = ""
    is_row_statistic: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def one_bytes(self) -> int:
        """Bytes of one of them."""
        return prod(self.shape) * self.element_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all ``count`` of them."""
        return self.count * self.one_bytes


@dataclass(frozen=True, slots=True)
class Split:
    """What one rank has of one layer.

    Attributes:
        batch: Sequences of the micro-batch.
        tensor_parallel: Ranks that share the layer.
        sequence_parallel: Whether they share along the sequence what they would replicate.
    """

    batch: int
    tensor_parallel: int = 1
    sequence_parallel: bool = False

    def share(self, size: int) -> int:
        """Divide among tensor-parallel ranks; the largest share where it does not divide.

        Args:
            size: Of a split dimension.
        """
        return -(-size // self.tensor_parallel)

    def rows(self, sequence: int) -> int:
        """Tokens of a sequence that this rank has between the parallel regions.

        Args:
            sequence: All of them.
        """
        return self.share(sequence) if self.sequence_parallel else sequence


def split_of(batch: int, tp: int, *, sp: bool) -> Split:
    """Make a split; sequence parallelism needs tensor parallelism.

    Args:
        batch: Sequences of the micro-batch.
        tp: Tensor-parallel ranks.
        sp: Whether they also split the sequence.
    """
    return Split(batch=batch, tensor_parallel=tp, sequence_parallel=sp and tp > 1)


def total_bytes(tensors: Iterator[SavedTensor] | list[SavedTensor] | tuple[SavedTensor, ...]) -> int:
    """Add up.

    Args:
        tensors: Any number.
    """
    return sum(tensor.nbytes for tensor in tensors)


def layer_tensors(model: ModelSpec, block: Block, split: Split) -> list[SavedTensor]:
    """List what one layer saves, in the order of forward.

    Args:
        model: Its widths and types.
        block: Which kind of layer.
        split: The part of one rank.
    """
    if model.recompute == "full":
        shape = (split.batch, split.rows(block.sequence), model.hidden)
        return [SavedTensor("input", shape, model.norm_type, "recomputation of the layer")]
    tensors = [*norm_tensors(model, "attention_norm", block.sequence, split)]
    is_causal = model.family != "bert" and block.name != "encoder"
    tensors += _attention(model, "attention", block.sequence, block.sequence, split, is_causal=is_causal)
    if block.memory_sequence:
        tensors += norm_tensors(model, "cross_attention_norm", block.sequence, split)
        tensors += _attention(model, "cross_attention", block.sequence, block.memory_sequence, split, is_causal=False)
    tensors += norm_tensors(model, "feedforward_norm", block.sequence, split)
    return [*tensors, *_feedforward(model, block.sequence, split)]


def norm_tensors(model: ModelSpec, name: str, sequence: int, split: Split) -> Iterator[SavedTensor]:
    """List what a norm saves.

    Args:
        model: Its widths and types.
        name: Of the norm.
        sequence: Tokens.
        split: The part of one rank.
    """
    rows = (split.batch, split.rows(sequence))
    yield SavedTensor(f"{name}.input", (*rows, model.hidden), model.norm_type, "norm")
    yield SavedTensor(
        f"{name}.statistics",
        (*rows, 1),
        model.statistics_precision,
        "norm",
        count=model.norm_statistics,
        is_row_statistic=True,
    )


def _attention(
    model: ModelSpec, name: str, queries: int, keys: int, split: Split, *, is_causal: bool
) -> Iterator[SavedTensor]:
    """List one attention: ``queries`` tokens look at ``keys`` tokens."""
    dtype, width, batch = model.precision, model.width_of_a_head, split.batch
    heads = split.share(model.heads)
    of_queries = (batch, queries, heads * width)
    of_keys = (batch, keys, split.share(model.num_kv_heads) * width)
    # With fewer heads of keys than ranks, each rank has a whole one: `share` rounds up.
    residual = (batch, split.rows(queries), model.hidden)
    fused = f"{name}.query_key_value" if name == "attention" else f"{name}.key_value"
    yield SavedTensor(f"{name}.input", residual, dtype, "first linear layer")
    yield SavedTensor(f"{name}.query", of_queries, dtype, "scores", storage=fused if name == "attention" else "")
    yield SavedTensor(f"{name}.key", of_keys, dtype, "scores", storage=fused)
    yield SavedTensor(f"{name}.value", of_keys, dtype, "weighted sum", storage=fused)
    if model.recompute == "none":
        if model.attention_mask and is_causal:
            yield SavedTensor(f"{name}.mask", (queries, keys), "bool", "scores")
        yield from _attention_core(model, name, (batch, heads, queries, keys), of_queries)
    yield SavedTensor(f"{name}.output", of_queries, dtype, "last linear layer, flash kernel")
    if model.drops("attention_output"):
        yield SavedTensor(f"{name}.dropout_mask", residual, "bool", "dropout")


def _attention_core(
    model: ModelSpec, name: str, scores: tuple[int, int, int, int], of_queries: tuple[int, int, int]
) -> Iterator[SavedTensor]:
    """List what selective recomputation does away with."""
    if model.attention == "flash":
        yield SavedTensor(f"{name}.log_sum_exp", scores[:3], "fp32", "flash kernel", is_row_statistic=True)
    else:
        yield SavedTensor(f"{name}.probabilities", scores, model.precision, "softmax, weighted sum")
        if model.drops("attention_scores"):
            yield SavedTensor(f"{name}.scores_dropout_mask", scores, "bool", "dropout")
            yield SavedTensor(f"{name}.dropped_probabilities", scores, model.precision, "weighted sum")
    if model.attention_copies:
        yield SavedTensor(f"{name}.copy", of_queries, model.precision, "attention kernel", count=model.attention_copies)


def _feedforward(model: ModelSpec, sequence: int, split: Split) -> Iterator[SavedTensor]:
    dtype = model.precision
    residual = (split.batch, split.rows(sequence), model.hidden)
    inner = (split.batch, sequence, split.share(model.feedforward))
    yield SavedTensor("feedforward.input", residual, dtype, "first linear layers")
    if model.is_gated:
        yield SavedTensor(
            "feedforward.gate_and_value", inner, dtype, "activation, product", count=2, storage="feedforward.first"
        )
        if not model.fused_activation:
            yield SavedTensor("feedforward.activated_gate", inner, dtype, "product")
    elif model.kind_of_activation != "relu":  # the derivative of relu reads its output, which is listed next
        yield SavedTensor("feedforward.activation_input", inner, dtype, "activation")
    yield SavedTensor("feedforward.activation_output", inner, dtype, "last linear layer")
    if model.drops("feedforward"):
        yield SavedTensor("feedforward.dropout_mask", residual, "bool", "dropout")


def embedding_tensors(model: ModelSpec, sequence: int, split: Split) -> list[SavedTensor]:
    """List what an embedding of tokens and positions saves.

    Args:
        model: Its widths and types.
        sequence: Tokens.
        split: The part of one rank.
    """
    indices = [SavedTensor("tokens", (split.batch, sequence), "int64", "table of tokens", is_row_statistic=True)]
    if model.has_position_indices:
        indices.append(SavedTensor("positions", (sequence,), "int64", "table of positions", is_row_statistic=True))
    if not model.drops("embedding"):
        return indices
    shape = (split.batch, split.rows(sequence), model.hidden)
    return [*indices, SavedTensor("dropout_mask", shape, "bool", "dropout")]


def head_tensors(model: ModelSpec, split: Split) -> list[SavedTensor]:
    """List what the last norm, the logits and the loss save.

    Args:
        model: Its widths and types.
        split: The part of one rank.
    """
    sequence = model.output_sequence
    residual = (split.batch, split.rows(sequence), model.hidden)
    tensors = [*norm_tensors(model, "final_norm", sequence, split)]
    if model.has_head_transform:
        tensors += [
            SavedTensor("transform.input", residual, model.precision, "linear layer"),
            SavedTensor("transform.activation_input", residual, model.precision, "activation"),
            *norm_tensors(model, "transform_norm", sequence, split),
        ]
    logits = (split.batch, sequence, split.share(model.vocab))
    return [
        *tensors,
        SavedTensor("logits.input", residual, model.precision, "logits"),
        SavedTensor("loss.probabilities", logits, model.loss_precision, "cross entropy"),
        SavedTensor("loss.targets", (split.batch, sequence), "int64", "cross entropy", is_row_statistic=True),
        SavedTensor("loss.total_weight", (1,), "fp32", "mean over the targets", is_row_statistic=True),
    ]
