"""Activation checkpointing, reentrant and not, with frozen inputs; and gradients of gradients."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import (
    ViTConfig,
    ViTForImageClassification,
)

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, load_adapter, merge, unload
from lightning_lora.nn.gradient_checkpointing import enable_input_require_grads
from support.models.networks import Zoo, randomise_, trace, zoo_config
from support.runs.training import Net, assert_same_tensors, fit_model

pytestmark = pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT")  # torch 2.6
REENTRANT, NOT_REENTRANT = CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT
NOTICE = "None of the inputs have requires_grad"
FUNCTION = "_gradient_checkpointing_func"  # of transformers


class Activated(nn.Linear):
    """Has a forward of its own."""

    def forward(self, x):
        return super().forward(x).tanh()


class Segmented(nn.Module):
    """A segment that is checkpointed as `how` says, and a head."""

    def __init__(self, how: bool | None = None) -> None:
        super().__init__()
        self.how = how
        attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.segment = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Activated(8, 8), attention)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.segment(x) if self.how is None else checkpoint(self.segment, x, use_reentrant=self.how)
        return self.head(hidden)


SEGMENT = LoRAConfig(r=2, lora_dropout=0.5, target_modules=["0", "2", "self_attn", "linear1", "head"])


def segmented(how: bool | None = None, wrap: CheckpointImpl | None = None) -> Segmented:
    torch.manual_seed(0)
    model = Segmented(how).double()
    if wrap is not None:
        model.segment = checkpoint_wrapper(model.segment, checkpoint_impl=wrap)
    return model


def gradients(model: nn.Module, *args, **kwargs) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(3)  # for dropout
    output = model(*args, **kwargs)
    getattr(output, "logits", output).square().sum().backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def source(requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4)).double().requires_grad_(requires_grad)


def expected_gradients(args, model: nn.Module, config: LoRAConfig) -> dict[str, torch.Tensor | None]:
    inject(model, config)
    randomise_(model, 0.5)
    return gradients(model, *args) if isinstance(args, list) else gradients(model, **args)


def close(found, expected) -> None:
    """Only nearly, because a reentrant segment runs forward without gradients, where torch takes other kernels."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("how", "wrap", "needs_grad"),
    [
        (False, None, False),
        (True, None, True),
        (None, NOT_REENTRANT, False),
        (None, REENTRANT, False),
        (None, REENTRANT, True),
    ],
)
def test_gradients_with_checkpointing_equal_those_without(how, wrap, needs_grad):
    expected = expected_gradients([source()], segmented(), SEGMENT)
    found = expected_gradients([source(needs_grad)], segmented(how, wrap), SEGMENT)
    assert found.keys() == expected.keys()
    close(found, expected)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.filterwarnings(f"ignore:{NOTICE}")
@pytest.mark.parametrize(
    ("options", "how", "named"),
    [
        (
            {"target_modules": ["0", "2", "head"]},
            True,
            r"2 of 3 layers: 'segment\.0', 'segment\.2'\. .*use_reentrant=False",
        ),
        (
            {"target_modules": ["head"], "target_parameters": ["segment.0.weight"]},
            True,
            r"'segment\.0\.weight'\. They ran",
        ),
        ({"target_modules": ["0", "head", "unused"]}, True, "'segment.0' ran in .* As to 'unused': either nothing has"),
        ({"target_modules": ["0", "head"]}, None, r"'segment\.0'\. Either nothing has used these layers yet"),
    ],
    ids=["layers", "parameter", "and one that nothing uses", "a pass without gradients"],
)
def test_adapters_without_gradients_are_named_with_the_remedy_of_a_reentrant_segment(options, how, named):
    model = segmented(how)
    model.unused = nn.Linear(8, 8).double()
    inject(model, LoRAConfig(r=2, **options))
    with torch.set_grad_enabled(how is not None):
        output = model(source())
    if how:
        output.square().sum().backward()
    nn.init.ones_(model.head.lora_B)
    with pytest.warns(UserWarning, match=named):
        merge(model)


@pytest.mark.filterwarnings(f"ignore:{NOTICE}")  # of the inner segment, in the outer's first pass
@pytest.mark.parametrize("wrap", [None, REENTRANT])
def test_a_reentrant_segment_that_gives_gradients_is_not_warned_of(wrap):
    model = segmented(wrap=REENTRANT)
    if wrap is not None:
        model.segment._checkpoint_wrapped_module[2] = checkpoint_wrapper(model.segment[2], checkpoint_impl=wrap)
    found = expected_gradients([source()], model, SEGMENT)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    merge(model)


@pytest.mark.filterwarnings(f"ignore:{NOTICE}")  # torch gives it in evaluation too
def test_names_in_adapters_are_free_of_the_checkpoint_wrapper():
    wrap = REENTRANT
    plain, wrapped, late = segmented(), segmented(wrap=wrap), segmented()
    names = inject(plain, SEGMENT)
    assert inject(wrapped, SEGMENT) == inject(late, SEGMENT) == names
    late.segment = checkpoint_wrapper(late.segment, checkpoint_impl=wrap)
    assert inject(late, SEGMENT) == names
    randomise_(plain)
    for target, origin in ((wrapped, plain), (late, wrapped), (plain, late)):
        load_adapter(target, dict(adapter_state_dict(origin)))
        assert list(adapter_state_dict(target)) == list(adapter_state_dict(plain))
        with torch.no_grad():
            close(target.eval()(source()), plain.eval()(source()))
        for state in (origin.state_dict(), Segmented().state_dict(), dict(adapter_state_dict(origin))):
            target.load_state_dict(state, strict=any("lora_" not in name for name in state))
        target.load_state_dict(plain.state_dict())


def test_model_wrapped_at_its_root_loads_state_dicts_of_either_kind():
    model, other = (checkpoint_wrapper(Zoo(), checkpoint_impl=NOT_REENTRANT) for _ in range(2))
    inject(model, zoo_config())
    inject(other, zoo_config())
    randomise_(model)
    for state in (model.state_dict(), dict(adapter_state_dict(model)), Zoo().state_dict()):
        other.load_state_dict(state, strict=any(name.endswith("conv.weight") for name in state))
        assert state.keys() <= other.state_dict().keys()
        assert_same_tensors({name: other.state_dict()[name] for name in state}, dict(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: tensor for name, tensor in Zoo().state_dict().items() if name != "conv.weight"})


def test_unload_removes_what_reentrant_checkpointing_needed():
    for model in (segmented(wrap=REENTRANT), reentrant(vit())):
        before = trace(model)
        inject(model, LoRAConfig(r=2))
        assert trace(model) != before
        unload(model)
        assert trace(model) == before


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    ).train()


def reentrant(model: nn.Module) -> nn.Module:
    """With nothing but transformers' checkpointing itself: some versions look after frozen inputs, others do not."""
    function = "activation_checkpointing_enable"
    if hasattr(model, function):
        getattr(model, function)({"use_reentrant": True})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    for module in model.modules():
        module._forward_hooks.clear()
    return model


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))}


@pytest.mark.parametrize("when", ["enabled twice", "in a copy"])
def test_transformers_gradient_checkpointing_gives_the_same_gradients(when):
    config = LoRAConfig(r=2, lora_dropout=0.5)
    expected = expected_gradients(pixels(), vit(), config)
    inject(model := reentrant(vit()), config)
    enable_input_require_grads(list(model.modules()))  # as each fit does
    model = reentrant(model) if when == "enabled twice" else pickle.loads(pickle.dumps(copy.deepcopy(model)))
    randomise_(model, 0.5)
    found = gradients(model, **pixels())
    assert_same_tensors(found, expected)
    assert len(found) > 8
    unload(model)
    plain_again = {type(function) for m in model.modules() if (function := vars(m).get(FUNCTION))}
    assert plain_again == {functools.partial}
    assert not any("_set_gradient_checkpointing" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings(f"ignore:{NOTICE}")
def test_a_frozen_transformers_model_beside_the_adapted_one_records_no_gradients():
    pair = nn.ModuleDict({"student": vit(), "teacher": vit()})
    for model in pair.values():
        reentrant(model)
    inject(pair, LoRAConfig(r=2, target_modules=["student.classifier"]))
    assert not pair["teacher"](**pixels()).logits.requires_grad
    assert pair["student"](**pixels()).logits.requires_grad


class Images(Net):
    """A transformers model that is checkpointed only after injection, in configure_optimizers."""

    checkpointed = False

    def prepare(self):
        self.body = vit()

    def forward(self, x):
        return self.body(x[:, :3, None, None].expand(-1, -1, 8, 8)).logits

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        if self.checkpointed:
            reentrant(self.body)
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_that_is_checkpointed_late_equals_the_plain_fit(tmp_path):
    results = []
    for checkpointed in (False, True):
        model = Images()
        model.checkpointed = checkpointed
        torch.manual_seed(0)
        fit_model(tmp_path, model, LoRACallback(r=2, lora_dropout=0.5), max_epochs=2, limit_val_batches=0)
        results.append(dict(adapter_state_dict(model)))
    assert_same_tensors(results[1], results[0])


# --- gradients of gradients ---


def by_hand(plain: nn.Module, factors: dict[str, torch.Tensor], s: float) -> dict[str, torch.Tensor]:
    """W + s * B @ A of linear layers."""
    paths = {name.rpartition(".")[0] for name in factors}
    return {
        f"{path}.weight": plain.get_parameter(f"{path}.weight")
        + s * factors[f"{path}.lora_B"] @ factors[f"{path}.lora_A"]
        for path in paths
    }


def second(loss: torch.Tensor, wanted: list[torch.Tensor], through: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The gradient of the squared norm of a gradient."""
    first = torch.autograd.grad(loss, through, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted)


@pytest.mark.parametrize("layer", [nn.Linear, Activated], ids=["factored", "own_forward"])
def test_penalty_on_the_input_gradient_agrees_with_plain_torch(layer):
    model = nn.Sequential(layer(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    plain = copy.deepcopy(model)
    inject(model, LoRAConfig(r=2, lora_alpha=3))
    randomise_(model, 0.5)
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p.detach().clone().requires_grad_() for name, p in live.items()}
    x = source(True)
    found = second(model(x).sum(), list(live.values()), [x])
    expected = second(functional_call(plain, by_hand(plain, own, 1.5), x).sum(), list(own.values()), [x])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert other.abs().max() > 1e-3
