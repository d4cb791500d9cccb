"""The base's fingerprint: shape, dtype and a few values of each frozen parameter, which tell one base from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import samples
from ..errors import LoRAError
from ..files.safetensors import TensorLocation, _read
from ..model.injection import require_injection
from ..model.named_state import named_state
from ..model.state_dict import adapter_keys, original_value

SAMPLES = 8  # values of each frozen parameter that its fingerprint holds
EQUAL = 1e-5  # relative difference of a base that is the same
AVERAGED = 1e-2  # of the base that was trained on here: a moving average of a frozen weight drifts by its own rounding


def fingerprint_entry_at(place: TensorLocation) -> dict[str, Any]:
    """The tensor's entry in a fingerprint, from a few elements."""
    size = place.dtype.itemsize
    with open(place.file, "rb") as file:
        elements = [_read(file, place, index * size, size) for index in sample_positions(place.numel)]
    values = [float(element.double()) for element in elements]
    return {"shape": list(place.shape), "dtype": str(place.dtype).removeprefix("torch."), "values": values}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Shape, dtype and a few values of each frozen base parameter, as plain types.

    It tells one base from another; the same base in another dtype still fits.
    """
    trained = set(adapter_keys(model))
    prints = {}
    for name, tensor, module in named_state(model):
        if name not in trained and tensor is not None and tensor.device.type != "meta":
            prints[name] = fingerprint_entry(original_value(name, tensor, module))
    return prints


def fingerprint_entry(weight: torch.Tensor) -> dict[str, Any]:
    """One tensor's entry in a fingerprint."""
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "values": samples(weight, sample_positions(weight.numel())),
    }


def sample_positions(numel: int) -> list[int]:
    """Which elements of a tensor its fingerprint holds."""
    return sorted({(numel - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)}) if numel else []


def check_fingerprint(model: nn.Module, expected: Mapping[str, Any]) -> None:
    """Compare the model's frozen parameters with a fingerprint.

    Raises:
        LoRAError: names the first parameter that differs.
    """
    injected = require_injection(model, "check_fingerprint")
    record = injected.record
    unfrozen = {name: fingerprint_entry(record.initial[name]) for name in record.unfrozen}
    found = injected.seen(unfrozen) | fingerprint(model)
    trained_here = record.fingerprint == expected
    compare_fingerprints(found, expected, AVERAGED if trained_here else EQUAL)


def compare_fingerprints(found: Mapping[str, Any], expected: Mapping[str, Any], relative: float = EQUAL) -> None:
    """As check_fingerprint, between two fingerprints: in the order of the first; what only it has is not judged."""
    order = {name: place for place, name in enumerate(found)}
    for name in sorted(expected, key=lambda name: order.get(name, -1)):
        wanted, have = expected[name], found.get(name)
        advice = "Load the adapter on the base that it was trained on, or pass strict_base=False."
        if have is None:
            raise LoRAError(f"the adapter belongs to another base: its frozen parameter {name!r} is not here. {advice}")
        if list(have["shape"]) != list(wanted["shape"]):
            raise LoRAError(
                f"the adapter belongs to another base: {name!r} had shape {wanted['shape']}, here {have['shape']}. "
                + advice
            )
        if not entries_match(wanted, have, relative):
            raise LoRAError(
                f"the adapter belongs to another base: values of {name!r} were {_shown(wanted['values'])}, here "
                f"{_shown(have['values'])}. {advice}"
            )


def entries_match(wanted: Mapping[str, Any], have: Mapping[str, Any], relative: float) -> bool:
    """Whether two entries have one shape and equal values, up to rounding: between dtypes, of the coarser one."""
    if list(wanted["shape"]) != list(have["shape"]):
        return False
    dtypes = {getattr(torch, entry["dtype"]) for entry in (wanted, have)}
    if len(dtypes) > 1:
        relative = max([relative, *(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)])
    absolute = 1e-7 if len(dtypes) > 1 else 0.0  # subnormal numbers of float16
    pairs = list(zip(wanted["values"], have["values"], strict=False))
    return len(wanted["values"]) == len(have["values"]) and all(
        a == b or math.isclose(a, b, rel_tol=relative, abs_tol=absolute) or (math.isnan(a) and math.isnan(b))
        for a, b in pairs
    )


def _shown(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in list(values)[:4]) + ", ...]"
