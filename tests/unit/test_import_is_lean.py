"""Importing the package is cheap and harmless: no host framework, no device, no thread, no option changed."""

import json
import subprocess
import sys

import pytest

_PROBE = """
import json, os, sys, threading
import torch
before = (torch.get_num_threads(), dict(os.environ))
import ssdtrain_plugin
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "cuda": torch.cuda.is_initialized(),
    "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread()],
    "unchanged": before == (torch.get_num_threads(), dict(os.environ)),
}))
"""


@pytest.fixture(scope="module")
def after_import():
    done = subprocess.run(
        [sys.executable, "-W", "error:::ssdtrain_plugin", "-c", _PROBE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["deepspeed", "megatron", "hjson", "kvikio", "typer", "rich"])
def test_import_does_not_load(after_import, name):
    assert name not in after_import["modules"]


def test_import_does_not_touch_cuda(after_import):
    assert after_import["cuda"] is False


def test_import_starts_no_thread(after_import):
    assert after_import["threads"] == []


def test_import_changes_neither_environment_nor_torch(after_import):
    assert after_import["unchanged"]
