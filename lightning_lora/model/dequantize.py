"""Turn a model's quantized weights into plain weights with the adapters merged, for files and for merge_and_unload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn

from ..distributed.rank_sync import RankSync
from ..distributed.sharding import from_local_like, local
from ..errors import LoRAError
from ..names import join_names
from ..nn.adapted_module import NamedModules, adapter_of, injections_of
from ..nn.adapted_weights import AdaptedWeights
from ..nn.exact_merge import merged_weight
from ..nn.foreign_linear import is_foreign_linear
from ..nn.low_rank import HALF, MERGEABLE_DTYPES
from ..nn.nf4 import NF4Linear
from ..nn.quantized import BITSANDBYTES, dequantize, quantized_modules, quantized_parameters
from ..nn.rounding import Rounding
from ..nn.variant import Stored
from ..notices import tell

# What a message says of rounding, and the remedy where it costs much.
DEQUANTIZED = "merged 16-bit weights, dequantized"
IN_FLOAT32 = 'dequantize="float32" takes twice the space and loses next to nothing.'
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MERGEABLE_DTYPES}


def dequantize_dtype(value: object, verb: str) -> torch.dtype | None:
    """Return the dtype that the option `dequantize` gives, as a dtype or by its name; None for None.

    Raises:
        LoRAError: the value is no such dtype. The message begins with the verb.
    """
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if value is None or dtype in MERGEABLE_DTYPES:
        return dtype  # type: ignore[return-value]
    raise LoRAError(f"{verb}: dequantize must be one of {', '.join(DTYPES)}, but it is {value!r}.")


def report_factored(layers: Iterable[AdaptedWeights]) -> None:
    """Log once a model how many layers stay factored because their weights are quantized, or of another library."""
    stay = [layer for layer in layers if layer.quantized() or is_foreign_linear(layer.lora_holder)]
    reported = [injection for injection in injections_of(stay) if "quantized" in injection.marks]
    stay = [layer for layer in stay if layer.lora.injection not in reported]
    for layer in stay:
        layer.lora.injection.marks.add("quantized")
    if foreign := [layer for layer in stay if not layer.quantized()]:
        kinds = ", ".join(sorted({type(layer.lora_holder).__name__ for layer in foreign}))
        tell(
            f"lightning_lora: {len(foreign)} layers of other libraries ({kinds}) stay factored, also in merged "
            "evaluation: nothing but their own forward reads their weights."
        )
    if quantized := [layer for layer in stay if layer.quantized()]:
        kinds = ", ".join(sorted({layer.quantized() for layer in quantized}))
        tell(
            f"lightning_lora: {len(quantized)} layers have quantized weights ({kinds}) and stay factored, also in "
            "merged evaluation: rounding W' to quantized values again would lose much of the adapter."
        )


def quantized_weights(places: NamedModules) -> dict[str, nn.Module]:
    """Return the module of each quantized weight, by the weight's name in the model's state dict.

    Args:
        places: every module of the model, under each of its names.
    """
    return {
        join_names(path, name): module
        for path, module in quantized_modules(places).items()
        for name in quantized_parameters(module)
    }


def dequantized_weight(
    name: str, module: nn.Module, dtype: torch.dtype, rounding: Rounding, stored: Stored | None = None
) -> torch.Tensor:
    """Return a quantized parameter as a new plain tensor of its shape, with its adapter merged; rounded once.

    It is sharded like the parameter. Collective where the parameter or the adapter is sharded.

    Args:
        name: of the parameter in the model's state dict.
        module: its owner.
        dtype: of the result.
        rounding: counts what rounding costs. Its `sync` keeps the error of a weight that cannot
            be merged, for raise_on_any_rank; the result is then without the adapter.
        stored: other values for the layer's stored tensors, by leaf name.
    """
    leaf = name.rpartition(".")[2]
    values, adapter = dequantize(module, leaf), adapter_of(module, leaf)
    if adapter is None:
        return values.to(dtype)
    blocks = adapter.blocks(values, stored)
    cost = rounding.of(adapter, values) if dtype in HALF else None
    found = [local(values)]

    def merge() -> None:
        found[0] = merged_weight(found[0], blocks, adapter.merge_scaling, dtype=dtype, cost=cost)

    rounding.sync.run(f"merged weights: {name!r}", merge)
    return from_local_like(found[0].to(dtype), values)


def dequantized_weights(places: NamedModules, dtype: torch.dtype) -> dict[nn.Module, torch.Tensor]:
    """Return a plain merged weight for each module with a quantized weight.

    Raises:
        NonFiniteError: W' is not finite, or beyond the dtype's range.
    """
    names = quantized_weights(places)
    rounding, plain = Rounding(RankSync(())), dict[nn.Module, torch.Tensor]()  # nothing is sharded
    for name, module in names.items():
        if module not in plain:
            plain[module] = dequantized_weight(name, module, dtype, rounding)
    rounding.sync.raise_on_any_rank()
    rounding.tell(DEQUANTIZED, IN_FLOAT32, stacklevel=3)
    return plain


def replace_quantized_(modules: Iterable[nn.Module], plain: Mapping[nn.Module, torch.Tensor]) -> None:
    """Replace quantized weights by plain weights; layers of bitsandbytes and NF4Linear become nn.Linear. In place.

    Args:
        modules: all modules of the model.
        plain: the plain weights, see dequantized_weights.
    """
    layers = {module: _plain_layer(module, weight) for module, weight in plain.items()}
    for parent in modules:
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


def _plain_layer(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    parameter = nn.Parameter(weight, requires_grad=False)
    if not any(cls.__module__.startswith(BITSANDBYTES) for cls in type(module).__mro__):  # a tensor of torchao
        module.weight = parameter
        module.__class__ = nn.Linear if type(module) is NF4Linear else type(module)
        return module
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = parameter, cast(nn.Linear, module).bias
    return linear.train(module.training)
