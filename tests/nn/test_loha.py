"""LoHa (arXiv:2108.06098): PEFT's numbers and folders, W' and every bit back, and what is refused."""

from __future__ import annotations

import copy
import pickle
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
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    save_merged,
    unload,
    unmerge,
)
from lightning_lora.command.main import main
from support.methods import (
    SAME,
    TOKENS,
    Method,
    base,
    config_of,
    copy_to_peft,
    edit,
    moved,
    ours,
    pairs,
    steps,
    tensors_of,
    theirs,
    trained_names,
)
from support.models import bits, state_bits
from support.notices import quiet_peers, tiny_layers
from support.quantised import quantise_, values_of

pytestmark = [*quiet_peers, tiny_layers]

LAYERS = ["one", "two", "conv", "grouped", "image", "point"]
LEAVES = {leaf: f"lora_{leaf}" for leaf in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
LOHA = Method(
    peft.LoHaConfig,
    {"variant": "loha", "r": 2, "lora_alpha": 3, "target_modules": LAYERS},
    {"r": 2, "alpha": 3, "target_modules": LAYERS},
    LEAVES,
)
S = 1.5


def reference(model: Any, name: str, scaling: float = S) -> torch.Tensor:
    """W' of a layer in float64, from the definition."""
    layer = model.get_submodule(name)
    w1a, w1b, w2a, w2b = (getattr(layer, leaf).detach().double() for leaf in LEAVES.values())
    weight = layer.weight.detach().double()
    return weight + scaling * ((w1a @ w1b) * (w2a @ w2b)).view(weight.shape)


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
    assert trained_names(model) == [f"{name}.{leaf}" for name in LAYERS for leaf in LEAVES.values()]
    assert torch.equal(ours(LOHA).one.lora_hada_w1_a, ours(LOHA).one.lora_hada_w1_a)  # by the random stream's state
    assert not torch.equal(model.one.lora_hada_w1_a, model.one.lora_hada_w2_a)


def test_a_random_start_changes_the_output_as_in_peft():
    model = ours(LOHA, init_lora_weights=False)
    assert all(parameter.any() for _, parameter, _ in pairs(LOHA, model, theirs(LOHA)))
    assert (model(TOKENS) - base()(TOKENS)).abs().max() > 1e-4


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


def test_gradients_pass_gradcheck():
    model = moved(ours(LOHA, base().double()))
    names = trained_names(model)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (TOKENS,))

    values = tuple(model.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, values)


# --- merging ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_rounds_once_and_restores_every_bit(dtype):
    model = moved(ours(LOHA, base().to(dtype)))
    before, expected = state_bits(model), {name: reference(model, name) for name in LAYERS}
    answer = model(TOKENS)
    for _ in range(3):
        merge(model)
        for name in LAYERS:
            found, wanted = model.get_submodule(name).weight.detach(), expected[name].to(dtype)
            assert (found - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max(), name
        torch.testing.assert_close(model(TOKENS), answer, rtol=0, atol=40 * torch.finfo(dtype).eps)
        unmerge(model)
        assert state_bits(model) == before


def test_taken_out_the_model_is_plain(tmp_path):
    model, plain = moved(ours(LOHA)), base()
    expected = {name: reference(model, name).float() for name in LAYERS}
    with disable_adapter(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    answer = model(TOKENS)
    state = merged_state_dict(model)
    save_merged(model, tmp_path)
    assert state.keys() == plain.state_dict().keys()
    merged = merge_and_unload(copy.deepcopy(model))
    for name, value in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, value, **SAME)
        torch.testing.assert_close(state[f"{name}.weight"], value, **SAME)
    torch.testing.assert_close(merged(TOKENS), answer, **SAME)
    unload(model)
    for each in (merged, model):
        assert [type(m) for m in each.modules()] == [type(m) for m in plain.modules()]
        assert not any("lora" in name for name, _ in each.named_parameters())
    assert state_bits(model) == state_bits(plain)


def test_copies_answer_the_same():
    model = moved(ours(LOHA))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), model(TOKENS))


# --- PEFT's folders ---

FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # peft's options, and what LoRAConfig is then
    "plain": ({}, {}),
    "patterns": (
        {"rank_pattern": {"two": 3}, "alpha_pattern": {"conv": 5}},
        {"rank_pattern": {"two": 3}, "alpha_pattern": {"conv": 5}},
    ),
    "random start": ({"init_weights": False}, {"init_lora_weights": False}),
    "modules_to_save": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
    "an expression": ({"target_modules": "one|conv"}, {"target_modules": "one|conv"}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_pefts_folder_is_read_and_written_again(tmp_path, case):
    options, expected = FOLDERS[case]
    other = moved(theirs(LOHA, **options))
    other.save_pretrained(tmp_path / "theirs")
    model = base()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), other(TOKENS), **SAME)
    config = model.lora_injection.config
    assert config == LoRAConfig(**{**LOHA.ours, **expected, "target_modules": config.target_modules})
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS), other(TOKENS), **SAME)
    written, before = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    same = ("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "init_weights", "use_effective_conv2d")
    assert {name: written[name] for name in same} == {name: before[name] for name in same}


@pytest.mark.parametrize("case", FOLDERS)
def test_pefts_config_means_the_same(case):
    options, expected = FOLDERS[case]
    config = LoRAConfig.from_peft(peft.LoHaConfig(**{**LOHA.theirs, **options}))
    assert not config.differing(LoRAConfig(**{**LOHA.ours, **expected}))


@pytest.mark.parametrize("case", FOLDERS)
def test_our_folder_is_read_by_peft_and_by_us(tmp_path, case):
    model = moved(ours(LOHA, **FOLDERS[case][1]))
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(other(TOKENS), model(TOKENS), **SAME)
    again = base()
    load_adapter(again, tmp_path)
    assert again.lora_injection.config == model.lora_injection.config
    state = adapter_state_dict(model)
    assert adapter_state_dict(again).keys() == state.keys()
    assert all(torch.equal(adapter_state_dict(again)[name], value) for name, value in state.items())


def test_pefts_effective_convolutions_are_refused_by_name(tmp_path):
    """Their factors of each kernel have no place here."""
    moved(theirs(LOHA, use_effective_conv2d=True)).save_pretrained(tmp_path)
    with pytest.raises(LoRAError, match="use_effective_conv2d"):
        load_adapter(base(), tmp_path)
    with pytest.raises(LoRAError, match="use_effective_conv2d"):
        LoRAConfig.from_peft(peft.LoHaConfig(**LOHA.theirs, use_effective_conv2d=True))


@pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
def test_pefts_dropouts_are_refused_by_name(tmp_path, option):
    moved(theirs(LOHA, **{option: 0.1})).save_pretrained(tmp_path)
    with pytest.raises(LoRAError, match=option):
        load_adapter(base(), tmp_path)
    with pytest.raises(LoRAError, match=option):
        LoRAConfig.from_peft(peft.LoHaConfig(**LOHA.theirs, **{option: 0.1}))


@pytest.mark.parametrize("lost", [f"conv.{leaf}" for leaf in LEAVES])
def test_a_folder_that_was_cut_is_refused_by_name(tmp_path, lost):
    moved(theirs(LOHA)).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    save_file({n: t for n, t in tensors.items() if not n.endswith(lost)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match=f"{lost.rpartition('.')[2]}.*missing"):
        load_adapter(base(), tmp_path)


def test_the_command_merges_pefts_folder_as_peft_does(tmp_path, capsys):
    other = moved(theirs(LOHA))
    other.save_pretrained(tmp_path / "theirs")
    torch.save(base().state_dict(), tmp_path / "base.pt")
    paths = (
        f"--{name}={tmp_path / path}" for name, path in (("base", "base.pt"), ("adapter", "theirs"), ("output", "o.pt"))
    )
    assert main(["merge", *paths, "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    merged = torch.load(tmp_path / "o.pt", weights_only=True)
    for name, value in other.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    assert main(["info", str(tmp_path / "theirs")]) == 0


def test_an_option_that_cannot_be_applied_is_refused_by_name(tmp_path):
    moved(theirs(LOHA)).save_pretrained(tmp_path)
    edit(tmp_path, something_new=3)
    with pytest.raises(LoRAError, match="something_new=3"):
        load_adapter(base(), tmp_path)


# --- bases, swaps, several adapters ---


def test_a_swap_takes_another_rank_and_alpha(tmp_path):
    model, other = moved(ours(LOHA)), moved(ours(LOHA, r=3, lora_alpha=7, rank_pattern={"two": 4}))
    objects = dict(model.named_parameters())
    save_adapter(other, tmp_path)
    load_adapter(model, tmp_path)
    assert dict(model.named_parameters()).items() == objects.items()
    assert torch.equal(model(TOKENS), other(TOKENS))


def test_a_quantised_base_trains_and_stays_factored():
    pytest.importorskip("bitsandbytes")
    model = quantise_(nn.Sequential(nn.Linear(64, 64)), "nf4")
    weight, x = values_of(model[0]), torch.randn(3, 64)
    inject(model, LoRAConfig(variant="loha", r=2, lora_alpha=3))
    moved(model)
    w1a, w1b, w2a, w2b = (getattr(model[0], leaf) for leaf in LEAVES.values())
    expected = x @ (weight.float() + S * (w1a @ w1b) * (w2a @ w2b)).T + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
    model(x).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained_names(model))
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)


def test_a_tied_weight_is_never_changed():
    model = nn.Module()
    model.emb, model.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
    model.head.weight = model.emb.weight
    inject(model, LoRAConfig(variant="loha", r=2, target_modules=["head"]))
    moved(model)
    before, answer = bits(model.emb.weight), model.head(torch.ones(1, 6))
    merge(model)
    assert bits(model.emb.weight) == before
    assert torch.equal(model.head(torch.ones(1, 6)), answer)


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
        wanted = plain + sum(w * (reference(m, name) - plain) for w, m in zip((0.5, -2.0), sources, strict=True))
        torch.testing.assert_close(again.get_submodule(name).weight.double(), wanted, **SAME)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"bias": "all"}, "bias"),
        ({"enable_lora": {"one": [True, False, True]}}, "enable_lora"),
        ({"target_parameters": ["one.weight"], "target_modules": []}, "target_parameters"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"variant_options": {"d_initial": 0.1}}, "d_initial"),
    ],
)
def test_an_option_that_has_no_place_is_refused_by_name(options, names):
    with pytest.raises(LoRAError, match=names):
        LoRAConfig(**{**LOHA.ours, **options})


@pytest.mark.parametrize("name", ["emb", "third", "volume"])
def test_a_layer_that_peft_does_not_adapt_so_is_refused_by_name(name):
    with pytest.raises(LoRAError, match=f"{name!r}.*loha"):
        ours(LOHA, target_modules=[name])
