"""Warn where eval mode switches off transformers' gradient checkpointing."""

from __future__ import annotations

import warnings

from torch import nn

from ..model.adapted_model import find_model
from ..model.pretrained import pretrained_models
from ..names import listed
from ..nn.gradient_checkpointing import segments_in_eval_mode


def warn_of_checkpointing_off(module: nn.Module) -> None:
    """Warn where transformers models are in eval mode and therefore ignore gradient checkpointing. Once a model."""
    handle = find_model(module)
    if handle is None or handle.record.checkpointing_off_reported:
        return
    networks = pretrained_models(handle.modules)
    off = [name for name, network in networks.items() if _is_trained(network) and segments_in_eval_mode(network)]
    if off:
        handle.record.checkpointing_off_reported = True
        names = [f"{type(networks[name]).__name__} {name!r}" if name else type(networks[name]).__name__ for name in off]
        warnings.warn(
            f"LoRACallback: gradient checkpointing is enabled in {listed(names)}, but does nothing: transformers uses "
            "it in training mode alone, and the network is in eval mode, as from_pretrained leaves it. All activations "
            f"are kept for the backward. Call {listed(list(map(_call_of_train, off)))} before fit; that turns on the "
            "network's own dropout too.",
            stacklevel=2,
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _call_of_train(name: str) -> str:
    """Return the call, as text, that sets the module of this name to training mode."""
    if all(segment.isidentifier() for segment in name.split(".")):
        return f"self.{name}.train()"
    return f"self.get_submodule({name!r}).train()" if name else "self.train()"
