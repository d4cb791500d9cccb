"""Several adapters of one base in one: their changes are summed, pruned or voted on, layer by layer.

    method           the change of a layer, of D = s * B @ A of each adapter           rank
    linear           sum of weight * D, exactly                                         the lowest that holds it
    cat              the same, with the factors side by side                            the sum of the adapters'
    svd              the same, cut to its largest singular values                       the largest, or `rank`
    ties             of each D the largest values; of these, the mean of those that     the largest, or `rank`
                     agree with the sign of the sum (arXiv:2306.01708)
    dare_linear      of each D random values, enlarged; then the sum (arXiv:2311.03099)  the largest, or `rank`
    dare_ties        of each D random values, enlarged; then as ties                    the largest, or `rank`
    magnitude_prune  of each D the largest values; then the sum                         the largest, or `rank`

The last four build B @ A, for one layer at a time; the others never build it. `density` is the share of each matrix
that is kept, and 0.5 if it is left out. All methods but linear are peft's. It calls the last four ties_svd,
dare_linear_svd and so on, and these names are taken too; "dare" is dare_linear. peft's own linear, ties, dare_linear
and dare_ties work on A and B apart. So they add products of one adapter's B and another's A, and are not offered.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from ..adapter.adapter import Adapter, Layer, strengths_text
from ..adapter.combined_layer import CUT, OTHER_NAMES, PRUNING, Method, combine_layer, same_in_all
from ..adapter.fingerprint import compare_fingerprints
from ..adapter.lora_form import as_lora, padded
from ..adapter.renaming import by_network_names
from ..adapter.weighted_means import average_whole
from ..config import LoRAConfig, defaults_of, is_number, plain_number
from ..errors import LoRAError
from ..files.paths import PathLike
from ..formats.peft_folder import write_folder
from ..formats.peft_options import with_ranks_in_options
from ..formats.peft_parameters import TODAYS, refuse_without_model
from ..formats.sources import adapter_with_options
from ..names import PREFIX, A, B, listed, names_factor
from ..nn.attached_factors import Attachment
from ..nn.random_stream import stream
from ..notices import tell, warn
from ..progress import progress_bar

DENSITY = 0.5  # of the methods that prune, where none is given

REMEDY = (
    "Combine adapters that were trained on one base, or pass strict_base=False (--strict-base=false to the command), "
    "which makes this a warning."
)


@dataclass(frozen=True)
class Combined:
    """An adapter made of several.

    Attributes:
        adapter: the result.
        kept: by layer, the share of the squared norm of the combined change that its rank keeps.
        averaged: names of the tensors that are weighted means: modules_to_save, biases, rows of embeddings, buffers.
    """

    adapter: Adapter
    kept: Mapping[str, float]
    averaged: Sequence[str]


def combine(
    adapters: Sequence[PathLike | Mapping[str, Any] | Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str | None = None,
    rank: float | None = None,
    density: float | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    strict_base: bool = True,
) -> Adapter:
    """Combine several adapters of one base into one, or shrink one.

    Args:
        adapters: in any form that load_adapter takes and that stores its options. Ranks and layers may differ.
        weights: a number for each adapter, of any sign; 1 for one adapter, if left out. "ties" averages weight * D over
            the adapters that agree.
        method: "linear" (the weighted sum of the changes s * B @ A, exactly), "cat" (the same, factors side by side),
            "svd" (the same, cut to a rank), "ties", "dare_linear" (or "dare"), "dare_ties" or "magnitude_prune". By
            default it is "svd" where a rank is given, else "linear".
        rank: of the result, for all methods but linear and cat; by default the adapters' largest, layer by layer. A
            share above 0 and below 1 is for svd: each layer gets the lowest rank that keeps this share of its squared
            singular values.
        density: the share of each change that is kept, for the methods that prune; 0.5 by default.
        seed: of the random choice in the dare methods.
        output: a folder to write the result to, in PEFT's format. An adapter that is in it is replaced without asking.
        strict_base: whether adapters of different bases are an error or a warning.

    Returns:
        The result, for load_adapter, save_adapter, export_adapter and combine: scaling 1, tensors of float32 or wider.

    Raises:
        LoRAError: an argument is not allowed, an adapter cannot be read, or the adapters do not go together.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> save_adapter(model, "first")
        >>> save_adapter(model, "second")
        >>> load_adapter(model, combine(["first", "second"], [0.7, 0.3]))
        ['0', '2']
        >>> combine(["first"], rank=1)
        Adapter(r=1, 2 layers, 26 values)
    """
    combined = combine_adapters(
        adapters, weights, method=method, rank=rank, density=density, seed=seed, strict_base=strict_base
    )
    if output is not None:
        write_folder(combined.adapter, output, verb="combine")
    if combined.averaged and len(adapters) > 1:
        tell(f"lightning_lora: combine: weighted means of {listed(combined.averaged)}")
    worst = min(combined.kept, key=combined.kept.__getitem__, default="")
    if worst and (least := f"{combined.kept[worst]:.1%}") != "100.0%":
        tell(f"lightning_lora: combine: the rank keeps {least} or more of each squared norm ({worst})")
    return combined.adapter


def combine_adapters(
    sources: Sequence[PathLike | Mapping[str, Any] | Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str | None = None,
    rank: float | None = None,
    density: float | None = None,
    seed: int = 0,
    strict_base: bool = True,
) -> Combined:
    """Combine adapters, with the arguments and errors of combine."""
    if weights is None and isinstance(sources, Sequence) and len(sources) == 1:
        weights = [1.0]
    weights = [plain_number(weight) for weight in weights] if isinstance(weights, Iterable) else weights
    rank, density, seed = map(plain_number, (rank, density, seed))
    how = _checked_method(method or ("linear" if rank is None else "svd"), rank, density)
    density = DENSITY if density is None else density
    weights = _checked_weights(sources, weights)
    names = [str(s) if isinstance(s, (str, os.PathLike)) else f"adapters[{i}]" for i, s in enumerate(sources)]
    read = [
        by_network_names(adapter_with_options(source, where=name, verb=f"combine: {name}"))
        for source, name in zip(sources, names, strict=True)
    ]
    same_in_all("the list of trained rows", [(name, _own_tables(each)) for name, each in zip(names, read, strict=True)])
    _check_one_base(read, names, strict_base)
    used = [
        (name, _lora(each, f"combine: {name}"), float(weight))
        for name, each, weight in zip(names, read, weights, strict=True)
        if weight
    ]
    with_layer: dict[str, list[tuple[str, Adapter, float]]] = {}
    for name, each, weight in used:
        for layer in each.layers:
            with_layer.setdefault(layer, []).append((name, each, weight))
    tensors = average_whole(used)
    means = [name for name, value in tensors.items() if isinstance(value, torch.Tensor)]
    kept: dict[str, float] = {}
    with progress_bar("combining", len(with_layer)) as advance:
        for layer, holders in with_layer.items():
            digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
            draw = stream(int.from_bytes(digest[:8], "big") >> 1)
            factors, kept[layer] = combine_layer(layer, holders, how, rank, density, draw)
            tensors |= factors
            advance(1)
    adapter = _with_equal_attention(_assemble(tensors, [each for _, each, _ in used]))
    return Combined(with_ranks_in_options(adapter), kept, means)


def _checked_method(method: str, rank: float | None, density: float | None) -> str:
    how = method if method == "svd" else method.removesuffix("_svd")  # as peft calls them
    how = OTHER_NAMES.get(how, how)
    if how not in get_args(Method):
        raise LoRAError(f"combine: method must be one of {', '.join(get_args(Method))}, but it is {method!r}.")
    if rank is not None and how not in CUT:
        raise LoRAError(f"combine: {how} has no rank to choose; give rank with {', '.join(CUT)}.")
    is_share = isinstance(rank, float) and 0 < rank < 1
    if rank is not None and not is_share and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise LoRAError(
            "combine: rank must be a whole number of at least 1, or a share of the squared singular values above 0 and "
            f"below 1, but it is {rank!r}."
        )
    if is_share and how != "svd":
        raise LoRAError(f"combine: a rank that is a share ({rank!r}) is for svd; give {how} a whole number.")
    if density is not None and how not in PRUNING:
        raise LoRAError(f"combine: density, the share of values to keep, is only for {', '.join(PRUNING)}.")
    if density is not None and not (is_number(density) and 0 < density <= 1):
        raise LoRAError(f"combine: density must be above 0 and at most 1, but it is {density!r}.")
    return how


def _checked_weights(sources: Sequence[Any], weights: Sequence[float] | None) -> Sequence[float]:
    if isinstance(sources, (str, Mapping)) or not isinstance(sources, Collection) or not sources:
        raise LoRAError("combine: expected a list of one adapter or more, as combine([adapter], [0.7]).")
    if not isinstance(weights, Collection):
        raise LoRAError(f"combine: weights must be a list with a number for each adapter, but it is {weights!r}.")
    if len(sources) != len(weights):
        raise LoRAError(f"combine: {len(sources)} adapters need as many weights, found {len(weights)}.")
    for weight in weights:
        if not is_number(weight):
            raise LoRAError(f"combine: a strength must be a finite number, but it is {weight!r}.")
    if not any(weights):
        raise LoRAError("combine: all weights are 0, which leaves no adapter.")
    return weights


def _check_one_base(adapters: Sequence[Adapter], names: Sequence[str], strict: bool) -> None:
    """Compare the fingerprints of the adapters' bases; without fingerprints, the names of the bases."""
    first, *others = adapters
    for name, other in zip(names[1:], others, strict=True):
        shared = first.fingerprint.keys() & other.fingerprint.keys()
        if first.fingerprint and other.fingerprint:
            if not shared:
                raise LoRAError(
                    f"combine: {names[0]} and {name} are of other models: one has a base with "
                    f"{next(iter(first.fingerprint))!r}, the other with {next(iter(other.fingerprint))!r}."
                )
            before, now = ({n: e for n, e in each.fingerprint.items() if n in shared} for each in (first, other))
            compare_fingerprints(now, before, strict=strict, remedy=f"{names[0]} and {name} differ. {REMEDY}")
            continue
        bases_named = [each.origin.get("base_model_name_or_path") for each in (first, other)]
        if all(bases_named) and bases_named[0] != bases_named[1]:
            warn(
                f"lightning_lora: combine: {names[0]} is of the base {bases_named[0]!r}, {name} of {bases_named[1]!r}."
            )


def _lora(adapter: Adapter, where: str) -> Adapter:
    """Return an adapter as plain LoRA. LoRAError says why that is not possible."""
    if adapter.variant.has_scale:
        raise LoRAError(
            f"{where}: {adapter.variant.title} adapters cannot be combined: what they change depends on the base's "
            "weights, and no sum of products equals it."
        )
    for name in adapter.tensors:
        if name.rpartition(".")[2].startswith(PREFIX) and not names_factor(name):
            raise LoRAError(
                f"{where}: {name!r} cannot be combined, only tensors of a variant that is known here and fully "
                "trained modules."
            )
    refuse_without_model(adapter, where)
    return as_lora(adapter)


def _assemble(tensors: Mapping[str, Any], adapters: Sequence[Adapter]) -> Adapter:
    """Return an adapter of combined layers, with the base and the kinds that the adapters tell."""
    trained = {name for each in adapters for name in each.tensors}
    first = next((each for each in adapters if each.tied), adapters[0])
    kinds = {name: layer.kind for each in adapters for name, layer in each.layers.items() if layer.kind}
    return Adapter(
        tensors=tensors,
        config=_words(adapters),
        fingerprint={n: e for each in reversed(adapters) for n, e in each.fingerprint.items() if n not in trained},
        complete=all(each.complete for each in adapters),
        peft_version=TODAYS if any(each.peft_version is not None for each in adapters) else None,
        weightless=frozenset().union(*(each.weightless for each in adapters)),
        origin={key: value for each in reversed(adapters) for key, value in each.origin.items()},
        fan_in_fan_out=any(each.fan_in_fan_out for each in adapters),
        tables=_own_tables(first),
        tied=first.tied,
        tied_by_peft=first.tied_by_peft,
        attached=_beside_all(adapters),
    ).with_layers({name: Layer(scaling=1.0, kind=kinds.get(name, "")) for each in adapters for name in each.layers})


def _beside_all(adapters: Sequence[Adapter]) -> Mapping[str, Attachment]:
    """Return what all adapters were trained with. What only some had attached may be one of the others: a warning."""
    first, *others = (each.attached for each in adapters)
    if all(other == first for other in others):
        return first
    some = {name: each for attached in (first, *others) for name, each in attached.items()}
    tell(
        f"lightning_lora: combine: not all were trained with {strengths_text(some)} attached, so the result "
        "does not ask for them. Combine it with them too, using these strengths as weights."
    )
    return {}


def _words(adapters: Sequence[Adapter]) -> LoRAConfig:
    """Return the first adapter's options, with all that is fully trained, and the layers' names where others differ."""
    configs = [each.config or LoRAConfig() for each in adapters]
    layers = dict.fromkeys(layer for each in adapters for layer in each.layers)
    parameters = {layer for each in adapters for layer in each.parameters}
    by_name = defaults_of("layers") | {
        "target_modules": [layer for layer in layers if layer not in parameters],
        "target_parameters": [layer for layer in layers if layer in parameters],
    }
    return replace(
        configs[0],
        **(by_name if layers.keys() != adapters[0].layers.keys() else {}),
        **defaults_of("scaling"),  # with_ranks_in_options then writes all that decides ranks
        lora_dropout=0.0 if any(each.parameters for each in adapters) else configs[0].lora_dropout,
        modules_to_save=list(dict.fromkeys(name for config in configs for name in config.modules_to_save or ())),
    )


def _own_tables(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the trained rows of each table that does not share them with another."""
    return {table: rows for table, rows in adapter.tables.items() if table not in adapter.tied}


def _with_equal_attention(adapter: Adapter) -> Adapter:
    """Give attention and its out_proj one rank, as PEFT needs it: zeros are added to the lower one."""
    tensors, ranks = dict(adapter.tensors), {name: layer.r for name, layer in adapter.layers.items()}
    for output in ranks:
        lower, higher = sorted((output, adapter.options_name(output)), key=ranks.__getitem__)
        if ranks[lower] < ranks[higher]:
            b, a = padded((adapter.factor(lower, B), adapter.factor(lower, A)), ranks[higher])
            tensors |= {adapter.factor_name(lower, A): a, adapter.factor_name(lower, B): b}
    return replace(adapter, tensors=tensors).with_layers()
