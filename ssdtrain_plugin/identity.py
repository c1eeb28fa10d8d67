"""What is this tensor: which storage, which bytes of it, and is it a parameter?

Note [Identity]. Addresses and ``id()`` are reused and wall clocks collide, so a
record has a serial and holds a ``StorageWeakRef``: while the weak reference is
held, the address of the storage object is given to no other one
(SSDTrain, section III-B, binds a timestamp instead; two halves of one SwiGLU
storage then collide, because the offset is not part of the identity).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

__all__ = [
    "ResidentStorages",
    "Span",
    "TensorView",
    "is_parameter",
    "is_plain",
    "owner_of",
    "revive",
    "span_of",
    "version_probe",
]

# A load target starts on a multiple of this, so a span that starts on one keeps
# the alignment that vectorised kernels saw; their sums may depend on it.
SPAN_ALIGNMENT_BYTES = 4096

# A view that spans less than this share of its storage is stored alone.
WHOLE_STORAGE_SHARE = 0.25

_LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})
_LOW_PRECISION_BYTES = 2

_NO_BYTES = torch.empty(0)
_CASTS_AND_VIEWS = frozenset(
    {
        "AliasBackward0",
        "ExpandBackward0",
        "PermuteBackward0",
        "ReshapeAliasBackward0",
        "TBackward0",
        "ToCopyBackward0",
        "TransposeBackward0",
        "UnsafeViewBackward0",
        "ViewBackward0",
    }
)


class TensorView(NamedTuple):
    """How one saved tensor looks at its storage.

    Attributes:
        dtype: Element type.
        shape: Sizes.
        stride: Strides in elements.
        storage_offset: First element, counted from the start of the storage.
    """

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorView:
        """Read the view of a strided tensor."""
        return cls(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def apply(self, storage: torch.UntypedStorage, first_byte: int) -> Tensor:
        """Build the tensor again.

        Args:
            storage: Holds the bytes of the original storage from ``first_byte`` on.
            first_byte: A multiple of the element size.

        Returns:
            A tensor with the dtype, shape and strides of the saved one.
        """
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        offset = self.storage_offset - first_byte // self.dtype.itemsize
        return tensor.set_(storage, offset, self.shape, self.stride)


class Span(NamedTuple):
    """A range of bytes of a storage.

    Attributes:
        first_byte: Start, a multiple of ``SPAN_ALIGNMENT_BYTES``.
        nbytes: Length.
    """

    first_byte: int
    nbytes: int

    def bytes_of(self, storage: torch.UntypedStorage) -> Tensor:
        """View the span of a storage as (nbytes,) uint8.

        Args:
            storage: The whole one.
        """
        tensor = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return tensor.set_(storage, self.first_byte, (self.nbytes,), (1,))

    def covers(self, other: Span) -> bool:
        """Tell whether all bytes of ``other`` are in this span."""
        return self.first_byte <= other.first_byte and other.first_byte + other.nbytes <= self.first_byte + self.nbytes


def span_of(tensor: Tensor, storage_bytes: int) -> Span:
    """Find the bytes to store for a view.

    Args:
        tensor: Any shape and non-negative strides, at least one element.
        storage_bytes: Size of its whole storage.

    Returns:
        The whole storage, unless the view spans less than ``WHOLE_STORAGE_SHARE`` of it.
        Gathering the elements would change the strides, and with them perhaps the
        kernel and the last bit of the result, so holes are stored too.
    """
    if tensor.nbytes >= WHOLE_STORAGE_SHARE * storage_bytes:
        return Span(0, storage_bytes)
    itemsize = tensor.dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * itemsize
    end = start + (last + 1) * itemsize
    first = start - start % SPAN_ALIGNMENT_BYTES
    if end - first >= WHOLE_STORAGE_SHARE * storage_bytes:
        return Span(0, storage_bytes)
    return Span(first, end - first)


def version_probe(tensor: Tensor) -> Tensor:
    """Make an object that sees in-place changes of ``tensor`` and holds none of its bytes.

    ``detach`` shares the version counter; setting ``data`` swaps the storage and
    keeps the counter. So ``probe._version`` follows the tensor after its bytes
    have left memory, as autograd's own check would.

    Args:
        tensor: Any strided tensor.

    Returns:
        A tensor without elements.
    """
    probe = tensor.detach()
    probe.data = _NO_BYTES if probe.device.type == "cpu" else probe.new_empty(0)
    return probe


def owner_of(tensor: Tensor) -> Tensor:
    """Get the tensor object that stands for a version counter: the base of a view, or the tensor itself.

    Tensors of one storage may have a counter each: ``x.data`` has, and so have the
    chunks that aten's recurrent cells cut and then change in place. Their numbers
    say nothing about each other. A base and its views share one counter, and torch
    gives the same Python object for the same tensor as long as it lives.
    """
    base = tensor._base
    return tensor if base is None else base


def revive(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """Get the storage back while something else still holds it.

    Args:
        reference: Of any storage.

    Returns:
        The storage, or None when its bytes are gone.
    """
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return storage


def is_plain(tensor: Tensor) -> bool:
    """Tell whether dtype, shape, strides and offset describe the tensor fully.

    Subclasses, sparse and nested layouts, lazily conjugated or negated views, zero
    tensors without bytes and functorch wrappers hold more or less than bytes: they
    are kept.
    """
    return (
        (type(tensor) is Tensor or type(tensor) is Parameter)
        and tensor.layout is torch.strided
        and not (tensor.dtype.is_complex and tensor.is_conj())
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_parameter(tensor: Tensor) -> bool:
    """Tell whether a saved tensor is a weight: the Parameter, or a view whose base is one (``weight.t()``).

    Storage pointers do not tell: under ZeRO-3 they come and go. The third form, a copy
    in another type, is for :meth:`ResidentStorages.has_cast`.
    """
    base = owner_of(tensor)
    kind = type(base)
    # Parameter's own isinstance runs Python code; most tensors are exactly Tensor.
    return kind is Parameter or (kind is not Tensor and isinstance(base, Parameter))


def _extent_of(tensor: Tensor) -> tuple[int, bool]:
    """Get what views of a whole matrix do not change: its elements, and that it is no vector."""
    return tensor.numel(), tensor.dim() > 1


def _leads_to_parameter(tensor: Tensor) -> bool:
    node = tensor.grad_fn
    if node is None or node.name() not in _CASTS_AND_VIEWS:
        return False
    while node is not None and node.name() in _CASTS_AND_VIEWS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), Parameter)


class ResidentStorages:
    """Storages that live as long as the model and never move: parameters and buffers.

    Note [Nodes that were looked at]. Once Python has seen the ``grad_fn`` of a tensor, torch
    frees that node by recursion: a chain of some ten thousand, as a long recurrent loop
    makes, then overflows the stack and kills the process. So ``grad_fn`` is read of
    tensors only that look like the copy which autocast makes of a weight: of two bytes an
    element, computed, and with as many elements as a parameter that has more (weights of
    experts are one matrix, of which a view is cast). Whether autocast is on cannot be asked:
    inside of the operator that saves, it is off.

    Threads:
        Not safe to change; safe to ask.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._references: dict[int, StorageWeakRef] = {}
        self._wide_extents: set[tuple[int, bool]] = set()
        self._has_unknown_extents = False

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Remember the storages of some tensors.

        Args:
            tensors: Any device and dtype; held weakly.
        """
        for tensor in tensors:
            if isinstance(tensor, Parameter) and tensor.dtype.itemsize > _LOW_PRECISION_BYTES:
                self._wide_extents.add(_extent_of(tensor))
                self._has_unknown_extents |= not tensor.numel()  # a part of one, under ZeRO-3
            if is_plain(tensor):
                storage = tensor.untyped_storage()
                self._references[storage._cdata] = StorageWeakRef(storage)

    def has_cast(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a low-precision copy of a weight, or a view of one, as autocast makes it.

        Args:
            tensor: Being saved. Its ``grad_fn`` then leads through casts and views to the
                ``AccumulateGrad`` of a Parameter. See Note [Nodes that were looked at].
        """
        base = owner_of(tensor)
        if not self._wide_extents or base.dtype not in _LOW_PRECISION or base.is_leaf:
            return False
        return (self._has_unknown_extents or _extent_of(base) in self._wide_extents) and _leads_to_parameter(base)

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether a storage was added."""
        return storage._cdata in self._references
