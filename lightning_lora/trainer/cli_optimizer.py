"""Adapt an optimizer that LightningCLI built from `--optimizer` and `--lr_scheduler`.

LightningCLI builds it from model.parameters() as soon as the model exists, and attaches a configure_optimizers that
returns it. Adapters come later, and so do layers that setup or configure_model builds: the optimizer gets their
parameters in configure_optimizers. For LoRA+ its one group of parameters is split there, and the scheduler gets the
values that it keeps by group for each new group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, open_model
from ..model.param_groups import EMBEDDING, FACTOR_A, FACTOR_B, LR_EMBEDDING, NO_DECAY, OTHER, grouped_parameters
from ..model.patches import is_patched, patch

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # entries of an optimizer's group; schedulers write some of them
RATES_OF_GROUPS = ("base_lrs", "max_lrs", "_last_lr")  # lists of a scheduler: learning rates, one for each group
OF_GROUPS = (
    "lr_lambdas",
    "min_lrs",
    "base_momentums",
    "max_momentums",
)  # other lists by group


def adapt_cli_optimizer(handle: AdaptedModel, lr_ratio: float | None = None, *, is_fit: bool = True) -> None:
    """Patch a LightningModule so that the optimizer which LightningCLI made for it, if any, holds all parameters.

    Args:
        handle: of an injected LightningModule.
        lr_ratio: of B's learning rate to A's, for LoRA+, or None to leave the optimizer's groups as they are.
        is_fit: whether there is an optimizer to expect.

    Raises:
        LoRAError: lr_ratio is given, and the module makes its own optimizer.
    """
    module = handle.model
    method = vars(module).get("configure_optimizers")
    if _attached(method, "optimizer") is not None:
        patch(module, "configure_optimizers", _configure_optimizers)
    elif lr_ratio is not None and is_fit and not is_patched(module, "configure_optimizers", _configure_optimizers):
        raise LoRAError(
            f"LoRACallback: lr_ratio={lr_ratio:g} is for an optimizer that LightningCLI makes (--optimizer), and "
            f"{type(module).__name__} makes its own: leave lr_ratio out, and in configure_optimizers give it "
            f"lora_param_groups(self, lr=..., lr_ratio={lr_ratio:g})."
        )
    handle.record.lr_ratio = lr_ratio


def _attached(method: Any, name: str) -> Any:
    """Return an argument of the configure_optimizers that LightningCLI attached, which is a partial."""
    function = getattr(method, "__func__", None)
    return function.keywords.get(name) if isinstance(function, functools.partial) else None


def _configure_optimizers(module: nn.Module, previous: Callable[[], Any]) -> Any:
    optimizer, scheduler = _attached(previous, "optimizer"), _attached(previous, "lr_scheduler")
    if isinstance(optimizer, torch.optim.Optimizer):
        handle = open_model(module, "LoRACallback")
        _take_up_parameters_(optimizer, module)
        if handle.record.lr_ratio is not None:
            _split_groups_(optimizer, scheduler, handle, handle.record.lr_ratio)
        _complete_state_(optimizer)
    return previous()


def _take_up_parameters_(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Give an optimizer all parameters that a module has now. In place.

    A new optimizer would not do: a learning rate scheduler refers to this one and has written into its group.
    """
    first, *others = optimizer.param_groups
    elsewhere = {parameter for group in others for parameter in group["params"]}
    first["params"][:] = [parameter for parameter in module.parameters() if parameter not in elsewhere]


def _split_groups_(optimizer: torch.optim.Optimizer, scheduler: Any, handle: AdaptedModel, lr_ratio: float) -> None:
    """Move B, embeddings and parameters without weight decay into groups of their own. In place."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise LoRAError(f"LoRACallback: lr_ratio={lr_ratio:g}: LBFGS has one learning rate for all parameters.")
    first, *others = optimizer.param_groups
    lr = optimizer.defaults.get("lr", first["lr"])
    factors = {FACTOR_B: lr_ratio, EMBEDDING: LR_EMBEDDING / lr if lr else 1.0, NO_DECAY: 1.0}
    groups = {name: group for name, group in grouped_parameters(handle).items() if name not in (FACTOR_A, OTHER)}
    earlier = {group["name"]: group for group in others if group.get("name") in groups}  # of a fit before this one
    moved = {parameter for group in groups.values() for parameter in group}
    first["params"][:] = [parameter for parameter in first["params"] if parameter not in moved]
    for name, parameters in groups.items():
        if name in earlier:
            earlier[name]["params"][:] = parameters
            continue
        options = {key: value * factors[name] if key in RATES else value for key, value in first.items()}
        if name == NO_DECAY and "weight_decay" in options:
            options["weight_decay"] = 0.0
        optimizer.add_param_group({**options, "params": parameters, "name": name})
        _extend_scheduler_(scheduler, factors[name])


def _extend_scheduler_(scheduler: Any, factor: float) -> None:
    """Add a group to a scheduler, with the learning rates of the first group times `factor`. In place."""
    for name in (*RATES_OF_GROUPS, *OF_GROUPS):
        values = getattr(scheduler, name, None)
        if isinstance(values, (list, tuple)) and values:
            added = values[0] * factor if name in RATES_OF_GROUPS else values[0]
            setattr(scheduler, name, [*values, added])


def _complete_state_(optimizer: torch.optim.Optimizer) -> None:
    """Add the state of new parameters to an optimizer that makes state in __init__, such as Adagrad of torch 2.6.

    State of parameters that the optimizer does not hold any more is dropped.
    """
    if not optimizer.state:
        return
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = type(optimizer)(parameters, **options).state
    state.update({parameter: optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state})
    optimizer.state.clear()
    optimizer.state.update(state)
