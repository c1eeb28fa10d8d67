"""The command line and the scripts: done, or an exit code that is not 0 and one error of ours. Nothing is measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hostile import check_answer, each_input, misspelt, texts
from hypothesis import given
from hypothesis import strategies as st
from test_files import CLUSTER, MODEL
from typer.testing import CliRunner

import ssdtrain_plugin
from ssdtrain_plugin import run
from ssdtrain_plugin.cli import app

ROOT = Path(__file__).parents[2]
# Last of each line is what makes it wrong, whatever comes before: the command must not begin to measure.
COMMANDS = {
    ("doctor",): ["--size", "0"],
    ("bench", "hooks"): ["--rounds", "0"],
    ("bench", "io"): ["--block", "1000"],
    ("bench", "step"): ["--model", "fish"],
    ("bench", "adapt"): ["--factor", "nan"],
    ("bench", "rok"): ["--name", "a/b"],
    ("bench", "scale"): ["--tensor-size", "none"],
    ("plan",): [],
    ("report",): [],
}
FLAGS = [
    "--size",
    "--model",
    "--tbw",
    "--json",
    "--rounds",
    "--threads",
    "--output",
    "--trace",
    "--step",
    "--plot",
    "--factor",
    "--help",
]


def _can_be_typed(text):
    """The system passes no null character, and what is no UTF-8 as the surrogates from U+DC80 on."""
    return "\0" not in text and not any("\ud800" <= each < "\udc80" or "\udcff" < each <= "\udfff" for each in text)


words = texts.filter(_can_be_typed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few files to name."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").write_bytes(b"")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def places(folder):
    names = [
        "model.yaml",
        "cluster.yaml",
        "binary",
        "empty",
        "directory",
        "pipe",
        "missing",
        "missing/below",
        "\x1b[2J",
        "a\nb",
    ]
    return st.sampled_from([*(str(folder / name) for name in names), "/dev/zero", "/dev/null", "/proc/1/mem"])


def _run(arguments):
    done = CliRunner().invoke(app, arguments, prog_name="ssdtrain")
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


def _check(arguments, done):
    if done.exit_code == 0:
        return
    if done.stderr.startswith("Usage: "):
        assert arguments in ([], ["bench"])
        return
    check_answer(done.stderr)
    assert done.stdout == ""


@each_input()
@given(st.data())
def test_a_command_line(folder, places, data):
    before = sorted(folder.iterdir())
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    flag = st.sampled_from(FLAGS) | misspelt(FLAGS).filter(_can_be_typed)
    some = st.lists(st.one_of(places, places, flag, words), max_size=4)
    arguments = [*command, *data.draw(some), *COMMANDS[command]]
    if command in (("plan",), ("report",)) and {"--output", "--trace", "--plot"} & set(arguments):
        arguments.append("--fish")  # what it would write might be written
    if command == ("report",):
        arguments += ["--output", str(folder / "missing" / "report.html")]
    _check(arguments, _run(arguments))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_nothing_is_answered_with_help(arguments):
    done = _run(arguments)
    assert done.exit_code == 2
    assert "Commands:" in done.output


def test_the_version_is_that_of_the_package():
    done = _run(["--version"])
    assert (done.exit_code, done.output) == (0, f"ssdtrain-plugin {ssdtrain_plugin.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plann"], 2, "error: No such command 'plann'"),
        (["plan", "m.yaml"], 2, "error: Missing argument 'CLUSTER.yaml'."),
        (["plan", "--fish"], 2, "error: No such option: --fish"),
        (["doctor", "/tmp", "--size", "fast"], 2, "error: Invalid value for --size: 'fast' is not a size"),
        (
            ["bench", "step", "/tmp", "--model", "hidden=[1"],
            2,
            "error: Invalid value for --model: 'hidden=[1': while parsing",
        ),
        (
            ["bench", "step", "/tmp", "--model", "hidden=fish"],
            2,
            "error: Invalid value: DecoderShape(layers=12, hidden='fish'",
        ),
        (
            ["bench", "adapt", "/tmp", "--factor", "nan"],
            2,
            "error: Invalid value for --factor: nan (expected more than 0",
        ),
        (["bench", "scale", "/tmp", "--output", "/dev/null/x"], 1, "--output: `/dev/null/x`: Not a directory"),
        (["bench", "step", "/dev/null", "--rounds", "1", "--threads", "1"], 1, "`/dev/null`: not a directory"),
        (["report", "/dev/null"], 1, "no such directory (expected the one of `stats_path`)"),
    ],
)
def test_some_of_them_to_the_letter(arguments, code, said):
    done = _run(arguments)
    assert done.exit_code == code
    check_answer(done.stderr, said)


def _process(*command, **variables):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((b"plan", b"/nope", b"/nope"), 1),
        ((b"plan", b"/tmp/\xff\n\x1b[2J", b"/nope"), 1),
        ((b"plan", b"--fish\xff"), 2),
        ((b"report", b"\xff"), 1),
        ((b"bench", b"\x1b]0;owned\x07"), 2),
        ((b"doctor", b"/nope\xff\x1b", b"--size", b"1" * 100), 2),
    ],
)
def test_real_processes_of_the_command(arguments, code):
    done = _process(sys.executable, "-m", "ssdtrain_plugin", *arguments)
    assert done.returncode == code
    check_answer(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [(), ("--local_rank=0",), (b"/nope\xff\n\x1b[2J",), ("/tmp",), ("/dev/null/x",)])
def test_real_processes_of_the_runner(arguments):
    done = _process(sys.executable, "-m", "ssdtrain_plugin.run", *arguments)
    assert done.returncode == 1
    check_answer(done.stderr, "ssdtrain: ", "usage: python -m ssdtrain_plugin.run")


def test_the_runner_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["--local_rank=0", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m ssdtrain_plugin.run SCRIPT")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("megatron.sh", "tests", "train.py"), "cannot read `tests` (expected a file such as"),
        (("megatron.sh", "-n", "many", "README.md", "train.py"), "-n: `many` (expected a whole number of at least 1)"),
        (("megatron.sh", "-p", "x", "README.md", "train.py"), "-p: `x` (expected a port)"),
        (("deepspeed.sh", "missing.json", "train.py"), "cannot read `missing.json` (expected a DeepSpeed config)"),
        (("deepspeed.sh", "tests", "train.py"), "cannot read `tests` (expected a DeepSpeed config)"),
        (("deepspeed.sh", "-n", "0", "README.md", "train.py"), "-n: `0` (expected a whole number of at least 1)"),
        (("deepspeed.sh", "-p", "-1", "README.md", "train.py"), "-p: `-1` (expected a port)"),
    ],
)
def test_a_launch_script_says_in_one_line_what_is_wrong(arguments, said):
    script, *rest = arguments
    done = _process("bash", str(ROOT / "launch" / script), *rest)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/{script}: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("tool", ["fault_table.py", "soak.py"])
def test_a_tool_says_what_is_wrong(tool):
    wrong = ["--only", "no such case"] if tool == "fault_table.py" else ["--steps", "0"]
    done = _process(sys.executable, str(ROOT / "tools" / tool), *wrong, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {wrong[0]}: " in done.stderr.splitlines()[-1]
