"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Options and tensors go under PEFT's names. The header of the tensor file also carries this package's own description,
which other readers pass over; buffers such as BatchNorm's statistics go in by their plain names, as PEFT loads them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import LoRAError
from ..files.atomic import new_folder
from ..files.paths import PathLike, read_json, write_json
from ..files.safetensors import read_safetensors, write_tensors
from ..files.torch_archive import read_torch_file
from ..names import A, B, around, matcher
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, CONV, EMBEDDING, GROUPED_CONV
from .adapter import Adapter, check_factors
from .fingerprint import fingerprint_entry
from .metadata import from_metadata, network_part, to_metadata
from .peft_mapping import (
    as_plain,
    check_peft_version,
    from_plain,
    options_from_peft,
    options_to_peft,
    origin_of,
    our_names,
    peft_name,
    refuse_options,
)

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
OLD_TENSOR_FILE = "adapter_model.bin"
HEADER_KEY = "lightning_lora"


def write_folder(adapter: Adapter, path: PathLike) -> None:
    """Write an adapter as a PEFT folder under the network's names; what else is in the folder stays.

    Raises:
        LoRAError: PEFT has no equal of one of its layers. Nothing is written.
    """
    adapter = network_part(adapter)
    for name in adapter.layers():
        _refuse_without_equal(adapter, name)
    extra = [name for name, value in adapter.tensors.items() if not isinstance(value, torch.Tensor)]
    if extra:
        warnings.warn(f"lightning_lora: the extra state {extra} is no tensor and is left out", stacklevel=3)
        adapter = replace(adapter, tensors={n: t for n, t in adapter.tensors.items() if n not in extra})
    plain = as_plain(adapter)
    layers = set(adapter.layers())
    tensors = {
        peft_name(name, layers, adapter.kinds): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in plain.tensors.items()
    }
    description = json.dumps(to_metadata(adapter) | {"complete": not extra}, separators=(",", ":"))
    with new_folder(path, keep_others=True) as folder:
        write_tensors(folder / TENSOR_FILE, tensors, {"format": "pt", HEADER_KEY: description})
        write_json(folder / CONFIG_FILE, options_to_peft(plain))


def _refuse_without_equal(adapter: Adapter, name: str) -> None:
    kind, attention = adapter.kinds.get(name), name.rpartition(".")[0]
    problem = ""
    if kind == GROUPED_CONV:
        problem = "is a convolution with groups; PEFT's adapter for those mixes the groups and means another thing"
    elif kind == ATTENTION_OUTPUT and adapter.kinds.get(attention) != ATTENTION:
        problem = f"is the out_proj of {attention!r}; PEFT adapts attention whole and passes over an out_proj alone"
    elif kind == ATTENTION:
        problem = _attention_problem(adapter, name)
    if problem:
        raise LoRAError(f"save_adapter: {name!r} {problem}; save a Lightning checkpoint instead.")


def _attention_problem(adapter: Adapter, name: str) -> str:
    a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
    output = f"{name}.out_proj"
    if f"{output}.{A}" not in adapter.tensors:
        return "is adapted without its out_proj; PEFT adapts attention whole"
    if b.shape[0] != 3 * a.shape[1] or a.shape[0] != b.shape[1]:
        return "has separate or partly adapted q, k and v, which PEFT has not"
    ranks = adapter.tensors[f"{output}.{A}"].shape[0], adapter.tensors[f"{output}.{B}"].shape[1]
    if ranks != (b.shape[1], b.shape[1]) or adapter.scalings[output] != adapter.scalings[name]:
        return "has another rank or lora_alpha than its out_proj; PEFT has one for both"
    return ""


def read_folder(path: PathLike) -> Adapter:
    """Read a PEFT folder, whoever wrote it.

    Raises:
        LoRAError: a file is missing or damaged, or it holds what this package cannot apply.
    """
    folder = Path(path)
    options = read_json(folder / CONFIG_FILE)
    refuse_options(options, folder / CONFIG_FILE)
    peft_tensors, header = _read_tensors(folder)
    names = our_names(peft_tensors, folder)
    tensors = {names[peft_name]: tensor for peft_name, tensor in peft_tensors.items()}
    if HEADER_KEY in header:
        return _read_described(tensors, header[HEADER_KEY], folder / TENSOR_FILE)
    return _read_foreign(tensors, {name: peft_name for peft_name, name in names.items()}, options, folder)


def read_tensor_file(path: PathLike) -> Adapter:
    """Read a safetensors file with an adapter, by itself. Only this package's own stores the options with the tensors.

    Raises:
        LoRAError: it is damaged, or it holds what this package cannot apply.
    """
    peft_tensors, header = read_safetensors(path)
    tensors = {name: peft_tensors[peft_name] for peft_name, name in our_names(peft_tensors, path).items()}
    if HEADER_KEY in header:
        return _read_described(tensors, header[HEADER_KEY], Path(path))
    adapter = Adapter(tensors)
    check_factors(adapter, str(path))
    return adapter


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    if (folder / TENSOR_FILE).exists() or not (folder / OLD_TENSOR_FILE).exists():
        return read_safetensors(folder / TENSOR_FILE)
    content = read_torch_file(folder / OLD_TENSOR_FILE)
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items()):
        raise LoRAError(f"{folder / OLD_TENSOR_FILE}: expected names and tensors.")
    return content, {}


def _read_described(tensors: Mapping[str, torch.Tensor], text: str, where: Path) -> Adapter:
    """Return an adapter that this package wrote, whose description is in the header."""
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{where}: its header's description is not JSON: {error}") from error
    adapter = from_plain(from_metadata(tensors, description, str(where)))
    check_factors(adapter, str(where))
    return adapter


def _read_foreign(
    tensors: Mapping[str, torch.Tensor], peft_names: Mapping[str, str], options: Mapping[str, Any], folder: Path
) -> Adapter:
    """Return an adapter that another program wrote."""
    bare = Adapter(tensors)
    layers = bare.layers()
    entries = options.get("modules_to_save")
    is_saved = matcher([entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else None)
    kinds = _foreign_kinds(tensors, peft_names, options, folder)
    whole = bare.beside_factors()
    # PEFT saves embeddings beside the adapter: they are trained only where modules_to_save says so.
    base = {n for n in whole if n.rpartition(".")[2] == "weight" and not any(map(is_saved, around(n)))}
    config = options_from_peft(options, layers, [name for name in whole if name not in base])
    adapter = Adapter(
        tensors={name: tensor for name, tensor in tensors.items() if name not in base},
        config=config,
        scalings={name: config.scaling(bare.options_name(name)) for name in layers},
        fingerprint={name: fingerprint_entry(tensors[name]) for name in base},
        kinds=kinds,
        origin=origin_of(options),
        fan_in_fan_out=options.get("fan_in_fan_out") is True,
    )
    check_factors(adapter, str(folder))
    return from_plain(adapter)


def _foreign_kinds(
    tensors: Mapping[str, torch.Tensor], peft_names: Mapping[str, str], options: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Return the kinds of layers, as far as PEFT's names and the factors' shapes tell them."""
    kinds = {}
    for name in Adapter(tensors).layers():
        if peft_names[f"{name}.{A}"].endswith("lora_embedding_A"):
            kinds[name] = EMBEDDING
        elif peft_names[f"{name}.{A}"].endswith("base_layer.out_proj.lora_A.weight"):
            kinds |= {name: ATTENTION_OUTPUT, name.rpartition(".")[0]: ATTENTION}
            check_peft_version(options.get("peft_version"), folder)
        a, b = tensors[f"{name}.{A}"], tensors.get(f"{name}.{B}")
        if a.dim() > 2 and b is not None and b.dim() == a.dim():
            _refuse_crossing_groups(name, a, b, folder)
            kinds[name] = CONV
    return kinds


def _refuse_crossing_groups(name: str, a: torch.Tensor, b: torch.Tensor, folder: Path) -> None:
    if b.shape[1] != a.shape[0] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise LoRAError(
            f"{folder}: {name!r} is a convolution with {a.shape[0] // b.shape[1]} groups: A {tuple(a.shape)} sees all "
            f"input channels, B {tuple(b.shape)} one group of the rank. Their product crosses the groups: no grouped "
            "weight equals it, and it cannot be applied."
        )
