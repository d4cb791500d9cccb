"""Every flag of every verb of the command changes what comes out."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.command.main import VERBS, main


class Small(nn.Module):
    """An embedding whose name does not say so, a square linear layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another base, a full fine-tune, and an adapter with and without its options."""
    path = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(1)
    net = Small()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, step in {"base": 0.0, "other": 0.1, "tuned": 0.3}.items():
        (path / name).mkdir()
        moved = {key: tensor + step * torch.randn(tensor.shape) for key, tensor in state.items()}
        save_file(moved, path / name / "model.safetensors")
    inject(net, LoRAConfig(r=2, target_modules=["body"], init_lora_weights=False))
    save_adapter(net, path / "adapter")
    with torch.no_grad():
        net.body.lora_B.mul_(2)
    save_adapter(net, path / "another")
    with torch.no_grad():
        net.norm.weight.mul_(2)
    save_adapter(net, path / "elsewhere")
    torch.save({name: tensor for name, tensor in net.state_dict().items() if "lora_" in name}, path / "bare.pt")
    return path


MERGE = "merge --base IN/base --adapter IN/adapter --output out"
EXTRACT = "extract --base IN/base --tuned IN/tuned --output out --rank 1"
COMBINE = "combine IN/adapter IN/another --weights 1 1 --output out"
# By verb and flag: a command, what is added to it, and what must differ then, the rest being the same.
CASES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("info", "--json"): ("info IN/adapter", "--json", "printed"),
    ("diff", "--json"): ("diff IN/base IN/tuned", "--json", "printed"),
    ("merge", "--json"): (MERGE, "--json", "printed"),
    ("export", "--json"): ("export IN/adapter out", "--json", "printed"),
    ("extract", "--json"): (EXTRACT, "--json", "printed"),
    ("combine", "--json"): (COMBINE, "--json", "printed"),
    ("plot", "--json"): ("plot IN/adapter --output out.png", "--json", "printed"),
    ("merge", "--dtype"): (MERGE, "--dtype=float16", "files"),
    ("merge", "--overwrite"): (f"{MERGE} --dtype=float64", "--overwrite", "status"),
    ("merge", "--strict-base"): (MERGE.replace("IN/base", "IN/other"), "--strict-base=false", "status"),
    ("merge", "--lora-alpha"): (MERGE.replace("IN/adapter", "IN/bare.pt"), "--lora-alpha=3", "status"),
    ("export", "--overwrite"): ("export IN/another out", "--overwrite", "status"),
    ("extract", "--overwrite"): (EXTRACT, "--overwrite", "status"),
    ("export", "--lora-alpha"): ("export IN/bare.pt out", "--lora-alpha=3", "status"),
    ("export", "--plain"): ("export IN/adapter out", "--plain", "files"),
    ("plot", "--overwrite"): ("plot IN/another --output out.png", "--overwrite", "status"),
    ("extract", "--rank"): (EXTRACT, "--rank=2", "files"),
    ("extract", "--exclude"): (EXTRACT, "--exclude vectors", "files"),
    ("extract", "--embeddings"): (EXTRACT, "--embeddings vectors", "files"),
    ("extract", "--fan-in-fan-out"): (EXTRACT, "--fan-in-fan-out", "files"),
    ("extract", "--drop-rest"): (EXTRACT, "--drop-rest", "files"),
    ("combine", "--weights"): (COMBINE, "--weights 2 1", "files"),
    ("combine", "--method"): (COMBINE, "--method=cat", "files"),
    ("combine", "--rank"): (f"{COMBINE} --method=svd", "--rank=1", "files"),
    ("combine", "--density"): (f"{COMBINE} --method=ties --density=.9", "--density=.3", "files"),
    ("combine", "--seed"): (f"{COMBINE} --method=dare_linear --density=.5", "--seed=1", "files"),
    ("combine", "--overwrite"): (COMBINE, "--overwrite", "status"),
    ("combine", "--strict-base"): (COMBINE.replace("another", "elsewhere"), "--strict-base=false", "status"),
}
# What was written there already.
BEFORE = {
    "--overwrite": {
        "merge": MERGE,
        "export": "export IN/adapter out",
        "plot": "plot IN/adapter --output out.png",
        "extract": EXTRACT.replace("--rank 1", "--rank 2"),
        "combine": COMBINE.replace("1 1", "2 1"),
    }
}


@dataclass(frozen=True)
class Outcome:
    status: int
    printed: str
    files: dict[str, bytes]


@pytest.fixture
def run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*commands: str) -> Outcome:
        """What comes of the last command in an empty folder; those before it succeed."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        status = 0
        for command in commands:
            assert status == 0
            capsys.readouterr()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "lightning_lora: adapter: belongs to another base")
                status = main(command.replace("IN/", f"{inputs}/").split())
        files = {str(file): file.read_bytes() for file in Path().rglob("*") if file.is_file()}
        return Outcome(status, capsys.readouterr().out, files)

    return run


@pytest.mark.parametrize(("verb", "flag"), CASES)
def test_a_flag_of_a_verb_changes_the_outcome(run: Any, verb: str, flag: str):
    command, given, differs = CASES[verb, flag]
    before = [BEFORE[flag][verb]] if flag in BEFORE else []
    without, changed = run(*before, command), run(*before, f"{command} {given}")
    assert (without.status, changed.status) == ((1, 0) if differs == "status" else (0, 0))
    assert (without.files != changed.files) == (differs != "printed")
    if differs == "printed":
        assert without.printed != changed.printed


def test_a_verb_that_runs_twice_writes_the_same(run: Any):
    """Else a flag would seem to change the files."""
    for command in (MERGE, EXTRACT, f"{COMBINE} --method=dare_linear --density=.5", "export IN/adapter out"):
        assert run(command) == run(command)


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_a_verb_is_tried(verb: str, capsys: pytest.CaptureFixture[str]):
    """All options but those that name a verb's inputs and its output."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    named = set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE)) - {"--base", "--adapter", "--tuned", "--output"}
    assert {flag for of_verb, flag in CASES if of_verb == verb} == named
