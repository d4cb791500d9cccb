"""progress_bar: shown on a terminal, after a second, by one process."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    merge,
    merged_state_dict,
    progress,
    save_adapter,
    save_merged,
    unmerge,
)
from lightning_lora.command.info import diff, info
from lightning_lora.command.main import main
from lightning_lora.progress import progress_bar


class Terminal:
    """What a person sees on the standard error, 80 columns wide."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.seen = capsys, ""

    def text(self) -> str:
        self.seen += re.sub(r"\x1b\[[\d;]*m", "", self.capsys.readouterr().err)  # without colours
        return self.seen


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make the standard error a terminal, on which bars come at once."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)  # of each phase of a test
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0, miniters=1))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal(capsys)


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    return model


def test_bar_shows_work_count_and_unit(terminal: Terminal):
    with progress_bar("counting", 3) as advance:
        advance(1)
        advance(1)
    assert "counting" in terminal.text()
    assert "2/3 [" in terminal.text()
    assert "layers/s" in terminal.text()
    with progress_bar("copying", 4_000_000, "bytes") as advance:
        advance(1_000_000)
    assert "1.00M/4.00M" in terminal.text()


@pytest.mark.parametrize("is_watched", [True, False])
def test_short_work_and_work_that_is_not_watched_show_no_bar(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, is_watched: bool
):
    monkeypatch.setattr(progress, "DELAY", 1e9 if is_watched else 0.0)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: is_watched)
    with progress_bar("counting", 3) as advance:
        advance(1)
    assert terminal.text() == ""


def test_only_the_first_process_shows_a_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, shown in ((1, False), (0, True)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with progress_bar("counting", 3) as advance:
            advance(1)
        assert bool(terminal.text()) == shown


def test_exception_takes_the_bar_away_and_goes_on(terminal: Terminal):
    def interrupted() -> None:
        with progress_bar("counting", 3) as advance:
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not terminal.text().rpartition("\r")[0].rpartition("\r")[2].strip()  # the line is erased


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        pytest.param(lambda path, model: (merge(model), unmerge(model)), "unmerging", id="unmerge"),
        pytest.param(lambda path, model: merged_state_dict(model), "merging", id="merged_state_dict"),
        pytest.param(lambda path, model: save_merged(model, path / "merged"), "saving", id="save_merged"),
        pytest.param(lambda path, model: save_adapter(model, path / "another"), "writing", id="save_adapter"),
        pytest.param(lambda path, model: info(path / "adapter"), "measuring", id="info"),
        pytest.param(lambda path, model: diff(path / "b.pt", path / "b.pt"), "comparing", id="diff"),
    ],
)
def test_what_can_take_long_shows_a_bar_that_reaches_the_end(terminal: Terminal, tmp_path: Path, work, shown: str):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict(), tmp_path / "b.pt")
    before = len(terminal.text())
    work(tmp_path, model)
    screen = terminal.text()[before:]
    assert shown in screen
    done, total = re.findall(r"([\d.]+[kM]?)/([\d.]+[kM]?) \[", screen)[-1]
    assert done == total


def test_extract_and_merge_show_each_part(terminal: Terminal, tmp_path: Path):
    base, tuned = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    paths = {
        name: str(tmp_path / name) for name in ("base.safetensors", "tuned.safetensors", "adapter", "m.safetensors")
    }
    base_of = ["--base", paths["base.safetensors"]]
    options = ["--tuned", paths["tuned.safetensors"], "--rank", "2", "--output", paths["adapter"]]
    assert main(["extract", *base_of, *options]) == 0
    assert "comparing" in terminal.text()
    assert "extracting" in terminal.text()
    options = ["--adapter", paths["adapter"], "--output", paths["m.safetensors"]]
    assert main(["merge", *base_of, *options]) == 0
    assert "merging" in terminal.text()
