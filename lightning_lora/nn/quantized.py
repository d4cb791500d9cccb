"""Quantized weights: those of bitsandbytes' Linear4bit and Linear8bitLt, and torchao's weight-only tensors.

A weight may be sharded. Shards of an NF4Tensor have values. Shards of a 4-bit weight of bitsandbytes are bytes, and the
layer on each rank keeps what describes the whole weight. Classes are recognised by name, so that neither package is
imported here.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import nn

from ..distributed.flat import own_weight, unsharded_shape
from ..distributed.sharding import from_local_like, full_tensor, is_sharded, local, shard_like
from ..errors import LoRAError
from ..names import LIGHTNING, canonical, derives_from, join_names

BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"
INT8, FOUR_BITS = "int8", ("nf4", "fp4")
BLOCK = 64  # values that share a scale in 4 bits, by default
NF4 = "NF4Tensor"  # torchao's class, which derives from none of its others
DESCRIPTION = "lora_quant_state"  # our attribute of a sharded 4-bit weight: what its layer says of the whole weight
PACKED = "packing_format_for_cpu"  # of a 4-bit weight's description, once it was packed: whether it is
PACKS_FOR_CPU = "support_avx512bf16_for_cpu"  # bitsandbytes' attribute of a 4-bit layer
PACKED_BEFORE = "lora_packs_for_cpu"  # our attribute: that attribute was True before injection
SCALES, FORMAT, STATE = "SCB", "weight_format", ".quant_state"
LAYERS_OF_LIGHTNING = ("_Linear4bit", "_Linear8bitLt")  # classes that Lightning's BitsandbytesPrecision makes


def quantized_as(weight: object) -> str:
    """Return how a parameter is quantized, or "".

    bitsandbytes' parameters give "nf4", "fp4" or "int8", also before their first move to a device quantizes them.
    torchao's give the name of their class. A sharded parameter is quantized as its shards are.
    """
    if type(weight) in (torch.Tensor, nn.Parameter):
        return ""
    if is_sharded(weight):
        state = vars(weight).get(DESCRIPTION)
        return quantized_as(weight._local_tensor) if state is None else str(state.quant_type)  # to_local takes long
    if derives_from(weight, "Params4bit", (BITSANDBYTES,)):
        return str(cast(Any, weight).quant_type)
    if derives_from(weight, "Int8Params", (BITSANDBYTES,)):
        return INT8
    return type(weight).__name__ if is_of_torchao(weight) else ""


def is_of_torchao(weight: object) -> bool:
    """Return whether a parameter, or its shard on this rank, is a quantized tensor of torchao."""
    weight = weight._local_tensor if is_sharded(weight) else weight
    return any(derives_from(weight, name, (TORCHAO,)) for name in ("TorchAOBaseTensor", NF4))


def is_nf4_tensor(weight: object) -> bool:
    """Return whether a parameter, or its shard on this rank, is torchao's NF4Tensor."""
    return quantized_as(weight) == NF4


def refuse_bytes(weight: object, name: str) -> None:
    """Refuse a sharded weight whose values cannot be found, such as an 8-bit weight.

    Args:
        weight: a quantized parameter.
        name: of its layer, for the message.

    Raises:
        LoRAError: the weight is sharded, and neither an NF4Tensor nor a 4-bit weight.
    """
    if is_sharded(weight) and not is_nf4_tensor(weight) and DESCRIPTION not in vars(weight):
        raise LoRAError(
            f"{name!r}: its quantized weight was sharded, and the shards are bytes without values. Quantize the base "
            "in 4 bits instead, or keep the quantized base whole on each device, as DDP does."
        )


def quantized_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the quantized parameters among a module's own, by name."""
    describe_shard(module)
    parameters = ((name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
    return {name: parameter for name, parameter in parameters if quantized_as(parameter)}


def was_never_quantized(module: nn.Module) -> bool:
    """Return whether a layer of bitsandbytes has a plain weight, with which it cannot run."""
    weight = own_weight(module)
    if weight is None or is_sharded(weight) or quantized_as(weight):
        return False
    return any(derives_from(module, name, (BITSANDBYTES,)) for name in ("Linear4bit", "Linear8bitLt"))


def describe_shard(module: nn.Module) -> None:
    """Let a sharded 4-bit weight hold what its layer keeps of the whole weight, because fully_shard leaves that out.

    It must be called before shape_of, dtype_of or quantized_as looks at such a weight alone.
    """
    weight = own_weight(module)
    if is_sharded(weight) and derives_from(module, "Linear4bit", (BITSANDBYTES,)):
        vars(weight).setdefault(DESCRIPTION, cast(Any, module).quant_state)


def how_quantized(tensor: object, module: nn.Module) -> str:
    """Return quantized_as of a module's own tensor, also of a sharded 4-bit weight that only its layer describes."""
    return quantized_as(tensor) if quantized_parameters(module) else ""


def with_options_of_4_bits(kind: str, weight: Any) -> str:
    """Return how a parameter is quantized, as quantized_as says, with the options of 4 bits that change its values.

    These are the size of a block, if it is not bitsandbytes' usual 64, and double quantization, that of the scales too.
    """
    if kind not in FOUR_BITS:
        return kind
    # The parameter's options: of weights that were packed for a CPU the description has no double scales any more.
    size, double = getattr(weight, "blocksize", None), getattr(weight, "compress_statistics", None)
    state = state_of(weight)
    if double is None and state is not None:  # a shard
        size, double = state.blocksize, state.nested
    return f"{kind}{'' if size in (None, BLOCK) else f' in blocks of {size}'}{' double' if double else ''}"


def quantized_modules(places: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Return the modules with a quantized weight, by name.

    Args:
        places: every module of a model, a shared one under each of its names.
    """
    return {canonical(name): module for name, module in places if quantized_parameters(module)}


def dequantize(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """Return the values of a quantized parameter as a new plain tensor, in the dtype of `dtype_of`.

    The values of a sharded parameter are sharded like it. For a 4-bit weight of bitsandbytes this is collective, as its
    bytes are gathered. A parameter that is not quantized yet is quantized in a copy first, so that the result has
    its later values.
    """
    weight: Any = quantized_parameters(module)[name]
    quantized = quantized_as(weight)
    with torch.inference_mode(False), torch.no_grad():  # torchao's tensors cannot be detached in inference mode
        if weight.is_meta:
            return torch.empty(shape_of(weight), dtype=dtype_of(weight), device="meta")
        if is_sharded(weight) and state_of(weight) is not None:
            state = state_of(weight)
            packed = full_tensor(weight).to(state.absmax.device)  # shards may be offloaded
            values: torch.Tensor = sys.modules[f"{BITSANDBYTES}.functional"].dequantize_4bit(packed, state)
            return shard_like(values, weight)
        if quantized == NF4:
            return from_local_like(cast(Any, local(weight)).get_original_weight(), weight)
        if quantized == INT8:
            if weight.dtype.is_floating_point and not weight.has_fp16_weights:  # not quantized yet
                weight = type(weight)(weight.data, requires_grad=False).to(weight.device)
            if weight.dtype.is_floating_point:
                return cast(torch.Tensor, weight.data.clone())
            # The first forward moves the scale of each row from the weight to the layer.
            scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
            if scales is None:
                raise LoRAError(
                    f"{type(module).__name__}: its 8-bit weight has no scales; quantize it again, by .to(device)."
                )
            return cast(torch.Tensor, weight.data * scales.float()[:, None] * (1 / 127))
        if not derives_from(weight, "Params4bit", (BITSANDBYTES,)):
            return cast(torch.Tensor, weight.detach().dequantize())
        if weight.quant_state is None:
            weight = copy.copy(weight)
            weight.module = None  # otherwise quantizing the copy would change the layer
            weight = weight.to(weight.device)
        unpack_for_gradients_(module, weight)
        dequantized: torch.Tensor = sys.modules[f"{BITSANDBYTES}.functional"].dequantize_4bit(
            weight.data, weight.quant_state
        )
        return dequantized


def state_of(weight: Any) -> Any:
    """Return what bitsandbytes keeps of a quantized 4-bit weight, sharded or not; None for other weights."""
    return vars(weight).get(DESCRIPTION) if is_sharded(weight) else getattr(weight, "quant_state", None)


def dtype_of(weight: Any) -> torch.dtype:
    """Return the dtype of a parameter's dequantized values; for 8-bit weights it is float32."""
    state = state_of(weight)
    if state is not None:  # its packed bytes may have a floating dtype too
        return cast(torch.dtype, getattr(state, "original_dtype", state.dtype))
    return cast(torch.dtype, weight.dtype) if weight.dtype.is_floating_point else torch.float32


def shape_of(weight: Any) -> torch.Size:
    """Return the shape of a parameter's dequantized values. Of a flat slice return the whole parameter's shape."""
    state = state_of(weight)
    return torch.Size(unsharded_shape(weight) if state is None else state.shape)


def unpack_for_gradients_(module: nn.Module, weight: Any) -> bool:
    """Undo bitsandbytes' packing of a 4-bit weight for evaluation on a CPU with AVX512-BF16. In place.

    A packed weight gives its input no gradient. The values stay as packing has made them: the scales are rounded to
    bfloat16 and not quantized any more. bitsandbytes' own inverse, which state_dict() calls too, rounds the scales a
    second time, and returns scales that were not quantized in the wrong order; so the scales are restored here.

    Returns:
        Whether packing has changed the values, now or at an evaluation before.
    """
    state = weight.quant_state
    is_packed = getattr(state, PACKED, None)
    if is_packed is None:
        return False
    if is_packed:
        scales = state.absmax.T.reshape(-1).float().contiguous()
        inverse = sys.modules[f"{BITSANDBYTES}.functional"]._convert_weight_packed_for_cpu_inverse
        weight.data, state = inverse(weight.data, state)
        state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
        weight.quant_state = state
    elif state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    if getattr(module, "quant_state", None) is not None:
        cast(Any, module).quant_state = state
    return bool(state.original_nested) or state.original_dtype != torch.bfloat16


def keep_gradients_(modules: Iterable[nn.Module]) -> None:
    """Keep bitsandbytes from packing 4-bit layers, adapted or not, for evaluation. In place.

    Otherwise, on CPUs with AVX512-BF16, a layer that was evaluated once trains wrongly without an error: its output
    requires a gradient, and its input gets none (seen with bitsandbytes 0.50.2). No speed is lost: evaluated by itself,
    an unpacked layer of 1024 x 1024 takes 0.4 ms and a packed one 1.2 ms there. It may go when packed layers have a
    backward.
    """
    rounded = 0
    for module in modules:
        if getattr(module, PACKS_FOR_CPU, False):
            for weight in quantized_parameters(module).values():
                rounded += unpack_for_gradients_(module, weight)
            vars(module).update({PACKED_BEFORE: True, PACKS_FOR_CPU: False})
    if rounded:
        warnings.warn(
            f"lightning_lora: {rounded} 4-bit layers were evaluated without an adapter, and bitsandbytes then rounded "
            "their scales to bfloat16, so that a process that does not do this has other outputs. Build the model "
            "anew, and look at the base inside of disable_adapter(model), once it has an adapter.",
            stacklevel=2,
        )


def allow_packing_(modules: Iterable[nn.Module]) -> None:
    """Undo keep_gradients_. The next evaluation packs the layers again. In place."""
    for module in modules:
        if vars(module).pop(PACKED_BEFORE, False):
            vars(module)[PACKS_FOR_CPU] = True


# --- in state dicts ---
# A 4-bit layer of bitsandbytes writes `weight.absmax`, `weight.quant_state.bitsandbytes__nf4` and others, and its own
# load_state_dict refuses these as unexpected. An 8-bit layer writes `SCB` and `weight_format`, and refuses them after
# its first forward.


def quantization_entries(names: Iterable[str], weights: Collection[str]) -> set[str]:
    """Return the names of entries that describe quantized weights.

    Args:
        names: of a state dict.
        weights: names of the quantized weights.
    """
    found = set()
    for name in names:
        path, _, leaf = name.rpartition(".")
        weight = join_names(path, "weight") if leaf in (SCALES, FORMAT) else path.removesuffix(STATE)
        if weight in weights:
            found.add(name)
    return found


def is_of_lightning(module: nn.Module) -> bool:
    """Return whether Lightning's BitsandbytesPrecision has made a layer."""
    return any(derives_from(module, name, LIGHTNING) for name in LAYERS_OF_LIGHTNING)


def unchanged_weight(module: nn.Module, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the entry for a state dict that leaves a module's tensor as it is: normally the tensor itself.

    Layers of Lightning's BitsandbytesPrecision would quantize a loaded tensor again. They do nothing with one that has
    a quantized dtype, so for them the entry is an empty tensor of that dtype.
    """
    if not quantized_as(tensor) or not is_of_lightning(module):
        return tensor
    return torch.empty(0, dtype=torch.int8 if quantized_as(tensor) == INT8 else torch.uint8)
