"""PEFT's names of tensors, from and to ours.

PEFT wraps what it trains, so that names grow segments that the model itself does not have:

    <layer>.base_layer.<leaf>              what an adapted layer owns
    <attention>.base_layer.out_proj...     attention and its out_proj are wrapped one inside the other
    <module>.base_layer.<layer>...         a layer in a module of which a parameter is adapted, as in a Mamba mixer
    <module>.modules_to_save.<leaf>        the trained copy of a module that is saved whole
    <module>.original_module.<leaf>        the module as it was
    <table>.token_adapter...               a table of which rows are trained, see peft_rows.py

In files the second half of these is plain `<module>.<leaf>`, and in the state dict of a live PeftModel each `lora_A`,
`lora_B` and `modules_to_save` is followed by the adapter's name. A wrapper is PEFT's only where its neighbours say so:
timm's DLA has a module base_layer of its own.

What an adapter's own tensors are called, as `lora_A.weight`, each variant says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache

from ..adapter.adapter import Layer
from ..errors import LoRAError
from ..names import parent_names, split_factor_name
from ..nn.lora import EMBEDDING_A
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, EMBEDDING, PARAMETER
from ..nn.variant import Variant, known_variants
from .peft_parameters import Nesting, our_factor
from .peft_rows import our_table_name

PREFIX = "base_model.model."
BASE_LAYER, SAVED, ORIGINAL = ".base_layer", ".modules_to_save", ".original_module"
OTHER_METHODS = {
    "lora_B.bias": "lora_bias",
    "lora_A.bias": "lora_bias",
    "trainable_tokens_delta": "trainable_token_indices",
}
NOT_READ = "which cannot be applied; plain LoRA is read."
WRAPPED_OUTPUT = f"{BASE_LAYER}.out_proj"  # how PEFT's name of attention's out_proj ends
NestingFor = Callable[[Mapping[str, int]], Nesting]


@dataclass(frozen=True)
class PeftNames:
    """What is known from the names of PEFT's tensors.

    Attributes:
        ours: our name of each tensor. Second copies of a tensor are left out.
        kinds: the kind of each layer whose kind PEFT's names tell.
        network: the name before PEFT's prefix, as in the state dict of a LightningModule: "" or ending in a dot.
        saved: the modules that were copied and fully trained, as far as names tell.
        live: the names are those of a live PeftModel's state dict, which holds the base too.
    """

    ours: Mapping[str, str]
    kinds: Mapping[str, str]
    network: str
    saved: frozenset[str]
    live: bool


@dataclass(frozen=True)
class _Leaves:
    """The endings of PEFT's names of an adapter's own tensors, over all variants."""

    ours: Mapping[str, str]  # our leaf name of each ending
    most_segments: int  # of an ending
    adapter_name: re.Pattern[str]  # finds the adapter's name inside of an ending
    named: str  # an expression for what an adapter's name follows

    def split(self, name: str) -> tuple[str, str] | None:
        """Return the layer, as PEFT writes it, and the ending of a tensor's name; None for any other name."""
        at = len(name)
        for _ in range(self.most_segments):
            at = name.rfind(".", 0, at)
            if name[at + 1 :] in self.ours:
                return name[: max(at, 0)], name[at + 1 :]
            if at < 0:
                break
        return None

    def name_adapter(self, name: str) -> bool:
        """Return whether a name is that of an adapter's own tensor, in a file or of a live model."""
        return self.split(name) is not None or self.adapter_name.search(name) is not None


def _leaves() -> _Leaves:
    return _leaves_of(tuple(known_variants()))


@lru_cache(maxsize=1)
def _leaves_of(variants: tuple[Variant, ...]) -> _Leaves:
    ours = {ending: leaf for variant in reversed(variants) for ending, leaf in variant.peft_leaves.items()}
    inside = []
    for ending in ours:
        head, dot, rest = ending.partition(".")
        if f"{ending}.weight" not in ours:  # else PEFT has the adapter's name before that
            inside.append(rf"{re.escape(head)}\.([^.]+){re.escape(dot + rest)}")
    heads = sorted({re.escape(ending.partition(".")[0]) for ending in ours})
    return _Leaves(
        ours,
        max(ending.count(".") for ending in ours) + 1,
        re.compile(rf"(?:^|\.)(?:{'|'.join(inside)})$"),
        rf"(^|\.)({'|'.join(heads)}|lora_\w+|modules_to_save|trainable_tokens_delta)\.",
    )


def are_peft_names(names: Iterable[str]) -> bool:
    """Tell whether names are PEFT's, in a file or of a live model, rather than ours."""
    return any(map(_leaves().name_adapter, names))


def peft_name(name: str, variant: Variant, layers: Mapping[str, Layer], nesting: Nesting) -> str:
    """Return PEFT's name of one of our tensors, as files have it.

    Args:
        name: ours.
        variant: of the adapter.
        layers: the adapted layers and parameters, by name.
        nesting: of the parameters.
    """
    layer, _, leaf = name.rpartition(".")
    if layer in nesting:
        parameter, own_leaf = split_factor_name(name) or ("", "")
        order, wrapped = nesting[layer], PREFIX + in_wrappers(layer, layers, nesting)
        if parameter not in layers:  # it lies in the innermost
            return f"{wrapped}{BASE_LAYER * len(order)}.{leaf}"
        depth = len(order) - 1 - order.index(parameter.rpartition(".")[2])
        return f"{wrapped}{BASE_LAYER * depth}.{variant.peft_leaf(own_leaf, PARAMETER)}"
    if layer not in layers:
        return PREFIX + in_wrappers(name, layers, nesting)
    wrapped = PREFIX + in_wrappers(layer, layers, nesting)
    if leaf not in variant.trained:
        return f"{wrapped}{BASE_LAYER}.{leaf}"
    return f"{wrapped}.{variant.peft_leaf(leaf, layers[layer].kind)}"


def in_wrappers(name: str, layers: Collection[str], nesting: Nesting) -> str:
    """Return the name of a module or tensor with the wrappers of the modules around it; its own are not added.

    Args:
        name: ours.
        layers: names of the adapted layers. PEFT wraps each once.
        nesting: of the parameters. PEFT wraps a module once for each.
    """
    wrapped, end = "", 0
    for module in parent_names(name):
        wrappers = len(nesting[module]) if module in nesting else int(module in layers)
        wrapped, end = f"{wrapped}{name[end : len(module)]}{BASE_LAYER * wrappers}", len(module)
    return wrapped + name[end:]


def read_names(peft_names: Iterable[str], where: object, nesting_for: NestingFor = lambda wrapped: {}) -> PeftNames:
    """Translate the names of PEFT's tensors.

    Args:
        peft_names: the names.
        where: for messages.
        nesting_for: gives the adapted parameters of each module, from the number of adapters that each module has.

    Raises:
        LoRAError: a name says that the adapter is more than plain LoRA, there are several adapters or models, or two
            names mean the same tensor.
    """
    peft_names, leaves = list(peft_names), _leaves()
    adapter_name, network = _adapter_name(peft_names, where), _network(peft_names, where)
    bare = {name: _bare_name(name, adapter_name, network) for name in peft_names}
    present = set(bare.values())
    own = {name: split for name in present if (split := leaves.split(name)) is not None}
    layers = {layer for layer, _ in own.values()}
    modules = {layer: _unwrapped(layer, layers) for layer in layers}
    nesting = nesting_for(Counter(module for module, _ in modules.values()))
    peft_name_of: dict[str, str] = {}
    for peft_name, name in bare.items():
        if name in own:
            layer, ending = own[name]
            ours = _our_name_of_factor(name, *modules[layer], leaves.ours[ending], nesting, where)
        else:
            ours = _our_base_name(name, present, layers, where)
        if peft_name_of.setdefault(ours, peft_name) != peft_name and ours:
            raise LoRAError(
                f"{where}: {peft_name_of[ours]!r} and {peft_name!r} both mean {ours!r}; the file is damaged."
            )
    ours_of = {peft_name: ours for ours, peft_name in peft_name_of.items() if ours}
    if nesting:  # parameters are named in the order in which their modules register them
        ours_of = dict(sorted(ours_of.items(), key=lambda names: -names[0].count(BASE_LAYER)))
    saved = {name.partition(SAVED)[0] for name in present if _saved_twin(name, present)}
    return PeftNames(
        ours=ours_of,
        kinds=_kinds_in_names(own.values(), modules),
        network=network,
        saved=frozenset(_without_wrappers(module, layers) for module in saved),
        live=adapter_name != "",
    )


def _adapter_name(peft_names: Iterable[str], where: object) -> str:
    """Return the name that PEFT gave the adapter, or "" where the names do not hold it, as those in files."""
    matches = map(_leaves().adapter_name.search, peft_names)
    found = sorted({group for match in matches if match for group in match.groups() if group})
    if len(found) > 1:
        raise LoRAError(
            f"{where}: holds several adapters ({', '.join(map(repr, found))}), and one is loaded at a time. Write the "
            f"one that you want with PeftModel.save_pretrained(path, selected_adapters=[{found[0]!r}])."
        )
    return found[0] if found else ""


def _network(peft_names: Iterable[str], where: object) -> str:
    """Return what stands before PEFT's prefix in the names of factors."""
    found = {name.partition(PREFIX)[0] for name in filter(_leaves().name_adapter, peft_names) if PREFIX in name}
    if len(found) > 1:
        names = ", ".join(repr(prefix.removesuffix(".")) for prefix in sorted(found))
        raise LoRAError(f"{where}: holds several PeftModels ({names}); save each by itself with save_pretrained.")
    return next(iter(found), "")


def _bare_name(name: str, adapter_name: str, network: str) -> str:
    """Return a name as it would be in a file, without PEFT's prefix; that of the network stays."""
    if adapter_name:
        name = re.sub(rf"{_leaves().named}{re.escape(adapter_name)}(?=\.|$)", r"\1\2", name)
    return network + name.removeprefix(network + PREFIX) if name.startswith(network + PREFIX) else name


def _unwrapped(layer: str, layers: Set[str]) -> tuple[str, int]:
    """Split PEFT's layer name into our name of the module and its wrapper depth."""
    depth = 0
    while layer.endswith(BASE_LAYER) and layer.removesuffix(BASE_LAYER) in layers:
        layer, depth = layer.removesuffix(BASE_LAYER), depth + 1
    return _without_wrappers(layer, layers), depth


def _without_wrappers(name: str, layers: Set[str]) -> str:
    """Leave the segments out of a name that PEFT's wrappers of `layers` added."""
    if BASE_LAYER not in name:
        return name
    segments = name.split(".")
    return ".".join(
        segment
        for i, segment in enumerate(segments)
        if not (f".{segment}" == BASE_LAYER and ".".join(segments[:i]) in layers)
    )


def _kinds_in_names(own: Iterable[tuple[str, str]], modules: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Return the kinds of embeddings and attention, from the layer and the ending of each of the adapter's tensors."""
    kinds = {}
    for layer, ending in own:
        module, _ = modules[layer]
        if ending == EMBEDDING_A:
            kinds[module] = EMBEDDING
        elif layer.endswith(WRAPPED_OUTPUT):
            kinds |= {module: ATTENTION_OUTPUT, module.rpartition(".")[0]: ATTENTION}
    return kinds


def _our_name_of_factor(name: str, module: str, depth: int, leaf: str, nesting: Nesting, where: object) -> str:
    """Return our name of an adapter's own tensor, given the module that PEFT wrapped, and how deep."""
    parameter = our_factor(module, depth, leaf, nesting)
    if parameter is not None:
        return parameter
    if depth:
        raise LoRAError(f"{where}: {name!r} belongs to target_parameters, {NOT_READ}")
    if not module:
        raise LoRAError(f"{where}: {name!r} names no layer.")
    return f"{module}.{leaf}"


def _our_base_name(name: str, present: Set[str], layers: Set[str], where: object) -> str:
    """Return our name of trained rows or of a tensor of the base, or "" for a copy of one that is there too."""
    if not name:
        raise LoRAError(f"{where}: the name of a tensor is empty; the file is damaged.")
    in_table = our_table_name(name, present)
    if in_table != name:
        return _without_wrappers(in_table, layers)
    for leaf, method in OTHER_METHODS.items():
        if f".{name}".endswith(f".{leaf}"):
            raise LoRAError(f"{where}: {name!r} belongs to {method}, {NOT_READ}")
    if f"{ORIGINAL}." in name and name.replace(ORIGINAL, SAVED, 1) in present:
        return ""  # the module as it was before training
    plain = _saved_twin(name, present)
    if plain in present:
        return ""  # bias="all" puts a bias in twice
    return _without_wrappers(plain or name, layers)


def _saved_twin(name: str, present: Set[str]) -> str:
    """Return the plain name of a tensor of a module's trained copy, beside which the original is; else ""."""
    is_copy = f"{SAVED}." in name and name.replace(SAVED, ORIGINAL, 1) in present
    return name.replace(SAVED, "", 1) if is_copy else ""
