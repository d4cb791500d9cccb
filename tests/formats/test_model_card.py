"""The model card beside an adapter, read with huggingface_hub's own reader of cards."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from lightning_lora import (
    LoRAConfig,
    export_adapter,
    inject,
    load_adapter,
    save_adapter,
)
from support.models.networks import checkpoint
from support.models.peers import edit, model, ours, seeded
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


def base() -> nn.Module:
    net: nn.Module = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    return net


def small(**options: Any) -> nn.Module:
    net = base()
    inject(net, LoRAConfig(**{"r": 2, **options}))
    return net


def test_card_of_an_adapter_tells_its_base_and_how_to_load_it(tmp_path):
    ours("llama", tmp_path, task_type="CAUSAL_LM")
    edit(tmp_path, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    load_adapter(net := model("llama"), tmp_path)
    save_adapter(net, tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "meta-llama/Llama-3.2-1B",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:meta-llama/Llama-3.2-1B", "lora", "lightning"],
    }
    assert "# LoRA adapter of `meta-llama/Llama-3.2-1B`" in card.text
    first, second = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for block in (first, second):
        compile(block, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")' in first
    assert "PeftModel.from_pretrained(base, folder)" in first
    assert "load_adapter(base, folder)" in second


class Around(L.LightningModule):
    """A network in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = base()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


@pytest.mark.parametrize("door", ["save_adapter", "plain"])
def test_the_card_alone_names_the_network_that_peft_loads_onto(tmp_path, caplog, door: str):
    """PEFT loads nothing onto the LightningModule around it: it warns, and runs the base."""
    inject(module := Around(), LoRAConfig(r=2, init_lora_weights=False))
    folder, expected = str(tmp_path / "folder"), module(x := torch.randn(3, 8))
    torch.save(checkpoint(module, "adapter"), tmp_path / "a.ckpt")
    with caplog.at_level(logging.INFO):
        if door == "save_adapter":
            save_adapter(module, folder)
        else:
            export_adapter(tmp_path / "a.ckpt", folder, plain=True)
    assert not caplog.text
    text = (Path(folder) / "README.md").read_text()
    assert "base = module.net  # " in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names := {"module": Around(), "folder": folder, "base": (net := base())})
        torch.testing.assert_close(names.get("model", net)(x), expected)


def test_base_that_is_no_name_of_a_repository_is_no_field_of_the_card(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(small(), "first")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    expected = {"library_name": "peft", "tags": ["lora", "lightning"]}
    for base in ("a\n---\nlicense: mit", 'x"y', "a: b", "/home/me/llama", "../llama", "a/b/c", "", "models/llama"):
        edit(Path("first"), base_model_name_or_path=base)
        shutil.rmtree("again", ignore_errors=True)
        export_adapter("first", "again")
        assert ModelCard.load("again/README.md").data.to_dict() == expected


@pytest.mark.parametrize("case", ["the card of an adapter before", "a person's", "a link", "a folder"])
def test_readme_that_is_there_stays(tmp_path, case: str):
    path = tmp_path / "folder"
    save_adapter(small(), path)
    card = path / "README.md"
    if case != "the card of an adapter before":
        card.unlink()
    if case == "a link":
        card.symlink_to(tmp_path / "nowhere")
    elif case == "a folder":
        card.mkdir()
    elif case == "a person's":
        card.write_bytes(b"# mine\n")
    before = card.read_bytes() if card.is_file() else None
    save_adapter(small(r=1, use_dora=True), path)
    assert card.is_dir() == (case == "a folder")
    assert card.is_symlink() == (case == "a link")
    assert (card.read_bytes() if card.is_file() else None) == before


@pytest.mark.parametrize("classes", [3, 10])
def test_the_card_tells_the_size_of_a_head_that_was_trained_whole(tmp_path, classes: int):
    net = nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": nn.Linear(8, classes)})
    inject(net, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["classifier"]))
    save_adapter(net, tmp_path / "a")
    text = " ".join((tmp_path / "a" / "README.md").read_text().split())
    assert f"fully trained modules: `classifier` (8 to {classes})" in text
    assert f"num_labels={classes}" in text
    save_adapter(small(), tmp_path / "b")
    assert "fully trained" not in (tmp_path / "b" / "README.md").read_text()
