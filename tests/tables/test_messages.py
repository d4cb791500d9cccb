"""Errors that people meet: each is a LoRAError with the name in it and the call that helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, load_from_checkpoint, merge, merged_state_dict
from lightning_lora.command.merge import merge_on_disk
from support.models.peers import model
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, fit_model, make_trainer
from support.runs.with_callback import lora


def saved(path: Path, *callbacks: Any, base: Path | None = None) -> Path:
    """Train, and save: with no callback as plain Lightning does."""
    net = Net.load_from_checkpoint(base, **PLAIN_TYPES_ONLY) if base else Net()
    trainer = fit_model(path, net, *callbacks)
    file = path / ("lora.ckpt" if callbacks else "pretrained.ckpt")
    trainer.save_checkpoint(file)
    return file


def load_a_plain_checkpoint(path: Path) -> None:
    load_from_checkpoint(Net, saved(path))


def load_where_the_base_was_pretrained(path: Path) -> None:
    load_from_checkpoint(Net, saved(path, lora(), base=saved(path)))


def validate_where_the_base_was_pretrained(path: Path) -> None:
    file = saved(path, lora(), base=saved(path))
    make_trainer(path, lora()).validate(Net(), Data(), ckpt_path=file, **PLAIN_TYPES_ONLY)


def merge_on_disk_with_another_base(path: Path) -> None:
    torch.save(Net(seed=2).state_dict(), path / "base.pt")
    merge_on_disk(path / "base.pt", saved(path, lora()), path / "merged.pt")


class EarlyOptimizer(Net):
    """Builds its optimizer before the Trainer calls setup."""

    def __init__(self) -> None:
        super().__init__()
        self.early = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self) -> Any:
        return self.early


def fit_with_an_optimizer_built_too_early(path: Path) -> None:
    make_trainer(path, lora()).fit(EarlyOptimizer(), Data())


def merge_after_a_diverged_run(path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    inject(net, LoRAConfig(r=1))
    net.get_parameter("0.lora_B").data.fill_(torch.nan)
    merge(net)


def merge_weights_of_a_tied_head(path: Path) -> None:
    net = model("llama")
    net.lm_head.weight = net.model.embed_tokens.weight
    inject(net, LoRAConfig(r=2, target_modules=["lm_head"]))
    merged_state_dict(net)


def load_a_file_of_loralib(path: Path) -> None:
    torch.save({"0.lora_A": torch.ones(1, 3), "0.lora_B": torch.ones(3, 1)}, path / "lora.pt")
    load_adapter(nn.Sequential(nn.Linear(3, 3)), path / "lora.pt")


def adapt_only_what_is_trained_whole(path: Path) -> None:
    inject(model("llama"), LoRAConfig(target_modules=["lm_head"], modules_to_save=["lm_head"]))


SAYS: dict[Callable[[Path], None], tuple[str, ...]] = {
    load_a_plain_checkpoint: ('checkpoint["lora"]', "its class's own load_from_checkpoint"),
    load_where_the_base_was_pretrained: ("'body.0.weight'", "load_adapter(model, "),
    validate_where_the_base_was_pretrained: ("'body.0.weight'", "load_adapter(model, path, strict_base=False)"),
    merge_on_disk_with_another_base: ("'body.0.weight'", "as --base", "--strict-base=false"),
    fit_with_an_optimizer_built_too_early: ("'body.0.lora_A'", "exclude_modules=['body.0', 'body.3', 'head']"),
    merge_after_a_diverged_run: ("layer '0'", "merged_eval=False"),
    merge_weights_of_a_tied_head: ("model.embed_tokens.weight", "exclude_modules=['lm_head']"),
    load_a_file_of_loralib: ("lora_alpha", "inject(model, LoRAConfig(r=1, lora_alpha=..., target_modules=['0']))"),
    adapt_only_what_is_trained_whole: ("'lm_head' is in target_modules and in modules_to_save",),
}


@pytest.mark.parametrize("act", SAYS, ids=lambda act: act.__name__)
def test_an_error_has_the_name_and_the_call_that_helps(tmp_path: Path, act: Callable[[Path], None]):
    with pytest.raises(LoRAError) as told:
        act(tmp_path)
    assert [part for part in SAYS[act] if part not in str(told.value)] == []


def test_layers_that_a_loop_did_not_train_are_named_at_the_first_merge():
    net = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    inject(net, LoRAConfig(r=1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net["used"](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"training has changed .*: 'unused'.*exclude_modules=\['unused'\]"):
        merge(net)
