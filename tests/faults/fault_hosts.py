"""A small model under each host, with a fault that can be switched on and off."""

import contextlib
import functools
import gc
import hashlib
import os
import resource
import threading
import time
from pathlib import Path

import torch
from fault_cases import PLAIN
from training import SEED, settle
from workloads import WORKLOADS

from ssdtrain_plugin.runtime import Parts, attach_with
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan

_NUM_CALLS = 2000  # more than any case makes while its fault is on
_DELAY_SECONDS = 0.02
_LEFT_BYTES = 128 * 1024  # of the small file system
_FILE_LIMIT_BYTES = 64 * 1024
_NEVER_RETURNED_SECONDS = 10.0


class SwitchedPlan(FaultPlan):
    """A plan that counts calls only while it is on, and tells at once when it first does something."""

    def __init__(self, faults, on_first, **options):
        super().__init__(faults, **options)
        self.is_on = False
        self._on_first = on_first

    def draw(self, operation, nbytes, offset):
        drawn = super().draw(operation, nbytes, offset) if self.is_on else None
        if drawn is not None and self._on_first is not None:
            tell, self._on_first = self._on_first, None
            tell()
        return drawn


class Injected:
    """A fault of the plan."""

    def __init__(self, case, is_concerned, on_first):
        operation = {"store": "write", "load": "read"}[case.direction]
        starts = range(case.first, _NUM_CALLS, case.every) if case.every else (case.first,)
        faults = [
            Fault(FaultKind[case.kind], operation, first=start, count=case.count, seconds=_DELAY_SECONDS, is_zero=True)
            for start in starts
        ]
        self.plan = SwitchedPlan(faults, on_first)
        self.parts = Parts(wrap_engine=self.plan.wrap)
        self._is_concerned = is_concerned

    def before_attach(self):
        pass

    def begin(self):
        self.plan.is_on = self._is_concerned

    def stored(self):
        pass

    def end(self):
        self.plan.is_on = False
        self.plan.release()

    @property
    def num_injected(self):
        return len(self.plan.injected)


class Real:
    """Something that is done to the machine under the plugin; told as the first fault when it is done."""

    parts = Parts()

    def __init__(self, case, is_concerned, on_first, request):
        self._kind = case.kind
        self._is_concerned = is_concerned
        self._on_first = on_first
        self._request = request
        self._undo = contextlib.ExitStack()
        self.num_injected = 0
        self._has_begun = False

    def before_attach(self):
        if self._kind in _BEFORE:
            self._do(_BEFORE[self._kind])

    def begin(self):
        self._has_begun = True
        if self._is_concerned and self._kind in _ACTIONS:
            self._do(_ACTIONS[self._kind])

    def stored(self):
        if self._has_begun and self._is_concerned and self._kind == "truncated" and not self.num_injected:
            self._do(_truncate)

    def _do(self, action):
        action(self._request, self._undo)
        self.num_injected += 1
        self._on_first()

    def end(self):
        self._undo.close()


def _fill(request, undo, *, left_bytes, directory):
    filler = Path(directory) / f"filler{os.environ.get('RANK', '0')}"
    fd = os.open(filler, os.O_CREAT | os.O_WRONLY, 0o600)
    undo.callback(filler.unlink)
    undo.callback(os.close, fd)
    # The other rank may be filling too: who asks for all that is free may get none of it, so both ask for less then.
    length, share = 0, 1
    for _ in range(1000):
        space = os.fstatvfs(fd)
        left = space.f_bavail * space.f_frsize - left_bytes
        if left < 4096:
            return
        more = max(left // share // 4096 * 4096, 4096)
        try:
            os.posix_fallocate(fd, length, more)
        except OSError:
            share *= 2
        else:
            length, share = length + more, 1


def _fill_drive(request, undo):
    _fill(request, undo, left_bytes=_LEFT_BYTES, directory=request["mount"])


def _fill_behind(request, undo):
    _fill(request, undo, left_bytes=0, directory=request["outer"])


def _truncate(request, undo):
    os.truncate(request["image"], 0)


def _delete(request, undo):
    os.rmdir(_own_directory(request))


def _limit(which, soft, undo):
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    undo.callback(resource.setrlimit, which, before)


def _limit_files(request, undo):
    fd = os.dup(0)
    os.close(fd)
    _limit(resource.RLIMIT_NOFILE, fd, undo)


def _enter_group(request, undo):
    """What is allocated from now on counts there."""
    pid = str(os.getpid())
    Path(request["group"], "cgroup.procs").write_text(pid)
    undo.callback(Path(request["home"], "cgroup.procs").write_text, pid)


_BEFORE = {"no files": _limit_files, "small group": _enter_group}
_ACTIONS = {
    "group": _enter_group,
    "full": _fill_drive,
    "thin": _fill_behind,
    "deleted": _delete,
    "RLIMIT_FSIZE": lambda request, undo: _limit(resource.RLIMIT_FSIZE, _FILE_LIMIT_BYTES, undo),
    "RLIMIT_NOFILE": _limit_files,
}


def _own_directory(request):
    return Path(request["drive"]) / f"rank{os.environ.get('RANK', '0')}"


def make_fault(case, rank, on_first, request):
    is_concerned = case.ranks is None or request["host"] == PLAIN or rank in case.ranks
    if case.kind in FaultKind.__members__:
        return Injected(case, is_concerned, on_first)
    return Real(case, is_concerned, on_first, request)


def block_of(case, request):
    directory = _own_directory(request)
    directory.mkdir(exist_ok=True)
    return {"paths": [str(directory)], "policy": "all", "min_tensor_bytes": 1, **dict(case.options)}


class PlainHost:
    """`attach` on a small GPT with dropout."""

    def __init__(self, block=None, fault=None):
        self._workload = WORKLOADS["gpt dropout"]
        self._model = self._workload.build()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-2)
        self._hash = hashlib.sha256()
        self._number = 0
        self._fault = fault
        self.offloader, self.last = None, None
        if block is not None:
            fault.before_attach()
            self.offloader = attach_with(self._model, block, fault.parts)

    def step(self):
        """Train one step; return a digest of all losses and gradients so far."""
        torch.manual_seed(SEED + self._number)
        with self._workload.precision():
            loss = self._model(*self._workload.batch(self._number))
        self._number += 1
        if self.offloader is not None:
            settle(self.offloader)
            self._fault.stored()
        loss.backward()
        for tensor in (loss, *(p.grad for p in self._model.parameters() if p.grad is not None)):
            self._hash.update(tensor.detach().contiguous().numpy().tobytes())
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.offloader is not None:
            self.last = self.offloader.end_step()
        return self._hash.hexdigest()

    def close(self):
        if self.offloader is not None:
            self.offloader.detach()


class PipelineHost:
    """A DeepSpeed pipeline of two stages, every backward of which has to load."""

    def __init__(self, block=None, fault=None):
        import deepspeed_worker
        from deepspeed_cases import Case

        from ssdtrain_plugin.integrations import deepspeed as ssdtrain_ds

        self._fault = fault
        with contextlib.ExitStack() as undo:
            if fault is not None:
                _put_in(ssdtrain_ds, fault, undo)
            self._job = deepspeed_worker.Job(Case("", dropout=0.1, microbatches=3, num_blocks=2), block)
        self.offloader = ssdtrain_ds.offloader_of(self._job.engine)
        self.last = None
        if self.offloader is not None:
            self._keep_last(self.offloader)
            self._settle_after_forward(self._job.engine)

    def _keep_last(self, offloader):
        inner = offloader.end_step

        def end_step():
            self.last = inner()
            return self.last

        offloader.end_step = end_step

    def _settle_after_forward(self, engine):
        from deepspeed.runtime.pipe.schedule import ForwardPass

        inner = engine._INSTRUCTION_MAP[ForwardPass]

        def forward_pass(engine, **kwargs):
            inner(engine, **kwargs)
            settle(self.offloader)
            self._fault.stored()

        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ForwardPass: forward_pass}

    def step(self):
        self._job.step()
        return " ".join([*self._job.losses, self._job.gradients.hexdigest()])

    def close(self):
        if self.offloader is not None:
            self.offloader.detach()
            self.offloader.__dict__.pop("end_step", None)
        self._job.close()
        self.offloader = None
        gc.collect()


def _put_in(module, fault, undo):
    """Have `initialize` build with the parts of a fault, and tell the fault just before."""
    build, initialize = module.build, module.initialize

    def begin_and_initialize(*args, **kwargs):
        fault.before_attach()
        return initialize(*args, **kwargs)

    undo.callback(setattr, module, "build", build)
    undo.callback(setattr, module, "initialize", initialize)
    module.build = functools.partial(build, parts=fault.parts)
    module.initialize = begin_and_initialize


def wait_for_hung(offloader):
    """Return when every transfer that was given up has returned, so that its drive may be used again."""
    failures = offloader.cache._placer.failures
    deadline = time.monotonic() + _NEVER_RETURNED_SECONDS
    while any(not has_returned() for _, has_returned in failures._hanging):
        if time.monotonic() > deadline:
            raise TimeoutError("a call that was released has not returned")
        threading.Event().wait(0.01)
