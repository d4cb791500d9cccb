"""Adapters that PEFT has in another form: the equal adapter that PEFT applies, and the way back.

A variant converts its own tensors (to_peft_form, from_peft_form).

enable_lora: n adapted parts with factors (r, in) and (out / len, r) equal one adapter of rank n * r. A is the same. B
is block diagonal, with zero rows for the parts that are left alone. The scaling stays, so lora_alpha grows.

Attention: PEFT adapts it whole. Where out_proj alone is adapted, in_proj gets factors that are all zero. They stay zero
when PEFT trains on. peft adds the change of out_proj twice, in forward and in merge (measured on 0.21.2; a fix is
proposed in huggingface/peft#3774). So B is halved on the way out and doubled on the way in, which is exact.

Attention beside transformers' Conv1D has no equal. PEFT has one flag fan_in_fan_out for a folder. In the order of the
model's modules it sets the flag to false at each nn.Linear that it adapts and to true at each Conv1D. At
nn.MultiheadAttention it leaves the flag as it is. So out_proj after a Conv1D gets the transpose of s * B @ A (measured
on 0.21.2). target_parameters come last, and PEFT refuses them where the flag is true. No file has the order of the
modules, so such adapters are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ..adapter.adapter import Adapter
from ..adapter.values import holds_numbers, is_strided
from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import A, B
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, CONV1D, from_block_diagonal, to_block_diagonal
from ..nn.variant import Variant

OUT_PROJ_COUNTS = 2  # times
LAST_KNOWN_PEFT = (0, 21)
TURNS = "PEFT transposes the change of out_proj after such a layer, and no file has the order of the layers"


def to_peft_form(adapter: Adapter) -> Adapter:
    """Return the adapter with tensors and options as PEFT has them for its variant, under our names."""
    if type(adapter.variant).to_peft is Variant.to_peft:
        return replace(adapter, config=config_in_peft(adapter))
    tensors = dict(adapter.tensors)
    for layer in adapter.layers:
        stored = {leaf: value.detach() for leaf, value in adapter.stored(layer).items()}
        changed = adapter.variant.to_peft(stored, adapter.layer_info(layer))
        for leaf in stored.keys() - changed.keys():
            del tensors[adapter.factor_name(layer, leaf)]
        tensors |= {adapter.factor_name(layer, leaf): value for leaf, value in changed.items()}
    return replace(adapter, tensors=tensors, config=config_in_peft(adapter)).with_layers()


def from_peft_form(adapter: Adapter) -> Adapter:
    """Undo to_peft_form, for an adapter whose options are ours.

    Raises:
        LoRAError: the tensors of a layer do not have that form.
    """
    if type(adapter.variant).from_peft is Variant.from_peft:
        return adapter
    tensors = dict(adapter.tensors)
    for layer in adapter.layers:
        found = adapter.stored(layer)
        if not found.keys() >= set(adapter.variant.trained):
            continue  # the check of factors refuses it
        changed = adapter.variant.from_peft(found, adapter.layer_info(layer))
        tensors |= {adapter.factor_name(layer, leaf): value for leaf, value in changed.items()}
    return replace(adapter, tensors=tensors).with_layers()


def config_in_peft(adapter: Adapter) -> LoRAConfig | None:
    """Return the options that an adapter has in PEFT's form."""
    return None if adapter.config is None else adapter.variant.config_in_peft(adapter.config)


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
    idle = []
    for name in adapter.of_kind(ATTENTION):
        stored = adapter.stored(name).values()
        if stored and all(is_strided(each) and not each.is_meta and not each.any() for each in stored):
            idle.append(name)
    return idle


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


# --- attention beside transformers' Conv1D ---


def refuse_to_write_beside_conv1d(adapter: Adapter, verb: str) -> None:
    """Raise LoRAError where an adapter has attention or single parameters beside transformers' Conv1D."""
    if not _beside_conv1d(adapter):
        return
    outputs = adapter.of_kind(ATTENTION_OUTPUT)
    if outputs or adapter.parameters:
        first = (outputs or adapter.parameters)[0]
        what = "attention" if outputs else "a single parameter"
        raise LoRAError(
            f"{verb}: {first!r} is {what} in a model with transformers' Conv1D, and PEFT has one "
            "fan_in_fan_out for both, so no file of PEFT holds the two. Save a Lightning checkpoint or merged "
            "weights instead (save_merged), or leave one of the two out of the adapter."
        )


def refuse_file_beside_conv1d(adapter: Adapter, where: object) -> None:
    """Raise LoRAError where a file has attention and says that a Conv1D is, or may be, beside it."""
    outputs = adapter.of_kind(ATTENTION_OUTPUT)
    if outputs and _beside_conv1d(adapter):
        raise LoRAError(
            f"{where}: adapts {outputs[0]!r} of attention with fan_in_fan_out=true, as for transformers' Conv1D. "
            f"{TURNS}. Merge it in PEFT (merge_and_unload) and load the merged weights."
        )


def refuse_conv1d_of_model(adapter: Adapter, conv1d: str | None, where: object) -> None:
    """Raise LoRAError where an adapter of PEFT's has attention, and a layer of its model is a Conv1D.

    Args:
        adapter: as it was read.
        conv1d: the name of a layer that is one, if any.
        where: for messages.
    """
    outputs = adapter.of_kind(ATTENTION_OUTPUT) if adapter.peft_version is not None else []
    if outputs and conv1d is not None:
        raise LoRAError(
            f"{where}: adapts {outputs[0]!r} of attention, and {conv1d!r}, which is transformers' Conv1D. {TURNS}. "
            "Merge it in PEFT (merge_and_unload) and load the merged weights."
        )


def _beside_conv1d(adapter: Adapter) -> bool:
    return adapter.fan_in_fan_out or bool(adapter.of_kind(CONV1D))
