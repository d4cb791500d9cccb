"""lightning-lora combine: a PEFT folder of several adapters, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import combine, save_adapter
from support.notices import quiet_peers
from support.peers import base_folder, call, config_of, in_memory, logits, ours, read_by_peft, refused, tensors_of

pytestmark = quiet_peers


def both(path: Path) -> list[Path]:
    ours("llama", path / "a")
    net = ours("llama", path / "b", r=6, use_rslora=True)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.mul_(-0.7)
    save_adapter(net, path / "b")
    return [path / "a", path / "b"]


@pytest.mark.slow
def test_combined_folder_is_read_by_peft_and_merged_by_the_command(tmp_path: Path, capsys: Any):
    given = both(tmp_path)
    printed = call(capsys, "combine", *given, "--weights", 0.7, -0.3, "--method", "cat", "--output", tmp_path / "c")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith("model.")}
    assert rows["model.layers.0.self_attn.v_proj"] == ["10", "100.00%"]
    assert printed.endswith(f"wrote {tmp_path / 'c'}\n")
    base_folder("llama", tmp_path / "base")
    call(capsys, "merge", "--base", tmp_path / "base", "--adapter", tmp_path / "c", "--output", tmp_path / "merged")
    base, merged = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "merged")
    one, other = (in_memory("llama", path) for path in given)
    for name, weight in base.items():
        expected = weight + 0.7 * (one[name] - weight) - 0.3 * (other[name] - weight)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)
    peft = logits(read_by_peft("llama", tmp_path / "c"))
    assert not torch.allclose(peft, logits(read_by_peft("llama", tmp_path / "a")), atol=1e-3)


def test_options_are_those_of_the_function(tmp_path: Path, capsys: Any):
    given = both(tmp_path)
    # The density that is left out here is 0.5.
    pruning = ["--method", "dare_ties_svd", "--rank", "3", "--seed", "7"]
    printed = call(capsys, "combine", *given, "--weights", 1, 1, *pruning, "--output", tmp_path / "c")
    combine(given, [1, 1], method="dare_ties", density=0.5, rank=3, seed=7, output=tmp_path / "d")
    found, expected = tensors_of(tmp_path / "c"), tensors_of(tmp_path / "d")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert config_of(tmp_path / "c")["r"] == 3
    assert "100.00%" not in printed


def test_an_earlier_result_is_replaced_only_where_that_is_said(tmp_path: Path, capsys: Any):
    a, b = both(tmp_path)
    command: list[object] = ["combine", a, b, "--weights", 1, 1, "--output", tmp_path / "c"]
    call(capsys, *command)
    assert "pass --overwrite" in refused(capsys, *command)
    call(capsys, *command, "--overwrite")
    assert "write somewhere else" in refused(capsys, "combine", a, b, "--weights", 1, 1, "--output", a, "--overwrite")


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapter_of_another_base_is_refused_or_warned_of(tmp_path: Path, capsys: Any, strict: bool):
    a, b = both(tmp_path)
    net = ours("llama")
    net.get_parameter("model.norm.weight").data.mul_(1.5)
    save_adapter(net, b)
    command: list[object] = ["combine", a, b, "--weights", 1, 1, "--output", tmp_path / "c"]
    if strict:
        message = refused(capsys, *command)
        assert message.startswith("lightning-lora combine: adapter: belongs to another base: values of 'model.norm")
        assert not (tmp_path / "c").exists()
    else:
        with pytest.warns(UserWarning, match="another base"):
            call(capsys, *command, "--strict-base=false")


def test_an_adapter_without_options_is_refused_with_the_remedy(tmp_path: Path, capsys: Any):
    a, _ = both(tmp_path)
    torch.save({"0.lora_A": torch.ones(1, 2), "0.lora_B": torch.ones(2, 1)}, tmp_path / "bare.pt")
    message = refused(capsys, "combine", a, tmp_path / "bare.pt", "--weights", 1, 1, "--output", tmp_path / "c")
    assert "stores tensors and no options" in message
    assert "pass --lora-alpha to merge or export" in message
