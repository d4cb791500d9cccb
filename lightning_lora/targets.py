"""Which modules an option names, which weights have several owners, and what to suggest where a name is wrong."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from .base import LoRALayer
from .config import ALL_LINEAR, LoRAConfig, pattern_matches
from .errors import LoRAError
from .injection import ATTRIBUTE
from .layers import is_conv1d, layer_kind
from .wrappers import canonical


class Targets:
    """What the options of a config name in a model.

    Attributes:
        layers: the modules to adapt, by name.
        saved: the modules that modules_to_save names.
        left_out: what "all-linear" passes over, with the reason.
        unmatched: a sentence for each entry that names nothing.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        modules = {canonical(name): module for name, module in model.named_modules() if canonical(name)}
        saved, chosen_by_name, excluded = map(
            matcher, (config.modules_to_save, config.target_modules, config.exclude_modules)
        )
        self.saved = {n: m for n, m in modules.items() if saved(n)}
        self.left_out: dict[str, str] = {}
        if config.target_modules == ALL_LINEAR:
            chosen = self._all_linear(model, modules)
        else:
            chosen = {n: m for n, m in modules.items() if chosen_by_name(n)}
        self.layers = {n: m for n, m in chosen.items() if not excluded(n) and not self._is_saved(n)}
        for name, module in list(self.layers.items()):  # attention is adapted whole, as PEFT does
            out_proj = f"{name}.out_proj"
            if isinstance(module, nn.MultiheadAttention) and not excluded(out_proj):
                self.layers[out_proj] = modules[out_proj]
        self.unmatched = self._unmatched(config, chosen, modules)

    def _all_linear(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        heads = output_heads(model)
        tied = tied_weights(model)
        chosen = {}
        for name, module in modules.items():
            if not isinstance(module, nn.Linear) and not is_conv1d(module):
                continue
            if any(module is head for head in heads):
                self.left_out[name] = "it is the output head"
            elif module in tied:
                self.left_out[name] = f"its weight is also {tied[module]}"
            else:
                chosen[name] = module
        return chosen

    def _is_saved(self, name: str) -> bool:
        return any(module in self.saved for module in (name, *around(name)))

    def _unmatched(self, config: LoRAConfig, chosen: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
        adaptable = [name for name, module in modules.items() if layer_kind(module)]
        unmatched = []
        for option, names, hints in (
            ("target_modules", chosen, adaptable),
            ("exclude_modules", [*adaptable, *chosen], adaptable),
            ("modules_to_save", modules, modules),
            ("enable_lora", self.layers, self.layers),
        ):
            named = {suffix for name in names for suffix in suffixes(name)}
            unmatched += [
                f"{option}: {entry_name(entry)!r} names no {'module' if names is modules else 'layer to adapt'}"
                + near_misses(entry_name(entry), hints)
                for entry in entries_of(getattr(config, option))
                if not (any(map(matcher(entry), names)) if isinstance(entry, str) else entry[0] in named)
            ]
        for option in ("rank_pattern", "alpha_pattern"):
            unmatched += [
                f"{option}: {pattern!r} names no adapted layer" + near_misses(pattern, self.layers)
                for pattern in getattr(config, option) or ()
                if not any(pattern_matches(pattern, name) for name in self.layers)
            ]
        if not self.layers and not unmatched:
            unmatched.append(f"target_modules: {config.target_modules!r} leaves no layer to adapt")
        return unmatched


def entries_of(value: str | Iterable[str] | None) -> list[str | tuple[str]]:
    """The separate entries of an option, each in a form that names_match understands."""
    if value is None or value == ALL_LINEAR:
        return []
    return [value] if isinstance(value, str) else [(entry,) for entry in value]


def entry_name(entry: str | tuple[str]) -> str:
    """An entry as the user wrote it."""
    return entry if isinstance(entry, str) else entry[0]


def names_match(names: str | Sequence[str] | None, name: str) -> bool:
    """PEFT's rule: a string is a full-match regular expression, a list holds whole names or dotted suffixes."""
    return matcher(names)(name)


def matcher(names: str | Iterable[str] | None) -> Callable[[str], bool]:
    """names_match for many modules, with a look-up instead of a search of the list for each."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda name: expression.fullmatch(name) is not None
    entries = frozenset(names or ())
    return lambda name: not entries.isdisjoint(suffixes(name))


def suffixes(name: str) -> list[str]:
    """A module's name, and what is left of it without its first, second, ... segment."""
    return [name, *(name[dot + 1 :] for dot in _dots(name))]


def around(name: str) -> list[str]:
    """The modules on the way to a parameter or module, without itself."""
    return [name[:dot] for dot in _dots(name)]


def _dots(name: str) -> list[int]:
    return [i for i, character in enumerate(name) if character == "."]


def near_misses(entry: str, names: Iterable[str]) -> str:
    """A hint with the names that look most like `entry`, or with the first names there are."""
    names = list(names)
    known = {suffix for name in names for suffix in suffixes(name)}
    close = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"; there are {shown}" if names else "; there are none"


def refuse_unmatched(model: nn.Module, unmatched: Sequence[str]) -> None:
    """Raise one error that lists every unmatched entry."""
    if unmatched:
        raise LoRAError(f"LoRA on {type(model).__name__}: " + ".\n".join(unmatched) + ".")


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The heads that get_output_embeddings (transformers) names anywhere in the model."""
    heads = []
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            heads.append(head)
    return heads


def tied_weights(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose weight shares memory with another module's parameter or buffer, each with the name of that.

    Memory counts, not identity: two Parameters may view one storage. A bias may have several owners.
    """
    owners: dict[int, list[tuple[torch.Tensor, nn.Module, str, bool]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for tensors, matters in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    is_weight = matters and not name.endswith("bias")
                    owners[_storage(tensor)].append((tensor, module, f"{prefix}.{name}".lstrip("."), is_weight))
    tied: dict[nn.Module, str] = {}
    for sharing in owners.values():
        if len(sharing) > 1:  # rare
            _note_overlaps(sharing, tied)
    return tied


def _note_overlaps(sharing: list[tuple[torch.Tensor, nn.Module, str, bool]], tied: dict[nn.Module, str]) -> None:
    group = sorted(
        ((*_span(tensor), module, name, weight) for tensor, module, name, weight in sharing),
        key=lambda owner: owner[:2],
    )
    for i, (_, end, module, name, is_weight) in enumerate(group):
        for start, _, other, other_name, other_is_weight in group[i + 1 :]:
            if start >= end:
                break
            if other is not module and is_weight:
                tied.setdefault(module, other_name)
            if other is not module and other_is_weight:
                tied.setdefault(other, name)


def note_tied(model: nn.Module) -> None:
    """Tell each adapted layer what keeps it from being merged; where the injected model is seen whole, also nothing."""
    tied = tied_weights(model)
    modules = list(model.modules())
    whole = any(ATTRIBUTE in vars(module) for module in modules)
    for layer in modules:
        if isinstance(layer, LoRALayer):
            computed = any(name not in layer._parameters for name in layer.adapted_weights())
            reason = "its weight is computed from others (weight_norm, parametrize, prune)" if computed else ""
            reason = f"its weight is also {tied[layer]}" if layer in tied else reason
            if reason != layer.lora_tied and (reason or whole):
                layer.lora_tied = reason


def _storage(tensor: torch.Tensor) -> int:
    """The memory that a tensor is a view of; one without memory of its own (meta, sharded) counts by identity."""
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else id(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte in that memory."""
    if not _has_memory(tensor):
        return 0, 1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _has_memory(tensor: torch.Tensor) -> bool:
    dense = tensor.layout is torch.strided and tensor.device.type != "meta" and type(tensor.data) is torch.Tensor
    return dense and tensor.numel() > 0
