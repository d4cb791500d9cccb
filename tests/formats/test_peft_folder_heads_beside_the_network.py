"""A LightningModule that trains a head beside a transformers model: names in a folder, and what it says of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAConfig, export_adapter, inject, load_adapter, save_adapter, take_adapter
from lightning_lora.formats import peft_folder
from support.models.peers import SMALL, config_of, fill_, seeded
from support.models.pretrained import Lit, tokens
from support.runs.notices import TORCH_NOTICES, quiet_peers

pytestmark = [*quiet_peers, *TORCH_NOTICES]


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


def trained(build: Callable[[], Any] = Headed, **options: Any) -> Any:
    module = build()
    inject(module, LoRAConfig(r=2, **{"target_modules": ["query"], "modules_to_save": ["head"], **options}))
    return fill_(module)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are shown to the user when a folder is written."""
    lines: list[str] = []
    monkeypatch.setattr(peft_folder, "tell", lines.append)
    return lines


def test_folder_with_a_head_tells_that_peft_loads_it_onto_the_whole_module(tmp_path, told):
    save_adapter(trained(), tmp_path / "folder")
    assert re.search(r"outside of .* 'model' was trained too.*save_adapter\(module\.model", told.pop())
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "\n# build base here: the whole LightningModule, not its model alone\n" in card
    load_adapter(ours := Headed(), tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(Headed(), tmp_path / "folder")
    assert torch.allclose(theirs(tokens()), ours(tokens()), atol=1e-6)
    assert not torch.allclose(ours(tokens()), Headed()(tokens()), atol=1e-6)
    export_adapter(tmp_path / "folder", tmp_path / "again")
    assert "was trained too" in told.pop()  # the folder itself tells it
    save_adapter(trained(target_modules=["query", "head"], modules_to_save=None), tmp_path / "adapted")
    assert "adapts no layer outside of it, as 'head' is" in told.pop()


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
