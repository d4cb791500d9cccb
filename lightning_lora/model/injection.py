"""What a model remembers of its injection."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import ATTRIBUTE, canonical
from .named_state import base_parameters, is_factor, named_state

LOADED = "lora_loaded"  # on a part of an injected model: the base that was loaded into it


@dataclass
class Injection:
    """The state of one injected model; names are relative to the module that holds it.

    Attributes:
        config: the options.
        merge_weights: eval() merges, train() unmerges.
        requires_grad: of every base parameter, before injection.
        initial: values of what training changes beside A and B (trained base parameters, persistent buffers), from
            before training.
        trained: names of base parameters that were ever trainable.
        unfrozen: those of them that another hand than the options made trainable.
        save: the kind of Lightning checkpoint, or None for an unfiltered one.
        fingerprint: of the base at fit start, by the names of the LightningModule.
        judged: every layer was there, and each entry of the options names something.
        seed: what adapters are drawn from, or "" for the random stream of the moment.
    """

    config: LoRAConfig
    merge_weights: bool = False
    requires_grad: dict[str, bool] = field(default_factory=dict)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    unfrozen: set[str] = field(default_factory=set)
    save: Any = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    judged: bool = False
    seed: str = ""


def find_injection(model: nn.Module) -> tuple[str, nn.Module, Injection] | None:
    """The name, module and state of the injection in a model, or None.

    Raises:
        LoRAError: there are several.
    """
    found = [(canonical(name), m, vars(m)[ATTRIBUTE]) for name, m in model.named_modules() if ATTRIBUTE in vars(m)]
    if len(found) > 1:
        places = ", ".join(repr(name) for name, _, _ in found)
        raise LoRAError(f"{type(model).__name__} holds several injected models ({places}); handle each by itself.")
    for _, root, injection in found:
        _take_loaded(root, injection)
    return found[0] if found else None


def require_injection(model: nn.Module, verb: str) -> tuple[str, nn.Module, Injection]:
    """find_injection, where its absence is an error."""
    found = find_injection(model)
    if found is None:
        raise LoRAError(
            f"{verb}: {type(model).__name__} was not injected; call inject(model, LoRAConfig(...)) first, or pass the "
            "module that it was called on."
        )
    return found


def note_trainable(model: nn.Module, *, expected: bool = False) -> None:
    """Remember, with its present value, every base parameter that has become trainable.

    Args:
        model: an injected model.
        expected: the options ask for it; otherwise another hand unfroze it, and a warning says so.
    """
    _, root, injection = require_injection(model, "note_trainable")
    new = {
        name: parameter
        for name, parameter in base_parameters(root).items()
        if parameter.requires_grad and name not in injection.trained
    }
    for name, parameter in new.items():
        injection.trained.add(name)
        injection.initial[name] = parameter.detach().clone()
    if new and not expected:
        injection.unfrozen.update(new)
        shown = ", ".join(list(new)[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        warnings.warn(
            f"lightning_lora: base parameters were unfrozen after injection ({shown}); they are saved with the adapter",
            stacklevel=2,
        )


def note_initial(model: nn.Module) -> None:
    """Take the present values as those from before training; where layers are built anew later, of new names only."""
    _, root, injection = require_injection(model, "note_initial")
    tensors = {name: tensor for name, tensor, module in named_state(root) if not is_factor(name, module)}
    buffers = {id(buffer) for buffer in root.buffers()}
    known = injection.initial if injection.judged else {}
    injection.initial = known | {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if tensor is not None and name not in known and (name in injection.trained or id(tensor) in buffers)
    }


def note_materialised(model: nn.Module) -> None:
    """Take present values where the noted ones are from the meta device; call before training or loading."""
    _, root, injection = require_injection(model, "note_materialised")
    live = {name: tensor for name, tensor, _ in named_state(root) if tensor is not None}
    for name, value in injection.initial.items():
        if value.is_meta:
            injection.initial[name] = live[name].detach().clone()


def note_loaded(module: nn.Module, values: Mapping[str, Any]) -> None:
    """A new base for an injected model or a part of it: what training will change starts from these values."""
    for inside in module.modules():
        vars(inside).pop(LOADED, None)
    copies = {name: value.detach().clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
    setattr(module, LOADED, copies)


def _take_loaded(root: nn.Module, injection: Injection) -> None:
    for path, module in root.named_modules():
        loaded = vars(module).pop(LOADED, None)
        if loaded is None:
            continue
        injection.fingerprint = {}
        for name, value in loaded.items():
            name = f"{canonical(path)}.{name}".lstrip(".")
            known = injection.initial.get(name)
            if known is not None and known.shape == value.shape:
                injection.initial[name] = value.to(value.device if known.is_meta else known.device, known.dtype)
