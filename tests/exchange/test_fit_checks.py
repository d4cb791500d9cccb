"""An adapter that does not fit is refused by name, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAError, inject, load_adapter, merge
from support.covering import covering
from support.models.networks import base_zoo, checkpoint, randomise_, trace, trained_zoo, zoo_config


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


def _with(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value})


def _filled(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: state[name].clone().index_fill(0, torch.tensor([1]), value)})


MISFITS = {
    "missing B": (_without("conv.lora_B"), "conv.lora_B' is missing"),
    "missing A": (_without("embed.lora_A"), "embed(.lora_A)?' is missing|embed.lora_B' has no place"),
    "missing statistics": (_without("body.1.running_var"), "body.1.running_var' is missing"),
    "unexpected tensor": (_with("conv.extra", torch.zeros(3)), "conv.extra' has no place"),
    "unexpected layer": (_with("other.lora_A", torch.zeros(2, 3)), "other"),
    "another rank": (
        _with("conv.lora_A", torch.zeros(3, 8, 3)),
        r"'conv': A \(3, 8, 3\) and B \(8, 2, 1\) do not share a rank",
    ),
    "transposed": (
        _with("body.0.lora_B", torch.zeros(2, 8)),
        r"'body.0': A \(2, 8\) and B \(2, 8\) do not share a rank",
    ),
    "a scalar": (_with("body.0.lora_B", torch.tensor(1.0)), r"'body.0': A .* and B \(\) are no pair"),
    "no tensor": (_with("body.3.lora_A", "text"), r"body.3.lora_A'"),  # type: ignore[arg-type]
    "head of another shape": (_with("head.weight", torch.zeros(4, 8)), "head.weight' must have shape"),
    "nan": (_filled("body.0.lora_B", float("nan")), "body.0.lora_B' holds NaN or Inf"),
    "inf": (_filled("embed.lora_A", float("-inf")), "embed.lora_A' holds NaN or Inf"),
    "nan in a head": (_filled("head.weight", float("nan")), "head.weight' holds NaN or Inf"),
    "inf in a bias": (_filled("conv.bias", float("inf")), "conv.bias' holds NaN or Inf"),
    "a head of whole numbers": (
        _with("head.weight", torch.ones(3, 8, dtype=torch.int64)),
        r"head.weight' must be torch\.float32, but is torch\.int64",
    ),
}


def is_refused(case: str, target: str, kind: str) -> bool:
    """A state dict by hand may hold parameters only, and other things are not its adapter."""
    return kind != "state" or case not in ("missing statistics", "no tensor")


@pytest.mark.parametrize(
    ("case", "target", "kind"),
    covering(
        MISFITS, ["fresh", "injected", "merged", "around"], ["adapter", "merged", "state"], meet=1, fits=is_refused
    ),
)
def test_load_adapter_of_what_does_not_fit_leaves_the_model_as_it_was(case, target, kind):
    spoil, complaint = MISFITS[case]
    state = checkpoint(trained_zoo(), kind)
    spoil(state["lora"]["adapter"] if kind == "merged" else state["state_dict"])
    model = base_zoo()
    if target in ("injected", "merged") or kind == "state":
        inject(model, zoo_config())
        randomise_(model)
        merge(model) if target == "merged" else None
    if target == "around":
        model = nn.ModuleDict({"model": model})
    before = trace(model)
    with pytest.raises(LoRAError, match=complaint):
        load_adapter(model, state)
    assert trace(model) == before
