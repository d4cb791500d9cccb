"""The served form of an adapter (plain=True), which every server that reads PEFT's folders runs right.

All layers have one rank r, with zeros added to lower ones, and lora_alpha = r, so that the scale is 1. The scale that
they had is multiplied into B. Factors are float32, so that this rounds nothing of 16 bits. Any variant whose change is
a product of factors becomes plain LoRA: start factors are stacked to twice the rank, and a product of products gets its
square. Of options a list of last name segments is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.lora_form import as_lora, padded
from ..adapter.renaming import by_network_names
from ..config import TASK_HEADS, LoRAConfig, defaults_of
from ..errors import LoRAError
from ..files.paths import PathLike
from ..matching import matcher
from ..names import A, B, listed
from ..nn.low_rank import CONVOLUTIONS, GROUPED_CONV


def served_form(adapter: Adapter, source: PathLike | None, verb: str = "export_adapter") -> Adapter:
    """Return the adapter in the served form, under the network's names.

    Args:
        adapter: by itself, with options.
        source: where it is from, for messages; None for memory.
        verb: what messages begin with; the first of them with the source, where there is one.

    Raises:
        LoRAError: its change is not only a product of factors. The message says what else it holds, and a way.
    """
    own = by_network_names(adapter)
    where = verb if source is None else source
    problem = _problem(own)
    if problem:
        raise LoRAError(
            f"{where}: {problem}. Merge it, in Python with save_merged(model, path), or into a base on disk that has "
            f"these tensors with lightning-lora merge --base BASE --adapter {source or 'ADAPTER'} --output MERGED."
        )
    lora = as_lora(own)
    scaled = {layer: _scaled_b(lora, layer, verb) for layer in lora.layers}
    rank = max(b.shape[1] for b in scaled.values())
    tensors: dict[str, torch.Tensor] = {}
    for layer, b in scaled.items():
        left, right = padded((b, lora.factor(layer, A).to(b.dtype)), rank)
        tensors |= {f"{layer}.{A}": right, f"{layer}.{B}": left}
    served = replace(
        lora,
        tensors=tensors,
        layers={layer: replace(lora.layers[layer], r=rank, scaling=1.0) for layer in scaled},
        complete=own.complete and not own.whole_tensors(),
    )
    return replace(served, config=_options(served, rank, verb))


def _problem(adapter: Adapter) -> str:
    """Return what an adapter holds beside factors of layers, or ""."""
    if adapter.variant.has_scale:
        return (
            f"is a {adapter.variant.title} adapter: what it changes depends on the base's weights, and no product of "
            "factors equals it"
        )
    whole = [name for name, value in adapter.whole_tensors().items() if _is_floating(value)]
    if whole:
        return f"holds {listed(list(map(repr, whole)))} whole, and the plain form has factors alone"
    if adapter.rows():
        return f"holds trained rows of {next(iter(adapter.rows()))!r}, and the plain form has factors alone"
    if adapter.parameters:
        return f"adapts the single parameter {adapter.parameters[0]!r}, and the plain form has layers alone"
    grouped = adapter.of_kind(GROUPED_CONV)
    if grouped:
        return f"adapts {grouped[0]!r}, a convolution with groups, and the plain form means another thing there"
    return ""


def _is_floating(value: Any) -> bool:
    """Return whether a value that lies beside the factors is one that training changes. Tables of indices are not."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _scaled_b(adapter: Adapter, layer: str, verb: str) -> torch.Tensor:
    """Return s * B of a layer of plain LoRA, in float32 at least."""
    a, b, scaling = adapter.factor(layer, A), adapter.factor(layer, B), adapter.scaling(layer)
    if adapter.layers[layer].kind in CONVOLUTIONS and a.dim() == 2:
        raise LoRAError(
            f"{verb}: {layer!r} is a convolution, and the source does not say how large its kernel is. Load it "
            "onto its model in Python: load_adapter(model, path), then export_adapter(take_adapter(model), path, "
            "plain=True)."
        )
    scaled: torch.Tensor = (b.double() * scaling).to(torch.promote_types(b.dtype, torch.float32))
    if not scaled.isfinite().all():
        raise LoRAError(
            f"{verb}: the scale {scaling:g} times B of {layer!r} is beyond the range of "
            f"{str(scaled.dtype).removeprefix('torch.')}. Write it without plain=True, or merge it into its base."
        )
    return scaled


def _options(adapter: Adapter, rank: int, verb: str) -> LoRAConfig:
    """Return the options of the served form. Its layers are named by last segments where that is possible."""
    targets, excluded = plain_targets(adapter, verb)
    config = adapter.config or LoRAConfig()
    options = defaults_of("layers", "ranks", "scaling", "whole") | {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "exclude_modules": excluded or None,
        "task_type": None if config.task_type in TASK_HEADS else config.task_type,  # no head is in the file
    }
    return replace(config, **options)


def plain_targets(adapter: Adapter, verb: str) -> tuple[list[str], list[str]]:
    """Return target_modules and exclude_modules: last segments, and the base's other modules that these would match.

    PEFT reads both. Servers go by the tensors, and take full names too. The layers are named in full where a segment is
    a number, which may be that of a module without weights, and where a module's name is a suffix of a layer's, because
    it cannot be excluded.

    Raises:
        LoRAError: no such lists name these layers alone.
    """
    layers = [name for name in adapter.module_layers if adapter.options_name(name) == name]
    segments = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    for targets in (segments, layers):
        is_target = matcher(targets)
        others = sorted(filter(is_target, adapter.modules - adapter.layers.keys()))
        if not any(map(matcher(others), layers)) and (targets is layers or not any(map(str.isdigit, segments))):
            return targets, others
    raise LoRAError(
        f"{verb}: no list for PEFT names these layers alone, because {others[0]!r}, which is not adapted, is "
        "named like the ends of adapted layers. Write it without plain=True, where an expression names them."
    )
