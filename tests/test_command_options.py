"""The lightning-lora command's options: what --help says of them, and that each does it."""

from __future__ import annotations

import os
import re
import sys

import pytest
from fits import TARGETS
from helpers import Net, assert_same_tensors
from interchange import model, ours, quiet_peers
from on_disk import call, refused, tensors_of
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.command.main import VERBS, main

pytestmark = quiet_peers


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_types_and_defaults(capsys: pytest.CaptureFixture[str], verb: str):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    entries = re.split(r"\n(?=  \S)", shown[shown.index("arguments:" if "arguments:" in shown else "options:") :])
    described = [" ".join(entry.split()) for entry in entries[1:] if not entry.startswith("  -h")]
    assert len(described) >= 2
    for entry in described:
        flag = "(default: False)" in entry
        assert flag or re.search(r"\((required, type: \w+|type: .+, default: .+)\)", entry), entry


def test_help_names_the_dtypes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--base BASE model folder, safetensors, checkpoint or state dict (required, type: str)" in shown
    assert "type: Optional[Literal['float16', 'bfloat16', 'float32', 'float64']], default: null" in shown
    assert "(type: bool, default: True)" in shown


@pytest.mark.parametrize("args", [["merge", "--dtype=int8"], ["info"], ["melt"], ["extract", "--rank=x"]])
def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str], args: list[str]):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert args[-1].partition("=")[0].strip("-") in capsys.readouterr().err


def test_the_largest_file_is_as_large_as_asked_for(tmp_path, capsys):
    model("llama").save_pretrained(tmp_path / "base")
    ours("llama", tmp_path / "adapter")
    given = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter"]
    call(capsys, "merge", *given, "--output", tmp_path / "one")
    call(capsys, "merge", *given, "--output", tmp_path / "out", "--max-shard-size", "12KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert len(files) > 3
    assert max(sizes) <= 12_000 < sizes[0] + sizes[1]
    assert_same_tensors(tensors_of(tmp_path / "out"), load_file(tmp_path / "one" / "model.safetensors"))


def test_verify_reads_what_was_written(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    """A disk that spoils a value is found out with the option alone, and then nothing is left."""
    from lightning_lora.command import write_merged

    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    inject(net := Net(), LoRAConfig(r=2, target_modules=TARGETS))
    save_adapter(net, tmp_path / "adapter")
    honest = write_merged.as_bytes
    monkeypatch.setattr(write_merged, "as_bytes", lambda rows: honest(rows + 0.01 if rows.dim() == 2 else rows))
    given = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter", "--output"]
    assert call(capsys, "merge", *given, tmp_path / "a.safetensors") == f"wrote {tmp_path / 'a.safetensors'}\n"
    assert "differs from what base and adapter give" in refused(
        capsys, "merge", *given, tmp_path / "b.safetensors", "--verify"
    )
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "adapter", "base.safetensors"]


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
    given = ["--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter"]
    assert main(["merge", *map(str, given), "--output", str(tmp_path / "o.safetensors")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path / 'o.safetensors'}\n"
    assert ("merging" in printed.err) == terminal
    assert terminal or printed.err == ""
