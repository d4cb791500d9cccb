"""A segment that is computed again for its backward runs with the strengths of its forward, or an error says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, LoRAError, attach, disable_adapter, inject, scaled, take_adapter
from lightning_lora.nn.gradient_checkpointing import StrengthLog, in_first_pass

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of an inner segment
    # torch 2.6 closes an inner segment's generator late where an error ends the recomputation.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <generator object _checkpoint_without_reentrant"),
]

Block = Callable[[nn.Module], AbstractContextManager[Any]]
BLOCKS: dict[str, Block] = {
    "none": lambda model: nullcontext(),
    "half": lambda model: scaled(model, 0.5),
    "half again": lambda model: scaled(model, {"": 0.5}),
    "attached": lambda model: scaled(model, 0.0, "b"),
    "off": lambda model: scaled(model, 0.0),
    "disabled": disable_adapter,
    "as it is": lambda model: scaled(model, {"": 1.0, "b": 0.5}),
}
KINDS = {"layer": {"target_modules": ["0", "2"]}, "parameter": {"target_parameters": ["0.weight", "2.weight"]}}


def adapted(kind: str = "layer") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    options = {"target_modules": [], **KINDS[kind]}
    inject(model, LoRAConfig(r=2, init_lora_weights=False, **options), seed=1)
    attach(model, take_adapter(model), name="b", strength=0.5)
    return model


def source() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    found = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return found


def run(model: nn.Module, x: torch.Tensor, reentrant: bool | None) -> torch.Tensor:
    y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    return y.square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("then", BLOCKS)
@pytest.mark.parametrize("later", BLOCKS)
def test_a_backward_in_another_block_than_the_forward_is_refused(then: str, later: str, reentrant: bool, kind: str):
    model, groups = adapted(kind), [{"none", "as it is"}, {"half", "half again"}]
    with BLOCKS[then](model):
        loss = run(model, source(), reentrant)
    if then == later or any({then, later} <= group for group in groups):
        with BLOCKS[later](model):
            loss.backward()
        found = gradients(model)
        with BLOCKS[then](model):
            run(model, source(), None).backward()
        torch.testing.assert_close(found, gradients(model))
        return
    with BLOCKS[later](model), pytest.raises(LoRAError, match="computes the layer again"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_after_nested_blocks_goes_by_the_block_of_each_forward(reentrant: bool):
    model = adapted()
    with scaled(model, 0.5):
        with scaled(model, 0.25):
            inner = run(model, source(), reentrant)
        outer = run(model, source(), reentrant)
        outer.backward()
        with pytest.raises(LoRAError):
            inner.backward()
        with scaled(model, 0.25):
            inner = run(model, source(), reentrant)
            inner.backward()
    plain = run(model, source(), reentrant)
    plain.backward()


@pytest.mark.parametrize("outer", [None, "half"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_inside_of_a_segment_is_entered_again_and_never_refused(reentrant: bool, outer: str | None):
    model = adapted()

    def segment(x: torch.Tensor) -> torch.Tensor:
        with scaled(model, 0.25):
            y = model(x)
        with disable_adapter(model):
            z = model(y)
        return model(z)

    with BLOCKS[outer or "none"](model):
        checkpoint(segment, source(), use_reentrant=reentrant).sum().backward()
        found = gradients(model)
        segment(source()).sum().backward()
    torch.testing.assert_close(found, gradients(model))


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_segments_inside_of_segments_are_refused_after_the_block_and_right_inside_of_it(reentrant: bool, inner: bool):
    model = adapted()

    def segment(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model[2], checkpoint(model[:2], x, use_reentrant=inner), use_reentrant=inner)

    with scaled(model, 0.5):
        late = checkpoint(segment, source(), use_reentrant=reentrant).sum()
        checkpoint(segment, source(), use_reentrant=reentrant).sum().backward()
        found = gradients(model)
        model(source()).sum().backward()
        torch.testing.assert_close(found, gradients(model))
    checkpoint(segment, source(), use_reentrant=reentrant).sum().backward()
    with pytest.raises(LoRAError):
        late.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_without_a_graph_leave_nothing_behind(reentrant: bool):
    model = adapted()
    loss = run(model, source(), reentrant)
    for block in BLOCKS.values():
        with torch.no_grad(), block(model):
            model(source())
    assert not model.lora_injection.strength_log.since
    loss.backward()


def test_the_latest_changes_are_kept_and_no_more():
    log = StrengthLog()
    for _ in range(2 * StrengthLog.KEPT):
        torch.ones(1, requires_grad=True).exp()
        log.change({"": 0.5})
        torch.ones(1, requires_grad=True).exp()
        log.change({})
    assert len(log.since) == len(log.states) == StrengthLog.KEPT


PRIVATE = {
    "number": (torch._C._autograd, "_get_sequence_nr"),
    "task": (torch._C, "_current_graph_task_id"),
    "node": (torch._C, "_current_autograd_node"),
}


@pytest.mark.parametrize("lacking", PRIVATE)
def test_a_torch_without_a_private_function_runs_blocks_as_ever_and_warns(monkeypatch, lacking: str):
    def trained(model: nn.Module) -> list[torch.Tensor | None]:
        with scaled(model, 0.5):
            run(model, source(), None).backward()
        with disable_adapter(model):
            model(source())
        return gradients(model)

    expected = trained(adapted())
    monkeypatch.delattr(*PRIVATE[lacking])
    with pytest.warns(UserWarning, match="does not number autograd's nodes"):
        found = trained(adapted())
    for value, other in zip(found, expected, strict=True):
        assert (value is None and other is None) or torch.equal(value, other)  # type: ignore[arg-type]
    assert any(value is not None for value in found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_torch_without_forward_mode_tells_a_first_pass_by_its_frames(monkeypatch, reentrant: bool):
    seen: list[bool] = []

    def segment(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_first_pass())
        return x.sin()

    monkeypatch.delattr(torch._C, "_is_fwd_grad_enabled")
    checkpoint(segment, source(), use_reentrant=reentrant).sum().backward()
    with torch.no_grad():
        segment(source())
    assert seen == [reentrant, False, False]
