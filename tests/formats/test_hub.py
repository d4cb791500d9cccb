"""Ids of the hub as sources: out of huggingface_hub's cache, and by a stand-in for its download; without a network."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
)
from support.files.expected_weights import check_merge_command
from support.models.peers import call, fill_, refused, seeded
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
NAME, COMMIT = "somebody/small-adapter", "0123456789abcdef0123456789abcdef01234567"


def base() -> nn.Module:
    net: nn.Module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    return net


def write(path: Path, **options: Any) -> nn.Module:
    inject(net := base(), LoRAConfig(r=1, **options))
    save_adapter(fill_(net), path)
    return net


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub fills it, with files as links into a folder of blobs, and no network."""
    repository = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    write(tmp_path / "made")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in (tmp_path / "made").iterdir():
        shutil.move(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return snapshot


def test_the_id_of_an_adapter_in_the_cache_is_a_source(cache: Path, capsys: pytest.CaptureFixture[str]):
    tuned, x = write(Path("local")), torch.randn(3, 4)
    load_adapter(net := base(), NAME)
    torch.testing.assert_close(net(x), tuned(x))
    load_adapter(net, combine([NAME, NAME], [0.5, 0.5]))
    torch.testing.assert_close(net(x), tuned(x))
    torch.save(base().state_dict(), "base.pt")
    assert call(capsys, "info", NAME).startswith(f"{NAME}: PEFT folder\n")
    call(capsys, "merge", "--base", "base.pt", "--adapter", NAME, "--output", "merged.pt")
    check_merge_command("--base", "base.pt", "--adapter", NAME, "--output", "merged.pt")


def test_path_that_is_there_wins_over_the_id(cache: Path):
    write(Path(NAME), lora_alpha=2)
    assert [layer.scaling for layer in read_adapter(NAME).layers.values()] == [2.0, 2.0]
    shutil.rmtree(NAME)
    assert [layer.scaling for layer in read_adapter(NAME).layers.values()] == [8.0, 8.0]


def test_only_the_files_of_a_peft_folder_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    read_adapter(NAME)
    files = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    assert asked == [(NAME, {"allow_patterns": files})]
    for source in ("runs/best.ckpt", "a/b/c", "/a/b", "./a", "../b", "adapter", "a b/c", Path(NAME), "x/y.safetensors"):
        with pytest.raises(LoRAError):
            read_adapter(source)
    assert len(asked) == 1


def test_what_is_not_in_the_cache_or_holds_no_adapter_is_refused(cache: Path, capsys: Any):
    with pytest.raises(LoRAError, match=r"^nobody/nothing: .*as the id of a repository .* it cannot be fetched: \w"):
        load_adapter(base(), "nobody/nothing")
    assert "it cannot be fetched" in refused(capsys, "info", "nobody/nothing")
    (cache / "adapter_config.json").unlink()
    with pytest.raises(LoRAError, match=r"holds no adapter_config\.json|cannot be fetched"):
        read_adapter(NAME)
    Path(NAME).parent.mkdir()
    Path(NAME).symlink_to("not-mounted")  # a link that leads nowhere is no id
    with pytest.raises(LoRAError, match=rf"^{NAME}: there is no such file\.$"):
        read_adapter(NAME)


def test_id_without_huggingface_hub_is_refused_with_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch):
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LoRAError, match=rf"^{NAME}: there is no such .* needs huggingface_hub: pip install"):
        read_adapter(NAME)
