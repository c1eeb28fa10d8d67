"""The plan of a stack against what the plugin's hooks see when it trains: tensor by tensor, and byte by byte."""

from collections import Counter
from math import prod

import pytest
from stacks import MACHINE, TYPES, model_of, see

from ssdtrain_plugin.bench.models import FAMILIES, DecoderShape
from ssdtrain_plugin.projection import cluster_from_dict, stages_of

SIZES = [
    {"layers": 2, "hidden": 32, "heads": 2, "sequence": 16, "microbatch": 2},
    {"layers": 5, "hidden": 48, "heads": 4, "sequence": 33, "microbatch": 1},
    {"layers": 4, "hidden": 128, "heads": 4, "sequence": 64, "microbatch": 3},
]


def stage_of(shape, **changes):
    model = model_of(shape).model_copy(update=changes)
    (stage,) = stages_of(model, cluster_from_dict(MACHINE), micro_batch=shape.microbatch)
    return stage


def planned_tensors(stage):
    """How many of which type and number of elements."""
    expected = Counter()
    for group in stage.groups:
        for tensor in group.tensors:
            expected[TYPES[tensor.dtype], prod(tensor.shape)] += group.count * tensor.count
    return expected


def planned_storages(stage, *, is_fused):
    """How many of which size, if what may lie in one allocation does."""
    expected = Counter()
    for group in stage.groups:
        sizes, together = [], Counter()
        for tensor in group.tensors:
            if is_fused and tensor.storage:
                together[tensor.storage] += tensor.nbytes
            else:
                sizes += [tensor.one_bytes] * tensor.count
        for size in (*sizes, *together.values()):
            expected[size] += group.count
    return expected


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"h{size['hidden']}")
@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hooks_see_what_is_planned_and_nothing_else(family, dtype, attention, size):
    shape = DecoderShape(family=family, dtype=dtype, attention=attention, **size)
    stage, seen = stage_of(shape), see(shape)
    tensors = Counter((dtype, prod(sizes)) for dtype, sizes in seen.tensors)
    assert tensors == planned_tensors(stage)
    # The stacks cut q, k and v from one product. Naive attention copies them into batches of heads, unless
    # there is one sequence only, and then each is a storage of its own.
    is_fused = attention == "flash" or shape.microbatch == 1
    assert Counter(seen.storages) == planned_storages(stage, is_fused=is_fused)
    assert seen.stats.saved_bytes == seen.stats.kept_bytes == sum(seen.storages) == stage.saved_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_offloaded_is_what_is_planned_above_the_smallest_size(family, tmp_path):
    shape = DecoderShape(family=family, **SIZES[2])
    stage = stage_of(shape)
    least = 4 * shape.microbatch * shape.heads * shape.sequence + 1  # above all statistics
    seen = see(shape, policy="all", paths=[str(tmp_path)], min_tensor_bytes=least)
    assert seen.stats.saved_bytes == stage.saved_bytes > stage.offloaded_bytes(least)
    assert seen.stats.kept_bytes == stage.saved_bytes - stage.offloaded_bytes(least)


@pytest.mark.parametrize(
    ("family", "changes", "tensors"),
    [
        ("gpt", {"attention_mask": False}, 4),
        ("t5", {"attention_mask": False}, 2),
        ("t5", {"position_indices": None}, 2),
        ("bert", {"head_transform": True}, 5),
    ],
)
def test_a_field_that_does_not_fit_the_stack_shows(family, changes, tensors):
    shape = DecoderShape(family=family, attention="naive", **SIZES[2])
    seen = Counter((dtype, prod(sizes)) for dtype, sizes in see(shape).tensors)
    planned = planned_tensors(stage_of(shape, **changes))
    assert sum(((seen - planned) + (planned - seen)).values()) == tensors
