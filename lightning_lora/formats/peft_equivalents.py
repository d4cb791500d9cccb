"""Adapters that PEFT has in another form: the equal adapter that PEFT applies, and the way back.

enable_lora: n adapted parts with factors (r, in) and (out / len, r) equal one adapter of rank n * r. A is the same. B
is block diagonal, with zero rows for the parts that are left alone. The scaling stays, so lora_alpha grows.

Attention: PEFT adapts it whole. Where out_proj alone is adapted, in_proj gets factors that are all zero. They stay zero
when PEFT trains on. peft adds the change of out_proj twice, in forward and in merge (measured on 0.21.2; a fix is
proposed in huggingface/peft#3774). So B is halved on the way out and doubled on the way in, which is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.values import holds_numbers, is_strided
from ..errors import LoRAError
from ..names import A, B
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, from_block_diagonal, to_block_diagonal

OUT_PROJ_COUNTS = 2  # times
LAST_KNOWN_PEFT = (0, 21)


def without_enable_lora(adapter: Adapter) -> Adapter:
    """Return the equal adapter without enable_lora, as PEFT applies it."""
    return _with_factors_b(adapter, lambda name, a, b, enabled: to_block_diagonal(b, enabled), 1 / OUT_PROJ_COUNTS)


def with_enable_lora(adapter: Adapter) -> Adapter:
    """Undo without_enable_lora.

    Tensors that are missing or hold no numbers stay as they are, for the check of factors to refuse.

    Raises:
        LoRAError: a B is not zero outside its blocks, which enable_lora cannot express.
    """
    return _with_factors_b(adapter, _from_block_diagonal, OUT_PROJ_COUNTS)


def add_idle_attention(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Adapt attention whole, as PEFT does, where its out_proj alone is adapted.

    Returns:
        The equal adapter, and the names of the attention layers that were added. Their tensors are all zero.
    """
    outputs = {name.rpartition(".")[0]: name for name in adapter.of_kind(ATTENTION_OUTPUT)}
    added = [name for name in outputs if name not in adapter.layers]
    tensors = dict(adapter.tensors)
    for name in added:
        stored, (a, b, _) = adapter.stored(outputs[name]), adapter.effective_factors(outputs[name])
        shape = torch.Size((3 * b.shape[0], a.shape[1]))
        info = replace(adapter.layer_info(outputs[name]), name=name, kind=ATTENTION, shape=shape)
        zeros = {leaf: stored[leaf].new_zeros(shape) for leaf, shape in adapter.variant.shapes(info).items()}
        tensors |= {f"{name}.{leaf}": zero for leaf, zero in zeros.items()}
    layers = {name: replace(adapter.layers[outputs[name]], kind=ATTENTION) for name in added}
    return replace(adapter, tensors=tensors, layers={**adapter.layers, **layers}), added


def idle_attention(adapter: Adapter) -> list[str]:
    """Return the attention layers whose tensors are all zero, as add_idle_attention adds them."""
    attention = {name: adapter.stored(name) for name in adapter.of_kind(ATTENTION)}
    return [name for name, stored in attention.items() if stored and all(map(_is_zero, stored.values()))]


def check_peft_version(version: object, where: object) -> None:
    """Raise LoRAError for attention of a peft that is not known yet, which may add out_proj's change once."""
    if peft_numbers(version)[:2] > LAST_KNOWN_PEFT:
        raise LoRAError(
            f"{where}: adapts nn.MultiheadAttention and was written by peft {version}. peft up to 0.21 adds the change "
            "of out_proj twice; whether this one does is not known here. Update lightning_lora, or leave attention out."
        )


def peft_numbers(version: object) -> tuple[int, ...]:
    """Return the numbers of a version of peft, as (0, 18, 1); of an unknown one (), which is before all others."""
    return tuple(map(int, re.findall(r"\d{1,9}", str(version or ""))[:3]))


def _is_zero(tensor: Any) -> bool:
    return is_strided(tensor) and not tensor.is_meta and not tensor.any()


def _with_factors_b(adapter: Adapter, for_parts: Callable[..., torch.Tensor], for_output: float) -> Adapter:
    """Return the adapter with another B in layers of which parts are adapted, and in out_proj of attention.

    Args:
        adapter: the adapter.
        for_parts: makes the B of a layer with parts, from its name, A, B and enable_lora.
        for_output: what the B of an out_proj is multiplied by.
    """
    changed = dict[str, torch.Tensor]()
    for name, layer in adapter.layers.items():
        is_output = layer.kind == ATTENTION_OUTPUT
        a, b = adapter.tensors.get(f"{name}.{A}"), adapter.tensors.get(f"{name}.{B}")
        if not (layer.parts or is_output) or not (holds_numbers(a) and holds_numbers(b)):
            continue
        changed[f"{name}.{B}"] = b.detach() * for_output if is_output else for_parts(name, a, b, layer.parts)
    return replace(adapter, tensors={**adapter.tensors, **changed}).with_layers() if changed else adapter


def _from_block_diagonal(name: str, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    """Return the B of the adapted parts out of a block diagonal B."""
    if (
        not a.dim() == b.dim() == 2
        or a.shape[0] != b.shape[1]
        or b.shape[1] % sum(enabled)
        or b.shape[0] % len(enabled)
    ):
        raise LoRAError(
            f"adapter: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit enable_lora={list(enabled)}."
        )
    narrow = from_block_diagonal(b, enabled)
    if not torch.equal(to_block_diagonal(narrow, enabled), b):
        raise LoRAError(
            f"adapter: {name!r}: its B is not zero outside the blocks of enable_lora={list(enabled)}; something else "
            "changed it after it was saved."
        )
    return narrow
