"""Verbs on a device that is not the CPU, beside the same on the CPU; and moves. Others are in the table of pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    adapter_state_dict,
    adapter_stats,
    combine,
    inject,
    is_merged,
    load_adapter,
    merge,
    save_adapter,
    take_adapter,
    unmerge,
)
from support.covering import covering
from support.models.networks import Zoo, state_bits, tokens, zoo_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["conv", "body.0", "body.3"]},
    "LoHa": {"variant": "loha", "bias": "none", "target_modules": ["conv", "body.0", "body.3"]},
    "rows": {"target_modules": ["body.0", "body.3"], "trainable_token_indices": {"embed": [1, 4]}},
}
Verb = Callable[[nn.Module, Path], Any]


def adapted(device: str, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A model that was moved first and injected then, with an adapter that is away from its start."""
    torch.manual_seed(1)
    model = Zoo().eval().to(device, dtype)
    inject(model, zoo_config(**options), seed=2)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream).to(parameter))
    return model


def on(model: nn.Module) -> torch.device:
    return model.get_parameter("norm.weight").device


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokens().to(on(model)))
    return result


def trained_step(model: nn.Module) -> None:
    """Give the factors gradients."""
    model(tokens().to(on(model))).square().sum().backward()


def combined(model: nn.Module, path: Path) -> Any:
    save_adapter(model, path / "one")
    save_adapter(adapted("cpu", seed=5), path / "other")
    sources: list[Any] = [path / "one", path / "other"]
    answers = []
    for method, density in (("linear", None), ("svd", None), ("ties", 0.5), ("dare_linear", 0.5)):
        load_adapter(model, combine(sources, [0.7, 0.3], method=method, density=density))
        answers.append(answer(model))
    return answers


def of_live_models(model: nn.Module, path: Path) -> Any:
    """Combined from tensors that are on the device still."""
    one = take_adapter(model)
    load_adapter(model, combine([one, one], [0.5, 0.25]))
    return answer(model)


def stats(model: nn.Module, path: Path) -> Any:
    first = adapter_stats(model)
    trained_step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    second = adapter_stats(model, first)
    return [{name: group.to_dict() for name, group in each.groups.items()} for each in (first, second)]


VERBS: dict[str, Verb] = {
    "adapter_stats": stats,
    "combine": combined,
    "combine, of live models": of_live_models,
}


def assert_alike(found: Any, expected: Any, place: str = "") -> None:
    """Compare nested results: numbers up to rounding, tensors without their device."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-5, msg=place)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_alike(found[key], value, f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True), place
    else:
        assert found == expected, place


@pytest.mark.parametrize(("verb", "variant"), [("adapter_stats", "DoRA"), *((verb, "LoRA") for verb in VERBS)])
def test_a_verb_does_on_a_device_what_it_does_on_the_cpu(verb: str, variant: str, tmp_path: Path, device: str):
    expected = VERBS[verb](adapted("cpu", **VARIANTS[variant]), tmp_path / "cpu")
    model = adapted(device, **VARIANTS[variant])
    assert {value.device.type for value in model.state_dict().values()} == {device}
    found = VERBS[verb](model, tmp_path / "device")
    assert {value.device.type for value in model.state_dict().values()} == {device}
    assert_alike(found, expected)


# --- moves ---


@pytest.mark.parametrize(("variant", "start"), covering([*VARIANTS], ["cpu", "device"], meet=1))
def test_a_merged_model_that_moves_is_merged_there_and_every_bit_comes_back(start: str, variant: str, device: str):
    start, end = ("cpu", device) if start == "cpu" else (device, "cpu")
    model = adapted(start, **VARIANTS[variant])
    before, expected = state_bits(model), answer(model).cpu()
    merge(model)
    model.to(end)
    assert is_merged(model)
    assert {value.device.type for value in model.parameters()} == {end}
    torch.testing.assert_close(answer(model).cpu(), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert state_bits(model) == before
    torch.testing.assert_close(answer(model).cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["LoRA", "DoRA", "rows"])
def test_a_model_trains_after_each_move_and_casts_on_a_device(variant: str, device: str):
    model = adapted("cpu", **VARIANTS[variant])
    for place, dtype in ((device, torch.float32), (device, torch.bfloat16), ("cpu", torch.bfloat16)):
        model.to(place, dtype)
        model.zero_grad()
        trained_step(model)
        grads = {p.grad.device.type for p in model.parameters() if p.grad is not None}
        assert grads == {place}
        merge(model)
        unmerge(model)


@pytest.mark.parametrize(("source", "target"), [("cpu", "device"), ("device", "cpu")])
def test_a_checkpoint_loads_from_any_device_onto_any_other(source: str, target: str, tmp_path: Path, device: str):
    source, target = (device if place == "device" else place for place in (source, target))
    one, other = adapted(source), adapted(target, seed=5)
    torch.save({"state_dict": adapter_state_dict(one)}, tmp_path / "adapter.pt")
    found = torch.load(tmp_path / "adapter.pt", weights_only=True)["state_dict"]
    load_adapter(other, found)
    assert {value.device.type for value in other.state_dict().values()} == {target}
    trained = {name: bits for name, bits in state_bits(other).items() if "lora_" in name}
    assert trained == {name: bits for name, bits in state_bits(one).items() if "lora_" in name}
