"""An adapter apart from any model, and the place in a model where its names fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .base import A, B, canonical
from .config import LoRAConfig
from .errors import LoRAError
from .state import checked_print
from .targets import near_misses


@dataclass(frozen=True)
class Adapter:
    """Tensors by this package's state dict names, and what is known of where they belong.

    Attributes:
        tensors: factors, trained parameters and buffers.
        config: the options, or None where the source holds none.
        scalings: s of each adapted layer, or empty where the source holds none.
        fingerprint: of the base, or empty where the source holds none.
        complete: the source holds buffers too, so that each missing name is an error.
    """

    tensors: Mapping[str, Any]
    config: LoRAConfig | None = None
    scalings: Mapping[str, float] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False

    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return [name.rpartition(".")[0] for name in self.tensors if name.rpartition(".")[2] == A]

    @classmethod
    def described(cls, tensors: Mapping[str, Any], description: Any, *, complete: bool = False) -> Adapter:
        """With the options, scalings and fingerprint that a checkpoint or a folder holds.

        Raises:
            LoRAError: they are not of the form that this package writes.
        """
        try:
            adapter = cls(
                dict(tensors),
                LoRAConfig.from_dict(description["config"]),
                {name: float(s) for name, s in description["scalings"].items()},
                {name: checked_print(one) for name, one in description["fingerprint"].items()},
                complete,
            )
            strange = [name for name in (*adapter.tensors, *adapter.fingerprint) if not isinstance(name, str)]
        except LoRAError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise LoRAError(f"adapter: its description is damaged: {error!r}.") from error
        if strange:
            raise LoRAError(f"adapter: its description is damaged: {strange[0]!r} is no layer or tensor of it.")
        return adapter

    def renamed(self, new_name: Callable[[str], str]) -> Adapter:
        """With other names of layers and tensors."""
        return replace(
            self,
            tensors={new_name(name): value for name, value in self.tensors.items()},
            scalings={new_name(name): value for name, value in self.scalings.items()},
            fingerprint={new_name(name): value for name, value in self.fingerprint.items()},
        )


def check_pairs(adapter: Adapter) -> None:
    """Each A has its B, and both can be factors: what later steps stand on."""
    if not adapter.layers():
        raise LoRAError("adapter: the source holds no lora_A; it is not an adapter of a known format.")
    expected = [f"{layer}.{A}" for layer in adapter.scalings]
    for name in (*expected, *adapter.tensors):
        path, _, leaf = name.rpartition(".")
        for factor in (A, B) if leaf in (A, B) else ():
            full_name = f"{path}.{factor}".lstrip(".")
            value = adapter.tensors.get(full_name)
            if value is None:
                raise LoRAError(
                    f"adapter: tensor {full_name!r} is missing, but the rest of its layer is there; the source was cut."
                )
            if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
                raise LoRAError(f"adapter: {full_name!r} must be a floating-point matrix or a stack of them.")


def placed(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter under the one prefix at which its layers are modules of the model."""
    layers = adapter.layers()
    modules = {canonical(name) for name, _ in model.named_modules(remove_duplicate=False)}
    homeless = [layer for layer in layers if layer not in modules]
    if not homeless:
        return adapter
    parts = layers[0].split(".")
    strips = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
    strips = [s for s in strips if all(n.startswith(s) and n.removeprefix(s) in modules for n in layers)]
    adds = [canonical(name) + "." for name, _ in model.named_modules() if name]
    adds = [add for add in adds if all(add + layer in modules for layer in layers)]
    if len(strips) + len(adds) != 1:
        found = ", ".join([*map(repr, adds), *(f"without {strip!r}" for strip in strips)]) or "none"
        raise LoRAError(
            f"adapter: its layers ({homeless[0]!r}, ...) must fit {type(model).__name__} under exactly one prefix; "
            f"found {found}{near_misses(homeless[0], modules - {''})}. Pass the submodule that the adapter is for."
        )
    if adds:
        return adapter.renamed(lambda name: adds[0] + name)
    inside = replace(
        adapter,
        tensors={name: value for name, value in adapter.tensors.items() if name.startswith(strips[0])},
        fingerprint={name: value for name, value in adapter.fingerprint.items() if name.startswith(strips[0])},
        config=_without_prefix(adapter.config, strips[0]),
    )
    return inside.renamed(lambda name: name.removeprefix(strips[0]))


def _without_prefix(config: LoRAConfig | None, prefix: str) -> LoRAConfig | None:
    """The options that stay when the layers are spelled out; with a prefix in front, a dotted suffix still matches."""
    if config is None:
        return None
    return replace(
        config,
        modules_to_save=[name.removeprefix(prefix) for name in config.modules_to_save or ()],
        enable_lora={name.removeprefix(prefix): parts for name, parts in (config.enable_lora or {}).items()},
    )


def first_names(model: nn.Module) -> Callable[[str], str]:
    """Where a module comes under several names: from any name of a layer or tensor to the one that it is adapted by."""
    modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    first = {module: canonical(name) for name, module in model.named_modules()}

    def first_name(name: str) -> str:
        if name in modules:
            return first[modules[name]]
        path, _, leaf = name.rpartition(".")
        return f"{first[modules[path]]}.{leaf}".lstrip(".") if path in modules else name

    return first_name
