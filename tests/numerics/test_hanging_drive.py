"""A drive whose calls never return: gradients to the last bit, an error in time, and an end of the process."""

import subprocess
import sys
import threading

import pytest
import torch
from clocks import ManualClock
from fakes import TIMEOUT_SECONDS, Gate, causes_of
from training import assert_nothing_held, assert_same, gradients, one_step, train, used_bytes
from workloads import WORKLOADS

from ssdtrain_plugin.errors import LoadError
from ssdtrain_plugin.runtime import Parts, attach_with
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan

GPT = WORKLOADS["gpt dropout"]
TIMEOUT = 60.0


class Hanging:
    """Calls that hang at a gate. As soon as one does, a thread lets the deadline pass."""

    def __init__(self, *faults):
        self.clock, self.gate = ManualClock(), Gate(is_open=False)
        self.plan = FaultPlan(faults, hang=self._hang)
        self.parts = Parts(wrap_engine=self.plan.wrap, clock=self.clock)
        self.queue = None
        self._running = []
        self._num_hung = threading.Semaphore(0)
        self._is_over = False
        self._thread = threading.Thread(target=self._let_time_pass)

    def _hang(self):
        self._num_hung.release()
        self.gate.pass_through()

    def _let_time_pass(self):
        while self._num_hung.acquire() and not self._is_over:
            with self.queue._lock:
                self._running += self.queue._deadlines._runs
            self.clock.advance(TIMEOUT)
            self.queue.give_up_overdue()

    def release(self):
        """Let what hangs go on; return when all of it has returned."""
        self.gate.open()
        for transfer in filter(lambda transfer: transfer.is_given_up, self._running):
            returned = threading.Event()
            transfer.when_returned(returned.set)
            assert returned.wait(TIMEOUT_SECONDS)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over = True
        self._num_hung.release()
        self.gate.open()
        self._thread.join(TIMEOUT_SECONDS)


def train_hanging(hanging, config, *, release_after=None, steps=5):
    """As :func:`training.train`, with what hangs still hanging when a step ends."""
    model = GPT.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, every_gradient, stats = [], [], []
    with attach_with(model, config, hanging.parts) as offloader:
        hanging.queue = offloader.cache._queue
        for number in range(steps):
            losses.append(one_step(model, GPT, number, offloader, must_load=True).detach().clone())
            every_gradient.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
            stats.append(offloader.end_step())
            if number == release_after:
                hanging.release()
        if release_after is not None:
            assert_nothing_held(offloader)
        else:
            assert used_bytes(offloader) > 0, "what hangs keeps its places"
    return losses, every_gradient, stats


@pytest.fixture(scope="module")
def expected():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found, _ = train(GPT, steps=5)
    torch.set_num_threads(threads)
    return found["losses"], found["gradients"]


@pytest.mark.parametrize("count", [1, 3, None], ids=["one", "three", "all"])
@pytest.mark.parametrize("verify", ["off", "checksum"])
def test_stores_that_never_return_keep_the_gradients(count, verify, make_config, expected):
    with Hanging(Fault(FaultKind.HANG, "write", count=count)) as hanging:
        losses, every_gradient, stats = train_hanging(hanging, make_config("ssd", verify=verify))
    assert hanging.plan.injected
    assert_same((losses, every_gradient), expected)
    assert causes_of(stats[0]) == {"ssd: timeout"}
    assert stats[-1].stored_bytes == 0
    assert stats[-1].failures == {"ssd: left alone while a transfer hangs": 1}


def test_stores_that_return_late_spoil_nothing_and_the_drive_is_used_again(make_config, expected):
    with Hanging(Fault(FaultKind.HANG, "write", first=2, count=2)) as hanging:
        losses, every_gradient, stats = train_hanging(hanging, make_config("ssd"), release_after=1)
    assert_same((losses, every_gradient), expected)
    assert causes_of(stats[0]) == {"ssd: timeout"}
    assert stats[1].stored_bytes == 0
    assert stats[-1].stored_bytes > 0


def test_a_budget_full_of_hung_stores_does_not_stop_forward(make_config, expected):
    config = make_config("ssd", max_inflight_bytes=1, io_threads=1)
    with Hanging(Fault(FaultKind.HANG, "write")) as hanging:
        losses, every_gradient, _ = train_hanging(hanging, config)
    assert_same((losses, every_gradient), expected)


def test_loads_that_never_return_are_an_error_of_backward(make_config):
    model = GPT.build()
    with (
        Hanging(Fault(FaultKind.HANG, "read")) as hanging,
        attach_with(model, make_config("ssd"), hanging.parts) as offloader,
    ):
        hanging.queue = offloader.cache._queue
        with pytest.raises(LoadError, match="cannot load the activation") as caught:
            one_step(model, GPT, 0, offloader, must_load=True)
        assert caught.value.path is not None
        del caught


_PROBE = """
import sys, torch
from ssdtrain_plugin.runtime import Parts, attach_with
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan
operation, directory = sys.argv[1:]
plan = FaultPlan([Fault(FaultKind.HANG, operation)])
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
options = {"paths": directory, "policy": "all", "min_tensor_bytes": 1, "io_timeout_seconds": 0.1}
offloader = attach_with(model, options, Parts(wrap_engine=plan.wrap))
loss = model(torch.randn(8, 64)).exp().sum()
if operation == "read":
    offloader.cache._queue.wait_idle()
loss.backward()
print("done", all(p.grad is not None for p in model.parameters()))
"""


@pytest.mark.parametrize("operation", ["write", "read"])
def test_the_process_ends_although_calls_hang(operation, tmp_path):
    probe = [sys.executable, "-c", _PROBE, operation, str(tmp_path)]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=False)
    if operation == "write":
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "done True"), done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.rstrip().splitlines()[-1].startswith("hint: ")
        assert "ssdtrain_plugin.errors.LoadError: cannot load the activation" in done.stderr
