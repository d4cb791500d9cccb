"""Tensor names in PEFT's files and in this package's state dicts.

PEFT wraps a layer, so that what the layer owns moves to `<layer>.base_layer`; it wraps attention and the attention's
out_proj, one inside the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from .base import A, B
from .errors import LoRAError

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"
FACTORS = {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_embedding_A": A,
    "lora_embedding_B": B,
}
REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lora_B.bias": "lora_bias",
    "lora_A.bias": "lora_bias",
    "trainable_tokens_delta": "trainable_token_indices",
}


def peft_name(name: str, layers: Set[str], kinds: Mapping[str, str]) -> str:
    """PEFT's name of one of our tensors.

    Args:
        name: ours.
        layers: names of the adapted layers.
        kinds: of these, as far as known.
    """
    path, _, leaf = name.rpartition(".")
    if path not in layers:
        return PREFIX + name
    attention = path.rpartition(".")[0]
    place = path
    if kinds.get(path) == "AttentionOutput":
        place = f"{attention}{BASE_LAYER}.out_proj" if attention else "base_layer.out_proj"
    if leaf not in (A, B):
        return f"{PREFIX}{place}{BASE_LAYER}.{leaf}"
    if kinds.get(path) == "Embedding":
        return f"{PREFIX}{place}.lora_embedding_{leaf[-1]}"
    return f"{PREFIX}{place}.{leaf}.weight"


def our_names(peft_names: list[str], where: object) -> dict[str, str]:
    """Our name of each of PEFT's tensors.

    Raises:
        LoRAError: a name says that the adapter is more than plain LoRA, or two names mean the same tensor.
    """
    ours = {name: _our_name(name, where) for name in peft_names}
    first: dict[str, str] = {}
    for name, own in ours.items():
        if own in (A, B):
            raise LoRAError(f"{where}: {name!r} names no layer.")
        if first.setdefault(own, name) != name:
            raise LoRAError(f"{where}: {first[own]!r} and {name!r} both mean {own!r}; the file is damaged.")
    return ours


def _our_name(name: str, where: object) -> str:
    bare = name.removeprefix(PREFIX)
    for leaf, feature in REFUSED.items():
        if bare == leaf or bare.endswith(f".{leaf}"):
            raise LoRAError(f"{where}: {name!r} belongs to {feature}, which cannot be applied; plain LoRA is read.")
    if f"{BASE_LAYER}.lora_" in bare:
        raise LoRAError(f"{where}: {name!r} belongs to target_parameters, which cannot be applied; plain LoRA is read.")
    for leaf, own in FACTORS.items():
        if bare == leaf or bare.endswith(f".{leaf}"):
            bare = bare.removesuffix(leaf) + own
            break
    return bare.replace(f"{BASE_LAYER}.", ".")
