"""PEFT's tensors without PEFT's options: in memory, in a file by itself, or in a Lightning checkpoint.

A LightningModule that holds a PeftModel saves all of it under names that wrapping has changed. Nothing there tells the
options, but ranks are in the shapes, and lora_alpha may be among the hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mode

import torch

from ..config import LoRAConfig
from ..errors import LoRAError, shown
from ..matching import exact_key
from ..names import A, B, parent_names
from ..nn.lora import EMBEDDING_A
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, CONV, EMBEDDING
from ..notices import tell
from .adapter import Adapter, check_factors, refuse_nested
from .file_options import check_options
from .peft_forms import from_peft_form, spread
from .peft_mapping import check_peft_version, from_plain
from .peft_names import read_names

ALPHA = "lora_alpha"
FROM_HYPER_PARAMETERS = (ALPHA, "use_rslora", "alpha_pattern", "lora_dropout", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, which training changes


def read_state(state: Mapping[str, torch.Tensor], where: object, hyper_parameters: object = None) -> Adapter:
    """Return the adapter in tensors under PEFT's names, those of a file or of a live PeftModel's state dict.

    Args:
        state: tensors by PEFT's names.
        where: for messages.
        hyper_parameters: of the checkpoint that they are from. Where a lora_alpha is in it, by itself or in one mapping
            in it, the adapter has options, else none.

    Raises:
        LoRAError: it is more than plain LoRA, or damaged.
    """
    names = read_names(state, where)
    tensors = spread(names.shared, state, {ours: state[name] for name, ours in names.ours.items()})
    rows = Adapter(tensors).rows()
    if rows:
        raise LoRAError(
            f"{where}: holds trained rows of {next(iter(rows))!r}, and not which rows these are: that is in "
            "adapter_config.json alone. Write a folder with PeftModel.save_pretrained(path), and give that."
        )
    kinds = kinds_of(tensors, names.bare, None, where)
    adapter = Adapter(tensors, kinds=kinds, network=names.network, peft_outputs=True)
    whole = adapter.beside_factors()
    if names.live:
        trained = {name for name in whole if names.saved.intersection(parent_names(name))}
        base = {name for name in whole if name not in trained and name.rpartition(".")[2] not in STATISTICS}
    else:
        base = {name for name in whole if name in names.of_layers and name.endswith(".weight")}
    adapter = replace(adapter, perhaps_base=frozenset(base))
    config = _config(adapter, sorted(names.saved), hyper_parameters)
    if config is not None:
        scalings = {name: config.scaling(adapter.options_name(name)) for name in adapter.layers()}
        adapter = replace(adapter, config=config, scalings=scalings)
    adapter = from_peft_form(adapter)
    check_factors(adapter, str(where))
    return from_plain(adapter)


def _config(adapter: Adapter, saved: list[str], hyper_parameters: object) -> LoRAConfig | None:
    if not isinstance(hyper_parameters, Mapping):
        return None
    mappings = [hyper_parameters, *(value for value in hyper_parameters.values() if isinstance(value, Mapping))]
    found = [mapping for mapping in mappings if isinstance(mapping.get(ALPHA), (int, float))]
    if len(found) != 1:
        return None
    options = {name: found[0][name] for name in FROM_HYPER_PARAMETERS if found[0].get(name) is not None}
    given = ", ".join(f"{name}={shown(value)}" for name, value in options.items())
    tell(f"lightning_lora: the options {given} are taken from the checkpoint's hyper-parameters.")
    ranks = adapter.ranks()
    check_options(options, ranks, "adapter: the checkpoint's hyper-parameters")
    common = mode(ranks.values())
    patterns = {exact_key(name): rank for name, rank in ranks.items() if rank != common}
    options |= adapter.variant.options()
    return LoRAConfig(r=common, rank_pattern=patterns, target_modules=list(ranks), modules_to_save=saved, **options)


def kinds_of(
    tensors: Mapping[str, torch.Tensor], peft_names: Mapping[str, str], peft_version: object, where: object
) -> dict[str, str]:
    """Return the kinds of layers, as far as PEFT's names and the factors' shapes tell them.

    Args:
        tensors: by our names.
        peft_names: of these, without an adapter's name.
        peft_version: that wrote them, if known.
        where: for messages.

    Raises:
        LoRAError: a layer is of a kind that cannot be applied.
    """
    refuse_nested(tensors, where)
    kinds = {}
    adapter = Adapter(tensors)
    for name in adapter.layers():
        if adapter.is_parameter(name):
            continue  # which of them is a stack, and whether that is transposed, its model tells
        if f"{name}.{A}" not in tensors:
            continue
        if peft_names[f"{name}.{A}"].endswith(EMBEDDING_A):
            kinds[name] = EMBEDDING
        elif peft_names[f"{name}.{A}"].endswith("base_layer.out_proj.lora_A.weight"):
            kinds |= {name: ATTENTION_OUTPUT, name.rpartition(".")[0]: ATTENTION}
            check_peft_version(peft_version, where)
        a, b = tensors[f"{name}.{A}"], tensors.get(f"{name}.{B}")
        if a.dim() > 2 and b is not None and b.dim() == a.dim():
            _refuse_crossing_groups(name, a, b, where)
            kinds[name] = CONV
    return kinds


def _refuse_crossing_groups(name: str, a: torch.Tensor, b: torch.Tensor, where: object) -> None:
    if b.shape[1] != a.shape[0] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise LoRAError(
            f"{where}: {name!r} is a convolution with {a.shape[0] // b.shape[1]} groups: A {tuple(a.shape)} sees all "
            f"input channels, B {tuple(b.shape)} one group of the rank. Their product crosses the groups: no grouped "
            "weight equals it, and it cannot be applied."
        )
