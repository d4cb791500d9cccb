"""Adapters of single parameters: stacks of experts, weights of nn.LSTM and nn.GRU, any parameter that a forward reads.

The adapter of a parameter `w` is the parameters `lora_A_w` and `lora_B_w` in the same module. While the module's
forward runs, W' stands in for W. In a stack of experts W and the factors stay apart (FactoredWeight), so that no
tensor of the stack's size is built. In a recurrent layer the sum is placed into the list of weights that the layer runs
on, so that the layer does not flatten its weights again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..distributed.sharding import is_sharded, window
from ..errors import LoRAError
from ..names import join_names, parameter_factor_name, split_factor_name
from . import low_rank
from .adapted_module import AdaptedModule, StandIns, is_factor, swapped_class
from .adapted_weights import AdaptedWeights, LayerSpec, LayerState, add_trained_adapter_
from .factored_weight import FactoredWeight
from .low_rank import LowRankBlock, crop, stack_factors
from .quantized import shape_of
from .transforms import runs_by_formula

HOLDERS: list[type[LoRAParameterHolder]] = []  # of modules whose forward needs more than W' in its place
FACTORED = ("transformers.", "torch.nn.modules.linear")  # forwards from these modules run with a FactoredWeight


class LoRAParameter(AdaptedWeights):
    """The adapter of one parameter of a module. nn/low_rank.py states the shapes of A and B, see its kinds SINGLE."""

    def __init__(self, holder: AdaptedModule, parameter: str, state: LayerState) -> None:
        self.module, self.parameter, self.lora, self.lora_active = holder, parameter, state, True
        if cast(nn.Parameter, holder._parameters[parameter]).dim() == 2:
            self.KIND = low_rank.PARAMETER
        else:  # transformers' experts whose stack is transposed have is_transposed = True
            is_transposed = getattr(holder, "is_transposed", False) is True
            self.KIND = low_rank.TRANSPOSED_EXPERTS if is_transposed else low_rank.EXPERTS

    @property
    def lora_holder(self) -> nn.Module:
        return self.module

    def stored_name(self, leaf: str) -> str:
        return parameter_factor_name(self.parameter, leaf)

    @property
    def weight_leaf(self) -> str:
        return self.parameter

    def adapted_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.module._parameters[self.parameter])

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        is_stack = self.KIND in low_rank.STACKS and weight.dim() == 3  # else a flat slice, or one matrix
        return weight.view(-1, weight.shape[-1]) if is_stack else weight

    def crop_to_shard(self, blocks: list[LowRankBlock], weight: torch.Tensor) -> list[LowRankBlock]:
        if self.KIND not in low_rank.STACKS or not is_sharded(weight):
            return super().crop_to_shard(blocks, weight)
        experts, *matrix = window(weight)
        if matrix != [slice(0, size) for size in weight.shape[1:]]:
            raise LoRAError(f"a stack of shape {tuple(weight.shape)} cannot be merged while it is sharded beyond dim 0")
        rows = weight.shape[1]
        return crop(blocks, slice(experts.start * rows, experts.stop * rows))

    def delta(self, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...] | None = None) -> torch.Tensor:
        left, right = self._left_and_right(a, b)
        return left @ right

    def _left_and_right(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return left (m, r) and right (r, n), or for a stack (E, m, r) and (E, r, n)."""
        is_stack = self.KIND in low_rank.STACKS
        return stack_factors(self.KIND, self.adapted_weight().shape, a, b) if is_stack else (b, a)

    def stand_in(self, weight: torch.Tensor) -> Any:
        """Return W', or a FactoredWeight if the module's forward is known to work with one."""
        known = self.module.lora_base.forward.__module__.startswith(FACTORED)
        if not known or torch.compiler.is_compiling() or runs_by_formula(weight):
            return super().stand_in(weight)
        pairs, packed = [], self.lora.attached
        if self.lora.strength:
            a, b, scale = self.effective_factors()
            if scale is not None:
                return super().stand_in(weight)
            pairs.append((a, b * self.scaling))
        if packed is not None:
            pairs.append(packed.factors(weight.device))
        if not pairs:
            return weight
        self.record_segment()
        a, b = pairs[0] if len(pairs) == 1 else low_rank.stack_ranks(*pairs[0], *pairs[1])
        return FactoredWeight(weight, *self._left_and_right(a, b))


class LoRAParameterHolder(AdaptedModule):
    """A module with some parameters that are adapted by themselves."""

    ATTRIBUTES = ("lora_parameters",)
    MODULES: ClassVar[tuple[type[nn.Module], ...]] = ()  # the modules of a subclass, which adds itself to HOLDERS
    lora_parameters: dict[str, LoRAParameter]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "MODULES" in vars(cls):
            HOLDERS.append(cls)

    def lora_adapters(self) -> Mapping[str, AdaptedWeights]:
        return self.lora_parameters

    def lora_unadapt(self, adapter: AdaptedWeights) -> None:
        if len(self.lora_parameters) > 1:
            self.lora_parameters.pop(cast(LoRAParameter, adapter).parameter)
        else:
            super().lora_unadapt(adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = [adapter for adapter in self.lora_parameters.values() if adapter.lora_active]
        next(iter(self.lora_parameters.values())).check_strengths()
        if not active:
            return super().forward(*args, **kwargs)
        with StandIns(self, active):
            return super().forward(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # FSDP2 registers the sharded parameters of an nn.RNNBase in this way, so there they say nothing about a plan.
        if split_factor_name(name) and is_sharded(param) and not isinstance(self, nn.RNNBase):
            raise LoRAError(
                f"{type(self).__name__}: adapters of single parameters do not follow a tensor parallel split; leave "
                "the parameter out of target_parameters, or the module out of the parallelize plan."
            )
        super().register_parameter(name, param)


class LoRARecurrent(LoRAParameterHolder):
    """nn.LSTM or nn.GRU. They run on a list of their weights, and flatten it again if a parameter was replaced."""

    MODULES = (nn.RNNBase,)

    def lora_put(self, values: Mapping[str, Any]) -> None:
        cast(Any, self)._update_flat_weights()  # the layer's forward calls this first, and would undo the change below
        weights, names = cast("list[Any]", self._flat_weights), cast("list[str]", self._flat_weights_names)
        for name in values.keys() & names:
            weights[names.index(name)] = values[name]
        super().lora_put({name: value for name, value in values.items() if name not in names})  # those of a subclass


def adapt_parameter_(module: nn.Module, parameter: str, name: str, spec: LayerSpec, injection: object) -> LoRAParameter:
    """Add an adapter for one parameter to a module, or to what is attached to it. In place.

    Its stored tensors are created later.
    """
    holder, is_holder = cast(LoRAParameterHolder, module), isinstance(module, LoRAParameterHolder)
    if is_holder and parameter in holder.lora_parameters:  # adapters are attached to it
        return cast(LoRAParameter, add_trained_adapter_(holder.lora_parameters[parameter], spec))
    adapter = LoRAParameter(holder, parameter, LayerState(spec, name, injection))
    if is_holder:
        holder.lora_parameters[parameter] = adapter
    else:
        mixin = next((each for each in HOLDERS if isinstance(module, each.MODULES)), LoRAParameterHolder)
        vars(module)["lora_parameters"] = {parameter: adapter}  # before the class, as in adapt_
        module.__class__ = swapped_class(mixin, type(module))
    return adapter


def weights_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the base's parameters of two or three dimensions, each as its module and its name in the module."""
    return {
        join_names(path, leaf): (module, leaf)
        for path, module in modules.items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and len(shape_of(parameter)) in (2, 3) and not is_factor(leaf, module)
    }
