"""The part of kvikio's interface that the engine ``gds`` uses, on CPU tensors and real files.

kvikio moves nothing where there is no CUDA driver. This stands in for release 26.10: the
names, the signatures and the ways of failing are the real ones, as its documentation and
sources give them.

- ``CuFile(path, flags)`` opens the file by its path, twice, and owns the descriptors until
  ``close``. ``"r+"`` opens for reading and writing, ``"w"`` and ``"w+"`` cut the file to
  nothing, others are refused. Where libcufile refuses the file, the compatibility mode ``OFF``
  raises and ``AUTO`` says nothing.
- ``pread`` and ``pwrite`` take a buffer on a device, a size and an offset in the file, and
  return a future whose ``get`` gives the bytes moved, perhaps fewer than asked for. Errors
  are ``RuntimeError``, with the system's text inside; a size beyond the buffer is ``ValueError``.
- ``defaults.get(name)`` and ``defaults.set(name, value)``; what ``set`` returns undoes it
  when used in a ``with`` statement. Unknown names are ``KeyError``.
- ``defaults.is_compat_mode_preferred()``, ``cufile_driver.get("is_gds_available")`` and
  ``cufile_driver.libcufile_version()``.

What the real one does besides (splitting in tasks, streams, statistics) is not here.
"""

import contextlib
import ctypes
import enum
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch


class CompatMode(enum.Enum):
    OFF = 0
    ON = 1
    AUTO = 2


class DeviceTensor(torch.Tensor):
    """Host memory that says it is on a CUDA device, as do its slices."""

    is_cuda = True
    is_cpu = False
    device = torch.device("cuda", 1)

    @classmethod
    def of(cls, tensor):
        return tensor.as_subclass(cls)

    def on_host(self):
        return self.as_subclass(torch.Tensor)


class FakeKvikio:
    """What the fake does next, and what was asked of it.

    Attributes:
        settings: Of ``kvikio.defaults``, by name.
        is_preferred: kvikio would use its compatibility mode.
        is_gds_available: The kernel module is loaded.
        libcufile_version: (0, 0) if libcufile does not load.
        refusal: What libcufile says about every file, or None.
        limit_bytes: Transfers move so many bytes at most and say so.
        error: What the next transfers raise, or None.
        calls: (name, size, offset) of each transfer.
        devices: What was the current device at each transfer.
        open_files: Those that were not closed.
    """

    def __init__(self):
        self.settings = {
            "compat_mode": CompatMode.AUTO,
            "num_threads": 1,
            "gds_threshold": 16 * 1024,
            "auto_direct_io_read": False,
            "auto_direct_io_write": True,
        }
        self.is_preferred = False
        self.is_gds_available = True
        self.libcufile_version = (1, 13)
        self.refusal = None
        self.limit_bytes = None
        self.error = None
        self.calls, self.devices, self.open_files = [], [], []
        self._current_device = None

    def install(self, monkeypatch):
        """Be ``kvikio`` for one test, and make it possible to say ``torch.cuda.device``."""
        package = _module("kvikio", CompatMode=CompatMode, CuFile=lambda path, flags="r": CuFile(self, path, flags))
        package.defaults = _module(
            "kvikio.defaults",
            get=lambda name: self.settings[name],
            set=self._set,
            is_compat_mode_preferred=lambda: self.is_preferred,
        )
        package.cufile_driver = _module(
            "kvikio.cufile_driver",
            get=lambda name: {"is_gds_available": self.is_gds_available}[name],
            libcufile_version=lambda: self.libcufile_version,
        )
        for module in (package, package.defaults, package.cufile_driver):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(torch.cuda, "device", self._device)
        return self

    @contextlib.contextmanager
    def _device(self, device):
        before, self._current_device = self._current_device, device
        try:
            yield
        finally:
            self._current_device = before

    def _set(self, name, value):
        before = self.settings[name]
        self.settings[name] = value

        class Undo(contextlib.AbstractContextManager):
            def __exit__(undo, *_):  # noqa: N805
                self.settings[name] = before

        return Undo()

    def count(self, name, size, offset):
        """Note a transfer and say how much of it happens."""
        self.calls.append((name, size, offset))
        self.devices.append(self._current_device)
        if self.error is not None:
            raise self.error
        return size if self.limit_bytes is None else min(size, self.limit_bytes)


class CuFile:
    def __init__(self, fake, path, flags):
        modes = {"r": os.O_RDONLY, "r+": os.O_RDWR, "w": os.O_WRONLY | os.O_TRUNC, "w+": os.O_RDWR | os.O_TRUNC}
        if flags not in modes:
            raise ValueError("Unknown file open flag")
        if fake.refusal is not None and fake.settings["compat_mode"] is CompatMode.OFF:
            raise RuntimeError(fake.refusal)
        try:
            self._fd = os.open(path, modes[flags] | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"Unable to open file.: {error.strerror}") from error
        self._direct_fd = os.open(path, (modes[flags] & ~os.O_TRUNC) | os.O_CLOEXEC | os.O_DIRECT)
        self._fake = fake
        fake.open_files.append(self)

    def close(self):
        if self in self._fake.open_files:
            self._fake.open_files.remove(self)
            os.close(self._fd)
            os.close(self._direct_fd)

    def pread(self, buf, size=None, file_offset=0, task_size=None):
        return self._start("pread", os.preadv, buf, size, file_offset)

    def pwrite(self, buf, size=None, file_offset=0, task_size=None):
        return self._start("pwrite", os.pwritev, buf, size, file_offset)

    def _start(self, name, call, buf, size, offset):
        assert buf.is_cuda, "the fake is for device memory"
        assert self in self._fake.open_files, "the file is closed"
        size = buf.numel() if size is None else size
        if size > buf.numel():
            raise ValueError("Size is greater than the size of the buffer")
        return Future(lambda: self._move(name, call, buf, size, offset))

    def _move(self, name, call, buf, size, offset):
        count = self._fake.count(name, size, offset)
        if count == 0:
            return 0
        return call(self._fd, [(ctypes.c_char * count).from_address(buf.data_ptr())], offset)


class Future:
    def __init__(self, work):
        self._work = work

    def get(self):
        return self._work()


def _module(name, **names):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(names)
    return module
