"""VeRA (arXiv:2310.11454): PEFT's numbers and folders, one pair of projections for all layers, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    combine,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_lora.command.main import main
from lightning_lora.exchange.save_load import read_adapter
from support.methods import (
    SAME,
    TOKENS,
    VERA,
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
from support.notices import quiet_peers
from support.quantised import quantise_, values_of

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Specified to not"),  # save the projections
]

# --- PEFT's numbers ---


@pytest.mark.parametrize("key", [0, 5])
def test_projections_are_pefts_of_the_same_key(key):
    model = ours(VERA, variant_options={"projection_prng_key": key})
    other = theirs(VERA, projection_prng_key=key)
    assert torch.equal(model.one.lora_vera_A, other.base_model.vera_A["default"])
    assert torch.equal(model.one.lora_vera_B, other.base_model.vera_B["default"])
    assert model.one.lora_vera_A.shape == (3, 9)
    assert model.one.lora_vera_B.shape == (9, 3)


@pytest.mark.parametrize("d_initial", [0.1, 0.5])
def test_the_start_is_pefts(d_initial):
    stream = torch.get_rng_state()
    model = ours(VERA, variant_options={"d_initial": d_initial})
    assert torch.equal(torch.get_rng_state(), stream)
    other = theirs(VERA, d_initial=d_initial)
    for name, parameter, expected in pairs(VERA, model, other):
        assert torch.equal(parameter, expected), name
    assert torch.equal(model(TOKENS), base()(TOKENS))
    assert {*trained_names(model)} == {f"{name}.{leaf}" for name in VERA.layers for leaf in VERA.leaves.values()}


def test_a_random_start_changes_the_output_as_in_peft():
    model = ours(VERA, init_lora_weights=False)
    for name, parameter, expected in pairs(VERA, model, theirs(VERA, init_weights=False)):
        assert torch.equal(parameter, expected) == name.endswith("_b"), name  # ones, and d of a normal distribution
    assert (model(TOKENS) - base()(TOKENS)).abs().max() > 1e-3


def test_outputs_gradients_and_steps_are_pefts():
    model, other = moved(ours(VERA)), theirs(VERA)
    copy_to_peft(VERA, model, other)
    torch.testing.assert_close(model(TOKENS), other(TOKENS), **SAME)
    model(TOKENS).square().sum().backward()
    other(TOKENS).square().sum().backward()
    for name, parameter, theirs_ in pairs(VERA, model, other):
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, theirs_.grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    other.zero_grad()
    assert steps(model, 6) == pytest.approx(steps(other, 6), rel=1e-4)
    torch.testing.assert_close(model(TOKENS), other(TOKENS), rtol=1e-4, atol=1e-4)


def test_gradients_pass_gradcheck():
    model = moved(ours(VERA, base().double()))
    parameters = [model.get_parameter(name) for name in trained_names(model)]

    def run(*values: torch.Tensor) -> torch.Tensor:
        held = dict(zip(trained_names(model), values, strict=True))
        return torch.func.functional_call(model, held, (TOKENS,))

    assert torch.autograd.gradcheck(run, tuple(p.detach().requires_grad_() for p in parameters))


# --- one pair of projections ---


def test_all_layers_hold_one_pair_of_projections():
    model = ours(VERA)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64)):
        for leaf in ("lora_vera_A", "lora_vera_B"):
            assert len({id(getattr(other.get_submodule(name), leaf)) for name in VERA.layers}) == 1
            assert not getattr(other.one, leaf).requires_grad


def test_a_file_holds_the_projections_once(tmp_path):
    model = moved(ours(VERA))
    state = adapter_state_dict(model)
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    assert sum(sizes) == sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    assert len([name for name in state if name.endswith(("lora_vera_A", "lora_vera_B"))]) == 2 * len(VERA.layers)
    save_adapter(model, tmp_path)
    held = [name for name in tensors_of(tmp_path) if "vera_A" in name or "vera_B" in name]
    assert sorted(held) == ["base_model.vera_A", "base_model.vera_B"]


def test_projections_count_once_whoever_counts(tmp_path, capsys):
    model = ours(VERA)
    values = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    save_adapter(model, tmp_path)
    assert f"| values in their factors | {values:,} |" in (tmp_path / "README.md").read_text()
    assert f"layers, {values:,} values)" in repr(read_adapter(tmp_path))
    assert main(["info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["bytes"]) == (values, 4 * values)


def test_projections_come_from_the_file_and_not_from_the_key(tmp_path):
    """Random streams differ between versions of torch."""
    model = moved(ours(VERA))
    with torch.no_grad():
        model.one.lora_vera_A.mul_(-1.5)
    save_adapter(model, tmp_path)
    for again in (base(), ours(VERA, r=3), ours(VERA, variant_options={"projection_prng_key": 4})):
        load_adapter(again, tmp_path)
        assert torch.equal(again.two.lora_vera_A, model.one.lora_vera_A)
        assert torch.equal(again(TOKENS), model(TOKENS))


def test_layers_that_come_later_and_are_larger_fit(tmp_path):
    """As a Trainer's configure_model builds them after the others were adapted."""
    from lightning_lora.model.adapted_model import Listing, open_model
    from lightning_lora.model.inject import adapt_new_layers, begin_injection, finish_injection
    from lightning_lora.model.injection import Injection

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    begin_injection(Listing(model), Injection(LoRAConfig(variant="vera", r=2, target_modules=["0", "2"])))
    model.append(nn.Linear(3, 20))
    handle = open_model(model, "test")
    adapt_new_layers(handle)
    finish_injection(handle)
    whole = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 20))
    inject(whole, LoRAConfig(variant="vera", r=2, target_modules=["0", "2"]))
    for name, value in adapter_state_dict(whole).items():
        assert torch.equal(adapter_state_dict(model)[name], value), name
    assert model[0].lora_vera_B is model[2].lora_vera_B


# --- PEFT's folders ---


def test_layers_to_transform_is_pefts(tmp_path):
    def blocks() -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Sequential(nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.ModuleDict({"q": nn.Linear(4, 4)}))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = blocks()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer["q"](x)
            return x

    config = peft.VeraConfig(r=2, target_modules=["q"], layers_to_transform=[1], layers_pattern="layers")
    other = moved(peft.get_peft_model(Net(), config))
    other.save_pretrained(tmp_path)
    model = Net()
    load_adapter(model, tmp_path)
    assert model.lora_injection.layers == ["layers.1.q"]
    torch.testing.assert_close(model(torch.ones(2, 4)), other(torch.ones(2, 4)), **SAME)


def test_a_folder_without_projections_is_refused_with_the_remedy(tmp_path):
    """Their values cannot be known: random streams differ between versions."""
    moved(theirs(VERA, save_projection=False)).save_pretrained(tmp_path)
    with pytest.raises(LoRAError, match=r"vera_A.*save_projection"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("lost", ["one.vera_lambda_b", "two.vera_lambda_d", "vera_A"])
def test_a_folder_that_was_cut_is_refused_by_name(tmp_path, lost):
    moved(theirs(VERA)).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    save_file({n: t for n, t in tensors.items() if not n.endswith(lost)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match="missing"):
        load_adapter(base(), tmp_path)


# --- bases, swaps, several adapters ---


def test_a_swap_takes_another_rank_and_other_projections(tmp_path):
    model, other = moved(ours(VERA)), moved(ours(VERA, r=5, variant_options={"projection_prng_key": 3}))
    objects = dict(model.named_parameters())
    save_adapter(other, tmp_path)
    load_adapter(model, tmp_path)
    assert dict(model.named_parameters()).items() == objects.items()
    assert torch.equal(model(TOKENS), other(TOKENS))
    assert model.one.lora_vera_A is model.two.lora_vera_A


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_and_stays_factored(kind):
    pytest.importorskip("bitsandbytes")

    def build() -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return quantise_(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), kind)

    model = build()
    inject(model, LoRAConfig(variant="vera", r=4))
    moved(model)
    x = torch.randn(3, 64)
    weights = {name: values_of(model[name]) for name in (0, 2)}

    def dense(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        a, b = layer.lora_vera_d[:, None] * layer.lora_vera_A, layer.lora_vera_b[:, None] * layer.lora_vera_B
        return x @ (weight.float() + b @ a).T + layer.bias

    expected = dense(model[2], weights[2], dense(model[0], weights[0], x).tanh())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=3e-2 if kind == "int8" else 1e-4)
    model(x).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained_names(model))
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=3e-2 if kind == "int8" else 1e-4)


def test_combining_adds_what_the_adapters_add(tmp_path):
    """Into a plain LoRA adapter: sums of products with other vectors are no VeRA."""
    sources = []
    for i in range(2):
        model = ours(VERA, variant_options={"projection_prng_key": i})
        torch.manual_seed(i)
        with torch.no_grad():
            for name in trained_names(model):
                model.get_parameter(name).normal_()
        sources.append(model)
        save_adapter(model, tmp_path / str(i))
    both = combine([tmp_path / "0", tmp_path / "1"], [0.5, -2.0], method="cat")
    again = base()
    load_adapter(again, both)
    merge(again)
    for name in VERA.layers:
        plain = base().get_submodule(name).weight.double()
        wanted = plain + sum(w * (VERA.reference(m, name) - plain) for w, m in zip((0.5, -2.0), sources, strict=True))
        torch.testing.assert_close(again.get_submodule(name).weight.double(), wanted, **SAME)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lora_alpha": 16}, "lora_alpha"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"one": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"one": 2}}, "alpha_pattern"),
        ({"enable_lora": {"one": [True, False, True]}}, "enable_lora"),
        ({"target_parameters": ["one.weight"], "target_modules": []}, "target_parameters"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"variant_options": {"d_inital": 0.1}}, "d_inital.*d_initial"),
        ({"variant_options": {"d_initial": math.nan}}, "d_initial"),
        ({"variant_options": {"projection_prng_key": "a"}}, "projection_prng_key"),
    ],
)
def test_an_option_that_has_no_place_is_refused_by_name(options, names):
    with pytest.raises(LoRAError, match=names):
        LoRAConfig(**{**VERA.ours, **options})


@pytest.mark.parametrize("name", ["emb", "conv", "grouped", "image", "volume"])
def test_a_layer_that_peft_does_not_adapt_so_is_refused_by_name(name):
    with pytest.raises(LoRAError, match=f"{name!r}.*vera"):
        ours(VERA, target_modules=[name])


def test_what_peft_can_say_and_we_cannot_is_refused_by_name():
    with pytest.raises(LoRAError, match="save_projection"):
        LoRAConfig.from_peft(peft.VeraConfig(**VERA.theirs, save_projection=False))


def test_another_variant_in_the_place_is_refused_by_name(tmp_path):
    save_adapter(moved(ours(VERA)), Path(tmp_path))
    plain = base()
    inject(plain, LoRAConfig(r=3, target_modules=VERA.layers))
    with pytest.raises(LoRAError, match="variant"):
        load_adapter(plain, tmp_path)
