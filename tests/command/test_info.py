"""lightning-lora info and diff: what a file or folder holds, and what differs between two."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    inject,
    save_adapter,
)
from lightning_lora.nn.adapted_module import adapted_layers
from support.models.networks import checkpoint as checkpoint_of
from support.models.peers import call, model, ours, refused, theirs
from support.runs.notices import quiet_peers
from support.runs.training import Net, make_trainer
from support.runs.with_callback import TARGETS, lora, run

pytestmark = quiet_peers


def test_info_shows_config_and_norms_of_a_lightning_checkpoint(tmp_path, capsys):
    net = Net()
    trainer = make_trainer(tmp_path / "fit", lora(r=2, lora_alpha=3.0, save="merged", modules_to_save=["body.1"]))
    run(trainer, "fit", net)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = json.loads(call(capsys, "info", tmp_path / "a.ckpt", "--json"))
    assert found["kind"] == "Lightning checkpoint of kind 'merged'"
    config = LoRAConfig(r=2, lora_alpha=3, target_modules=TARGETS, modules_to_save=["body.1"])
    assert found["config"] == config.to_dict()
    layer = net.body[3].requires_grad_(False)
    delta = layer.lora.spec.scaling * layer.lora_B.double() @ layer.lora_A.double()
    expected = {"kind": "Linear", "rank": 2, "scaling": 1.5, "shape_A": [2, 8], "shape_B": [8, 2], "dtype": "float32"}
    shown = found["layers"]["body.3"]
    assert {key: shown[key] for key in expected} == expected
    assert shown["norm_delta"] == pytest.approx(float(delta.norm()), rel=1e-9)
    assert shown["norm_A"] == pytest.approx(float(layer.lora_A.double().norm()), rel=1e-9)
    assert set(found["also_trained"]) >= {"body.1.weight", "body.1.running_mean"}
    text = call(capsys, "info", tmp_path / "a.ckpt")
    assert "3 adapted layers" in text
    assert "  lora_alpha: 3\n" in text  # of 3.0 YAML's readers would make a float
    assert f"also in it: {', '.join([*found['also_trained']][:3])}, ... (5 in all)\n" in text


def test_info_shows_layers_of_a_peft_folder_and_of_its_tensor_file(tmp_path, capsys):
    theirs("bert", tmp_path)
    found = json.loads(call(capsys, "info", tmp_path, "--json"))
    assert found["kind"] == "PEFT folder"
    assert found["base"]["task_type"] == "SEQ_CLS"
    assert found["layers"]["bert.embeddings.word_embeddings"]["kind"] == "Embedding"
    assert len(found["layers"]) == 4
    assert found["bytes"] == 4 * found["parameters"]
    alone = json.loads(call(capsys, "info", tmp_path / "adapter_model.safetensors", "--json"))
    assert alone["config"] is None
    assert alone["parameters"] == found["parameters"]
    text = call(capsys, "info", tmp_path / "adapter_model.safetensors")
    assert "lora_alpha must come from whoever trained it" in text


def test_info_shows_size_and_dtypes_of_weights(tmp_path, capsys):
    net = model("llama").bfloat16()
    net.save_pretrained(tmp_path / "folder", max_shard_size="12KB")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "a.ckpt")
    count = sum(parameter.numel() for parameter in net.parameters())
    for path, files in ((tmp_path / "folder", 4), (tmp_path / "a.ckpt", 1)):
        found = json.loads(call(capsys, "info", path, "--json"))
        assert found["parameters"] == count
        assert found["bytes"] == 2 * count
        assert found["files"] == files
        assert found["dtypes"] == {"bfloat16": 21}
    assert "21 tensors (21 bfloat16) in 1 file," in call(capsys, "info", tmp_path / "a.ckpt")


def test_diff_of_adapters_shows_the_change_of_each_layer(tmp_path, capsys):
    one, other = ours("llama", tmp_path / "one"), ours("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.lora_B.mul_(1.5)
        other.model.layers[0].self_attn.q_proj.lora_A.add_(1)
    save_adapter(other, tmp_path / "other")
    found = json.loads(call(capsys, "diff", tmp_path / "one", tmp_path / "other", "--json"))
    rows = found["changes"]
    assert len(rows) == 6
    for name, layer in adapted_layers(one).items():
        deltas = [x.lora_B.detach().double() @ x.lora_A.detach().double() for x in (layer, other.get_submodule(name))]
        change = float((deltas[1] - deltas[0]).norm()) * layer.lora.spec.scaling
        assert rows[name]["change"] == pytest.approx(change, rel=1e-9)
    assert {n for n, row in rows.items() if row["change"]} == {
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    }
    ours("llama", tmp_path / "third", r=2, target_modules=["q_proj"], rank_pattern=None, alpha_pattern=None)
    text = call(capsys, "diff", tmp_path / "one", tmp_path / "third")
    assert "options that differ: r (4, 2), target_modules (['q_proj', 'v_proj', 'down_proj'], ['q_proj'])" in text
    assert "only in first: model.layers.0.mlp.down_proj" in text


def test_info_and_diff_of_an_adapter_without_a_scaling_say_that_they_measure_without_it(tmp_path, capsys):
    """Its s is not 1, and the other's is known: s * B @ A beside B @ A would show a change where there may be none."""
    net = ours("llama", tmp_path / "folder", rank_pattern=None, alpha_pattern=None)
    torch.save({name: value.clone() for name, value in adapter_state_dict(net).items()}, tmp_path / "bare.pt")
    text = call(capsys, "info", tmp_path / "bare.pt")
    assert "without s, which is not stored" in text
    assert text.count("norm of B@A") == 2  # of all and of each layer
    assert "norm of s*B@A" in call(capsys, "info", tmp_path / "folder")
    for both in (("folder", "bare.pt"), ("bare.pt", "folder"), ("bare.pt", "bare.pt")):
        paths = [tmp_path / name for name in both]
        found = json.loads(call(capsys, "diff", *paths, "--json"))
        assert found["without_scaling"] == [str(path) for path in paths if path.suffix]
        assert {row["change"] for row in found["changes"].values()} == {0.0}
        assert "B@A is compared without s, which is not stored in" in call(capsys, "diff", *paths)
    assert json.loads(call(capsys, "diff", tmp_path / "folder", tmp_path / "folder", "--json"))["without_scaling"] == []


def test_diff_of_weights_shows_the_change_of_each_tensor(tmp_path, capsys):
    one, other = Net(), Net()
    inject(adapted := Net(), LoRAConfig(r=1, target_modules=TARGETS))
    save_adapter(adapted, tmp_path / "adapter")
    torch.save(one.state_dict(), tmp_path / "one.pt")
    assert "is an adapter and" in refused(capsys, "diff", tmp_path / "adapter", tmp_path / "one.pt")
    with torch.no_grad():
        other.body[3].weight[2, 1] += 3
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    rows = json.loads(call(capsys, "diff", tmp_path / "one.pt", tmp_path / "other.safetensors", "--json"))["changes"]
    assert {name for name, row in rows.items() if row["change"]} == {"body.3.weight"}
    norm = float(one.state_dict()["body.3.weight"].double().norm())
    expected = {"change": 3.0, "relative": 3 / norm, "largest": 3.0}
    assert rows["body.3.weight"] == pytest.approx(expected, rel=1e-6)
    assert "1 of 11 differ" in call(capsys, "diff", tmp_path / "one.pt", tmp_path / "other.safetensors")


def test_diff_of_weights_names_the_largest_change_of_all_parts_of_a_tensor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_lora.command.info.CHUNK", 4)
    before = torch.zeros(5, 4)
    after = before.clone()
    after[1, 2], after[4, 0] = -7.0, 2.0
    for name, value in (("one", before), ("other", after)):
        save_file({"a.weight": value}, tmp_path / f"{name}.safetensors")
    text = call(capsys, "diff", tmp_path / "one.safetensors", tmp_path / "other.safetensors", "--json")
    assert json.loads(text)["changes"]["a.weight"]["largest"] == 7.0


def test_diff_tells_changes_of_masks_and_complex_numbers_and_reads_what_is_stored_out_of_order(tmp_path, capsys):
    """The same infinity and NaN are no change, and the imaginary part of a change counts."""
    inf, nan = float("inf"), float("nan")
    one = {
        "mask": torch.tensor([0.0, -inf, nan]),
        "moved": torch.tensor([0.0, inf]),
        "freqs": torch.tensor([3j, 4 + 0j]),
        "longer": torch.zeros(2),
    }
    other = {"mask": one["mask"].clone(), "moved": torch.tensor([-inf, inf]), "freqs": torch.tensor([3j, 4 + 2j])}
    other["longer"] = torch.zeros(3)
    for name, state, row in (("one.pt", one, 1.0), ("other.pt", other, 2.0)):
        torch.save({**state, "rows": torch.full((1, 2), row).expand(3, 2)}, tmp_path / name)
    rows = json.loads(call(capsys, "diff", tmp_path / "one.pt", tmp_path / "other.pt", "--json"))["changes"]
    assert rows["mask"] == {"change": 0.0, "relative": 0.0, "largest": 0.0}
    assert rows["moved"]["change"] is None  # JSON has no infinity
    assert rows["freqs"] == {"change": 2.0, "relative": 0.4, "largest": 2.0}
    assert rows["rows"]["change"] == pytest.approx(6**0.5)
    assert rows["longer"] == {"problem": "shape (2,) and (3,)"}
    assert "4 of 5 differ" in call(capsys, "diff", tmp_path / "one.pt", tmp_path / "other.pt")
    net = nn.ModuleDict({"body": nn.Linear(3, 3)})
    net.register_buffer("mask", one["mask"][:2])
    inject(net, LoRAConfig(r=1))
    torch.save(checkpoint_of(net, "adapter"), tmp_path / "a.ckpt")
    assert call(capsys, "diff", tmp_path / "a.ckpt", tmp_path / "a.ckpt").startswith("0 of 2 differ")


def test_diff_tells_which_weights_differ_in_dtype_alone(tmp_path, capsys):
    one = {"same": torch.ones(2), "exact": torch.ones(2), "rounded": torch.full((2,), 0.1)}
    torch.save(one, tmp_path / "one.pt")
    torch.save(
        {name: value.bfloat16() if name != "same" else value for name, value in one.items()}, tmp_path / "two.pt"
    )
    text = call(capsys, "diff", tmp_path / "one.pt", tmp_path / "two.pt")
    assert "2 of 3 differ, 1 in dtype alone (float32 and bfloat16)\n" in text


def test_diff_of_models_whose_names_differ_by_a_prefix_compares_them_and_says_so_in_one_line(tmp_path, capsys):
    inner = {f"layers.{number}.{leaf}": torch.ones(2) for number in range(3) for leaf in ("weight", "bias")}
    around = {f"net.{name}": value.clone() for name, value in inner.items()} | {"head.weight": torch.ones(1)}
    around["net.layers.1.bias"] += 1
    torch.save(inner, tmp_path / "inner.pt")
    torch.save(around, tmp_path / "around.pt")
    text = call(capsys, "diff", tmp_path / "inner.pt", tmp_path / "around.pt").split("\n")
    assert text[:3] == [
        "names in the second begin with 'net.', and are compared without it",
        "only in second: head.weight",
        "1 of 6 differ",
    ]
    assert "names in the first begin with 'net.'" in call(capsys, "diff", tmp_path / "around.pt", tmp_path / "inner.pt")
