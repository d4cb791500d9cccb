"""Parameter groups for LoRA+ (arXiv:2402.12354): B learns faster than A."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import is_number, plain_number
from ..errors import LoRAError
from ..names import factor_role
from ..nn.adapted_weights import AdaptedWeights
from ..nn.claims import claimed
from ..nn.quantized import shape_of
from ..nn.variant import rows_leaf
from .adapted_model import AdaptedModel, open_model

LR_RATIO = 16.0  # the paper's
LR_EMBEDDING = 1e-6  # as in the code of the paper's authors, and in PEFT
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
    """Return an optimizer's parameter groups, in which B learns at lr_ratio times the rate of A (arXiv:2402.12354).

        name             learning rate   weight decay   holds
        lora_A           lr              yes            A
        lora_B           lr * lr_ratio   yes            B
        lora_embedding   lr_embedding    yes            A and B of embeddings
        other            lr              yes            matrices of modules_to_save, and other matrices of variants
        no_decay         lr              no             biases, norms and other vectors; rows of embeddings

    Args:
        model: an injected model; it may be sharded or compiled.
        lr: learning rate of A.
        lr_ratio: B's learning rate divided by A's. Above 1, choose lr a little lower than without groups.
        weight_decay: of all groups but no_decay.
        lr_embedding: learning rate of A and B of embeddings.

    Returns:
        The groups that hold a trainable parameter, each a dict with params, lr, weight_decay and name. A parameter
        that layers share is listed once.

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
    for argument, value in {"lr": lr, "weight_decay": weight_decay, "lr_embedding": lr_embedding}.items():
        if not is_number(value) or value < 0:
            raise LoRAError(f"lora_param_groups: {argument} must be a number from 0, but it is {value!r}.")
    if not is_number(lr_ratio) or lr_ratio <= 0:
        raise LoRAError(f"lora_param_groups: lr_ratio must be a number above 0, but it is {lr_ratio!r}.")
    groups = _grouped_parameters(open_model(model, "lora_param_groups"))
    rates, decays = {FACTOR_B: lr * lr_ratio, EMBEDDING: lr_embedding}, {NO_DECAY: 0.0}
    return [
        {"params": each, "lr": rates.get(name, lr), "weight_decay": decays.get(name, weight_decay), "name": name}
        for name, each in groups.items()
    ]


def _grouped_parameters(handle: AdaptedModel) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of an adapted model by the groups of lora_param_groups, without empty ones."""
    factors = _groups_of_factors(handle.layers.values())
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    with claimed("lora_param_groups", handle.injection.claims):  # inside disable_adapter initial values are in place
        named: dict[nn.Parameter, str] = {}  # each once, with its name in the first module that holds it
        for _, module in handle.modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    named.setdefault(parameter, name)
        for parameter, name in named.items():
            if parameter.requires_grad:
                of_base = NO_DECAY if len(shape_of(parameter)) < 2 or "bias" in name else OTHER
                groups[factors.get(parameter, of_base)].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def _groups_of_factors(layers: Iterable[AdaptedWeights]) -> dict[nn.Parameter, str]:
    """Return the group of each trained tensor of the adapters, by its role in the variant.

    Vectors are scales, and rows replace rows of a table. Weight decay would shrink both toward zero, so they get none.
    """
    groups = {}
    for adapter in layers:
        variant, stored = adapter.lora.spec.variant, adapter.stored()
        for leaf in variant.trained:
            parameter, role = stored[leaf], factor_role(leaf)
            if role in FACTORS:
                groups[parameter] = EMBEDDING if adapter.LOOKUP else FACTORS[role]
            else:
                groups[parameter] = NO_DECAY if len(shape_of(parameter)) < 2 or leaf == rows_leaf() else OTHER
    return groups
