"""Other people's ways of getting activations out of device memory, as strategies of the benchmarks.

Each is used as its documentation says. What is not installed, or does nothing on this device, is
left out with the reason. DeepSpeed is a host framework and comes from
:mod:`ssdtrain_plugin.integrations.deepspeed_peer`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from ssdtrain_plugin.bench.harness import Around, Strategy
from ssdtrain_plugin.bench.models import CallLayer

__all__ = ["DiskHooks", "LeftOut", "Peer", "Traffic", "open_peers"]

_LEAST_ELEMENTS = 1000
"""The threshold of PyTorch's tutorial: smaller tensors stay."""


@dataclass(slots=True)
class Traffic:
    """What a peer moved, in bytes.

    Attributes:
        stored_bytes: Out of device memory.
        loaded_bytes: Back.
    """

    stored_bytes: int = 0
    loaded_bytes: int = 0

    def take(self) -> tuple[int, int]:
        """Give both numbers and start again from zero."""
        taken = (self.stored_bytes, self.loaded_bytes)
        self.stored_bytes = self.loaded_bytes = 0
        return taken


@dataclass(frozen=True, slots=True)
class Peer:
    """One of them that runs here.

    Attributes:
        strategy: What it does.
        traffic: Counts its bytes; None if its own code does not let us.
        about: What a reader should know, in a sentence.
    """

    strategy: Strategy
    traffic: Traffic | None
    about: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One of them that does not.

    Attributes:
        name: As its strategy would be called.
        reason: Why.
    """

    name: str
    reason: str


class _File:
    """A tensor in a file of its own, which goes when the graph lets go of this."""

    def __init__(self, path: Path, tensor: Tensor) -> None:
        torch.save(tensor, path)
        self.path, self.nbytes = path, path.stat().st_size
        weakref.finalize(self, path.unlink, missing_ok=True)


class DiskHooks:
    """The save-to-disk recipe of PyTorch's tutorial on hooks for saved tensors, written anew.

    Each saved tensor is written to a file when autograd saves it and read when autograd wants it,
    by ``torch.save`` and ``torch.load``, while training waits.

    Args:
        folder: Gets a file a tensor.
        traffic: Counts the bytes of the files.
    """

    def __init__(self, folder: Path, traffic: Traffic) -> None:
        """Write nothing yet."""
        self._folder = folder
        self._traffic = traffic
        self._numbers = itertools.count()

    def pack(self, tensor: Tensor) -> Tensor | _File:
        """Write a tensor, unless it is small.

        Args:
            tensor: As autograd saves it.
        """
        if tensor.numel() < _LEAST_ELEMENTS:
            return tensor.detach()
        file = _File(self._folder / f"{next(self._numbers)}.pt", tensor.detach())
        self._traffic.stored_bytes += file.nbytes
        return file

    def unpack(self, packed: Tensor | _File) -> Tensor:
        """Read it back.

        Args:
            packed: Of :meth:`pack`.
        """
        if isinstance(packed, Tensor):
            return packed
        self._traffic.loaded_bytes += packed.nbytes
        tensor: Tensor = torch.load(packed.path, weights_only=True)
        return tensor

    def around(self) -> saved_tensors_hooks:
        """Make the context of one forward."""
        return saved_tensors_hooks(self.pack, self.unpack)


@contextlib.contextmanager
def open_peers(path: str, device: torch.device, others: dict[str, CallLayer | str]) -> Iterator[list[Peer | LeftOut]]:
    """Make all peers ready, and take away at the end what they left.

    Args:
        path: A directory on the drive, for the files of the recipe.
        device: Where training runs.
        others: What hosts offer: by name the function that runs a layer, or why there is none.

    Yields:
        Those that run here, and why the others do not.
    """
    with tempfile.TemporaryDirectory(dir=path, prefix="ssdtrain-peer-") as folder:
        on_disk = Traffic()
        disk = DiskHooks(Path(folder), on_disk)
        yield [
            _save_on_cpu(device),
            Peer(
                Strategy("disk hooks", around=disk.around),
                on_disk,
                "the save-to-disk recipe of PyTorch's tutorial: torch.save and torch.load of each tensor, waiting",
            ),
            _offload_context("TRL", "trl", "trl.models.activation_offloading", device),
            _offload_context("torchtune", "torchtune", "torchtune.training", device),
            *(_layer_runner(name, offer) for name, offer in others.items()),
        ]


def _save_on_cpu(device: torch.device) -> Peer:
    about = "torch.autograd.graph.save_on_cpu: copies each saved tensor, weights too, to host memory and waits"
    if device.type == "cpu":
        # `tensor.cpu()` of a CPU tensor is the tensor itself.
        return Peer(Strategy("save_on_cpu", around=save_on_cpu), Traffic(), f"{about}; on a CPU it copies nothing")
    traffic = Traffic()
    return Peer(Strategy("save_on_cpu", around=lambda: _counted(save_on_cpu(pin_memory=True), traffic)), traffic, about)


def _counted(hooks: saved_tensors_hooks, traffic: Traffic) -> saved_tensors_hooks:
    """Count what hooks copy, without changing what they do."""
    pack, unpack = hooks.pack_hook, hooks.unpack_hook

    def pack_counted(tensor: Tensor) -> Any:
        traffic.stored_bytes += tensor.nbytes
        return pack(tensor)

    def unpack_counted(packed: Any) -> Tensor:
        tensor = unpack(packed)
        traffic.loaded_bytes += tensor.nbytes
        return tensor

    hooks.pack_hook, hooks.unpack_hook = pack_counted, unpack_counted
    return hooks


def _offload_context(name: str, package: str, module: str, device: torch.device) -> Peer | LeftOut:
    """Find an ``OffloadActivations``; both packages have one of the same origin."""
    name = f"{name} OffloadActivations"
    if device.type != "cuda":
        return LeftOut(
            name, f"it moves tensors off accelerators only, and asks for one when it is made; this is {device}"
        )
    if importlib.util.find_spec(package) is None:
        return LeftOut(name, f"{package} is not installed")
    try:
        context: Around = importlib.import_module(module).OffloadActivations
    except (ImportError, AttributeError) as error:
        return LeftOut(name, f"{module}.OffloadActivations cannot be imported: {error}")
    return Peer(
        Strategy(name, around=context), None, f"{module}.OffloadActivations: to host memory on a stream of its own"
    )


def _layer_runner(name: str, offer: CallLayer | str) -> Peer | LeftOut:
    if isinstance(offer, str):
        return LeftOut(name, offer)
    return Peer(Strategy(name, run_layer=offer), None, "recomputes each layer from inputs that it moves to host memory")
