#!/usr/bin/env python3
"""The demo behind `make demo`: one training run, without the plugin and with it, side by side.

Starts `launch/train_gpt.py` under DeepSpeed's launcher three times with the same seed:

* ``plain``: DeepSpeed alone;
* ``count``: two steps with ``"policy": "none"``. The plugin's hooks count and move nothing,
  because a run without hooks cannot tell how many bytes of activations were alive;
* ``ssdtrain``: the activations go to the drive and come back.

Then it compares them, prints a table per rank and exits with 1 if what the plugin promises
does not hold. Logs, configs and figures stay in ``.cache/demo/``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from ssdtrain_plugin.units import format_bytes, format_seconds

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "demo"
SCRIPT = "launch/train_gpt.py"
CONFIGS = ROOT / "configs" / "deepspeed"
RUN_MODULE = "ssdtrain_plugin.run"

STAGES = 2  # one process each
STEPS = 8
COUNT_STEPS = 2
WARM_UP_STEPS = 2  # not in the step time
RUN_LIMIT_SECONDS = 900.0
TITLES = {"plain": "1/3 without the plugin", "count": "2/3 counting only", "ssdtrain": "3/3 with the plugin"}
LOG_TAIL_LINES = 40

STEP_LINE = re.compile(r"^step (\d+)/(\d+) loss (\S+) (\S+) s$", re.MULTILINE)


class DemoError(Exception):
    """A run failed; the message says which and where its log is."""


# Figures and verdict: pure functions of what the runs wrote.


@dataclass(frozen=True)
class RankRun:
    """One rank of one run, as the training script wrote it.

    Attributes:
        losses: Loss of each step, exact, as `float.hex` writes it.
        seconds: Wall time of each step.
        process_bytes: Peak resident memory of the process.
    """

    losses: tuple[str, ...]
    seconds: tuple[float, ...]
    process_bytes: int


@dataclass(frozen=True)
class RankFigures:
    """What the table shows of one rank, without the plugin (`plain_`) and with it (`ssdtrain_`)."""

    rank: int
    steps: int
    plain_losses: tuple[str, ...]
    ssdtrain_losses: tuple[str, ...]
    count_losses: tuple[str, ...]
    plain_step_seconds: float
    ssdtrain_step_seconds: float
    plain_step_range: tuple[float, float]
    ssdtrain_step_range: tuple[float, float]
    plain_activation_bytes: int
    ssdtrain_activation_bytes: int
    plain_process_bytes: int
    ssdtrain_process_bytes: int
    stored_bytes: int
    loaded_bytes: int
    forwarded_bytes: int
    deduplicated_bytes: int
    loads_on_demand: int
    loads_on_demand_in_warm_up: int
    stall_seconds: float
    failures: dict[str, int]

    @property
    def activation_ratio(self) -> float:
        """Peak of live activations with the plugin over that without."""
        return ratio(self.ssdtrain_activation_bytes, self.plain_activation_bytes)

    @property
    def step_ratio(self) -> float:
        """Median step time with the plugin over that without."""
        return ratio(self.ssdtrain_step_seconds, self.plain_step_seconds)


def ratio(part: float, whole: float) -> float:
    """Divide; without a whole there is nothing to compare with: not a number."""
    return part / whole if whole else float("nan")


def read_run(metrics: Path, rank: int) -> RankRun:
    """Read what the training script wrote for one rank.

    Args:
        metrics: Directory given to its `--metrics`.
        rank: Global rank.
    """
    values = json.loads((metrics / f"rank{rank}.json").read_text(encoding="utf-8"))
    # The kernel's high-water mark, and not ru_maxrss: that one survives exec and so may be the launcher's.
    return RankRun(tuple(values["losses"]), tuple(values["seconds"]), values["vm_hwm_bytes"])


def read_stats(directory: Path, rank: int) -> list[dict[str, Any]]:
    """Read the StepStats the plugin wrote for one rank, in order of step.

    Args:
        directory: Its `stats_path`.
        rank: Global rank.
    """
    lines = (directory / f"rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda stats: int(stats["step"]))


def step_seconds(seconds: Sequence[float]) -> float:
    """Median of the steps after warm-up; of all steps where there are no others.

    Args:
        seconds: Wall time of each step.
    """
    return statistics.median(seconds[WARM_UP_STEPS:] or seconds)


def step_range(seconds: Sequence[float]) -> tuple[float, float]:
    """Shortest and longest of the same steps: how much the machine itself varies.

    Args:
        seconds: Wall time of each step.
    """
    steps = seconds[WARM_UP_STEPS:] or seconds
    return min(steps), max(steps)


def summarise(
    rank: int,
    runs: Mapping[str, RankRun],
    stats: Mapping[str, Sequence[Mapping[str, Any]]],
) -> RankFigures:
    """Put together the figures of one rank.

    Args:
        rank: Global rank.
        runs: By name of the run: ``plain``, ``count``, ``ssdtrain``.
        stats: StepStats by name of the run: ``count``, ``ssdtrain``.
    """
    plain, ssdtrain, moved = runs["plain"], runs["ssdtrain"], stats["ssdtrain"]
    failures: dict[str, int] = {}
    for step in moved:
        for cause, count in step["failures"].items():
            failures[cause] = failures.get(cause, 0) + count
    return RankFigures(
        rank=rank,
        steps=len(moved),
        plain_losses=plain.losses,
        ssdtrain_losses=ssdtrain.losses,
        count_losses=runs["count"].losses,
        plain_step_seconds=step_seconds(plain.seconds),
        ssdtrain_step_seconds=step_seconds(ssdtrain.seconds),
        plain_step_range=step_range(plain.seconds),
        ssdtrain_step_range=step_range(ssdtrain.seconds),
        plain_activation_bytes=max((step["peak_activation_bytes"] for step in stats["count"]), default=0),
        ssdtrain_activation_bytes=max((step["peak_activation_bytes"] for step in moved), default=0),
        plain_process_bytes=plain.process_bytes,
        ssdtrain_process_bytes=ssdtrain.process_bytes,
        stored_bytes=sum(step["stored_bytes"] for step in moved),
        loaded_bytes=sum(step["loaded_bytes"] for step in moved),
        forwarded_bytes=sum(step["forwarded_bytes"] for step in moved),
        deduplicated_bytes=sum(step["deduplicated_bytes"] for step in moved),
        loads_on_demand=sum(step["num_loads_on_demand"] for step in moved),
        loads_on_demand_in_warm_up=sum(step["num_loads_on_demand"] for step in moved[:WARM_UP_STEPS]),
        stall_seconds=sum(step["stall_seconds"] for step in moved),
        failures=failures,
    )


def different_losses(name: str, rank: int, wanted: Sequence[str], got: Sequence[str]) -> list[str]:
    """Compare losses to the last bit.

    Args:
        name: Of the run compared.
        rank: Global rank.
        wanted: Of the run without the plugin, as hexadecimal floats.
        got: Of the run compared.

    Returns:
        One sentence on the first step that differs, or nothing.
    """
    for step, (left, right) in enumerate(zip(wanted, got, strict=False), start=1):
        if left != right:
            values = f"{float.fromhex(right)!r}, expected {float.fromhex(left)!r}"
            return [f"rank {rank}: the loss of the {name} run differs at step {step} ({values})"]
    return []


def find_faults(ranks: Sequence[RankFigures], *, steps: int, count_steps: int) -> list[str]:
    """Check what the plugin promises.

    Args:
        ranks: Figures of every rank, in order.
        steps: Steps of the two long runs.
        count_steps: Steps of the counting run.

    Returns:
        One sentence per broken promise.
    """
    faults = []
    for figures in ranks:
        name = f"rank {figures.rank}"
        for run, losses, wanted in (
            ("plain", figures.plain_losses, steps),
            ("ssdtrain", figures.ssdtrain_losses, steps),
            ("count", figures.count_losses, count_steps),
        ):
            if len(losses) != wanted:
                faults.append(f"{name}: the {run} run made {len(losses)} steps (expected {wanted})")
        faults += different_losses("ssdtrain", figures.rank, figures.plain_losses, figures.ssdtrain_losses)
        faults += different_losses("count", figures.rank, figures.plain_losses, figures.count_losses)
        if figures.steps != steps:
            faults.append(f"{name}: the plugin wrote statistics of {figures.steps} steps (expected {steps})")
        if figures.stored_bytes <= 0:
            faults.append(f"{name}: nothing was stored on the drive")
        if figures.failures:
            causes = ", ".join(f"{cause}: {count}" for cause, count in figures.failures.items())
            faults.append(f"{name}: stores failed ({causes})")
    curve = [float.fromhex(loss) for loss in ranks[0].plain_losses]
    if len(curve) > 1 and not curve[-1] < curve[0]:
        faults.append(f"the loss did not fall (first step {curve[0]:.4f}, last step {curve[-1]:.4f})")
    if not ranks[0].activation_ratio <= 0.5:
        faults.append(
            "stage 0: the peak of live activations is "
            f"{format_bytes(ranks[0].ssdtrain_activation_bytes)} with the plugin and "
            f"{format_bytes(ranks[0].plain_activation_bytes)} without (expected at most half)"
        )
    return faults


def build_table(figures: RankFigures) -> Table:
    """Lay out the figures of one rank.

    Args:
        figures: Of that rank.
    """
    table = Table(title=f"rank {figures.rank} (pipeline stage {figures.rank} of {STAGES})", title_justify="left")
    table.add_column("")
    table.add_column("without", justify="right")
    table.add_column("with ssdtrain", justify="right")
    table.add_column("", justify="right")
    equal = "equal, all bits" if figures.plain_losses == figures.ssdtrain_losses else "DIFFERENT"
    for label, index in (("loss, first step", 0), ("loss, last step", -1)):
        values = (f"{float.fromhex(run[index]):.6f}" for run in (figures.plain_losses, figures.ssdtrain_losses))
        table.add_row(label, *values, equal)
    table.add_row(
        "step time, median",
        format_seconds(figures.plain_step_seconds),
        format_seconds(figures.ssdtrain_step_seconds),
        f"{figures.step_ratio:.2f} x",
    )
    ranges = (figures.plain_step_range, figures.ssdtrain_step_range)
    table.add_row("step time, range", *(f"{low:.3g} - {high:.3g} s" for low, high in ranges), "")
    table.add_row(
        "live activations, peak",
        format_bytes(figures.plain_activation_bytes) + " *",
        format_bytes(figures.ssdtrain_activation_bytes),
        f"{figures.activation_ratio:.2f} x",
    )
    table.add_row(
        "process memory, peak",
        format_bytes(figures.plain_process_bytes),
        format_bytes(figures.ssdtrain_process_bytes),
        f"{ratio(figures.ssdtrain_process_bytes, figures.plain_process_bytes):.2f} x",
        end_section=True,
    )
    steps = figures.steps or 1
    for label, nbytes in (
        ("stored on the drive", figures.stored_bytes),
        ("loaded back", figures.loaded_bytes),
        ("forwarded from memory", figures.forwarded_bytes),
        ("deduplicated saves", figures.deduplicated_bytes),
    ):
        table.add_row(label, "-", format_bytes(nbytes), f"{format_bytes(nbytes / steps)} a step")
    table.add_row("stalls: loads on demand", "-", str(figures.loads_on_demand), "")
    table.add_row(
        "stalls: time waited",
        "-",
        format_seconds(figures.stall_seconds),
        f"{format_seconds(figures.stall_seconds / steps)} a step",
    )
    return table


def notes(ranks: Sequence[RankFigures]) -> list[str]:
    """Say what the figures alone do not.

    Args:
        ranks: Figures of every rank.
    """
    lines = [
        f'* counted in a third run of {COUNT_STEPS} steps with "policy": "none" (the hooks count, nothing moves); '
        "a run without hooks cannot tell. Its losses are compared too.",
        "The run without the plugin is the user's own command, unchanged. On CPU the plugin's runner also switches on "
        "huge pages for tensors (THP_MEM_ALLOC_ENABLE=1), so the ratio of step times has both effects in it; the runs "
        "follow one another on a machine that may be shared.",
    ]
    for figures in ranks:
        if figures.loads_on_demand:
            lines.append(
                f"rank {figures.rank}: backward asked for {figures.loads_on_demand} tensors before their load had "
                f"begun, {figures.loads_on_demand_in_warm_up} of them in the first {WARM_UP_STEPS} steps."
            )
    return lines


def sentence(ranks: Sequence[RankFigures]) -> str:
    """Sum up in one sentence that needs no knowledge of the plugin.

    Args:
        ranks: Figures of every rank, in order.
    """
    first = ranks[0]
    stored = sum(figures.stored_bytes for figures in ranks)
    difference = first.ssdtrain_step_seconds - first.plain_step_seconds
    low, high = first.plain_step_range
    if abs(difference) <= max(high - low, 0.01 * first.plain_step_seconds):
        speed = "in about the same time"  # steps of one run differ as much among themselves
    else:
        speed = f"{abs(first.step_ratio - 1):.0%} {'slower' if difference > 0 else 'faster'}"
    return (
        f"The same model trained on the same text to exactly the same losses with {1 - first.activation_ratio:.0%} "
        f"less memory for activations on the first stage ({format_bytes(first.ssdtrain_activation_bytes)} instead of "
        f"{format_bytes(first.plain_activation_bytes)}), {speed}: {format_bytes(stored)} "
        "waited on the drive until backward needed them."
    )


# The runs.


def free_port() -> int:
    """Ask the kernel for a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def child_environment() -> dict[str, str]:
    """Environment of the launcher: this interpreter's programs first, caches inside the checkout."""
    env = dict(os.environ)
    # `deepspeed` and `ninja` lie beside the interpreter, also when its environment is not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    if not env.get("HOME"):
        env["HOME"] = str(ROOT / ".cache" / "home")
        Path(env["HOME"]).mkdir(parents=True, exist_ok=True)
    if "DS_ACCELERATOR" not in env:
        import torch  # here, for it takes seconds and `--help` does not need it

        if torch.cuda.device_count() < STAGES:
            env["DS_ACCELERATOR"] = "cpu"
    return env


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and every rank it started, and wait for the launcher.

    Args:
        process: Started as the leader of its own session.
    """
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all gone
    process.wait()


def tail(path: Path) -> str:
    """Read the last lines of a log.

    Args:
        path: Of the log.
    """
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])


def progress_text(log: str) -> str:
    """Tell from the log so far how far the run is.

    Args:
        log: What the children have printed.
    """
    found = STEP_LINE.findall(log)
    if not found:
        return "starting (DeepSpeed's first start ever compiles an operator: about 40 s)"
    step, steps, loss, seconds = found[-1]
    return f"step {step} of {steps}, loss {loss}, {seconds} s"


def start_and_wait(command: Sequence[str], env: Mapping[str, str], log: Path, show: Callable[[str], None]) -> None:
    """Run one command to its end, telling how far it is.

    Args:
        command: Program and arguments, run at the root of the checkout.
        env: Its environment.
        log: File for its output.
        show: Called with a line of progress whenever that has changed.

    Raises:
        DemoError: It failed or took too long.
    """
    process = None
    deadline = time.monotonic() + RUN_LIMIT_SECONDS
    shown = ""
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its whole family can be killed at once
            )
        while True:
            try:
                code = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                code = None
            text = progress_text(log.read_text(encoding="utf-8", errors="replace"))
            if text != shown:
                show(text)
                shown = text
            if code == 0:
                return
            if code is not None:
                raise DemoError(f"exit code {code}")
            if time.monotonic() > deadline:
                raise DemoError(f"not done after {RUN_LIMIT_SECONDS:.0f} s")
    finally:
        if process is not None:
            kill_group(process)


def write_config(name: str, folder: Path, path: Path) -> Path:
    """Write the DeepSpeed config of one run.

    Args:
        name: Of the run.
        folder: Of the run.
        path: Directory on the drive.

    Returns:
        The file.
    """
    import hjson  # the reader DeepSpeed itself uses: its JSON may hold comments

    source = CONFIGS / ("gpt_pp2_plain.json" if name == "plain" else "gpt_pp2_ssdtrain.json")
    config = json.loads(hjson.dumpsJSON(hjson.loads(source.read_text(encoding="utf-8"))))
    if name != "plain":
        config["ssdtrain"]["paths"] = [str(path)]
        config["ssdtrain"]["stats_path"] = str(folder / "stats")
    if name == "count":
        config["ssdtrain"]["policy"] = "none"
    target = folder / "config.json"
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def run(name: str, steps: int, path: Path, env: Mapping[str, str], console: Console) -> None:
    """Train once.

    Args:
        name: ``plain``, ``count`` or ``ssdtrain``; the figures go to that folder of `.cache/demo`.
        steps: Optimizer steps.
        path: Directory on the drive.
        env: Environment of the launcher.
        console: Shows how far it is.

    Raises:
        DemoError: The run failed; its log was printed.
    """
    folder = WORK / name
    folder.mkdir()
    log = folder / "log.txt"
    deepspeed = shutil.which("deepspeed", path=env["PATH"])
    if deepspeed is None:
        raise DemoError(f"the `deepspeed` launcher is missing beside {sys.executable}; run `make install`")
    module = [] if name == "plain" else ["--module", RUN_MODULE]
    command = [deepspeed, "--num_gpus", str(STAGES), "--master_port", str(free_port()), *module, SCRIPT]
    command += ["--deepspeed_config", str(write_config(name, folder, path))]
    command += ["--stages", str(STAGES), "--steps", str(steps), "--metrics", str(folder / "metrics")]
    title = TITLES[name]
    start = time.monotonic()
    try:
        if console.is_terminal:
            with console.status(f"{title}: starting") as status:
                start_and_wait(command, env, log, lambda text: status.update(f"{title}: {text}"))
        else:
            start_and_wait(command, env, log, lambda text: say(console, f"{title}: {text}"))
    except DemoError as error:
        say(console, f"the last lines of {log}:\n{tail(log)}")
        raise DemoError(f"the {name} run failed: {error}; log: {log}") from None
    say(console, f"{title}: done in {format_seconds(time.monotonic() - start)}")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: no markup, no colours of rich's own, no wrapping.

    Args:
        console: Where to.
        text: What.
        style: Of the whole text.
    """
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def collect(rank: int) -> RankFigures:
    """Read the figures of one rank.

    Args:
        rank: Global rank.
    """
    try:
        runs = {name: read_run(WORK / name / "metrics", rank) for name in ("plain", "count", "ssdtrain")}
        stats = {name: read_stats(WORK / name / "stats", rank) for name in ("count", "ssdtrain")}
    except FileNotFoundError as error:
        raise DemoError(f"a run ended without its figures: {error.filename} is missing") from None
    return summarise(rank, runs, stats)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into an exit that runs the `finally` clauses, which kill the children."""
    raise SystemExit(128 + number)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT without and with activation offloading, and compare."
    )
    parser.add_argument("--path", type=Path, metavar="DIR", help="directory on the drive (default: .cache/demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    args = parser.parse_args()
    if args.path is not None and not args.path.is_dir():
        parser.error(f"--path: {args.path} is not a directory")
    if args.steps < COUNT_STEPS:
        parser.error(f"--steps: {args.steps} (expected at least {COUNT_STEPS})")
    return args


def main() -> int:
    """Run the demo. Returns its exit code."""
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    console = Console()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    path = Path(tempfile.mkdtemp(prefix="ssdtrain-demo-", dir=args.path or WORK)).resolve()
    say(console, f"Training a small GPT on {STAGES} processes, three times; this takes minutes. Logs: {WORK}")
    try:
        env = child_environment()
        run("plain", args.steps, path, env, console)
        run("count", COUNT_STEPS, path, env, console)
        run("ssdtrain", args.steps, path, env, console)
        ranks = [collect(rank) for rank in range(STAGES)]
        left = sorted(entry.name for entry in path.iterdir())
    except DemoError as error:
        say(console, f"error: {error}", "bold red")
        return 1
    finally:
        shutil.rmtree(path, ignore_errors=True)

    faults = find_faults(ranks, steps=args.steps, count_steps=COUNT_STEPS)
    if left:
        faults.append(f"the run left files on the drive: {', '.join(left)}")
    for figures in ranks:
        console.print()
        console.print(build_table(figures))
    for line in notes(ranks):
        say(console, line)
    if args.json:
        report = {"ok": not faults, "faults": faults, "ranks": [asdict(figures) for figures in ranks]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print()
    for fault in faults:
        say(console, f"error: {fault}", "bold red")
    if not faults:
        say(console, sentence(ranks))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
