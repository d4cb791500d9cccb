"""quantize_base: quantize the linear layers of a plain model, before it is adapted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import is_sharded
from ..errors import LoRAError
from ..matching import ALL_LINEAR
from ..names import listed
from ..nn.adapted_module import Swapped
from ..nn.nf4 import BLOCK, can_be_nf4, nf4_tensor_class, quantize_linear_
from ..nn.quantized import quantized_parameters
from ..notices import tell
from .adapted_model import Listing
from .targets import Selection, select, warn_of_unused
from .wrappers import unwrapped

KINDS = ("nf4",)


def quantize_base(
    model: nn.Module,
    kind: str = "nf4",
    *,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> list[str]:
    """Quantize the weights of a plain model's linear layers, in place, before inject: the base of QLoRA.

    The layers are those of target_modules="all-linear": every nn.Linear without the output head and without tied
    weights. "nf4" is torchao's NF4Tensor (4.1 bits a value), which fully_shard (FSDP2) shards. Layers that are
    quantized already, subclasses of nn.Linear and the out_proj of nn.MultiheadAttention stay as they are.

    Args:
        model: any module with its final weights. It is not adapted and not sharded yet.
        kind: "nf4".
        exclude_modules: layers to leave as they are, named as in LoRAConfig. A classifier of a model that is neither
            of transformers nor of timm is one that needs it, or modules_to_save.
        modules_to_save: modules that will be fully trained, and so are not quantized.

    Returns:
        The names of the quantized layers.

    Raises:
        LoRAError: torchao is missing, the kind is unknown, an entry names nothing, no layer can be quantized, a weight
            is not finite or has no values yet, or the model is adapted or sharded.

    Example::

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> quantize_base(model, "nf4", exclude_modules=["2"])
        ['0']
        >>> inject(model, LoRAConfig(r=2))
        ['0', '2']
    """
    config = LoRAConfig(exclude_modules=exclude_modules, modules_to_save=modules_to_save)
    check_kind_of_quantization(kind, "quantize_base")
    listing = Listing(unwrapped(model, "quantize_base"))
    for name, module in listing.modules:
        if isinstance(module, Swapped):
            raise LoRAError(
                f"quantize_base: {name!r} is adapted already; call quantize_base before inject, or unload(model) first."
            )
    selection = _selection(listing, config)
    warn_of_unused(selection, stacklevel=2)
    mistakes = [mistake for mistake in selection.unmatched.errors if not mistake.startswith("target_modules")]
    if mistakes:
        raise LoRAError(f"quantize_base: {mistakes[0]}.")
    names = quantize_(listing, kind, config)
    if not names:
        raise LoRAError(
            f"quantize_base: {type(listing.model).__name__} has no layer to quantize: expected an nn.Linear with a "
            f"multiple of {BLOCK} weights in float32 or 16 bits that is neither tied, excluded nor the output head."
        )
    return names


def quantize_(listing: Listing, kind: str, config: LoRAConfig) -> list[str]:
    """Quantize the layers of a model that "all-linear" and the options name, and return their names. In place.

    Layers that are adapted or quantized already stay as they are.

    Args:
        listing: of the model.
        kind: see quantize_base.
        config: its exclude_modules, modules_to_save, task_type and trainable_token_indices leave layers out.

    Raises:
        LoRAError: torchao is missing, or a weight cannot be quantized.
    """
    nf4_tensor_class()
    modules = dict(listing.modules)
    chosen = {
        name: module
        for name, module in _selection(listing, config).layers.items()
        if type(module) is nn.Linear
        and not quantized_parameters(module)
        and not isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
    }
    layers = {name: layer for name, layer in chosen.items() if can_be_nf4(layer.weight)}
    _quantize_each_(layers)
    if left_out := [name for name in chosen if name not in layers]:
        tell(
            f"lightning_lora: quantize_base: {listed(left_out)} not quantized: the number of weights is no multiple of "
            f"{BLOCK}, or they are not in float32 or 16 bits."
        )
    listing.look_again()
    return list(layers)


def quantize_named_(listing: Listing, names: Collection[str]) -> None:
    """Quantize those of a model's plain linear layers that are named. Other modules stay as they are. In place.

    Raises:
        LoRAError: torchao is missing, or a weight cannot be quantized.
    """
    named = ((name, module) for name, module in listing.modules if name in names and type(module) is nn.Linear)
    layers = {name: layer for name, layer in named if can_be_nf4(layer.weight)}
    if layers:
        nf4_tensor_class()
        _quantize_each_(layers)
        listing.look_again()


def _quantize_each_(layers: Mapping[str, nn.Linear]) -> None:
    for name, layer in layers.items():  # all before the first is changed
        weight = f"{name}.weight"
        if is_sharded(layer.weight):
            raise LoRAError(f"quantize_base: {weight!r} is sharded already; quantize the model before fully_shard.")
        if layer.weight.is_meta:
            raise LoRAError(
                f"quantize_base: {weight!r} has no values yet (it is on the meta device); load the base's weights "
                "first."
            )
    for name, layer in layers.items():
        quantize_linear_(layer, name)


def check_kind_of_quantization(kind: object, verb: str) -> None:
    """Raise LoRAError unless quantize_base knows the kind. The message begins with the verb."""
    if kind not in KINDS:
        raise LoRAError(f"{verb}: a base can be quantized as {' or '.join(KINDS)}, not as {kind!r}.")


def _selection(listing: Listing, config: LoRAConfig) -> Selection:
    """Return what "all-linear" and the options that leave layers out name."""
    only: dict[str, Any] = {
        "exclude_modules": config.exclude_modules,
        "modules_to_save": config.modules_to_save,
        "task_type": config.task_type,
        "trainable_token_indices": config.trainable_token_indices,
    }
    return select(listing.modules, replace(LoRAConfig(target_modules=ALL_LINEAR), **only))
