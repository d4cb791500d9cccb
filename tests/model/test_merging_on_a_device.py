"""merge and unmerge on a device that is not the CPU: the nearest values, and all layers or none."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, merge, unmerge
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.exact_merge import Buffers, merge_weight_, merged_weight, restored_weight, unmerge_weight_
from support.covering import covering
from support.devices.pretend_device import CAN_PRETEND, DEVICE, pretend_device
from support.models.layers import exact_delta, make_pieces, make_weight, nearest, same_bits, scaling_for

pytestmark = [
    pytest.mark.skipif(not CAN_PRETEND, reason="this torch takes no device in Python"),
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights"),
]
MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with pretend_device():
        yield


WAYS = [True, False]


@pytest.fixture(params=WAYS, ids=["copies", "values"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)
    return bool(request.param)


def adapted(count: int, dtype: torch.dtype = torch.bfloat16, width: int = 16, **options: Any) -> nn.Sequential:
    """Layers of two shapes on the device, away from their start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width + width * (i % 3 == 2)) for i in range(count))).to(dtype)
    inject(model, LoRAConfig(r=2, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(DEVICE)


def values(model: nn.Module) -> dict[str, Any]:
    """All that merging changes, and nothing that it leaves."""
    layers = {name: (each.lora_active, each.lora.merged) for name, each in adapted_layers(model).items()}
    return {name: p.detach().cpu().view(torch.uint8).tolist() for name, p in model.named_parameters()} | layers


# --- values ---


@pytest.mark.parametrize(
    ("share", "dtype", "r", "copied"), covering([0.001, 0.01, 1.0, 30.0], HALF, [4, 64], [False, True], meet=1)
)
def test_merged_weights_are_the_nearest_values(dtype: torch.dtype, share: float, r: int, copied: bool) -> None:
    before = make_weight((300, 400), dtype)
    pieces = make_pieces(before, r)
    scaling = scaling_for(before, pieces, share)
    wanted = before.double() + exact_delta(pieces, scaling, before.shape)
    there = [piece._replace(left=piece.left.to(DEVICE), right=piece.right.to(DEVICE)) for piece in pieces]
    weight = before.to(DEVICE)
    record = merge_weight_(weight, there, scaling, copies=Buffers() if copied else None)
    assert nearest(weight.cpu(), wanted).double().mean() >= 0.9999
    assert same_bits(merged_weight(before.to(DEVICE), there, scaling).cpu(), weight.cpu())
    assert same_bits(restored_weight(weight, record).cpu(), before)
    unmerge_weight_(weight, record)
    assert same_bits(weight.cpu(), before)


# --- all or nothing ---


BAD = {torch.bfloat16: math.nan, torch.float32: math.inf, torch.float16: 1e4, torch.float64: math.nan}


@pytest.mark.parametrize(("dtype", "place", "copies"), covering([*BAD], [0, 3, 6], WAYS, meet=1), indirect=["copies"])
def test_one_bad_adapter_of_seven_leaves_every_layer_unmerged(dtype: torch.dtype, place: int, copies: bool) -> None:
    value = BAD[dtype]
    model = adapted(7, dtype)
    with torch.no_grad():
        model[place].lora_B[-1].fill_(value)
        model[place].lora_A[:, -1].fill_(value)
    before = values(model)
    for _ in range(2):
        with pytest.raises(LoRAError, match=rf"^merge: layer '{place}': .*not finite.*Every layer is unmerged"):
            merge(model)
        assert values(model) == before
        assert not any(each.lora.undo or each.lora.unfinished for each in adapted_layers(model).values())


def test_a_bad_weight_beside_the_adapted_rows_is_left_alone(copies: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 48))
    inject(model, LoRAConfig(r=2, target_modules=["0"], enable_lora={"0": [True, False, True]}))
    with torch.no_grad():
        model[0].weight[20] = math.inf
        model[0].lora_B.normal_()
    before = values(model.to(DEVICE))
    merge(model)
    unmerge(model)
    assert values(model) == before
