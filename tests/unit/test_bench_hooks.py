"""`ssdtrain bench hooks` measures every variant and says what it measured. No timing is asserted."""

import json

import torch
from typer.testing import CliRunner

from ssdtrain_plugin.bench.hooks import _cache, _run, measure
from ssdtrain_plugin.cli import app
from ssdtrain_plugin.hooks import SavedTensorHooks


def test_every_variant_is_measured_and_compared_with_identity_hooks():
    seen = []
    costs = {cost.name: cost for cost in measure(num_tensors=10, rounds=3, on_round=lambda: seen.append(None))}
    assert len(seen) == 4  # one round to warm up
    assert list(costs)[:2] == ["no hooks", "identity hooks"]
    assert costs["identity hooks"].over_identity_microseconds == 0.0
    for cost in costs.values():
        assert cost.rounds == 3
        assert cost.median_microseconds > 0.0


def test_each_variant_does_what_its_name_says():
    with _cache(0.0, min_tensor_bytes=1) as kept, _cache(1.0, min_tensor_bytes=1) as moved:
        for cache in (kept, moved):
            _run(SavedTensorHooks(cache, checkpointing="offload").forward, 10)
            cache._queue.wait_idle()
        kept_stats, moved_stats = kept.end_step(), moved.end_step()
    tensor_bytes = torch.ones(16).nbytes
    assert (kept_stats.kept_bytes, kept_stats.stored_bytes) == (10 * tensor_bytes, 0)
    assert moved_stats.kept_bytes == 0
    # The chain keeps every tensor alive, so nothing needs to be read.
    assert (moved_stats.forwarded_bytes, moved_stats.loaded_bytes) == (10 * tensor_bytes, 0)


def test_the_command_prints_a_table_or_json():
    table = CliRunner().invoke(app, ["bench", "hooks", "--tensors", "5", "--rounds", "1"])
    assert table.exit_code == 0, table.output
    assert "over identity hooks" in table.output
    as_json = CliRunner().invoke(app, ["bench", "hooks", "--tensors", "5", "--rounds", "1", "--json"])
    assert "identity hooks" in {row["name"] for row in json.loads(as_json.stdout)}
