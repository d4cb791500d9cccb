"""From a LightningModule to a folder that from_pretrained loads: save_merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    inject,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    save_merged,
)
from lightning_lora.exchange import pretrained_folder
from lightning_lora.exchange.pretrained_folder import parts_in_files
from support.models.peers import fill_, model
from support.models.pretrained import Lit, adapted, answer, bert, dinov2, llava, tied_llama
from support.runs.notices import TORCH_NOTICES, quiet_peers

pytestmark = [*quiet_peers, *TORCH_NOTICES]
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama, tied": tied_llama,
    "mixture of experts": lambda: model("mixtral"),  # one file's tensor for each expert
    "llava": llava,
    "dinov2": dinov2,
}


def files(folder: Path) -> dict[str, Any]:
    """Every file of a model's folder: its tensors, or its JSON without the version of transformers."""
    return {
        path.name: load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
        for path in folder.iterdir()
    }


def assert_same_files(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for file, content in wanted.items():
        assert found[file].keys() == content.keys(), file
        for name, value in content.items():
            same = (
                torch.equal(found[file][name], value) if isinstance(value, torch.Tensor) else found[file][name] == value
            )
            assert same, (file, name)


# --- save_merged ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_of_a_lightning_module_is_what_transformers_saves_of_the_merged_model(tmp_path, family: str):
    module = adapted(FAMILIES[family]())
    configuration = module.model.config.to_dict()
    save_merged(module, tmp_path / "ours")
    assert module.model.config.to_dict() == configuration
    plain = merge_and_unload(module).model
    plain.save_pretrained(tmp_path / "theirs")
    assert_same_files(files(tmp_path / "ours"), files(tmp_path / "theirs"))
    again, info = type(plain).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_model_inside_a_lightning_module_its_shards_and_a_compiled_one_are_read_by_transformers(tmp_path):
    module = adapted(FAMILIES["mixture of experts"]())
    save_merged(module.model, tmp_path / "inside")
    save_merged(module, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    module.model = torch.compile(module.model)
    save_merged(module, tmp_path / "compiled")
    assert_same_files(files(tmp_path / "compiled"), files(tmp_path / "inside"))
    for folder in ("inside", "shards"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(answer(again), answer(module.model._orig_mod), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "sizes"), [("mixture of experts", {1}), ("dinov2", {1, 4})])
def test_parts_that_are_stored_together_are_as_small_as_can_be(family: str, sizes: set[int]):
    network = FAMILIES[family]()
    assert {len(part.names) for part in parts_in_files(network, network.state_dict())} == sizes


class WithMore(Lit):
    """Another module beside the transformers model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(model=network)
        self.probe = nn.Linear(4, 4)


def test_what_is_trained_beside_the_transformers_model_keeps_the_folder_whole_with_a_warning(tmp_path):
    module = WithMore(bert())
    inject(module, LoRAConfig(r=2))
    with pytest.warns(UserWarning, match=r"'probe\.lora_A' was trained outside .*save_merged\(module\.model"):
        save_merged(module, tmp_path / "all")
    assert set(load_file(tmp_path / "all" / "model.safetensors")) == set(merged_state_dict(module))
    assert not (tmp_path / "all" / "config.json").exists()
    save_merged(module.model, tmp_path / "model")  # the remedy
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(answer(loaded), answer(module), rtol=0, atol=1e-5)
    inject(frozen := WithMore(bert()), LoRAConfig(r=2, target_modules=["query"]))
    with pytest.warns(UserWarning, match=r"'probe\.weight' is outside .* left out \(2 such parameters\)"):
        save_merged(frozen, tmp_path / "frozen")
    assert (tmp_path / "frozen" / "config.json").exists()


def test_of_two_transformers_models_the_adapted_one_is_written(tmp_path):
    module = Lit(model=bert())
    module.teacher = bert()
    inject(module, LoRAConfig(r=2, target_modules=r"model\..*query"))
    fill_(module)
    save_merged(module, tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(answer(again), answer(module), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_second_name_of_the_body_is_no_other_model(tmp_path):
    module = L.LightningModule()
    network = bert()
    module.body = network.bert
    module.model = network
    inject(module, LoRAConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    save_merged(module, tmp_path)
    assert "classifier.weight" in load_file(tmp_path / "model.safetensors")


def test_a_folder_with_an_adapter_is_refused_and_stays(tmp_path):
    module = adapted(bert())
    save_adapter(module, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoRAError, match=r"holds adapter_config\.json, .* give another folder"):
        save_merged(module, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def _halves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers undoes a conversion: one tensor renamed, one made of two of a layer, one of two layers."""
    stored = {name.replace("norm", "ln"): value for name, value in state.items() if "norm" in name}
    for layer in {name.split(".")[0] for name in state if name.endswith((".q", ".k"))}:  # of what is there
        stored[f"{layer}.qk"] = torch.cat([state[name] for name in (f"{layer}.q", f"{layer}.k") if name in state])
    if "0.first" in state:
        stored["both"] = torch.cat([state["0.first"], state["1.second"]])
    return stored


def _numbered(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}


LAYERS = ["0.norm", "0.q", "0.k", "1.norm", "1.q", "1.k"]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (LAYERS, [["0.norm"], ["0.q", "0.k"], ["1.norm"], ["1.q", "1.k"]]),
        ([*LAYERS, "0.first", "1.second"], [[*LAYERS, "0.first", "1.second"]]),
    ],
    ids=["within layers", "across layers"],
)
def test_tensors_are_converted_in_groups_of_which_all_is_made(names: list[str], groups: list[list[str]], monkeypatch):
    monkeypatch.setattr(pretrained_folder, "_conversion", lambda network: _halves)
    state = _numbered(*names)
    parts = parts_in_files(nn.Module(), state)
    assert [part.names for part in parts] == groups
    expected, found = _halves(state), {}
    for part in parts:
        made = part.convert({name: state[name] for name in part.names})
        assert made.keys() == part.stored.keys()
        found |= made
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
