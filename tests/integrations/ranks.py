"""All ranks of a job as forks of one process that has imported what they need: that takes seconds, once is enough.

``ranks.py NUM_RANKS DIRECTORY MODULES WORKER [ARGUMENT ...]`` imports the modules (names with commas between), then
runs the worker script, which is in this directory, as every rank: each has a log ``DIRECTORY/rank<N>.log``, and its
interpreter ends as if it had been started alone. Exit codes go to ``DIRECTORY/codes.json``.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

GRACE_SECONDS = 5  # for the others when one rank has failed


def become(rank, log, worker, arguments):
    """Make this fork look like a process that was started as a rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv = [worker, *arguments]
    runpy.run_path(worker, run_name="__main__")


def end_all(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(pids):
    """Collect the exit codes; a rank that dies leaves its peers waiting in gloo, for half an hour."""
    waiting, codes = list(pids), {}
    signal.signal(signal.SIGALRM, lambda *_: end_all(waiting))
    while waiting:
        pid, status = os.wait()
        waiting.remove(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and sum(map(bool, codes.values())) == 1:
            signal.alarm(GRACE_SECONDS)
    return [codes[pid] for pid in pids]


def main(num_ranks, directory, modules, worker, *arguments):
    for module in modules.split(","):
        importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("an import has started a thread, which a fork would lose")
    pids = []
    for rank in range(int(num_ranks)):
        pid = os.fork()
        if pid == 0:
            become(rank, Path(directory) / f"rank{rank}.log", worker, arguments)
            return
        pids.append(pid)
    (Path(directory) / "codes.json").write_text(json.dumps(wait_for(pids)))


if __name__ == "__main__":
    main(*sys.argv[1:])
