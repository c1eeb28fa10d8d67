"""`ssdtrain bench scale`: costs over live records and over ranks. Tiny sizes; no timing is asserted."""

import gc
import json
import resource
import subprocess
import sys

import pytest
from rich.console import Console

from ssdtrain_plugin.bench.hooks import open_variants
from ssdtrain_plugin.bench.scale import (
    RankCost,
    RecordCost,
    ScaleBench,
    ScaleSettings,
    _no_collections,
    plot,
    remarks,
    tables_of,
)

ADDRESS_SPACE_BYTES = 12 * 1024**3
TINY = [
    "--records",
    "10",
    "--records",
    "30",
    "--ranks",
    "2",
    "--rounds",
    "1",
    "--tensors",
    "4",
    "--tensor-size",
    "64KiB",
]


def run_command(path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "ssdtrain_plugin", "bench", "scale", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES)),
    )


def test_records_and_ranks_are_measured_and_nothing_is_left(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "drive").mkdir()
    done = run_command(tmp_path / "drive", *TINY, "--json", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {cost["records"] for cost in report["records"]} == {10, 30}
    assert len(report["records"]) == 2 * 5
    assert all((cost["uncollected_microseconds"] is None) == (cost["records"] == 10) for cost in report["records"])
    assert [cost["ranks"] for cost in report["ranks"]] == [1, 2]
    assert all(cost["bytes_per_second"] > 0 for cost in report["ranks"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scale.json", "scale.png"]
    assert list((tmp_path / "drive").iterdir()) == []


def test_a_rank_that_cannot_start_says_why(tmp_path):
    done = run_command(tmp_path / "missing", *TINY)
    assert done.returncode == 1
    assert "no such directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ranks", "counts"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (8, (1, 2, 4, 8))]
)
def test_ranks_are_doubled_up_to_the_highest(ranks, counts):
    assert ScaleSettings(path=".", ranks=ranks).rank_counts == counts


@pytest.mark.slow
def test_a_long_chain_ends_without_overflowing_the_stack():
    """Nodes that Python has seen are freed by recursion: see the end of a chain's run."""
    with open_variants() as variants:
        assert variants["kept: by the policy"].run(100_000) > 0


def report_of(costs, uncollected=None):
    sizes = (100, 1000)
    records = [
        RecordCost(name, size, cost, 0.0, uncollected if size == sizes[-1] else None)
        for name, both in costs.items()
        for size, cost in zip(sizes, both, strict=True)
    ]
    ranks = (RankCost(1, 100.0, 120.0, 30.0, 1.0, 1e9), RankCost(2, 200.0, 260.0, 33.0, 2.0, 1.5e9))
    return ScaleBench(ScaleSettings(path=".", records=sizes, ranks=2), 2, tuple(records), ranks)


COSTS = {
    "no hooks": (5.0, 5.0),
    "identity hooks": (6.0, 6.5),
    "kept: smaller than min_tensor_bytes": (20.0, 24.0),
    "kept: by the policy": (20.0, 40.0),
    "offloaded: to a tier that moves nothing": (80.0, 80.0),
}


def test_what_is_flat_is_called_flat_and_the_rest_is_explained():
    flat = [line for line in remarks(report_of(COSTS, uncollected=22.0)) if line.endswith(": flat")]
    assert len(flat) == 4
    (other,) = (line for line in remarks(report_of(COSTS, uncollected=22.0)) if line.startswith("kept: by the policy"))
    assert "2.00 x" in other
    assert "take 18.0 us" in other
    assert "30 to 33 us" in remarks(report_of(COSTS))[-1]


def test_the_tables_and_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report = report_of(COSTS)
    console = Console(width=200)
    with console.capture() as capture:
        for table in tables_of(report):
            console.print(table)
    assert "1,000 live" in capture.get()
    assert "1.50 GB/s" in capture.get()
    plot(report, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_collector_is_off_only_while_it_must_be():
    with _no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
