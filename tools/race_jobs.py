"""Runs seeds of the race suite in processes of their own and reads what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from job_processes import ROOT

__all__ = ["RaceResult", "races"]

_WORKER = ROOT / "tests" / "races" / "race_worker.py"
_FOLDERS = ("tests", "tests/races")
_CHECK = re.compile(r"^(?:[\w.]*\.)?(\w*(?:Error|Violation|Deadlock|Exception)): (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class RaceResult:
    """One run.

    Attributes:
        seed: By which it is repeated.
        failure: What went wrong, in full; or None.
        points: How often a thread could lose its turn.
        digest: Of all of them.
    """

    seed: int
    failure: str | None
    points: int
    digest: int

    @property
    def check(self) -> str:
        """What failed, in one line."""
        lines = (self.failure or "").strip().splitlines() or ["the process died"]
        found = _CHECK.search(self.failure or "")
        return lines[0] if found is None else f"{found[1]}: {found[2]}".replace("Violation: ", "")


def races(first: int, count: int, *, step: int = 1) -> Iterator[RaceResult]:
    """Run seeds, one after the other, in one process; a process that dies is a failed run.

    Args:
        first: The first seed.
        count: How many.
        step: From one seed to the next.
    """
    path = os.pathsep.join([str(ROOT), *(str(ROOT / folder) for folder in _FOLDERS)])
    command = [sys.executable, str(_WORKER), str(first), str(count), str(step)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        try:
            num_seen = 0
            for line in process.stdout or ():
                run = json.loads(line)
                num_seen += 1
                yield RaceResult(run["seed"], run["failure"], run["seen"].get("points", 0), run["digest"])
            error = (process.stderr.read() if process.stderr else "").strip()
            if num_seen < count:
                yield RaceResult(first + num_seen * step, f"the process died: {error[-2000:]}", 0, 0)
        finally:
            process.kill()
