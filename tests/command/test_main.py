"""The lightning-lora command: each verb as a user types it, and its options: what --help says, and what they do."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    merged_state_dict,
    save_adapter,
)
from lightning_lora.command.main import VERBS, main
from lightning_lora.nn.adapted_weights import adapted_layers
from support.expected_weights import check_merge_command
from support.models import checkpoint as checkpoint_of
from support.notices import quiet_peers
from support.peers import call, logits, model, ours, read_by_peft, refused, tensors_of, theirs
from support.runs import TARGETS, lora, run
from support.training import Net, assert_same_tensors, make_trainer

pytestmark = quiet_peers


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Lightning adapter checkpoint."""
    trainer = make_trainer(tmp_path / "fit", lora(r=2, modules_to_save=["body.1"], bias="lora_only"))
    run(trainer, "fit", Net())
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    return tmp_path / "adapter.ckpt"


def test_it_is_installed_as_a_program_and_as_a_module(capsys, monkeypatch: pytest.MonkeyPatch):
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert f'[project.scripts]\nlightning-lora = "{main.__module__}:{main.__name__}"\n' in project.read_text()
    monkeypatch.setattr(sys, "argv", ["lightning-lora", "--help"])
    monkeypatch.delitem(sys.modules, "lightning_lora.__main__", raising=False)  # runpy warns where it was imported
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lightning_lora", run_name="__main__")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("info", "merge", "export", "diff", "extract", "combine", "plot"))


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_info_shows_config_and_norms_of_a_lightning_checkpoint(tmp_path, capsys, kind: str):
    net = Net()
    trainer = make_trainer(tmp_path / "fit", lora(r=2, lora_alpha=3, save=kind, modules_to_save=["body.1"]))
    run(trainer, "fit", net)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = json.loads(call(capsys, "info", tmp_path / "a.ckpt", "--json"))
    assert found["kind"] == f"Lightning checkpoint of kind '{kind}'"
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
    assert "lora_alpha: 3" in text
    assert f"also in it, whole: {', '.join([*found['also_trained']][:3])}, ... (5 in all)\n" in text


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


def test_info_writes_a_whole_number_as_one(tmp_path, capsys):
    """YAML's readers make 16.0 of an option that is a float."""
    inject(net := Net(), LoRAConfig(r=2, lora_alpha=16.0, target_modules=TARGETS, lora_dropout=0.25))
    save_adapter(net, tmp_path / "a")
    shown = call(capsys, "info", tmp_path / "a")
    assert "  lora_alpha: 16\n  lora_dropout: 0.25\n" in shown


def test_a_folder_without_an_adapter_is_told_so(tmp_path, capsys):
    model("llama").save_pretrained(tmp_path / "base")
    shown = refused(capsys, "export", tmp_path / "base", tmp_path / "out")
    assert f"{tmp_path / 'base'}: holds no adapter" in shown


def test_export_names_the_ranks(tmp_path, capsys):
    for name, pattern in (("one", {}), ("two", {"head": 1})):
        inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS, rank_pattern=pattern))
        save_adapter(net, tmp_path / name)
    assert call(capsys, "export", tmp_path / "one", tmp_path / "a").endswith("a: 3 adapted layers of rank 2\n")
    assert call(capsys, "export", tmp_path / "two", tmp_path / "b").endswith("b: 3 adapted layers of ranks 1, 2\n")


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


def test_an_exported_folder_gives_back_the_adapter_of_a_checkpoint(tmp_path, capsys, checkpoint: Path):
    call(capsys, "export", checkpoint, tmp_path / "folder")
    expected = load_from_checkpoint(Net, checkpoint)
    for source in (checkpoint, tmp_path / "folder"):
        fresh = Net()
        load_adapter(fresh, source)
        assert_same_tensors(adapter_state_dict(fresh), adapter_state_dict(expected))


class Lit(L.LightningModule):
    """A network behind an attribute, and a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = model("llama")
        self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network(batch).logits.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_an_exported_checkpoint_has_the_networks_names(tmp_path, capsys, caplog):
    """The attribute is taken off without the model at hand; what lies outside the network is left out."""
    lit = Lit()
    callback = LoRACallback(r=2, target_modules=r"network\.model\.layers\.0\..*q_proj", init_lora_weights=False)
    trainer = make_trainer(tmp_path / "fit", callback)
    trainer.fit(lit.train(), DataLoader(torch.ones(1, 4, dtype=torch.long)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with caplog.at_level(logging.INFO, "lightning_lora"):
        call(capsys, "export", tmp_path / "a.ckpt", tmp_path / "folder")
    assert "seen lies outside of the LightningModule's network" in caplog.text
    assert not any("seen" in name for name in load_file(tmp_path / "folder" / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(read_by_peft("llama", tmp_path / "folder")), logits(lit.network.eval()))


def test_merge_command_writes_and_names_what_it_left_out(tmp_path, capsys):
    base = tmp_path / "base"
    model("llama").save_pretrained(base, max_shard_size="12KB")
    (base / "model.gguf").write_bytes(b"x")
    ours("llama", tmp_path / "adapter")
    given = ["--base", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"]
    shown = call(capsys, "merge", *given, "--dtype=bfloat16")
    check_merge_command(*given, "--dtype=bfloat16")
    left_out, wrote = shown.splitlines()
    assert left_out == "left out, because it holds weights that are not merged: model.gguf"
    assert wrote == f"wrote {tmp_path / 'out'}"
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert "pass --overwrite" in refused(capsys, "merge", *given)
    assert "there is no such file" in refused(capsys, "merge", *given, "--base", tmp_path / "nothing")


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
    assert "norm of B@A" in text
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
    with torch.no_grad():
        other.body[3].weight[2, 1] += 3
    torch.save(one.state_dict(), tmp_path / "one.pt")
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


def test_diff_of_weights_tells_changes_of_masks_and_complex_numbers_and_reads_what_is_stored_out_of_order(
    tmp_path, capsys
):
    """The same infinity and NaN are no change, and the imaginary part of a change counts."""
    inf, nan = float("inf"), float("nan")
    one = {
        "mask": torch.tensor([0.0, -inf, nan]),
        "moved": torch.tensor([0.0, inf]),
        "freqs": torch.tensor([3j, 4 + 0j]),
    }
    other = {"mask": one["mask"].clone(), "moved": torch.tensor([-inf, inf]), "freqs": torch.tensor([3j, 4 + 2j])}
    for name, state, row in (("one.pt", one, 1.0), ("other.pt", other, 2.0)):
        torch.save({**state, "rows": torch.full((1, 2), row).expand(3, 2)}, tmp_path / name)
    rows = json.loads(call(capsys, "diff", tmp_path / "one.pt", tmp_path / "other.pt", "--json"))["changes"]
    assert rows["mask"] == {"change": 0.0, "relative": 0.0, "largest": 0.0}
    assert rows["moved"]["change"] is None  # JSON has no infinity
    assert rows["freqs"] == {"change": 2.0, "relative": 0.4, "largest": 2.0}
    assert rows["rows"]["change"] == pytest.approx(6**0.5)
    assert "3 of 4 differ" in call(capsys, "diff", tmp_path / "one.pt", tmp_path / "other.pt")


def test_diff_tells_which_weights_differ_in_dtype_alone(tmp_path, capsys):
    one = {"same": torch.ones(2), "exact": torch.ones(2), "rounded": torch.full((2,), 0.1)}
    torch.save(one, tmp_path / "one.pt")
    torch.save(
        {name: value.bfloat16() if name != "same" else value for name, value in one.items()}, tmp_path / "two.pt"
    )
    text = call(capsys, "diff", tmp_path / "one.pt", tmp_path / "two.pt")
    assert "2 of 3 differ, 1 in dtype alone (float32 and bfloat16)\n" in text


def test_diff_of_adapters_tells_no_change_of_the_same_mask(tmp_path, capsys):
    net = nn.ModuleDict({"body": nn.Linear(3, 3)})
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    inject(net, LoRAConfig(r=1))
    torch.save(checkpoint_of(net, "adapter"), tmp_path / "a.ckpt")
    assert call(capsys, "diff", tmp_path / "a.ckpt", tmp_path / "a.ckpt").startswith("0 of 2 differ")


def test_diff_of_unlike_things_is_refused(tmp_path, capsys, checkpoint: Path):
    torch.save(Net().state_dict(), tmp_path / "one.pt")
    assert "is an adapter and" in refused(capsys, "diff", checkpoint, tmp_path / "one.pt")


def test_a_terminated_merge_cleans_up(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM in the middle of writing; SIGKILL is in test_atomic_killed_writers.py."""
    from lightning_lora.command import write_merged

    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS))
    save_adapter(net, tmp_path / "adapter")
    honest = write_merged.merged

    def merged(job: Any, name: str) -> torch.Tensor:
        if name == "head.weight":
            assert list(tmp_path.glob(".out*"))
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(job, name)

    monkeypatch.setattr(write_merged, "merged", merged)
    before = signal.getsignal(signal.SIGTERM)
    args = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *map(str, args), "--output", str(tmp_path / "out.safetensors")])
    assert stopped.value.code == 143
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_merged_state_dict_and_command_agree(tmp_path, capsys, checkpoint: Path):
    torch.save({"state_dict": Net().state_dict()}, tmp_path / "base.ckpt")
    call(capsys, "merge", "--base", tmp_path / "base.ckpt", "--adapter", checkpoint, "--output", tmp_path / "out.ckpt")
    net = Net()
    load_adapter(net, checkpoint)
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert_same_tensors(dict(found), merged_state_dict(net))


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str], monkeypatch, verb: str):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    function = VERBS[verb]
    for parameter in inspect.signature(function).parameters.values():
        option = parameter.kind is parameter.KEYWORD_ONLY
        name = f"--{parameter.name.replace('_', '-')}" if option else parameter.name.upper()
        assert re.search(rf"^  {name}\b.*(  |\n {{6,}})\S.+$", shown, re.MULTILINE), name
    assert f"\n{(function.__doc__ or '').partition(chr(10))[0]}\n" in shown


def test_help_names_the_dtypes_and_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")  # a narrow terminal
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--base BASE model folder, safetensors file, checkpoint or state dict" in shown
    assert "--dtype {float16,bfloat16,float32,float64}" in shown
    assert "--strict-base {true,false}" in shown
    assert "(default: true)" in shown


@pytest.mark.parametrize(
    "args", [["merge", "--dtype=int8"], ["info"], ["melt"], ["extract", "--rank=x"], ["info", "a", "--plain"]]
)
def test_command_names_a_wrong_option(capsys: pytest.CaptureFixture[str], args: list[str]):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert args[-1].partition("=")[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        (["merge"], "--base, --adapter, --output"),
        (["merge", "--base", "a", "--output", "c"], "--adapter"),
        (["export", "a"], "OUTPUT"),
        (["combine", "a"], "--weights, --output"),
    ],
)
def test_missing_options_are_named_as_they_are_typed(capsys: pytest.CaptureFixture[str], args: list[str], missing: str):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    of_verb = f"lightning-lora {args[0]}"
    assert error == f"{of_verb}: the following arguments are required: {missing}; see {of_verb} --help\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminal_and_never_among_results(
    tmp_path, capsys, monkeypatch: pytest.MonkeyPatch, terminal: bool
):
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS))
    save_adapter(net, tmp_path / "adapter")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("lightning_lora.progress.DELAY", 0.0)
    given = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    assert main(["merge", *map(str, given), "--output", str(tmp_path / "o.safetensors")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path / 'o.safetensors'}\n"
    assert ("merging" in printed.err) == terminal
    assert terminal or printed.err == ""
