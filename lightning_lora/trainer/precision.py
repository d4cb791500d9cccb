"""Quantised weights in a Trainer: BitsandbytesPrecision, DDP, and what Lightning cannot do with them.

BitsandbytesPrecision replaces linear layers by quantised ones in the setup of the strategy. That comes after injection
and would drop the adapters. So the layers are converted before injection; to convert them again changes nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LoRAError
from ..model.adapted_model import Listing
from ..names import LIGHTNING, derives_from
from ..nn.lora_layer import LoRALayer
from ..nn.quantised import TORCHAO, quantised_as, quantised_modules, quantised_parameters
from ..nn.quantised_state import is_of_lightning
from .compatibility import AVERAGING

LEFT_OUT_OF_DDP = "_ddp_params_and_buffers_to_ignore"  # torch's attribute of a module that DDP wraps


def refuse_late_conversion(listing: Listing) -> None:
    """Raise LoRAError where BitsandbytesPrecision would replace layers that are adapted already."""
    if _bitsandbytes_precision(listing.model) is None or quantised_modules(listing.places):
        return
    for name, layer in listing.layers.items():
        if isinstance(layer, nn.Linear):
            raise LoRAError(
                f"LoRACallback: {name!r} was adapted by inject, and BitsandbytesPrecision replaces it by a quantised "
                "layer without an adapter. Leave inject out and give LoRACallback the options, or let the plugin "
                "convert first: plugin.convert_module(model), then inject(model, LoRAConfig(...))."
            )


def convert_linear_layers_(listing: Listing) -> None:
    """Let the precision of a LightningModule's Trainer convert the linear layers that are not adapted yet. In place.

    Lightning itself converts all layers, or none where one is quantised already.
    """
    plugin = _bitsandbytes_precision(listing.model)
    if plugin is None:
        return
    modules, quantised = listing.modules, quantised_modules(listing.places).values()
    listing.look_again()
    if not quantised and any(isinstance(layer, nn.Linear) for _, layer in modules):
        plugin.convert_module(listing.model)
    elif any(map(is_of_lightning, quantised)):  # converted earlier; layers were built since
        for path, parent in modules:
            for name, child in list(parent._modules.items()):
                if _is_plain(child) and not f"{path}.{name}".lstrip(".").startswith(tuple(plugin.ignore_modules)):
                    box = nn.Module()
                    box.register_module("lora_converted", child)
                    parent._modules[name] = plugin.convert_module(box).lora_converted


def _bitsandbytes_precision(module: nn.Module) -> Any:
    """Return the BitsandbytesPrecision of a LightningModule's Trainer, or None where it has another precision."""
    plugin: Any = getattr(getattr(module, "_trainer", None), "precision_plugin", None)
    return plugin if derives_from(plugin, "BitsandbytesPrecision", LIGHTNING) else None


def leave_out_of_ddp_(listing: Listing) -> None:
    """Exclude a module's torchao tensors from DDP, which cannot send them. Every process quantised the same base."""
    module = listing.model
    if _holds_torchao(listing):
        names = [name for name, parameter in module.named_parameters() if _is_of_torchao(parameter)]
        earlier = vars(module).get(LEFT_OUT_OF_DDP, ())
        vars(module)[LEFT_OUT_OF_DDP] = list(dict.fromkeys([*earlier, *names]))


def _is_of_torchao(parameter: object) -> bool:
    return derives_from(parameter, "TorchAOBaseTensor", (TORCHAO,))


def refuse_unloadable(module: nn.Module) -> None:
    """Raise LoRAError where Lightning could save a full checkpoint of a module but not load it again."""
    for name, parameter in module.named_parameters():
        if _is_of_torchao(parameter):
            raise LoRAError(
                f"LoRACallback: save='full' would save {name!r}, a torchao tensor ({quantised_as(parameter)}), and "
                "Lightning cannot load a checkpoint that holds one. Use save='adapter', which holds nothing of the "
                "base, or save='merged' with dequantize."
            )


def refuse_for_quantised(listing: Listing, trainer: Any) -> None:
    """Raise LoRAError where a Trainer would treat the bytes of quantised weights as values: shard or average them."""
    name, layer = next(iter(quantised_modules(listing.places).items()), ("", listing.model))
    if not name:
        return
    weight = f"the weight of {name!r} is quantised ({quantised_as(next(iter(quantised_parameters(layer).values())))})"
    if derives_from(trainer.strategy, "ModelParallelStrategy", LIGHTNING):
        raise LoRAError(
            f"LoRACallback: {weight}, which ModelParallelStrategy cannot shard here. Use strategy='ddp', which holds "
            "the quantised base whole on each device."
        )
    if derives_from(trainer.strategy, "DeepSpeedStrategy", LIGHTNING) and _holds_torchao(listing):
        raise LoRAError(
            f"LoRACallback: {weight}, which DeepSpeed cannot move to its device. Use strategy='ddp', or quantise the "
            "base with bitsandbytes."
        )
    if getattr(trainer.strategy, "zero_stage_3", False):
        raise LoRAError(
            f"LoRACallback: {weight}, and DeepSpeed's stage 3 would divide its bytes. Use DeepSpeedStrategy(stage=2) "
            "or strategy='ddp', which hold the quantised base whole on each device."
        )
    for callback in trainer.callbacks:
        if any(derives_from(callback, average, LIGHTNING) for average in AVERAGING):
            raise LoRAError(
                f"LoRACallback: {weight}, and {type(callback).__name__} averages frozen weights too, which would "
                "change its bytes. Leave the averaging out, or train on the base that is not quantised."
            )


def _holds_torchao(listing: Listing) -> bool:
    return any(_is_of_torchao(each) for _, owner in listing.modules for each in owner._parameters.values())


def _is_plain(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear) and not isinstance(layer, LoRALayer) and not quantised_parameters(layer)
