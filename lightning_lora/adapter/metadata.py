"""What travels beside an adapter's tensors, as plain types: in checkpoint["lora"] and in a tensor file's header.

layers       [[kind or None, scaling, [names]], ...]
fingerprint  [[dtype, shape, leaf, [modules], values], ...], the bytes of all modules' values in base 85
"""

from __future__ import annotations

import base64
import math
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import gather_all
from ..errors import LoRAError
from ..files.safetensors import as_bytes
from ..model.injection import require_injection
from ..model.named_state import named_state
from ..model.state_dict import adapter_keys, adapter_state_dict
from ..names import canonical
from ..nn.layer_kinds import layer_kinds
from ..nn.lora_layer import LoRALayer, adapted_layers
from ..nn.low_rank import KINDS
from .adapter import Adapter, check_factors
from .fingerprint import fingerprint, sample_positions

BY_THEMSELVES = (torch.float16, torch.bfloat16, torch.float32)  # other dtypes' values go in as float64
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def to_metadata(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter apart from its model, as plain types."""
    return {
        "config": (adapter.config or LoRAConfig()).to_dict(),
        "layers": shorten_layers(adapter.scalings, adapter.kinds),
        "fingerprint": shorten_prints(adapter.fingerprint),
        "network": adapter.network,
        "origin": dict(adapter.origin),
        "complete": adapter.complete,
        "fan_in_fan_out": adapter.fan_in_fan_out,
    }


def from_metadata(
    tensors: Mapping[str, Any], metadata: Any, where: str, *, check: bool = True, with_base: bool = False
) -> Adapter:
    """Return the adapter that metadata describes: the inverse of to_metadata.

    Args:
        tensors: the adapter's.
        metadata: plain types, from a file.
        where: for messages.
        check: compare the factors with the options, see check_factors.
        with_base: there are frozen tensors among them, which the fingerprint names.

    Raises:
        LoRAError: the description is not of that form, or it and the tensors disagree.
    """
    try:
        scalings, kinds = read_layers(metadata["layers"])
        prints = read_prints(metadata["fingerprint"])
        adapter = Adapter(
            tensors={name: value for name, value in tensors.items() if not (with_base and name in prints)},
            config=LoRAConfig.from_dict(metadata["config"]),
            scalings=scalings,
            fingerprint=prints,
            complete=metadata.get("complete", True) is True,
            kinds=kinds,
            network=text(metadata["network"]),
            origin={text(name): text(value) for name, value in metadata["origin"].items()},
            fan_in_fan_out=metadata.get("fan_in_fan_out") is True,
        )
    except LoRAError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise LoRAError(f"{where}: the adapter's description is damaged: {error!r}.") from error
    odd = sorted(set(adapter.scalings) ^ set(adapter.layers()))
    if odd:
        raise LoRAError(f"{where}: {odd[0]!r} is missing in the tensors or in their description; it was cut.")
    if check:
        check_factors(adapter, where)
    return adapter


def model_to_metadata(model: nn.Module, *, trained: Container[str] = ()) -> dict[str, Any]:
    """Describe an injected model's adapter, as plain types; `trained` names are left out of the fingerprint."""
    metadata = to_metadata(_adapter_of(model, {}, trained))
    return {key: metadata[key] for key in ("config", "layers", "fingerprint", "network", "origin")}


def adapter_of_model(model: nn.Module) -> Adapter:
    """Return the adapter of an injected model, sharing memory with it, gathered where it is sharded. Collective then.

    Raises:
        LoRAError: the model was not injected, or the factors are not finite.
    """
    adapter = _adapter_of(model, gather_all(adapter_state_dict(model)))
    check_factors(adapter, "save_adapter")
    return adapter


def _adapter_of(model: nn.Module, tensors: Mapping[str, Any], trained: Container[str] = ()) -> Adapter:
    record = require_injection(model, "save_adapter").record
    kinds = dict(zip(adapted_layers(model).values(), layer_kinds(model).values(), strict=True))
    # State dicts hold a layer that is registered under two names under both.
    every = ((canonical(name), module) for name, module in model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in every if isinstance(module, LoRALayer)}
    return Adapter(
        tensors=tensors,
        config=record.config,
        scalings={name: layer.lora.spec.scaling for name, layer in layers.items()},
        fingerprint={name: entry for name, entry in base_fingerprint(model).items() if name not in trained},
        complete=True,
        kinds={name: kinds[layer] for name, layer in layers.items()},
        network=network_prefix(model),
        origin=_origin(model),
    )


def network_prefix(model: nn.Module) -> str:
    """'name.' of the one attribute of a LightningModule that holds all that the adapter trains, else ''.

    Adapters travel under the names of the network, not of the LightningModule around it.
    """
    types = [(c.__name__, c.__module__.partition(".")[0]) for c in type(model).__mro__]
    if not any(name == "LightningModule" and package in LIGHTNING for name, package in types):
        return ""
    parameters = {name for name, tensor, _ in named_state(model) if isinstance(tensor, nn.Parameter)}
    trained = [name for name in adapter_keys(model) if name in parameters]
    children = {name.partition(".")[0] for name in trained}
    adapted = set(adapted_layers(model))
    return f"{children.pop()}." if len(children) == 1 and not children & adapted else ""


def network_part(adapter: Adapter) -> Adapter:
    """The adapter under the network's own names."""
    outside = [name for name in adapter.tensors if not name.startswith(adapter.network)]
    if outside:
        warnings.warn(
            f"lightning_lora: {_some(outside)} lie outside the network {adapter.network.removesuffix('.')!r} and are "
            "not part of its adapter",
            stacklevel=3,
        )
    return adapter.renamed(adapter.network, "") if adapter.network else adapter


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return the fingerprint of fit start, where the model is the one that was fitted, else the present one.

    Weight averaging moves frozen weights.
    """
    kept: dict[str, Any] = require_injection(model, "save_adapter").record.fingerprint
    return kept if kept and kept.keys() <= {name for name, _, _ in named_state(model)} else fingerprint(model)


def _origin(model: nn.Module) -> dict[str, str]:
    """What a transformers model says of where it comes from."""
    network = model.get_submodule(network_prefix(model).removesuffix("."))
    name = getattr(network, "name_or_path", None)
    return {"base_model_name_or_path": name} if isinstance(name, str) and name else {}


def shorten_layers(scalings: Mapping[str, float], kinds: Mapping[str, str]) -> list[Any]:
    """Scalings and kinds of the layers that `scalings` names."""
    groups: dict[tuple[str | None, float], list[str]] = {}
    for name, scaling in scalings.items():
        groups.setdefault((kinds.get(name), scaling), []).append(name)
    return [[kind, scaling, names] for (kind, scaling), names in groups.items()]


def read_layers(groups: Any) -> tuple[dict[str, float], dict[str, str]]:
    """The inverse of shorten_layers.

    Raises:
        TypeError, ValueError: it is not of that form.
    """
    scalings, kinds = {}, {}
    for kind, scaling, names in items(groups):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind of layer {kind!r}")
        for name in items(names):
            scalings[text(name)] = float(scaling)
            if kind is not None:
                kinds[name] = kind
    return scalings, kinds


def shorten_prints(prints: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """A fingerprint."""
    groups: dict[tuple[str, tuple[int, ...], str], dict[str, list[float]]] = {}
    for name, entry in prints.items():
        module, _, leaf = name.rpartition(".")
        groups.setdefault((entry["dtype"], tuple(entry["shape"]), leaf), {})[module] = entry["values"]
    return [
        [dtype, list(shape), leaf, list(values), _written([*values.values()], _stored(getattr(torch, dtype)))]
        for (dtype, shape, leaf), values in groups.items()
    ]


def read_prints(groups: Any) -> dict[str, Any]:
    """The inverse of shorten_prints.

    Raises:
        TypeError, ValueError: it is not of that form.
    """
    prints = {}
    for dtype, shape, leaf, modules, written in items(groups):
        if not isinstance(getattr(torch, text(dtype), None), torch.dtype):
            raise ValueError(f"unknown dtype {dtype!r}")
        if not all(type(size) is int and size >= 0 for size in items(shape)):
            raise ValueError(f"no shape: {shape!r}")
        count = len(sample_positions(math.prod(shape)))
        values = _read(text(written), _stored(getattr(torch, dtype)), count, len(items(modules)))
        for module, own in zip(modules, values, strict=True):
            name = f"{text(module)}.{text(leaf)}" if module else text(leaf)
            prints[name] = {"shape": list(shape), "dtype": dtype, "values": own}
    return prints


def _stored(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in BY_THEMSELVES else torch.float64


def _written(values: list[list[float]], dtype: torch.dtype) -> str:
    flat = torch.tensor(values, dtype=torch.float64).flatten().to(dtype)
    return base64.b85encode(as_bytes(flat)).decode()


def _read(written: str, dtype: torch.dtype, count: int, modules: int) -> list[list[float]]:
    content = base64.b85decode(written)
    if len(content) != count * modules * dtype.itemsize:
        raise ValueError(f"expected {modules} times {count} values, found {len(content)} bytes")
    if not content:
        return [[] for _ in range(modules)]
    values: list[list[float]] = torch.frombuffer(bytearray(content), dtype=dtype).double().view(modules, count).tolist()
    return values


def text(value: Any) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def items(value: Any) -> Sequence[Any]:
    """The value, if it is a list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {value!r}")
    return value
