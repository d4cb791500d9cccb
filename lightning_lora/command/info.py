"""`lightning-lora info` and `diff`: what a file or folder holds, and what differs between two, as plain types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter, delta_norm, difference_norm
from ..adapter.peft_folder import CONFIG_FILE
from ..adapter.save_load import read_adapter
from ..errors import LoRAError
from ..files.paths import PathLike
from ..files.safetensors import TensorLocation, read_rows
from ..files.torch_archive import read_torch_file
from ..files.weights import Weights, open_weights
from ..names import META, A, B


def info(path: PathLike) -> dict[str, Any]:
    """What a Lightning checkpoint, a PEFT folder, a safetensors file or a model folder holds.

    Raises:
        LoRAError: it is none of these, or damaged.
    """
    if holds_adapter(path):
        return {"path": str(path), "kind": _adapter_kind(Path(path)), **_adapter_info(read_adapter(path))}
    weights = open_weights(path)
    locations = weights.locations.values()
    return {
        "path": str(path),
        "kind": "weights",
        "form": weights.form,
        "files": len({location.file for location in locations}),
        "tensors": len(locations),
        "parameters": sum(location.numel for location in locations),
        "bytes": sum(location.nbytes for location in locations),
        "dtypes": dict(Counter(_short(location.dtype) for location in locations)),
    }


def holds_adapter(path: PathLike) -> bool:
    """Whether a path is an adapter, rather than weights by themselves."""
    path = Path(path)
    if (path / CONFIG_FILE).exists():
        return True
    if not path.is_dir() and path.suffix != ".safetensors" and META in read_torch_file(path, "meta"):
        return True
    return any(
        part in (A, B) or part.startswith("lora_") for n in open_weights(path).locations for part in n.split(".")
    )


def _adapter_kind(path: Path) -> str:
    if path.is_dir():
        return "PEFT folder"
    if path.suffix == ".safetensors":
        return "safetensors file with an adapter"
    meta = read_torch_file(path, "meta").get(META)
    if isinstance(meta, Mapping):
        return f"Lightning checkpoint of kind {meta.get('kind')!r}"
    return "state dict with an adapter and no options, as loralib writes it"


def _adapter_info(adapter: Adapter) -> dict[str, Any]:
    layers = adapter.layers()
    factors = {f"{name}.{leaf}" for name in layers for leaf in (A, B)}
    others = {n: t for n, t in adapter.tensors.items() if n not in factors and isinstance(t, torch.Tensor)}
    tensors = [adapter.tensors[name] for name in factors]
    prints = adapter.fingerprint.values()
    return {
        "config": adapter.config.to_dict() if adapter.config is not None else None,
        "layers": {name: _layer_info(adapter, name) for name in layers},
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "norm": sum(delta_norm(adapter, name) ** 2 for name in layers) ** 0.5,
        "also_trained": {name: list(tensor.shape) for name, tensor in others.items()},
        "base": {
            **adapter.origin,
            "frozen_tensors": len(adapter.fingerprint),
            "dtypes": dict(Counter(entry["dtype"] for entry in prints)),
        },
    }


def _layer_info(adapter: Adapter, name: str) -> dict[str, Any]:
    a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
    return {
        "kind": adapter.kinds.get(name),
        "rank": b.shape[1],
        "scaling": adapter.scalings.get(name),
        "shape_A": list(a.shape),
        "shape_B": list(b.shape),
        "dtype": _short(a.dtype),
        "norm_A": float(a.double().norm()),
        "norm_B": float(b.double().norm()),
        "norm_delta": delta_norm(adapter, name),
    }


def diff(one: PathLike, other: PathLike) -> dict[str, Any]:
    """What differs between two adapters, or between two models' weights, layer by layer or tensor by tensor.

    `change` is the Frobenius norm of the difference, `relative` that over the norm in the first.

    Raises:
        LoRAError: only one of the two is an adapter, or a file is damaged.
    """
    adapters = [holds_adapter(path) for path in (one, other)]
    if adapters[0] != adapters[1]:
        which, what = (one, other) if adapters[0] else (other, one)
        raise LoRAError(f"diff: {which} is an adapter and {what} is not; give two of a kind.")
    if not adapters[0]:
        return _diff_weights(open_weights(one), open_weights(other))
    first, second = read_adapter(one), read_adapter(other)
    first = first.renamed(first.network, "") if first.network else first
    second = second.renamed(second.network, "") if second.network else second
    theirs = set(second.layers())
    rows = {name: _adapter_row(first, second, name) for name in first.layers() if name in theirs}
    owned = [{n: t for n, t in x.tensors.items() if n.rpartition(".")[2] not in (A, B)} for x in (first, second)]
    for name in owned[0].keys() & owned[1].keys():
        rows[name] = _row(owned[0][name].double(), owned[1][name].double())
    differing = first.config.differing(second.config) if first.config and second.config else []
    names = [set(x.layers()) | set(own) for x, own in zip((first, second), owned, strict=True)]
    return {"kind": "adapters", "options": differing, **_only(*names), "changes": rows}


def _adapter_row(one: Adapter, other: Adapter, name: str) -> dict[str, Any]:
    try:
        change, norm = difference_norm(one, other, name), delta_norm(one, name)
    except ValueError as error:
        return {"problem": str(error)}
    return {"change": change, "relative": _ratio(change, norm)}


def _row(one: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    if one.shape != other.shape:
        return {"problem": f"shape {tuple(one.shape)} and {tuple(other.shape)}"}
    change = float((one - other).norm())
    return {"change": change, "relative": _ratio(change, float(one.norm()))}


def _diff_weights(one: Weights, other: Weights) -> dict[str, Any]:
    names = [name for name in one.locations if name in other.locations]
    rows = {name: _location_row(one.locations[name], other.locations[name]) for name in names}
    return {"kind": "weights", **_only(set(one.locations), set(other.locations)), "changes": rows}


def _location_row(one: TensorLocation, other: TensorLocation) -> dict[str, Any]:
    if one.shape != other.shape:
        return {"problem": f"shape {one.shape} and {other.shape}"}
    squares = [0.0, 0.0]
    largest = 0.0
    with open(one.file, "rb") as ours, open(other.file, "rb") as theirs:
        for first, count in one.chunks():
            old, new = (read_rows(f, p, first, count).double() for f, p in ((ours, one), (theirs, other)))
            squares = [squares[0] + float((new - old).square().sum()), squares[1] + float(old.square().sum())]
            largest = max(largest, float((new - old).abs().max())) if old.numel() else largest
    change = squares[0] ** 0.5
    dtypes = {} if one.dtype == other.dtype else {"dtypes": [_short(one.dtype), _short(other.dtype)]}
    return {"change": change, "relative": _ratio(change, squares[1] ** 0.5), "largest": largest, **dtypes}


def _only(one: set[str], other: set[str]) -> dict[str, Any]:
    return {"only_in_first": sorted(one - other), "only_in_second": sorted(other - one)}


def _ratio(change: float, norm: float) -> float:
    return change / norm if norm else (0.0 if not change else float("inf"))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
