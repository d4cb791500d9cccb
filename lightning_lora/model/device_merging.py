"""Merge and unmerge the layers of a model that are on a device other than the CPU, with one wait a verb for all layers.

All layers begin, then the host reads the device's checks, then all layers are completed. The first complete reads the
checks of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from ..distributed.rank_sync import RankSync
from ..distributed.sharding import local
from ..errors import NonFiniteError
from ..nn.adapted_weights import AdaptedWeights, Blocks, complete_layer_, restore_layer_
from ..nn.device_merge import Observer, Prepared
from ..nn.merge_batches import Batch, Item, batches
from ..nn.merge_checks import Checks

Weights = Mapping[str, torch.Tensor]  # of a layer, by name


class _Planned(NamedTuple):
    name: str
    layer: AdaptedWeights
    weights: Weights
    blocks: Blocks
    copy: bool
    observe: Observer | None


class DeviceMerge:
    """The layers of one merge that are on a device."""

    def __init__(self) -> None:
        self.planned: list[_Planned] = []
        self.batches: dict[object, tuple[Batch, int]] = {}  # by layer and weight name
        self.checks = Checks()

    def add(
        self,
        name: str,
        layer: AdaptedWeights,
        weights: Weights,
        blocks: Blocks,
        copy: bool,
        observe: Observer | None,
    ) -> None:
        """Plan to merge a layer. Arguments beside its name are those of AdaptedWeights.merge_."""
        self.planned.append(_Planned(name, layer, weights, blocks, copy, observe))

    def merge_(self, sync: RankSync) -> None:
        """Merge the planned layers. In place.

        Args:
            sync: keeps the failure of a layer, and then no other layer is merged.
        """
        self.batches = batches(item for each in self.planned if each.copy for item in _items(each))
        for each in self.planned:
            sync.run(f"merge: layer {each.name!r}", self._begin_, each)
        for each in self.planned:
            sync.run(f"merge: layer {each.name!r}", _complete_, each)

    def _begin_(self, each: _Planned) -> None:
        prepared = {name: self._take(each, name) for name in each.blocks if (each.layer, name) in self.batches}
        each.layer.merge_(
            weights=each.weights,
            blocks=each.blocks,
            copy=each.copy,
            observe=each.observe,
            checks=self.checks,
            prepared=prepared,
        )

    def _take(self, each: _Planned, name: str) -> Prepared:
        batch, place = self.batches[each.layer, name]
        return batch.take(place, self.checks)


def _complete_(each: _Planned) -> None:
    try:
        complete_layer_(each.layer, each.weights)
    except NonFiniteError as error:
        raise with_remedy(error) from error


def _items(each: _Planned) -> Iterator[tuple[tuple[AdaptedWeights, str], Item]]:
    scaling = each.layer.lora.spec.scaling
    for name, blocks in each.blocks.items():
        if blocks and name not in each.layer.lora.records:
            weight = each.layer.as_matrix(local(each.weights[name]))
            yield (each.layer, name), Item(weight, blocks, scaling, each.observe)


def with_remedy(error: NonFiniteError) -> NonFiniteError:
    """Return the error of a layer, changed to say what was done and what to do."""
    return NonFiniteError(
        f"{error}. Every layer is unmerged; look for a diverged training run (a lower learning rate, gradient "
        "clipping) or evaluate with merged_eval=False."
    )


def begin_unmerging_(layers: Iterable[AdaptedWeights]) -> None:
    """Write W back in layers that are on a device. AdaptedWeights.unmerge_ then looks for edits. In place."""
    checks = Checks()
    for layer in layers:
        if any(record.is_on_device() for record in layer.lora.records.values()):
            restore_layer_(layer, checks)
