"""LoHa (arXiv:2108.06098): PEFT's numbers and folders, W' and every bit back, and what is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from support.models.methods import (
    LOHA,
    SAME,
    TOKENS,
    base,
    copy_to_peft,
    moved,
    ours,
    pairs,
    steps,
    tensors_of,
    theirs,
    trained_names,
)
from support.models.quantized import quantize_, values_of
from support.runs.notices import quiet_peers

pytestmark = quiet_peers

# --- PEFT's numbers ---


def test_the_start_has_pefts_shapes_and_adds_nothing():
    stream = torch.get_rng_state()
    model = ours(LOHA)
    assert torch.equal(torch.get_rng_state(), stream)
    for name, parameter, expected in pairs(LOHA, model, theirs(LOHA)):
        assert parameter.shape == expected.shape, name
        assert bool(parameter.any()) == bool(expected.any()), name
        bound = parameter.shape[1] ** -0.5  # Kaiming's uniform with a = sqrt(5)
        assert parameter.abs().max() <= bound
    torch.testing.assert_close(model(TOKENS), base()(TOKENS), rtol=0, atol=1e-7)
    assert trained_names(model) == [f"{name}.{leaf}" for name in LOHA.layers for leaf in LOHA.leaves.values()]
    assert torch.equal(ours(LOHA).one.lora_hada_w1_a, ours(LOHA).one.lora_hada_w1_a)  # by the random stream's state
    assert not torch.equal(model.one.lora_hada_w1_a, model.one.lora_hada_w2_a)
    random = ours(LOHA, init_lora_weights=False)
    assert all(parameter.any() for _, parameter, _ in pairs(LOHA, random, theirs(LOHA)))
    assert (random(TOKENS) - base()(TOKENS)).abs().max() > 1e-4


@pytest.mark.parametrize("patterns", [False, True])
def test_outputs_gradients_and_steps_are_pefts(patterns):
    options: dict[str, Any] = {"rank_pattern": {"two": 3}, "alpha_pattern": {"conv": 5}} if patterns else {}
    model, other = moved(ours(LOHA, **options)), theirs(LOHA, **options)
    copy_to_peft(LOHA, model, other)
    torch.testing.assert_close(model(TOKENS), other(TOKENS), **SAME)
    model(TOKENS).square().sum().backward()
    other(TOKENS).square().sum().backward()
    for name, parameter, theirs_ in pairs(LOHA, model, other):
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, theirs_.grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    other.zero_grad()
    assert steps(model, 6) == pytest.approx(steps(other, 6), rel=1e-4)
    torch.testing.assert_close(model(TOKENS), other(TOKENS), rtol=1e-4, atol=1e-4)


# --- PEFT's folders ---


@pytest.mark.parametrize(
    ("option", "value"), [("rank_dropout", 0.1), ("module_dropout", 0.1), ("use_effective_conv2d", True)]
)
def test_pefts_options_without_a_place_are_refused_by_name(tmp_path, option, value):
    moved(theirs(LOHA, **{option: value})).save_pretrained(tmp_path)
    with pytest.raises(LoRAError, match=option):
        load_adapter(base(), tmp_path)
    with pytest.raises(LoRAError, match=option):
        LoRAConfig.from_peft(peft.LoHaConfig(**LOHA.theirs, **{option: value}))


def test_a_folder_that_was_cut_is_refused_by_name(tmp_path):
    lost = f"conv.{[*LOHA.leaves][-1]}"
    moved(theirs(LOHA)).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    save_file({n: t for n, t in tensors.items() if not n.endswith(lost)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match=f"{lost.rpartition('.')[2]}.*missing"):
        load_adapter(base(), tmp_path)


# --- bases, swaps, several adapters ---


def test_a_quantized_base_trains_and_stays_factored():
    pytest.importorskip("bitsandbytes")
    model = quantize_(nn.Sequential(nn.Linear(64, 64)), "nf4")
    weight, x = values_of(model[0]), torch.randn(3, 64)
    inject(model, LoRAConfig(variant="loha", r=2, lora_alpha=3))
    moved(model)
    w1a, w1b, w2a, w2b = (getattr(model[0], leaf) for leaf in LOHA.leaves.values())
    expected = x @ (weight.float() + 1.5 * (w1a @ w1b) * (w2a @ w2b)).T + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
    model(x).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained_names(model))
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)


def test_combining_adds_what_the_adapters_add(tmp_path):
    """Into a plain LoRA adapter: sums of such products are no LoHa."""
    options = {"target_modules": ["one", "two"]}
    sources = [moved(ours(LOHA, **options)), moved(ours(LOHA, init_lora_weights=False, **options))]
    for i, model in enumerate(sources):
        save_adapter(model, tmp_path / str(i))
    both = combine([tmp_path / "0", tmp_path / "1"], [0.5, -2.0], method="cat")
    again = base()
    load_adapter(again, both)
    merge(again)
    for name in ("one", "two"):
        plain = base().get_submodule(name).weight.double()
        wanted = plain + sum(w * (LOHA.reference(m, name) - plain) for w, m in zip((0.5, -2.0), sources, strict=True))
        torch.testing.assert_close(again.get_submodule(name).weight.double(), wanted, **SAME)


# --- what is refused ---


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("lora_dropout", 0.1),
        ("bias", "all"),
        ("enable_lora", {"one": [True, False, True]}),
        ("target_parameters", ["one.weight"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "lora_ga"),
        ("variant_options", {"d_initial": 0.1}),
    ],
)
def test_an_option_that_has_no_place_is_refused_by_name(option, value):
    with pytest.raises(LoRAError, match="d_initial" if option == "variant_options" else option):
        LoRAConfig(**{**LOHA.ours, option: value})


@pytest.mark.parametrize("name", ["emb", "third", "volume"])
def test_a_layer_that_peft_does_not_adapt_so_is_refused_by_name(name):
    with pytest.raises(LoRAError, match=f"{name!r}.*loha"):
        ours(LOHA, target_modules=[name])
