"""The description of an adapter as plain types, in checkpoint["lora"] and in the header of a tensor file.

format_version  of the description; FORMAT_VERSION grows with every change that an earlier reader would misread
layers       [[kind or None, scaling, [names]], ...]
fingerprint  {name: [dtype, shape, values], ...}; a quantized weight has no values, and its kind as a fourth item
beside       {name: [strength, digest], ...} of the frozen adapters that it was trained beside
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import LoRAConfig, is_number
from ..errors import LoRAError, sentence, shown
from ..matching import near_misses
from ..names import KNOWN_VARIANTS
from ..nn.attached_factors import Attachment
from ..nn.low_rank import KINDS
from .adapter import Adapter, Layer
from .fingerprint import Entry, sample_positions

FORMAT_VERSION = 2


def check_format(metadata: Mapping[str, Any], where: object) -> None:
    """Raise LoRAError, with the remedy, where a description is of another format than this package's."""
    found = metadata.get("format_version", 0)
    if found == FORMAT_VERSION:
        return
    if type(found) is not int:
        raise LoRAError(f"{where}: the format is {shown(found)} and no number; the file is damaged.")
    if found > FORMAT_VERSION:
        raise LoRAError(
            f"{where}: is of format {found}, and this lightning_lora reads {FORMAT_VERSION}; update lightning_lora."
        )
    raise LoRAError(
        f"{where}: is of format {found}, which an earlier lightning_lora wrote; this one reads {FORMAT_VERSION}. Load "
        "it with the version that wrote it, and save the tensors alone: torch.save(adapter_state_dict(model), path). "
        "load_adapter takes that file onto a model that was injected with the same options."
    )


def to_metadata(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter as plain types, without its tensors."""
    attached = {name: [each.strength, each.fingerprint] for name, each in sorted(adapter.attached.items())}
    return {
        "format_version": FORMAT_VERSION,
        "config": _with_parts(adapter).to_dict(),
        "layers": encode_layers(adapter.layers),
        "fingerprint": encode_fingerprint(adapter.fingerprint),
        "network": adapter.network,
        **({"pretrained": adapter.pretrained} if adapter.pretrained else {}),
        "origin": dict(adapter.origin),
        "complete": adapter.complete,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        **({"peft_version": adapter.peft_version} if adapter.peft_version is not None else {}),
        **({"weightless": sorted(adapter.weightless)} if adapter.weightless else {}),
        **({"scope": adapter.scope} if adapter.scope else {}),
        **({"tables": {name: list(rows) for name, rows in adapter.tables.items()}} if adapter.tables else {}),
        **({"beside": attached} if attached else {}),
        **({"tied": dict(adapter.tied), "tied_by_peft": adapter.tied_by_peft} if adapter.tied else {}),
    }


def from_metadata(tensors: Mapping[str, Any], metadata: Any, where: str) -> Adapter:
    """Build an adapter from its tensors and their description, the inverse of to_metadata. Factors are not checked.

    Args:
        tensors: by name.
        metadata: the description, from a file; check_format has seen it.
        where: for messages.

    Raises:
        LoRAError: the description has another form, or does not fit the tensors.
    """
    try:
        config = _config(metadata["config"], where)
        known = decode_layers(metadata["layers"], config)
        adapter = Adapter(
            tensors=tensors,
            layers=known,
            config=config,
            fingerprint=decode_fingerprint(metadata["fingerprint"]),
            complete=metadata.get("complete", True) is True,
            network=_text(metadata["network"]),
            pretrained=_text(metadata.get("pretrained", "")),
            origin={_text(name): _text(value) for name, value in metadata["origin"].items()},
            scope=_text(metadata.get("scope", "")),
            fan_in_fan_out=metadata.get("fan_in_fan_out") is True,
            tables={_text(name): _ascending(rows) for name, rows in metadata.get("tables", {}).items()},
            tied={_text(name): _text(first) for name, first in metadata.get("tied", {}).items()},
            tied_by_peft=metadata.get("tied_by_peft") is True,
            weightless=frozenset(map(_text, _list(metadata.get("weightless", [])))),
            attached=decode_attached(metadata.get("beside", {})),
            peft_version=_text(metadata["peft_version"]) if "peft_version" in metadata else None,
        )
    except LoRAError:
        raise
    except Exception as error:  # of a damaged description it may be anything
        raise LoRAError(f"{where}: the adapter's description is damaged: {error!r}.") from error
    adapter = adapter.with_layers()
    unpaired = sorted((known.keys() ^ adapter.layers.keys()) | (adapter.tables.keys() ^ adapter.rows().keys()))
    if unpaired:
        raise LoRAError(
            f"{where}: {shown(unpaired[0], 80)} is missing in the tensors or in their description; it was cut."
        )
    return adapter


def _with_parts(adapter: Adapter) -> LoRAConfig:
    """Return the options with enable_lora by the names of the layers: there a file holds which parts are adapted."""
    config = adapter.config or LoRAConfig()
    parts = {name: layer.parts for name, layer in adapter.layers.items()}
    if all(config.enabled_parts(name) == each for name, each in parts.items()):
        return config
    longest_first = sorted(parts.items(), key=lambda item: -len(item[0]))
    return replace(config, enable_lora={name: each for name, each in longest_first if each})


def _config(options: Any, where: str) -> LoRAConfig:
    """Return the options in metadata. Raises LoRAError where they ask for a variant that this program does not know."""
    variant = options.get("variant") if isinstance(options, Mapping) else None
    if isinstance(variant, str) and variant not in KNOWN_VARIANTS:
        unknown = f"the adapter is of the variant {shown(variant)}, which is not known here"
        said = sentence(f"{unknown}{near_misses(variant, KNOWN_VARIANTS)}")
        raise LoRAError(f"{where}: {said} Import the file that defines it before loading.")
    return LoRAConfig.from_dict(options)


def without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return values by name without some of the names."""
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}


def encode_layers(layers: Mapping[str, Layer]) -> list[Any]:
    """Group layers by kind and scaling."""
    groups: dict[tuple[str | None, float], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.kind or None, 1.0 if layer.scaling is None else layer.scaling), []).append(name)
    return [[kind, scaling, names] for (kind, scaling), names in groups.items()]


def decode_layers(groups: Any, config: LoRAConfig) -> dict[str, Layer]:
    """Return layers without ranks: the inverse of encode_layers. Raises TypeError or ValueError for any other form."""
    layers = {}
    for kind, scaling, names in _list(groups):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind of layer {shown(kind)}")
        if not is_number(scaling):
            raise ValueError(f"no scaling: {shown(scaling)}")
        for name in _list(names):
            layers[_text(name)] = Layer(0, float(scaling), kind or "", config.enabled_parts(name))
    return layers


def encode_fingerprint(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return a row of plain types for each entry."""
    return {name: list(entry if entry.quantized else entry[:3]) for name, entry in entries.items()}


def decode_fingerprint(rows: Mapping[str, Any]) -> dict[str, Entry]:
    """Return entries by name: the inverse of encode_fingerprint. Raises TypeError or ValueError for any other form."""
    return {_text(name): _entry(*_list(row)) for name, row in rows.items()}


def decode_attached(rows: Mapping[str, Any]) -> dict[str, Attachment]:
    """Return what is attached, from strength and fingerprint by name. Raises TypeError or ValueError."""
    attached = {}
    for name, row in rows.items():
        strength, fingerprint = _list(row)
        if not is_number(strength):
            raise ValueError(f"no strength: {shown(strength)}")
        attached[_text(name)] = Attachment(float(strength), _text(fingerprint))
    return attached


def _entry(dtype: Any, shape: Any, values: Any, quantized: Any = "") -> Entry:
    if not isinstance(getattr(torch, _text(dtype), None), torch.dtype):
        raise ValueError(f"unknown dtype {shown(dtype)}")
    if not all(type(size) is int and size >= 0 for size in _list(shape)):
        raise ValueError(f"no shape: {shown(shape)}")
    if not all(type(value) is float for value in _list(values)):
        raise ValueError(f"no values: {shown(values)}")
    if values and len(values) != len(sample_positions(math.prod(shape))):
        raise ValueError(f"{len(values)} values of a tensor of shape {shown(shape)}")
    return Entry(dtype, list(shape), list(values), _text(quantized))


def _ascending(value: Any) -> tuple[int, ...]:
    numbers = _list(value)
    if not all(type(number) is int and number >= 0 for number in numbers) or sorted(set(numbers)) != list(numbers):
        raise ValueError(f"no ascending numbers of rows: {shown(value, 80)}")
    return tuple(numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {shown(value)}")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {shown(value)}")
    return value
