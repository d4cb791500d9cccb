"""State dicts and the base's fingerprint: views for saving that touch no live weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .base import A, B, LoRALayer
from .errors import LoRAError
from .injection import base_parameters, is_factor, named_state, note_trainable, require_injection
from .sharding import Together, samples
from .targets import note_tied
from .wrappers import canonical

SAMPLES = 8  # values of each frozen parameter that its fingerprint holds
EQUAL = 1e-5  # relative difference of a base that is the same
AVERAGED = 1e-2  # of the base that was trained on here: a moving average of a frozen weight drifts by its own rounding


def adapter_keys(model: nn.Module) -> list[str]:
    """Names of all that training can change: factors, ever-trainable parameters, persistent buffers."""
    _, root, injection = require_injection(model, "adapter_state_dict")
    note_trainable(root)
    inside = base_parameters(root)
    trained = {id(inside[name]) for name in injection.trained if name in inside}
    inside_ids = {id(parameter) for parameter in inside.values()}
    return [
        name
        for name, tensor, module in named_state(model)
        if is_factor(name, module)
        or not isinstance(tensor, nn.Parameter)
        or id(tensor) in trained
        or (tensor.requires_grad and id(tensor) not in inside_ids)
    ]


def base_keys(model: nn.Module) -> list[str]:
    """Names of the plain model's state dict."""
    return [name for name, _, module in named_state(model) if not is_factor(name, module)]


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """All that training can change, by state dict name, detached and sharing memory with the model.

    Raises:
        LoRAError: the model was not injected.
    """
    keys = set(adapter_keys(model))
    state = {}
    for name, tensor, module in named_state(model):
        if name in keys and tensor is None:
            state[name] = module.get_extra_state()
        elif name in keys and tensor is not None:
            state[name] = _original(name, tensor, module)
    return state


def _original(name: str, tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    if isinstance(module, LoRALayer) and isinstance(tensor, nn.Parameter):
        return module.original(name.rpartition(".")[2])
    return tensor.detach()


def merged_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a plain model with merged weights, under the base's names, merged or not.

    Raises:
        LoRAError: the model was not injected, or a layer's merged weight cannot stand in for its adapter.
    """
    require_injection(model, "merged_state_dict")
    return fold(model, {canonical(name): value for name, value in model.state_dict().items()})


def fold(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A full state dict of the model with each adapter merged into its weight, as new tensors, and taken out.

    Args:
        model: says which names belong to adapted layers; its live values are not used.
        state: names of model.state_dict() without the segments of wrappers, perhaps with other values.
    """
    refuse_unmergeable(model)
    folded = {name: state[name] for name in base_keys(model)}
    together = Together(value for value in state.values() if isinstance(value, torch.Tensor))

    def fold_one(path: str, layer: LoRALayer) -> None:
        weights = {leaf: state[path + leaf] for leaf in layer.adapted_weights()}
        pieces = layer.local_pieces(weights, state[path + A], state[path + B])

        def merge_copies() -> None:
            folded.update({path + leaf: copy for leaf, copy in layer.merged_copies(weights, pieces).items()})

        together.attempt(f"merged weights of layer {path[:-1]!r}", merge_copies)

    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALayer):
            fold_one(f"{canonical(name)}." if name else "", module)
    together.settle()
    return folded


def refuse_unmergeable(model: nn.Module) -> None:
    """Raise where merged weights could not express an adapter.

    Raises:
        LoRAError: a layer's weight has another owner or renormalises itself.
    """
    note_tied(model)
    for name, layer in model.named_modules():
        reason = layer.stays_factored() if isinstance(layer, LoRALayer) else ""
        if reason:
            raise LoRAError(
                f"merged weights cannot express the adapter of {name!r}: {reason}. Leave the layer out "
                f"(exclude_modules=[{name!r}]), untie the weight, or save the adapter instead."
            )


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Shape, dtype and a few values of each frozen base parameter, as plain types.

    It tells one base from another; the same base in another dtype still fits.
    """
    trained = set(adapter_keys(model))
    prints = {}
    for name, tensor, module in named_state(model):
        if name not in trained and tensor is not None and tensor.device.type != "meta":
            prints[name] = print_of(_original(name, tensor, module))
    return prints


def print_of(weight: torch.Tensor) -> dict[str, Any]:
    """One tensor's entry in a fingerprint."""
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "values": samples(weight, sample_places(weight.numel())),
    }


def sample_places(numel: int) -> list[int]:
    """Which elements of a tensor its fingerprint holds."""
    return sorted({(numel - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)}) if numel else []


def check_fingerprint(model: nn.Module, expected: Mapping[str, Any]) -> None:
    """Compare the model's frozen parameters with a fingerprint.

    Raises:
        LoRAError: names the first parameter that differs.
    """
    prefix, _, injection = require_injection(model, "check_fingerprint")
    path = f"{prefix}." if prefix else ""
    found = {path + name: print_of(injection.initial[name]) for name in injection.unfrozen} | fingerprint(model)
    trained_here = injection.fingerprint == expected
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
        if not _close(wanted, have, relative):
            raise LoRAError(
                f"the adapter belongs to another base: values of {name!r} were {_shown(wanted['values'])}, here "
                f"{_shown(have['values'])}. {advice}"
            )


def _close(wanted: Mapping[str, Any], have: Mapping[str, Any], relative: float) -> bool:
    """Equal up to rounding; between dtypes, up to the rounding of the coarser one."""
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


def summary(model: nn.Module) -> str:
    """One line: adapted layers, trainable of total parameters, adapter size."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    size = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers)
    return (
        f"LoRA: {len(layers)} adapted layers, {trainable:,} of {total:,} parameters trainable "
        f"({trainable / max(total, 1):.2%}), adapter {size / 1e6:.3g} MB"
    )
