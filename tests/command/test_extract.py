"""An adapter from a full fine-tune: exact if the change has the rank, otherwise the best of its rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAError, load_adapter
from lightning_lora.command.extract import _factors, extract
from lightning_lora.command.main import main
from lightning_lora.files.weights import open_weights
from lightning_lora.formats.peft_folder import write_folder
from support.files.expected_weights import merge_and_check
from support.models.peers import logits, model, read_by_peft, seeded
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


def tuned(name: str, rank: int | None, others: tuple[str, ...] = ()) -> nn.Module:
    """The model after a change of that rank (None: full) in every matrix, and of the tensors that `others` end."""
    net = model(name)
    generator = torch.Generator().manual_seed(6)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    with torch.no_grad():
        for key, parameter in net.named_parameters():
            rows, columns = len(parameter), parameter[0].numel()
            if parameter.dim() > 1 and key.endswith(".weight"):
                change = noise(rows, columns) if rank is None else noise(rows, rank) @ noise(rank, columns)
                parameter.add_(change.view(parameter.shape))
            elif key.endswith(others) and others:
                parameter.add_(noise(*parameter.shape))
    return net


def saved(path: Path, net: nn.Module) -> Path:
    save_file({key: value.clone() for key, value in net.state_dict().items()}, path)
    return path


def run(tmp_path: Path, capsys: Any, name: str, after: nn.Module, *args: str, rank: int = 3, status: int = 0) -> str:
    base, result = saved(tmp_path / "base.safetensors", model(name)), saved(tmp_path / "tuned.safetensors", after)
    given = ["--base", base, "--tuned", result, "--output", tmp_path / "adapter", "--rank", rank, *args]
    assert main(["extract", *map(str, given)]) == status
    printed = capsys.readouterr()
    return str(printed.out if status == 0 else printed.err)


CASES = {
    "bert": ((".bias", "LayerNorm.weight"), ()),
    "convolutions": (("bn.weight", "one.bias"), ("--exclude", "head", "mha.out_proj")),
}


@pytest.mark.parametrize("name", CASES)
def test_extract_keeps_a_change_of_the_rank_whole(tmp_path, capsys, name: str):
    others, args = CASES[name]
    after = tuned(name, 3, others)
    shown = run(tmp_path, capsys, name, after, *args)
    assert "kept 100.00% of the squared norm of the change" in shown
    merge_and_check(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for key, value in after.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    fresh = model(name)
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(after), rtol=1e-3, atol=1e-3)
    if name != "convolutions":  # its attention's out_proj is carried whole, which peft does not read there
        peer = read_by_peft(name, tmp_path / "adapter")
        torch.testing.assert_close(logits(peer), logits(after), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_extract_of_conv1d_with_fan_in_fan_out_gives_the_tuned_outputs(tmp_path, capsys):
    after = tuned("gpt2", 3)
    after.tie_weights()
    run(tmp_path, capsys, "gpt2", after, "--fan-in-fan-out", "--exclude", "lm_head", "wte")
    fresh = model("gpt2")
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(after), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "shape"), [("Linear", (40, 60)), ("Conv1D", (40, 60)), ("Linear", (700, 600)), ("Conv", (8, 4, 3, 3))]
)
def test_extract_gives_the_best_factors_of_their_rank(kind: str, shape: tuple[int, ...]):
    change = torch.randn(shape) * torch.logspace(0, -2, shape[-1])
    a, b, share, square = _factors(change, 5, kind)
    product = (b.flatten(1) @ a.flatten(1)).T if kind == "Conv1D" else b.flatten(1) @ a.flatten(1)
    values = torch.linalg.svdvals(change.flatten(1).double())
    best = float(values[:5].square().sum() / values.square().sum())
    assert share <= best + 1e-6
    assert share == pytest.approx(best, rel=0.02 if min(shape[:2]) > 512 else 1e-5)
    left = float((change - product.view(shape)).double().square().sum()) / square
    assert 1 - left == pytest.approx(share, abs=1e-5)


def test_extract_reports_the_share_that_it_kept(tmp_path, capsys):
    after = tuned("llama", None)
    saved(tmp_path / "a.safetensors", model("llama"))
    saved(tmp_path / "b.safetensors", after)
    found = extract(open_weights(tmp_path / "a.safetensors"), open_weights(tmp_path / "b.safetensors"), 4)
    assert 0.1 < found.total() < 0.9
    assert f"kept {found.total():.2%} of the squared norm" in run(tmp_path, capsys, "llama", after, rank=4)
    more = extract(open_weights(tmp_path / "a.safetensors"), open_weights(tmp_path / "b.safetensors"), 16)
    assert more.total() > found.total()
    assert more.adapter.config.rank("model.layers.0.self_attn.q_proj") == 16


def test_extract_carries_or_leaves_out_what_else_changed(tmp_path, capsys):
    after = tuned("llama", 2, ("norm.weight",))
    assert "carried whole: model.layers.0.input_layernorm.weight" in run(tmp_path, capsys, "llama", after)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "model.norm" in config["modules_to_save"]
    shown = run(tmp_path, capsys, "llama", after, "--drop-rest", "--overwrite")
    assert "left out: model.layers.0.input_layernorm.weight" in shown
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] is None
    after = tuned("llama", 2)
    shown = run(tmp_path, capsys, "llama", after, "--exclude", "embed_tokens", "down_proj", "--overwrite")
    carried = next(line for line in shown.splitlines() if line.startswith("carried whole"))
    assert carried.count("down_proj.weight") == 2
    assert "model.embed_tokens.weight" in carried


def test_a_change_that_nothing_can_carry_is_named(tmp_path, capsys):
    after = tuned("convolutions", 2, ("mha.in_proj_weight",))
    shown = run(tmp_path, capsys, "convolutions", after, status=1)
    assert "'mha.in_proj_weight' changed, and neither an adapter nor modules_to_save can carry it" in shown
    shown = run(tmp_path, capsys, "convolutions", after, "--drop-rest")
    assert "left out: mha.in_proj_weight\n" in shown  # and out_proj is written
    shown = run(tmp_path, capsys, "convolutions", after, "--drop-rest", "--exclude", "out_proj", "--overwrite")
    assert "left out: mha.in_proj_weight, mha.out_proj.weight" in shown


@pytest.mark.parametrize(
    ("option", "entry", "hint"),
    [("--exclude", "dwn_proj", "did you mean 'down_proj'"), ("--embeddings", "layers.1", "")],
)
def test_an_entry_that_names_no_module_with_tensors_is_refused(tmp_path, capsys, option: str, entry: str, hint: str):
    """Its misspelt module would be adapted without a word. A part of a model, as layers.1, is no such module."""
    shown = run(tmp_path, capsys, "llama", tuned("llama", 3), option, "down_proj", entry, status=1)
    assert f"{option} {entry!r} names no module that has tensors; {hint}" in shown
    assert not (tmp_path / "adapter").exists()
    assert "r must be a whole number" in run(tmp_path, capsys, "llama", tuned("llama", 2), rank=0, status=1)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("no weight of two dimensions or more differs", lambda state: None),
        ("'model.norm.weight' is only in", lambda state: state.pop("model.norm.weight")),
        ("'model.norm.weight' has shape", lambda state: state.update({"model.norm.weight": torch.ones(3)})),
    ],
)
def test_versions_of_different_models_are_refused(tmp_path, message: str, change: Any):
    base = saved(tmp_path / "base.safetensors", model("llama"))
    state = load_file(base)
    change(state)
    save_file(state, tmp_path / "tuned.safetensors")
    with pytest.raises(LoRAError, match=message):
        extract(open_weights(base), open_weights(tmp_path / "tuned.safetensors"), 2)


def two_bases(path: Path, before: torch.Tensor, change: torch.Tensor, dtype: torch.dtype | None = None) -> list[Any]:
    """One weight before and after a change."""
    save_file({"a.weight": before}, path / "base.safetensors")
    save_file({"a.weight": (before + change).to(dtype or before.dtype)}, path / "tuned.safetensors")
    return [open_weights(path / name) for name in ("base.safetensors", "tuned.safetensors")]


@pytest.mark.parametrize(("size", "rank"), [(1e-200, 2), (1e-12, 3), (1e120, 2)])
def test_extract_of_float64_is_exact_in_float64(tmp_path, size: float, rank: int):
    """As float32 it would be lost, beyond the range, or ten million times coarser."""
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 2), (2, 7)))
    before = torch.zeros(9, 7, dtype=torch.float64)
    change = left @ right * size
    found = extract(*two_bases(tmp_path, before, change), rank)
    a, b = (found.adapter.factor("a", factor) for factor in ("lora_A", "lora_B"))
    assert a.dtype == b.dtype == torch.float64
    assert found.kept["a"] == pytest.approx(1)
    assert float((b @ a / size - change / size).norm()) < 1e-12


def test_extract_of_a_change_below_float32s_digits_is_the_change(tmp_path):
    before = torch.ones(6, 5, dtype=torch.float64)
    change = torch.outer(torch.arange(6.0), torch.ones(5)).double() * 1e-10
    found = extract(*two_bases(tmp_path, before, change), 1)
    product = found.adapter.factor("a", "lora_B") @ found.adapter.factor("a", "lora_A")
    torch.testing.assert_close(product, (before + change) - before, rtol=1e-6, atol=1e-20)
    assert found.total() == pytest.approx(1)


def test_extract_from_a_narrow_base_to_a_wide_result_takes_the_wider(tmp_path):
    base = torch.ones(6, 5, dtype=torch.bfloat16)
    found = extract(*two_bases(tmp_path, base, torch.full((6, 5), 0.125), torch.float64), 1)
    product = found.adapter.factor("a", "lora_B") @ found.adapter.factor("a", "lora_A")
    assert product.dtype == torch.float64
    torch.testing.assert_close(product, torch.full((6, 5), 0.125, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [float("nan"), 3.4e38])  # the difference to the second is beyond the range
def test_extract_names_a_change_that_is_not_finite(tmp_path, value: float):
    before, after = torch.full((4, 4), -1e38), torch.full((4, 4), -1e38)
    after[1, 2] = value
    save_file({"a.weight": before}, tmp_path / "base.safetensors")
    save_file({"a.weight": after}, tmp_path / "tuned.safetensors")
    both = [open_weights(tmp_path / name) for name in ("base.safetensors", "tuned.safetensors")]
    with pytest.raises(LoRAError, match=r"the change of 'a.weight' is not finite.*--exclude a"):
        extract(*both, 2)


def test_extract_passes_over_what_is_nan_in_both_or_differs_by_the_rounding_of_the_bases_dtype(tmp_path):
    table = torch.linspace(0.1, 0.9, 16).view(4, 4)
    base = {"a.weight": torch.zeros(4, 4), "b.weight": table.bfloat16(), "c.weight": torch.full((4, 4), torch.nan)}
    save_file({**base, "a.bias": torch.ones(4)}, tmp_path / "base.safetensors")
    tuned = {"a.weight": torch.ones(4, 4), "b.weight": table, "c.weight": torch.full((4, 4), torch.nan)}
    save_file({**tuned, "a.bias": torch.ones(4)}, tmp_path / "tuned.safetensors")
    found = extract(*(open_weights(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")), 2).adapter
    assert sorted(found.tensors) == ["a.lora_A", "a.lora_B"]
    assert found.fingerprint.keys() == {"a.weight", "a.bias", "b.weight", "c.weight"}


class Upward(nn.Module):
    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3)
        self.add_module(name, layer)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("up", lambda: nn.ConvTranspose1d(6, 4, 2)), ("deconv1", lambda: nn.ConvTranspose2d(4, 4, 3))],
)
def test_extract_carries_a_transposed_convolution_whole(tmp_path, name: str, layer: Any):
    before, after = (seeded(lambda: Upward(name, layer())) for _ in range(2))
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn_like(parameter) if parameter.dim() > 1 else 0.0)
    files = [saved(tmp_path / f"{i}.safetensors", net) for i, net in enumerate((before, after))]
    found = extract(*map(open_weights, files), 2)
    assert found.adapter.layers.keys() == {"down"}
    write_folder(found.adapter, tmp_path / "adapter")
    load_adapter(before, tmp_path / "adapter")
    assert torch.equal(before.get_submodule(name).weight, after.get_submodule(name).weight)


def test_extract_of_a_convolution_beside_statistics_that_did_not_change_loads_by_itself(tmp_path):
    before, after = (seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))) for _ in range(2))
    with torch.no_grad():
        after.get_submodule("0").weight.add_(1)
    files = [saved(tmp_path / f"{i}.safetensors", net) for i, net in enumerate((before, after))]
    found = extract(*map(open_weights, files), 1)
    assert found.adapter.layers.keys() == {"0"}
    write_folder(found.adapter, tmp_path / "adapter")
    load_adapter(before, tmp_path / "adapter")
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(before(x), after(x))
