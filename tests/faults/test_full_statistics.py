"""A file of statistics that cannot grow any more, in a process of its own: training ends as it should."""

import json
import subprocess
import sys
from pathlib import Path

from ssdtrain_plugin.report.reading import read_run

WORKER = Path(__file__).with_name("full_stats_worker.py")


def test_statistics_that_cannot_grow_do_not_stop_training(tmp_path):
    drive, stats = tmp_path / "drive", tmp_path / "stats"
    drive.mkdir()
    for num_runs in (1, 2):
        command = [sys.executable, "-W", "error", str(WORKER), str(stats), str(drive)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 0, ended.stderr
        assert "trained to the end" in ended.stdout
        said = ended.stdout + ended.stderr
        assert said.count("statistics of rank 0 are no longer written") == 1
        assert "(File too large); hint: make room there" in said
        lines = (stats / "rank0.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 4 * num_runs
        assert [json.loads(line)["step"] for line in lines[-4:-1]] == [0, 1, 2]
        run = read_run(stats)
        assert [step.step for step in run.ranks[0].steps] == [0, 1, 2], "the next run begins on a line of its own"
        assert any("rank0.jsonl, line 4: left out" in problem for problem in run.problems)
