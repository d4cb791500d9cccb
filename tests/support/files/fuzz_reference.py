"""The right result of a damaged file that was accepted: read by other libraries, and computed in another way.

Nothing of the package is used here but its results. If the damage changed a value (a weight, lora_alpha), the result
must be that of the new value. Everything else must be as in the undamaged files.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from support.models.networks import ZOO_LAYERS, bits

Tensors = Mapping[str, torch.Tensor]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Also beside a description.
BY_JSON = ("r", "rank_pattern", "lora_alpha", "use_rslora", "alpha_pattern", "lora_dropout")


def peft_name(name: str) -> str:
    """PEFT's name of one of Zoo's tensors."""
    layer, _, leaf = name.rpartition(".")
    if layer not in ZOO_LAYERS:
        return PREFIX + name
    if not leaf.startswith("lora_"):
        return f"{PREFIX}{layer}.base_layer.{leaf}"
    return f"{PREFIX}{layer}." + (f"lora_embedding_{leaf[-1]}" if layer == "embed" else f"{leaf}.weight")


class Source:
    """An adapter for Zoo on disk, as its files describe it.

    Attributes:
        tensors: by state dict name. A tensor that is stored under a damaged name, and was accepted, is the undamaged
            one.
        options: those of PEFT's adapter_config.json, or the words of our description. Options that PEFT reads in
            adapter_config.json come from there.
        scalings: of a checkpoint's layers.
    """

    def __init__(self, path: Path, undamaged: Tensors) -> None:
        self.scalings: dict[str, float] = {}
        if path.is_dir():
            with safe_open(path / TENSORS, "pt") as file:
                found, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            named = {name: found[peft_name(name)] for name in undamaged if peft_name(name) in found}
            described = header.get("lightning_lora")
            self.options = json.loads((path / CONFIG).read_text())
            if described is not None:
                edited = {name: self.options.get(name) for name in BY_JSON}
                self.options = json.loads(described)["config"] | edited
        else:
            content = checkpoint_in(path)
            named, self.options = content["state_dict"], content["lora"]["config"]
            self.scalings = {name: scaling for _, scaling, names in content["lora"]["layers"] for name in names}
        left_out = {name for name in undamaged if "lora_" not in name} - named.keys()  # has the base's value
        self.tensors = {name: named.get(name, undamaged[name]) for name in undamaged if name not in left_out}

    def scaling(self, layer: str) -> float:
        """The scaling, computed as PEFT does. null is PEFT's default."""
        if self.scalings:
            return float(self.scalings[layer])
        rank, alpha = self.option("r", "rank_pattern", layer), self.option("lora_alpha", "alpha_pattern", layer)
        return alpha / (math.sqrt(rank) if self.options.get("use_rslora") else rank)

    def option(self, name: str, pattern: str, layer: str) -> float:
        """The value of the first pattern that fits a dotted suffix of the layer's name, or else that for all layers."""
        for key, value in (self.options.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return float(value)
        return 8.0 if self.options.get(name) is None else float(self.options[name])

    def delta(self, layer: str, size: bool = False) -> torch.Tensor:
        """s * B @ A in the shape of the weight, in float64, or the same with the absolute values of the factors."""
        a, b = (self.tensors[f"{layer}.{factor}"].double() for factor in ("lora_A", "lora_B"))
        a, b = (a.abs(), b.abs()) if size else (a, b)
        product: torch.Tensor = self.scaling(layer) * b.flatten(1) @ a.flatten(1)
        if layer == "embed":
            return product.T
        return product.view(len(b), *a.shape[1:]) if a.dim() > 2 else product


def assert_loaded(net: nn.Module, base: Tensors, source: Source) -> None:
    """Check a model onto which an adapter was loaded: every tensor bit for bit, every scaling, every dropout."""
    state, expected = net.state_dict(), {**base, **source.tensors}
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert bits(tensor) == bits(expected[name].to(tensor.dtype)), name
    layers = {name: module for name, module in net.named_modules() if "lora_A" in module._parameters}
    assert set(layers) == set(ZOO_LAYERS)
    for name, layer in layers.items():
        assert math.isclose(layer.lora.spec.scaling, source.scaling(name)), name
        assert layer.lora.spec.dropout == (source.options.get("lora_dropout") or 0.0), name


def checkpoint_in(path: Path) -> dict[str, Any]:
    """Read a checkpoint with mmap, as its records say: without mmap torch may take a record for a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        content = torch.load(path, weights_only=True, mmap=True)
    result: dict[str, Any] = copied(content)
    return result


def copied(value: Any) -> Any:
    """Copy tensors out of memory that is mapped from a file: the file is about to change."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """A model's tensors, from a folder with safetensors or a checkpoint."""
    if path.is_dir():
        return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    content = checkpoint_in(path)
    return dict(content.get("state_dict", content))


def assert_merged(before: Tensors, source: Source, after: Tensors) -> None:
    """Check merged weights: W + s * B @ A within rounding, tensors trained whole, and the rest of the base."""
    assert before.keys() == after.keys()
    for name, old in before.items():
        new, (layer, _, leaf) = after[name], name.rpartition(".")
        assert (new.dtype, new.shape) == (old.dtype, source.tensors.get(name, old).shape), name
        if leaf != "weight" or layer not in ZOO_LAYERS:
            assert bits(new) == bits(source.tensors.get(name, old).to(old.dtype)), name
            continue
        exact, size = old.double() + source.delta(layer), old.double().abs() + source.delta(layer, size=True)
        info = torch.finfo(new.dtype)
        close = (new.double() - exact).abs() <= size * (info.eps + 1e-6) + info.tiny
        assert (close | (new.double() == exact) | (new.isnan() & exact.isnan())).all(), name


def assert_others_kept(base: Path, out: Path) -> None:
    """Check that all but the weights is kept: other files byte for byte, or other entries of a checkpoint."""
    files: list[dict[str, Any]]
    if base.is_dir():
        files = [
            {p.name: p.suffix != ".safetensors" and p.read_bytes() for p in path.iterdir()} for path in (base, out)
        ]
    else:
        contents = (checkpoint_in(path) for path in (base, out))
        files = [{repr(key): repr(c[key]) for key in c if "state_dict" in c and key != "state_dict"} for c in contents]
    assert files[0] == files[1]


def assert_changes(found: Mapping[str, Any], first: Source, second: Source) -> None:
    """Check the result of diff for two adapters, layer by layer and tensor by tensor."""
    changes = found["changes"]
    whole = {name for name in first.tensors.keys() & second.tensors.keys() if "lora_" not in name}
    lost = {*found["only_in_first"], *found["only_in_second"]}
    assert changes.keys() | lost >= {*ZOO_LAYERS, *whole}
    for name in changes.keys() & {*ZOO_LAYERS, *whole}:
        values = [s.delta(name) if name in ZOO_LAYERS else s.tensors[name].double() for s in (first, second)]
        if values[0].shape != values[1].shape:
            assert "problem" in changes[name], name
            continue
        change, size = float((values[1] - values[0]).norm()), float(values[0].norm() + values[1].norm())
        close = math.isclose(changes[name]["change"], change, rel_tol=1e-9, abs_tol=1e-9 * size)
        assert close or not math.isfinite(change), name
