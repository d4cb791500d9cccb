"""What travels beside an adapter's tensors, as plain types: in checkpoint["lora"] and in a tensor file's header."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .base import LoRALayer
from .config import LoRAConfig
from .errors import LoRAError
from .factors import check_factors
from .injection import named_state, require_injection
from .kinds import KINDS, kinds_of
from .merge import adapted_layers
from .sharding import whole
from .state import adapter_keys, adapter_state_dict, fingerprint
from .wrappers import canonical

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def describe(model: nn.Module) -> dict[str, Any]:
    """The description of an injected model's adapter."""
    injection = require_injection(model, "describe")[2]
    kinds = {layer: kind for kind, layer in zip(kinds_of(model).values(), adapted_layers(model).values(), strict=True)}
    # State dicts hold a layer that is registered under two names under both.
    every = ((canonical(name), module) for name, module in model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in every if isinstance(module, LoRALayer)}
    return {
        "config": injection.config.to_dict(),
        "scalings": {name: layer.lora_scaling for name, layer in layers.items()},
        "kinds": {name: kinds[layer] for name, layer in layers.items()},
        "fingerprint": _base_fingerprint(model),
        "network": network_prefix(model),
        "origin": _origin(model),
    }


def description_of(adapter: Adapter) -> dict[str, Any]:
    """The description of an adapter apart from its model."""
    return {
        "config": (adapter.config or LoRAConfig()).to_dict(),
        "scalings": dict(adapter.scalings),
        "kinds": dict(adapter.kinds),
        "fingerprint": dict(adapter.fingerprint),
        "network": adapter.network,
        "origin": dict(adapter.origin),
        "complete": adapter.complete,
        "fan_in_fan_out": adapter.fan_in_fan_out,
    }


def described(tensors: Mapping[str, Any], description: Any, where: str, *, check: bool = True) -> Adapter:
    """The inverse of describe and description_of.

    Args:
        tensors: the adapter's.
        description: plain types, from a file.
        where: for messages.
        check: compare the factors with the options, see check_factors.

    Raises:
        LoRAError: the description is not of that form, or it and the tensors disagree.
    """
    try:
        adapter = Adapter(
            tensors=dict(tensors),
            config=LoRAConfig.from_dict(description["config"]),
            scalings={str(name): float(s) for name, s in description["scalings"].items()},
            fingerprint=_checked_prints(description["fingerprint"]),
            complete=description.get("complete", True) is True,
            kinds={str(name): _checked_kind(kind) for name, kind in description["kinds"].items()},
            network=_text(description["network"]),
            origin={_text(name): _text(value) for name, value in description["origin"].items()},
            fan_in_fan_out=description.get("fan_in_fan_out") is True,
        )
    except LoRAError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise LoRAError(f"{where}: the adapter's description is damaged: {error!r}.") from error
    layers = set(adapter.layers())
    odd = sorted(set(adapter.scalings) ^ layers | set(adapter.kinds) - layers)
    if odd:
        raise LoRAError(f"{where}: {odd[0]!r} is missing in the tensors or in their description; it was cut.")
    if check:
        check_factors(adapter, where)
    return adapter


def adapter_of_model(model: nn.Module) -> Adapter:
    """The adapter of an injected model, sharing memory with it, gathered where it is sharded. Collective then.

    Raises:
        LoRAError: the model was not injected.
    """
    return described(whole(adapter_state_dict(model)), describe(model), "save_adapter")


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


def _base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """As it was at fit start, where the model is the one that was fitted; weight averaging moves frozen weights."""
    kept: dict[str, Any] = require_injection(model, "describe")[2].fingerprint
    return kept if kept and kept.keys() <= {name for name, _, _ in named_state(model)} else fingerprint(model)


def _origin(model: nn.Module) -> dict[str, str]:
    """What a transformers model says of where it comes from."""
    network = model.get_submodule(network_prefix(model).removesuffix("."))
    name = getattr(network, "name_or_path", None)
    return {"base_model_name_or_path": name} if isinstance(name, str) and name else {}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _checked_kind(kind: Any) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of layer {kind!r}")
    return str(kind)


def _checked_prints(prints: Mapping[str, Any]) -> dict[str, Any]:
    return {_text(name): _checked_print(entry) for name, entry in prints.items()}


def _checked_print(entry: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(getattr(torch, _text(entry["dtype"]), None), torch.dtype):
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    shape = [size for size in _items(entry["shape"]) if type(size) is int and size >= 0]
    values = [float(value) for value in _items(entry["values"]) if not isinstance(value, str)]
    if len(shape) != len(entry["shape"]) or len(values) != len(entry["values"]):
        raise TypeError(f"not a fingerprint: {entry!r}")
    return {"shape": shape, "dtype": entry["dtype"], "values": values}


def _items(value: Any) -> Iterable[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {value!r}")
    return value
