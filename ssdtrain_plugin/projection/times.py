"""How long a stage computes for a micro-batch, and a pipeline for a step.

Note [Model of time]. As in section III-D of SSDTrain (arXiv 2408.10013): the sub-layers of a
layer run one after the other, each for the longer of its arithmetic and its memory traffic; the
all-reduces of tensor parallelism come on top; with ZeRO-3 the layer takes at least as long as the
gathering of its weights, which otherwise hides. Arithmetic is counted as by Narayanan et al. (arXiv
2104.04473), appendix: ``2 n m k`` for a product, all of a causal mask's scores, twice as much in
backward. Rings move ``2 (t - 1) / t`` of the bytes of an all-reduce over each link; gathering or
scattering moves half of that (Chan et al. 2007). With sequence parallelism a reduce-scatter and an
all-gather replace each all-reduce, and backward gathers the inputs of the first linear layers
once more (Korthikanti et al., arXiv 2205.05198, section 4.2.2), half as much again. None of this is
assumed to overlap with arithmetic. The bubble is ``(p - 1) / v`` micro-batches of a stage, where
``v`` is the number of interleaved parts (Narayanan et al., section 2.2). Sends between stages are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssdtrain_plugin.projection.cluster import ClusterSpec
from ssdtrain_plugin.projection.memory import layer_parameters, optimizer_bytes_per_parameter, stage_parameters
from ssdtrain_plugin.projection.model import ELEMENT_BYTES, Block, ModelSpec
from ssdtrain_plugin.projection.stages import Stage

__all__ = ["LayerTime", "StageTime", "StepTime", "layer_time", "stage_time", "step_time", "update_seconds"]

_BACKWARD_ARITHMETIC = 2.0
_NORMS, _CROSS_NORMS = 2, 3


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer and micro-batch on one rank (seconds).

    Attributes:
        attention_seconds: Linear layers, scores and weighted sum.
        core_seconds: Of these, scores and weighted sum: what selective recomputation repeats.
        feedforward_seconds: Linear layers and activation.
        residual_seconds: Norms, dropout and residual additions.
        communication_seconds: Of tensor parallelism, in forward.
        gather_seconds: Of the weights, under ZeRO-3.
    """

    attention_seconds: float
    core_seconds: float
    feedforward_seconds: float
    residual_seconds: float
    communication_seconds: float
    gather_seconds: float

    @property
    def compute_seconds(self) -> float:
        """Without any communication."""
        return self.attention_seconds + self.feedforward_seconds + self.residual_seconds

    @property
    def forward_seconds(self) -> float:
        """The longer of the layer and of the gathering for it."""
        return max(self.compute_seconds + self.communication_seconds, self.gather_seconds)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One micro-batch on one stage (seconds).

    Attributes:
        forward_seconds: Of the forward.
        backward_seconds: Of the backward, with what is recomputed.
        recompute_seconds: Of this, what is recomputed.
    """

    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of the slowest stage (seconds).

    Attributes:
        compute_seconds: All of its micro-batches.
        bubble_seconds: Waiting for other stages.
        accumulation_seconds: Adding each micro-batch's gradients to those of the others.
        update_seconds: The optimizer.
        exchange_seconds: Exchange of gradients and weights among replicas that backward does not hide.
    """

    compute_seconds: float
    bubble_seconds: float
    accumulation_seconds: float
    update_seconds: float
    exchange_seconds: float

    @property
    def seconds(self) -> float:
        """The step."""
        return self.compute_seconds + self.bubble_seconds + self.weight_seconds

    @property
    def weight_seconds(self) -> float:
        """What is done for weights and not for sequences: accumulation, update, exposed exchange."""
        return self.accumulation_seconds + self.update_seconds + self.exchange_seconds

    @property
    def bubble_share(self) -> float:
        """Bubble over step (0 to 1)."""
        return self.bubble_seconds / self.seconds

    @property
    def update_share(self) -> float:
        """What is done for weights, over step (0 to 1)."""
        return self.weight_seconds / self.seconds


def layer_time(model: ModelSpec, cluster: ClusterSpec, block: Block, micro_batch: int) -> LayerTime:
    """Estimate one layer's forward.

    Args:
        model: Its widths and type.
        cluster: Rates and mapping.
        block: Which kind of layer.
        micro_batch: Sequences.
    """
    tp, element = cluster.parallel.tp, ELEMENT_BYTES[model.precision]
    tokens = micro_batch * block.sequence
    linear, core = _attention(model, cluster, micro_batch, block.sequence, block.sequence)
    num_norms, num_sublayers = _NORMS, 2
    if block.memory_sequence:
        cross = _attention(model, cluster, micro_batch, block.sequence, block.memory_sequence)
        linear, core = linear + cross[0], core + cross[1]
        num_norms, num_sublayers = _CROSS_NORMS, 3
    rows = tokens / tp if cluster.parallel.sp else tokens
    norm_bytes = rows * model.hidden * (ELEMENT_BYTES[model.norm_type] + element)
    # A residual addition reads both, writes the sum, and a mask if there is one.
    add_bytes = rows * model.hidden * (3 * element + (1 if model.drops("feedforward") else 0))
    all_reduce = 2 * (tp - 1) / tp * tokens * model.hidden * element / cluster.gpu.link_bytes_per_second
    weight_bytes = layer_parameters(model, block) / tp * model.weight_bytes
    return LayerTime(
        attention_seconds=linear + core,
        core_seconds=core,
        feedforward_seconds=_feedforward(model, cluster, tokens),
        residual_seconds=(num_norms * norm_bytes + num_sublayers * add_bytes) / cluster.memory_rate,
        communication_seconds=num_sublayers * all_reduce,
        gather_seconds=_ring(cluster, weight_bytes) if cluster.parallel.zero == 3 else 0.0,
    )


def _product(cluster: ClusterSpec, rows: float, inner: float, columns: float, element: int) -> float:
    """Time ``rows x inner`` by ``inner x columns``: the longer of arithmetic and of reading and writing each once."""
    operations = 2 * rows * inner * columns
    nbytes = element * (rows * inner + inner * columns + rows * columns)
    return max(operations / cluster.flops_per_second, nbytes / cluster.memory_rate)


def _attention(model: ModelSpec, cluster: ClusterSpec, batch: int, queries: int, keys: int) -> tuple[float, float]:
    """Time the linear layers of an attention, and its core."""
    tp, element, hidden = cluster.parallel.tp, ELEMENT_BYTES[model.precision], model.hidden
    width = model.heads * model.width_of_a_head / tp
    kv_width = max(model.num_kv_heads / tp, 1) * model.width_of_a_head
    linear = _product(cluster, batch * queries, hidden, width, element)
    linear += _product(cluster, batch * keys, hidden, 2 * kv_width, element)
    linear += _product(cluster, batch * queries, width, hidden, element)
    nbytes = element * batch * (2 * queries * width + 2 * keys * kv_width)
    if model.attention == "naive":
        # Scores are written by the product, read and written by the softmax, and read by the sum.
        nbytes += 4 * element * batch * model.heads / tp * queries * keys
    operations = 4 * batch * queries * keys * width
    return linear, max(operations / cluster.flops_per_second, nbytes / cluster.memory_rate)


def _feedforward(model: ModelSpec, cluster: ClusterSpec, tokens: float) -> float:
    tp, element = cluster.parallel.tp, ELEMENT_BYTES[model.precision]
    inner = model.feedforward / tp
    num_first = 2 if model.is_gated else 1
    seconds = _product(cluster, tokens, model.hidden, num_first * inner, element)
    seconds += _product(cluster, tokens, inner, model.hidden, element)
    return seconds + tokens * inner * (num_first + 1) * element / cluster.memory_rate


def _ring(cluster: ClusterSpec, nbytes: float) -> float:
    """Time to gather or to scatter ``nbytes`` among replicas."""
    replicas = cluster.parallel.dp
    return (replicas - 1) / replicas * nbytes / cluster.data_parallel_rate


def stage_time(model: ModelSpec, cluster: ClusterSpec, stage: Stage, micro_batch: int) -> StageTime:
    """Estimate forward and backward of one micro-batch on one stage.

    Args:
        model: Its widths and type.
        cluster: Rates and mapping.
        stage: Its layers.
        micro_batch: Sequences.
    """
    forward = backward = recompute = 0.0
    regather = 1.5 if cluster.parallel.sp else 1.0
    for block in dict.fromkeys(stage.blocks):
        count, time = stage.blocks.count(block), layer_time(model, cluster, block, micro_batch)
        again = {
            "none": 0.0,
            "selective": time.core_seconds,
            "full": time.compute_seconds + time.communication_seconds,
        }[model.recompute]
        communication = regather * time.communication_seconds
        back = _BACKWARD_ARITHMETIC * time.compute_seconds + communication + again
        # ZeRO-3 gathers the weights again and scatters the gradients.
        forward += count * time.forward_seconds
        backward += count * max(back, 2 * time.gather_seconds)
        recompute += count * again
    head = _head_seconds(model, cluster, micro_batch) if stage.is_last else 0.0
    return StageTime(forward + head, backward + _BACKWARD_ARITHMETIC * head, recompute)


def _head_seconds(model: ModelSpec, cluster: ClusterSpec, micro_batch: int) -> float:
    tp, element = cluster.parallel.tp, ELEMENT_BYTES[model.precision]
    tokens = micro_batch * model.output_sequence
    seconds = _product(cluster, tokens, model.hidden, model.vocab / tp, element)
    if model.has_head_transform:
        seconds += _product(cluster, tokens, model.hidden, model.hidden, element)
    # The loss reads the logits and writes probabilities.
    return seconds + tokens * model.vocab / tp * (element + ELEMENT_BYTES[model.loss_precision]) / cluster.memory_rate


def update_seconds(model: ModelSpec, cluster: ClusterSpec, stage: Stage) -> float:
    """Estimate the optimizer's step: it is bound by memory, and reads and writes its state once.

    Args:
        model: Its type.
        cluster: Optimizer, ZeRO and rates.
        stage: Its parameters.
    """
    element = model.weight_bytes
    parameters = stage_parameters(model, stage, cluster.parallel.tp)
    if cluster.parallel.zero:
        parameters /= cluster.parallel.dp
    state = optimizer_bytes_per_parameter(model, cluster)
    # Gradient and parameter are read, the parameter is written, the state is read and written.
    return parameters * (3 * element + 2 * state) / cluster.memory_rate


def step_time(
    model: ModelSpec, cluster: ClusterSpec, stages: tuple[Stage, ...], micro_batch: int, micro_batches: int
) -> StepTime:
    """Estimate a step. The slowest stage sets the pace of all.

    Args:
        model: Its widths and type.
        cluster: Rates and mapping.
        stages: All stages.
        micro_batch: Sequences of a micro-batch.
        micro_batches: Of a step and replica.
    """
    times = [stage_time(model, cluster, stage, micro_batch) for stage in stages]
    slowest = max(times, key=lambda time: time.seconds)
    parameters = max(stage_parameters(model, stage, cluster.parallel.tp) for stage in stages)
    nbytes = parameters * model.weight_bytes
    return StepTime(
        compute_seconds=micro_batches * slowest.seconds,
        bubble_seconds=(cluster.parallel.pp - 1) / cluster.parallel.virtual_stages * slowest.seconds,
        # Both summands are read, the sum is written.
        accumulation_seconds=(micro_batches - 1) * 3 * nbytes / cluster.memory_rate,
        update_seconds=max(update_seconds(model, cluster, stage) for stage in stages),
        exchange_seconds=_exposed_exchange(cluster, nbytes, slowest.backward_seconds, micro_batches),
    )


def _exposed_exchange(cluster: ClusterSpec, nbytes: float, backward_seconds: float, micro_batches: int) -> float:
    """Say what of the exchange among replicas is longer than the backward behind which it hides.

    Gradients are scattered and weights gathered once a step, as one all-reduce or as two rings: the same bytes. With
    ZeRO-2 gradients are scattered in each micro-batch, and with ZeRO-3 the layers' times have both already.
    """
    if cluster.parallel.zero == 3:
        return 0.0
    ring = _ring(cluster, nbytes)
    earlier = (micro_batches - 1) * max(0.0, ring - backward_seconds) if cluster.parallel.zero == 2 else 0.0
    return earlier + max(0.0, 2 * ring - backward_seconds)
