"""What programs do on a GPU alone: graphs, compilers, loss scaling, pinned moves, waits, memory, cuDNN's weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.measure import peak_bytes
from lightning_lora import (
    LoRAConfig,
    disable_adapter,
    initialize_from_data,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    save_adapter,
    unmerge,
)
from support.covering import covering
from support.devices.places import captured, finish, pinned, streams, waits
from support.models.layers import nearest
from support.models.networks import bits, state_bits
from support.models.variants import define_gated, variants_forgotten
from support.runs.notices import TORCH_NOTICES
from support.runs.recorders import start_anew

pytestmark = [
    *TORCH_NOTICES,
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),  # while factored
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["conv", "first", "second", "last"]},
    "LoHa": {"variant": "loha", "target_modules": ["conv", "first", "second", "last"]},
    "own": {"variant": "gated", "target_modules": ["first", "second", "last"]},
    "parameters": {"target_modules": ["first", "second"], "target_parameters": ["last.weight"]},
    "rows": {"target_modules": ["first", "second", "last"], "trainable_token_indices": {"table": [1, 4]}},
}
DROPPING = ("LoRA", "DoRA", "PiSSA", "own", "rows")  # the others take no lora_dropout
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def own_variant() -> Iterator[None]:
    with variants_forgotten():
        define_gated()
        yield


class Mixed(nn.Module):
    """A table, a convolution, three linear layers, two of them alike: these are merged together."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(12, width), nn.Conv1d(width, width, 3, padding=1)
        self.first, self.second, self.last = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        result: torch.Tensor = self.last(self.second(self.first(x).tanh()).tanh())
        return result


def adapted(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A model on a device, away from its start."""
    torch.manual_seed(1)
    model = Mixed().to(dtype)
    inject(model, LoRAConfig(**{"r": 2, "target_modules": ["table", "conv", "first", "second", "last"]} | options))
    return fill_(model).to(device)


@torch.no_grad()
def fill_(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter))
    return model


def tokens(device: str, seed: int = 0) -> torch.Tensor:
    return torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(seed)).to(device)


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).float().square().sum().backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients on the CPU, none of which is zero."""
    found = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.any() for grad in found.values())
    return found


# --- waits ---


def may_drop(variant: str, dtype: str, dropout: float) -> bool:
    return not dropout or variant in DROPPING


@pytest.mark.parametrize(
    ("variant", "dtype", "dropout"), covering([*VARIANTS], ["float32", "bfloat16"], [0.0, 0.1], meet=1, fits=may_drop)
)
def test_no_step_makes_the_host_wait(variant: str, dtype: str, dropout: float, device: str):
    model, x = adapted(device, DTYPES[dtype], lora_dropout=dropout, **VARIANTS[variant]), tokens(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def whole_step() -> None:
        optimizer.zero_grad()
        step(model, x)
        optimizer.step()

    whole_step()
    assert waits(device, lambda: x.sum().item()) >= 1  # what is counted is heard
    assert waits(device, whole_step) == 0
    gradients(model)


# --- graphs and compilers ---


@pytest.mark.parametrize("variant", ["DoRA", "own", "rows"])
def test_a_captured_step_gives_the_gradients_of_a_plain_one(variant: str, device: str):
    model = adapted(device, **VARIANTS[variant])
    plain, x = copy.deepcopy(model), tokens(device)
    step(model, x)  # the gradients are there, and every replay adds to them
    repeat = captured(device, lambda: step(model, x))
    for seed in (1, 2):
        x.copy_(tokens("cpu", seed))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        repeat()
        plain.zero_grad()
        step(plain, tokens(device, seed))
        expected, found = gradients(plain), gradients(model)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["DoRA", "parameters", "rows"])
def test_a_captured_merged_forward_answers_merged_and_reads_the_weights_that_are_there(variant: str, device: str):
    model, x = adapted(device, **VARIANTS[variant]).eval(), tokens(device)
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    places = {name: p.data_ptr() for name, p in base.items()}
    answers: list[torch.Tensor] = [torch.empty(3, 5, 4, device=device)]
    with torch.no_grad():
        with merged(model):
            repeat = captured(device, lambda: answers[0].copy_(model(x)))
            x.copy_(tokens("cpu", 3))
            repeat()
            torch.testing.assert_close(answers[0].cpu(), model(x).cpu(), rtol=1e-5, atol=1e-6)
            assert {name: p.data_ptr() for name, p in base.items()} == places
        assert {name: p.data_ptr() for name, p in base.items()} == places
        torch.testing.assert_close(answers[0].cpu(), model(x).cpu(), rtol=1e-4, atol=1e-5)
        with disable_adapter(model):
            repeat()
            torch.testing.assert_close(answers[0].cpu(), model(x).cpu(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(answers[0].cpu(), model(x).detach().cpu())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "state"), covering([*VARIANTS], ["factored", "merged"], meet=1))
def test_a_compiled_model_computes_what_it_does_uncompiled(
    variant: str, state: str, compiling_device: str, monkeypatch: pytest.MonkeyPatch
):
    start_anew(monkeypatch)
    model, x = adapted(compiling_device, **VARIANTS[variant]), tokens(compiling_device)
    backend = "inductor" if compiling_device == "cuda" else "aot_eager"  # which needs no compiler of C++
    if state == "merged":
        merge(model.eval())
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(x).cpu(), model(x).cpu(), rtol=1e-4, atol=1e-5)
    if state == "factored":
        step(model, x)
        expected = gradients(model)
        model.zero_grad()
        step(compiled, x)
        found = gradients(model)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)


# --- precision ---


@pytest.mark.parametrize("variant", ["LoRA", "DoRA", "LoHa", "rows"])
def test_a_scaled_loss_trains_in_float16_and_an_overflow_skips_the_step(variant: str, compiling_device: str):
    device = compiling_device
    model, x = adapted(device, **VARIANTS[variant]), tokens(device)
    plain = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(trained, lr=0.01), torch.amp.GradScaler(device, init_scale=2.0**8)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(factor * loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = state_bits(model)
    scaled_step(float("inf"))
    assert state_bits(model) == before
    assert scaler.get_scale() == 2.0**7
    scaled_step(1.0)
    plain(x).square().mean().backward()
    torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.01).step()
    first = dict(adapted(device, **VARIANTS[variant]).named_parameters())
    for name, value in plain.named_parameters():
        if value.requires_grad:
            both = model.get_parameter(name), value
            moved, wanted = (each.detach().cpu() - first[name].detach().cpu() for each in both)
            assert wanted.norm() > 0, name
            assert (moved - wanted).norm() <= 3e-2 * wanted.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_settings_of_products_change_no_merged_weight_and_stay(dtype: str, device: str):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(256, 256)).to(DTYPES[dtype])
    inject(model, LoRAConfig(r=16))
    fill_(model)
    layer = model[0]
    factors = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    wanted = layer.weight.detach().double() + layer.lora.spec.scaling * factors
    model.to(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # on a GPU: TF32
    try:
        wide = settings()
        with torch.autocast(device, torch.bfloat16):
            merge(model)
        assert settings() == wide
        assert nearest(layer.weight.detach().cpu(), wanted).double().mean() >= 0.9999
        unmerge(model)
        assert settings() == wide
    finally:
        torch.set_float32_matmul_precision(before)


def settings() -> tuple[str, Any]:
    """Return what torch does with products of float32: on all devices, and on CUDA from torch 2.9 on."""
    return torch.get_float32_matmul_precision(), getattr(torch.backends.cuda.matmul, "fp32_precision", None)


# --- moves, memory, random streams ---


@pytest.mark.parametrize(("variant", "dtype"), covering(["LoRA", "parameters", "rows"], [*DTYPES], meet=1))
def test_a_model_moves_from_pinned_memory_and_back_without_waiting(variant: str, dtype: str, device: str):
    model = adapted("cpu", DTYPES[dtype], **VARIANTS[variant])
    before = state_bits(model)
    for parameter in model.parameters():
        parameter.data = pinned(parameter.data, device)
    merge(model.to(device, non_blocking=True))
    assert {p.device.type for p in model.parameters()} == {device}
    assert state_bits(model) == before
    model.to("cpu", non_blocking=True)
    finish(device)
    unmerge(model)
    assert {name: bits(p) for name, p in model.named_parameters(remove_duplicate=False)} == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_merging_a_big_layer_is_a_few_times_the_weight_at_most(dtype: str, compiling_device: str):
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).to(DTYPES[dtype])
    inject(model, LoRAConfig(r=4))
    fill_(model).to(compiling_device)

    def cycle() -> None:
        merge(model)
        unmerge(model)

    most = {"cpu": 0.5, "cuda": 8}[compiling_device]  # a GPU takes all rows at once, in a type of twice the bytes
    assert 0 < peak_bytes(cycle, compiling_device) <= most * model[0].weight.nbytes


STARTS = ("gaussian", "orthogonal", "pissa_niter_8", "eva", "lora_ga")


@pytest.mark.parametrize("init", STARTS)
def test_random_streams_stand_still_while_a_model_on_a_device_is_adapted(init: str, device: str, tmp_path: Path):
    torch.manual_seed(1)
    model = Mixed().to(device)
    before = streams(device)
    inject(model, LoRAConfig(r=2, target_modules=["first", "last"], init_lora_weights=init))
    if init in ("eva", "lora_ga"):
        initialize_from_data(model, [tokens(device)] * 2, lambda net, batch: net(batch).square().mean())
    merge(model)
    unmerge(model)
    save_adapter(model, tmp_path / "folder")
    load_adapter(model, tmp_path / "folder")
    merge_and_unload(model)
    for found, expected in zip(streams(device), before, strict=True):
        assert torch.equal(found, expected)
    torch.rand(1, device=device)
    assert any(not torch.equal(found, expected) for found, expected in zip(streams(device), before, strict=True))


# --- recurrent layers, whose weights cuDNN wants in one piece of memory ---


def flat(rnn: Any) -> bool:
    """Whether what the kernel is given are the module's own parameters."""
    return all(w is getattr(rnn, name) for w, name in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True))


@pytest.mark.parametrize(
    ("state", "kind"), covering(["merged", "merged for good", "moved while merged"], [nn.LSTM, nn.GRU], meet=1)
)
def test_a_merged_recurrent_layer_runs_on_its_flat_weights(kind: Any, state: str, device: str):
    torch.manual_seed(1)
    model = nn.ModuleDict({"rnn": kind(5, 6, num_layers=2, bidirectional=True)})
    x, places = torch.randn(4, 2, 5).to(device), ["weight_ih_l0", "weight_hh_l1_reverse"]
    inject(model, LoRAConfig(r=2, target_modules=[], target_parameters=[f"rnn.{name}" for name in places]))
    fill_(model).to(device).eval()
    rnn: Any = model["rnn"]
    with torch.no_grad():
        expected = rnn(x)[0].cpu()
        (merge_and_unload if state == "merged for good" else merge)(model)
        if state == "moved while merged":
            model.to("cpu").to(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # cuDNN warns where weights are in several pieces
            found = model["rnn"](x)[0].cpu()
        assert flat(model["rnn"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
