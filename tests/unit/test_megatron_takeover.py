"""Who has the places of Megatron's functions: with which options, and what it holds of a schedule that says little."""

import gc
import socket
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("megatron.core")

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig
from test_megatron_arguments import parser_with

from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.integrations.megatron import enable
from ssdtrain_plugin.integrations.megatron.arguments import add_flags
from ssdtrain_plugin.integrations.megatron.takeover import enabled

pytestmark = pytest.mark.megatron


@pytest.fixture
def undone(monkeypatch):
    """Whatever was enabled is disabled again, before what a test has put in Megatron's places goes."""
    yield
    if (offload := enabled()) is not None:
        offload.disable()


@pytest.fixture
def options(tmp_path, undone):
    return {"paths": [str(tmp_path)], "policy": "all"}


def test_a_second_enable_that_says_the_same_or_nothing_gives_the_first(options):
    offload = enable(options)
    assert enable(dict(options)) is offload
    assert enable(parser_with(add_flags).parse_args([])) is offload, "Megatron's loop, without our flags"


def test_a_second_enable_does_not_ask_whether_there_is_room_for_what_the_first_has_taken(tmp_path, undone):
    directory = tmp_path / "drive"
    directory.mkdir()
    options = {"paths": [f"{tmp_path}/{{node}}/../drive"], "policy": "all"}
    (tmp_path / socket.gethostname()).mkdir()
    offload = enable(options)
    directory.rmdir()
    assert enable(options) is offload


def test_a_second_enable_with_other_options_is_refused(options, tmp_path):
    offload = enable(options)
    with pytest.raises(ConfigError) as caught:
        enable({"paths": [str(tmp_path)], "policy": "none", "io_threads": 7})
    message = str(caught.value)
    assert "2 problems in a second `enable`" in message
    assert "policy: 'none' (expected 'all', which is in force)" in message
    assert "io_threads: 7 (expected 4, which is in force)" in message
    assert "hint: enable once; to change options, call `disable()`" in message
    with pytest.raises(ConfigError, match="enabled: False"):
        enable({**options, "enabled": False})
    offload.disable()
    again = enable({**options, "policy": "none"})
    assert again is not offload
    assert again.config.policy == "none"


@pytest.mark.parametrize("wrap", [lambda output: output, lambda output: [output]], ids=["tensor", "list"])
def test_a_schedule_that_numbers_nothing_and_runs_its_own_backward_keeps_no_output_alive(options, monkeypatch, wrap):
    model = nn.Linear(8, 8)
    model.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    monkeypatch.setattr(schedules, "forward_step", lambda step, data, model: (wrap(model(data)), 1))
    enable(options)
    outputs = []
    for _ in range(3):
        output, _ = schedules.forward_step(None, torch.ones(2, 8), model)
        tensor = output[0] if isinstance(output, list) else output
        outputs.append(weakref.ref(tensor))
        tensor.sum().backward()
        del output, tensor
    gc.collect()
    assert [reference() for reference in outputs] == [None] * 3


@pytest.mark.parametrize("wrap", [lambda output: output, lambda output: [output]], ids=["tensor", "list"])
def test_a_backward_is_known_by_the_output_that_its_forward_gave(options, monkeypatch, wrap):
    model = nn.Linear(8, 8)
    model.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    monkeypatch.setattr(schedules, "forward_step", lambda step, data, model, current_microbatch: (wrap(model(data)), 1))
    ran = []
    monkeypatch.setattr(schedules, "backward_step", lambda inputs, output: ran.append(output))
    offload = enable(options)
    outputs = [schedules.forward_step(None, torch.ones(2, 8), model, current_microbatch=n)[0] for n in range(2)]
    slots = []
    backward = offload._passes.backward
    monkeypatch.setattr(offload._passes, "backward", lambda slot: slots.append(slot) or backward(slot))
    for output in reversed(outputs):
        schedules.backward_step(None, output)
    assert slots == [(0, 1), (0, 0)]
    assert [id(output) for output in ran] == [id(output) for output in reversed(outputs)]
