"""What travels beside an adapter's tensors, as plain types: in checkpoint["lora"] and in a tensor file's header."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Mapping
from typing import Any

from torch import nn

from .adapter import Adapter
from .base import LoRALayer
from .config import LoRAConfig
from .errors import LoRAError
from .factors import check_factors
from .injection import named_state, require_injection
from .kinds import kinds_of
from .merge import adapted_layers
from .sharding import whole
from .short import read_layers, read_prints, shorten_layers, shorten_prints, text
from .state import adapter_keys, adapter_state_dict, fingerprint
from .wrappers import canonical

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def describe(model: nn.Module, *, trained: Container[str] = ()) -> dict[str, Any]:
    """The description of an injected model's adapter; `trained` names are left out of the fingerprint."""
    injection = require_injection(model, "describe")[2]
    kinds = {layer: kind for kind, layer in zip(kinds_of(model).values(), adapted_layers(model).values(), strict=True)}
    # State dicts hold a layer that is registered under two names under both.
    every = ((canonical(name), module) for name, module in model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in every if isinstance(module, LoRALayer)}
    scalings = {name: layer.lora_scaling for name, layer in layers.items()}
    prints = {name: entry for name, entry in _base_fingerprint(model).items() if name not in trained}
    return {
        "config": injection.config.to_dict(),
        "layers": shorten_layers(scalings, {name: kinds[layer] for name, layer in layers.items()}),
        "fingerprint": shorten_prints(prints),
        "network": network_prefix(model),
        "origin": _origin(model),
    }


def description_of(adapter: Adapter) -> dict[str, Any]:
    """The description of an adapter apart from its model."""
    return {
        "config": (adapter.config or LoRAConfig()).to_dict(),
        "layers": shorten_layers(adapter.scalings, adapter.kinds),
        "fingerprint": shorten_prints(adapter.fingerprint),
        "network": adapter.network,
        "origin": dict(adapter.origin),
        "complete": adapter.complete,
        "fan_in_fan_out": adapter.fan_in_fan_out,
    }


def described(
    tensors: Mapping[str, Any], description: Any, where: str, *, check: bool = True, with_base: bool = False
) -> Adapter:
    """The inverse of describe and description_of.

    Args:
        tensors: the adapter's.
        description: plain types, from a file.
        where: for messages.
        check: compare the factors with the options, see check_factors.
        with_base: there are frozen tensors among them, which the fingerprint names.

    Raises:
        LoRAError: the description is not of that form, or it and the tensors disagree.
    """
    try:
        scalings, kinds = read_layers(description["layers"])
        prints = read_prints(description["fingerprint"])
        adapter = Adapter(
            tensors={name: value for name, value in tensors.items() if not (with_base and name in prints)},
            config=LoRAConfig.from_dict(description["config"]),
            scalings=scalings,
            fingerprint=prints,
            complete=description.get("complete", True) is True,
            kinds=kinds,
            network=text(description["network"]),
            origin={text(name): text(value) for name, value in description["origin"].items()},
            fan_in_fan_out=description.get("fan_in_fan_out") is True,
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
