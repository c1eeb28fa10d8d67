"""A training process that ends in one of many ways, with work in flight: ``ending_worker.py WAY DIRECTORY [NUMBER]``.

It ends when a graph is alive, stores have begun and their worker threads are inside of a write. Before it begins to
end it prints ``ends at`` and the time, and ``ended at`` after the last of our finalizers. With
``SSDTRAIN_TEST_NAMES`` set, the file system is made to want a name for every file.
"""

import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import weakref

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ssdtrain_plugin.runtime import Parts, attach_with
from ssdtrain_plugin.storage import scratch
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan

SIZE = 256
held = []  # until the interpreter ends
CONFIG = {"policy": "all", "min_tensor_bytes": 1, "disk_bytes": "64 MiB", "io_threads": 2}


class UsersOwnError(Exception):
    """What a user's code raises."""


class Raises(nn.Module):
    """Raises in forward on command."""

    def __init__(self):
        super().__init__()
        self.is_armed = False

    def forward(self, x):
        if self.is_armed:
            raise UsersOwnError("this is what the user must see")
        return x


class Numbers(Dataset):
    """Random inputs."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((SIZE,), float(index))


def say(what):
    """Print an instant by a clock that all processes of a machine share."""
    sys.stdout.write(f"{what} {time.monotonic()}\n")
    sys.stdout.flush()


def want_names():
    """Refuse files without a name, as an old overlayfs and some FUSE do."""
    real = os.open

    def fake(path, flags, mode=0o777, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real(path, flags, mode, **options)

    os.open = fake
    scratch._works_unlinked = lambda fd: False


def build():
    torch.manual_seed(1)
    layers = [layer for _ in range(4) for layer in (nn.Linear(SIZE, SIZE), nn.Tanh())]
    return nn.Sequential(*layers, Raises())


def train(model, x):
    loss = model(x).square().sum()
    loss.backward()
    return loss


def killed_by(number, operation):
    """Make an engine that is killed in its n-th call, when half of the bytes have moved."""
    lock, calls = threading.Lock(), [0]

    def wrap(engine):
        real = getattr(engine, operation)

        def call(memory, nbytes, offset):
            with lock:
                calls[0] += 1
                is_last = calls[0] == number
            if is_last:
                real(memory, nbytes // 2 // 4096 * 4096 or nbytes, offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(memory, nbytes, offset)

        setattr(engine, operation, call)
        return engine

    return wrap


def train_until_killed(directory, number):
    operation = "write" if number % 2 else "read"
    model = build()
    offloader = attach_with(model, CONFIG | {"paths": directory}, Parts(wrap_engine=killed_by(number, operation)))
    while True:
        loss = model(torch.randn(SIZE, SIZE)).square().sum()
        offloader.cache._queue.wait_idle()  # so that backward must load
        loss.backward()


def load_in_workers(model, offloader, method):
    """Use the data loader's workers while stores are in flight."""
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context=method)
    for batch in loader:
        train(model, batch.repeat(SIZE // 4, 1))
    say("ends at")
    offloader.detach()


def in_a_child(model):
    """Train a model that came through a pickle."""
    train(model, torch.ones(SIZE, SIZE))


def give_to_child(model, offloader):
    child = multiprocessing.get_context("spawn").Process(target=in_a_child, args=(model,))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(child.exitcode)
    plain = pickle.loads(pickle.dumps(model))
    x = torch.ones(SIZE, SIZE)
    train(plain, x)
    model.zero_grad()
    train(model, x)
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)
    say("ends at")
    offloader.detach()


def raise_in_forward(model):
    model[-1].is_armed = True
    model(torch.randn(SIZE, SIZE))


def hang_on_two_drives(directory):
    """Leave two models to the end of the interpreter, with system calls that hang, and zeros to be written."""
    paths = [os.path.join(directory, name) for name in ("one", "two")]
    for path in paths:
        os.mkdir(path)
    options = CONFIG | {"paths": paths, "zero_on_free": True}
    models = [build(), build()]
    offloaders = [attach_with(model, options, None) for model in models]
    inside = threading.Semaphore(0)

    def hang(*_):
        inside.release()
        threading.Event().wait()

    os.pwritev = hang
    losses = []
    for model in models:
        losses.append(model(torch.randn(SIZE, SIZE)).square().sum())
        inside.acquire()
    say("ends at")
    return offloaders, losses


def end(way, model, offloader, goes_on):
    if way not in ("fork", "spawn", "given to a child"):  # these have work to do before
        say("ends at")
    if way == "exit":
        return
    if way == "detach":
        goes_on.set()
        offloader.detach()
    elif way == "exception":
        raise_in_forward(model)
    elif way == "_exit":
        os._exit(3)
    elif way == "sys.exit":
        sys.exit(4)
    elif way == "SIGTERM handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        os.kill(os.getpid(), signal.SIGTERM)
    elif way.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[way])
    else:
        goes_on.set()
        if way == "given to a child":
            give_to_child(model, offloader)
        else:
            load_in_workers(model, offloader, way)


def main(way, directory, number="0"):
    # A shell that starts the tests in the background has them ignore Ctrl-C, and their children with them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("SSDTRAIN_TEST_NAMES"):
        want_names()
    if way == "killed":
        train_until_killed(directory, int(number))
        return
    if way == "clean":
        model = build()
        with attach_with(model, CONFIG | {"paths": directory}, None):
            train(model, torch.randn(SIZE, SIZE))
            say("ends at")
        return
    if way == "two drives that hang":
        held.append(hang_on_two_drives(directory))
        return
    inside, goes_on = threading.Semaphore(0), threading.Event()

    def hang():
        inside.release()
        goes_on.wait()

    plan = FaultPlan([Fault(FaultKind.HANG, "write", first=2)], hang=hang)
    model = build()
    offloader = attach_with(model, CONFIG | {"paths": directory}, Parts(wrap_engine=plan.wrap))
    loss = model(torch.randn(SIZE, SIZE)).square().sum()
    for _ in range(CONFIG["io_threads"]):
        inside.acquire()
    end(way, model, offloader, goes_on)
    del loss


if __name__ == "__main__":
    weakref.finalize(say, say, "ended at")  # the first one, so it is called last
    main(*sys.argv[1:])
