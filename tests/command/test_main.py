"""The lightning-lora command: each verb as a user types it, and its options: what --help says, and what they do."""

from __future__ import annotations

import inspect
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
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    combine,
    inject,
    read_adapter,
    save_adapter,
)
from lightning_lora.command.main import VERBS, main
from support.files.expected_weights import check_merge_command
from support.models.peers import call, logits, model, ours, read_by_peft, refused, tensors_of
from support.runs.notices import quiet_peers
from support.runs.training import Net, assert_same_tensors, make_trainer
from support.runs.with_callback import TARGETS

pytestmark = quiet_peers


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


def test_export_names_the_ranks(tmp_path, capsys):
    for name, pattern in (("one", {}), ("two", {"head": 1})):
        inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS, rank_pattern=pattern))
        save_adapter(net, tmp_path / name)
    assert call(capsys, "export", tmp_path / "one", tmp_path / "a").endswith("a: 3 adapted layers of rank 2\n")
    assert call(capsys, "export", tmp_path / "two", tmp_path / "b").endswith("b: 3 adapted layers of ranks 1, 2\n")


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
    assert "there is no such file" in refused(capsys, "merge", *given, "--base", tmp_path / "nothing")


def test_a_terminated_merge_cleans_up(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM in the middle of writing; SIGKILL is in test_atomic_killed_writers.py."""
    from lightning_lora.command import write_merged

    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS))
    save_adapter(net, tmp_path / "adapter")
    honest = write_merged.result_tensor

    def merged(job: Any, name: str) -> torch.Tensor:
        if name == "head.weight":
            assert list(tmp_path.glob(".out*"))
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(job, name)

    monkeypatch.setattr(write_merged, "result_tensor", merged)
    before = signal.getsignal(signal.SIGTERM)
    args = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *map(str, args), "--output", str(tmp_path / "out.safetensors")])
    assert stopped.value.code == 143
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


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
    "args", [["merge", "--dtype=int8"], ["melt"], ["merge", "--strict-base=maybe"], ["info", "a", "--plain"]]
)
def test_command_names_a_wrong_option(capsys: pytest.CaptureFixture[str], args: list[str]):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert args[-1].partition("=")[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        (["merge", "--base", "a"], "--adapter, --output"),
        (["export", "a"], "OUTPUT"),
    ],
)
def test_missing_arguments_are_named_as_they_are_typed(
    capsys: pytest.CaptureFixture[str], args: list[str], missing: str
):
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


def test_combine_takes_the_options_of_the_function(tmp_path: Path, capsys: Any):
    for name, rank in (("a", 4), ("b", 6)):
        inject(net := Net(), LoRAConfig(r=rank, target_modules=TARGETS, init_lora_weights=False))
        save_adapter(net, tmp_path / name)
    given = [tmp_path / "a", tmp_path / "b"]
    # The density that is left out here is 0.5.
    pruning = ["--method", "dare_ties_svd", "--rank", "3", "--seed", "7"]
    printed = call(capsys, "combine", *given, "--weights", 1, -1, *pruning, "--output", tmp_path / "c")
    combine(given, [1, -1], method="dare_ties", density=0.5, rank=3, seed=7, output=tmp_path / "d")
    assert_same_tensors(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("c", "d")))
    assert printed.endswith(f"wrote {tmp_path / 'c'}\n")


@pytest.mark.parametrize("rank", ["0.8", "2"])
def test_combine_of_one_adapter_with_a_rank_shrinks_it(tmp_path: Path, capsys: Any, rank: str):
    inject(net := Net(), LoRAConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    save_adapter(net, tmp_path / "a")
    printed = call(capsys, "combine", tmp_path / "a", "--rank", rank, "--output", tmp_path / "b")
    found = combine([tmp_path / "a"], rank=float(rank) if "." in rank else int(rank))
    assert [line.split()[1] for line in printed.splitlines()[1:-1]] == [str(each.r) for each in found.layers.values()]
    assert max(each.r for each in found.layers.values()) < 4
    assert read_adapter(tmp_path / "b").layers == found.layers


@pytest.mark.slow
def test_plot_writes_a_picture_says_what_is_in_it_and_is_refused_in_one_line(tmp_path: Path, capsys: Any):
    inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    save_adapter(net, tmp_path / "a")
    output = tmp_path / "out.svg"
    assert call(capsys, "plot", tmp_path / "a", "--output", output) == f"wrote {output}: rms, spectra\n"
    assert output.read_bytes()[:5] == b"<?xml"
    (tmp_path / "metrics.csv").write_text("step\n0\n")
    shown = refused(capsys, "plot", tmp_path / "a", "--output", tmp_path / "metrics.csv", "--overwrite")
    assert shown == "lightning-lora plot: the output 'metrics.csv' must end in one of .png, .pdf, .svg.\n"
    assert (tmp_path / "metrics.csv").read_text() == "step\n0\n"
