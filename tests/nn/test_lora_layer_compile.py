"""torch.compile and torch.export: right outputs, two graphs, the base's graph while merged."""

from __future__ import annotations

import copy
import functools
import shutil
from abc import ABC

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    inject,
    merge,
    unmerge,
)
from support.covering import covering
from support.models.networks import randomise_
from support.runs.notices import TORCH_NOTICES
from support.runs.recorders import Recorder, start_anew

pytestmark = TORCH_NOTICES


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    start_anew(monkeypatch)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class Activated(ABC, nn.Linear):
    """Has a forward of its own, and a first base without a __dict__."""

    def forward(self, x):
        return super().forward(x).relu()


def sequence(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


MIXED, SOURCE, IMAGE = sequence(3, 8).double(), sequence(2, 5, 8).double(), sequence(2, 4, 9).double()
TOKENS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(5))
PADDING = torch.arange(5) >= torch.tensor([[5], [3]])
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (MIXED,), {}),
    "fused": (lambda: Conv1D(6, 8), (MIXED,), {"enable_lora": {"layer": [True, False, True]}}),
    "dora": (lambda: nn.Linear(8, 6), (MIXED,), {"use_dora": True}),
    "own_linear": (lambda: Activated(8, 6), (MIXED,), {}),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=1, scale_grad_by_freq=True), (TOKENS,), {}),
    "conv": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (IMAGE,), {}),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (SOURCE,) * 3, {}),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        (SOURCE, None, PADDING),
        {"target_modules": "all-linear"},
    ),
}


def layer_and_options(kind: str) -> tuple[Around, tuple, LoRAConfig]:
    make, args, options = LAYERS[kind]
    config = LoRAConfig(**{"r": 2, "target_modules": ["layer"], "lora_dropout": 0.5, **options})
    return Around(make()).double().requires_grad_(False), args, config


def answers(model, args) -> torch.Tensor:
    torch.manual_seed(7)  # for dropout
    found = model(*args)
    return found[~PADDING] if args[-1] is PADDING else found  # torch's fast path leaves padded places empty


@pytest.mark.parametrize(
    ("kind", "training"),
    covering([*LAYERS], [False, True], meet=1, fits=lambda kind, training: not (training and "encoder" in kind)),
)
def test_each_layer_has_two_graphs_and_the_merged_one_is_that_of_the_base(kind, training):
    model, args, config = layer_and_options(kind)
    model.train(training)
    with torch.set_grad_enabled(training):
        plain, recorder = Recorder(), Recorder()
        expected = answers(torch.compile(copy.deepcopy(model), backend=plain, fullgraph=True), args)
        compiled = torch.compile(model, backend=recorder, fullgraph=True)
        if training:  # then the plain model was compiled before
            assert torch.equal(answers(compiled, args), expected)
        before = len(recorder.graphs)
        inject(model, config)
        randomise_(model, 0.5)
        for _ in range(2):
            factored = answers(compiled, args)
            close(factored, answers(model, args))
            if not training:
                assert (factored - expected).abs().max() > 0.01  # the adapter matters
            merge(model)
            close(answers(compiled, args), answers(model, args))
            unmerge(model)
        assert len(recorder.graphs) - before == 2
        assert recorder.code() == plain.code()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Eager evaluation may take torch's fast path where the compiled one does not."""
    tolerance = 1e-12 if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_varying_batch_sizes_need_no_more_graphs_than_the_base():
    counts = {}
    for state in ("base", "factored", "merged"):
        torch._dynamo.reset()
        model, recorder = Around(nn.Linear(8, 6)), Recorder()
        if state != "base":
            inject(model, LoRAConfig(r=2))
            randomise_(model)
        if state == "merged":
            merge(model)
        compiled = torch.compile(model, backend=recorder, fullgraph=True)
        for size in (4, 3, 7, 2, 3):
            x = sequence(size, 8)
            assert torch.equal(compiled(x), model(x))
        counts[state] = len(recorder.graphs)
    assert set(counts.values()) == {counts["base"]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_eager_outputs_unmerged_and_merged():
    model = nn.Sequential(nn.Linear(7, 5))
    inject(model, LoRAConfig(r=2))
    randomise_(model, 0.5)
    compiled, x = torch.compile(model, fullgraph=True), sequence(3, 7)
    with torch.no_grad():
        factored = compiled(x)
        close(factored, model(x))
        merge(model)
        close(compiled(x), factored)
        close(compiled(x), model(x))


# --- torch.export ---


def operations(program) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in program.graph.nodes if node.op != "placeholder"]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects happened")  # W' stands in for W
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merged_model_exports_as_the_base_does(tmp_path, strict):
    base = nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), Activated(8, 8))
    base = base.double().eval().requires_grad_(False)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(r=2, target_modules=["0", "self_attn", "linear1", "2"]))
    randomise_(model, 0.5)
    export = functools.partial(torch.export.export, args=(TOKENS,), strict=strict)
    plain, unmerged = export(base), export(model)
    close(unmerged.module()(TOKENS), model(TOKENS))
    assert operations(unmerged) != operations(plain)
    merge(model)
    program, expected = export(model), model(TOKENS)
    assert operations(program) == operations(plain)
    torch.export.save(program, tmp_path / "merged.pt2")
    loaded = torch.export.load(tmp_path / "merged.pt2")
    close(loaded.module()(TOKENS), expected)
    assert (expected - base(TOKENS)).abs().max() > 0.01
