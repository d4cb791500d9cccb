"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Options and tensors go under PEFT's names. The header of the tensor file also carries this package's own description,
which other readers pass over; buffers such as BatchNorm's statistics go in by their plain names, as PEFT loads them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapter.adapter import Adapter, is_head_only, strengths_text
from ..adapter.metadata import to_metadata
from ..adapter.renaming import by_network_names
from ..errors import LoRAError
from ..files.atomic import new_folder
from ..files.paths import PathLike, write_json
from ..files.safetensors import write_tensors
from ..names import A, B, listed
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, SEPARATE, TRANSPOSED_EXPERTS
from ..nn.variant import Variant
from ..notices import tell
from .forms import CONFIG_FILE
from .model_card import CARD_FILE, model_card, module_in_words
from .peft_equivalents import add_idle_attention, refuse_to_write_beside_conv1d, to_peft_form, without_enable_lora
from .peft_names import PREFIX, peft_name
from .peft_options import frozen_in_saved, options_to_peft
from .peft_parameters import PARAMETERS, Nesting, nesting_of, refuse_without_model, stacks_to_peft
from .peft_reading import HEADER_KEY, IDLE, TENSOR_FILE, factor_names
from .peft_rows import as_peft_stores, peft_table_name
from .plain import plain_targets


class FolderContent(NamedTuple):
    """What a PEFT folder is to hold.

    Attributes:
        options: the fields of adapter_config.json.
        tensors: by PEFT's names. They may share the adapter's memory.
        description: this package's own, for the header of the tensor file.
    """

    options: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    description: dict[str, Any]


def write_folder(
    adapter: Adapter, path: PathLike, *, verb: str = "save_adapter", plain: bool = False, network: str = ""
) -> None:
    """Write an adapter as a PEFT folder under the network's names. What else is there stays, a model card too.

    Args:
        adapter: what is written. The tensors of frozen_in_saved are in its `base`.
        path: the folder.
        verb: what errors begin with.
        plain: the adapter has the plain form of plain.py, and its layers are named as that form wants it.
        network: the prefix of the network in the LightningModule that was saved, where the adapter does not tell it.

    Raises:
        LoRAError: PEFT has no equal of one of its layers, or wants frozen tensors that it does not hold. Nothing is
            written.
    """
    if is_head_only(adapter):
        raise LoRAError(
            f"{path}: no layer is adapted (target_modules=[]), and PEFT has no file without one. "
            "Write the whole model with save_merged(model, path), or keep the checkpoint, which "
            "load_from_checkpoint and load_adapter take."
        )
    network = network or ("" if adapter.pretrained else adapter.network)
    _tell_what_differs(adapter, path)
    content = folder_content(adapter, verb=verb, plain=plain)
    # Copies, whose elements follow each other: the adapter's may be views, of each other's memory or of a device's.
    tensors = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in content.tensors.items()}
    text = json.dumps(content.description, separators=(",", ":"))
    has_card = os.path.lexists(Path(path) / CARD_FILE)
    with new_folder(path) as folder:
        write_tensors(folder / TENSOR_FILE, tensors, {"format": "pt", HEADER_KEY: text})
        write_json(folder / CONFIG_FILE, content.options)
        if not has_card:
            (folder / CARD_FILE).write_bytes(model_card(content.options, adapter, network).encode("utf-8"))


def _tell_what_differs(adapter: Adapter, path: PathLike) -> None:
    """Tell what PEFT's folder leaves out of an adapter, and which module PEFT loads it onto."""
    extra = [name for name, value in adapter.tensors.items() if not isinstance(value, torch.Tensor)]
    if lost := [name for name in extra if adapter.tensors[name] is not None]:
        warnings.warn(f"lightning_lora: the extra state {lost} is no tensor and is left out.", stacklevel=4)
    outside = [name for name in adapter.tensors if not name.startswith(adapter.network) and name not in extra]
    if outside:
        tell(
            f"lightning_lora: {listed(outside)} lies outside of the LightningModule's {adapter.network[:-1]} and is "
            "left out, because PEFT's format has no place for it. A checkpoint holds it."
        )
    if adapter.foreign.values:
        tell(
            f"lightning_lora: {path}: {listed(list(adapter.foreign.values))} is left out: a module wrote it into "
            "state_dict() of its own, which PEFT's format has no place for. A checkpoint holds it."
        )
    if adapter.attached:
        tell(
            f"lightning_lora: {path}: holds only the trained adapter. It was trained with "
            f"{strengths_text(adapter.attached)} attached, and computes something else without."
        )
    if adapter.pretrained:
        tell(_names_of_whole(adapter, path))


def folder_content(adapter: Adapter, *, verb: str = "save_adapter", plain: bool = False) -> FolderContent:
    """Return what write_folder writes, without extra state that is no tensor. Arguments and errors are its own."""
    tensors = {name: value for name, value in adapter.tensors.items() if isinstance(value, torch.Tensor)}
    if len(tensors) < len(adapter.tensors):
        adapter = replace(adapter, tensors=tensors, complete=False)
    own = by_network_names(adapter)
    frozen = _frozen_in_saved(own, verb)
    for name in own.layers:
        _refuse_without_equal(own, name, verb)
    refuse_to_write_beside_conv1d(own, verb)
    refuse_without_model(own, verb)
    own = as_peft_stores(own, verb)
    own, idle = add_idle_attention(own)
    in_peft = without_enable_lora(to_peft_form(own))
    nesting = nesting_of(own.parameters)
    values = stacks_to_peft({**in_peft.tensors, **frozen}, factor_names(own).values())
    description = to_metadata(own)
    if idle:
        description[IDLE] = idle
    if nesting:
        description[PARAMETERS] = nesting
    options = options_to_peft(in_peft, verb)
    if plain:
        targets, excluded = plain_targets(in_peft, verb)
        options |= {"target_modules": targets, "exclude_modules": excluded or None}
    return FolderContent(options, _by_peft_names(values, own, in_peft.variant, nesting), description)


def _names_of_whole(adapter: Adapter, path: PathLike) -> str:
    """Say onto which module PEFT loads an adapter of more than a transformers model."""
    name = adapter.pretrained.removesuffix(".")
    outside = [layer for layer in adapter.layers if not layer.startswith(adapter.pretrained)]
    alone = f"save_adapter(module.{name}, path) writes the adapter of that model alone."
    if outside:
        alone = f"A folder for that model alone needs a run that adapts no layer outside of it, as {outside[0]!r} is."
    call = ".".join(["Net()", *adapter.network.split(".")]).removesuffix(".")
    return (
        f"lightning_lora: something outside of the transformers model {name!r} was trained too, so names in {path} are "
        f"those of {module_in_words(adapter)}, and PEFT loads it onto that: PeftModel.from_pretrained({call}, path). "
        f"{alone}"
    )


def _by_peft_names(
    tensors: Mapping[str, torch.Tensor], adapter: Adapter, variant: Variant, nesting: Nesting
) -> dict[str, torch.Tensor]:
    """Return tensors under PEFT's names.

    Args:
        tensors: in PEFT's form, by our names.
        adapter: the adapter that they belong to.
        variant: of the adapter in PEFT's form.
        nesting: the adapted parameters of each module.
    """
    tables = {*adapter.tables, *adapter.tied}
    named = {}
    for name, tensor in tensors.items():
        in_table = peft_table_name(name, tables)
        of_layer = peft_name(name, variant, adapter.layers, nesting)
        named[f"{PREFIX}{in_table}" if in_table != name else of_layer] = tensor
    return named


def _frozen_in_saved(adapter: Adapter, verb: str) -> dict[str, torch.Tensor]:
    """Return the frozen tensors that PEFT wants in the file."""
    wanted = frozen_in_saved(adapter, verb)
    missing = [name for name in wanted if name not in adapter.base]
    if missing:
        raise LoRAError(
            f"{verb}: PEFT's modules_to_save takes every module whose name ends in an entry, and so wants "
            f"{missing[0]!r} in the file, which the adapter does not hold. Load the adapter onto its model and call "
            "save_adapter."
        )
    return {name: adapter.base[name] for name in wanted}


def _refuse_without_equal(adapter: Adapter, name: str, verb: str) -> None:
    kind = adapter.layers[name].kind
    problem = adapter.variant.why_not_in_peft(kind) or _place_problem(adapter, name, kind)
    if problem:
        raise LoRAError(f"{verb}: {name!r} {problem}; save a Lightning checkpoint instead.")


def _place_problem(adapter: Adapter, name: str, kind: str) -> str:
    """Say what PEFT has no equal of in where a layer or parameter is, or return ""."""
    module = name.rpartition(".")[0]
    if kind == ATTENTION_OUTPUT and module not in adapter.of_kind(ATTENTION):
        return _output_problem(adapter, module)
    if kind == ATTENTION:
        return _attention_problem(adapter, name)
    if kind == TRANSPOSED_EXPERTS and adapter.factor(name, A).shape[0] == adapter.factor(name, B).shape[1]:
        return "is a stack of one expert with is_transposed, to which PEFT adds B @ A without transposing it"
    if adapter.is_parameter(name) and not module:
        return "belongs to the model itself, to which PEFT gives no adapter; put it into a module"
    return ""


def _output_problem(adapter: Adapter, attention: str) -> str:
    if not attention:
        return "belongs to attention without a name, to which PEFT gives no adapter; put it into a module"
    if any(f"{attention}.{leaf}" in adapter.fingerprint for leaf in SEPARATE):
        return f"belongs to {attention!r}, which has q, k and v apart, and PEFT cannot adapt that"
    return ""


def _attention_problem(adapter: Adapter, name: str) -> str:
    a, b = adapter.factor(name, A), adapter.factor(name, B)
    output = f"{name}.out_proj"
    if f"{output}.{A}" not in adapter.tensors:
        return "is adapted without its out_proj; PEFT adapts attention whole"
    if b.shape[0] != 3 * a.shape[1] or a.shape[0] != b.shape[1]:
        return "has separate or partly adapted q, k and v, which PEFT has not"
    ranks = adapter.tensors[f"{output}.{A}"].shape[0], adapter.tensors[f"{output}.{B}"].shape[1]
    if ranks != (b.shape[1], b.shape[1]) or adapter.scaling(output) != adapter.scaling(name):
        return "has another rank or lora_alpha than its out_proj; PEFT has one for both"
    return ""
