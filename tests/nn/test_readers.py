"""Modules of any program that read the weight of an adapted layer: W' counts, merged, unmerged and in training.

The reference is the plain model with W + s * B @ A in place of its weights, in float64, which torch differentiates.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    merge,
    merge_and_unload,
    merged,
    unload,
    unmerge,
)
from lightning_lora.nn.adapted_module import Swapped
from lightning_lora.nn.readers import LayerView, LoRAReader
from support.covering import covering
from support.models.networks import trace
from support.models.pair_checks import by_pickle
from support.runs.notices import TORCH_NOTICES
from support.runs.recorders import Recorder, operators, start_anew

pytestmark = TORCH_NOTICES

D, R, ALPHA = 6, 2, 3.0


def window_attention(x: torch.Tensor, qkv_weight: torch.Tensor, proj_weight: torch.Tensor) -> torch.Tensor:
    q, k, v = F.linear(x, qkv_weight).chunk(3, -1)
    return F.linear((q @ k.mT).softmax(-1) @ v, proj_weight)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class Inherits(Reads):
    """The method that reads is a base class's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Swin(nn.Module):
    """As torchvision's shifted window attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return window_attention(x, self.qkv.weight, self.proj.weight)


def decorated(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any) -> torch.Tensor:
        return forward(self, *args)

    return wrapped


class Mamba(nn.Module):
    """As transformers' mixers: a decorated forward, a convolution that is read, and a layer that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(D, D, 3, groups=D)
        self.x_proj, self.dt_proj = nn.Linear(D, D), nn.Linear(D, D)

    @decorated
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv1d(x.mT, self.conv1d.weight.squeeze(1).unsqueeze(1), self.conv1d.bias, padding=1, groups=D).mT
        return (self.dt_proj.weight @ self.x_proj(x).mT).mT + self.dt_proj.bias


class ReadsTable(nn.Module):
    """The output head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x[..., 0].abs().long() % 9) @ self.embed.weight.T


class ReadsInside(nn.Module):
    """Reads a layer of a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"unused": nn.Identity()})
        self.inner.proj = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.proj.weight.mul(2).matmul(x.mT).mT


class ReadsInMethods(nn.Module):
    """Reads in methods that forward calls: one by checkpoint, which calls it again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self._first, x, use_reentrant=False) if self.training else self._first(x)
        return self._second(x)

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.first.weight).tanh()

    def _second(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.second.weight)


class ReadsAsLibrariesDo(nn.Module):
    """A forward that wraps itself around another, and a layer that is only asked for facts of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wo, self.proj = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return self.proj.weight[:, :D] @ x.mT

        return self.wo(inner(x).mT.to(self.wo.weight.dtype))


CASES: dict[str, tuple[type[nn.Module], list[str] | str]] = {
    "read": (Reads, "all-linear"),
    "read, inherited": (Inherits, "all-linear"),
    "read by a function": (Swin, "all-linear"),
    "read and called beside": (Mamba, ["conv1d", "x_proj", "dt_proj"]),
    "table": (ReadsTable, ["embed"]),
    "inside": (ReadsInside, "all-linear"),
    "methods": (ReadsInMethods, "all-linear"),
    "nested function": (ReadsAsLibrariesDo, "all-linear"),
}


class Around(nn.Module):
    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader, self.after = reader, nn.LayerNorm(reader(torch.zeros(1, 2, D)).shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.after(self.reader(x))
        return result


@dataclass
class Subject:
    model: Around
    plain: Around
    x: torch.Tensor

    def factors(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def on_sum(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The plain model in float64 on W + s * B @ A."""
        wide = copy.deepcopy(self.plain).double().eval()
        state = dict(wide.named_parameters())
        for name in [name.removesuffix("lora_A") for name in factors if name.endswith("lora_A")]:
            weight, a, b = state[name + "weight"], factors[name + "lora_A"], factors[name + "lora_B"]
            product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1))
            table = isinstance(wide.get_submodule(name[:-1]), nn.Embedding)
            state[name + "weight"] = weight + ALPHA / R * (product.T if table else product).reshape(weight.shape)
        result: torch.Tensor = functional_call(wide, state, (self.x.double(),))
        return result


def make_subject(case: str, *, fill: bool = True, **options: Any) -> Subject:
    build, targets = CASES[case]
    plain = Around(build())
    model = copy.deepcopy(plain)
    plain.requires_grad_(False)
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **options))
    subject = Subject(model, plain, 2 * torch.randn(3, 4, D))
    with torch.no_grad():
        for factor in subject.factors().values():
            factor.normal_(std=0.5) if fill else None
    return subject


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_agrees_with_float64_and_merged_is_the_plain_models_operators(case: str):
    subject = make_subject(case)
    model, plain, x = subject.model, subject.plain, subject.x
    wide = {name: factor.detach().double().requires_grad_() for name, factor in subject.factors().items()}
    wanted, found = subject.on_sum(wide), model(x)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    assert (found - plain(x)).abs().max() > 1e-2
    upstream = torch.randn(found.shape)
    wanted.backward(upstream.double())
    found.backward(upstream)
    for name, factor in subject.factors().items():
        assert factor.grad is not None, name
        assert factor.grad.abs().max() > 1e-3
        torch.testing.assert_close(factor.grad.double(), wide[name].grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        unmerged = model(x)
        with merged(model):
            torch.testing.assert_close(model(x), unmerged, atol=1e-5, rtol=1e-5)
            assert operators(model, x) == operators(plain, x)
        with disable_adapter(model):
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize(("case", "end"), covering([*CASES], [unload, merge_and_unload], meet=1))
def test_a_reader_is_plain_again_after(case: str, end: Callable[[nn.Module], Any]):
    build, targets = CASES[case]
    model, x = Around(build()), torch.randn(3, 4, D)
    before, output = trace(model), model(x)
    inject(model, LoRAConfig(r=R, target_modules=targets))
    assert type(model.reader) is not build
    merge(model)
    unmerge(model)
    model(x)
    end(model)
    assert trace(model) == before
    assert torch.equal(model(x), output)


@pytest.mark.parametrize(
    ("case", "copied"), covering(["read and called beside", "methods", "inside"], [by_pickle, copy.deepcopy], meet=1)
)
def test_a_copy_of_a_reader_reads_its_own_layers(case: str, copied: Callable[[nn.Module], nn.Module]):
    subject = make_subject(case)
    twin, before = copied(subject.model), subject.model(subject.x)
    assert torch.equal(twin(subject.x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(subject.model(subject.x), before)
    unload(subject.model)
    assert torch.equal(twin(subject.x), torch.zeros_like(before))


def test_a_reader_sees_its_layer_in_all_but_the_weight():
    class Curious(Reads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.proj, nn.Linear)
            assert self.proj.in_features == D
            assert dict(self.named_modules())["proj"].bias is self.proj.bias
            assert self.proj.weight is self.proj.weight  # computed once
            self.proj.last = x
            return super().forward(x)

    model = Curious()
    layer, weight = model.proj, model.proj.weight
    inject(model, LoRAConfig(r=R))
    x = torch.randn(2, D)
    model(x)
    assert layer.last is x
    assert model.proj is layer
    assert model.proj.weight is weight


def test_an_exception_in_a_reader_leaves_its_layers():
    model = Reads()
    layer = model.proj
    inject(model, LoRAConfig(r=R))
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, D + 1))
    assert model.proj is layer
    assert list(dict(model.named_modules())) == ["", "proj"]


def test_transformers_t5_has_no_reader_and_mamba_trains_through_its_own():
    from transformers import MambaConfig, MambaModel, T5Config, T5Model

    t5 = T5Model(T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1))
    model = MambaModel(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2))
    inject(t5, LoRAConfig(r=R))
    inject(model, LoRAConfig(r=R, target_modules=["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]))
    assert not [name for name, module in t5.named_modules() if isinstance(module, LoRAReader)]
    assert [name for name, module in model.named_modules() if isinstance(module, LoRAReader)] == ["layers.0.mixer"]
    tokens = torch.randint(9, (2, 5))
    model(tokens, use_cache=False).last_hidden_state.square().sum().backward()
    factors = {name: p for name, p in model.named_parameters() if name.endswith("lora_B")}
    assert all(factor.grad is not None and factor.grad.any() for factor in factors.values())
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(std=0.3)
        unmerged = model(tokens, use_cache=False).last_hidden_state
        with merged(model):
            torch.testing.assert_close(model(tokens, use_cache=False).last_hidden_state, unmerged, atol=1e-5, rtol=0)


def test_dropout_of_the_adapter_acts_where_the_weight_is_read():
    subject = make_subject("read", lora_dropout=0.5)
    first, second = subject.model(subject.x), subject.model(subject.x)
    assert not torch.equal(first, second)
    subject.model.eval()
    assert torch.equal(subject.model(subject.x), subject.model(subject.x))


def test_a_reader_is_compiled_in_one_graph_and_merged_in_the_plain_models(monkeypatch):
    start_anew(monkeypatch)
    subject = make_subject("read and called beside")
    wanted = subject.model(subject.x)
    compiled = torch.compile(subject.model, backend=Recorder(), fullgraph=True)
    found = compiled(subject.x)
    torch.testing.assert_close(found, wanted)
    gradients = []
    for output in (wanted, found):
        output.square().sum().backward()
        gradients.append([factor.grad.clone() for factor in subject.factors().values()])
        subject.model.zero_grad()
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)
    assert not [child for child in subject.model.modules() if type(child) is LayerView]
    graphs = []
    for model in (subject.model.requires_grad_(False), subject.plain):
        torch._dynamo.reset()
        recorder = Recorder()
        with merged(model) if model is subject.model else torch.no_grad():
            torch.compile(model, backend=recorder, fullgraph=True)(subject.x)
        graphs.append(recorder.code())
    assert graphs[0] == graphs[1]


def test_a_thread_in_a_reader_reads_the_sum_after_another_has_left_it():
    class Slow(Reads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            entered.set()
            time.sleep(0.05 if threading.current_thread() is threads[0] else 0.2)
            return super().forward(x)

    model, x, outputs, entered = Slow(), torch.randn(2, D), [], threading.Event()
    inject(model, LoRAConfig(r=R, init_lora_weights=False))
    threads = [threading.Thread(target=lambda: outputs.append(model(x).detach())) for _ in range(2)]
    threads[0].start()
    entered.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert torch.equal(*outputs)


# --- reads that the source does not show at self: their adapters are named, because no gradient reaches them ---


class ByVariable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.proj
        return self.out(F.linear(x, layer.weight, layer.bias))


def test_an_adapter_whose_weight_is_read_out_of_reach_is_named():
    model = ByVariable()
    inject(model, LoRAConfig(r=R))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    model(torch.randn(2, D)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="'proj'"):
        merge(model)


def test_a_class_without_source_keeps_its_class():
    namespace: dict[str, Any] = {"ByVariable": ByVariable}
    exec("class Typed(ByVariable):\n    def forward(self, x):\n        return x @ self.proj.weight.T", namespace)
    inject(model := namespace["Typed"](), LoRAConfig(r=R))
    assert not isinstance(model, LoRAReader)


class TFT(L.LightningModule):
    """As neuralforecast's: a file names the class, which a table of classes finds again."""

    def __init__(self, size: int = D) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.proj = nn.Linear(size, size)

    def look_up(self) -> torch.Tensor:
        return self.proj.weight[1:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) @ self.look_up().T


CLASSES = {"TFT": TFT}


def test_a_program_that_goes_by_the_class_of_a_model_finds_it(tmp_path: Path):
    inject(model := TFT(), LoRAConfig(r=R, init_lora_weights=False))
    assert type(model) is not TFT
    again = CLASSES[type(model).__name__](**model.hparams)
    assert type(again) is TFT
    of_its_class = type(model)(**model.hparams)
    of_its_class.load_state_dict(again.state_dict())
    x = torch.randn(2, D)
    assert torch.equal(of_its_class(x), again(x))
    inject(of_its_class, LoRAConfig(r=R, init_lora_weights=False))
    unload(of_its_class)
    assert type(of_its_class) is TFT
    assert torch.equal(of_its_class(x), again(x))


class Nested:
    class Own(nn.Linear):
        """A user's layer, in a class."""


def all_kinds() -> nn.Module:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(D, D),
            "own": Nested.Own(D, D),
            "conv": nn.Conv1d(D, D, 3),
            "table": nn.Embedding(9, D),
            "rows": nn.Embedding(9, D),
            "attention": nn.MultiheadAttention(D, 2),
            "lstm": nn.LSTM(D, D),
            "reader": Reads(),
        }
    )
    inject(
        model,
        LoRAConfig(
            r=R,
            target_modules=["linear", "own", "conv", "table", "attention", "proj"],
            target_parameters=["weight_ih_l0"],
            trainable_token_indices={"rows": [1]},
        ),
    )
    return model


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, by_pickle])
def test_a_swapped_class_is_called_as_the_one_that_it_replaces(copied: Callable[[nn.Module], nn.Module]):
    model = copied(all_kinds())
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    assert len(swapped) == 10  # attention's out_proj and the reader's layer too
    for module in swapped:
        cls, base = type(module), module.lora_base
        assert cls is not base
        assert isinstance(module, base)
        assert [cls.__name__, cls.__qualname__, cls.__module__] == [base.__name__, base.__qualname__, base.__module__]
    assert "LoRA" not in repr(model)
    names = [(name, type(module).__name__) for name, module in model.named_modules()]
    unload(model)
    assert not [module for module in model.modules() if isinstance(module, Swapped)]
    assert [(name, type(module).__name__) for name, module in model.named_modules()] == names


class ReadsNormFirst(nn.Module):
    """Reads its weight without a graph, as weight normalisation by a constant does, and then with one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            norm = self.proj.weight.norm()
        return F.linear(x, self.proj.weight) / norm


def test_a_first_reading_without_a_graph_takes_no_gradient_from_the_second():
    torch.manual_seed(0)
    model, x = ReadsNormFirst(), torch.randn(3, 4)
    inject(model, LoRAConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    with merged(model):
        expected = model(x)
    (output := model(x)).square().sum().backward()
    torch.testing.assert_close(output, expected)
    a, b = (model.proj.get_parameter(name) for name in ("lora_A", "lora_B"))
    weight = (model.proj.weight + 4 * b @ a).detach().requires_grad_()
    (F.linear(x, weight) / weight.detach().norm()).square().sum().backward()
    torch.testing.assert_close(b.grad, 4 * weight.grad @ a.detach().T)


class ReadsInSegments(nn.Module):
    """Reads in a reentrant segment: in a method, which the segment runs again with a view, or in a function."""

    def __init__(self, segment: str) -> None:
        super().__init__()
        self.proj, self.segment = nn.Linear(D, D, bias=False), segment

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def function(x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.proj.weight).tanh()

        scale = self.proj.weight.norm()  # forward has a view too
        if self.segment == "none":
            return scale * self._method(x)
        return scale * checkpoint(function if self.segment == "function" else self._method, x, use_reentrant=True)

    def _method(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.proj.weight).tanh()


def reading_in_segments(segment: str) -> nn.Module:
    torch.manual_seed(0)
    model = ReadsInSegments(segment)
    inject(model, LoRAConfig(r=R, target_modules=["proj"], init_lora_weights=False), seed=0)
    return model


@pytest.mark.parametrize("around", [False, True])
def test_a_method_that_reads_in_a_reentrant_segment_has_the_gradients_of_the_plain_pass(around: bool):
    x = torch.randn(3, D, requires_grad=True)
    gradients = []
    for segment in ("none", "method"):
        model = reading_in_segments(segment)
        output = checkpoint(model, x, use_reentrant=True) if around and segment == "method" else model(x)
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_function_that_reads_in_a_reentrant_segment_is_refused_where_its_gradients_would_be_wrong():
    model, x = reading_in_segments("function"), torch.randn(3, D, requires_grad=True)
    with pytest.raises(LoRAError, match=r"'proj': its weight is read in a function .* Make the function a method"):
        model(x)
    assert isinstance(model.proj, nn.Linear)
    assert not isinstance(model.proj, LayerView)
    expected = reading_in_segments("none")
    for result, other in ((model, expected), (unload_copy(model), unload_copy(expected))):
        with torch.no_grad():
            torch.testing.assert_close(result(x), other(x))
    with merged(model), merged(expected):
        torch.testing.assert_close(model(x), expected(x))


def unload_copy(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    unload(plain)
    return plain
