"""What offloading everything would cost a given model on a measured drive. Arithmetic only, no measurement.

Saved bytes and operations are those of :mod:`ssdtrain_plugin.projection`, which cites where they come from. What has
a few numbers a row (statistics of norms, log-sum-exp of attention), embeddings, and the loss are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.doctor.measurement import Bandwidth
from ssdtrain_plugin.documents import checked, read_yaml
from ssdtrain_plugin.projection.arithmetic import layer_flops
from ssdtrain_plugin.projection.model import DROPOUT_PLACES, MOST_LAYERS, Block, Count, ModelSpec, Precision
from ssdtrain_plugin.projection.tensors import layer_tensors, split_of

__all__ = ["ModelShape", "Prediction", "predict"]

_NEGLIGIBLE_OVERHEAD = 0.02
_HARDLY_ANY = 0.1

_Width = Annotated[int, Field(gt=0, le=1_000_000)]  # times the largest multiplier it is still a Count


class ModelShape(BaseModel):
    """A stack of GPT layers and how it is trained. Everything is per rank, where tensor parallelism splits it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] = Field(
        description="Layers of one rank: with a pipeline, of one stage."
    )
    hidden: _Width = Field(description="Hidden size.")
    heads: _Width = Field(description="Attention heads.")
    sequence: Count = Field(description="Tokens of one sequence.")
    micro_batch: Count = Field(description="Sequences of one forward.")
    tflops: float = Field(
        gt=0, ge=1e-6, le=1e6, description="Rate that the rank sustains in training (1e12 operations a second)."
    )
    bytes_per_element: Literal[1, 2, 4] = Field(default=2, description="2 for fp16 and bf16, 4 for fp32.")
    feedforward_multiplier: float = Field(
        default=4.0, gt=0, le=1000, description="Size of the feed-forward part over `hidden`."
    )
    gated_feedforward: bool = Field(default=False, description="SwiGLU and its kind: three matrices instead of two.")
    flash_attention: bool = Field(default=True, description="Scores are not saved.")
    dropout: bool = Field(default=True, description="Masks are saved.")
    tensor_parallel: Count = Field(default=1, description="Ranks that share a layer.")
    sequence_parallel: bool = Field(default=False, description="They also share what tensor parallelism replicates.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelShape:
        """Read the fields from a YAML file.

        Args:
            path: The file.

        Raises:
            ConfigError: The file cannot be read, is not YAML, or has faults; all are listed.
        """
        hint = f"the fields are {', '.join(cls.model_fields)}"
        return checked(cls, read_yaml(path), source=f"`{path}`", hint=hint)

    @model_validator(mode="after")
    def _is_possible(self) -> ModelShape:
        if self.hidden % self.heads:
            raise ValueError(f"hidden: {self.hidden} (expected a multiple of heads, {self.heads})")
        if self.heads % self.tensor_parallel:
            raise ValueError(f"tensor_parallel: {self.tensor_parallel} (expected a divisor of heads, {self.heads})")
        return self

    @property
    def _block(self) -> Block:
        return Block(name="layer", sequence=self.sequence)

    @property
    def _model(self) -> ModelSpec:
        precisions: dict[int, Precision] = {1: "fp8", 2: "bf16", 4: "fp32"}
        precision = precisions[self.bytes_per_element]
        return ModelSpec(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            ffn=max(1, round(self.feedforward_multiplier * self.hidden)),
            vocab=1,  # the head is left out
            sequence=self.sequence,
            activation="swiglu" if self.gated_feedforward else "gelu",
            attention="flash" if self.flash_attention else "naive",
            dropout=DROPOUT_PLACES if self.dropout else (),
            precision=precision,
            norm_precision=precision,
        )

    @property
    def saved_bytes(self) -> int:
        """What autograd saves in one forward, see Note [Where the list comes from] of ``projection/tensors.py``."""
        split = split_of(self.micro_batch, self.tensor_parallel, sp=self.sequence_parallel)
        tensors = layer_tensors(self._model, self._block, split)
        return self.layers * sum(tensor.nbytes for tensor in tensors if not tensor.is_row_statistic)

    @property
    def forward_seconds(self) -> float:
        """Time of one forward: the operations of all matrix products at the given rate."""
        operations = self.layers * self.micro_batch * layer_flops(self._model, self._block)
        return operations / self.tensor_parallel / (self.tflops * 1e12)

    @property
    def backward_seconds(self) -> float:
        """Time of one backward: twice the forward."""
        return 2 * self.forward_seconds


@dataclass(frozen=True, slots=True)
class Prediction:
    """What ``policy: all`` would do to one micro-batch of one rank that has the drives for itself.

    Attributes:
        shape: Fields of :class:`ModelShape`.
        num_directories: How many directories' rates were added up.
        saved_bytes: What is stored and loaded.
        forward_seconds: Compute.
        backward_seconds: Compute.
        store_seconds: To write it all.
        load_seconds: To read it all.
        write_bytes_per_second: Measured.
        read_bytes_per_second: Measured.
        needed_write_bytes_per_second: For all stores to end with forward.
        needed_read_bytes_per_second: For all loads to end with backward.
        hidden_fraction: Share of the bytes (0 to 1) whose way out and back compute hides.
        overhead_fraction: Time added, over the time of forward and backward.
        advice: One line.
    """

    shape: Mapping[str, Any]
    num_directories: int
    saved_bytes: int
    forward_seconds: float
    backward_seconds: float
    store_seconds: float
    load_seconds: float
    write_bytes_per_second: float
    read_bytes_per_second: float
    needed_write_bytes_per_second: float
    needed_read_bytes_per_second: float
    hidden_fraction: float
    overhead_fraction: float
    advice: str


def predict(shape: ModelShape, drives: Sequence[Bandwidth], *, max_inflight_bytes: int | None = None) -> Prediction:
    """Predict the cost of offloading everything.

    Forward waits for stores beyond ``max_inflight_bytes``. What is still in flight when it
    ends is handed back from memory; backward waits for the loads of the rest. Writes of one
    micro-batch are assumed not to meet reads of another.

    Args:
        shape: The model.
        drives: What was measured on each directory of the rank, one after the other; their
            rates are added, as if nothing that they share were in the way.
        max_inflight_bytes: The option; None for its default.
    """
    if max_inflight_bytes is None:
        max_inflight_bytes = int(OffloadConfig.model_fields["max_inflight_bytes"].default)
    write_rate = sum(drive.write_bytes_per_second for drive in drives)
    read_rate = sum(drive.read_bytes_per_second for drive in drives)
    saved_bytes, forward, backward = shape.saved_bytes, shape.forward_seconds, shape.backward_seconds
    stored_bytes = forward * write_rate  # by the end of forward, if it does not wait
    late_bytes = min(max_inflight_bytes, max(0.0, saved_bytes - stored_bytes))
    waiting = max(0.0, (saved_bytes - late_bytes) / write_rate - forward)
    waiting += max(0.0, (saved_bytes - late_bytes) / read_rate - backward)
    out = (stored_bytes + max_inflight_bytes) / saved_bytes
    back = backward * read_rate / saved_bytes
    overhead = waiting / (forward + backward)
    return Prediction(
        shape=shape.model_dump(),
        num_directories=len(drives),
        saved_bytes=saved_bytes,
        forward_seconds=forward,
        backward_seconds=backward,
        store_seconds=saved_bytes / write_rate,
        load_seconds=saved_bytes / read_rate,
        write_bytes_per_second=write_rate,
        read_bytes_per_second=read_rate,
        needed_write_bytes_per_second=saved_bytes / forward,
        needed_read_bytes_per_second=saved_bytes / backward,
        hidden_fraction=min(1.0, out, back + late_bytes / saved_bytes),
        overhead_fraction=overhead,
        # A smaller share leaves less in flight at the turn, so nothing handed back counts here.
        advice=_advice(min(1.0, out, back), overhead),
    )


def _advice(share: float, overhead: float) -> str:
    if overhead <= _NEGLIGIBLE_OVERHEAD:
        return "`policy: all` fits: the transfers hide behind compute"
    if share <= _HARDLY_ANY:
        return "these drives hide hardly anything of this model: use many more, or keep and recompute"
    fraction = f"`policy: fraction` with `offload_fraction: {math.floor(share * 100) / 100:.2f}`"
    return f"the drives are too slow for `policy: all`: use {fraction}, or {math.ceil(1 / share)} times the drives"
