"""Adapt an optimizer that LightningCLI built from `--optimizer`.

LightningCLI builds it from model.parameters() as soon as the model exists, and attaches a configure_optimizers that
returns it. Adapters come later, and so do layers that setup or configure_model builds: the optimizer gets their
parameters in configure_optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..model.patches import patch


def adapt_cli_optimizer(module: nn.Module) -> None:
    """Patch a LightningModule so that the optimizer which LightningCLI made for it, if any, holds all parameters."""
    if _attached_optimizer(vars(module).get("configure_optimizers")) is not None:
        patch(module, "configure_optimizers", _configure_optimizers)


def _attached_optimizer(method: Any) -> Any:
    """Return the optimizer in the configure_optimizers that LightningCLI attached, which is a partial, or None."""
    function = getattr(method, "__func__", None)
    return function.keywords.get("optimizer") if isinstance(function, functools.partial) else None


def _configure_optimizers(module: nn.Module, previous: Callable[[], Any]) -> Any:
    optimizer = _attached_optimizer(previous)
    if isinstance(optimizer, Optimizer):
        _take_up_parameters_(optimizer, module)
    return previous()


def _take_up_parameters_(optimizer: Optimizer, module: nn.Module) -> None:
    """Give an optimizer all parameters that a module has now, and drop the state of others. In place.

    A new optimizer would not do: a learning rate scheduler refers to this one and has written into its group.
    """
    first, *others = optimizer.param_groups
    elsewhere = {parameter for group in others for parameter in group["params"]}
    first["params"][:] = [parameter for parameter in module.parameters() if parameter not in elsewhere]
    for parameter in optimizer.state.keys() - elsewhere - set(first["params"]):
        del optimizer.state[parameter]
