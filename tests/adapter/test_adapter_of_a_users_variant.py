"""Adapters of a variant of the user's own apart from a model: read, refused, combined, merged and described."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, LoRAError, combine, load_adapter
from lightning_lora.adapter.adapter import Adapter, Layer
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.exchange.save_load import read_adapter
from lightning_lora.formats.lightning_checkpoint import checkpoint_metadata
from lightning_lora.formats.peft_folder import write_folder
from lightning_lora.nn.dora import DoRA
from lightning_lora.nn.lora import LoRA
from lightning_lora.nn.starts import Started
from lightning_lora.nn.variant import Variant
from support.files.expected_weights import merge_and_check
from support.models.networks import WIDTH, small
from support.models.variants import define_gated, define_halved, variants_forgotten

SCALING = 1.5  # lora_alpha over r


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with variants_forgotten():
        yield


def adapter_of(variant: Variant, seed: int = 0, layers: tuple[str, ...] = ("one", "two")) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    config = LoRAConfig(r=2, lora_alpha=3, target_modules=list(layers), variant=variant.name)
    adapter = Adapter({}, dict.fromkeys(layers, Layer(2, SCALING, "Linear")), config)
    tensors = {}
    for layer in layers:
        info = replace(adapter.layer_info(layer), shape=torch.Size((WIDTH, WIDTH)))
        tensors |= {f"{layer}.{leaf}": torch.randn(s, generator=draw) for leaf, s in variant.shapes(info).items()}
    return replace(adapter, tensors=tensors)


def as_checkpoint(adapter: Adapter) -> dict[str, Any]:
    return {"state_dict": dict(adapter.tensors), "lora": checkpoint_metadata("adapter", adapter)}


def delta(adapter: Adapter, layer: str) -> torch.Tensor:
    a, b, _ = adapter.effective_factors(layer)
    return SCALING * (b @ a)


def base_file(path: Path) -> Path:
    save_file(dict(small().state_dict()), path / "base.safetensors")
    return path / "base.safetensors"


def test_a_checkpoint_of_a_variant_that_is_not_known_is_refused_by_its_name():
    with variants_forgotten():
        source = as_checkpoint(adapter_of(define_gated()()))
        assert read_adapter(source).variant.name == "gated"
    with pytest.raises(LoRAError, match=r"'gated', which is not known here.*Import the file that defines it"):
        load_adapter(small(), source)
    define_gated()
    assert read_adapter(source).variant.name == "gated"


def test_a_folder_of_a_variant_that_is_not_known_is_refused_by_its_name(tmp_path):
    leaves = {f"gated_{leaf}": f"lora_gated_{leaf}" for leaf in "abg"}
    with variants_forgotten():
        adapter = adapter_of(define_gated(peft_type="GATED", peft_leaves=leaves)())
        write_folder(adapter, tmp_path / "own")
        assert read_adapter(tmp_path / "own").tensors.keys() == adapter.tensors.keys()
    with pytest.raises(LoRAError, match=r"peft_type is 'GATED'.*import the file that defines another"):
        read_adapter(tmp_path / "own")
    with pytest.raises(LoRAError, match="'gated', which is not known here"):
        read_adapter(tmp_path / "own" / "adapter_model.safetensors")


def test_tensors_of_a_variant_that_is_not_known_are_refused_by_name():
    with variants_forgotten():
        tensors = dict(adapter_of(define_gated()()).tensors)
        assert read_adapter(tensors).variant.name == "gated"
    with pytest.raises(
        LoRAError, match=r"'one.lora_gated_a', a tensor of no variant that is known here.*import the file"
    ):
        load_adapter(small(), tensors)


def test_a_tensor_of_a_variant_that_is_missing_is_named():
    source = as_checkpoint(adapter_of(define_gated()()))
    del source["state_dict"]["two.lora_gated_b"]
    with pytest.raises(LoRAError, match=r"'two(\.lora_gated_.)?' is missing"):
        read_adapter(source)


def test_peft_does_not_have_a_variant_that_does_not_say_how(tmp_path):
    with pytest.raises(
        LoRAError, match="'one' has an adapter of the variant gated, which PEFT does not have; save a L"
    ):
        write_folder(adapter_of(define_gated()()), tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("leaves", "variant"),
    [
        (("lora_A", "lora_B"), LoRA),
        (("lora_A", "lora_B", "lora_magnitude"), DoRA),
        (("lora_A", "lora_start_A", "lora_start_B"), Started),
        ((), LoRA),
    ],
    ids=str,
)
def test_a_variant_is_told_by_the_names_of_tensors_without_options(leaves: tuple[str, ...], variant: type[Variant]):
    assert type(Adapter({f"net.{leaf}": torch.ones(2, 2) for leaf in leaves}).variant) is variant


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_adapters_of_any_variant_without_a_scale_are_combined_to_plain_lora(method: str):
    gated = adapter_of(define_gated()())
    plain = adapter_of(LoRA(), seed=1)
    rank = {"rank": 4} if method == "svd" else {}
    combined = combine([as_checkpoint(gated), as_checkpoint(plain)], [0.25, -2.0], method=method, **rank)
    assert combined.config is not None
    assert combined.config.variant == "lora"
    for layer in ("one", "two"):
        a, b, _ = combined.effective_factors(layer)
        expected = 0.25 * delta(gated, layer) - 2 * delta(plain, layer)
        torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-5)
    assert load_adapter(small(), combine([as_checkpoint(gated)], [1.0])) == ["one", "two"]


def test_adapters_whose_scale_depends_on_the_weight_are_not_combined():
    source = as_checkpoint(adapter_of(define_halved()()))
    with pytest.raises(LoRAError, match=r"adapters\[0\]: halved adapters cannot be combined"):
        combine([source], [1.0])


@pytest.mark.parametrize("define", [define_gated, define_halved])
def test_a_variant_is_merged_on_disk_as_its_factors_say(tmp_path, define: Any):
    adapter = adapter_of(define()())
    torch.save(as_checkpoint(adapter), tmp_path / "a.ckpt")
    merge_and_check(base_file(tmp_path), tmp_path / "a.ckpt", tmp_path / "o.safetensors")
    before, after = small().state_dict(), load_file(tmp_path / "o.safetensors")
    for layer in ("one", "two"):
        weight = before[f"{layer}.weight"]
        expected = weight + delta(adapter, layer)
        if adapter.variant.reads_weight:
            scale = torch.where(weight.norm(dim=1) > 0.5, 0.5, 1.0)
            assert len(scale.unique()) == 2
            expected *= scale[:, None]
        torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after["three.weight"], before["three.weight"])


def test_tensors_of_another_size_than_the_weight_are_not_merged(tmp_path):
    adapter = adapter_of(define_gated()())
    wide = {**adapter.tensors, "two.lora_gated_a": torch.ones(2, WIDTH + 1)}
    torch.save(as_checkpoint(replace(adapter, tensors=wide)), tmp_path / "a.ckpt")
    with pytest.raises(LoRAError, match=r"'two': gated_a \(2, 5\) and gated_b \(4, 2\) and gated_g \(2,\) do not fit"):
        merge_on_disk(base_file(tmp_path), tmp_path / "a.ckpt", tmp_path / "o.safetensors")


def test_a_convolution_of_an_adapter_without_options_is_merged(tmp_path):
    """Its tensors tell that it is one."""
    base = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    a, b = torch.randn(2, 3, 2), torch.randn(4, 2, 1)
    torch.save({"0.lora_A": a, "0.lora_B": b}, tmp_path / "a.pt")
    merge_and_check(tmp_path / "base.pt", tmp_path / "a.pt", tmp_path / "o.pt", lora_alpha=4)
    expected = base[0].weight + 2 * (b.flatten(1) @ a.flatten(1)).view(4, 3, 2)
    torch.testing.assert_close(torch.load(tmp_path / "o.pt")["0.weight"], expected.detach())
