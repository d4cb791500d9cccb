"""An adapter that stands by itself, apart from any model: whole, and with options."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import LoRAConfig
from ..errors import LoRAError, shown
from .adapter import Adapter, is_head_only, nothing_adapted, saved_modules
from .checks import require_values
from .values import describe_value, is_strided


def with_options(adapter: Adapter, path: object, lora_alpha: float | None = None) -> Adapter:
    """Return an adapter with its options; where it stores none, its tensors and a lora_alpha tell them.

    Args:
        adapter: without tensors of the base.
        path: where it is from, for messages.
        lora_alpha: for an adapter that does not store it, such as a file of loralib's.

    Raises:
        LoRAError: lora_alpha is missing, or both stored and given; or the adapter is not whole.
    """
    require_values(adapter, str(path))
    if not adapter.layers and not is_head_only(adapter):
        raise LoRAError(f"{path}: holds {nothing_adapted(adapter)}; it is not an adapter of a known format.")
    for name, value in adapter.whole_tensors().items():
        if isinstance(value, torch.Tensor) and not is_strided(value):
            raise LoRAError(f"{path}: {name!r} must be a dense tensor, found {describe_value(value)}.")
    if adapter.rows() and not adapter.tables:
        raise LoRAError(f"{path}: stores rows of {next(iter(adapter.rows()))!r}, and not which rows these are.")
    if adapter.config is not None:
        if lora_alpha is not None:
            raise LoRAError(f"{path}: stores its lora_alpha; it cannot be given another.")
        return adapter
    if lora_alpha is None:
        raise LoRAError(
            f"{path}: stores tensors and no options, as loralib's files do: lora_alpha is nowhere in it. Ask whoever "
            "trained it, and pass --lora-alpha to merge or export, or lora_alpha to export_adapter; what "
            "export writes holds it, for others."
        )
    return _with_alpha(adapter, lora_alpha, path)


def _with_alpha(adapter: Adapter, lora_alpha: float, path: object) -> Adapter:
    """Return an adapter without options with the scalings and the options that its tensors and a lora_alpha tell.

    Raises:
        LoRAError: lora_alpha is no number. A layer adapts parts of a fused projection, and the tensors do not tell
            which.
    """
    if not isinstance(lora_alpha, (int, float)):
        raise LoRAError(f"{path}: lora_alpha must be a number, but it is {shown(lora_alpha)}.")
    for name in adapter.layers:
        factors = adapter.effective_factors(name)
        if factors.a.shape[0] != factors.b.shape[1]:
            raise LoRAError(
                f"{path}: {name!r} adapts parts of a fused projection, and which is not stored; load it in Python onto "
                "a model injected with enable_lora."
            )
    config = LoRAConfig(
        r=next(iter(adapter.layers.values())).r,
        lora_alpha=lora_alpha,
        target_modules=list(adapter.layers),
        modules_to_save=saved_modules(adapter),
        **adapter.variant.options(),
    )
    scaled = {name: replace(layer, scaling=lora_alpha / layer.r) for name, layer in adapter.layers.items()}
    return replace(adapter, config=config, layers=scaled)
