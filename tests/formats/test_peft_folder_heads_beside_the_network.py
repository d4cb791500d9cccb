"""A LightningModule that trains a head beside a transformers model: names in a folder, and what it says of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, export_adapter, inject, load_adapter, save_adapter, take_adapter
from lightning_lora.formats import peft_folder
from support.notices import TORCH_NOTICES, quiet_peers
from support.peers import SMALL, config_of, fill_, seeded
from support.pretrained import Lit, token_loader, tokens

pytestmark = [*quiet_peers, *TORCH_NOTICES]
WHOLE = (
    r"outside of the transformers model 'model' was trained too.* those of the whole LightningModule.*\(Net\(\), path"
)
ALONE = r".*save_adapter\(module\.model, path\) writes the adapter"


class Headed(Lit):
    """A body of transformers and a head of one's own."""

    def __init__(self) -> None:
        config = transformers.BertConfig(**SMALL)
        super().__init__(model=seeded(lambda: transformers.BertModel(config).eval()))
        self.model.eval()
        self.head = seeded(lambda: nn.Linear(SMALL["hidden_size"], 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.model(x).pooler_output)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()


class Inside(L.LightningModule):
    """The same inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.body, self.net.head = (lambda all: (all.model, all.head))(Headed())


def trained(build: Callable[[], Any] = Headed, **options: Any) -> Any:
    module = build()
    inject(module, LoRAConfig(r=2, **{"target_modules": ["query"], "modules_to_save": ["head"], **options}))
    return fill_(module)


def checkpoint(path: Path) -> Path:
    options: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["head"]}
    trainer = L.Trainer(max_steps=1, callbacks=[LoRACallback(r=2, **options)], barebones=True, accelerator="cpu")
    trainer.fit(Headed().train(), token_loader())
    trainer.save_checkpoint(path / "best.ckpt")
    return path / "best.ckpt"


DOORS: dict[str, Callable[[Path], Any]] = {
    "model": lambda path: save_adapter(trained(), path),
    "adapter in memory": lambda path: save_adapter(take_adapter(trained()), path),
    "checkpoint": lambda path: export_adapter(checkpoint(path.parent), path),
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are shown to the user when a folder is written."""
    lines: list[str] = []
    monkeypatch.setattr(peft_folder, "tell", lines.append)
    return lines


@pytest.mark.parametrize("door", DOORS)
def test_folder_with_a_head_tells_that_peft_loads_it_onto_the_whole_module(tmp_path, told, door: str):
    DOORS[door](tmp_path / "folder")
    assert re.search(WHOLE + ALONE, told.pop())
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "\n# build base here: the whole LightningModule, not its model alone\n" in card
    load_adapter(ours := Headed(), tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(Headed(), tmp_path / "folder")
    assert torch.allclose(theirs(tokens()), ours(tokens()), atol=1e-6)
    assert not torch.allclose(ours(tokens()), Headed()(tokens()), atol=1e-6)
    export_adapter(tmp_path / "folder", tmp_path / "again")
    assert re.search(WHOLE, told.pop())  # the folder itself tells it


def test_remedy_is_told_where_a_head_is_adapted_too(tmp_path, told):
    save_adapter(trained(target_modules=["query", "head"], modules_to_save=None), tmp_path)
    assert "needs a run that adapts no layer outside of it, as 'head' is." in told.pop()


def test_names_inside_another_module_are_told_as_those_of_that_module(tmp_path, told):
    expected = (
        r"'net\.body' was trained too.* those of the LightningModule's net.*PeftModel\.from_pretrained\(Net\(\)\.net"
    )
    save_adapter(trained(Inside), tmp_path)
    assert re.search(expected, told.pop())
    assert "# build base here: the LightningModule's net, not its body alone\n" in (tmp_path / "README.md").read_text()
    model = peft.PeftModel.from_pretrained(Inside().net, tmp_path)  # any name that is missing is a warning of peft's
    assert model.peft_config["default"].modules_to_save == ["head"]


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)


SILENT: dict[str, Callable[[], Any]] = {
    "the network alone": lambda: trained().model,
    "no transformers model": lambda: trained(Plain, target_modules=["0"]),
    "transformers model outside": lambda: trained(target_modules=["head"], modules_to_save=None),
    "no LightningModule": lambda: trained(lambda: nn.ModuleDict({"model": Headed().model, "head": nn.Linear(4, 2)})),
}


@pytest.mark.parametrize("case", SILENT)
def test_folder_that_peft_loads_as_expected_tells_nothing(tmp_path, told, case: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(SILENT[case](), tmp_path / "folder")
        export_adapter(tmp_path / "folder", tmp_path / "again")
    assert not told
    assert "the model that the adapter was trained on" in (tmp_path / "folder" / "README.md").read_text()


def test_card_of_a_network_in_a_lightning_module_names_the_network(tmp_path, told):
    save_adapter(trained(modules_to_save=None), tmp_path)
    assert not told
    assert "base = module.model  # " in (tmp_path / "README.md").read_text()


def test_network_saved_alone_names_no_head_and_is_read_by_all(tmp_path):
    module = trained()
    save_adapter(module.model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] is None
    expected = module.model(tokens()).pooler_output
    theirs = peft.PeftModel.from_pretrained(Headed().model, tmp_path)
    assert torch.allclose(theirs(tokens()).pooler_output, expected, atol=1e-6)
    for source in (tmp_path, take_adapter(module.model)):
        load_adapter(network := Headed().model, source)
        assert torch.equal(network(tokens()).pooler_output, expected)
    load_adapter(whole := Headed(), tmp_path)
    assert torch.equal(whole.head.weight, Headed().head.weight)
    assert not whole.head.weight.requires_grad


def test_entry_for_layers_that_a_model_has_not_is_not_written(tmp_path):
    with pytest.warns(UserWarning, match="passed over: target_modules: 'q_proj'"):
        module = trained(target_modules=["query", "q_proj"], modules_to_save=None)
    save_adapter(module, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["query"]
    theirs = peft.PeftModel.from_pretrained(Headed().model, tmp_path)
    assert torch.allclose(theirs(tokens()).pooler_output, module.model(tokens()).pooler_output, atol=1e-6)
