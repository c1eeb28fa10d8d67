"""Times, memory, drives, sweeps and the config block: what follows from what."""

import math

import pytest

from ssdtrain_plugin import OffloadConfig
from ssdtrain_plugin.projection import cluster_from_dict, model_from_dict, project
from ssdtrain_plugin.projection.endurance import YEAR_SECONDS, drive_life
from ssdtrain_plugin.projection.memory import static_memory
from ssdtrain_plugin.projection.presets import DRIVES, GPUS, MODELS
from ssdtrain_plugin.projection.stages import stages_of
from ssdtrain_plugin.projection.times import layer_time, stage_time

MODEL = {"layers": 8, "hidden": 4096, "heads": 32, "vocab": 32_000, "sequence": 2048}
CLUSTER = {
    "gpu": "h100-sxm-80gb",
    "gpus": 1,
    "batch": {"micro_batch": 4, "micro_batches": 8},
    "efficiency": 0.5,
    "drive": "micron-9550-max-6.4tb",
}


def plan(*, model=None, **fields):
    return project(model_from_dict({**MODEL, **(model or {})}), cluster_from_dict({**CLUSTER, **fields}))


def split(**parallel):
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1)
    return {"gpus": ranks, "parallel": parallel}


# --- times


def test_a_forward_is_at_least_its_products_at_the_given_rate():
    found = plan()
    tokens = 4 * 2048
    products = tokens * (8 * (24 * 4096**2 + 4 * 2048 * 4096) + 2 * 4096 * 32_000)
    least = products / (0.5 * 989.4e12)
    assert least < found.worst.time.forward_seconds < 1.15 * least
    assert found.worst.time.backward_seconds == pytest.approx(2 * found.worst.time.forward_seconds)


def test_a_small_micro_batch_waits_for_memory():
    """One token a product: its weights are read, and that takes longer than the arithmetic."""
    found = plan(model={"sequence": 1}, batch={"micro_batch": 1})
    weights = 8 * 12 * 4096**2 * 2 / (3.35e12 * 0.8)
    assert found.worst.time.forward_seconds > weights
    assert found.model_utilization < 0.05


def test_all_reduces_come_on_top_and_take_their_time():
    model, cluster = model_from_dict(MODEL), cluster_from_dict({**CLUSTER, **split(tp=4)})
    (block,) = set(model.blocks)
    time = layer_time(model, cluster, block, 4)
    nbytes = 4 * 2048 * 4096 * 2
    assert time.communication_seconds == pytest.approx(2 * 2 * 3 / 4 * nbytes / 450e9)
    assert time.forward_seconds == pytest.approx(time.compute_seconds + time.communication_seconds)


@pytest.mark.parametrize(("sp", "times"), [(False, 1.0), (True, 1.5)])
def test_backward_communicates_again_and_gathers_once_more_along_the_sequence(sp, times):
    model, cluster = model_from_dict(MODEL), cluster_from_dict({**CLUSTER, **split(tp=4, sp=sp)})
    (block,) = set(model.blocks)
    layer, (stage,) = layer_time(model, cluster, block, 4), stages_of(model, cluster)
    found = stage_time(model, cluster, stage, 4)
    head = found.forward_seconds - 8 * layer.forward_seconds
    layers = 8 * (2 * layer.compute_seconds + times * layer.communication_seconds)
    assert found.backward_seconds == pytest.approx(layers + 2 * head)


def test_what_is_bound_by_memory_moves_each_byte_once():
    model, cluster = model_from_dict(MODEL), cluster_from_dict(CLUSTER)
    (block,) = set(model.blocks)
    time, tokens, rate = layer_time(model, cluster, block, 4), 4 * 2048, 0.8 * 3.35e12
    # Two norms read and write; two additions read two, write one, and a mask.
    assert time.residual_seconds == pytest.approx((2 * (2 + 2) + 2 * (3 * 2 + 1)) * tokens * 4096 / rate)
    products = 2 * 2 * tokens * 4096 * 4 * 4096 / (0.5 * 989.4e12)
    assert time.feedforward_seconds == pytest.approx(products + 2 * 2 * tokens * 4 * 4096 / rate)


def test_fewer_heads_of_keys_take_less_time():
    cluster = cluster_from_dict(CLUSTER)
    times = []
    for kv_heads in (32, 8):
        model = model_from_dict({**MODEL, "kv_heads": kv_heads})
        (block,) = set(model.blocks)
        times.append(layer_time(model, cluster, block, 4).attention_seconds)
    saved = 2 * 4 * 2048 * 4096 * 2 * (4096 - 1024) / (0.5 * 989.4e12)
    assert times[0] - times[1] == pytest.approx(saved)


def test_the_weights_cost_their_traffic():
    rate = 0.8 * 3.35e12
    found = plan()
    assert found.step.accumulation_seconds == pytest.approx(7 * 3 * 2 * found.parameters / rate)
    assert found.step.update_seconds == pytest.approx((3 * 2 + 2 * 12) * found.parameters / rate)
    assert plan(batch={"micro_batch": 4}).step.accumulation_seconds == 0
    for zero, share in ((0, 1), (1, 8), (3, 8)):
        sharded = plan(**split(dp=8, zero=zero)).step.update_seconds
        assert sharded == pytest.approx(found.step.update_seconds / share)


def test_zero_3_takes_at_least_the_gathering_of_the_weights():
    slow = plan(**split(dp=16, zero=3), network_bytes_per_second=1e6)
    one_layer = 12 * 4096**2 * 2 * 15 / 16 / 1e6
    assert slow.worst.time.forward_seconds == pytest.approx(8 * one_layer, rel=0.01)
    assert slow.worst.time.backward_seconds == pytest.approx(16 * one_layer, rel=0.01), "gathers and scatters"
    fast = plan(**split(dp=16, zero=3), network_bytes_per_second=1e15)
    assert fast.worst.time.forward_seconds == pytest.approx(plan().worst.time.forward_seconds)


def test_replicas_on_one_node_use_its_links():
    assert plan(**split(dp=8)).cluster.data_parallel_rate == 450e9
    assert plan(**split(dp=16)).cluster.data_parallel_rate == 25e9


@pytest.mark.parametrize(("zero", "exposed"), [(0, 1), (1, 1), (2, 8), (3, 0)])
def test_what_backward_does_not_hide_of_the_exchange(zero, exposed):
    slow = plan(**split(dp=16, zero=zero), network_bytes_per_second=1e9)
    backward = slow.worst.time.backward_seconds
    ring = 15 / 16 * slow.parameters * 2 / 1e9
    if exposed == 8:  # ZeRO-2: gradients in each micro-batch
        assert slow.step.exchange_seconds == pytest.approx(7 * (ring - backward) + 2 * ring - backward)
    else:
        assert slow.step.exchange_seconds == pytest.approx(exposed * (2 * ring - backward))
    assert plan(**split(dp=16, zero=zero), network_bytes_per_second=1e15).step.exchange_seconds == 0


def test_recomputation_costs_a_forward_and_selective_only_the_core():
    none, selective, full = (plan(model={"recompute": kind}).worst.time for kind in ("none", "selective", "full"))
    assert none.recompute_seconds == 0
    assert 0 < selective.recompute_seconds < 0.1 * full.recompute_seconds
    assert full.backward_seconds == pytest.approx(none.backward_seconds + full.recompute_seconds)
    assert full.recompute_seconds < full.forward_seconds, "the head is not recomputed"


def test_the_slowest_stage_sets_the_pace():
    found = plan(**split(pp=4))
    slowest = max(stage.time.seconds for stage in found.stages)
    assert found.step.compute_seconds == pytest.approx(8 * slowest)
    assert found.step.bubble_seconds == pytest.approx(3 * slowest)
    shares = found.step.bubble_share + found.step.update_share + found.step.compute_seconds / found.step.seconds
    assert shares == pytest.approx(1)


def test_naive_attention_is_bound_by_its_scores():
    naive, flash = (plan(model={"attention": kind, "sequence": 8192}).worst.time for kind in ("naive", "flash"))
    assert naive.forward_seconds > 1.2 * flash.forward_seconds


def test_utilization_is_below_the_assumed_rate():
    assert 0.4 < plan().model_utilization < 0.5


# --- memory


def test_a_stage_holds_a_pipelines_share():
    whole, part = plan().worst, plan(**split(pp=4)).stages[1]
    layers = whole.static.nbytes * (8 * 12 * 4096**2) / (plan().parameters)
    assert part.static.nbytes == pytest.approx(layers / 4, rel=0.01)


def test_sgd_has_no_state():
    assert plan(optimizer="sgd").worst.static.optimizer_bytes == 0
    assert plan().worst.static.optimizer_bytes == 12 * plan().parameters
    assert plan(model={"precision": "fp32"}).worst.static.optimizer_bytes == 8 * plan().parameters


def test_fp8_keeps_weights_in_16_bits():
    fp8 = plan(model={"precision": "fp8"})
    assert fp8.worst.static.nbytes == plan().worst.static.nbytes
    assert fp8.worst.saved_bytes < plan().worst.saved_bytes


def test_offloading_allows_more_than_recomputing_than_keeping():
    found = plan(memory_fraction=0.6)
    assert 0 < found.limits.keep < found.limits.recompute
    assert found.limits.keep < found.limits.offload


@pytest.mark.parametrize("kind", ["keep", "recompute", "offload"])
def test_a_limit_is_the_last_size_that_fits(kind):
    limit = getattr(plan().limits, kind)
    for size, fits in ((limit, True), (limit + 1, False)):
        sizes = {"micro_batch": size}
        points = {point.micro_batch: point for point in plan(batch=sizes).growth}
        assert (kind in points[size].fits) is fits


def test_limits_count_what_their_names_say():
    found = plan(memory_fraction=0.7)
    model, cluster, budget = found.model, found.cluster, found.cluster.memory_budget_bytes
    full = model.model_copy(update={"recompute": "full"})

    def needed(kind, size):
        (stage,) = stages_of(model, cluster, micro_batch=size)
        (inputs,) = stages_of(full, cluster, micro_batch=size)
        small = stage.saved_bytes - stage.offloaded_bytes(1 << 20)
        layer = stage.saved_bytes - stage.head_bytes - sum(g.nbytes for g in stage.groups if g.name == "embedding")
        activations = {
            "keep": stage.saved_bytes,
            "recompute": inputs.saved_bytes + layer / 8,
            "offload": 2 * layer / 8 + stage.head_bytes + small,
        }
        return static_memory(model, cluster, stage).nbytes + activations[kind]

    for kind in ("keep", "recompute", "offload"):
        limit = getattr(found.limits, kind)
        # One micro-batch at a time is in flight: there is one stage.
        assert needed(kind, limit) <= budget < needed(kind, limit + 1), kind


def test_nothing_fits_where_the_weights_do_not():
    limits = plan(model={"layers": 200}).limits
    assert (limits.keep, limits.recompute, limits.offload) == (0, 0, 0)


def test_kept_bytes_are_those_of_all_micro_batches_in_flight():
    found = plan(**split(pp=8))
    assert [stage.in_flight for stage in found.stages] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert found.occupied_bytes == 8 * found.stages[0].offloaded_bytes
    few = plan(**split(pp=8), batch={"micro_batch": 4, "micro_batches": 2})
    assert [stage.in_flight for stage in few.stages] == [2, 2, 2, 2, 2, 2, 2, 1]


def test_host_memory_is_for_all_ranks_of_a_node():
    need = plan(**split(dp=16)).host
    assert need.tier_bytes == 8 * plan().occupied_bytes
    assert need.fits is None
    assert plan(host_memory_bytes=1e15).host.fits is True
    assert plan(host_memory_bytes=1e9).host.fits is False


# --- drives


def test_enough_drives_are_the_least_that_are():
    found = plan()
    rate = found.need.write_bytes_per_second / found.cluster.drive.write_bytes_per_second
    assert found.need.drives == math.ceil(rate)
    assert found.need.limited_by == "write"
    assert found.hidden_share == pytest.approx(1 / rate)
    assert plan(drives_per_gpu=found.need.drives).hidden_share == 1


@pytest.mark.parametrize(("field", "name"), [("read_bytes_per_second", "read"), ("capacity_bytes", "capacity")])
def test_reading_or_room_may_decide(field, name):
    own = {"preset": "micron-9550-max-6.4tb", field: 1e8}
    assert plan(drive=own).need.limited_by == name
    assert plan(drive=own).need.drives > plan().need.drives


def test_a_life_is_rating_over_rate_and_each_credit_is_a_factor():
    cluster = cluster_from_dict(
        {**CLUSTER, "drives_per_gpu": 3, "endurance": {"rating_waf": 3, "workload_waf": 1.5, "retention_credit": 10}}
    )
    life = drive_life(cluster, 2e9, 2.0)
    assert life.rated_years == pytest.approx(3 * 35_040e12 / 1e9 / YEAR_SECONDS)
    assert life.sequential_years == pytest.approx(2 * life.rated_years)
    assert life.retention_years == pytest.approx(20 * life.rated_years)
    assert math.isinf(drive_life(cluster, 0, 1.0).rated_years)


def test_bubbles_and_updates_rest_the_drives():
    for stage in plan(**split(pp=4)).stages:
        assert stage.life.rated_years > stage.busy_life.rated_years


# --- sweeps


def test_fewer_and_larger_micro_batches_have_larger_bubbles():
    points = plan(**split(pp=4)).sweep
    assert [(point.micro_batch, point.micro_batches) for point in points] == [(1 << i, 32 >> i) for i in range(6)]
    assert [point.bubble_share for point in points] == sorted(point.bubble_share for point in points)
    assert points[0].speedup == 1


def test_the_given_micro_batch_is_in_both_sweeps():
    found = plan(batch={"micro_batch": 3, "micro_batches": 5})
    assert [point.micro_batch for point in found.sweep] == [1, 3]
    assert 3 in [point.micro_batch for point in found.growth]
    assert all(point.micro_batches == 5 for point in found.growth)


def test_interleaved_stages_take_only_what_they_can_schedule():
    points = plan(**split(pp=4, virtual_stages=2)).sweep
    assert [point.micro_batches for point in points] == [32, 16, 8, 4]


# --- the config block


@pytest.mark.parametrize(
    "fields",
    [{}, {"drives_per_gpu": 4}, {"paths": ["/a", "/b"]}, split(tp=8, sp=True), split(pp=8), {"gpu": "b200-sxm-180gb"}],
    ids=str,
)
def test_the_block_is_accepted_and_names_its_paths(fields):
    found = plan(**fields)
    config = OffloadConfig.from_dict(found.config)
    assert config.policy == "adaptive"
    assert len(config.paths) == len(fields.get("paths", ())) or len(config.paths) == found.cluster.drives_per_gpu
    assert config.disk_bytes >= found.occupied_bytes
    assert min(config.max_inflight_bytes, config.prefetch_bytes) >= max(s.stage.layer_bytes for s in found.stages)


def test_nothing_to_offload_caps_nothing():
    tiny = plan(model={"layers": 1, "hidden": 64, "heads": 2, "vocab": 16, "sequence": 8})
    assert tiny.worst.offloaded_bytes == 0
    assert "disk_bytes" not in OffloadConfig.from_dict(tiny.config).model_fields_set
    assert math.isinf(tiny.worst.life.rated_years)


# --- presets


@pytest.mark.parametrize("name", [*GPUS, *DRIVES, *MODELS])
def test_every_preset_works_and_has_a_source(name):
    model = {"preset": name} if name in MODELS else MODEL
    fields = {"gpu": name} if name in GPUS else {"drive": name} if name in DRIVES else {}
    found = project(model_from_dict(model), cluster_from_dict({**CLUSTER, **fields}))
    assert found.worst.need.write_bytes_per_second > 0
    source = {**GPUS, **DRIVES, **MODELS}[name]["source"]
    assert source


def test_a_preset_can_be_changed():
    own = cluster_from_dict(
        {**CLUSTER, "drive": {"preset": "micron-9550-max-6.4tb", "write_bytes_per_second": "6 GB/s"}}
    )
    assert (own.drive.write_bytes_per_second, own.drive.read_bytes_per_second) == (6e9, 14e9)
    assert own.drive.name == "micron-9550-max-6.4tb"
    assert model_from_dict({"preset": "gpt2-xl", "layers": 2}).layers == 2


def test_static_memory_is_divided_by_what_zero_divides():
    model = model_from_dict(MODEL)
    sizes = []
    for zero in (0, 1, 2, 3):
        cluster = cluster_from_dict({**CLUSTER, **split(dp=8, zero=zero)})
        memory = static_memory(model, cluster, stages_of(model, cluster)[0])
        sizes.append((memory.optimizer_bytes, memory.gradient_bytes, memory.weight_bytes))
    plain = sizes[0]
    assert sizes[1] == (plain[0] / 8, plain[1], plain[2])
    assert sizes[2] == (plain[0] / 8, plain[1] / 8, plain[2])
    assert sizes[3][2] < plain[2] / 2
