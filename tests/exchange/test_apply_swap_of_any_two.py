"""load_adapter makes a model hold the adapter of the source, and nothing of the one that it held before."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    combine,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merged,
    merged_state_dict,
    read_adapter,
    save_adapter,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import checkpoint, state_bits
from support.runs.training import Data, fit_model, make_trainer
from support.runs.training import Net as Module


class Net(nn.Module):
    """Layers of many kinds: a table, a convolution, attention, an LSTM, a fused projection, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm, self.qkv = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, _ = self.lstm(x)
        result: torch.Tensor = self.head(self.norm(self.qkv(x)).relu().mean(1))
        return result


CASES: dict[str, dict[str, Any]] = {  # neighbours differ in what they add to the same layers
    "LoRA": {"target_modules": ["conv", "qkv"]},
    "another rank": {"target_modules": ["conv", "qkv"], "r": 4, "lora_alpha": 3, "rank_pattern": {"conv": 1}},
    "PiSSA": {"target_modules": ["conv", "qkv", "head"], "init_lora_weights": "pissa"},
    "PiSSA of another rank": {"target_modules": ["conv", "qkv"], "init_lora_weights": "pissa", "r": 4},
    "DoRA": {"target_modules": ["conv", "qkv"], "use_dora": True},
    "LoHa": {"target_modules": ["conv", "qkv"], "variant": "loha"},
    "DoRA of a table": {"target_modules": ["embed", "qkv"], "use_dora": True},
    "rsLoRA of a table": {"target_modules": ["embed", "qkv"], "use_rslora": True},
    "parameters": {"target_modules": [], "target_parameters": ["weight_ih_l0", "weight_hh_l0"]},
    "parameters of another rank": {"target_modules": [], "target_parameters": ["weight_hh_l0"], "r": 3},
    "attention": {"target_modules": ["attention", "qkv"], "r": 3},
    "attention of another rank": {"target_modules": ["attention"], "r": 1},
    "parts": {"target_modules": ["qkv"], "enable_lora": {"qkv": [True, True, False]}},
    "other parts": {"target_modules": ["qkv"], "enable_lora": {"qkv": [True, False, True]}},
    "rows": {"target_modules": ["qkv"], "trainable_token_indices": {"embed": [1, 4]}},
    "other rows": {"target_modules": ["qkv"], "trainable_token_indices": {"embed": [2, 4]}},
    "a head": {"target_modules": ["qkv"], "modules_to_save": ["head", "norm"]},
    "a head alone": {"target_modules": [], "modules_to_save": ["head"]},
    "biases": {"target_modules": ["qkv", "conv"], "bias": "all"},
    "biases of layers": {"target_modules": ["qkv", "conv"], "bias": "lora_only"},
}
PAIRS = covering(CASES, CASES, meet=1, fits=operator.ne)  # each beside its neighbour
TOKENS = torch.arange(18).reshape(3, 6) % 9


def adapted(case: str) -> Net:
    inject(net := Net(), LoRAConfig(**{"r": 2, **CASES[case]}))
    draw = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    return net.eval()


def trained(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_model_takes_another_adapter_and_its_own_again(one: str, other: str):
    net, wanted = adapted(one), adapted(other)
    own, before, names, parameters = take_adapter(net), state_bits(net), trained(net), dict(net.named_parameters())
    load_adapter(net, take_adapter(wanted))
    for name, parameter in net.named_parameters():
        assert parameters.get(name, parameter) is parameter  # what both have stays the same object
    assert torch.equal(net(TOKENS), wanted(TOKENS))
    assert trained(net) == trained(wanted)
    assert take_adapter(net).tensors.keys() == take_adapter(wanted).tensors.keys()
    with disable_adapter(net):
        torch.testing.assert_close(net(TOKENS), Net().eval()(TOKENS), rtol=0, atol=1e-6)  # attention has a fast path
    for name, value in merged_state_dict(net).items():
        assert torch.equal(value, merged_state_dict(wanted)[name]), name
    load_adapter(net, own)
    assert state_bits(net) == before
    assert trained(net) == names
    unload(net)
    assert state_bits(net) == state_bits(Net())
    assert trained(net) == trained(Net())


def has_a_folder(one: str, other: str, form: str) -> bool:
    return one != other and (form != "folder" or not ("parameters" in other or other == "a head alone"))


@pytest.mark.parametrize(
    ("one", "other", "form"), covering(CASES, CASES, ["folder", "adapter", "full"], meet=1, fits=has_a_folder)
)
def test_a_merged_model_takes_another_adapter_from_a_file(tmp_path: Path, one: str, other: str, form: str):
    net, wanted = adapted(one), adapted(other)
    merge(net)
    save_adapter(wanted, tmp_path) if form == "folder" else None
    load_adapter(net, tmp_path if form == "folder" else checkpoint(wanted, form))
    assert is_merged(net) == ("a head alone" not in (one, other))  # which has nothing to merge
    with merged(wanted):
        torch.testing.assert_close(net(TOKENS), wanted(TOKENS), rtol=0, atol=1e-6)
    unmerge(net)
    torch.testing.assert_close(net(TOKENS), wanted(TOKENS), rtol=0, atol=1e-6)
    unload(net)
    assert state_bits(net) == state_bits(Net())


@pytest.mark.parametrize(
    ("one", "other", "is_in"), [("LoRA", "DoRA", True), ("a head", "LoRA", False), ("rows", "attention", True)]
)
def test_a_swap_that_is_refused_gives_the_model_its_own_adapter_back(one: str, other: str, is_in: bool):
    net, wanted = adapted(one), adapted(other)
    with torch.no_grad():
        wanted.lstm.weight_hh_l0.add_(1.0)  # another base
    source, before, names, outputs = take_adapter(wanted), state_bits(net), trained(net), net(TOKENS)
    merge(net) if is_in else None
    with pytest.raises(LoRAError, match="another base"):
        load_adapter(net, source)
    assert is_merged(net) is is_in
    unmerge(net)
    assert (state_bits(net), trained(net)) == (before, names)
    assert torch.equal(net(TOKENS), outputs)
    unload(net)
    assert state_bits(net) == state_bits(Net())


def test_a_part_of_a_model_swaps_what_it_holds():
    around = nn.ModuleDict({"net": adapted("a head"), "more": nn.Linear(2, 2)})
    wanted = adapted("DoRA")
    load_adapter(around["net"], take_adapter(wanted))
    assert torch.equal(around["net"](TOKENS), wanted(TOKENS))
    assert [name.removeprefix("net.") for name in trained(around) if name.startswith("net.")] == trained(wanted)
    load_adapter(around, take_adapter(adapted("LoHa")))
    assert torch.equal(around["net"](TOKENS), adapted("LoHa")(TOKENS))


# --- beside a Trainer ---


def test_inside_a_fit_other_layers_are_refused_and_other_values_are_taken(tmp_path: Path):
    """The optimizer holds the parameters."""
    inject(other := Module(), LoRAConfig(r=2, target_modules=["head"]))
    inject(same := Module(), LoRAConfig(r=2, target_modules=["body.0", "head"]))
    others, said = take_adapter(other), list[str]()

    class Swaps(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            load_adapter(pl_module, take_adapter(same))
            with pytest.raises(LoRAError, match="inside a fit") as error:
                load_adapter(pl_module, others)
            said.append(str(error.value))

    model = Module()
    callback = LoRACallback(r=2, target_modules=["body.0", "head"])
    make_trainer(tmp_path, callback, Swaps(), max_epochs=1).fit(model, Data())
    assert len(said) == 1
    assert list(open_model(model, "test").layers) == ["body.0", "head"]
    load_adapter(model, others)
    assert list(open_model(model, "test").layers) == ["head"]


def test_a_run_goes_on_after_a_swap_to_other_layers(tmp_path: Path):
    inject(other := Module(), LoRAConfig(r=3, target_modules=["head"], modules_to_save=["body.1"]))
    model = Module()
    make_trainer(tmp_path, LoRACallback(r=2), max_epochs=1).fit(model, Data())
    load_adapter(model, take_adapter(other))
    fit_model(tmp_path, model, LoRACallback(), saved=tmp_path / "after.ckpt", max_epochs=1)
    adapter = read_adapter(tmp_path / "after.ckpt")
    assert list(adapter.layers) == ["head"]
    assert {"body.1.weight", "body.1.bias"} < adapter.tensors.keys()
    load_adapter(fresh := Module(), tmp_path / "after.ckpt")
    assert state_bits(fresh) == state_bits(model)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"r": 2, "target_modules": r"body\.(0|3)"}, ""),  # the same layers in other words
        ({"r": 3, "target_modules": r"body\.(0|3)"}, "r is 3"),
        ({"r": 4, "lora_alpha": 16, "target_modules": r"body\.(0|3)"}, "r is 4"),  # with the same scaling
        ({"target_modules": ["body.0"]}, "target_modules is"),
        ({"modules_to_save": ["head"]}, "modules_to_save is"),
    ],
)
def test_a_callback_beside_a_loaded_adapter_may_name_its_layers_in_other_words(
    tmp_path: Path, options: dict[str, Any], refused: str
):
    inject(other := Module(), LoRAConfig(r=2, target_modules=["body.0", "body.3"]))
    load_adapter(model := Module(), take_adapter(other))
    trainer = make_trainer(tmp_path, LoRACallback(**options), max_epochs=1)
    if refused:
        with pytest.raises(LoRAError, match=refused):
            trainer.fit(model, Data())
    else:
        trainer.fit(model, Data())


def test_a_run_on_a_loaded_adapter_resumes_by_its_layers_whatever_its_words_name(tmp_path: Path):
    """The words are those of the network alone: an expression that names nothing in the module around it."""
    inject(body := Module().body, LoRAConfig(r=2, target_modules="[03]", rank_pattern={"^3": 1}, modules_to_save=["1"]))
    load_adapter(model := Module(), take_adapter(body))
    fit_model(tmp_path, model, LoRACallback(), saved=tmp_path / "run.ckpt", max_epochs=1)
    again = fit_model(tmp_path, resumed := Module(), LoRACallback(), ckpt_path=tmp_path / "run.ckpt", max_epochs=2)
    assert again.current_epoch == 2
    assert {name: layer.r for name, layer in take_adapter(resumed).layers.items()} == {"body.0": 2, "body.3": 1}
    assert trained(resumed) == trained(model)
    with pytest.raises(LoRAError):
        make_trainer(tmp_path, LoRACallback(r=3)).test(Module(), Data(), ckpt_path=tmp_path / "run.ckpt")
    tested = make_trainer(tmp_path, LoRACallback(r=2))
    tested.test(found := Module(), Data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert state_bits(found) == state_bits(model)
    unload(found)
    assert state_bits(found) == state_bits(Module())


def test_a_callback_beside_a_result_of_combine_names_its_layers(tmp_path: Path):
    """Not those of the first adapter."""
    adapters = []
    for options in ({"target_modules": ["body.0", "head"]}, {"target_modules": ["body.3", "head"], "r": 3}):
        inject(net := Module(), LoRAConfig(**{"r": 2, **options}))
        adapters.append(take_adapter(net))
    load_adapter(model := Module(), combine(adapters, [1.0, 1.0]))
    with pytest.raises(LoRAError, match="target_modules is"):
        make_trainer(tmp_path, LoRACallback(target_modules=["body.0", "head"])).fit(model, Data())
    make_trainer(tmp_path, LoRACallback(target_modules=["body.0", "body.3", "head"])).fit(model, Data())
