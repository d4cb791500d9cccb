"""What a variant says of itself, and how it becomes known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, names
from lightning_lora.nn.variant import EffectiveFactors, LayerInfo, Variant, known_variants, variant_of
from support.covering import covering
from support.models.variants import variants_forgotten


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with variants_forgotten():
        yield


def own_variant(**attributes: Any) -> type[Variant]:
    return type("Own", (Variant,), {"name": "own", "trained": ("lora_own_a", "lora_own_ab"), **attributes})


def info(**given: Any) -> LayerInfo:
    options = {"name": "a.b", "kind": "Linear", "shape": torch.Size((6, 4)), "rank": 2, "scaling": 0.5}
    return LayerInfo(**{**options, **given})


@pytest.mark.usefixtures("registry")
def test_a_variant_is_known_once_its_class_is_defined():
    with pytest.raises(LoRAError, match="variant"):
        LoRAConfig(variant="own")
    own = own_variant()
    assert type(variant_of(LoRAConfig(variant="own"))) is own
    assert LoRAConfig.from_dict(LoRAConfig(variant="own").to_dict()).variant == "own"
    assert names.split_factor_name("net.lora_own_a") == ("net", "lora_own_a")
    assert names.split_factor_name("net.lora_own_ab_w") == ("net.w", "lora_own_ab")
    assert names.factor_role("net.lora_own_ab") == "own_ab"
    assert own in map(type, known_variants())
    with pytest.raises(LoRAError, match="init_lora_weights must be one that does not start from the weight, with var"):
        LoRAConfig(variant="own", init_lora_weights="pissa")


@pytest.mark.usefixtures("registry")
def test_the_last_class_of_a_name_is_the_variant():
    """As where a notebook runs a cell again."""
    own_variant()
    again = own_variant()
    assert type(variant_of(LoRAConfig(variant="own"))) is again


@pytest.mark.usefixtures("registry")
def test_a_class_that_reads_the_weight_and_has_no_scale_is_refused():
    with pytest.raises(LoRAError, match=r"reads_weight.*has_scale = True"):
        own_variant(reads_weight=True)


def test_options_say_the_variant():
    assert variant_of(LoRAConfig()).title == variant_of(LoRAConfig(init_lora_weights="pissa")).title == "LoRA"
    assert variant_of(LoRAConfig(use_dora=True)).trained == ("lora_A", "lora_B", "lora_magnitude")
    started = variant_of(LoRAConfig(init_lora_weights="lora_ga"))
    assert started.leaves == ("lora_A", "lora_B", "lora_start_A", "lora_start_B")
    assert not variant_of(LoRAConfig(init_lora_weights="eva")).frozen


@pytest.mark.parametrize(
    ("options", "kind"),
    covering([{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ["Linear", "Conv1D", "Conv"], meet=1),
)
def test_what_a_variant_starts_as_has_its_shapes_and_adds_nothing(options: dict[str, Any], kind: str):
    variant, shape = variant_of(LoRAConfig(**options)), (6, 4, 3) if kind == "Conv" else (6, 4)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    where = info(kind=kind, shape=weight.shape, init=options.get("init_lora_weights", True))
    stored = variant.start(where, lambda: weight)
    assert {leaf: tuple(value.shape) for leaf, value in stored.items()} == variant.shapes(where)
    assert tuple(stored) == variant.leaves
    assert variant.is_initial(stored, where)
    matrix = weight.T if kind == "Conv1D" else weight.flatten(1)
    factors = variant.effective_factors(stored, matrix if variant.reads_weight else None, where.scaling)
    blocks = variant.blocks(stored, where, lambda: [(0, weight.flatten(1))])
    assert all(not (block.left @ block.right).any() for block in blocks)
    assert isinstance(factors, EffectiveFactors)
    for scale in (factors.scale, blocks[0].scale):
        assert (scale is not None) == variant.has_scale
        assert scale is None or torch.equal(scale, torch.ones_like(scale))
    stored["lora_B"] = stored["lora_B"] + 1
    assert not variant.is_initial(stored, where)
