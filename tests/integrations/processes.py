"""Start the processes of a training job, and end all of them whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = Path(__file__).with_name("ranks.py")
MEGATRON = ("megatron.core", "ssdtrain_plugin.integrations.megatron")
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""Megatron compiles small functions, with an import of seconds and a compiler; one job of each kind does so."""
DEEPSPEED = ("deepspeed", "ssdtrain_plugin.integrations.deepspeed")
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


def _run(command, log, timeout_seconds, **variables):
    with Path(log).open("wb") as output:
        process = _start(command, output, **variables)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    return code, Path(log).read_text(errors="replace")


def run(command, log, *, timeout_seconds=120, **variables):
    """Run one command with all its children; return exit code and output (stdout and stderr)."""
    code, text = _run(command, log, timeout_seconds, **variables)
    assert code is not None, f"still running after {timeout_seconds} s; its output:\n{text[-8000:]}"
    return code, text


def _variables_of(num_ranks):
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return common | {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}


def _logs_of(directory, num_ranks):
    return [Path(directory) / f"rank{rank}.log" for rank in range(num_ranks)]


def _judge(codes, logs):
    texts = [log.read_text(errors="replace") for log in logs]
    tails = "\n".join(
        f"---- rank {rank}, exit code {code}\n{text[-6000:]}"
        for rank, (code, text) in enumerate(zip(codes, texts, strict=True))
    )
    assert codes == [0] * len(logs), tails
    return texts


def fork_ranks(
    worker, arguments, directory, *, imports, python=sys.executable, num_ranks=2, timeout_seconds=240, **variables
):
    """Run a script of this directory as every rank of a job; return the output of each rank.

    Args:
        worker: The script.
        arguments: Of it.
        directory: For the logs.
        imports: Modules that one process imports for all ranks, before it forks them.
        python: The interpreter.
        num_ranks: How many.
        timeout_seconds: Then all ranks are ended.
        variables: Of the environment.
    """
    logs, codes = _logs_of(directory, num_ranks), Path(directory) / "codes.json"
    for log in logs:
        log.touch()
    command = [python, RANKS, num_ranks, directory, ",".join(imports), worker, *arguments]
    variables |= _variables_of(num_ranks)
    code, text = _run(command, Path(directory) / "ranks.log", timeout_seconds, **variables)
    assert codes.exists() or code is None, text[-6000:]
    return _judge(json.loads(codes.read_text()) if codes.exists() else [None] * num_ranks, logs)


def run_ranks(command, directory, *, num_ranks=2, timeout_seconds=240, **variables):
    """Run a command as every rank of a job, each started alone; return the output of each rank."""
    variables |= _variables_of(num_ranks)
    logs = _logs_of(directory, num_ranks)
    processes = []
    codes = [None] * num_ranks
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                processes.append(_start(command, output, RANK=str(rank), LOCAL_RANK=str(rank), **variables))
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
    return _judge(codes, logs)
