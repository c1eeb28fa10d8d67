"""Starts a command with its children, and sees to it that all of them have ended, whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Finished", "end_on_sigterm", "launcher", "run_processes"]

ROOT = Path(__file__).resolve().parents[1]
_TOKEN = "SSDTRAIN_TOOL_JOB"
# A gloo process that hangs ignores signals, and an upstream recursion eats all memory: both are bounded.
_ADDRESS_SPACE_KIB = 12 * 1024 * 1024
_GONE_SECONDS = 5.0
_TEST_FOLDERS = ("", "tools", "tests", "tests/faults", "tests/integrations", "tests/numerics")


@dataclass(frozen=True)
class Finished:
    """A job that is over.

    Attributes:
        code: Exit code, or None: it ran into its time limit.
        at: When none of its processes was left, by ``time.monotonic``.
        left: Processes that stayed for seconds after the first one, which have been ended since.
    """

    code: int | None
    at: float
    left: tuple[int, ...]


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: jobs end first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def launcher(logs: Path) -> list[str]:
    """Begin a command that starts a script as two ranks, under DeepSpeed's launcher.

    Args:
        logs: Directory for a log of each rank, ``*_rank<N>.log``.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    return [*command, "--master_port", str(port), "--enable_each_rank_log", str(logs)]


def run_processes(command: Sequence[str], log: Path, *, limit_seconds: float) -> Finished:
    """Run a command; when this returns, or raises, it has ended with all its children.

    Args:
        command: Program and arguments.
        log: Gets stdout and stderr.
        limit_seconds: Wall-clock limit.
    """
    token = uuid.uuid4().hex
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', str(_ADDRESS_SPACE_KIB), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=_environment() | {_TOKEN: token},
            start_new_session=True,
        )
    code: int | None = None
    left: list[int] = []
    try:
        code = process.wait(limit_seconds)
        deadline = time.monotonic() + _GONE_SECONDS
        while (left := _processes_with(token)) and time.monotonic() < deadline:
            time.sleep(0.02)
    except subprocess.TimeoutExpired:
        pass
    finally:
        at = time.monotonic()
        for pid in {process.pid, *_processes_with(token)}:
            _kill(pid)
        process.wait()
    return Finished(code, at, tuple(left))


def _environment() -> dict[str, str]:
    cache = ROOT / ".cache" / "torch_extensions"
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja is next to Python
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in _TEST_FOLDERS),
        "PYTHONUNBUFFERED": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(cache)),
    }


def _processes_with(token: str) -> list[int]:
    """List the processes of a job, also those that have left its session."""
    mark, found = f"{_TOKEN}={token}".encode(), []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
