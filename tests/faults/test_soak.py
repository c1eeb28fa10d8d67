"""The first steps of the soak, and its arithmetic; ``make soak`` runs 2,000 steps."""

import numpy as np
import pytest
from soak import Rank, are_equal, plot, run_job, slope_of, what_grows

MIB = 1 << 20
_FLAT = ("rss_bytes", "open_files", "threads", "extent_bytes", "used_bytes", "num_faults")


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_sixty_steps_under_faults_at_random_are_equal_to_the_last_bit(tmp_path):
    pytest.importorskip("deepspeed")
    clean = run_job(tmp_path / "clean", steps=60, is_faulty=False)
    faulty = run_job(tmp_path / "faulty", steps=60, is_faulty=True, seed=7, probability=0.001)
    assert are_equal(clean, faulty)
    assert len({step["loss"] for step in clean[0].steps}) > 50, "something was trained"
    for rank, plain in zip(faulty, clean, strict=True):
        assert sum(rank.end["faults"].values()) > 20
        assert len(rank.end["faults"]) > 8
        # The extent file and the statistics; four threads in each direction, when there is work for them.
        assert set(rank.series("open_files") - plain.series("open_files")) == {2}
        assert max(rank.series("threads")) <= max(plain.series("threads")) + 8
        assert set(rank.series("extent_bytes")) == {256 * MIB}
        assert not rank.series("live_bytes").any()
        if "hang, write" not in rank.end["faults"]:
            assert not rank.series("used_bytes").any()


def rank_of(**changes):
    steps = [{name: 1000.0 for name in _FLAT} | {"loss": "0x1p+0"} for _ in range(100)]
    for name, values in changes.items():
        for step, value in zip(steps, values, strict=True):
            step[name] = value
    return Rank(steps, {"gradients": "a", "parameters": "b"})


def test_a_slope_is_that_of_the_steps_after_warm_up():
    values = np.concatenate([np.full(10, 1e6), 5.0 + 0.25 * np.arange(90)])
    slope = slope_of(values)
    assert slope.per_thousand == pytest.approx(250.0)
    assert slope.growth == pytest.approx(22.5)
    assert slope.spread == pytest.approx(0.25 * 89)
    assert slope_of(np.full(100, 7.0)).error == 0.0


@pytest.mark.parametrize("name", ["rss_bytes", "open_files", "threads", "extent_bytes"])
def test_what_grows_is_named(name):
    assert what_grows(rank_of()) == []
    assert what_grows(rank_of(**{name: np.linspace(1000, 1100, 100)})) == [name]


def test_one_other_bit_is_seen():
    one, other = rank_of(), rank_of()
    assert are_equal([one], [other])
    other.steps[-1]["loss"] = "0x1.0000000000001p+0"
    assert not are_equal([one], [other])
    assert not are_equal([one], [Rank(one.steps, one.end | {"gradients": "c"})])


def test_the_plot_is_written(tmp_path):
    plot([rank_of()], [rank_of()], tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000
