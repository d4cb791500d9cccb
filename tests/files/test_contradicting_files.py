"""Files that contradict themselves: short records, damaged results, and ties in config.json."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter, unload
from lightning_lora.command.main import main
from lightning_lora.command.write_merged import verify_result
from lightning_lora.files.torch_archive import read_torch_file
from lightning_lora.files.weights import open_weights
from support.peers import call, refused

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


@pytest.mark.parametrize("short", ["one.weight", "two.weight", "last.weight"])
def test_merge_and_info_of_a_base_that_claims_more_than_its_record_holds_are_refused(tmp_path, capsys, short: str):
    """Other bytes follow in the file, so that only the record's own size can tell; an adapter changes the first."""
    claimed = {name: torch.randn(ROWS, COLUMNS) for name in ("one.weight", "two.weight", "last.weight")}
    torch.save(claimed, tmp_path / "honest.pt")
    save_with_claim(tmp_path / "base.pt", claimed | {short: claimed[short][:-1].clone()}, claimed)
    write_adapter(tmp_path / "adapter")
    given = ["--adapter", tmp_path / "adapter", "--output", tmp_path / "out.pt"]
    expected = f"'{short}' claims bytes outside its record"
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


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt"])
def test_every_flipped_bit_in_a_record_is_seen_where_a_file_is_read_whole(tmp_path, name: str):
    state = adapter_tensors()
    path = tmp_path / name
    torch.save({"state_dict": state} if name == "a.ckpt" else state, path)
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


# --- merge --verify, from both sides ---

Change = Callable[[dict[str, torch.Tensor]], object]
SUFFIXES = {"folder": "", "safetensors": ".safetensors", "torch": ".pt"}


def state_of(path: Path) -> dict[str, torch.Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def write_state(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".pt":
        torch.save(state, path)
        return
    if not path.suffix:
        path.mkdir(exist_ok=True)
    save_file(state, path if path.suffix else path / "model.safetensors")


def verified(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    form: str = "safetensors",
    dtype: torch.dtype | None = None,
) -> int:
    """The status of `merge --verify` where `change` acts on the result between writing and reading it again."""
    state = {"one.weight": torch.randn(ROWS, COLUMNS), "two.weight": torch.randn(9), "count": torch.tensor([4, 5])}
    base, out = path / f"base{SUFFIXES[form]}", path / f"out{SUFFIXES[form]}"
    write_state({name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()}, base)
    write_adapter(path / "adapter")

    def verify_spoiled(job: Any, result: Any) -> None:
        written = state_of(result.path)
        change(written)
        write_state(written, result.path)
        verify_result(job, open_weights(result.path))

    monkeypatch.setattr("lightning_lora.command.merge.verify_result", verify_spoiled)
    given = ["--base", base, "--adapter", path / "adapter", "--output", out]
    status = main(["merge", *map(str, given), "--verify"])
    assert out.exists() == (status == 0)
    return status


def add(name: str, amount: float) -> Change:
    return lambda state: state[name].view(-1)[3:4].add_(amount)


def step(name: str, steps: int) -> Change:
    """Move one value by that many values of its dtype."""
    return lambda state: (
        state[name].view({4: torch.int32, 2: torch.int16}[state[name].itemsize]).view(-1)[3:4].add_(steps)
    )


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda state: state.update({name: state[name].to(dtype)})


WRONG: dict[str, tuple[str, Change]] = {
    "merged value off by 1e-4": ("'one.weight' differs", add("one.weight", 1e-4)),
    "merged value off by 1e-5": ("'one.weight' differs", add("one.weight", -1e-5)),
    "other value off by one step": ("'two.weight' differs", step("two.weight", 1)),
    "whole number off by one": ("'count' differs", lambda state: state["count"].add_(1)),
    "NaN": ("'one.weight' differs", add("one.weight", float("nan"))),
    "tensor missing": ("'two.weight' is in only one", lambda state: state.pop("two.weight")),
    "tensor too many": ("'three' is in only one", lambda state: state.update(three=torch.ones(2))),
    "wider dtype": ("'one.weight' is torch.float64", cast("one.weight", torch.float64)),
    "narrower dtype": ("'one.weight' is torch.bfloat16", cast("one.weight", torch.bfloat16)),
    "dtype of another tensor": ("'two.weight' is torch.float64", cast("two.weight", torch.float64)),
    "another shape": ("'one.weight' is torch.float32 (7, 5)", lambda s: s["one.weight"].resize_(7, 5)),
}


@pytest.mark.parametrize("form", ["folder", "safetensors", "torch"])
@pytest.mark.parametrize("case", WRONG)
def test_verify_of_a_spoiled_result_names_the_tensor_and_leaves_nothing(
    tmp_path, capsys, monkeypatch: pytest.MonkeyPatch, case: str, form: str
):
    message, change = WRONG[case]
    assert verified(tmp_path, monkeypatch, change, form) == 1
    assert f"verify: {message}" in capsys.readouterr().err


ROUNDED: dict[str, tuple[torch.dtype, Change]] = {
    "as written": (torch.float32, lambda state: None),
    "float32, one step up": (torch.float32, step("one.weight", 1)),
    "float32, one step down": (torch.float32, step("one.weight", -1)),
    "bfloat16, as written": (torch.bfloat16, lambda state: None),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_verify_of_a_result_that_rounding_explains_accepts_it(tmp_path, monkeypatch: pytest.MonkeyPatch, case: str):
    dtype, change = ROUNDED[case]
    assert verified(tmp_path, monkeypatch, change, dtype=dtype) == 0


@pytest.mark.parametrize("steps", [-2, 2])
def test_verify_of_a_16_bit_result_that_is_two_steps_off_refuses_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    assert verified(tmp_path, monkeypatch, step("one.weight", steps), dtype=torch.bfloat16) == 1


# --- ties and vocabulary that only the inner config names ---

VOCAB, WIDTH = 11, 4


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"text_config": {"tie_word_embeddings": True, "vocab_size": VOCAB}}, True),
        ({"text_config": {"tie_word_embeddings": True}, "vocab_size": VOCAB}, True),
        ({"text_config": {"vocab_size": VOCAB}, "tie_word_embeddings": True}, True),
        ({"text_config": {"vocab_size": VOCAB}, "architectures": ["AForCausalLM"]}, True),
        (
            {"text_config": {"tie_word_embeddings": False, "vocab_size": VOCAB}, "architectures": ["AForCausalLM"]},
            False,
        ),
        ({"text_config": {"tie_word_embeddings": True, "vocab_size": 10}}, False),
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
        call(capsys, *given, tmp_path / "embed", "--output", tmp_path / "b", "--verify")
