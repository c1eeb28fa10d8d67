"""One account of live saved bytes for all strategies, whoever's hooks they use.

Note [One account for all]. The plugin counts what it holds, but other people's hooks do not,
and neither does recomputation. So the benchmark looks at what autograd gives to any pack hook and
gets from any unpack hook: :class:`torch.autograd.graph.saved_tensors_hooks` is the one door to all
of them, torch's own checkpoint included. The storages seen there are watched weakly, and those
that are alive count, whoever keeps them alive. Where nobody has hooks, the meter has its own, in
backward too, so that what a recomputation saves is seen. What a strategy copied elsewhere, to host
memory or into a file, is not on the device and does not count until it comes back through unpack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.identity import ResidentStorages, is_parameter, is_plain

__all__ = ["SavedBytesMeter"]


class SavedBytesMeter:
    """Watches the storages that autograd saves and uses; weights and buffers are none.

    Threads:
        One at a time, as forward and backward are.

    Args:
        model: Whose weights and buffers do not count.

    Attributes:
        live_bytes: Of the storages seen that are alive.
        peak_bytes: Highest ``live_bytes`` since :meth:`restart`, looked at when something is saved or used.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch nothing yet."""
        self._resident = ResidentStorages()
        self._resident.add((*model.parameters(), *model.buffers()))
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def restart(self) -> None:
        """Forget all storages and the peak."""
        self._seen.clear()
        self.live_bytes = self.peak_bytes = 0

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor from now on.

        Args:
            tensor: As autograd gave or got it.
        """
        self._settle()
        if is_plain(tensor) and not is_parameter(tensor):
            storage = tensor.untyped_storage()
            # Its address is its name: the weak reference keeps it from being given to another one.
            is_known = storage in self._resident or self._resident.has_cast(tensor)
            if not is_known and storage._cdata not in self._seen:
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _settle(self) -> None:
        for key in [key for key, (reference, _) in self._seen.items() if reference.expired()]:
            self.live_bytes -= self._seen.pop(key)[1]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what is saved and used inside, in forward and in backward; see Note [One account for all]."""
        enter = saved_tensors_hooks.__enter__

        def enter_seen(hooks: saved_tensors_hooks) -> None:
            pack, unpack = hooks.pack_hook, hooks.unpack_hook

            def pack_seen(tensor: Tensor) -> Any:
                self.see(tensor)
                return pack(tensor)

            def unpack_seen(packed: Any) -> Tensor:
                tensor = unpack(packed)
                self.see(tensor)
                return tensor

            hooks.pack_hook, hooks.unpack_hook = pack_seen, unpack_seen
            try:
                enter(hooks)
            finally:
                hooks.pack_hook, hooks.unpack_hook = pack, unpack

        saved_tensors_hooks.__enter__ = enter_seen  # type: ignore[method-assign]
        try:
            # Without detach, a saved output would hold its own graph, in a cycle.
            with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
                yield
        finally:
            saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
