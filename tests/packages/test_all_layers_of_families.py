"""Families of torchvision and timm under target_modules="all-layers": what share of the parameters is adapted, what is
left out, a step of training, the merge, the folder in PEFT, and new heads.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, merged, save_adapter, summary, unload
from lightning_lora.model.heads import warn_of_new_heads
from support.runs.notices import PEER_NOTICES
from support.runs.training import own_random_stream

pytestmark = [pytest.mark.packages, *(pytest.mark.filterwarnings(notice) for notice in PEER_NOTICES)]

GROUPS, HEAD = "PEFT cannot adapt a convolution with groups", "it is the output head"


# Of each model: the size of its images, the least share of parameters in adapted layers, and why others are left out.
FAMILIES: dict[str, tuple[int, float, set[str]]] = {
    "torchvision resnet18": (64, 0.99, set()),
    "torchvision densenet121": (64, 0.98, set()),
    "torchvision convnext_tiny": (64, 0.98, {GROUPS}),
    "torchvision efficientnet_b0": (64, 0.94, {GROUPS}),
    "torchvision mobilenet_v3_small": (64, 0.95, {GROUPS}),
    "torchvision swin_t": (64, 0.99, set()),
    "torchvision vit": (32, 0.97, set()),
    "timm convnext_atto": (64, 0.96, {GROUPS, HEAD}),
    "timm efficientnet_b0": (64, 0.94, {GROUPS, HEAD}),
    "timm vit_tiny_patch16_224": (64, 0.98, {HEAD}),
    "timm swin_tiny_patch4_window7_224": (224, 0.99, {HEAD}),
    "timm maxvit_nano_rw_256": (64, 0.99, {GROUPS, HEAD}),
    "timm deit_tiny_distilled_patch16_224": (64, 0.98, {HEAD}),  # with two heads
}
RESIZED = ("vit_tiny", "maxvit_nano", "deit_tiny")  # how names begin of timm's models that are built for smaller images
BY_A_FUNCTION = "torchvision swin_t"  # its attention hands its weights to a function, and so passes over PEFT's layers


def build(family: str) -> nn.Module:
    """Return the model, always with the same weights, and BatchNorms that fit these."""
    package, name = family.split()
    size, _, _ = FAMILIES[family]
    with own_random_stream(1):
        if name == "vit":
            model = import_module("torchvision.models").VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=5)
            nn.init.normal_(model.heads.head.weight)  # which torchvision makes zero
        elif package == "torchvision":
            model = getattr(import_module("torchvision.models"), name)(num_classes=5)
        else:
            options = {"img_size": size} if name.startswith(RESIZED) else {}
            model = import_module("timm").create_model(name, pretrained=False, num_classes=5, **options)
        norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.train().momentum = 1.0
        with torch.no_grad():
            model(torch.randn(4, 3, size, size))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_adapted_nearly_whole_and_trains_merges_is_restored_and_read_by_peft(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    size, least, reasons = FAMILIES[family]
    model, x = build(family), torch.randn(2, 3, size, size)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {"r": 2, "lora_alpha": 0.5, "init_lora_weights": False}
    adapted = set(inject(model, LoRAConfig(target_modules="all-layers", **options)))
    found = sum(value.numel() for name, value in base.items() if name.rpartition(".")[0] in adapted)
    share = found / sum(value.numel() for value in base.values())
    left_out = summary(model).left_out
    with capsys.disabled():
        reached = f"{share:.1%} of the parameters are in {len(adapted)} adapted layers"
        print(f"\n{family}: {reached}", *(f"{each.share:.1%} left out ({each.reason})" for each in left_out), sep="; ")
    assert share >= least
    assert {each.reason for each in left_out} == reasons

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model(x)
    before.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = model(x)
        close = {"rtol": 1e-3, "atol": 1e-4 * float(trained.abs().max())}
        assert not torch.allclose(trained, before, **close)
        with merged(model):
            torch.testing.assert_close(model(x), trained, **close)
    now = dict(model.named_parameters())
    assert [name for name, value in base.items() if not torch.equal(now[name], value)] == []

    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(x), trained, **close) == (family != BY_A_FUNCTION)


TWO_HEADS = ["head", "head_dist"]
NEW_HEADS = {  # the names that modules_to_save needs
    "torchvision resnet18": ["fc"],
    "torchvision densenet121": ["classifier"],
    "torchvision convnext_tiny": ["classifier.2"],
    "torchvision efficientnet_b0": ["classifier.1"],
    "torchvision mobilenet_v3_small": ["classifier.3"],
    "torchvision swin_t": ["head"],
    "torchvision vit": ["heads.head"],
    "timm convnext_atto": ["head.fc"],
    "timm efficientnet_b0": ["classifier"],
    "timm vit_tiny_patch16_224": ["head"],
    "timm deit_tiny_distilled_patch16_224": TWO_HEADS,
}


@pytest.mark.parametrize("family", NEW_HEADS)
def test_a_new_head_of_a_family_is_named_until_it_is_trained_whole(family: str):
    """Neither tells whether weights were loaded into it, so the summary names it as frozen and nothing warns."""
    names = NEW_HEADS[family]
    inject(model := build(family), LoRAConfig(r=1, target_modules="all-layers"))
    warn_of_new_heads(list(model.named_modules()))  # warnings are errors
    assert summary(model).frozen_head.endswith(f"if new: modules_to_save={names}")

    unload(model)
    inject(model, LoRAConfig(r=1, target_modules="all-layers", modules_to_save=names))
    warn_of_new_heads(list(model.named_modules()))  # warnings are errors
    assert summary(model).frozen_head == ""


@pytest.mark.parametrize("family", ["resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_head_of_timms_own_weights_is_not_called_new(family: str):
    model = import_module("timm").create_model(family, pretrained=False)
    inject(model, LoRAConfig(r=1, target_modules="all-layers"))
    warn_of_new_heads(list(model.named_modules()))  # warnings are errors
