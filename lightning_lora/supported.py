"""Which modules can be adapted, and why others cannot."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .base import HALF, A, LoRALayer
from .config import LoRAConfig
from .errors import LoRAError
from .layers import LoRALinear, layer_kind
from .sharding import is_sharded

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def check_unadapted(model: nn.Module) -> None:
    """Raise where a model already has adapters, of this package or another, which injection would freeze or hide.

    Raises:
        LoRAError: names the first one.
    """
    for name, module in model.named_modules():
        library = type(module).__module__.partition(".")[0]
        if isinstance(module, LoRALayer):
            raise LoRAError(
                f"inject: {name!r} in {type(model).__name__} was adapted already, through a module around it; pass the "
                "module that inject was called on, or unload it first."
            )
        if library == "peft" or (library == "loralib" and hasattr(module, A)):
            raise LoRAError(
                f"inject: {type(model).__name__} already has adapters of {library} ({name!r}); merge or unload them "
                "first."
            )


def check_shapes(model: nn.Module) -> None:
    """Raise where a lazy layer has no shape yet, which can neither be frozen nor saved.

    Raises:
        LoRAError: names the first one.
    """
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise LoRAError(
                f"inject: {name!r}: the {type(module).__name__} has no shape yet; run one batch through the model "
                "first."
            )


def check_supported(name: str, module: nn.Module, config: LoRAConfig) -> None:
    """Raise where a module cannot be adapted.

    Raises:
        LoRAError: says why, and what to do.
    """
    kind = type(module).__name__
    problem = ""
    if layer_kind(module) is None:
        inside = [child for child, m in module.named_modules() if child and layer_kind(m)]
        problem = f"a {kind} cannot be adapted" + (f"; name the layers inside it, as {inside[0]!r}" if inside else "")
    elif hasattr(module, A):
        problem = f"the {kind} has a lora_A of another library; take that out first"
    elif "forward" in vars(module):
        problem = f"its forward is replaced on the instance of {kind}, which would pass over the adapter; undo that"
    else:
        problem = _weight_problem(module)
    enabled = config.enabled_parts(name)
    if not problem and enabled is not None:
        if not issubclass(layer_kind(module) or nn.Module, LoRALinear):
            problem = f"enable_lora needs a linear layer, not a {kind}"
        elif _outputs(module) % len(enabled):
            problem = f"enable_lora has {len(enabled)} parts, which do not divide its {_outputs(module)} outputs"
    if problem:
        raise LoRAError(f"inject: {name!r}: {problem}, or leave it out with exclude_modules=[{name!r}].")


def _weight_problem(module: nn.Module) -> str:
    kind = type(module).__name__
    names = ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",)
    weights = [module._parameters[name] for name in names if module._parameters.get(name) is not None]
    if is_parametrized(module) or not weights:
        return f"the weight of the {kind} is computed from others (weight_norm, parametrize); remove that first"
    for weight in weights:
        if is_sharded(weight):
            return (
                f"the weight of the {kind} is sharded already; call inject(model, LoRAConfig(...)) in configure_model, "
                "after the layers are built and before fully_shard or parallelize_module"
            )
        if weight is not None and weight.dtype not in (*HALF, torch.float32, torch.float64):
            return f"its weight is {weight.dtype}; adapters need float16, bfloat16, float32 or float64"
    return ""


def _outputs(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return 3 * int(module.embed_dim)
    rows, cols = cast(torch.Tensor, module.weight).shape
    return int(rows if isinstance(module, nn.Linear) else cols)
