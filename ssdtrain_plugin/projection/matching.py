"""The tensors of a plan against the storages that a run saved, layer by layer.

Note [What is compared]. A trace knows a storage by its size and by the layer that saved it first. The plan knows
tensors. Planned tensors that may lie in one allocation (q, k and v of one product) match one storage of their sizes'
sum as well as one each. Layers are taken in their order, whatever a host calls them. What one layer lacks and another
one, or the rest, has too many of was only saved elsewhere: the output of an encoder belongs to whoever reads it first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssdtrain_plugin.projection.measurement import MeasuredSave
from ssdtrain_plugin.projection.stages import Group, Stage

__all__ = ["TensorComparison", "TensorDifference", "compare_tensors"]

REST = "outside of layers"


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """Tensors that only one side has.

    Attributes:
        is_planned: The plan has them and the run has not; else the other way round.
        name: Of the planned tensor, or of the module that saved.
        nbytes: Of one.
        count: How many, over all places.
        places: Layers of the run, or :data:`REST`.
    """

    is_planned: bool
    name: str
    nbytes: int
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """One micro-batch on one stage.

    Attributes:
        planned_bytes: Of all planned tensors.
        measured_bytes: Of all storages.
        num_tensors: Planned.
        num_storages: Saved: fewer, where several tensors are views of one.
        num_layers: Layers that were compared one by one; 0 if the names of the run did not tell them.
        differences: None are left out.
    """

    planned_bytes: int
    measured_bytes: int
    num_tensors: int
    num_storages: int
    num_layers: int
    differences: tuple[TensorDifference, ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    name: str
    nbytes: int
    allocation: str


class _Place:
    """A layer of both sides, or the rest: what each side has and the other has not."""

    def __init__(self, name: str, planned: Iterable[_Planned], saves: Iterable[MeasuredSave]) -> None:
        self.name = name
        self.missing: list[_Planned] = []
        self.surplus: dict[int, list[MeasuredSave]] = defaultdict(list)
        for save in saves:
            self.surplus[save.nbytes].append(save)
        allocations: dict[str, list[_Planned]] = defaultdict(list)
        for tensor in planned:
            if tensor.allocation:
                allocations[tensor.allocation].append(tensor)
            else:
                self._match(tensor)
        # Afterwards, so that one storage of a sum is not taken for another tensor of this size.
        for parts in allocations.values():
            if len(parts) == 1 or not self.take(sum(part.nbytes for part in parts)):
                for part in parts:
                    self._match(part)

    def take(self, nbytes: int) -> bool:
        """Use up one storage of a size, if there is one left."""
        return bool(self.surplus[nbytes]) and self.surplus[nbytes].pop() is not None

    def _match(self, tensor: _Planned) -> None:
        if not self.take(tensor.nbytes):
            self.missing.append(tensor)


def compare_tensors(stage: Stage, saves: Sequence[MeasuredSave]) -> TensorComparison:
    """Compare one micro-batch: Note [What is compared].

    Args:
        stage: Of the plan.
        saves: Of the run, in their order.
    """
    groups = {group.name: group for group in stage.groups}
    layers = [_tensors(groups[block.name], [index]) for index, block in enumerate(stage.blocks)]
    names = {block.name for block in stage.blocks}
    others = [group for group in stage.groups if group.name not in names]
    rest = [tensor for group in others for tensor in _tensors(group, range(group.count))]
    by_layer: dict[str, list[MeasuredSave]] = defaultdict(list)
    for save in saves:
        by_layer[save.layer].append(save)
    chosen = _layers_of(by_layer, layers)
    places = [_Place(name, planned, by_layer[name]) for name, planned in zip(chosen, layers, strict=False)]
    num_tensors = len(rest) + sum(map(len, layers))
    if not chosen:
        rest = [*(tensor for planned in layers for tensor in planned), *rest]
    unnamed = [save for name, own in by_layer.items() if name not in chosen for save in own]
    places.append(_Place(REST, rest, unnamed))
    _settle(places)
    return TensorComparison(
        planned_bytes=stage.saved_bytes,
        measured_bytes=sum(save.nbytes for save in saves),
        num_tensors=num_tensors,
        num_storages=len(saves),
        num_layers=len(chosen),
        differences=tuple(_differences(places)),
    )


def _tensors(group: Group, indices: Iterable[int]) -> list[_Planned]:
    # An allocation is that of one layer.
    return [
        _Planned(f"{group.name}.{tensor.name}", tensor.one_bytes, tensor.storage and f"{index}/{tensor.storage}")
        for index in indices
        for tensor in group.tensors
        for _ in range(tensor.count)
    ]


def _layers_of(by_layer: dict[str, list[MeasuredSave]], layers: Sequence[list[_Planned]]) -> list[str]:
    """Choose the names of the run that are layers: those that have most in common with one; none if too few have."""
    kinds = [Counter(tensor.nbytes for tensor in planned) for planned in layers]
    common = {}
    for name, saves in by_layer.items():
        own = Counter(save.nbytes for save in saves)
        common[name] = max(sum(nbytes * count for nbytes, count in (own & kind).items()) for kind in kinds)
    numbered = [name for name in by_layer if any(part.isdecimal() for part in name.split(".")) and common[name]]
    best = sorted(numbered, key=lambda name: -common[name])[: len(layers)]
    return [name for name in by_layer if name in best] if len(best) == len(layers) else []


def _settle(places: Sequence[_Place]) -> None:
    """Match what one place lacks with what another one has too many of."""
    for place in places:
        place.missing = [tensor for tensor in place.missing if not any(other.take(tensor.nbytes) for other in places)]


def _differences(places: Sequence[_Place]) -> Iterable[TensorDifference]:
    found: dict[tuple[bool, str, int], list[str]] = defaultdict(list)
    for place in places:
        for tensor in place.missing:
            found[True, tensor.name, tensor.nbytes].append(place.name)
        for saves in place.surplus.values():
            for save in saves:
                inside = "" if place.name == REST else save.module.removeprefix(save.layer).strip(".")
                name = inside or save.module or save.layer
                found[False, name, save.nbytes].append(place.name)
    for (is_planned, name, nbytes), where in found.items():
        yield TensorDifference(is_planned, name, nbytes, len(where), tuple(dict.fromkeys(where)))
