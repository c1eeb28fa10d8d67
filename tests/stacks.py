"""Benchmark stacks and their plans: the same sizes for both, and what the plugin's own hooks see of a step."""

from dataclasses import dataclass

import torch

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.bench.models import VOCABULARY, DecoderShape, create_stack
from ssdtrain_plugin.projection import ModelSpec, model_from_dict
from ssdtrain_plugin.stats import StepStats

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64, "bool": torch.bool}
DRIVE = {"write_bytes_per_second": 1e9, "read_bytes_per_second": 1e9, "capacity_bytes": 1e12, "rated_write_bytes": 1e15}
MACHINE = {
    "gpu": {
        "peak_flops_per_second": 1e12,
        "memory_bytes": 1e10,
        "hbm_bytes_per_second": 1e13,
        "link_bytes_per_second": 1e10,
    },
    "gpus": 1,
    "drive": DRIVE,
    "efficiency": 0.05,
}


def fields_of(shape: DecoderShape) -> dict[str, object]:
    """Write a stack as MODEL.yaml has it."""
    return {
        "family": shape.family,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "vocab": VOCABULARY,
        "sequence": shape.sequence,
        "attention": shape.attention,
        "attention_mask": shape.attention == "naive" and shape.family != "bert",
        "dropout": False,
        "precision": PRECISIONS[shape.dtype],
        "statistics_precision": PRECISIONS[shape.dtype],  # what torch does on a CPU
        "position_indices": True,
        "head_transform": False,
    }


def model_of(shape: DecoderShape) -> ModelSpec:
    """Read the same as a plan does."""
    return model_from_dict(fields_of(shape))


@dataclass(frozen=True)
class Seen:
    """What the hooks saw in one step.

    Attributes:
        tensors: Type and shape of each tensor; views of the same bytes once.
        storages: Bytes of each storage.
        stats: Of the step.
    """

    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    storages: tuple[int, ...]
    stats: StepStats


def see(shape: DecoderShape, **options: object) -> Seen:
    """Train one step and watch the cache, to which autograd's hooks go, take what it is given."""
    torch.manual_seed(1)
    stack = create_stack(shape).to(shape.torch_dtype)
    tokens = torch.randint(1, VOCABULARY, (shape.microbatch, shape.row_tokens))
    tensors, storages = {}, {}
    with ssdtrain.attach(stack, {"policy": "none", **options}) as offloader:
        put = offloader.cache.put

        def watch(tensor, **how):
            saved = put(tensor, **how)
            if saved.lease is not None:  # a weight has none
                record = saved.lease.record
                tensors[record.serial, tensor.dtype, tensor.storage_offset(), tensor.numel()] = tensor.shape
                storages[record.serial] = record.span.nbytes
            return saved

        offloader.cache.put = watch
        stack(tokens).backward()
        stats = offloader.end_step()
    found = tuple((dtype, tuple(size)) for (_, dtype, _, _), size in tensors.items())
    return Seen(found, tuple(storages.values()), stats)
