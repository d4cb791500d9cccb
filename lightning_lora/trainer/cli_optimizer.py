"""An optimizer that LightningCLI built: `--optimizer`, `--lr_scheduler`.

LightningCLI makes it from model.parameters() as soon as the model exists, and attaches a configure_optimizers that
returns it. Adapters come later, and so do layers that setup or configure_model builds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..model.patches import patch


def adapt_cli_optimizer(module: nn.Module) -> None:
    """Patch a LightningModule so that the optimizer which LightningCLI made for it, if any, holds all parameters."""
    if _attached_optimizer(vars(module).get("configure_optimizers")) is not None:
        patch(module, "configure_optimizers", _configure_optimizers)


def _attached_optimizer(method: Any) -> torch.optim.Optimizer | None:
    """Return the optimizer in the configure_optimizers that LightningCLI attaches: a method made of a partial."""
    function = getattr(method, "__func__", None)
    optimizer = function.keywords.get("optimizer") if isinstance(function, functools.partial) else None
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


def _configure_optimizers(module: nn.Module, previous: Callable[[], Any]) -> Any:
    optimizer = _attached_optimizer(previous)
    if optimizer is not None:
        _take_up_parameters_(optimizer, module)
    return previous()


def _take_up_parameters_(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Give an optimizer all parameters that a module has now, as LightningCLI would if it made the optimizer now.

    In place: a learning rate scheduler refers to the optimizer, and has written into its group.
    """
    first, *others = optimizer.param_groups
    elsewhere = {parameter for group in others for parameter in group["params"]}
    first["params"][:] = [parameter for parameter in module.parameters() if parameter not in elsewhere]
    _complete_state_(optimizer)


def _complete_state_(optimizer: torch.optim.Optimizer) -> None:
    """Add the state of new parameters where an optimizer makes it in __init__, as Adagrad of torch 2.6; drop others."""
    if not optimizer.state:
        return
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = type(optimizer)(parameters, **options).state
    state.update({parameter: optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state})
    optimizer.state.clear()
    optimizer.state.update(state)
