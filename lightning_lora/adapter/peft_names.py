"""PEFT's names of tensors, from and to ours.

PEFT wraps what it trains, so that names grow segments that the model itself does not have:

    <layer>.base_layer.<leaf>              what an adapted layer owns
    <attention>.base_layer.out_proj...     attention and its out_proj are wrapped one inside the other
    <module>.modules_to_save.<leaf>        the trained copy of a module that is saved whole
    <module>.original_module.<leaf>        the module as it was
    <table>.token_adapter...               a table of which rows are trained, see peft_rows.py

In files the second half of these is plain `<module>.<leaf>`, and in the state dict of a live PeftModel each `lora_A`,
`lora_B` and `modules_to_save` is followed by the adapter's name. A segment is PEFT's only where its neighbours say so:
a model may have modules of the same names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from ..errors import LoRAError
from ..names import MAGNITUDE, A, B, split_factor_name
from ..nn.low_rank import ATTENTION_OUTPUT, EMBEDDING
from .peft_parameters import Nesting, our_factor
from .peft_rows import our_table_name

PREFIX = "base_model.model."
BASE_LAYER, SAVED, ORIGINAL = ".base_layer", ".modules_to_save", ".original_module"
PEFT_MAGNITUDE = "lora_magnitude_vector"
FACTORS = {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_embedding_A": A,
    "lora_embedding_B": B,
    PEFT_MAGNITUDE: MAGNITUDE,
    f"{PEFT_MAGNITUDE}.weight": MAGNITUDE,  # of a live model
}
OTHER_METHODS = {
    "lora_B.bias": "lora_bias",
    "lora_A.bias": "lora_bias",
    "trainable_tokens_delta": "trainable_token_indices",
}
ADAPTER_NAME = re.compile(r"(?:^|\.)(?:lora_[AB]\.([^.]+)\.weight|lora_embedding_[AB]\.([^.]+))$")
NAMED = r"(^|\.)(lora_\w+|modules_to_save|trainable_tokens_delta)\."  # what an adapter's name follows


@dataclass(frozen=True)
class PeftNames:
    """What the names of PEFT's tensors say.

    Attributes:
        ours: our name of each tensor, without those that say nothing more.
        bare: of each of our names, PEFT's in a file, without its prefix.
        of_layers: our names of what adapted layers own beside the factors.
        network: what stands before PEFT's prefix, as in the state dict of a LightningModule: "" or ending in a dot.
        saved: the modules that were copied and trained whole, as far as names tell.
        live: they are those of a live PeftModel's state dict, which holds the base too.
    """

    ours: Mapping[str, str]
    bare: Mapping[str, str]
    of_layers: frozenset[str]
    network: str
    saved: frozenset[str]
    live: bool


def are_peft_names(names: Iterable[str]) -> bool:
    """Tell whether names are PEFT's, in a file or of a live model, rather than ours."""
    return any(ADAPTER_NAME.search(name) or any(_ends_in(name, leaf) for leaf in FACTORS) for name in names)


def peft_name(name: str, layers: Set[str], kinds: Mapping[str, str], nesting: Nesting) -> str:
    """Return PEFT's name of one of our tensors, as files have it.

    Args:
        name: ours.
        layers: names of the adapted layers and parameters.
        kinds: of these, as far as known.
        nesting: of the parameters.
    """
    layer, _, leaf = name.rpartition(".")
    if layer in nesting:
        parameter, factor = split_factor_name(name) or ("", "")
        order = nesting[layer]
        if parameter not in layers:  # it lies in the innermost
            return f"{PREFIX}{layer}{BASE_LAYER * len(order)}.{leaf}"
        depth = len(order) - 1 - order.index(parameter.rpartition(".")[2])
        return f"{PREFIX}{layer}{BASE_LAYER * depth}.{factor}.weight"
    if layer not in layers:
        return PREFIX + name
    kind, wrapped = kinds.get(layer), PREFIX + layer
    if kind == ATTENTION_OUTPUT:  # its attention is wrapped too
        attention, dot, _ = layer.rpartition(".")
        wrapped = f"{PREFIX}{attention}{dot}base_layer.out_proj"
    if leaf == MAGNITUDE:
        return f"{wrapped}.{PEFT_MAGNITUDE}"
    if leaf not in (A, B):
        return f"{wrapped}{BASE_LAYER}.{leaf}"
    return f"{wrapped}.lora_embedding_{leaf[-1]}" if kind == EMBEDDING else f"{wrapped}.{leaf}.weight"


def read_names(
    peft_names: Iterable[str], where: object, nesting_for: Callable[[Mapping[str, int]], Nesting] = lambda wrapped: {}
) -> PeftNames:
    """Return what the names of PEFT's tensors say.

    Args:
        peft_names: the names.
        where: for messages.
        nesting_for: tells which parameters the adapters of modules are of that have so many each.

    Raises:
        LoRAError: a name says that the adapter is more than plain LoRA, there are several adapters or models, or two
            names mean the same tensor.
    """
    peft_names = list(peft_names)
    adapter_name, network = _adapter_name(peft_names, where), _network(peft_names, where)
    bare = {name: _without_segments(name, adapter_name, network) for name in peft_names}
    present = set(bare.values())
    layer_of = {name: layer for name in present if (layer := _layer(name)) is not None}
    layers = set(layer_of.values())
    nesting = nesting_for(Counter(_unwrapped(layer, layers)[0] for layer in layers))
    ours: dict[str, str] = {}
    first: dict[str, str] = {}
    for peft_name, bare_name in bare.items():
        name = _our_name(bare_name, layer_of.get(bare_name), present, layers, nesting, where)
        if name is None:
            continue
        if name in FACTORS.values():
            raise LoRAError(f"{where}: {peft_name!r} names no layer.")
        if first.setdefault(name, peft_name) != peft_name:
            raise LoRAError(f"{where}: {first[name]!r} and {peft_name!r} both mean {name!r}; the file is damaged.")
        ours[peft_name] = name
    if nesting:  # parameters are named in the order in which their modules register them
        ours = dict(sorted(ours.items(), key=lambda names: -names[0].count(BASE_LAYER)))
    saved = frozenset(name.partition(SAVED)[0] for name in present if _saved_twin(name, present))
    return PeftNames(
        ours=ours,
        bare={name: bare[peft_name] for peft_name, name in ours.items()},
        of_layers=frozenset(name for name in ours.values() if bare[first[name]].rpartition(BASE_LAYER)[0] in layers),
        network=network,
        saved=saved,
        live=adapter_name != "",
    )


def _adapter_name(peft_names: Iterable[str], where: object) -> str:
    """Return the name that PEFT gave the adapter, or "" where the names do not hold it, as those in files."""
    matches = (ADAPTER_NAME.search(name) for name in peft_names)
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
    for name in peft_names:
        start = _start(name)
        if start >= 0 and name[:start] not in found and are_peft_names([name]):
            found.add(name[:start])
    if len(found) > 1:
        names = ", ".join(repr(prefix.removesuffix(".")) for prefix in sorted(found))
        raise LoRAError(f"{where}: holds several PeftModels ({names}); save each by itself with save_pretrained.")
    return next(iter(found), "")


def _start(name: str) -> int:
    return 0 if name.startswith(PREFIX) else name.find(f".{PREFIX}") + 1 or -1


def _without_segments(name: str, adapter_name: str, network: str) -> str:
    """Leave out PEFT's prefix and the adapter's name."""
    if name.startswith(network + PREFIX):
        name = network + name.removeprefix(network + PREFIX)
    return re.sub(rf"{NAMED}{re.escape(adapter_name)}(?=\.|$)", r"\1\2", name) if adapter_name else name


def _layer(name: str) -> str | None:
    """Return the layer, as PEFT writes it, that a factor is of."""
    leaf = next((leaf for leaf in FACTORS if _ends_in(name, leaf)), None)
    return None if leaf is None else name.removesuffix(leaf).removesuffix(".")


def _unwrapped(layer: str, layers: Set[str]) -> tuple[str, int]:
    """Return the module that an adapter as PEFT writes it is of, and how many others are around it."""
    depth = 0
    while layer.endswith(BASE_LAYER) and layer.removesuffix(BASE_LAYER) in layers:
        layer, depth = layer.removesuffix(BASE_LAYER), depth + 1
    return layer, depth


def _our_name(
    name: str, layer: str | None, present: Set[str], layers: Set[str], nesting: Nesting, where: object
) -> str | None:
    if layer is not None:
        module, depth = _unwrapped(layer, layers)
        factor = FACTORS[name.removeprefix(layer).removeprefix(".")]
        parameter = our_factor(module, depth, factor, nesting)
        if parameter is not None:
            return parameter
    in_table = our_table_name(name, present)
    if in_table != name:
        return in_table
    other_method = next((method for leaf, method in OTHER_METHODS.items() if _ends_in(name, leaf)), "")
    if layer is not None and layer.endswith(BASE_LAYER) and layer.removesuffix(BASE_LAYER) in layers:
        other_method = "target_parameters"
    if other_method:
        raise LoRAError(f"{where}: {name!r} belongs to {other_method}, which cannot be applied; plain LoRA is read.")
    if f"{ORIGINAL}." in name and name.replace(ORIGINAL, SAVED, 1) in present:
        return None  # the module as it was before training
    plain = _saved_twin(name, present)
    if plain:
        return None if plain in present else plain  # bias="all" puts a bias into the file a second time
    if layer is not None:
        leaf = name.removeprefix(layer).removeprefix(".")
        name = f"{layer}.{FACTORS[leaf]}" if layer else FACTORS[leaf]
    if BASE_LAYER not in f".{name}":
        return name
    segments = name.split(".")
    return ".".join(
        segment
        for i, segment in enumerate(segments)
        if not (f".{segment}" == BASE_LAYER and ".".join(segments[:i]) in layers)
    )


def _saved_twin(name: str, present: Set[str]) -> str:
    """Return the plain name of a tensor of a module's trained copy, beside which the original is; else ""."""
    is_copy = f"{SAVED}." in name and name.replace(SAVED, ORIGINAL, 1) in present
    return name.replace(SAVED, "", 1) if is_copy else ""


def _ends_in(name: str, leaf: str) -> bool:
    return name == leaf or name.endswith(f".{leaf}")
