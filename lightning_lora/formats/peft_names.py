"""PEFT's names of tensors, from and to ours.

PEFT wraps what it trains, so that names grow segments that the model itself does not have:

    <layer>.base_layer.<leaf>              what an adapted layer owns
    <attention>.base_layer.out_proj...     attention and its out_proj are wrapped one inside the other
    <module>.base_layer.<layer>...         a layer in a module of which a parameter is adapted, as in a Mamba mixer
    <module>.modules_to_save.<leaf>        the trained copy of a module that is saved whole
    <module>.original_module.<leaf>        the module as it was
    <table>.token_adapter...               a table of which rows are trained, see peft_rows.py

In files the second half of these is plain `<module>.<leaf>`, and in the state dict of a live PeftModel each `lora_A`,
`lora_B` and `modules_to_save` is followed by the adapter's name. A segment is PEFT's only where its neighbours say so:
a model may have modules of the same names.

What an adapter's own tensors are called, as `lora_A.weight`, each variant says. Tensors that all layers share come
once, beside the model: `base_model.<leaf>`.
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
from ..nn.low_rank import PARAMETER
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
NestingFor = Callable[[Mapping[str, int]], Nesting]


@dataclass(frozen=True)
class PeftNames:
    """What is known from the names of PEFT's tensors.

    Attributes:
        ours: our name of each tensor. Second copies of a tensor are left out.
        bare: PEFT's name in a file without its prefix, by our name.
        of_layers: our names of tensors that adapted layers own beside the factors.
        network: the name before PEFT's prefix, as in the state dict of a LightningModule: "" or ending in a dot.
        saved: the modules that were copied and trained whole, as far as names tell.
        live: the names are those of a live PeftModel's state dict, which holds the base too.
    """

    ours: Mapping[str, str]
    bare: Mapping[str, str]
    of_layers: frozenset[str]
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


def read_names(
    peft_names: Iterable[str], where: object, nesting_for: NestingFor = lambda wrapped: {}, written_here: bool = False
) -> PeftNames:
    """Translate the names of PEFT's tensors.

    Args:
        peft_names: the names.
        where: for messages.
        nesting_for: gives the adapted parameters of each module, from the number of adapters that each module has.
        written_here: this package wrote them, without an adapter's name, though a module may be called lora_A.

    Raises:
        LoRAError: a name says that the adapter is more than plain LoRA, there are several adapters or models, or two
            names mean the same tensor.
    """
    peft_names, leaves = list(peft_names), _leaves()
    adapter_name, network = "" if written_here else _adapter_name(peft_names, where), _network(peft_names, where)
    bare = {name: _without_adapter_name(name, adapter_name) for name in peft_names}
    bare = {name: _without_prefix(each, network) for name, each in bare.items()}
    present = set(bare.values())
    split_of = {name: split for name in present if (split := leaves.split(name)) is not None}
    layers = {layer for layer, _ in split_of.values()}
    nesting = nesting_for(Counter(_unwrapped(layer, layers)[0] for layer in layers))
    ours: dict[str, str] = {}
    first: dict[str, str] = {}
    for peft_name, bare_name in bare.items():
        name = _our_name(bare_name, split_of.get(bare_name), leaves, present, layers, nesting, where)
        if name is None:
            continue
        if name in leaves.ours.values():
            raise LoRAError(f"{where}: {peft_name!r} names no layer.")
        if first.setdefault(name, peft_name) != peft_name:
            raise LoRAError(f"{where}: {first[name]!r} and {peft_name!r} both mean {name!r}; the file is damaged.")
        ours[peft_name] = name
    if nesting:  # parameters are named in the order in which their modules register them
        ours = dict(sorted(ours.items(), key=lambda names: -names[0].count(BASE_LAYER)))
    saved = {name.partition(SAVED)[0] for name in present if _saved_twin(name, present)}
    return PeftNames(
        ours=ours,
        bare={name: bare[peft_name] for peft_name, name in ours.items()},
        of_layers=frozenset(name for name in ours.values() if _owner(bare[first[name]]) in layers),
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
    found: set[str] = set()
    for name in filter(_leaves().name_adapter, peft_names):
        start = _start(name)
        if start >= 0:
            found.add(name[:start])
    if len(found) > 1:
        names = ", ".join(repr(prefix.removesuffix(".")) for prefix in sorted(found))
        raise LoRAError(f"{where}: holds several PeftModels ({names}); save each by itself with save_pretrained.")
    return next(iter(found), "")


def _start(name: str) -> int:
    return 0 if name.startswith(PREFIX) else name.find(f".{PREFIX}") + 1 or -1


def _without_adapter_name(name: str, adapter_name: str) -> str:
    return re.sub(rf"{_leaves().named}{re.escape(adapter_name)}(?=\.|$)", r"\1\2", name) if adapter_name else name


def _without_prefix(name: str, network: str) -> str:
    """Leave out PEFT's prefix, which follows the network's."""
    if name.startswith(network + PREFIX):
        return network + name.removeprefix(network + PREFIX)
    return name


def _unwrapped(layer: str, layers: Set[str]) -> tuple[str, int]:
    """Split PEFT's layer name into our name of the module and its wrapper depth."""
    depth = 0
    while layer.endswith(BASE_LAYER) and layer.removesuffix(BASE_LAYER) in layers:
        layer, depth = layer.removesuffix(BASE_LAYER), depth + 1
    return _without_wrappers(layer, layers), depth


def _without_wrappers(name: str, layers: Set[str]) -> str:
    """Leave the segments out of a name that PEFT's wrappers of `layers` added."""
    if BASE_LAYER not in f".{name}":
        return name
    segments = name.split(".")
    return ".".join(
        segment
        for i, segment in enumerate(segments)
        if not (f".{segment}" == BASE_LAYER and ".".join(segments[:i]) in layers)
    )


def _owner(name: str) -> str:
    """Return the wrapped module, as PEFT writes it, that owns a tensor, or "" where another module does."""
    module = name.rpartition(".")[0]
    return module.removesuffix(BASE_LAYER) if module.endswith(BASE_LAYER) else ""


def _our_name(
    name: str,
    split: tuple[str, str] | None,
    leaves: _Leaves,
    present: Set[str],
    layers: Set[str],
    nesting: Nesting,
    where: object,
) -> str | None:
    layer, ending = split or (None, "")
    if layer is not None:
        module, depth = _unwrapped(layer, layers)
        parameter = our_factor(module, depth, leaves.ours[ending], nesting)
        if parameter is not None:
            return parameter
    in_table = our_table_name(name, present)
    if in_table != name:
        return _without_wrappers(in_table, layers)
    other_method = next((method for leaf, method in OTHER_METHODS.items() if _ends_in(name, leaf)), "")
    if layer is not None and layer.endswith(BASE_LAYER) and layer.removesuffix(BASE_LAYER) in layers:
        other_method = "target_parameters"
    if other_method:
        raise LoRAError(f"{where}: {name!r} belongs to {other_method}, which cannot be applied; plain LoRA is read.")
    if f"{ORIGINAL}." in name and name.replace(ORIGINAL, SAVED, 1) in present:
        return None  # the module as it was before training
    plain = _saved_twin(name, present)
    if plain:
        return None if plain in present else _without_wrappers(plain, layers)  # bias="all" puts a bias in twice
    if layer is not None:
        name = f"{layer}.{leaves.ours[ending]}" if layer else leaves.ours[ending]
    return _without_wrappers(name, layers)


def _saved_twin(name: str, present: Set[str]) -> str:
    """Return the plain name of a tensor of a module's trained copy, beside which the original is; else ""."""
    is_copy = f"{SAVED}." in name and name.replace(SAVED, ORIGINAL, 1) in present
    return name.replace(SAVED, "", 1) if is_copy else ""


def _ends_in(name: str, leaf: str) -> bool:
    return name == leaf or name.endswith(f".{leaf}")
