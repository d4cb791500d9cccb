"""An adapter apart from any model: its tensors, options and names, checked and measured."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import A, B, around, near_misses, suffixes
from ..nn.low_rank import ATTENTION, MERGEABLE_DTYPES, SEPARATE, low_rank_blocks, product_norm

NewName = Callable[[str], str | None]


@dataclass(frozen=True)
class Adapter:
    """Tensors by this package's state dict names, and what is known of where they belong.

    Attributes:
        tensors: factors, trained parameters and buffers.
        config: the options, or None where the source holds none.
        scalings: s of each adapted layer, or empty where the source holds none.
        fingerprint: of the base, or empty where the source holds none.
        complete: the source holds buffers too, so that each missing name is an error.
        kinds: of each adapted layer where known, see low_rank.KINDS.
        network: the prefix of the network's names inside the LightningModule that was saved.
        origin: what the source says of the base: base_model_name_or_path, revision, task_type.
        fan_in_fan_out: weights of unknown kind are stored (in, out), as PEFT says of transformers' Conv1D.
    """

    tensors: Mapping[str, Any]
    config: LoRAConfig | None = None
    scalings: Mapping[str, float] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return [name.rpartition(".")[0] for name in self.tensors if name.rpartition(".")[2] == A]

    def renamed(self, strip: str, add: str) -> Adapter:
        """Return it with a dotted prefix off every name and another in front; names without it are left out."""

        def new_name(name: str) -> str | None:
            return add + name.removeprefix(strip) if name.startswith(strip) else None

        def new_layer_name(name: str) -> str | None:
            renamed = new_name(f"{name}.")
            return None if renamed is None else renamed.removesuffix(".")

        renamed = replace(self.with_names(new_name, new_layer_name), network="")
        old_names = {str(new_layer_name(name)): name for name in self.layers() if new_layer_name(name) is not None}
        return replace(renamed, config=_meaning_the_same(self, renamed, old_names))

    def with_names(self, new_name: NewName, new_layer_name: NewName) -> Adapter:
        """Return it with other names of tensors and of layers; None leaves one out. The options stay as they are."""

        def rename(values: Mapping[str, Any], new: NewName) -> dict[str, Any]:
            renamed = ((new(name), value) for name, value in values.items())
            return {name: value for name, value in renamed if name is not None}

        return replace(
            self,
            tensors=rename(self.tensors, new_name),
            scalings=rename(self.scalings, new_layer_name),
            fingerprint=rename(self.fingerprint, new_name),
            kinds=rename(self.kinds, new_layer_name),
        )


def _meaning_the_same(old: Adapter, new: Adapter, names: Mapping[str, str]) -> LoRAConfig | None:
    """The options for the layers' new names: as they are where they mean the same, else with the layers spelled out.

    Args:
        old: the adapter before it was renamed.
        new: the adapter after.
        names: the old name of each new one.
    """
    config = old.config
    if config is None:
        return None
    config = replace(config, modules_to_save=_still_naming(config.modules_to_save or (), old, new))
    ranks = {n: old.tensors[f"{before}.{B}"].shape[1] for n, before in names.items()}
    enabled = {n: config.enabled_parts(before) for n, before in names.items()}
    same = all(config.rank(n) == ranks[n] and config.enabled_parts(n) == enabled[n] for n in names)
    if same and all(math.isclose(config.scaling(n), s) for n, s in new.scalings.items()):
        return config
    parts = {n: on for n, on in sorted(enabled.items(), key=lambda item: -len(item[0])) if on}
    return replace(config, **spelled_out(replace(new, config=config), ranks), enable_lora=parts)


def _still_naming(entries: Iterable[str], old: Adapter, new: Adapter) -> list[str]:
    """Entries of modules_to_save, without what was taken off the names if they need that to name anything."""
    before, now = ({module for name in x.tensors for module in around(name)} for x in (old, new))
    named = {suffix for module in now for suffix in suffixes(module)}
    taken = defaultdict(list)
    for module in before:
        for suffix in suffixes(module):
            taken[suffix].append(module)

    def still_naming(entry: str) -> str:
        if entry in named:
            return entry
        shorter = [suffix for whole in taken[entry] for suffix in suffixes(whole) if suffix in now]
        return max(shorter, key=len, default=entry)

    return list(map(still_naming, entries))


def spelled_out(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Options that give exactly the layers in `ranks` these ranks and the adapter's scalings.

    What most layers have is the option, and patterns name the others.
    """
    root = adapter.config is not None and adapter.config.use_rslora
    alphas = {n: adapter.scalings[n] * (math.sqrt(r) if root else r) for n, r in ranks.items()}
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    ((r, _),), ((alpha, _),) = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    return {
        "target_modules": list(ranks),
        "exclude_modules": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != r},
        "alpha_pattern": {f"^{re.escape(name)}": own for name, own in alphas.items() if own != alpha},
    }


def without_options(adapter: Adapter) -> str:
    """What to say of a source, such as loralib's, that stores tensors and nothing else."""
    ranks = sorted({adapter.tensors[f"{name}.{B}"].shape[1] for name in adapter.layers()})
    return (
        f"adapter: the source stores tensors and no options, as loralib's files do. Its factors have rank "
        f"{' and '.join(map(str, ranks))}; lora_alpha is nowhere in it and must come from whoever trained it. Call "
        f"inject(model, LoRAConfig(r={ranks[0]}, lora_alpha=..., target_modules=...)) first, then load_adapter again."
    )


def align_to_modules(adapter: Adapter, modules: Set[str], where: str) -> Adapter:
    """The adapter under the one prefix at which its layers are among the modules.

    Raises:
        LoRAError: there is no such prefix, or there are several.
    """
    layers = adapter.layers()
    if not layers:
        raise LoRAError("adapter: the source holds no lora_A; it is not an adapter of a known format.")
    if all(layer in modules for layer in layers):
        return adapter
    first = layers[0].split(".")
    strips = [".".join(first[:i]) + "." for i in range(1, len(first))]
    places = [(strip, "") for strip in strips if all((layer + ".").startswith(strip) for layer in layers)]
    places = [p for p in places if all((layer + ".")[len(p[0]) :].removesuffix(".") in modules for layer in layers)]
    prefixes = {m.removesuffix(layers[0]) for m in modules if m.endswith(f".{layers[0]}")}
    places += [("", prefix) for prefix in sorted(prefixes) if all(prefix + layer in modules for layer in layers)]
    if len(places) != 1:
        found = ", ".join(repr(add or f"without {strip}") for strip, add in places) or "none"
        odd = next(layer for layer in layers if layer not in modules)
        raise LoRAError(
            f"adapter: its layers ({odd!r}, ...) must fit {where} under exactly one prefix; "
            f"found {found}{near_misses(odd, modules - {''})}. Pass the submodule that the adapter is for."
        )
    strip, _ = places[0]
    outside = [name for name in adapter.tensors if not name.startswith(strip)]
    if outside:
        warnings.warn(
            f"lightning_lora: {len(outside)} of the adapter's tensors lie outside {where} and are left out, "
            f"first {outside[0]!r}",
            stacklevel=4,
        )
    return adapter.renamed(*places[0])


def check_factors(adapter: Adapter, where: str) -> None:
    """Compare the factors with each other and with the options.

    Raises:
        LoRAError: names the first layer whose factors are missing, not numbers, or of another rank than the options'.
    """
    for name in adapter.layers():
        if not name:
            raise LoRAError(f"{where}: a lora_A names no layer.")
        a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors.get(f"{name}.{B}")
        if b is None:
            raise LoRAError(f"{where}: {f'{name}.{B}'!r} is missing; the adapter was cut.")
        for leaf, factor in ((A, a), (B, b)):
            if not isinstance(factor, torch.Tensor) or factor.dtype not in MERGEABLE_DTYPES or factor.dim() < 2:
                found = f"{factor.dtype} {tuple(factor.shape)}" if isinstance(factor, torch.Tensor) else repr(factor)
                raise LoRAError(
                    f"{where}: {f'{name}.{leaf}'!r} must be a floating point tensor of two dimensions or more, "
                    f"found {found[:80]}."
                )
            check_finite(f"{name}.{leaf}", factor, where)
        _check_rank(adapter, name, where)


def _check_rank(adapter: Adapter, name: str, where: str) -> None:
    a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
    rank = b.shape[1]
    if not rank or not a.shape[0] or a.shape[0] % rank:
        raise LoRAError(f"{where}: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not share a rank.")
    if adapter.config is None:
        return
    owner = name.rpartition(".")[0] if _is_output(adapter, name) else name
    wanted = [adapter.config.scaling(n) for n in (name, owner) if adapter.config.rank(n) == rank]
    if not wanted:
        raise LoRAError(
            f"{where}: {name!r}: the options say r={adapter.config.rank(name)}, but its factors have rank {rank}: "
            f"A {tuple(a.shape)}, B {tuple(b.shape)}."
        )
    scaling = adapter.scalings.get(name, wanted[0])
    if not any(math.isclose(scaling, s) for s in wanted):
        raise LoRAError(
            f"{where}: {name!r}: the options say a scaling (lora_alpha over r) of {wanted[0]:g}, but {scaling:g} is "
            "recorded; the file is damaged."
        )


def _is_output(adapter: Adapter, name: str) -> bool:
    """Whether a layer is the out_proj of an adapted attention, which has the attention's options in PEFT."""
    attention, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and f"{attention}.{A}" in adapter.tensors


def check_finite(name: str, value: torch.Tensor, where: str = "adapter") -> None:
    """Raise where a value is NaN or Inf; a tensor without values (meta) counts as finite.

    Raises:
        LoRAError: names the tensor.
    """
    numbers = value if value.dtype in MERGEABLE_DTYPES else value.double()  # isfinite does not know float8
    if not value.is_meta and not torch.isfinite(numbers).all():
        raise LoRAError(f"{where}: {name!r} holds NaN or Inf; it comes from a diverged run or a damaged file.")


def delta_norm(adapter: Adapter, name: str) -> float:
    """Return the Frobenius norm of s * B @ A of one layer; without options, of B @ A."""
    return math.hypot(*(product_norm(left, right) for left, right in _scaled_pairs(adapter, name)))


def difference_norm(adapter: Adapter, other_adapter: Adapter, name: str) -> float:
    """Return the Frobenius norm of the difference between two adapters' s * B @ A of one layer.

    Raises:
        ValueError: the layer has other parts or shapes in the two.
    """
    norms = []
    pairs = zip(_scaled_pairs(adapter, name), _scaled_pairs(other_adapter, name), strict=True)
    for (left, right), (other_left, other_right) in pairs:
        if left.shape[0] != other_left.shape[0] or right.shape[1] != other_right.shape[1]:
            raise ValueError(f"{name!r} has other shapes in the two")
        if left.shape == other_left.shape and torch.equal(left, other_left) and torch.equal(right, other_right):
            norms.append(0.0)
        else:
            norms.append(product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right])))
    return math.hypot(*norms)


def _scaled_pairs(adapter: Adapter, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(s * B, A) of each part of a layer, as matrices in float64."""
    a, b = (adapter.tensors[f"{name}.{leaf}"].detach().double().flatten(1) for leaf in (A, B))
    scaling = adapter.scalings.get(name, 1.0)
    entries = {leaf: adapter.fingerprint.get(f"{name}.{leaf}") for leaf in SEPARATE}
    shapes = {leaf: entry["shape"] for leaf, entry in entries.items() if entry is not None}
    if adapter.kinds.get(name) == ATTENTION and shapes:
        enabled = adapter.config.enabled_parts(name) if adapter.config else None
        blocks = low_rank_blocks(ATTENTION, shapes, a, b, enabled)
        return [(block.left * scaling, block.right) for parts in blocks.values() for block in parts]
    parts = a.shape[0] // b.shape[1]
    return [(left * scaling, right) for left, right in zip(b.chunk(parts), a.chunk(parts), strict=True)]
