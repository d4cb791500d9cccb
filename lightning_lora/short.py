"""The short form in which files hold what grows with the number of layers, as plain types.

layers       [[kind or None, scaling, [names]], ...]
fingerprint  [[dtype, shape, leaf, [modules], values], ...], the bytes of all modules' values in base 85
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .kinds import KINDS
from .places import as_bytes
from .state import sample_places

BY_THEMSELVES = (torch.float16, torch.bfloat16, torch.float32)  # other dtypes' values go in as float64


def shorten_layers(scalings: Mapping[str, float], kinds: Mapping[str, str]) -> list[Any]:
    """Scalings and kinds of the layers that `scalings` names."""
    groups: dict[tuple[str | None, float], list[str]] = {}
    for name, scaling in scalings.items():
        groups.setdefault((kinds.get(name), scaling), []).append(name)
    return [[kind, scaling, names] for (kind, scaling), names in groups.items()]


def read_layers(groups: Any) -> tuple[dict[str, float], dict[str, str]]:
    """The inverse of shorten_layers.

    Raises:
        TypeError, ValueError: it is not of that form.
    """
    scalings, kinds = {}, {}
    for kind, scaling, names in items(groups):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind of layer {kind!r}")
        for name in items(names):
            scalings[text(name)] = float(scaling)
            if kind is not None:
                kinds[name] = kind
    return scalings, kinds


def shorten_prints(prints: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """A fingerprint."""
    groups: dict[tuple[str, tuple[int, ...], str], dict[str, list[float]]] = {}
    for name, entry in prints.items():
        module, _, leaf = name.rpartition(".")
        groups.setdefault((entry["dtype"], tuple(entry["shape"]), leaf), {})[module] = entry["values"]
    return [
        [dtype, list(shape), leaf, list(values), _written([*values.values()], _stored(getattr(torch, dtype)))]
        for (dtype, shape, leaf), values in groups.items()
    ]


def read_prints(groups: Any) -> dict[str, Any]:
    """The inverse of shorten_prints.

    Raises:
        TypeError, ValueError: it is not of that form.
    """
    prints = {}
    for dtype, shape, leaf, modules, written in items(groups):
        if not isinstance(getattr(torch, text(dtype), None), torch.dtype):
            raise ValueError(f"unknown dtype {dtype!r}")
        if not all(type(size) is int and size >= 0 for size in items(shape)):
            raise ValueError(f"no shape: {shape!r}")
        count = len(sample_places(math.prod(shape)))
        values = _read(text(written), _stored(getattr(torch, dtype)), count, len(items(modules)))
        for module, own in zip(modules, values, strict=True):
            name = f"{text(module)}.{text(leaf)}" if module else text(leaf)
            prints[name] = {"shape": list(shape), "dtype": dtype, "values": own}
    return prints


def _stored(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in BY_THEMSELVES else torch.float64


def _written(values: list[list[float]], dtype: torch.dtype) -> str:
    flat = torch.tensor(values, dtype=torch.float64).flatten().to(dtype)
    return base64.b85encode(as_bytes(flat)).decode()


def _read(written: str, dtype: torch.dtype, count: int, modules: int) -> list[list[float]]:
    content = base64.b85decode(written)
    if len(content) != count * modules * dtype.itemsize:
        raise ValueError(f"expected {modules} times {count} values, found {len(content)} bytes")
    if not content:
        return [[] for _ in range(modules)]
    values: list[list[float]] = torch.frombuffer(bytearray(content), dtype=dtype).double().view(modules, count).tolist()
    return values


def text(value: Any) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def items(value: Any) -> Sequence[Any]:
    """The value, if it is a list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {value!r}")
    return value
