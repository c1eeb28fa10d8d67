"""``python -m ssdtrain_plugin.run`` and the real launcher with an unchanged script."""

import json
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, free_port, run

deepspeed = pytest.importorskip("deepspeed")

from ssdtrain_plugin import ConfigError  # noqa: E402
from ssdtrain_plugin import run as run_module  # noqa: E402
from ssdtrain_plugin.integrations import deepspeed as ssdtrain_ds  # noqa: E402

pytestmark = pytest.mark.deepspeed


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undo what `main` does to the process."""
    monkeypatch.setattr(deepspeed, "initialize", deepspeed.initialize)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")


@pytest.mark.parametrize(
    ("arguments", "script", "rest"),
    [
        (["train.py"], "train.py", []),
        (["train.py", "--steps", "3"], "train.py", ["--steps", "3"]),
        (["--local_rank=1", "train.py", "--steps", "3"], "train.py", ["--local_rank=1", "--steps", "3"]),
        (["--local_rank=1", "dir/train.py", "other.py"], "dir/train.py", ["--local_rank=1", "other.py"]),
        (["--local_rank=1"], None, ["--local_rank=1"]),
        ([], None, []),
    ],
)
def test_the_script_is_the_first_argument_that_is_no_option(arguments, script, rest):
    assert run_module.split_arguments(arguments) == (script, rest)


def test_the_script_sees_what_it_would_see_without_us(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("VALUE = 3\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import json, sys, neighbour, deepspeed, pathlib\n"
        "seen = [__name__, __file__, sys.argv, sys.path[0], deepspeed.initialize.__module__, neighbour.VALUE]\n"
        f"pathlib.Path({str(tmp_path / 'seen.json')!r}).write_text(json.dumps(seen))\n"
    )
    monkeypatch.chdir(tmp_path)
    run_module.main(["--local_rank=0", str(script), "--steps", "2"])
    seen = json.loads((tmp_path / "seen.json").read_text())
    arguments = [str(script), "--local_rank=0", "--steps", "2"]
    assert seen == ["__main__", str(script), arguments, str(tmp_path), ssdtrain_ds.__name__, 3]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["none.py"], "cannot run `none.py`: no such file"), ([], "usage:")]
)
def test_without_a_script_the_usage_is_shown(arguments, message):
    with pytest.raises(SystemExit) as caught:
        run_module.main(arguments)
    assert message in str(caught.value.code)


@pytest.mark.parametrize("code", [0, 5, "a reason"])
def test_the_exit_code_of_the_script_is_ours(tmp_path, code):
    script = tmp_path / "train.py"
    script.write_text(f"raise SystemExit({code!r})\n")
    with pytest.raises(SystemExit) as caught:
        run_module.main([str(script)])
    assert caught.value.code == code


def test_a_fault_of_the_block_is_said_without_a_traceback(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import deepspeed\ndeepspeed.initialize(model=0, config={'ssdtrain': {'pathz': []}})\n")
    with pytest.raises(SystemExit) as caught:
        run_module.main([str(script)])
    assert isinstance(caught.value.__context__, ConfigError)
    assert str(caught.value.code).startswith("ssdtrain: ")
    assert "pathz: unknown option (did you mean `paths`?)" in str(caught.value.code)


@pytest.mark.slow
def test_a_script_that_raises_shows_its_own_traceback(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("def step():\n    raise ValueError('out of data')\n\nstep()\n")
    code, output = run([sys.executable, "-m", "ssdtrain_plugin.run", script], tmp_path / "log")
    assert code == 1
    assert f'File "{script}", line 4, in <module>' in output
    assert output.rstrip().endswith("ValueError: out of data")


# ---------------------------------------------------------------------- the real launcher

TINY = ["--layers", "2", "--hidden", "64", "--heads", "2", "--sequence", "64", "--steps", "3"]


def _config(directory, block):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 1000000,
    }
    path = directory / "config.json"
    path.write_text(json.dumps(config if block is None else {**config, "ssdtrain": block}))
    return path


def _launch(directory, block, *plugin):
    directory.mkdir()
    deepspeed_command = Path(sys.executable).with_name("deepspeed")
    launcher = [sys.executable, deepspeed_command, "--num_gpus", "2", "--master_port", free_port()]
    script = [REPOSITORY / "launch" / "train_gpt.py", "--deepspeed_config", _config(directory, block), *TINY]
    code, output = run([*launcher, *plugin, *script, "--metrics", directory], directory / "log", timeout_seconds=240)
    files = [directory / f"rank{rank}.json" for rank in (0, 1)]
    return code, output, [json.loads(file.read_text())["losses"] for file in files if file.exists()]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_an_unchanged_script_under_the_launcher_trains_as_without_us(tmp_path):
    drive, stats = tmp_path / "drive", tmp_path / "stats"
    drive.mkdir()
    block = {"paths": [str(drive)], "policy": "all", "min_tensor_bytes": "4 KiB", "stats_path": str(stats)}
    plugin = ("--module", "ssdtrain_plugin.run")
    code, output, losses = _launch(tmp_path / "with", block, *plugin)
    assert code == 0, output[-6000:]
    code, without, expected = _launch(tmp_path / "without", block)
    assert code == 0, without[-6000:]
    assert losses == expected
    assert len(set(losses[0])) == 3
    for rank in (0, 1):
        assert f"] ssdtrain: rank {rank}: " in output, "the line at the start"
        assert f"] ssdtrain: rank {rank}, step 1: moved " in output, "the line after warm-up"
        steps = [json.loads(line) for line in (stats / f"rank{rank}.jsonl").read_text().splitlines()]
        assert [step["microbatches"] for step in steps] == [3, 3, 3]
        assert sum(step["stored_bytes"] for step in steps) > 0
    assert "ssdtrain: " not in without
    assert list(drive.iterdir()) == []
    for word in ("terminate called", "Exception ignored", "Traceback"):
        assert word not in output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_fault_of_the_block_ends_the_launcher_with_an_error(tmp_path):
    code, output, losses = _launch(tmp_path / "job", {"paths": ["/no/such/drive"]}, "--module", "ssdtrain_plugin.run")
    assert code not in (0, None)
    assert losses == []
    assert 'ssdtrain: 1 problem in the "ssdtrain" block of `' in output
    assert "/no/such/drive" in output
    assert "hint: " in output
    assert "Traceback" not in output
