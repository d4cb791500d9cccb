"""Quantised weights: those of bitsandbytes' Linear4bit and Linear8bitLt, and torchao's weight-only tensors.

Classes are recognised by name, so that neither package is imported here.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from ..distributed.flat import whole_shape
from ..errors import LoRAError
from ..names import canonical, derives_from

BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"
INT8 = "int8"
PACKS_FOR_CPU = "support_avx512bf16_for_cpu"  # bitsandbytes' attribute of a 4-bit layer
PACKED_BEFORE = "lora_packs_for_cpu"  # our attribute: that attribute was True before injection


def quantised_as(weight: object) -> str:
    """Return how a parameter is quantised, or "".

    bitsandbytes' parameters give "nf4", "fp4" or "int8", also before their first move to a device quantises them.
    torchao's give the name of their class.
    """
    if type(weight) in (torch.Tensor, nn.Parameter):
        return ""
    if derives_from(weight, "Params4bit", (BITSANDBYTES,)):
        return str(cast(Any, weight).quant_type)
    if derives_from(weight, "Int8Params", (BITSANDBYTES,)):
        return INT8
    return type(weight).__name__ if derives_from(weight, "TorchAOBaseTensor", (TORCHAO,)) else ""


def quantised_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the quantised parameters among a module's own, by name."""
    parameters = ((name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
    return {name: parameter for name, parameter in parameters if quantised_as(parameter)}


def quantised_modules(places: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Return the modules with a quantised weight, by name.

    Args:
        places: every module of a model, a shared one under each of its names.
    """
    return {canonical(name): module for name, module in places if quantised_parameters(module)}


def dequantize(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """Return the values of a quantised parameter as a new plain tensor, in the dtype of `dtype_of`.

    A parameter that is not quantised yet is quantised in a copy first, so that the result has its later values.
    """
    weight: Any = module._parameters[name]
    quantised = quantised_as(weight)
    with torch.inference_mode(False), torch.no_grad():  # torchao's tensors cannot be detached in inference mode
        if weight.is_meta:
            return torch.empty(shape_of(weight), dtype=dtype_of(weight), device="meta")
        if quantised == INT8:
            return _dequantize_8bit(module, weight)
        if not derives_from(weight, "Params4bit", (BITSANDBYTES,)):
            return cast(torch.Tensor, weight.detach().dequantize())
        if weight.quant_state is None:
            weight = copy.copy(weight)
            weight.module = None  # otherwise quantising the copy would change the layer
            weight = weight.to(weight.device)
        unpack_for_gradients_(module, weight)
        values = sys.modules[f"{BITSANDBYTES}.functional"].dequantize_4bit(weight.data, weight.quant_state)
        return cast(torch.Tensor, values)


def _dequantize_8bit(module: nn.Module, weight: Any) -> torch.Tensor:
    if weight.dtype.is_floating_point and not weight.has_fp16_weights:
        weight = type(weight)(weight.data, requires_grad=False).to(weight.device)
    if weight.dtype.is_floating_point:
        return cast(torch.Tensor, weight.data.clone())
    return cast(torch.Tensor, weight.data * scales_of(module, weight).float()[:, None] * (1 / 127))


def scales_of(module: nn.Module, weight: Any) -> torch.Tensor:
    """Return the scale of each row of an 8-bit weight. The first forward moves it from the weight to the layer.

    Raises:
        LoRAError: neither holds it.
    """
    scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
    if scales is None:
        raise LoRAError(f"{type(module).__name__}: its 8-bit weight has no scales; quantise it again, by .to(device).")
    return cast(torch.Tensor, scales)


def dtype_of(weight: Any) -> torch.dtype:
    """Return the dtype of a parameter's dequantised values; for 8-bit weights it is float32."""
    if weight.dtype.is_floating_point:
        return cast(torch.dtype, weight.dtype)
    state = getattr(weight, "quant_state", None)
    return torch.float32 if state is None else cast(torch.dtype, getattr(state, "original_dtype", state.dtype))


def shape_of(weight: Any) -> torch.Size:
    """Return the shape of a parameter's dequantised values; of a flat one that of the whole."""
    state = getattr(weight, "quant_state", None)
    return torch.Size(whole_shape(weight) if state is None else state.shape)


def unpack_for_gradients_(module: nn.Module, weight: Any) -> None:
    """Undo bitsandbytes' packing of a 4-bit weight for evaluation on a CPU with AVX512-BF16. In place.

    A packed weight gives its input no gradient. The values stay as packing has made them: the scales are rounded to
    bfloat16 and not quantised any more. bitsandbytes' own inverse rounds the scales a second time, and returns scales
    that were not quantised in the wrong order; so the scales are restored here.
    """
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    scales = state.absmax.T.reshape(-1).float().contiguous()
    inverse = sys.modules[f"{BITSANDBYTES}.functional"]._convert_weight_packed_for_cpu_inverse
    weight.data, state = inverse(weight.data, state)
    state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
    weight.quant_state = state
    if getattr(module, "quant_state", None) is not None:
        cast(Any, module).quant_state = state


def keep_gradients_(modules: Iterable[nn.Module]) -> None:
    """Keep bitsandbytes from packing 4-bit layers, adapted or not, for evaluation. In place.

    Otherwise training would go on without gradients after an evaluation.
    """
    for module in modules:
        if getattr(module, PACKS_FOR_CPU, False):
            for weight in quantised_parameters(module).values():
                unpack_for_gradients_(module, weight)
            vars(module).update({PACKED_BEFORE: True, PACKS_FOR_CPU: False})


def allow_packing_(modules: Iterable[nn.Module]) -> None:
    """Undo keep_gradients_. The next evaluation packs the layers again. In place."""
    for module in modules:
        if vars(module).pop(PACKED_BEFORE, False):
            vars(module)[PACKS_FOR_CPU] = True
