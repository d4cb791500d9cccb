"""What travels beside an adapter's tensors, as plain types: in checkpoint["lora"] and in a tensor file's header.

layers       [[kind or None, scaling, [names]], ...]
fingerprint  [[dtype, shape, leaf, [modules], values], ...], the bytes of all modules' values in base 85; of quantised
             weights one thing more: how
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import gather_all
from ..errors import LoRAError, shown
from ..files.safetensors import as_bytes
from ..model.gradients import warn_of_untrained
from ..model.injection import refuse_replaced_layers
from ..model.live_state import LiveState, original_value
from ..model.pretrained import base_name, tied_to_input
from ..model.wrappers import prefix_inside
from ..names import is_lightning_module
from ..nn.low_rank import CONV1D, KINDS
from .adapter import Adapter, check_factors, with_aliases
from .file_options import check_options
from .fingerprint import fingerprint_of, sample_positions
from .peft_attention import after_conv1d

STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # values of other dtypes are stored as float64


def to_metadata(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter as plain types, without its tensors."""
    return {
        "config": (adapter.config or LoRAConfig()).to_dict(),
        "layers": encode_layers(adapter.scalings, adapter.kinds),
        "fingerprint": encode_fingerprint(adapter.fingerprint),
        "network": adapter.network,
        "origin": dict(adapter.origin),
        "complete": adapter.complete,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        **_after_conv1d_to_metadata(adapter),
        **({"scope": adapter.scope} if adapter.scope else {}),
        **({"tables": {name: list(rows) for name, rows in adapter.tables.items()}} if adapter.tables else {}),
        **({"tied": dict(adapter.tied), "tied_by_peft": adapter.tied_by_peft} if adapter.tied else {}),
    }


def from_metadata(tensors: Mapping[str, Any], metadata: Any, where: str) -> Adapter:
    """Return the adapter of these tensors that metadata describes, its factors unchecked: the inverse of to_metadata.

    Args:
        tensors: the adapter's.
        metadata: plain types, from a file.
        where: for messages.

    Raises:
        LoRAError: the description is not of that form, or it and the tensors disagree.
    """
    try:
        scalings, kinds = decode_layers(metadata["layers"])
        check_options(metadata["config"], scalings, where)
        adapter = Adapter(
            tensors=tensors,
            config=LoRAConfig.from_dict(metadata["config"]),
            scalings=scalings,
            fingerprint=decode_fingerprint(metadata["fingerprint"]),
            complete=metadata.get("complete", True) is True,
            kinds=kinds,
            network=_text(metadata["network"]),
            origin={_text(name): _text(value) for name, value in metadata["origin"].items()},
            scope=_text(metadata.get("scope", "")),
            fan_in_fan_out=metadata.get("fan_in_fan_out") is True,
            tables={_text(name): _ascending(rows) for name, rows in metadata.get("tables", {}).items()},
            tied={_text(name): _text(first) for name, first in metadata.get("tied", {}).items()},
            tied_by_peft=metadata.get("tied_by_peft") is True,
            after_conv1d=_after_conv1d_from_metadata(metadata.get("after_conv1d", [])),
        )
    except LoRAError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise LoRAError(f"{where}: the adapter's description is damaged: {error!r}.") from error
    unpaired = sorted((set(adapter.scalings) ^ set(adapter.layers())) | (set(adapter.tables) ^ set(adapter.rows())))
    if unpaired:
        raise LoRAError(f"{where}: {unpaired[0]!r} is missing in the tensors or in their description; it was cut.")
    return adapter


def adapter_of_model(live: LiveState, verb: str) -> Adapter:
    """Return the adapter of an injected model, sharing memory with it, gathered where it is sharded. Collective then.

    Args:
        live: the model.
        verb: what messages begin with.

    Raises:
        LoRAError: a layer was replaced, or the factors are not finite.
    """
    description = describe(live, verb)
    warn_of_untrained(live.handle.model, live.handle.layers)
    adapter = replace(description, tensors=gather_all(live.values()))
    check_factors(adapter, verb)
    return adapter


def frozen_values(live: LiveState, names: Collection[str]) -> dict[str, Any]:
    """Return frozen tensors of a model by name, gathered where it is sharded. Collective then."""
    wanted = set(names)
    entries = [(n, t, owner) for n, t, owner in live.entries if n in wanted and t is not None] if wanted else []
    return gather_all({name: original_value(name, tensor, owner) for name, tensor, owner in entries})


def describe(live: LiveState, verb: str) -> Adapter:
    """Return the adapter of an injected model without its tensors. Collective where the model is sharded.

    The fingerprint is that of fit start, where this model was fitted: weight averaging moves frozen weights. What was
    unfrozen later is a tensor of the adapter, and left out of the fingerprint.

    Args:
        live: the model.
        verb: what messages begin with.

    Raises:
        LoRAError: a layer was replaced since injection.
    """
    handle, record = live.handle, live.handle.record
    refuse_replaced_layers(handle.model, verb, handle.layers)
    trained = live.keys
    at_fit_start = record.fingerprint and record.fingerprint.keys() <= live.tensors.keys()
    first, layers = handle.layers, handle.layers_by_every_name  # as state dicts hold them
    kinds = {first[name]: kind for name, kind in handle.kinds.items()}
    reached = {first[name] for name in after_conv1d(handle.kinds, CONV1D in handle.kinds.values())}
    tables = {name: layer for name, layer in layers.items() if layer.replaced_rows()}
    first_names = {layer: name for name, layer in first.items()}
    aliases = {name: first_names[layer] for name, layer in layers.items() if layer in kinds and name not in first}
    network = _network_prefix(live, trained)
    by_peft = tied_to_input(handle.model, network, handle.modules)
    first_ends = {layer: by_peft.get(name, name) for name, layer in reversed(tables.items())}
    tied = {name: first_ends[layer] for name, layer in tables.items() if name != first_ends[layer]}
    base = base_name(handle.model, handle.modules)
    return Adapter(
        tensors={},
        config=with_aliases(record.config, aliases) if aliases else record.config,
        scalings={name: layer.lora.spec.scaling for name, layer in layers.items() if layer in kinds},
        fingerprint=_without(record.fingerprint, trained) if at_fit_start else fingerprint_of(live),
        complete=True,
        kinds={name: kinds[layer] for name, layer in layers.items() if layer in kinds},
        after_conv1d=frozenset(name for name, layer in layers.items() if layer in reached),
        network=network,
        origin={**({"base_model_name_or_path": base} if base else {}), **record.origin},
        scope=handle.scope(),
        tables={name: layer.replaced_rows() for name, layer in tables.items()},
        tied=tied,
        tied_by_peft=tied.items() <= by_peft.items(),
    )


def _after_conv1d_to_metadata(adapter: Adapter) -> dict[str, Any]:
    if adapter.after_conv1d is None:
        return {"after_conv1d": None}
    return {"after_conv1d": sorted(adapter.after_conv1d)} if adapter.after_conv1d else {}


def _after_conv1d_from_metadata(names: Any) -> frozenset[str] | None:
    return None if names is None else frozenset(map(_text, _list(names)))


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}


def _network_prefix(live: LiveState, trained: Collection[str]) -> str:
    """Return 'name.' of the one attribute of a LightningModule that holds all that the adapter trains, else ''.

    Adapters travel under the names of the network, not of the LightningModule around it.
    """
    model = live.handle.model
    if not is_lightning_module(model):
        return ""
    children = {name.partition(".")[0] for name in trained if isinstance(live.tensors[name], nn.Parameter)}
    if len(children) != 1 or children & live.handle.layers.keys():
        return ""
    name = children.pop()
    return f"{name}.{prefix_inside(model.get_submodule(name))}"


def encode_layers(scalings: Mapping[str, float], kinds: Mapping[str, str]) -> list[Any]:
    """Group the layers that `scalings` names by kind and scaling."""
    groups: dict[tuple[str | None, float], list[str]] = {}
    for name, scaling in scalings.items():
        groups.setdefault((kinds.get(name), scaling), []).append(name)
    return [[kind, scaling, names] for (kind, scaling), names in groups.items()]


def decode_layers(groups: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Return scalings and kinds: the inverse of encode_layers. Raises TypeError or ValueError for any other form."""
    scalings, kinds = {}, {}
    for kind, scaling, names in _list(groups):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind of layer {shown(kind)}")
        for name in _list(names):
            scalings[_text(name)] = float(scaling)
            if kind is not None:
                kinds[name] = kind
    return scalings, kinds


def encode_fingerprint(entries: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Group the entries of a fingerprint by dtype, shape, leaf and quantisation, with all their values as one text."""
    groups: dict[tuple[str, tuple[int, ...], str, tuple[str, ...]], dict[str, list[float]]] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        quantised = (entry["quantised"],) if entry.get("quantised") else ()
        groups.setdefault((entry["dtype"], tuple(entry["shape"]), leaf, quantised), {})[module] = entry["values"]
    return [
        [dtype, list(shape), leaf, list(values), _encode(list(values.values()), _stored_dtype(dtype)), *quantised]
        for (dtype, shape, leaf, quantised), values in groups.items()
    ]


def decode_fingerprint(groups: Any) -> dict[str, Any]:
    """Return entries by name: the inverse of encode_fingerprint. Raises TypeError or ValueError for any other form."""
    entries = {}
    for dtype, shape, leaf, modules, encoded, *quantised in map(_list, _list(groups)):
        if not isinstance(getattr(torch, _text(dtype), None), torch.dtype):
            raise ValueError(f"unknown dtype {shown(dtype)}")
        if not all(type(size) is int and size >= 0 for size in _list(shape)):
            raise ValueError(f"no shape: {shown(shape)}")
        count = len(sample_positions(math.prod(shape)))
        rows = _decode(_text(encoded), _stored_dtype(dtype), len(_list(modules)), count)
        for module, values in zip(modules, rows, strict=True):
            name = f"{_text(module)}.{_text(leaf)}" if module else _text(leaf)
            entries[name] = {"shape": list(shape), "dtype": dtype, "values": values}
            if quantised:
                entries[name]["quantised"] = _text(*quantised)
    return entries


def _stored_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype if dtype in STORED_DTYPES else torch.float64


def _encode(rows: list[list[float]], dtype: torch.dtype) -> str:
    return base64.b85encode(as_bytes(torch.tensor(rows, dtype=torch.float64).to(dtype))).decode()


def _decode(encoded: str, dtype: torch.dtype, rows: int, columns: int) -> list[list[float]]:
    content = base64.b85decode(encoded)
    if len(content) != rows * columns * dtype.itemsize:
        raise ValueError(f"expected {rows} times {columns} values, found {len(content)} bytes")
    if not content:
        return [[] for _ in range(rows)]
    values: list[list[float]] = torch.frombuffer(bytearray(content), dtype=dtype).double().view(rows, columns).tolist()
    return values


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
