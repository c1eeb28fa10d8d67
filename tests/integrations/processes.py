"""Start the processes of a training job, and end all of them whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_ADDRESS_SPACE_KIB = 12 * 1024 * 1024
_GRACE_SECONDS = 5  # for the others when one rank has failed


def environment(**more):
    """Variables of the children; DeepSpeed compiles one operator and keeps it in the checkout."""
    cache = REPOSITORY / ".cache" / "torch_extensions"
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]  # ninja is next to the interpreter
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(cache)),
        **more,
    }


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(command, output, **variables):
    # A gloo process that hangs ignores signals, and an upstream recursion eats all memory: both are bounded.
    return subprocess.Popen(
        ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', str(_ADDRESS_SPACE_KIB), *map(str, command)],
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=REPOSITORY,
        env=environment(**variables),
        start_new_session=True,
    )


def _end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(command, log, *, timeout_seconds=120, **variables):
    """Run one command with all its children; return exit code and output (stdout and stderr)."""
    with Path(log).open("wb") as output:
        process = _start(command, output, **variables)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    text = Path(log).read_text(errors="replace")
    assert code is not None, f"still running after {timeout_seconds} s; its output:\n{text[-8000:]}"
    return code, text


def run_ranks(command, directory, *, num_ranks=2, timeout_seconds=240):
    """Run a command as every rank of a job, without a launcher; return the output of each rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    common |= {"LOCAL_SIZE": str(num_ranks)}
    logs = [Path(directory) / f"rank{rank}.log" for rank in range(num_ranks)]
    processes = []
    codes = [None] * num_ranks
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                processes.append(_start(command, output, RANK=str(rank), LOCAL_RANK=str(rank), **common))
        # A rank that dies leaves its peer waiting in gloo, which has a time limit of its own (30 minutes).
        deadline = time.monotonic() + timeout_seconds
        while None in codes and time.monotonic() < deadline:
            time.sleep(0.1)
            had_failed, codes = any(codes), [process.poll() for process in processes]
            if any(codes) and not had_failed:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    finally:
        for process in processes:
            _end(process)
    texts = [log.read_text(errors="replace") for log in logs]
    tails = "\n".join(f"---- rank {rank}, exit code {codes[rank]}\n{texts[rank][-6000:]}" for rank in range(num_ranks))
    assert codes == [0] * num_ranks, tails
    return texts
