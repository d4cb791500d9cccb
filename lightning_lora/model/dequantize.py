"""A model's quantised weights as plain ones, with adapters merged into them: for files, and to leave quantisation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..errors import LoRAError
from ..nn.adapted_weights import AdaptedWeights, NamedModules, adapter_of, layer_adapter
from ..nn.exact_merge import Observer, merged_weight
from ..nn.low_rank import HALF, MERGEABLE_DTYPES
from ..nn.quantised import BITSANDBYTES, dequantize, quantised_modules, quantised_parameters
from ..nn.variant import Stored
from ..notices import tell

if TYPE_CHECKING:
    from ..metrics import MergeFidelity

WORST_FIDELITY = 0.05  # above this share of the adapter that rounding loses, a warning says so
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MERGEABLE_DTYPES}


def dequantize_dtype(value: object, verb: str) -> torch.dtype | None:
    """Return the dtype that the option `dequantize` names, or None for None.

    Raises:
        LoRAError: it is none; the message begins with the verb.
    """
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if value is None or dtype in MERGEABLE_DTYPES:
        return dtype  # type: ignore[return-value]
    raise LoRAError(f"{verb}: dequantize must be one of {', '.join(DTYPES)}, but it is {value!r}.")


def report_factored(layers: Iterable[AdaptedWeights]) -> None:
    """Tell, once a model, how many layers stay factored because their weights are quantised."""
    quantised = [layer for layer in layers if layer.quantised()]
    reported = {id(layer.lora.injection) for layer in quantised if layer.lora.injection.quantised_reported}
    quantised = [layer for layer in quantised if id(layer.lora.injection) not in reported]
    for layer in quantised:
        layer.lora.injection.quantised_reported = True
    if quantised:
        kinds = ", ".join(sorted({layer.quantised() for layer in quantised}))
        tell(
            f"lightning_lora: merge: {len(quantised)} layers have quantised weights ({kinds}) and stay factored: "
            "rounding W' to these again would lose much of the adapter."
        )


def quantised_weights(places: NamedModules) -> dict[str, nn.Module]:
    """Return the names of the quantised weights in a state dict of a model, each with the module that owns it.

    Args:
        places: every module of the model, under every name.
    """
    return {
        f"{path}.{name}" if path else name: module
        for path, module in quantised_modules(places).items()
        for name in quantised_parameters(module)
    }


def plain_weight(
    module: nn.Module,
    name: str,
    dtype: torch.dtype,
    observe: Observer | None = None,
    stored: Stored | None = None,
) -> torch.Tensor:
    """Return a quantised parameter as a new plain tensor, an adapter of the layer merged into it; rounded once.

    Args:
        module: whose own parameter it is.
        name: of the parameter.
        dtype: of the result.
        observe: as merge_weight_'s.
        stored: values of the layer's stored tensors by leaf name, where they are not its own.

    Raises:
        NonFiniteError: W' is not finite, or beyond the dtype.
    """
    values = dequantize(module, name)
    adapter = adapter_of(module, name)
    if adapter is None:
        return values.to(dtype)
    blocks = adapter.update_blocks(stored)[name]
    return merged_weight(values, blocks, adapter.lora.spec.scaling, dtype=dtype, observe=observe)


def plain_weights(places: NamedModules, dtype: torch.dtype) -> dict[nn.Module, torch.Tensor]:
    """Return what takes the place of each quantised weight of a model, merged, by the module that owns it.

    Raises:
        NonFiniteError: W' is not finite, or beyond the dtype.
    """
    dequantizer, plain = Dequantizer(dtype), {}
    for name, module in quantised_weights(places).items():
        if module not in plain:
            plain[module] = dequantizer.weight(name, module)
    dequantizer.report()
    return plain


def replace_quantised_(modules: Iterable[nn.Module], plain: Mapping[nn.Module, torch.Tensor]) -> None:
    """Put plain weights in the place of quantised ones; a layer of bitsandbytes becomes an nn.Linear. In place."""
    layers = {module: _plain_layer(module, weight) for module, weight in plain.items()}
    for parent in modules:
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


def _plain_layer(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    parameter = nn.Parameter(weight, requires_grad=False)
    if not any(cls.__module__.startswith(BITSANDBYTES) for cls in type(module).__mro__):  # a tensor of torchao
        module.weight = parameter
        return module
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = parameter, cast(nn.Linear, module).bias
    return linear.train(module.training)


class Dequantizer:
    """Makes plain weights one by one, and reports what rounding W' to their dtype costs, once for each layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        from ..metrics import MergeFidelity  # torchmetrics imports much

        self.dtype = dtype
        with torch.inference_mode(False):
            self.fidelity: MergeFidelity = MergeFidelity(sync_on_compute=False)

    def weight(self, name: str, module: nn.Module, stored: Stored | None = None) -> torch.Tensor:
        """Return the plain weight of a state dict's name, merged where the module is adapted; see plain_weight."""
        observe, adapter = None, layer_adapter(module)
        if adapter is not None and not adapter.lora.rounding_reported:
            observe, adapter.lora.rounding_reported = self.fidelity.update, True
        return plain_weight(module, name.rpartition(".")[2], self.dtype, observe, stored)

    def report(self) -> None:
        """Tell the share of the adapter that rounding loses, of the layers that were not reported before."""
        if not float(self.fidelity.reference) > 0:
            return
        lost = float(self.fidelity.compute())
        name = str(self.dtype).removeprefix("torch.")
        message = f"merged {name} weights, dequantised: rounding costs {lost:.1%} of the adapter's norm"
        tell(f"lightning_lora: {message}")
        if lost > WORST_FIDELITY and self.dtype in HALF:
            warnings.warn(
                f"lightning_lora: {message}. Merged and factored outputs differ by that much of the adapter's effect; "
                'dequantize="float32" costs twice the space and rounds next to nothing.',
                stacklevel=3,
            )
