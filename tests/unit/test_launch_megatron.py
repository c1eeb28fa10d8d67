"""``launch/megatron.sh`` composes one command for one machine, for a hostfile and for Slurm; its configs are flags."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ssdtrain_plugin.config import OffloadConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "megatron").glob("*.flags"))
NEWEST = os.environ.get("SSDTRAIN_MEGATRON_PYTHON")
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)

# What Megatron's own parser makes of each config; once for all of them, since importing it takes long.
PARSE = """
import argparse, json, sys, warnings
warnings.simplefilter("ignore")
from megatron.training.arguments import add_megatron_arguments
from ssdtrain_plugin.integrations.megatron import add_args
parser = add_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
found = {}
for name, words in json.load(sys.stdin).items():
    given, unknown = parser.parse_known_args(words)
    found[name] = [unknown, given.ssdtrain, given.ssdtrain_paths, given.num_attention_heads]
print(json.dumps(found))
"""


def launch(*words, check=True, **variables):
    """Run the script; give its output word by word, or with ``check=False`` the finished process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    command = [ROOT / "launch" / "megatron.sh", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, timeout=60, check=False
    )
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def read_flags(config):
    """Read a config the way its head describes it, in another way than the script does."""
    lines = [re.sub(r"\s#.*", "", line).strip() for line in config.read_text(encoding="utf-8").splitlines()]
    return [word for line in lines if line and not line.startswith("#") for word in shlex.split(line)]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "my.flags"
    path.write_text(
        "# a comment\n\n--fp16\n   # another one\n\t--lr  1e-4   # and one behind\n"
        "--ssdtrain-paths /a/{local_rank} /b*\n--name a#b"  # no line break at the end
    )
    return path


FLAGS = ["--fp16", "--lr", "1e-4", "--ssdtrain-paths", "/a/{local_rank}", "/b*", "--name", "a#b"]
RUN = ["-m", "ssdtrain_plugin.run", "train.py", *FLAGS]


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("options", "launcher"),
    [
        ([], ["torchrun", "--nproc_per_node", "gpu", "--standalone"]),
        (["-n", "2"], ["torchrun", "--nproc_per_node", "2", "--standalone"]),
        (["-n", "2", "-p", "29501"], ["torchrun", "--nproc_per_node", "2", "--master_port", "29501"]),
    ],
)
def test_one_machine(config, options, launcher):
    assert launch("-d", *options, config, "train.py") == [*launcher, *RUN]


@pytest.mark.parametrize(
    ("options", "between"),
    [
        ([], []),
        (["-n", "4"], ["--num_gpus", "4"]),
        (["-n", "4", "-p", "29501"], ["--num_gpus", "4", "--master_port", "29501"]),
    ],
)
def test_machines_of_a_hostfile(config, tmp_path, options, between):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=8\nnode2 slots=8\n")
    words = launch("-d", "-H", hostfile, *options, config, "train.py")
    assert words == ["deepspeed", "--hostfile", str(hostfile), *between, "--module", *RUN[1:]]


def test_flags_of_the_command_line_come_last_and_keep_their_spaces(config):
    words = launch("-d", config, "train.py", "--lr", "2e-4", "--data-path", "a b", "--x=*")
    assert words[-5:] == ["--lr", "2e-4", "--data-path", "a b", "--x=*"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr")
    assert parser.parse_known_args(words)[0].lr == "2e-4"


SLURM = {
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "20007",
}


def test_a_task_of_slurm(config):
    assert launch("-d", "-S", config, "train.py", **SLURM) == ["python", *RUN]


@pytest.mark.parametrize(
    ("variables", "per_node"),
    [
        ({}, "8"),
        ({"SLURM_NTASKS_PER_NODE": "", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, "8"),
        ({"SLURM_NTASKS_PER_NODE": "", "SLURM_STEP_TASKS_PER_NODE": "4,8"}, "4"),
        ({"SLURM_NTASKS_PER_NODE": ""}, "1"),
    ],
)
def test_a_task_of_slurm_says_in_the_environment_who_it_is(config, tmp_path, variables, per_node):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT '
        '$CUDA_DEVICE_MAX_CONNECTIONS"\nprintf "%s\\n" "$@"\n'
    )
    python.chmod(0o755)
    words = launch(
        "-S", config, "train.py", **{**SLURM, **variables, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    )
    assert words == [f"11 3 16 {per_node} node1 20007 1", *RUN]


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"])
def test_a_task_of_slurm_that_lacks_something_says_what(config, missing):
    variables = {key: value for key, value in SLURM.items() if key != missing} | {"PATH": os.environ["PATH"]}
    done = launch("-d", "-S", config, "train.py", check=False, **variables)
    assert done.returncode != 0
    assert missing in done.stderr


def test_the_slurm_script_starts_every_task(tmp_path):
    """sbatch runs a copy of it, from anywhere; the tools of Slurm are stood in for."""
    tools = {"scontrol": "echo node7\necho node8", "srun": 'echo "$PWD $MASTER_ADDR $MASTER_PORT"\necho "$@"'}
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    copied = shutil.copy(ROOT / "launch" / "slurm.sh", tmp_path / "slurm_script")
    variables = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(
        ["bash", copied, "a.flags", "train.py", "--lr", "1"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"{ROOT} node7 23456",
        "--kill-on-bad-exit=1 launch/megatron.sh -S a.flags train.py --lr 1",
    ]


def test_the_slurm_script_outside_of_a_job_says_so():
    done = subprocess.run(
        [ROOT / "launch" / "slurm.sh"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "run it with sbatch" in done.stderr


# ---------------------------------------------------------------------- what is wrong is said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.flags", "train.py"], "cannot read `missing.flags` (expected a file such as"),
        (["-H", "missing", "README.md", "train.py"], "cannot read `missing` (expected lines such as"),
        (["-H", "README.md", "-S", "README.md", "train.py"], "both -H and -S were given"),
        (["README.md"], "usage: launch/megatron.sh"),
        (["-x", "README.md", "train.py"], "usage: launch/megatron.sh"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_reason(words, message):
    done = launch("-d", *words, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_help_is_no_error():
    assert launch("-h")[0].startswith("usage: launch/megatron.sh")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------- configs


def test_the_papers_three_models_have_a_config():
    assert [config.stem for config in CONFIGS] == ["bert", "gpt", "t5"]


@each_config
def test_the_script_reads_of_a_config_what_stands_in_it(config):
    words = launch("-d", config, "train.py")
    assert words[words.index("train.py") + 1 :] == read_flags(config)


@each_config
def test_head_names_command_machine_and_expected_numbers(config):
    head = "\n".join(line for line in config.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    for key in ("# command:", "# machine:", "# expected:"):
        assert key in head
    assert "NOT MEASURED" in head
    command = head.partition("# command:\n")[2].partition("#   (")[0].replace("#", "").replace("\\\n", " ")
    words = shlex.split(command)
    assert "launch/megatron.sh" in words
    assert f"configs/megatron/{config.name}" in words
    assert any(word.endswith(f"pretrain_{config.stem}.py") for word in words)


@each_config
def test_a_config_switches_the_plugin_on_and_gives_it_a_drive(config):
    words = read_flags(config)
    assert "--ssdtrain" in words
    assert words[words.index("--ssdtrain-paths") + 1] == "/mnt/nvme{local_rank}"
    given = {word for word in words if word.startswith("--ssdtrain-")}
    assert given <= {f"--ssdtrain-{name.replace('_', '-')}" for name in OffloadConfig.model_fields}


@pytest.mark.megatron
@pytest.mark.skipif(not NEWEST, reason="SSDTRAIN_MEGATRON_PYTHON is not set")
@pytest.mark.timeout(200)
def test_megatrons_own_parser_knows_every_flag():
    done = subprocess.run(
        [NEWEST, "-c", PARSE],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"},  # nothing is compiled: a faster import
        input=json.dumps({config.stem: read_flags(config) for config in CONFIGS}),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {config.stem: [[], True, ["/mnt/nvme{local_rank}"], 64] for config in CONFIGS}


@pytest.mark.megatron
@each_config
def test_our_own_parser_knows_every_flag_of_ours(config):
    pytest.importorskip("megatron.core")
    from ssdtrain_plugin.integrations.megatron.arguments import add_flags, options_of

    parser = add_flags(argparse.ArgumentParser(allow_abbrev=False))
    known, rest = parser.parse_known_args(read_flags(config))
    assert not [word for word in rest if word.startswith("--ssdtrain")]
    options = options_of(known)
    assert options == {"paths": ["/mnt/nvme{local_rank}"]}
    assert OffloadConfig(**options).enabled


@each_config
def test_no_flag_is_given_twice(config):
    names = [word for word in read_flags(config) if word.startswith("--")]
    assert len(names) == len(set(names))
