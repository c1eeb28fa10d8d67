"""Which stage of a pipeline has what, and how many bytes of it a micro-batch saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.model import Block, ModelSpec
from ssdtrain_plugin.projection.tensors import (
    SavedTensor,
    Split,
    embedding_tensors,
    head_tensors,
    layer_tensors,
    norm_tensors,
    split_of,
    total_bytes,
)

__all__ = ["Group", "Stage", "stages_of"]


@dataclass(frozen=True, slots=True)
class Group:
    """Equal parts of a stage.

    Attributes:
        name: ``layer``, ``encoder``, ``decoder``, ``embedding``, ``encoder_norm``, ``memory`` or
            ``head``.
        count: How many of them one stage has.
        tensors: What one of them saves.
    """

    name: str
    count: int
    tensors: tuple[SavedTensor, ...]

    @property
    def one_bytes(self) -> int:
        """Bytes that one of them saves."""
        return total_bytes(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that all of them save."""
        return self.count * self.one_bytes


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the pipeline, on one rank.

    Attributes:
        index: From 0.
        blocks: Its layers, in order.
        is_first: It has the embedding.
        is_last: It has the head and the loss.
        groups: What it saves for a micro-batch.
    """

    index: int
    blocks: tuple[Block, ...]
    is_first: bool
    is_last: bool
    groups: tuple[Group, ...]

    @property
    def saved_bytes(self) -> int:
        """What a micro-batch saves."""
        return sum(group.nbytes for group in self.groups)

    @property
    def layer_bytes(self) -> int:
        """What the largest layer saves."""
        names = {block.name for block in self.blocks}
        return max(group.one_bytes for group in self.groups if group.name in names)

    @property
    def head_bytes(self) -> int:
        """What the head saves, 0 without one."""
        return sum(group.nbytes for group in self.groups if group.name == "head")

    def offloaded_bytes(self, min_tensor_bytes: int) -> int:
        """What would be offloaded if everything of some size were.

        Args:
            min_tensor_bytes: Smaller tensors stay in device memory.
        """
        return sum(
            group.count * tensor.nbytes
            for group in self.groups
            for tensor in group.tensors
            if tensor.one_bytes >= min_tensor_bytes
        )


def stages_of(model: ModelSpec, cluster: ClusterSpec, *, micro_batch: int | None = None) -> tuple[Stage, ...]:
    """Cut the model into stages of equally many layers.

    Args:
        model: What is trained.
        cluster: The mapping, which must be possible.
        micro_batch: Sequences, in place of the cluster's.
    """
    parallel = cluster.parallel
    split = split_of(micro_batch or cluster.batch.micro_batch, parallel.tp, sp=parallel.sp)
    blocks = tuple(model.blocks)
    size = len(blocks) // parallel.pp
    return tuple(
        _stage(model, split, index, blocks[index * size : (index + 1) * size], parallel.pp)
        for index in range(parallel.pp)
    )


def _stage(model: ModelSpec, split: Split, index: int, blocks: tuple[Block, ...], num_stages: int) -> Stage:
    is_first, is_last = index == 0, index == num_stages - 1
    begin = index * len(blocks)
    groups = [*_edges(model, split, begin, begin + len(blocks))]
    for block in dict.fromkeys(blocks):
        groups.append(Group(block.name, blocks.count(block), tuple(layer_tensors(model, block, split))))
    if is_last:
        groups.append(Group("head", 1, tuple(head_tensors(model, split))))
    return Stage(index, blocks, is_first, is_last, tuple(groups))


def _edges(model: ModelSpec, split: Split, begin: int, end: int) -> Iterator[Group]:
    """List what is saved between the layers from ``begin`` to ``end``, counted over the whole model."""
    if begin == 0:
        yield Group("embedding", 1, tuple(embedding_tensors(model, model.sequence, split)))
    first_decoder = model.layers - model.num_decoder_layers
    if model.num_decoder_layers == 0 or end <= first_decoder:
        return
    if begin <= first_decoder < end:
        yield Group("embedding", 1, tuple(embedding_tensors(model, model.output_sequence, split)))
        yield Group("encoder_norm", 1, tuple(norm_tensors(model, "encoder_norm", model.sequence, split)))
    # The first linear layers of all cross-attentions read the same tensor: one storage a stage.
    shape = (split.batch, split.rows(model.sequence), model.hidden)
    memory = SavedTensor("encoder_output", shape, model.precision, "keys and values of cross-attention")
    yield Group("memory", 1, (memory,))
