"""PEFT's tensors without a folder: in memory, in a file alone, in a checkpoint of a LightningModule with PEFT."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import torchmetrics
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
)
from support.models.peers import call, close, distilbert, logits, refused, seeded, spread_, tokens
from support.runs.notices import quiet_peers
from support.runs.training import make_trainer

pytestmark = quiet_peers

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_lin", "v_lin"], "rank_pattern": {"v_lin": 2}}
OURS = {**OPTIONS, "modules_to_save": ["classifier", "pre_classifier"]}


class Lit(L.LightningModule):
    """What everyone wrote who used PEFT inside Lightning."""

    def __init__(self, **hyper_parameters: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = peft.get_peft_model(distilbert(), peft.LoraConfig(**OPTIONS, modules_to_save=["classifier"]))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).logits.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.05)


@pytest.fixture
def lit(tmp_path: Path, request: pytest.FixtureRequest) -> Lit:
    """Trained, with a checkpoint at lit.ckpt."""
    module = Lit(**getattr(request, "param", {}))
    trainer = make_trainer(tmp_path / "fit", max_epochs=1, limit_val_batches=0)
    trainer.fit(module.train(), DataLoader(tokens(), batch_size=1))
    trainer.save_checkpoint(tmp_path / "lit.ckpt")
    return module.eval()


def source(lit: Lit, form: str, path: Path) -> Any:
    state = get_peft_model_state_dict(lit.model)
    if form == "bin":
        torch.save(state, path / "adapter_model.bin")
        return path / "adapter_model.bin"
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "adapter_model.safetensors")
        return path / "adapter_model.safetensors"
    return lit.model.state_dict() if form == "live" else path / "lit.ckpt"


@pytest.mark.parametrize("form", ["bin", "safetensors", "live", "ckpt"])
def test_each_form_loads_onto_an_injected_model_and_needs_the_options_for_another(tmp_path, caplog, lit, form: str):
    net, given = distilbert(), source(lit, form, tmp_path)
    with pytest.raises(
        LoRAError, match=r"stores tensors and no options.*target_modules=\['q_lin', 'v_lin'\], modules_"
    ):
        load_adapter(net, given)
    inject(net, LoRAConfig(**OURS))
    with caplog.at_level(logging.INFO, "lightning_lora"):
        load_adapter(net, given)
    assert "the source stores no options; those of the injected model hold: lora_alpha=16" in caplog.text
    close(logits(net), logits(lit.model))
    assert {name.rpartition(".")[0] for name in adapter_state_dict(net) if "lora_" not in name} == {
        "classifier",
        "pre_classifier",
    }
    if form in ("live", "ckpt"):  # which hold the base
        inject(other := distilbert(), LoRAConfig(**OURS))
        with torch.no_grad():
            other.get_parameter("distilbert.transformer.layer.0.attention.q_lin.weight").mul_(1.1)
        with pytest.raises(LoRAError, match=r"another base: values of 'distilbert\.transformer\..*q_lin\.weight'"):
            load_adapter(other, given)


def test_the_command_asks_for_lora_alpha_where_nothing_stores_it(tmp_path, capsys, lit):
    lone = source(lit, "bin", tmp_path)
    folder = tmp_path / "folder"
    for path, kind in ((tmp_path / "lit.ckpt", "Lightning checkpoint that holds a PeftModel"), (lone, "of PEFT")):
        shown = call(capsys, "info", path)
        assert kind in shown
        assert "options: none stored; lora_alpha must come from whoever trained it" in shown
        assert "pass --lora-alpha" in refused(capsys, "export", path, folder, "--overwrite")
        call(capsys, "export", path, folder, "--lora-alpha", 16, "--overwrite")
        close(logits(peft.PeftModel.from_pretrained(distilbert(), folder).eval()), logits(lit.model))


def test_several_adapters_or_models_in_one_state_dict_are_refused_by_name(lit):
    lit.model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_lin"]))
    with pytest.raises(LoRAError, match=r"holds several adapters \('default', 'second'\).*selected_adapters="):
        load_adapter(distilbert(), lit.model.state_dict())
    two = nn.ModuleDict({"one": Lit().model, "two": Lit().model})
    with pytest.raises(LoRAError, match=r"holds several PeftModels \('one', 'two'\)"):
        load_adapter(distilbert(), two.state_dict())


def test_attention_and_embeddings_keep_their_meaning_in_a_live_state_dict():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mha = nn.Embedding(64, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.emb(tokens)
            result: torch.Tensor = self.mha(x, x, x, need_weights=False)[0]
            return result

    options: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["emb", "mha"]}
    other = peft.get_peft_model(seeded(Attention), peft.LoraConfig(**options)).eval()
    spread_(other)
    for state in (other.state_dict(), get_peft_model_state_dict(other, save_embedding_layers=False)):
        net = seeded(Attention)
        inject(net, LoRAConfig(**options))
        load_adapter(net, state)
        close(logits(net), logits(other))


@pytest.mark.parametrize("live", [True, False])
def test_magnitudes_in_a_state_dict_are_read_live_or_not(live: bool):
    options: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_lin"], "use_dora": True}
    other = peft.get_peft_model(distilbert(), peft.LoraConfig(**options)).eval()
    spread_(other)
    state = other.state_dict() if live else get_peft_model_state_dict(other)
    inject(net := distilbert(), LoRAConfig(**options))
    load_adapter(net, state)
    close(logits(net), logits(other))
    inject(plain := distilbert(), LoRAConfig(**options | {"use_dora": False}))
    with pytest.raises(LoRAError, match="lora_magnitude' has no place in the model"):
        load_adapter(plain, state)


def test_the_state_of_a_live_model_of_another_variant_is_read():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 9))
    inject(ours := copy.deepcopy(base), LoRAConfig(r=3, target_modules=["0", "1"], variant="loha"))
    theirs = peft.get_peft_model(base, peft.LoHaConfig(r=3, alpha=8, target_modules=["0", "1"]))
    for parameter in filter(lambda each: each.requires_grad, theirs.parameters()):
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
    load_adapter(ours, {"state_dict": {f"net.{name}": value for name, value in theirs.state_dict().items()}})
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_a_persistent_metric_beside_the_peft_model_comes_along(lit):
    class Plain(L.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.model, self.total = net, torchmetrics.SumMetric()
            self.total.persistent(True)

    saved, plain = Plain(lit.model), Plain(distilbert())
    saved.total.update(5)
    inject(plain, LoRAConfig(**OURS))
    load_adapter(plain, saved.state_dict())
    assert plain.total.sum_value == 5
    close(logits(plain.model), logits(lit.model))
