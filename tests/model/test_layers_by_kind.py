""" "all-layers": convolutions and attention beside what "all-linear" adapts, as far as a PEFT folder can hold them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    save_adapter,
    summary,
)
from support.runs.notices import PEER_NOTICES
from support.runs.training import own_random_stream

pytestmark = [pytest.mark.filterwarnings(notice) for notice in PEER_NOTICES]


class CNN(nn.Module):
    """A stem, a residual block with a 1x1 shortcut, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8))
        self.block = nn.ModuleDict({"conv": nn.Conv2d(8, 12, 3, padding=1), "shortcut": nn.Conv2d(8, 12, 1)})
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.fc((self.block["conv"](x) + self.block["shortcut"](x)).relu().mean((-1, -2)))


class Depthwise(nn.Module):
    """A block as MobileNet's and ConvNeXt's: a convolution with a group for each channel, then one of 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pointwise(self.depthwise(self.stem(x)).relu()).relu().mean((-1, -2)))


class ViT(nn.Module):
    """Patches, a block as torchvision's, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc((x + self.mlp(x)).mean(1))


class Cross(nn.Module):
    """Attention whose keys have another width, which PEFT cannot adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Conv1d(3, 6, 3)
        self.queries = nn.Conv3d(1, 8, 2, stride=(3, 2, 2), padding=(0, 0, 0))
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.table = nn.Embedding(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys = self.queries(x[:, None]).flatten(2).mT, self.keys(x.flatten(2)).mT
        return self.attention(queries + self.table.weight[0], keys, keys)[0].mean(1)


LAYERS: dict[Callable[[], nn.Module], tuple[list[str], dict[str, str]]] = {  # what is adapted, and what is left out
    CNN: (["stem.0", "block.conv", "block.shortcut", "fc"], {}),
    Depthwise: (["stem", "pointwise", "fc"], {"depthwise": "PEFT cannot adapt a convolution with groups"}),
    ViT: (["patches", "attention", "attention.out_proj", "mlp.0", "mlp.2", "fc"], {}),
    Cross: (
        ["keys", "queries"],
        {
            "attention": "PEFT cannot adapt attention with q, k and v apart",
            "attention.out_proj": "PEFT cannot adapt the out_proj of attention with q, k and v apart",
        },
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "loha": {"variant": "loha"},
}

EFFECT = {"init_lora_weights": False}  # adapters that change the outputs before any training


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with own_random_stream(1):
        return build().eval()


def images() -> torch.Tensor:
    with own_random_stream(2):
        return torch.randn(2, 3, 8, 8)


def config(**options: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-layers"} | options)


def left_out(model: nn.Module) -> dict[str, str]:
    return {name: each.reason for each in summary(model).left_out for name in each.names}


@pytest.mark.parametrize("build", LAYERS)
def test_all_layers_adapts_convolutions_and_attention_and_says_what_it_leaves_out(build, caplog):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    adapted, reasons = LAYERS[build]
    model = built(build)
    assert inject(model, config()) == adapted
    assert left_out(model) == reasons
    for name, reason in reasons.items():
        assert f"lightning_lora: {name} is left out of 'all-layers': {reason}." in caplog.text
    assert ("all-layers" in str(summary(model))) == bool(reasons)


@pytest.mark.parametrize(
    ("build", "variant"), [(CNN, "pissa"), (Depthwise, "dora"), (Depthwise, "loha"), (ViT, "lora"), (Cross, "loha")]
)
def test_what_all_layers_adapts_can_be_written_for_peft_and_read_back(build, variant, tmp_path):
    names = inject(model := built(build), config(**EFFECT | VARIANTS[variant]))
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == [name for name in names if not name.endswith("out_proj")]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(built(build), tmp_path).eval()(images())
        torch.testing.assert_close(theirs, model(images()), rtol=1e-4, atol=1e-5)
        load_adapter(loaded := built(build), tmp_path)
        torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "options", "reasons"),
    [
        (ViT, {"use_dora": True}, {"attention": "PEFT cannot adapt attention with use_dora"}),
        (Depthwise, {"variant": "loha"}, {}),  # PEFT's LoHa changes a weight as it is stored, with groups too
        (Cross, {"variant": "loha"}, {"queries": "variant='loha' is for linear layers, nn.Conv1d and nn.Conv2d alone"}),
    ],
)
def test_a_variant_leaves_out_the_kinds_that_it_cannot_adapt(build, options, reasons):
    inject(model := built(build), config(**options))
    found = left_out(model)
    assert bool(found) == bool(reasons)
    assert [name for name, reason in reasons.items() if not found[name].startswith(reason)] == []


@pytest.mark.parametrize("targets", ["all-layers", "all-linear"])
def test_a_conv1d_that_the_variant_cannot_adapt_is_left_out(targets):
    model = nn.ModuleDict({"conv1d": Conv1D(4, 4), "linear": nn.Linear(4, 4)})
    assert inject(model, LoRAConfig(r=1, target_modules=targets, variant="loha")) == ["linear"]
    assert left_out(model)["conv1d"].startswith("variant='loha' is for linear layers, nn.Conv1d and nn.Conv2d alone")


def test_the_convolution_of_mamba_whose_weight_peft_would_pass_over_is_left_out(tmp_path):
    small = transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2)

    def build() -> nn.Module:
        return transformers.MambaForCausalLM(small)

    names = inject(model := built(build), config())
    assert not [name for name in names if name.endswith(("conv1d", "out_proj"))]
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.add_(0.1)
        save_adapter(model, tmp_path)
        theirs, tokens = peft.PeftModel.from_pretrained(built(build), tmp_path).eval(), torch.arange(9)[None]
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-4)


def test_the_classifier_of_a_model_of_timm_is_left_out_and_no_other():
    of_timm = type("OfTimm", (CNN,), {"__module__": "timm.models.net", "get_classifier": lambda net: net.fc})
    mine = type("Mine", (CNN,), {"get_classifier": lambda self, argument: None})
    names = inject(model := built(of_timm), config())
    assert "fc" not in names
    assert left_out(model)["fc"] == "it is the output head"
    assert len(left_out(model)) + len(names) == 4
    with pytest.raises(LoRAError, match=r"'fc' is left out: it is the output head; target_modules can"):
        inject(built(of_timm), config(target_modules="all-linear"))
    assert inject(built(mine), config()) == LAYERS[CNN][0]
