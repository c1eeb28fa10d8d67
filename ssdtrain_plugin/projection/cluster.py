"""What it is trained on: GPUs, drives, how the work is split, and the assumptions. Read from YAML, checked at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.projection.model import Count, ModelSpec
from ssdtrain_plugin.units import LARGEST_BYTES, as_bytes, parse_bytes

__all__ = ["BatchSpec", "ClusterSpec", "DriveSpec", "EnduranceSpec", "GpuSpec", "ParallelSpec"]


_SMALLEST, _LARGEST = 1e-6, 1e24
"""Of any amount. Beyond them is no machine, and products of such numbers leave what a float can hold."""


def _as_amount(value: object) -> object:
    """Read ``"5 GB/s"``, ``"80 GB"`` and whole numbers."""
    if isinstance(value, str):
        return float(parse_bytes(value.strip().removesuffix("/s")))
    if isinstance(value, int) and not isinstance(value, bool):
        return float(min(max(value, -(10**30)), 10**30))  # a longer one is no float, and refused either way
    return value


def _is_possible(value: float) -> float:
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{value:g} (expected {_SMALLEST:g} to {_LARGEST:g})")
    return value


Amount = Annotated[float, BeforeValidator(_as_amount), Field(gt=0), AfterValidator(_is_possible)]
Fraction = Annotated[Amount, Field(le=1)]
Factor = Amount
Size = Annotated[int, BeforeValidator(as_bytes), Field(ge=0, le=LARGEST_BYTES)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class GpuSpec(_Strict):
    """One GPU, by its data sheet. Rates without sparsity."""

    name: str = "own"
    source: str = ""
    peak_flops_per_second: Amount = Field(description="Dense, in the type of the model's matrices.")
    memory_bytes: Amount
    hbm_bytes_per_second: Amount
    link_bytes_per_second: Amount = Field(description="To GPUs of the same node, one direction.")


class DriveSpec(_Strict):
    """One drive, by its data sheet."""

    name: str = "own"
    source: str = ""
    write_bytes_per_second: Amount = Field(description="Sequential.")
    read_bytes_per_second: Amount = Field(description="Sequential.")
    capacity_bytes: Amount
    rated_write_bytes: Amount = Field(description="TBW: what may be written in its life, by its rating.")


class ParallelSpec(_Strict):
    """How ranks share the work. ``tp * pp * dp`` is the number of GPUs."""

    tp: Count = Field(default=1, description="Ranks that share each layer.")
    sp: bool = Field(default=False, description="They also share along the sequence what tp replicates.")
    pp: Count = Field(default=1, description="Stages of the pipeline.")
    virtual_stages: Count = Field(default=1, description="Parts of a stage, for the interleaved schedule.")
    dp: Count = Field(default=1, description="Replicas.")
    zero: Literal[0, 1, 2, 3] = Field(
        default=0, description="What replicas share: 1 optimizer, 2 gradients too, 3 weights."
    )


class BatchSpec(_Strict):
    """What one replica does in a step."""

    micro_batch: Count = Field(default=1, description="Sequences of a micro-batch.")
    micro_batches: Count = Field(default=1, description="Micro-batches of a step and replica.")


class EnduranceSpec(_Strict):
    """Assumptions about the wear of drives: each stands alone, and reports show the life with and without it.

    A rating is for JEDEC's random workload (JESD219), under which a controller writes more to its cells than it
    was given: the write amplification (WAF) ``rating_waf``. Large sequential writes have
    ``workload_waf`` instead. Cells that need not keep data for months endure more cycles: ``retention_credit``.
    """

    rating_waf: Factor = Field(default=2.5, description="WAF that the rating assumes (SSDTrain, III-D).")
    workload_waf: Factor = Field(default=1.0, description="WAF of large sequential writes.")
    retention_credit: Factor = Field(
        default=86.0, description="Cycles gained by keeping data 1 day instead of 3 years (SSDTrain, III-D)."
    )


class ClusterSpec(_Strict):
    """Machine, mapping and assumptions."""

    name: str = "cluster"
    gpu: GpuSpec
    gpus: Count = Field(description="All of them.")
    gpus_per_node: Count = 8
    network_bytes_per_second: Amount = Field(
        default=25e9, description="Between nodes, for each GPU, one direction; by default 200 Gbit/s."
    )
    host_memory_bytes: Amount | None = Field(default=None, description="Of a node, for the host tier.")
    drive: DriveSpec
    drives_per_gpu: Count = 1
    paths: tuple[str, ...] = Field(default=(), description="Directories for the config block.", strict=False)
    min_tensor_bytes: Size = Field(
        default=int(OffloadConfig.model_fields["min_tensor_bytes"].default),
        description="Smaller tensors are not offloaded: the option of the same name.",
    )
    parallel: ParallelSpec = ParallelSpec()
    batch: BatchSpec = BatchSpec()
    endurance: EnduranceSpec = EnduranceSpec()
    optimizer: Literal["adam", "sgd"] = "adam"
    efficiency: Fraction | None = Field(default=None, description="Share of the peak that matrix products reach.")
    achieved_tflops: Amount | None = Field(
        default=None, description="Instead of `efficiency`: 1e12 operations a second that they reach."
    )
    hbm_efficiency: Fraction = Field(default=0.8, description="Share of the memory bandwidth that kernels reach.")
    memory_fraction: Fraction = Field(default=0.9, description="Share of the GPU's memory that training may use.")

    @property
    def flops_per_second(self) -> float:
        """What matrix products are assumed to reach on one GPU."""
        if self.achieved_tflops is not None:
            return self.achieved_tflops * 1e12
        return self.gpu.peak_flops_per_second * (self.efficiency or 1.0)

    @property
    def memory_rate(self) -> float:
        """Bytes a second that kernels are assumed to move."""
        return self.gpu.hbm_bytes_per_second * self.hbm_efficiency

    @property
    def data_parallel_rate(self) -> float:
        """Bytes a second between replicas: the node's links if all are on one node, else the network."""
        is_inside = self.parallel.dp * self.parallel.tp <= self.gpus_per_node and self.parallel.pp == 1
        return self.gpu.link_bytes_per_second if is_inside else self.network_bytes_per_second

    @property
    def memory_budget_bytes(self) -> float:
        """What training may use of a GPU's memory."""
        return self.gpu.memory_bytes * self.memory_fraction

    def problems(self, model: ModelSpec) -> list[str]:
        """List what a mapping of the model cannot be.

        Args:
            model: What is to be trained.
        """
        return [*self._own_problems(), *self._splits(model)]

    def _own_problems(self) -> list[str]:
        problems = []
        split = self.parallel
        ranks = split.tp * split.pp * split.dp
        if ranks != self.gpus:
            problems.append(
                f"gpus: {self.gpus} (expected tp * pp * dp = {split.tp} * {split.pp} * {split.dp} = {ranks})"
            )
        if split.tp > self.gpus_per_node:
            problems.append(f"parallel.tp: {split.tp} (expected at most gpus_per_node, {self.gpus_per_node})")
        if split.sp and split.tp == 1:
            problems.append("parallel.sp: does nothing with `tp: 1` (expected `tp` of at least 2)")
        if split.virtual_stages > 1 and split.pp == 1:
            problems.append("parallel.virtual_stages: does nothing with `pp: 1` (expected `pp` of at least 2)")
        if split.virtual_stages > 1 and split.pp > 1 and self.batch.micro_batches % split.pp:
            problems.append(
                f"batch.micro_batches: {self.batch.micro_batches} (expected a multiple of pp, {split.pp}, for "
                "interleaved stages)"
            )
        if (self.efficiency is None) == (self.achieved_tflops is None):
            given = "neither" if self.efficiency is None else "both"
            problems.append(f"efficiency, achieved_tflops: {given} given (expected exactly one of them)")
        if self.flops_per_second > self.gpu.peak_flops_per_second:
            peak = self.gpu.peak_flops_per_second / 1e12
            problems.append(f"achieved_tflops: {self.achieved_tflops} (expected at most the GPU's peak, {peak:g})")
        return problems

    def _splits(self, model: ModelSpec) -> list[str]:
        tp, pp, parts = self.parallel.tp, self.parallel.pp, self.parallel.pp * self.parallel.virtual_stages
        kv_heads = model.num_kv_heads
        checks = [
            (model.heads % tp, f"parallel.tp: {tp} (expected a divisor of heads, {model.heads})"),
            (model.feedforward % tp, f"parallel.tp: {tp} (expected a divisor of ffn, {model.feedforward})"),
            (
                kv_heads % tp and tp % kv_heads,
                f"parallel.tp: {tp} (expected a divisor or a multiple of kv_heads, {kv_heads})",
            ),
            (model.layers % pp, f"parallel.pp: {pp} (expected a divisor of layers, {model.layers})"),
        ]
        if parts != pp and not model.layers % pp:
            checks.append(
                (model.layers % parts, f"parallel.virtual_stages: {parts // pp} (expected {_parts(model, pp)})")
            )
        if self.parallel.sp:
            sequences = {"sequence": model.sequence, "decoder_sequence": model.output_sequence}
            checks += [
                (length % tp, f"parallel.sp: true (expected {name}, {length}, to be a multiple of tp, {tp})")
                for name, length in sequences.items()
                if name == "sequence" or length != model.sequence
            ]
        return [text for is_wrong, text in checks if is_wrong]


def _parts(model: ModelSpec, pp: int) -> str:
    return f"a divisor of the layers of a stage, {model.layers // pp}"
