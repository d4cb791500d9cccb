"""The model card beside an adapter, read with huggingface_hub's own reader of cards."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAMonitor,
    combine,
    export_adapter,
    inject,
    load_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.formats import model_card, peft_folder
from support.models import checkpoint
from support.notices import quiet_peers
from support.peers import call, edit, model, ours, seeded, theirs

pytestmark = quiet_peers


def base() -> nn.Module:
    net: nn.Module = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    return net


def small(**options: Any) -> nn.Module:
    net = base()
    inject(net, LoRAConfig(**{"r": 2, **options}))
    return net


def saved(path: Path, **options: Any) -> str:
    save_adapter(small(**options), path)
    return (path / "README.md").read_text()


def test_card_of_an_adapter_tells_its_options_and_how_to_load_it(tmp_path):
    ours("llama", tmp_path, task_type="CAUSAL_LM")
    edit(tmp_path, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    load_adapter(net := model("llama"), tmp_path)
    save_adapter(net, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "meta-llama/Llama-3.2-1B",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:meta-llama/Llama-3.2-1B", "lora", "lightning"],
    }
    assert "# LoRA adapter of `meta-llama/Llama-3.2-1B`" in card.text
    assert "| adapted layers | 6 |" in card.text
    assert '| `target_modules` | `["q_proj", "v_proj", "down_proj"]` |' in card.text
    first, second = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for block in (first, second):
        compile(block, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")' in first
    assert "PeftModel.from_pretrained(base, folder)" in first
    assert "load_adapter(base, folder)" in second


def test_the_card_of_a_new_classifier_names_its_number_of_labels(tmp_path):
    import transformers

    config = transformers.BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    inject(net, LoRAConfig(r=1, task_type="SEQ_CLS"))
    save_adapter(net, tmp_path / "adapter")
    first = re.findall(r"```python\n(.*?)```", (tmp_path / "adapter/README.md").read_text(), re.DOTALL)[0]
    assert ", num_labels=3)" in first
    exec(first, scope := {"folder": str(tmp_path / "adapter")})
    assert isinstance(scope["model"], peft.PeftModel)


@pytest.mark.parametrize("task", model_card.TASKS)
def test_every_task_has_a_tag_and_a_class_of_transformers(task: str):
    import transformers

    assert hasattr(transformers, model_card.TASKS[task].auto_class)


def test_blocks_of_a_card_without_a_base_load_the_adapter(tmp_path):
    text = saved(tmp_path / "folder")
    assert "\n# build base here: the model that the adapter was trained on, with the weights that it had before" in text
    assert "..." not in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {"folder": str(tmp_path / "folder"), "base": (net := base())})
        assert any("lora_A" in name for name, _ in net.named_parameters())


class Around(L.LightningModule):
    """A network in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = base()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


@pytest.mark.parametrize("door", ["save_adapter", "export_adapter", "plain", "command"])
def test_the_card_alone_names_the_network_that_peft_loads_onto(tmp_path, caplog, capsys, door: str):
    """PEFT loads nothing onto the LightningModule around it: it warns, and runs the base."""
    inject(module := Around(), LoRAConfig(r=2, init_lora_weights=False))
    folder, expected = str(tmp_path / "folder"), module(x := torch.randn(3, 8))
    torch.save(checkpoint(module, "adapter"), tmp_path / "a.ckpt")
    with caplog.at_level(logging.INFO):
        if door == "save_adapter":
            save_adapter(module, folder)
        elif door == "command":
            call(capsys, "export", tmp_path / "a.ckpt", folder)
        else:
            export_adapter(tmp_path / "a.ckpt", folder, plain=door == "plain")
    assert not caplog.text
    text = (Path(folder) / "README.md").read_text()
    assert "base = module.net  # " in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names := {"module": Around(), "folder": folder, "base": (net := base())})
        torch.testing.assert_close(names.get("model", net)(x), expected)


HOSTILE = ["a\n---\nlicense: mit", 'x"y', "a: b", "/home/me/llama", "../llama", "~/llama", "a/b/c", "", "- x", "|`<!--"]


@pytest.mark.parametrize("base", HOSTILE)
def test_base_that_is_no_name_of_a_repository_is_no_field_of_the_card(tmp_path, base: str):
    save_adapter(small(), tmp_path)
    edit(tmp_path, base_model_name_or_path=base)
    export_adapter(tmp_path, tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["lora", "lightning"]}
    assert model_card.may_write_card(tmp_path / "again")


def test_base_that_is_a_folder_here_is_no_field_of_the_card(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(small(), "first")
    edit(Path("first"), base_model_name_or_path="models/llama")
    for expected in ("models/llama", None):
        export_adapter("first", "second")
        assert ModelCard.load("second/README.md").data.base_model == expected
        os.makedirs("models/llama", exist_ok=True)


def test_card_is_replaced_until_somebody_edits_it(tmp_path):
    assert "| `r` | 2 |" in saved(tmp_path)
    assert "| `r` | 1 |" in saved(tmp_path, r=1)
    edited = saved(tmp_path, r=1).replace("# LoRA adapter", "# My adapter")
    (tmp_path / "README.md").write_text(edited)
    assert saved(tmp_path) == edited
    (tmp_path / "README.md").unlink()
    assert "| `r` | 2 |" in saved(tmp_path)


@pytest.mark.parametrize(
    "case", ["a person's", "empty", "peft's", "a link", "a folder", "bytes", "a mark in the middle"]
)
def test_file_of_others_stays(tmp_path, case: str):
    path = tmp_path / "folder"
    save_adapter(small(), path)
    card = path / "README.md"
    content = card.read_bytes()
    card.unlink()
    if case == "peft's":
        theirs("llama", path)
    elif case == "a link":
        (tmp_path / "card.md").write_bytes(content)
        card.symlink_to(tmp_path / "card.md")
    elif case == "a folder":
        card.mkdir()
    else:
        made = {
            "a person's": b"# mine\n",
            "empty": b"",
            "bytes": b"\xff\xfe---",
            "a mark in the middle": content + b"x",
        }
        card.write_bytes(made[case])
    before = None if card.is_dir() else card.read_bytes()
    save_adapter(small(r=1), path)
    assert card.is_dir() if before is None else card.read_bytes() == before
    assert card.is_symlink() == (case == "a link")


def test_failure_while_the_card_is_written_leaves_the_folder_as_it_was(tmp_path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path / "folder")
    before = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_folder, "write_card", fail)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path / "folder", r=1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_every_door_that_writes_a_folder_writes_a_card(tmp_path):
    adapter = take_adapter(small())
    save_adapter(adapter, tmp_path / "memory")
    export_adapter(adapter, tmp_path / "plain", plain=True)
    combine([adapter], [1.0], output=tmp_path / "combined")
    for name in ("memory", "plain", "combined"):
        assert ModelCard.load(tmp_path / name / "README.md").data.library_name == "peft"


class Logging(BoringModel):
    path: Path | None = None

    def on_train_epoch_end(self) -> None:
        if self.path is not None:
            save_adapter(self, self.path)

    def training_step(self, batch: Any, index: int) -> Any:
        result = super().training_step(batch, index)
        self.log("train_loss", result["loss"])
        self.log("broken", float("nan"))
        return result

    def validation_step(self, batch: Any, index: int) -> Any:
        self.log("val/acc|x", torch.tensor(0.75))
        return {"x": super().validation_step(batch, index)}

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(4, 32))

    val_dataloader = train_dataloader


def test_card_of_a_run_tells_what_was_logged_last(tmp_path):
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[LoRACallback(r=1), LoRAMonitor(every_n_steps=1, plots=False)],
        logger=CSVLogger(tmp_path / "logs"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    run = Logging()
    run.path = tmp_path / "meanwhile"
    trainer.fit(run)
    assert "As the Trainer last logged" not in (tmp_path / "meanwhile" / "README.md").read_text()
    save_adapter(run, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"| `train_loss` | {float(trainer.callback_metrics['train_loss']):.6g} |" in text
    assert "## As the Trainer last logged\n" in text
    assert "| `val/acc\\|x` | 0.75 |" in text
    assert "broken" not in text
    assert "`lora/" not in text


def test_values_that_are_no_finite_number_are_no_metrics():
    logged = {"a": 1, "b": torch.ones(2), "c": "text", "d": None, "e": float("nan"), "f": 10**400, "g": 1j}
    assert model_card.finite_metrics(logged) == {"a": 1.0}
