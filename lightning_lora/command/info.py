"""The verbs that look: what a file or folder holds, and what differs between two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.measures import delta_norm, difference_norm
from ..adapter.renaming import by_network_names
from ..config import LEFT_OUT_AT_DEFAULT
from ..errors import LoRAError, shown
from ..files.paths import PathLike
from ..files.torch_archive import read_torch_file
from ..files.weights import Weights, open_weights
from ..formats.forms import form_of, refuse_named_adapters
from ..formats.hub import local_source
from ..formats.peft_names import are_peft_names
from ..formats.sources import holds_adapter_state, read_source
from ..names import META, PREFIX, factor_role
from ..progress import Unit, progress_bar
from .output import refuse_quantized

CHUNK = 2**21  # elements that are compared at once: more are not faster


def info(path: PathLike) -> dict[str, Any]:
    """Show what a file or folder holds: options, layers, ranks, norms, the base that it belongs to.

    Args:
        path: checkpoint, PEFT folder, safetensors file, state dict or model folder.

    Returns:
        Plain types.

    Raises:
        LoRAError: it is none of these, or damaged.
    """
    place = local_source(path)
    if kind := _adapter_kind(place):
        return {"path": str(path), "kind": kind, **_adapter_info(read_source(place))}
    weights = open_weights(place)
    tensors = weights.tensors.values()
    return {
        "path": str(path),
        "kind": "weights",
        "form": weights.form,
        "files": len(weights.shards) or 1,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": weights.nbytes,
        "dtypes": dict(Counter(_dtype_name(tensor.dtype) for tensor in tensors)),
    }


def _adapter_kind(path: PathLike) -> str:
    """Return what an adapter at a path is stored as, or "" where there are weights by themselves."""
    form = form_of(path)
    if form == "PEFT folder":
        return form
    refuse_named_adapters(path)
    if form == "torch file" and holds_adapter_state(
        content := read_torch_file(path, "meta", plain=[META])
    ):  # only a reading tells
        if isinstance(content.get(META), Mapping):
            return f"Lightning checkpoint of kind {shown(content[META].get('kind'))}"
        if are_peft_names(content.get("state_dict", content)):
            return "Lightning checkpoint that holds a PeftModel" if "state_dict" in content else "state dict of PEFT"
        return "state dict with an adapter and no options, as loralib writes it"
    return f"{form} with an adapter" if open_weights(path).holds(PREFIX) else ""


def _adapter_info(adapter: Adapter) -> dict[str, Any]:
    layers, factors = adapter.layers, adapter.factors()
    whole = {name: value for name, value in adapter.whole_tensors().items() if isinstance(value, torch.Tensor)}
    layers_info = _each("measuring", layers, lambda name: _layer_info(adapter, name))
    return {
        "config": adapter.config.to_dict() if adapter.config is not None else None,
        "layers": layers_info,
        "parameters": sum(factor.numel() for factor in factors),
        "bytes": sum(factor.nbytes for factor in factors),
        "norm": math.hypot(*(layer["norm_delta"] for layer in layers_info.values())),
        **({"tables": {table: _table_info(adapter, table) for table in adapter.rows()}} if adapter.rows() else {}),
        **({"attached": {name: each.strength for name, each in adapter.attached.items()}} if adapter.attached else {}),
        "also_trained": {name: list(tensor.shape) for name, tensor in whole.items()},
        "base": {
            **adapter.origin,
            "frozen_tensors": len(adapter.fingerprint),
            "dtypes": dict(Counter(entry.quantized or entry.dtype for entry in adapter.fingerprint.values())),
        },
    }


def _layer_info(adapter: Adapter, name: str) -> dict[str, Any]:
    stored, variant = adapter.stored(name), adapter.variant
    trained = {factor_role(leaf): stored[leaf] for leaf in variant.trained}
    matrices = {role: tensor for role, tensor in trained.items() if tensor.dim() > 1}
    norms = {f"norm_{role}": float(tensor.double().norm()) for role, tensor in trained.items()}
    return {
        "kind": adapter.layers[name].kind or None,
        "rank": adapter.layers[name].r,
        "scaling": adapter.layers[name].scaling,
        **{f"shape_{role}": list(tensor.shape) for role, tensor in matrices.items()},
        "dtype": _dtype_name(next(iter(trained.values())).dtype),
        **{name: norm for name, norm in norms.items() if name.removeprefix("norm_") in matrices},
        "norm_delta": delta_norm(adapter, name),
        **norms,
    }


def _table_info(adapter: Adapter, table: str) -> dict[str, Any]:
    rows = adapter.rows()[table]
    return {"rows": list(adapter.tables.get(table, ())), "shape": list(rows.shape), "dtype": _dtype_name(rows.dtype)}


def diff(first: PathLike, second: PathLike) -> dict[str, Any]:
    """Show what differs between two adapters or two models, layer by layer, also relative to the norm in the first.

    Args:
        first: adapter or weights, in any form.
        second: another of the same kind.

    Returns:
        Plain types. `change` is the Frobenius norm of the difference, `relative` that over the norm in the first. Of
        adapters, `options` has both values of each option that differs, and `without_scaling` lists the paths that
        store no scaling; if there are any, B @ A is compared. Of weights that differ by a prefix of all names,
        `without_prefix` has the prefix that is taken off in each.

    Raises:
        LoRAError: only one of the two is an adapter, or a file is damaged.
    """
    paths = local_source(first), local_source(second)
    adapters = [path for path in paths if _adapter_kind(path)]
    if len(adapters) == 1:
        weights = paths[adapters[0] is paths[0]]
        raise LoRAError(f"diff: {adapters[0]} is an adapter and {weights} is not; give two of a kind.")
    if not adapters:
        both = open_weights(paths[0]), open_weights(paths[1])
        for each in both:
            refuse_quantized("diff", each)
            each.compare_check_sums()
        return _diff_weights(*both)
    one, other = (by_network_names(read_source(path)) for path in paths)
    unscaled = [any(layer.scaling is None for layer in each.layers.values()) for each in (one, other)]
    lacking = [str(path) for path, lacks in zip(paths, unscaled, strict=True) if lacks]
    if lacking:  # s * B @ A and B @ A cannot be compared
        one, other = map(_without_scalings, (one, other))
    return {**_diff_adapters(one, other), "without_scaling": lacking}


def _without_scalings(adapter: Adapter) -> Adapter:
    return replace(adapter, layers={name: replace(layer, scaling=None) for name, layer in adapter.layers.items()})


def _diff_adapters(first: Adapter, second: Adapter) -> dict[str, Any]:
    in_both = [name for name in first.layers if name in second.layers]
    rows = _each("comparing", in_both, lambda name: _layer_row(first, second, name))
    first_whole, second_whole = (
        {**each.whole_tensors(), **each.rows(), **_scales_by_tensor(each)} for each in (first, second)
    )
    for name in first_whole:
        if name in second_whole and first.tables.get(name) != second.tables.get(name):
            rows[name] = {"problem": "other rows were trained"}
        elif name in second_whole:
            rows[name] = _value_row(first_whole[name], second_whole[name])
    differing = first.config.differing(second.config) if first.config and second.config else []
    values = [LEFT_OUT_AT_DEFAULT | (each.config.to_dict() if each.config else {}) for each in (first, second)]
    options = {name: [each.get(name) for each in values] for name in differing}
    only = _only_in_one({*first.layers, *first_whole}, {*second.layers, *second_whole})
    return {"kind": "adapters", "options": options, **only, "changes": rows}


def _scales_by_tensor(adapter: Adapter) -> dict[str, Any]:
    """Return the vectors of layers whose change is more than a product, by their names: the norms leave them out."""
    if not adapter.variant.has_scale:
        return {}
    return {
        adapter.factor_name(layer, leaf): value
        for layer in adapter.layers
        for leaf, value in adapter.stored(layer).items()
        if isinstance(value, torch.Tensor) and value.dim() == 1
    }


def _layer_row(first: Adapter, second: Adapter, name: str) -> dict[str, Any]:
    try:
        change, norm = difference_norm(first, second, name), delta_norm(first, name)
    except ValueError as error:
        return {"problem": str(error)}
    return {"change": change, "relative": _ratio(change, norm)}


def _value_row(first: Any, second: Any) -> dict[str, Any]:
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return {"problem": "no tensor, so that it is not compared"}
    if first.shape != second.shape:
        return {"problem": f"shape {tuple(first.shape)} and {tuple(second.shape)}"}
    old, new = _wide(first), _wide(second)
    change = float(_change(old, new).norm())
    return {"change": change, "relative": _ratio(change, float(old.norm()))}


def _change(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return new - old. It is zero where both are the same infinity or NaN, as in a mask."""
    return (new - old).masked_fill((old == new) | (old.isnan() & new.isnan()), 0)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _diff_weights(first: Weights, second: Weights) -> dict[str, Any]:
    one, other = dict(first.tensors), dict(second.tensors)
    prefixes = _prefixes(one, other)
    one, other = (
        {name.removeprefix(prefix): tensor for name, tensor in each.items()}
        for each, prefix in zip((one, other), prefixes, strict=True)
    )
    names = [name for name in one if name in other]
    rows = _each("comparing", names, lambda name: _tensor_row(one[name], other[name]), "tensors")
    without = {"without_prefix": list(prefixes)} if any(prefixes) else {}
    return {"kind": "weights", **without, **_only_in_one(set(one), set(other)), "changes": rows}


def _prefixes(first: Collection[str], second: Collection[str]) -> tuple[str, str]:
    """Return what the names of one of two models begin with, and those of the other do not; else two empty texts.

    Only where the two have no name in common, as a network and the LightningModule around it.
    """
    if not set(first).isdisjoint(second):
        return "", ""
    for shorter, longer, is_first in ((first, second, False), (second, first, True)):
        found = Counter(other.removesuffix(name) for name in shorter for other in longer if other.endswith(f".{name}"))
        for prefix, count in found.most_common(1):
            if 2 * count > len(shorter):
                return (prefix, "") if is_first else ("", prefix)
    return "", ""


def _tensor_row(first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    if first.shape != second.shape:
        return {"problem": f"shape {tuple(first.shape)} and {tuple(second.shape)}"}
    changed, whole, largest = 0.0, 0.0, 0.0
    for before, after in zip(*(torch.split(each.reshape(-1), CHUNK) for each in (first, second)), strict=True):
        old = _wide(before)
        change = _change(old, _wide(after))
        changed += float(change.abs().square().sum())
        whole += float(old.abs().square().sum())
        largest = max(largest, float(change.abs().max())) if change.numel() else largest
    norm = changed**0.5
    dtypes = {} if first.dtype == second.dtype else {"dtypes": [_dtype_name(first.dtype), _dtype_name(second.dtype)]}
    return {"change": norm, "relative": _ratio(norm, whole**0.5), "largest": largest, **dtypes}


def _each(
    what: str, names: Collection[str], row: Callable[[str], dict[str, Any]], unit: Unit = "layers"
) -> dict[str, dict[str, Any]]:
    """Make a row for each name, with a progress bar."""
    rows = {}
    with progress_bar(what, len(names), unit) as advance:
        for name in names:
            rows[name] = row(name)
            advance(1)
    return rows


def _only_in_one(first: set[str], second: set[str]) -> dict[str, Any]:
    return {"only_in_first": sorted(first - second), "only_in_second": sorted(second - first)}


def _ratio(change: float, norm: float) -> float:
    if not change:
        return 0.0
    return change / norm if norm else float("inf")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
