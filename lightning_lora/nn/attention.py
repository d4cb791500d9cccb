"""nn.MultiheadAttention with an adapted input projection. With only out_proj adapted it is a reader (readers.py)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import nn

from . import low_rank
from .lora_layer import LoRALayer
from .low_rank import IN_PROJ
from .parameter import LoRAParameterHolder


class LoRAMultiheadAttention(LoRALayer):
    """nn.MultiheadAttention's in_proj: W (3E, E), A (r, E), B (3E, r). Its out_proj is adapted as a separate layer.

    The parts of enable_lora are q, k and v. The layer always runs on W'. With kdim or vdim there are three
    weights, which are adapted as single parameters (nn/parameter.py).
    """

    KIND = low_rank.ATTENTION
    MODULES = (nn.MultiheadAttention,)

    @property
    def weight_leaf(self) -> str:
        return IN_PROJ

    def adapted_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self, IN_PROJ))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lora_active:
            self.check_strengths()
            return super().forward(*args, **kwargs)
        with dense_output(self):
            return self.dense_forward(*args, **kwargs)


class LoRAAttentionHolder(LoRAParameterHolder):
    """nn.MultiheadAttention with weights that are adapted by themselves, as q, k and v with kdim or vdim are."""

    MODULES = (nn.MultiheadAttention,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with dense_output(self):
            return super().forward(*args, **kwargs)


def dense_output(attention: nn.Module) -> AbstractContextManager[object]:
    """Return a context manager in which W' stands in for the weight of out_proj, which attention only reads."""
    out_proj = cast(nn.MultiheadAttention, attention).out_proj
    return out_proj.on_dense_weight() if isinstance(out_proj, LoRALayer) and out_proj.lora_active else nullcontext()
