"""The only device streams and events of the package, and their CPU twin.

Note [Ordering on the device]. A store may read a tensor only after the kernels
that write it: ``record`` marks that point on the compute stream and the copy
stream waits for it. A load may write its target only after the compute stream
has reached the allocation of that target (its block may still be read by
kernels queued before), and the compute stream may read it only after the copy.
The host waits in worker threads alone; the compute stream waits for events.

On CPU every operation is finished when the call returns, so the twin's events
are complete by construction and its copies are plain memory copies. The code
above this module takes one path for both.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["CpuStreams", "CudaStreams", "DeviceEvent", "Mark", "Streams", "create_streams"]


# cudaHostRegisterPortable: pinned for every device of the process.
_PORTABLE = 1


class DeviceEvent:
    """A point in a stream's work. This base class is the CPU twin: always reached."""

    def wait(self) -> None:
        """Make the calling thread's current compute stream wait; the host goes on."""

    def synchronize(self) -> None:
        """Make the host wait. Called in worker threads only."""


class Mark:
    """A point in a stream's work whose time is known later. This base class is the CPU twin: the host's clock."""

    def __init__(self) -> None:
        """Read the clock."""
        self._seconds = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float | None:
        """Tell the time between two marks of one device.

        Args:
            earlier: Made before this one.

        Returns:
            Seconds; None if the device has not reached this mark.
        """
        return self._seconds - earlier._seconds


class Streams(ABC):
    """The streams of one device.

    Threads:
        ``record`` belongs to the thread that computes; ``copy`` to
        the workers. All may run at the same time.
    """

    @abstractmethod
    def record(self) -> DeviceEvent:
        """Mark the present end of the calling thread's compute stream."""

    @abstractmethod
    def mark(self) -> Mark:
        """Mark the present end of the calling thread's compute stream, to measure time."""

    def is_capturing(self) -> bool:
        """Tell whether a CUDA graph is being captured; what is saved then must stay where it is."""
        return False

    @abstractmethod
    def copy_to_host(self, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        """Copy device bytes to host memory on a side stream.

        Args:
            target: (n,), uint8, host memory; pinned if the device is CUDA.
            source: (n,), uint8, on this device, contiguous.
            after: The copy starts after this event.

        Returns:
            An event reached when ``target`` holds the bytes.
        """

    @abstractmethod
    def copy_to_device(self, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        """Copy host bytes to device memory on a side stream.

        Args:
            target: (n,), uint8, on this device, contiguous.
            source: (n,), uint8, host memory; must stay unchanged until the event.
            after: The copy starts after this event.

        Returns:
            An event reached when ``target`` holds the bytes.
        """

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> None:
        """Page-lock host memory for direct access by the device; nothing on CPU.

        Args:
            address: Start of the memory.
            nbytes: Its length.
        """

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo :meth:`pin`.

        Args:
            address: Start of the memory, as given to :meth:`pin`.
        """


class CpuStreams(Streams):
    """The CPU twin: copies at once, events already reached."""

    _REACHED = DeviceEvent()

    def record(self) -> DeviceEvent:
        """Return an event that is already reached: CPU operations end before they return."""
        return self._REACHED

    def mark(self) -> Mark:
        """Read the clock: CPU operations end before they return."""
        return Mark()

    def copy_to_host(self, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        """Copy memory to memory; see :meth:`Streams.copy_to_host`."""
        # memmove, not Tensor.copy_: the latter starts an OpenMP team per worker
        # thread, which competes with the training threads for the cores.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        return self._REACHED

    def copy_to_device(self, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        """Copy memory to memory; see :meth:`Streams.copy_to_device`."""
        return self.copy_to_host(target, source, after)

    def pin(self, address: int, nbytes: int) -> None:
        """Do nothing: no device needs the pages locked."""

    def unpin(self, address: int) -> None:
        """Do nothing, as :meth:`pin` did."""


class _CudaEvent(DeviceEvent):
    """A CUDA event recorded on one stream of one device."""

    __slots__ = ("_device", "_event")

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        # Timing needs a heavier event; blocking lets a waiting worker sleep.
        self._event = torch.cuda.Event(enable_timing=False, blocking=True)
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()

    def gate(self, stream: torch.cuda.Stream) -> None:
        """Make ``stream`` wait for this event."""
        stream.wait_event(self._event)


class _CudaMark(Mark):
    """A CUDA event that keeps the time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def seconds_since(self, earlier: Mark) -> float | None:
        if not isinstance(earlier, _CudaMark) or not self._event.query():
            return None
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaStreams(Streams):
    """One side stream a direction, so that stores never queue behind loads.

    Args:
        device: The CUDA device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        """Create both side streams on ``device``."""
        self._device = device
        self._store_stream = torch.cuda.Stream(device)
        self._load_stream = torch.cuda.Stream(device)

    def record(self) -> DeviceEvent:
        """Record an event on the current compute stream."""
        return _CudaEvent(self._device, torch.cuda.current_stream(self._device))

    def mark(self) -> Mark:
        """Record a timing event on the current compute stream."""
        return _CudaMark(torch.cuda.current_stream(self._device))

    def is_capturing(self) -> bool:
        """Ask CUDA; see :meth:`Streams.is_capturing`."""
        return torch.cuda.is_current_stream_capturing()

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            if isinstance(after, _CudaEvent):
                after.gate(stream)
            target.copy_(source, non_blocking=True)
            return _CudaEvent(self._device, stream)

    def copy_to_host(self, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        """Copy on the store stream; see :meth:`Streams.copy_to_host`."""
        return self._copy(self._store_stream, target, source, after)

    def copy_to_device(self, target: Tensor, source: Tensor, after: DeviceEvent) -> DeviceEvent:
        """Copy on the load stream; see :meth:`Streams.copy_to_device`."""
        return self._copy(self._load_stream, target, source, after)

    def pin(self, address: int, nbytes: int) -> None:
        """Register the memory with the CUDA driver.

        Raises:
            RuntimeError: The driver refused, for example because of the memlock limit.
        """
        with torch.cuda.device(self._device):  # workers would else open a context on device 0
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE)))

    def unpin(self, address: int) -> None:
        """Unregister memory given to :meth:`pin`."""
        with torch.cuda.device(self._device):
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


def create_streams(device: torch.device) -> Streams:
    """Build the streams that fit ``device``.

    Args:
        device: ``cpu`` or a CUDA device with an index.
    """
    return CudaStreams(device) if device.type == "cuda" else CpuStreams()
