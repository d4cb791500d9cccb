"""Files that contradict themselves: short records, damaged tensors, and ties in config.json."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter, unload
from lightning_lora.files.torch_archive import read_torch_file
from support.files.expected_weights import check_merge_command
from support.models.peers import call, refused

ROWS, COLUMNS, RANK, ALPHA = 5, 7, 2, 4.0


def save_with_claim(path: Path, stored: dict[str, torch.Tensor], claimed: dict[str, torch.Tensor]) -> None:
    """Write what torch.save makes of `stored`, but for the pickle, which describes `claimed`; check sums are right."""
    pickled = []
    for state in (claimed, stored):
        torch.save(state, path)
        with zipfile.ZipFile(path) as archive:
            pickled.append(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    content = path.read_bytes()
    sums = [zlib.crc32(data).to_bytes(4, "little") for data in pickled]
    for old, new in ((pickled[1], pickled[0]), (sums[1], sums[0])):
        assert len(old) == len(new)
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def adapter_tensors(rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {"one.lora_A": torch.randn(RANK, COLUMNS), "one.lora_B": torch.randn(rows, RANK)}


def write_adapter(path: Path, rows: int = ROWS) -> Path:
    """A PEFT folder that knows nothing of its base."""
    path.mkdir()
    tensors = {f"base_model.model.{name}.weight": tensor for name, tensor in adapter_tensors(rows).items()}
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["one"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("short", ["one.weight", "last.weight"])
def test_merge_and_info_of_a_base_that_claims_more_than_its_record_holds_are_refused(tmp_path, capsys, short: str):
    """Other bytes follow in the file, so that only the record's own size can tell; an adapter changes the first."""
    claimed = {name: torch.randn(ROWS, COLUMNS) for name in ("one.weight", "two.weight", "last.weight")}
    torch.save(claimed, tmp_path / "honest.pt")
    save_with_claim(tmp_path / "base.pt", claimed | {short: claimed[short][:-1].clone()}, claimed)
    write_adapter(tmp_path / "adapter")
    given = ["--adapter", tmp_path / "adapter", "--output", tmp_path / "out.pt"]
    expected = "its tensors claim more bytes than its records hold"
    assert expected in refused(capsys, "merge", "--base", tmp_path / "base.pt", *given)
    assert expected in refused(capsys, "info", tmp_path / "base.pt")
    assert not (tmp_path / "out.pt").exists()
    call(capsys, "merge", "--base", tmp_path / "honest.pt", *given)


def test_load_adapter_of_a_file_that_claims_more_than_its_record_holds_is_refused(tmp_path):
    net = nn.ModuleDict({"one": nn.Linear(COLUMNS, ROWS)})
    inject(net, LoRAConfig(r=RANK, target_modules=["one"]))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_with_claim(tmp_path / "a.pt", adapter_tensors(ROWS - 1), adapter_tensors())
    with pytest.raises(LoRAError, match=r"a\.pt: cannot be read as a checkpoint"):
        load_adapter(net, tmp_path / "a.pt")
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    torch.save(adapter_tensors(), tmp_path / "a.pt")
    load_adapter(net, tmp_path / "a.pt")


# --- check sums ---


def test_every_flipped_bit_in_a_record_is_seen_where_a_file_is_read_whole(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": adapter_tensors()}, path)
    read_torch_file(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [(at, info) for info in archive.infolist() for at in [content.find(archive.read(info))]]
    flips = [at + i for at, info in places if at >= 0 for i in range(0, info.file_size, 1 + info.file_size // 40)]
    assert len(flips) > 80
    for number, at in enumerate(flips):
        damaged = content[:at] + bytes([content[at] ^ (1 << number % 8)]) + content[at + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(LoRAError, match="its check sum differs"):
            read_torch_file(path)


@pytest.mark.parametrize("spoiled", ["one.weight", "two.weight"])
def test_merge_into_a_damaged_file_is_refused_and_info_reads_no_tensor_of_it(tmp_path, capsys, spoiled: str):
    """The record that is merged into would get a right check sum, and the other would be copied as it is."""
    base = {"one.weight": torch.randn(ROWS, COLUMNS), "two.weight": torch.randn(9)}
    torch.save(base, tmp_path / "base.pt")
    content = (tmp_path / "base.pt").read_bytes()
    at = content.find(base[spoiled].numpy().tobytes()) + 5
    (tmp_path / "base.pt").write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    write_adapter(tmp_path / "adapter")
    given = ["--base", tmp_path / "base.pt", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out.pt"]
    assert "its check sum differs" in refused(capsys, "merge", *given)
    assert not (tmp_path / "out.pt").exists()
    call(capsys, "info", tmp_path / "base.pt")


# --- ties and vocabulary that only the inner config names ---

VOCAB, WIDTH = 11, 4


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"text_config": {"tie_word_embeddings": True, "vocab_size": VOCAB}}, True),
        ({"text_config": {"vocab_size": VOCAB}, "tie_word_embeddings": True}, True),
        ({"text_config": {"vocab_size": VOCAB}, "architectures": ["AForCausalLM"]}, True),
        (
            {"text_config": {"tie_word_embeddings": False, "vocab_size": VOCAB}, "architectures": ["AForCausalLM"]},
            False,
        ),
        ({"text_config": {"tie_word_embeddings": True, "vocab_size": VOCAB}, "tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True, "vocab_size": 99}, "vocab_size": VOCAB}, True),
    ],
)
def test_merge_into_an_embedding_whose_text_config_ties_it_is_refused(
    tmp_path, capsys, config: dict[str, Any], tied: bool
):
    base = tmp_path / "base"
    base.mkdir()
    net = nn.ModuleDict({"embed": nn.Embedding(VOCAB, WIDTH), "body": nn.Linear(WIDTH, WIDTH)})
    save_file(net.state_dict(), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    for target in ("embed", "body"):
        other = nn.ModuleDict(dict(net.items()))
        inject(other, LoRAConfig(r=2, target_modules=[target], init_lora_weights=False))
        save_adapter(other, tmp_path / target)
        unload(other)
    given = ["merge", "--base", base, "--adapter"]
    call(capsys, *given, tmp_path / "body", "--output", tmp_path / "a")
    if tied:
        shown = refused(capsys, *given, tmp_path / "embed", "--output", tmp_path / "b")
        assert "'embed.weight' is also tied to the other end of the model" in shown
        assert not (tmp_path / "b").exists()
    else:
        call(capsys, *given, tmp_path / "embed", "--output", tmp_path / "b")
        check_merge_command(*given, tmp_path / "embed", "--output", tmp_path / "b")
