"""Files of an adapter that was trained beside others name them. Nothing loads it without them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_stats,
    attach,
    combine,
    detach,
    export_adapter,
    inject,
    load_adapter,
    merge_and_unload,
    merged_state_dict,
    read_adapter,
    save_adapter,
    save_merged,
    set_strength,
    summary,
    take_adapter,
)
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.adapter.metadata import from_metadata, to_metadata
from support.models.networks import ZOO_LAYERS, base_zoo, checkpoint, merging, tokens, train, zoo_config
from support.models.peers import call, refused

FORMS = ("folder", "merged", "full")


def adapter(seed: int, **options: Any) -> Adapter:
    """An adapter of Zoo's layers that has an effect."""
    model = base_zoo()
    defaults = {"r": 3, "lora_alpha": 6, "target_modules": ZOO_LAYERS, "init_lora_weights": False}
    inject(model, LoRAConfig(**defaults | options), seed=seed)
    return take_adapter(model)


def both(weight: float = 0.5) -> nn.Module:
    """A model that was trained beside an adapter."""
    model = base_zoo()
    inject(model, zoo_config(init_lora_weights=False), seed=3)
    attach(model, adapter(1), name="sft", strength=weight)
    train(model)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens())
    return result


def source(model: nn.Module, form: str, path: Path) -> Any:
    """What was trained, in a form that load_adapter takes."""
    if form == "folder":
        save_adapter(model, path / "trained")
        return path / "trained"
    return checkpoint(model, form)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_refused_without_what_it_was_trained_beside_and_loads_with_it(tmp_path: Path, form: str):
    model = both()
    trained = source(model, form, tmp_path)
    plain = base_zoo()
    before = logits(plain)
    remedy = re.escape("attach(model, source, name='sft', strength=0.5)")
    with pytest.raises(LoRAError, match=rf"trained with 'sft' \(strength 0\.5\) attached.*{remedy}"):
        load_adapter(plain, trained)
    assert torch.equal(logits(plain), before)
    attach(plain, adapter(1), name="sft", strength=0.5)
    if form != "full":
        load_adapter(plain, trained)
        assert torch.equal(logits(plain), logits(model))
    attach(more := base_zoo(), adapter(1), name="sft", strength=0.5)
    attach(more, adapter(2), name="more")
    load_adapter(more, trained)  # what is attached beside that is the user's business
    set_strength(more, 0.0, "more")
    torch.testing.assert_close(logits(more), logits(model), rtol=1e-4, atol=1e-3)


def test_another_weight_and_another_adapter_are_refused_by_name():
    trained = take_adapter(both())
    model = base_zoo()
    attach(model, adapter(1), name="sft")
    with pytest.raises(LoRAError, match=re.escape("set_strength(model, 0.5, 'sft')")):
        load_adapter(model, trained)
    detach(model, "sft")
    attach(model, adapter(2), name="sft", strength=0.5)
    with pytest.raises(LoRAError, match=r"another adapter 'sft'.*detach\(model, 'sft'\)"):
        load_adapter(model, trained)


def test_names_of_a_network_inside_a_module_are_compared_by_layer(tmp_path: Path):
    outer = nn.ModuleDict({"net": base_zoo()})
    inject(outer, zoo_config(init_lora_weights=False), seed=3)
    attach(outer, adapter(1), name="sft")
    save_adapter(outer, tmp_path / "a")
    inner = base_zoo()
    attach(inner, adapter(1), name="sft")
    load_adapter(inner, tmp_path / "a")
    torch.testing.assert_close(logits(inner), logits(outer["net"]))


# --- what a file says ---


def test_description_comes_back_as_it_was_and_a_damaged_one_is_refused():
    taken = take_adapter(both())
    again = from_metadata(taken.tensors, json.loads(json.dumps(to_metadata(taken))), "here")
    assert again.attached == taken.attached
    assert "attached 'sft' (strength 0.5)" in repr(again)
    assert "beside" not in to_metadata(adapter(1))
    for rows in ({"sft": ["1", "digest"]}, {"sft": 1.0}, {"sft": [1.0, 3]}, []):
        with pytest.raises(LoRAError, match="description is damaged"):
            from_metadata(taken.tensors, {**to_metadata(taken), "beside": rows}, "here")


def test_folder_says_in_a_line_and_on_its_card_that_it_holds_the_trained_one_alone(tmp_path: Path, caplog):
    model = both()
    with caplog.at_level("INFO", "lightning_lora"):
        save_adapter(model, tmp_path / "saved")
        export_adapter(checkpoint(model, "adapter"), tmp_path / "exported")
    said = [record.message for record in caplog.records if "'sft' (strength 0.5)" in record.message]
    assert len(said) == 2
    for name in ("saved", "exported"):
        assert "'sft' (strength 0.5)" in (tmp_path / name / "README.md").read_text()
        held = read_adapter(tmp_path / name)
        assert held.layers.keys() == adapter(1).layers.keys()
        assert held.attached.keys() == {"sft"}


def test_merged_weights_hold_all(tmp_path: Path):
    """In float64: sums in another order differ by more than float32's tolerance."""
    model, plain = both().double(), base_zoo().double()
    expected, close = logits(model), {"rtol": 1e-10, "atol": 1e-10}
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logits(plain), expected, **close)
    save_merged(model, tmp_path / "merged")
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(logits(plain), expected, **close)
    torch.testing.assert_close(logits(merge_and_unload(model)), expected, **close)


# --- one beside, out of the model ---


def test_one_that_is_beside_is_taken_and_saved_by_name(tmp_path: Path):
    model = both()
    taken = take_adapter(model, name="sft")
    save_adapter(model, tmp_path / "sft", name="sft")
    load_adapter(expected := base_zoo(), adapter(1))
    for each in (taken, tmp_path / "sft"):
        load_adapter(found := base_zoo(), each)
        torch.testing.assert_close(logits(found), logits(expected))
    assert (taken.config.r, taken.config.lora_alpha) == (3, 3)
    assert {(layer.r, layer.scaling) for layer in taken.layers.values()} == {(3, 1.0)}
    assert not taken.attached
    with pytest.raises(LoRAError, match=r"'stf'.*'sft'"):
        take_adapter(model, name="stf")
    with pytest.raises(LoRAError, match="name"):
        save_adapter(taken, tmp_path / "other", name="sft")


# --- combining, the command, looking ---


def test_combining_with_what_it_was_trained_beside_gives_the_whole(caplog):
    model = base_zoo()
    inject(model, zoo_config(init_lora_weights=False, modules_to_save=None, bias="none"), seed=3)
    attach(model, adapter(1), name="sft", strength=0.5)
    trained = take_adapter(model)
    with caplog.at_level("INFO", "lightning_lora"):
        whole = combine([trained, adapter(1)], [1.0, 0.5])
    assert "'sft' (strength 0.5)" in caplog.text
    load_adapter(found := base_zoo(), whole)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert combine([trained, trained], [0.5, 0.5]).attached == trained.attached


def test_command_shows_it_and_merges_nothing_without_it(tmp_path: Path, capsys):
    save_adapter(both(), tmp_path / "a")
    torch.save(base_zoo().state_dict(), tmp_path / "base.pt")
    assert "trained with these attached, not in it: sft (strength 0.5)" in call(capsys, "info", tmp_path / "a")
    assert json.loads(call(capsys, "info", tmp_path / "a", "--json"))["attached"] == {"sft": 0.5}
    said = refused(capsys, *merging(tmp_path, tmp_path / "a"))
    assert "trained with 'sft' (strength 0.5) attached" in said
    assert "lightning-lora combine" in said
    assert not (tmp_path / "out.pt").exists()


def test_summary_and_statistics_are_of_the_trained_one_and_name_what_is_beside():
    model = both()
    report = summary(model)
    assert report.attached == {"sft": 0.5}
    assert "sft (strength 0.5)" in str(report)
    inject(alone := base_zoo(), zoo_config(init_lora_weights=False), seed=3)
    load_adapter(alone, replace(take_adapter(model), attached={}))
    assert summary(alone).trainable == report.trainable
    assert adapter_stats(alone).groups == adapter_stats(model).groups
    attach(plain := base_zoo(), adapter(1), name="sft", strength=0.5)
    assert (summary(plain).layers, summary(plain).attached) == (0, {"sft": 0.5})
    assert "sft (strength 0.5)" in summary(plain).short()
