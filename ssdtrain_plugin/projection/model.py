"""What is trained: the shape of a transformer and what of it autograd saves. Read from YAML, checked at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["DROPOUT_PLACES", "ELEMENT_BYTES", "MOST_LAYERS", "Block", "Count", "ModelSpec", "Precision"]

Count = Annotated[int, Field(gt=0, le=1_000_000_000)]
Precision = Literal["fp8", "fp16", "bf16", "fp32"]
DropoutPlace = Literal["embedding", "attention_scores", "attention_output", "feedforward"]

ELEMENT_BYTES = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "bool": 1, "int64": 8}
"""Bytes of one element, by the name of its type."""

DROPOUT_PLACES: tuple[DropoutPlace, ...] = ("embedding", "attention_scores", "attention_output", "feedforward")
"""Where a transformer drops elements out, and saves a mask of one byte each."""

MOST_LAYERS = 1024
"""Beyond it a typing error is more likely than a model, and a plan takes minutes."""

_GATED = ("swiglu", "geglu")


def _as_places(value: object) -> object:
    if isinstance(value, bool):
        return DROPOUT_PLACES if value else ()
    return tuple(value) if isinstance(value, list) else value


class Block(BaseModel):
    """One kind of layer of a model.

    Attributes:
        name: ``layer``, ``encoder`` or ``decoder``.
        sequence: Tokens that go through it.
        memory_sequence: Tokens that its cross-attention reads, 0 without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    sequence: Count
    memory_sequence: Annotated[int, Field(ge=0)] = 0


class ModelSpec(BaseModel):
    """A transformer as a planner sees it. Sizes are of the whole model, before any parallelism.

    Layers are pre-norm. Linear layers save their input, norms their input and one or two numbers
    a row, what is elementwise saves what its derivative reads. Linear biases cost nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(default="model", description="For the report.")
    source: str = Field(default="", description="Where the sizes come from.")
    family: Literal["gpt", "bert", "t5", "llama"] = Field(default="gpt", description="Which kind of layers and head.")
    layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] = Field(
        description="All layers; of t5, encoder and decoder together."
    )
    decoder_layers: Count | None = Field(
        default=None, description="t5: of these, how many decode; half of them, rounded down, by default."
    )
    hidden: Count = Field(description="Width of the residual stream.")
    heads: Count = Field(description="Attention heads.")
    kv_heads: Count | None = Field(default=None, description="Heads of keys and values; `heads` by default.")
    head_dim: Count | None = Field(default=None, description="Width of a head; hidden / heads by default.")
    ffn: Count | None = Field(default=None, description="Width of the feed-forward part; 4 hidden by default.")
    vocab: Count = Field(description="Tokens of the vocabulary.")
    sequence: Count = Field(description="Tokens of a sequence.")
    decoder_sequence: Count | None = Field(default=None, description="t5: tokens of a target; `sequence` by default.")
    activation: Literal["gelu", "relu", "silu", "swiglu", "geglu"] | None = Field(
        default=None, description="Of the feed-forward part: swiglu for llama, gelu for others by default."
    )
    fused_activation: bool = Field(
        default=False, description="A gated activation in one kernel: it saves its inputs and its output only."
    )
    attention: Literal["naive", "flash"] = Field(default="flash", description="naive saves the scores, flash does not.")
    attention_copies: int = Field(
        default=0,
        ge=0,
        description="Further tensors of the size of all queries that attention saves. 1 if the kernel's output is "
        "copied into another layout before the last linear layer.",
    )
    attention_mask: bool = Field(
        default=False,
        description="naive: attention with a causal mask saves it, a byte for each query and key of each layer, as "
        "`masked_fill` does. One that is added, or is part of a kernel, is not saved.",
    )
    dropout: Annotated[tuple[DropoutPlace, ...], BeforeValidator(_as_places)] | None = Field(
        default=None,
        description=f"By default false for llama and true for others, or a list of {', '.join(DROPOUT_PLACES)}.",
    )
    precision: Precision = Field(
        default="bf16",
        description="Of what matrix products read and write. fp8: weights and gradients are held in 16 bits.",
    )
    norm_precision: Precision | None = Field(
        default=None,
        description="Type in which inputs of norms are saved: fp32 under autocast or with an fp32 residual stream; "
        "`precision` by default, bf16 with fp8.",
    )
    statistics_precision: Precision = Field(
        default="fp32", description="In which norms keep the statistics of rows; on a CPU `norm_precision`."
    )
    loss_precision: Precision = Field(default="fp32", description="Of the probabilities that the loss saves.")
    head_transform: bool | None = Field(
        default=None, description="A linear layer, GELU and norm before the logits; true for bert by default."
    )
    position_indices: bool | None = Field(
        default=None, description="Positions are looked up by indices, which are saved; by default for gpt and bert."
    )
    tied_embeddings: bool = Field(default=True, description="Logits use the table of the input embedding.")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="selective recomputes attention's core, full keeps each layer's input only."
    )

    @property
    def num_decoder_layers(self) -> int:
        """How many layers have a cross-attention."""
        if self.family != "t5":
            return 0
        return self.layers // 2 if self.decoder_layers is None else self.decoder_layers

    @property
    def blocks(self) -> Iterator[Block]:
        """The layers in the order of forward."""
        if self.family != "t5":
            for _ in range(self.layers):
                yield Block(name="layer", sequence=self.sequence)
            return
        for _ in range(self.layers - self.num_decoder_layers):
            yield Block(name="encoder", sequence=self.sequence)
        for _ in range(self.num_decoder_layers):
            yield Block(name="decoder", sequence=self.output_sequence, memory_sequence=self.sequence)

    @property
    def output_sequence(self) -> int:
        """Tokens that the head sees."""
        has_target = self.family == "t5" and self.decoder_sequence is not None
        return self.decoder_sequence if has_target and self.decoder_sequence is not None else self.sequence

    @property
    def width_of_a_head(self) -> int:
        """``head_dim``, or its default."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """``kv_heads``, or its default."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def feedforward(self) -> int:
        """``ffn``, or its default."""
        return 4 * self.hidden if self.ffn is None else self.ffn

    @property
    def kind_of_activation(self) -> str:
        """``activation``, or its default."""
        return self.activation or ("swiglu" if self.family == "llama" else "gelu")

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward part has three matrices instead of two."""
        return self.kind_of_activation in _GATED

    @property
    def norm_statistics(self) -> int:
        """Numbers that a norm saves a row: mean and deviation, or the latter alone."""
        return 1 if self.family == "llama" else 2

    @property
    def has_head_transform(self) -> bool:
        """``head_transform``, or its default."""
        return self.family == "bert" if self.head_transform is None else self.head_transform

    @property
    def has_position_indices(self) -> bool:
        """``position_indices``, or its default."""
        return self.family in ("gpt", "bert") if self.position_indices is None else self.position_indices

    @property
    def norm_type(self) -> Precision:
        """``norm_precision``, or its default."""
        return self.norm_precision or ("bf16" if self.precision == "fp8" else self.precision)

    @property
    def weight_bytes(self) -> int:
        """Bytes in which a parameter, and its gradient, are held."""
        return max(2, ELEMENT_BYTES[self.precision])

    def drops(self, place: DropoutPlace) -> bool:
        """Tell whether there is dropout.

        Args:
            place: Where.
        """
        if self.dropout is None:
            return self.family != "llama"
        return place in self.dropout

    def problems(self) -> list[str]:
        """List what single values cannot show."""
        problems = []
        if self.head_dim is None and self.hidden % self.heads:
            problems.append(f"hidden: {self.hidden} (expected a multiple of heads, {self.heads}, or `head_dim`)")
        if self.heads % self.num_kv_heads:
            problems.append(f"kv_heads: {self.num_kv_heads} (expected a divisor of heads, {self.heads})")
        for field in ("decoder_layers", "decoder_sequence"):
            if getattr(self, field) is not None and self.family != "t5":
                problems.append(f"{field}: does nothing with `family: {self.family}` (expected `family: t5`)")
        if self.family == "t5" and not 0 < self.num_decoder_layers < self.layers:
            problems.append(
                f"decoder_layers: {self.num_decoder_layers} (expected at least 1 and fewer than layers, {self.layers})"
            )
        if self.attention_mask and (self.attention != "naive" or self.family == "bert"):
            problems.append(
                f"attention_mask: does nothing with `attention: {self.attention}` and `family: {self.family}` "
                "(expected naive attention with a causal mask)"
            )
        if self.fused_activation and not self.is_gated:
            problems.append(
                f"fused_activation: does nothing with `activation: {self.kind_of_activation}` (expected a gated one)"
            )
        return problems
