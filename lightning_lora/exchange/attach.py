"""attach: read an adapter, fit it to a model, and attach it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.checks import check_factors
from ..adapter.identity import digest_of
from ..distributed.sharding import is_spread
from ..errors import LoRAError
from ..files.paths import PathLike
from ..formats.sources import read_source
from ..model.adapted_model import AdaptedModel, Listing, find_adapted
from ..model.attached import (
    attach_to_layers_,
    begin_attached,
    begin_layers_,
    change_unmerged_,
    checked_strength,
    take_out_attached_,
)
from ..model.live_state import LiveState, open_state, original_value
from ..model.wrappers import unwrapped
from ..nn.adapted_weights import AdaptedWeights
from ..nn.attached_factors import AttachedFactors, Attachment
from ..nn.claims import claimed
from ..nn.low_rank import factor_shapes, to_block_diagonal
from ..nn.variant import LayerInfo
from .align import align_names, as_in_model, order_in, split_off_base
from .first_names import Names, by_first_names
from .take import check_fingerprint
from .trained_with import refuse_missing


def attach(
    model: nn.Module,
    source: PathLike | Mapping[str, Any] | Adapter,
    *,
    name: str,
    strength: float = 1.0,
    strict_base: bool = True,
) -> list[str]:
    """Attach a frozen adapter to a model, in place: W' = c * (W + s * B @ A) + sum of w_i * s_i * B_i @ A_i.

    It acts in forwards and in merged weights, is never trained, and is no part of state_dict(). Any number may be
    attached, also to a plain model and before inject. disable_adapter turns all off. An error changes nothing.

    Args:
        model: with the base that the adapter was trained on.
        source: any form of adapter that load_adapter takes.
        name: by which detach, scaled and set_strength call it: a text without dots.
        strength: w, 1 as trained.
        strict_base: whether another base than the adapter's is an error or a warning.

    Returns:
        The names of the layers in which it acts.

    Raises:
        LoRAError: an adapter of this name is attached; the source is damaged or does not fit; it is no sum, as DoRA,
            trained rows and whole modules with other values than the model has or had; or the model is sharded already.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> save_adapter(model, "sft")
        >>> unload(model)
        >>> attach(model, "sft", name="sft", strength=0.5)
        ['0', '2']
        >>> inject(model, LoRAConfig(r=4, target_modules=["0"]))  # a new adapter is trained on top of it
        ['0']
    """
    if not isinstance(name, str) or not name or "." in name:
        raise LoRAError(f"attach: a name must be a text without dots, and not empty, but it is {name!r}.")
    strength = checked_strength(strength, "attach")
    listing = Listing(unwrapped(model, "attach"))
    adapter = read_source(source, order_in(listing.model), "attach")
    handle = find_adapted(listing, attached=True) or begin_attached(listing.model)
    put_in = partial(_put_in_, handle, adapter, name, strength, strict_base)
    with claimed("attach", handle.injection.claims):
        if name in handle.injection.attached:
            raise LoRAError(f"attach: an adapter {name!r} is attached already; call detach(model, {name!r}) first.")
        change_unmerged_(handle, "attach", put_in, partial(take_out_attached_, handle, name))
    return [layer for layer, adapted in handle.all_layers.items() if name in adapted.attached()]


def _put_in_(handle: AdaptedModel, source: Adapter, called: str, strength: float, strict_base: bool) -> None:
    """Put an adapter into every layer that it has. In place. After an error some layers are changed."""
    names = Names(handle.places)
    check_factors(source, "attach")
    refuse_missing(handle.injection.attached, source)
    adapter = by_first_names(names, align_names(handle, names, source))
    _refuse_kinds_of_adapters(adapter, called)
    begin_layers_(handle, adapter.layers)
    layers = {name: handle.all_layers[name] for name in adapter.layers}
    if rows := next((name for name, layer in layers.items() if layer.replaced_rows()), None):
        raise LoRAError(
            f"attach: {called!r} adapts {rows!r}, of which rows are trained here; leave one of the two out."
        )
    kinds = handle.kinds_of(layers)
    adapter = as_in_model(adapter, kinds)
    live = open_state(handle)
    adapter = split_off_base(live, adapter)
    _refuse_other_values(live, adapter, called)
    check_fingerprint(live, adapter.fingerprint, strict=strict_base, why=())  # what is trained here was the base's
    with torch.inference_mode(False), torch.no_grad():
        pairs = {name: _pair(layer, kinds[name], adapter, name, called, strength) for name, layer in layers.items()}
    attach_to_layers_(handle, called, pairs, Attachment(strength, digest_of(source)))


def _refuse_kinds_of_adapters(adapter: Adapter, called: str) -> None:
    if not adapter.layers:
        raise LoRAError(f"attach: {called!r} adapts no layer.")
    if adapter.variant.has_scale:
        raise LoRAError(
            f"attach: {called!r} is an adapter of {adapter.variant.title}, which scales the weight's outputs, so it is "
            "no sum. Merge it into the base (save_merged) and load that."
        )
    if rows := adapter.rows():
        raise LoRAError(
            f"attach: {called!r} replaces rows of {next(iter(rows))!r}, which is no sum. Merge it into the base "
            "(save_merged) and load that."
        )


def _pair(
    layer: AdaptedWeights, kind: str, adapter: Adapter, name: str, called: str, strength: float
) -> AttachedFactors:
    """Return A, B, s and w of one layer, as a pair of the whole layer."""
    given, tensor = adapter.layers[name], layer.adapted_weight()
    if is_spread(tensor):
        raise LoRAError(
            f"attach: the weight of {name!r} is sharded already. Call attach before fully_shard, parallelize_module or "
            "the wrapper of the strategy."
        )
    if given.kind not in ("", kind):
        raise LoRAError(f"attach: {called!r}: {name!r} was a {given.kind} layer in training, here it is {kind}.")
    scaling, parts = given.scaling, given.parts
    if scaling is None:
        if not layer.has_trained_adapter():
            raise LoRAError(
                f"attach: {called!r}: the source stores no options, so the scaling of {name!r} is not known. Attach a "
                "folder, a checkpoint or what take_adapter returns."
            )
        scaling, parts = layer.lora.spec.scaling, layer.lora.spec.enabled
    info = LayerInfo(name, kind, layer.weight_shape(), given.r, scaling, parts)
    a, b, _ = info.shaped(adapter.variant.effective_factors_exactly(adapter.stored(name), None, scaling))
    b = b if parts is None else to_block_diagonal(b, parts)
    shapes = factor_shapes(kind, info.shape, b.shape[1])
    if (tuple(a.shape), tuple(b.shape)) != shapes:
        raise LoRAError(
            f"attach: {called!r}: {name!r} needs A {shapes[0]} and B {shapes[1]}, found {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    dtype = torch.float64 if layer.weight_dtype() == torch.float64 else None
    return AttachedFactors(a.detach().to(device, dtype), b.detach().to(device, dtype), float(scaling), strength)


def _refuse_other_values(live: LiveState, adapter: Adapter, called: str) -> None:
    """Refuse an adapter that holds whole tensors with other values than the model has, or had before training."""
    initial = live.handle.initial()
    for name, value in adapter.whole_tensors().items():
        present = live.tensors.get(name)
        if name in live.tensors and present is None:
            continue  # extra state, which cannot be compared
        known = [] if present is None else [original_value(name, present, live.owners[name])]
        known += [initial[name]] if name in initial else []
        if not any(_is_equal(value, each) for each in known):
            raise LoRAError(
                f"attach: {called!r} also holds {name!r} (modules_to_save, a bias or a statistic), with other values "
                "than the model's. Only A and B can be attached. Merge it into the base (save_merged) "
                "and load that, or load it as the trained one (load_adapter)."
            )


def _is_equal(value: object, known: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.shape != known.shape:
        return False
    return torch.equal(known.cpu(), value.detach().to("cpu", known.dtype))
