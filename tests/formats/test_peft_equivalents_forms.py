"""Adapters that start from the weight, beside PEFT's: the same numbers, files in both directions, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    take_adapter,
)
from lightning_lora.exchange.save_load import read_adapter
from lightning_lora.model.adapted_model import open_model
from lightning_lora.nn import starts
from support.covering import covering
from support.models.networks import checkpoint
from support.models.parameters import Experts
from support.runs.notices import quiet_peers
from support.runs.training import Net, make_trainer
from support.runs.with_callback import lora, run

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:.* changes the base weights of the model"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but"),
]
INITS = ("pissa", "olora")
SAME = {"rtol": 1e-5, "atol": 1e-5}


class Small(nn.Module):
    """Linear layers, one of them transformers' Conv1D, and a head."""

    def __init__(self, *, conv1d: bool = False) -> None:
        super().__init__()
        self.one: nn.Module = Conv1D(12, 9) if conv1d else nn.Linear(9, 12)
        self.two, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.two(self.one(x).tanh()).tanh())
        return result


def base(**options: Any) -> Small:
    torch.manual_seed(0)
    model = Small(**options)
    if options:
        nn.init.normal_(model.one.weight, std=0.5)
    return model


def x() -> torch.Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(1))


def options(init: str = "pissa", **others: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 4, "target_modules": ["one", "two"], "init_lora_weights": init} | others


def ours(init: str = "pissa", model: Any = None, **others: Any) -> Any:
    model = base() if model is None else model
    inject(model, LoRAConfig(**options(init, **others)))
    return model


def moved(model: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def config_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return result


# --- PEFT's numbers ---


def steps(model: nn.Module, count: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(count):
        loss = (model(x()) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pissa, patterns": ("pissa", {"rank_pattern": {"two": 2}, "alpha_pattern": {"one": 7}}, {}),
    "pissa, Conv1D": ("pissa", {}, {"conv1d": True}),
    "olora, rslora": ("olora", {"use_rslora": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_start_outputs_gradients_and_steps_are_those_of_peft(case):
    init, others, how = CASES[case]
    model = ours(init, base(**how), **others)
    fan_in = {"fan_in_fan_out": True} if how else {}
    theirs = peft.get_peft_model(base(**how), peft.LoraConfig(**options(init, **others), **fan_in))
    torch.testing.assert_close(model(x()), theirs(x()), **SAME)
    model(x()).square().sum().backward()
    theirs(x()).square().sum().backward()
    for name in ("one", "two"):
        layer, other = getattr(model, name), theirs.base_model.model.get_submodule(name)
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, b @ a, **SAME)
        signs = (layer.lora_A * a).sum(1).sign()[:, None]  # of singular vectors, which nothing decides
        torch.testing.assert_close(signs * layer.lora_A, a, **SAME)
        torch.testing.assert_close(signs * layer.lora_A.grad, a.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_B.grad * signs.T, b.grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    theirs.zero_grad()
    assert steps(model, 8) == pytest.approx(steps(theirs, 8), rel=1e-4)
    torch.testing.assert_close(model(x()), theirs(x()), rtol=1e-4, atol=1e-4)


# --- folders ---


class Parts(nn.Module):
    """What lies otherwise in a weight than in a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv, self.fused = nn.Embedding(20, 9), nn.Conv1d(9, 8, 3, padding=1), nn.Linear(8, 12)
        self.mha, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(12, 5)
        self.experts = Experts()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.emb(tokens).transpose(1, 2)).transpose(1, 2)
        result: torch.Tensor = self.experts(self.out(self.fused(self.mha(x, x, x, need_weights=False)[0])))
        return result


def parts() -> Parts:
    torch.manual_seed(3)
    return Parts()


TOKENS = torch.arange(14).view(2, 7)
PLACES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["emb"]},
    "convolution": {"target_modules": ["conv"]},
    "fused": {"target_modules": ["fused", "out"], "enable_lora": {"fused": [True, False, True]}},
    "attention": {"target_modules": ["mha", "mha.out_proj"]},
    "out_proj alone": {"target_modules": ["mha.out_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
}


@pytest.mark.parametrize(("place", "init"), covering(PLACES, INITS, meet=1))
def test_peft_reads_our_folder_as_plain_lora_of_twice_the_rank(tmp_path, place: str, init: str):
    model = moved(ours(init, parts(), **PLACES[place]))
    expected = model(TOKENS)
    assert (expected - parts()(TOKENS)).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["init_lora_weights"] is True
    assert not any("start" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    read = peft.PeftModel.from_pretrained(parts(), tmp_path).eval()
    torch.testing.assert_close(read(TOKENS), expected, **SAME)
    again = parts()
    load_adapter(again, tmp_path)
    assert_same_adapter(again, model)


def assert_same_adapter(model: nn.Module, other: nn.Module) -> None:
    state, expected = adapter_state_dict(model), adapter_state_dict(other)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert open_model(model, "").injection.config == open_model(other, "").injection.config


OPTIONS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"two": 2}, "alpha_pattern": {"^one": 7.5}},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"two": 2}, "alpha_pattern": {"^one": 7.5}},
    "modules_to_save": {"modules_to_save": ["head"], "bias": "lora_only"},
}


@pytest.mark.parametrize(("case", "init"), covering(OPTIONS, INITS, meet=1))
def test_options_are_doubled_in_the_folder_and_come_back(tmp_path, case: str, init: str):
    """peft's own conversion refuses rslora with patterns, and fails on modules_to_save."""
    model = moved(ours(init, **OPTIONS[case]))
    save_adapter(model, tmp_path)
    written = config_of(tmp_path)
    own = take_adapter(model).layers
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    described = LoRAConfig(target_modules=list(own), **{name: written[name] for name in names})
    for name, layer in own.items():
        assert described.rank(name) == 2 * layer.r
        assert described.scaling(name) == pytest.approx(layer.scaling)
    read = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(read(x()), model(x()), **SAME)
    again = base()
    load_adapter(again, tmp_path)
    assert_same_adapter(again, model)
    assert steps(again, 3) == steps(model, 3)


@pytest.mark.parametrize("init", INITS)
def test_what_peft_converted_is_read_onto_the_plain_base(tmp_path, init):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options(init)))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = init
    steps(theirs, 3)
    theirs.save_pretrained(tmp_path / "unconverted")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    model = base()
    with pytest.raises(LoRAError, match=rf"init_lora_weights='{init}' changed the base weights before training"):
        load_adapter(model, tmp_path / "unconverted")
    load_adapter(model, tmp_path / "converted")
    torch.testing.assert_close(model(x()), theirs(x()), **SAME)
    plain = base()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in plain.named_parameters())


def refuse(*args: Any) -> Any:
    raise AssertionError("computed what is loaded")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "merged", "full"])
def test_loading_computes_nothing_from_the_weights(tmp_path, monkeypatch, kind):
    trainer = make_trainer(tmp_path / "fit", lora(init_lora_weights="pissa", save=kind if kind != "folder" else "full"))
    net = Net()
    run(trainer, "fit", net)
    path = tmp_path / "saved.ckpt"
    save_adapter(net, tmp_path / "folder")
    trainer.save_checkpoint(path)
    monkeypatch.setattr(starts, "start_factors", refuse)
    again = Net()
    if kind == "folder":
        load_adapter(again, tmp_path / "folder")
    else:
        again = load_from_checkpoint(Net, path)
    assert_same_adapter(again, net)
    with pytest.raises(AssertionError, match="computed what is loaded"):
        inject(Net(), lora(init_lora_weights="pissa").config)


# --- damaged ---


@pytest.mark.parametrize("lost", ["lora_start_A", "lora_start_B"])
def test_an_adapter_without_its_start_is_refused_by_name(lost: str):
    content = checkpoint(model := ours(), "adapter")
    del content["state_dict"][f"one.{lost}"]
    with pytest.raises(LoRAError, match=rf"'one.{lost}' is missing; the adapter was cut"):
        read_adapter(content)
    state = {name: value for name, value in adapter_state_dict(model).items() if not name.endswith(lost)}
    with pytest.raises(LoRAError, match=rf"{lost}' is missing"):
        load_adapter(ours(), state)


def test_a_start_that_does_not_fit_is_refused_by_name():
    model = ours()
    state = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    wrong = state | {"one.lora_start_A": state["one.lora_start_A"][:2]}
    with pytest.raises(LoRAError, match=r"'one': A \(3, 9\) and .* and start_A \(2, 9\) .* do not go together"):
        load_adapter(model, wrong)
    with pytest.raises(LoRAError, match=r"'one.lora_start_B' holds NaN"):
        load_adapter(model, state | {"one.lora_start_B": state["one.lora_start_B"] * float("nan")})
    plain = base()
    inject(plain, LoRAConfig(**options(True)))
    with pytest.raises(LoRAError, match=r"'one.lora_start_A' has no place in the model"):
        load_adapter(plain, state)


def test_a_folder_with_another_rank_than_described_is_refused_and_without_a_description_it_is_plain_lora(tmp_path):
    save_adapter(model := moved(ours()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    save_file({n: (t[:5] if "lora_A" in n else t[:, :5]).contiguous() for n, t in tensors.items()}, file, header)
    with pytest.raises(LoRAError, match="the options say r=6, but its factors have rank 5"):
        load_adapter(base(), tmp_path)
    save_file(tensors, file, {"format": "pt"})
    load_adapter(again := base(), tmp_path)
    assert again.one.lora_A.shape == (6, 9)  # of twice the rank
    torch.testing.assert_close(again(x()), model(x()), **SAME)
