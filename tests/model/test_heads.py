"""Heads of models that are no transformers models: left out by "all-linear", named where they may be new."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_lora import LoRAConfig, inject, summary
from lightning_lora.model.heads import warn_of_new_heads
from support.models.peers import SMALL
from support.runs.notices import quiet_peers
from support.runs.training import CLASSES, FEATURES

pytestmark = quiet_peers
Build = Callable[[], nn.Module]
OUTPUT_HEAD = "it is the output head"


class OfTimm(nn.Module):
    """A model with what models of timm tell: get_classifier, num_classes, and pretrained_cfg of the weights to load."""

    def __init__(self, classes: int = CLASSES, stored: int | None = 1000) -> None:
        super().__init__()
        self.num_classes = classes
        if stored is not None:  # timm.create_model sets it, timm's classes do not
            self.pretrained_cfg: dict[str, Any] = {"num_classes": stored, "classifier": "fc"}
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU())
        self.fc = nn.Linear(8, classes) if classes else nn.Identity()

    def get_classifier(self) -> Any:
        return self.fc

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.body(x))


class WithTwoHeads(OfTimm):
    """As timm's DeiT and LeViT, whose heads have the linear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(8), "linear": nn.Linear(8, CLASSES)})

    def get_classifier(self) -> Any:
        return self.fc, self.head


for each in (OfTimm, WithTwoHeads):
    each.__module__ = "timm.models.net"  # by which they are recognised


def test_both_heads_of_timm_are_named_where_they_are_frozen():
    inject(model := WithTwoHeads(), LoRAConfig(r=2))
    assert summary(model).frozen_head == "fc, head are frozen; if new: modules_to_save=['fc', 'head']"


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL))


def in_transformers() -> nn.Module:
    """As transformers' wrapper of timm's models, which may hold other weights than timm's."""
    model = bert()
    model.add_module("timm_model", OfTimm())
    return model


SILENT = {
    "trained whole": (OfTimm, {"modules_to_save": ["fc"]}),
    "no head": (lambda: OfTimm(0), {}),
    "in transformers": (in_transformers, {}),
}


@pytest.mark.parametrize(("build", "options"), SILENT.values(), ids=SILENT)
def test_a_head_of_timm_that_is_trained_or_not_there_is_not_named(build: Build, options: dict[str, Any]):
    inject(model := build(), LoRAConfig(r=2, **options))
    assert summary(model).frozen_head == ""


@pytest.mark.parametrize("stored", [1000, CLASSES, None])
def test_a_frozen_head_of_timm_is_no_warning_as_weights_may_have_been_loaded_into_it(stored: int | None):
    """timm's pretrained_cfg has the number of classes of timm's weights, whatever the user loaded since."""
    model = OfTimm(stored=stored)
    model.load_state_dict(OfTimm().state_dict())
    inject(model, LoRAConfig(r=2))
    warn_of_new_heads(list(model.named_modules()))  # warnings are errors
    assert "fc is frozen; if new: modules_to_save=['fc']" in summary(model).short()


@pytest.mark.parametrize("targets", ["all-linear", "all-layers"])
def test_the_heads_that_timm_tells_are_left_out_and_named(targets: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="lightning_lora")
    model = nn.ModuleDict({"network": WithTwoHeads()})
    assert inject(model, LoRAConfig(r=2, target_modules=targets)) == ["network.body.0"]
    assert f"network.fc, network.head.linear are left out of '{targets}': {OUTPUT_HEAD}" in caplog.text
    assert [each.names for each in summary(model).left_out] == [("network.fc", "network.head.linear")]
    assert "it is the output head" in " ".join(str(summary(model)).split())


def classifier(name: str, outputs: int, after: int = 0) -> nn.Module:
    """A model whose last linear layer has this name."""
    model = nn.ModuleDict({"body": nn.Linear(8, 8)})
    owner: nn.Module = model
    *parents, leaf = name.split(".")
    for parent in parents:
        owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    owner.add_module(leaf, nn.Linear(8, outputs))
    if after:
        model["projection"] = nn.Linear(8, after)
    return model


FROZEN_HEADS = {  # each with the name that is said, or ""
    "resnet": (partial(classifier, "fc", 5), "fc"),
    "vgg": (partial(classifier, "classifier.6", 5), "classifier.6"),
    "in a module": (partial(classifier, "network.head", 200), "network.head"),
    "beside transformers": (lambda: nn.ModuleDict({"head": nn.Linear(8, 2), "body": bert()}), "head"),
    "another name": (partial(classifier, "overhead", 5), ""),
    "of ImageNet": (partial(classifier, "fc", 1000), "fc"),
    "of Kinetics": (partial(classifier, "fc", 400), "fc"),
    "of many tokens": (partial(classifier, "head", 32000), "head"),
    "not last": (partial(classifier, "fc", 5, after=5), ""),
    "of transformers": (bert, ""),
    "of timm": (OfTimm, "fc"),
}


@pytest.mark.parametrize(("build", "name"), FROZEN_HEADS.values(), ids=FROZEN_HEADS)
def test_the_summary_names_what_looks_like_a_frozen_head_of_a_model_that_tells_nothing(build: Build, name: str):
    inject(model := build(), LoRAConfig(r=1))
    found = summary(model)
    assert found.frozen_head.startswith(f"{name} is frozen" if name else "")
    assert bool(found.frozen_head) == bool(name)
    assert found.frozen_head.endswith(f"modules_to_save=['{name}']" if name else "")
    for text in (str(found), found.short()):
        assert found.frozen_head in " ".join(text.split())  # never cut
        assert max(map(len, text.split("\n"))) <= 80
    assert len(found.short().split("\n")) <= 10


def test_a_head_without_an_adapter_is_named_and_one_that_is_trained_whole_is_not():
    inject(frozen := classifier("fc", 5), LoRAConfig(r=1, target_modules=["body"]))
    assert summary(frozen).frozen_head == "fc is frozen; if new: modules_to_save=['fc']"
    assert "modules_to_save=['fc']" in summary(frozen).short()
    inject(trained := classifier("fc", 5), LoRAConfig(r=1, modules_to_save=["fc"]))
    assert summary(trained).frozen_head == ""
    assert not re.search(r"^\s+head ", str(summary(trained)), re.MULTILINE)
