"""What is recorded is what happened, and nothing is paid or changed when nothing is recorded."""

import json
import logging
from pathlib import Path

import pytest
import torch
from clocks import ManualClock
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.cache import TensorCache
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.trace import Trace
from ssdtrain_plugin.transfer import TransferQueue


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.exp().sum()


def train(tmp_path, num_steps=5, **options):
    torch.manual_seed(0)
    model, data = Model(), torch.randn(16, 32)
    common = {"paths": [str(tmp_path)], "policy": "all", "min_tensor_bytes": 1, "stats_path": str(tmp_path / "run")}
    stats = []
    with ssdtrain.attach(model, common | options) as offloader:
        for _ in range(num_steps):
            losses = [model(data), model(data)]
            for loss in losses:
                loss.backward()
            del losses, loss
            # A store that was forwarded goes on; it would end in the next step.
            offloader.cache._queue.wait_idle()
            stats.append(offloader.end_step())
        kinds = type(offloader.cache), type(offloader.hooks.cache._queue)
    return [parameter.grad for parameter in model.parameters()], stats, kinds


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recorded")
    gradients, stats, kinds = train(directory, trace_steps=2, host_bytes=1 << 14)
    return gradients, stats, kinds, read(directory / "run" / "rank0.trace.jsonl")


def of(events, kind, step=None):
    return [event for event in events if event["event"] == kind and step in (None, event["step"])]


def test_nothing_is_built_or_written_when_nothing_is_recorded(tmp_path):
    _, _, kinds = train(tmp_path)
    assert kinds == (TensorCache, TransferQueue)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["rank0.jsonl"]


def test_gradients_are_the_same_to_the_last_bit(recorded, tmp_path):
    without, _, _ = train(tmp_path)
    assert all(torch.equal(left, right) for left, right in zip(recorded[0], without, strict=True))


def test_only_the_steps_after_the_warm_up_are_recorded(recorded):
    *_, events = recorded
    assert [event["step"] for event in of(events, "step")] == [2, 3]
    assert {event["step"] for event in events if "step" in event} == {2, 3}
    assert events[0]["event"] == "start"


@pytest.mark.parametrize("step", [2, 3])
def test_events_add_up_to_the_statistics_of_their_step(recorded, step):
    _, stats, _, events = recorded
    wanted = stats[step]
    memory, transfers = of(events, "memory", step), of(events, "transfer", step)
    done = [event for event in transfers if event["outcome"] == "done"]
    assert max(event["device_bytes"] for event in memory) == wanted.peak_activation_bytes
    assert max(event["would_be_bytes"] for event in memory) == wanted.saved_bytes
    to_drive = [each for each in done if each["direction"] == "spill" or each["tier"] == "ssd"]
    stored = sum(each["nbytes"] for each in to_drive if each["direction"] in ("store", "spill"))
    assert stored == wanted.stored_bytes
    to_host = sum(each["nbytes"] for each in done if (each["direction"], each["tier"]) == ("store", "host"))
    assert to_host == wanted.host_bytes
    assert sum(each["nbytes"] for each in done if each["direction"] == "load") == wanted.loaded_bytes
    assert sum(event["end"] - event["begin"] for event in of(events, "wait", step)) == pytest.approx(
        wanted.stall_seconds, abs=1e-6
    )
    forwards = [event for event in of(events, "pass", step) if event["kind"] == "forward"]
    assert sum(event["end"] - event["begin"] for event in forwards) == pytest.approx(wanted.forward_seconds, abs=1e-6)
    assert len(forwards) == wanted.microbatches == 2


def test_backwards_that_nobody_announces_are_found_by_their_unpacks(recorded):
    *_, events = recorded
    backwards = [event for event in of(events, "pass", 2) if event["kind"] == "backward"]
    assert [event["is_exact"] for event in backwards] == [False, False]
    assert len({event["microbatch"] for event in backwards}) == 2


def test_a_save_has_the_name_of_its_layer(recorded):
    *_, events = recorded
    saves = of(events, "save", 2)
    names = {save["module"] for save in saves}
    # The root has no name; its `exp` is saved outside of all layers.
    assert {f"layers.{index}.up" for index in range(3)} <= names
    assert names <= {"", *(f"layers.{index}{end}" for index in range(3) for end in ("", ".up", ".down"))}
    serials = [save["serial"] for save in of(events, "save")]
    assert len(serials) == len(set(serials))


def test_a_transfer_knows_its_record_and_its_times(recorded):
    *_, events = recorded
    sizes = {save["serial"]: save["nbytes"] for save in of(events, "save")}
    transfers = of(events, "transfer")
    assert transfers
    for event in transfers:
        assert event["nbytes"] == sizes[event["serial"]]
        assert event["queued"] <= event["begin"] <= event["end"]


def test_all_is_let_go_at_the_end_of_a_step(recorded):
    *_, events = recorded
    last = of(events, "memory", 2)[-1]
    assert (last["device_bytes"], last["host_bytes"], last["drive_bytes"]) == (0, 0, 0)


def test_trace_steps_without_stats_path_is_refused():
    with pytest.raises(ConfigError, match="trace_steps: does nothing without `stats_path`"):
        ssdtrain.OffloadConfig(policy="none", trace_steps=1)


# ---------------------------------------------------------------------- the recorder alone


class AllEqual(nn.Linear):
    def __hash__(self):
        return 1

    def __eq__(self, other):
        return isinstance(other, AllEqual)

    def forward(self, x):
        self.seen = self.trace._running_module()
        return x


def test_the_name_is_that_of_the_very_module(tmp_path):
    trace, _, _ = make(tmp_path)
    module, stranger = AllEqual(1, 1), AllEqual(1, 1)
    module.__dict__["trace"] = stranger.__dict__["trace"] = trace
    trace.name_modules(module, "layers.7")
    trace.name_modules(module, "another name")
    module(torch.ones(1))
    stranger(torch.ones(1))
    assert (module.seen, stranger.seen) == ("layers.7", None)
    # The address of a module that is gone may be given to another one.
    trace._names[id(stranger)] = trace._names[id(module)]
    stranger(torch.ones(1))
    assert stranger.seen is None
    trace.close()


def make(tmp_path, **options):
    clock = ManualClock()
    arguments = {"first_step": 0, "num_steps": 1, "device": "cpu", "clock": clock, "wall": lambda: 1e9} | options
    return Trace(str(tmp_path), 3, **arguments), clock, tmp_path / "rank3.trace.jsonl"


def test_the_first_line_says_when_it_was(tmp_path):
    trace, _, path = make(tmp_path)
    trace.close()
    (start,) = read(path)
    assert start == {"rank": 3, "clock_seconds": 0.0, "wall_seconds": 1e9, "device": "cpu", "event": "start"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pass_has_the_name_of_its_slot_once(tmp_path):
    trace, clock, path = make(tmp_path)
    for slot in ((None, 2), (1, 0), 7, None):
        trace.name_pass(slot)
        clock.advance(1.0)
        trace.passed("forward", 0, 0.5)
    trace.passed("backward", 0, 0.25)
    trace.close()
    passes = read(path)[1:]
    assert [event["slot"] for event in passes] == ["2", "1/0", "7", None, None]
    assert [(event["begin"], event["end"]) for event in passes[:2]] == [(0.5, 1.0), (1.5, 2.0)]


def test_memory_is_noted_when_it_changes(tmp_path):
    trace, clock, path = make(tmp_path)
    for device_bytes in (5, 5, 7):
        clock.advance(1.0)
        trace.memory(device_bytes=device_bytes)
    trace.memory(drive_bytes=2)
    trace.close()
    found = [(event["at"], event["device_bytes"], event["drive_bytes"]) for event in read(path)[1:]]
    assert found == [(1.0, 5, 0), (3.0, 7, 0), (3.0, 7, 2)]


def test_a_full_drive_ends_the_recording_and_not_the_training(tmp_path, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    trace, _, _ = make(tmp_path)
    trace._file.close()
    trace._file = open("/dev/full", "a", encoding="utf-8")
    trace.passed("forward", 0, 0.5)
    with caplog.at_level(logging.WARNING, logger="ssdtrain_plugin"):
        trace.end_step(0, "plan")
        trace.end_step(1, "plan")
    assert caplog.text.count("events are no longer recorded") == 1
    assert not trace.is_on
    trace.close()


def test_closing_twice_does_nothing(tmp_path):
    trace, _, path = make(tmp_path)
    trace.close()
    trace.close()
    trace.passed("forward", 0, 0.5)
    trace.end_step(0, "plan")
    assert len(read(path)) == 1
