"""Parameter groups for LoRA+ (arXiv:2402.12354): B learns faster than A."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import is_number, plain_number
from ..errors import LoRAError
from ..nn.adapted_weights import AdaptedWeights
from .adapted_model import AdaptedModel, open_model

LR_RATIO, LR_EMBEDDING = 16.0, 1e-6  # the ratio is the paper's, the other rate that of its authors' code and PEFT's
FACTOR_A, FACTOR_B, EMBEDDING, OTHER, NO_DECAY = GROUPS = ("lora_A", "lora_B", "lora_embedding", "other", "no_decay")
FACTORS = {"A": FACTOR_A, "B": FACTOR_B}  # by role


def lora_param_groups(
    model: nn.Module,
    *,
    lr: float,
    lr_ratio: float = LR_RATIO,
    weight_decay: float = 0.0,
    lr_embedding: float = LR_EMBEDDING,
) -> list[dict[str, Any]]:
    """Return what an optimizer is given to train B at lr_ratio times the learning rate of A (arXiv:2402.12354).

        name             learning rate   weight decay   holds
        lora_A           lr              yes            A
        lora_B           lr * lr_ratio   yes            B
        lora_embedding   lr_embedding    yes            A and B of embeddings
        other            lr              yes            what is trained whole, as modules_to_save; matrices of variants
        no_decay         lr              no             biases, norms and other vectors; rows of embeddings

    A variant says which of its matrices is its A or B (Variant.role); all others are in `other`.

    Args:
        model: an injected model; it may be sharded or compiled.
        lr: learning rate of A.
        lr_ratio: of B's learning rate to A's. With one above 1, lr is best a little lower than without.
        weight_decay: of the groups that have one.
        lr_embedding: learning rate of A and B of embeddings.

    Returns:
        The groups that hold a trainable parameter, each a dict with params, lr, weight_decay and name. A parameter
        that layers share comes once.

    Raises:
        LoRAError: the model was not injected, or a number is out of its range.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-4, lr_ratio=16))
        >>> {group["name"]: group["lr"] for group in optimizer.param_groups}
        {'lora_A': 0.0001, 'lora_B': 0.0016}
    """
    lr, lr_ratio, weight_decay, lr_embedding = map(plain_number, (lr, lr_ratio, weight_decay, lr_embedding))
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_embedding", lr_embedding)):
        if not is_number(value) or value < 0:
            raise LoRAError(f"lora_param_groups: {name} must be a number from 0, but it is {value!r}.")
    check_ratio(lr_ratio, "lora_param_groups")
    handle = open_model(model, "lora_param_groups")
    rates = {FACTOR_B: lr * lr_ratio, EMBEDDING: lr_embedding}
    return [
        {
            "params": parameters,
            "lr": rates.get(name, lr),
            "weight_decay": 0.0 if name == NO_DECAY else weight_decay,
            "name": name,
        }
        for name, parameters in grouped_parameters(handle).items()
    ]


def check_ratio(lr_ratio: float, where: str) -> None:
    """Raise LoRAError where the ratio of two learning rates is no number above 0."""
    if not is_number(plain_number(lr_ratio)) or lr_ratio <= 0:
        raise LoRAError(f"{where}: lr_ratio must be a number above 0, but it is {lr_ratio!r}.")


def grouped_parameters(handle: AdaptedModel) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of an adapted model by the groups of lora_param_groups, without empty ones."""
    factors = _groups_of_factors(handle.layers.values())
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for parameter, name in _parameters(handle).items():
        if parameter.requires_grad:
            groups[factors.get(parameter) or _group_of_other(name, parameter)].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def _parameters(handle: AdaptedModel) -> dict[nn.Parameter, str]:
    """Return each parameter of a model once, with its name in the first module that holds it."""
    found: dict[nn.Parameter, str] = {}
    for _, module in handle.modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, name)
    return found


def _groups_of_factors(layers: Iterable[AdaptedWeights]) -> dict[nn.Parameter, str]:
    """Return the group of each parameter of an adapter, by the role that its variant gives it.

    Vectors, which scale something, and rows of a table must not shrink.
    """
    groups = {}
    for adapter in layers:
        variant, stored = adapter.lora.spec.variant, adapter.stored()
        for leaf in variant.trained:
            parameter, role = stored[leaf], variant.role(leaf)
            if role in FACTORS:
                groups[parameter] = EMBEDDING if adapter.LOOKUP else FACTORS[role]
            else:
                groups[parameter] = NO_DECAY if parameter.dim() < 2 or variant.replaces_rows else OTHER
    return groups


def _group_of_other(name: str, parameter: nn.Parameter) -> str:
    return NO_DECAY if parameter.dim() < 2 or "bias" in name else OTHER
