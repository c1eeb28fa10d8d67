"""The comparison of policies over drives of different speeds, on a model that takes no time."""

import json
from dataclasses import asdict

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ssdtrain_plugin.bench.adapt import AdaptSettings, measure, plot, table_of
from ssdtrain_plugin.bench.models import DecoderShape
from ssdtrain_plugin.cli import app

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

SHAPE = DecoderShape(layers=2, hidden=128, heads=2, sequence=256, microbatch=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive")
    told = []
    settings = AdaptSettings(path=str(path), shape=SHAPE, factors=(1.0, 4.0), rounds=2, warm_up_rounds=2)
    report = measure(settings, on_step=told.append)
    return report, told, path


def test_every_policy_meets_every_speed_and_the_bits_stay_equal(run):
    report, told, path = run
    cells = [(cell.policy, cell.factor) for cell in report.cells]
    assert cells == [
        ("none", None),
        ("recompute", None),
        *((policy, factor) for factor in (1.0, 4.0) for policy in ("all", "fraction", "adaptive")),
    ]
    assert len(told) == report.settings.num_steps
    assert all(cell.summary.is_equal for cell in report.cells)
    assert list(path.iterdir()) == []


def test_the_speeds_are_multiples_of_what_full_offload_needs(run):
    report, _, _ = run
    assert report.full_bytes_per_second == pytest.approx(report.saved_bytes / report.forward_seconds)
    for cell in report.cells[2:]:
        assert cell.bytes_per_second == pytest.approx(cell.factor * report.full_bytes_per_second)
        assert 0 < cell.bound_ratio <= 1


def test_the_table_and_the_picture(run, tmp_path):
    report, _, _ = run
    console = Console(width=160, record=True)
    console.print(table_of(report))
    text = console.export_text()
    assert "adaptive" in text
    assert "recompute" in text
    plot(report, tmp_path / "adapt.png")
    assert (tmp_path / "adapt.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(asdict(report)))["cells"][0]["policy"] == "none"


def test_a_speed_of_nothing_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["bench", "adapt", str(tmp_path), "--factor", "0"])
    assert result.exit_code == 2
    assert "expected more than 0" in result.output


def test_a_directory_that_is_missing_is_an_error_without_a_traceback(tmp_path):
    result = CliRunner().invoke(app, ["bench", "adapt", str(tmp_path / "none"), "--factor", "1", "--rounds", "1"])
    assert result.exit_code == 1
    assert "no such directory" in result.output
    assert "Traceback" not in result.output
