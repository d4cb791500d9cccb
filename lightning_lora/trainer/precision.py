"""Quantized weights in a Trainer: plugins that convert layers, DDP, and what Lightning cannot do with such weights.

BitsandbytesPrecision and TransformerEnginePrecision replace linear layers by their own in the setup of the strategy.
That comes after injection and would drop the adapters. So the layers are converted before injection; to convert them
again changes nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LoRAError
from ..model.adapted_model import Listing
from ..names import LIGHTNING, derives_from, join_names
from ..nn.foreign_linear import is_packed
from ..nn.lora_layer import LoRALayer
from ..nn.quantized import NF4, is_of_lightning, is_of_torchao, quantized_as, quantized_modules, quantized_parameters
from ..private.lightning import is_tensor_parallel, trainer_of
from ..private.torch import LEFT_OUT_OF_DDP
from .compatibility import OF_THE_ADAPTER, averages_frozen

IN_4_BITS = (NF4, "nf4", "fp4")
BITSANDBYTES, TRANSFORMER_ENGINE = "BitsandbytesPrecision", "TransformerEnginePrecision"


def refuse_late_conversion(listing: Listing) -> None:
    """Raise LoRAError where BitsandbytesPrecision would replace layers that are adapted already."""
    if _precision(listing.model, BITSANDBYTES) is None or quantized_modules(listing.places):
        return
    for name, layer in listing.all_layers.items():
        if isinstance(layer, nn.Linear):
            by_inject = layer.has_trained_adapter()
            fact = "was adapted by inject" if by_inject else "has attached adapters"
            remedy = (
                "Leave inject out and give LoRACallback the options, or let the plugin convert first: "
                "plugin.convert_module(model), then inject(model, LoRAConfig(...))."
                if by_inject
                else "Leave attach out and name the adapters in LoRACallback(attach=...)."
            )
            raise LoRAError(
                f"LoRACallback: {name!r} {fact}, and BitsandbytesPrecision replaces it by a quantized layer without an "
                f"adapter. {remedy}"
            )


def convert_linear_layers_(listing: Listing) -> None:
    """Let the precision of a LightningModule's Trainer convert the linear layers that are not adapted yet. In place.

    Lightning itself converts all layers, or none where one is converted already.
    """
    if (plugin := _precision(listing.model, TRANSFORMER_ENGINE)) is not None and not listing.all_layers:
        plugin.convert_module(listing.model)
        listing.look_again()
    plugin = _precision(listing.model, BITSANDBYTES)
    if plugin is None:
        return
    modules, quantized = listing.modules, quantized_modules(listing.places).values()
    listing.look_again()
    if not quantized and any(isinstance(layer, nn.Linear) for _, layer in modules):
        plugin.convert_module(listing.model)
    elif any(map(is_of_lightning, quantized)):  # converted earlier; layers were built since
        for path, parent in modules:
            for name, child in list(parent._modules.items()):
                if _is_plain(child) and not join_names(path, name).startswith(tuple(plugin.ignore_modules)):
                    box = nn.Module()
                    box.register_module("lora_converted", child)
                    parent._modules[name] = plugin.convert_module(box).lora_converted


def _precision(module: nn.Module, name: str) -> Any:
    """Return the precision plugin of a LightningModule's Trainer, or None where it is not of the class of this name."""
    plugin: Any = getattr(trainer_of(module), "precision_plugin", None)
    return plugin if derives_from(plugin, name, LIGHTNING) else None


def leave_out_of_ddp_(listing: Listing) -> None:
    """Exclude a module's torchao tensors from DDP, which cannot send them. Every process quantized the same base."""
    module = listing.model
    if _holds_torchao(listing):
        names = [name for name, parameter in module.named_parameters() if is_of_torchao(parameter)]
        earlier = vars(module).get(LEFT_OUT_OF_DDP, ())
        vars(module)[LEFT_OUT_OF_DDP] = list(dict.fromkeys([*earlier, *names]))


def refuse_full_of_quantized(listing: Listing) -> None:
    """Raise LoRAError where a full checkpoint would hold quantized weights, which Lightning cannot load again."""
    for name in quantized_modules(listing.places):
        raise LoRAError(
            f"LoRACallback: save='full' would save the quantized weight of {name!r}, and a checkpoint that holds one "
            "cannot be loaded again. Use save='adapter', which holds nothing of the base, or save='merged' with "
            "dequantize."
        )


def refuse_plain(listing: Listing, quantize: str | None) -> None:
    """Raise LoRAError where the callback was to quantize the base, and no weight of the model is quantized."""
    if quantize is not None and not quantized_modules(listing.places):
        raise LoRAError(
            f"LoRACallback: quantize is {quantize!r}, but no weight of {type(listing.model).__name__} is quantized. "
            "Where inject was called on the model already, call quantize_base(model) before it; else see "
            "exclude_modules and modules_to_save, which leave layers as they are."
        )


def refuse_for_quantized(listing: Listing, trainer: Any) -> None:
    """Raise LoRAError where a Trainer would treat the bytes of quantized weights as values: shard or average them."""
    for name, module in listing.modules:
        if is_packed(module):
            _refuse_averaging(trainer, f"{name!r}, a {type(module).__name__}, holds packed weights")
    name, layer = next(iter(quantized_modules(listing.places).items()), ("", listing.model))
    if not name:
        return
    weight = f"the weight of {name!r} is quantized ({quantized_as(next(iter(quantized_parameters(layer).values())))})"
    _refuse_sharding(listing, trainer.strategy)
    if derives_from(trainer.strategy, "FSDPStrategy", LIGHTNING):
        raise LoRAError(
            f"LoRACallback: {weight}, which FSDPStrategy cannot lay into a flat tensor with others. Use "
            "strategy='ddp', which holds the quantized base whole on each device."
        )
    if derives_from(trainer.strategy, "DeepSpeedStrategy", LIGHTNING) and _holds_torchao(listing):
        raise LoRAError(
            f"LoRACallback: {weight}, which DeepSpeed cannot move to its device. Use strategy='ddp', or quantize the "
            "base with bitsandbytes."
        )
    if getattr(trainer.strategy, "zero_stage_3", False):
        raise LoRAError(
            f"LoRACallback: {weight}, and DeepSpeed's stage 3 would divide its bytes. Use DeepSpeedStrategy(stage=2) "
            "or strategy='ddp', which hold the quantized base whole on each device."
        )
    _refuse_averaging(trainer, weight)


def _refuse_averaging(trainer: Any, weight: str) -> None:
    """Raise LoRAError where a callback averages weights. The text says of a weight that its bytes are no values."""
    for callback in trainer.callbacks:
        if averages_frozen(callback):
            raise LoRAError(
                f"LoRACallback: {weight}, and {type(callback).__name__} averages frozen weights too, which would "
                f"change its bytes. Use {OF_THE_ADAPTER}, which averages the adapter alone."
            )


def _refuse_sharding(listing: Listing, strategy: Any) -> None:
    """Raise LoRAError where a strategy would shard a weight that is quantized in a way that it cannot shard."""
    by_rows = derives_from(strategy, "ModelParallelStrategy", LIGHTNING)
    if not by_rows and not derives_from(strategy, "FSDPStrategy", LIGHTNING):
        return
    fitting = IN_4_BITS if by_rows and not is_tensor_parallel(strategy) else ()
    for name, layer in quantized_modules(listing.places).items():
        kind = quantized_as(next(iter(quantized_parameters(layer).values())))
        if kind not in fitting:
            raise LoRAError(
                f"LoRACallback: the weight of {name!r} is quantized ({kind}), which {type(strategy).__name__} cannot "
                "shard here. ModelParallelStrategy with tensor_parallel_size=1 (FSDP2) shards bases in 4 bits, of "
                "bitsandbytes and quantize_base; strategy='ddp' holds any quantized base whole on each device."
            )


def _holds_torchao(listing: Listing) -> bool:
    return any(is_of_torchao(each) for _, owner in listing.modules for each in owner._parameters.values())


def _is_plain(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear) and not isinstance(layer, LoRALayer) and not quantized_parameters(layer)
