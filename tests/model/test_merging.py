"""merge, unmerge and merged on whole models: repeated, nested, failing; memory."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, is_merged, merge, merged, unmerge
from support.covering import covering
from support.models.networks import ZOO_LAYERS, Zoo, bits, randomise_, same, tokens, trace, zoo_config

pytestmark = pytest.mark.core

MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function


def adapted_zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    model = Zoo().to(dtype).eval()
    inject(model, zoo_config())
    randomise_(model)
    return model


def weights(model: nn.Module) -> dict[str, bytes]:
    """What the parameters hold, merged or not."""
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def stack(dtype: torch.dtype = torch.float32, size: int = 8) -> nn.Sequential:
    """Eight adapted layers."""
    model = nn.Sequential(*(nn.Linear(size, size, dtype=dtype) for _ in range(8)))
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    return model


def test_merge_repeated_or_nested_is_undone_by_one_unmerge():
    model = adapted_zoo()
    output, plain = model(tokens()), weights(model)
    unmerge(model)
    assert not is_merged(model)
    merge(model)
    once = weights(model)
    assert {n for n in plain if plain[n] != once[n]} == {f"{name}.weight" for name in ZOO_LAYERS}
    merge(model)
    assert weights(model) == once
    assert is_merged(model)
    torch.testing.assert_close(model(tokens()), output)
    with merged(model) as inside:
        assert inside is model
        assert weights(model) == once
    assert is_merged(model)  # as it was found
    unmerge(model)
    unmerge(model)
    assert weights(model) == plain
    with merged(model), merged(model):
        assert weights(model) == once
        unmerge(model)
        with merged(model):
            assert weights(model) == once
        assert not is_merged(model)
    assert not is_merged(model)
    assert weights(model) == plain


@pytest.mark.parametrize("found", [False, True])
def test_merged_restores_what_it_found_after_an_exception_and_whatever_was_called_inside(found):
    model = adapted_zoo()
    merge(model) if found else None
    before = weights(model)
    with pytest.raises(ZeroDivisionError), merged(model):
        1 / 0  # noqa: B018
    assert is_merged(model) == found
    assert weights(model) == before
    for inside in (unmerge, merge):
        with merged(model):
            assert is_merged(model)
            inside(model)
        assert is_merged(model) == found
    assert weights(model) == before


def test_part_of_a_model_can_be_merged_by_itself():
    model = adapted_zoo()
    output, plain = model(tokens()), weights(model)
    merge(model.body)
    changed = {name for name in plain if weights(model)[name] != plain[name]}
    assert changed == {"body.0.weight", "body.3.weight"}
    torch.testing.assert_close(model(tokens()), output)
    assert is_merged(model)
    merge(model)
    torch.testing.assert_close(model(tokens()), output)
    unmerge(model)
    assert weights(model) == plain


@pytest.mark.parametrize("verb", [merge, unmerge, lambda model: merged(model).__enter__()])
def test_a_model_without_adapters_is_an_error(verb):
    with pytest.raises(LoRAError, match="merge: Zoo has no adapted layer; call inject"):
        verb(Zoo())
    assert not is_merged(Zoo())


# --- all or nothing ---

FAULTS = {
    "nan": (torch.float32, float("nan")),
    "inf": (torch.float32, float("inf")),
    "fp16 overflow": (torch.float16, 1e4),  # finite factors and delta, beyond float16's range
    "bf16 nan": (torch.bfloat16, float("nan")),
}


@pytest.mark.parametrize(("fault", "place", "budget"), covering([*FAULTS], [0, 4, 7], [0, 2**26], meet=1))
def test_one_bad_adapter_of_eight_leaves_every_layer_unmerged(monkeypatch, fault, place, budget):
    monkeypatch.setattr(MERGE, "COPY_BUDGET", budget)
    dtype, value = FAULTS[fault]
    model = stack(dtype)
    with torch.no_grad():
        model[place].lora_B[3] = value
        model[place].lora_A[:, 2] = 10.0
    before, tracked = weights(model), trace(model)
    for call in (merge, merge, lambda model: merged(model).__enter__()):
        with pytest.raises(LoRAError, match=f"merge: layer '{place}': .*not finite.*Every layer is unmerged"):
            call(model)
        assert not is_merged(model)
        assert weights(model) == before
        assert trace(model) == tracked
    with torch.no_grad():
        model[place].lora_B[3] = 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lightning_lora: merged 16-bit weights")
        merge(model)
    assert is_merged(model)


@pytest.mark.parametrize("change", ["cast", "load"])
def test_cast_or_load_that_makes_a_merged_layer_unmergeable_names_it_and_the_remedy(change):
    model, large = stack(), torch.full((8, 8), 3e38)
    with torch.no_grad():
        model[4].lora_A[:], model[4].lora_B[:] = 1.0, 1e37  # delta 8e37: beyond float16, and beyond float32 beside 3e38
    expected = copy.deepcopy(model).half() if change == "cast" else copy.deepcopy(model)
    merge(model)
    with pytest.raises(
        LoRAError, match=r"'4': this layer was merged, and cannot be merged again.*not finite.*Call unmerge\(model\)"
    ):
        model.half() if change == "cast" else model.load_state_dict({"4.weight": large}, strict=False)
    unmerge(model)
    assert weights(model[:4]) == weights(expected[:4])
    assert same(model[4].weight, expected[4].weight if change == "cast" else large)


def test_a_failure_with_some_layers_merged_before_unmerges_those_too():
    model = stack()
    before = weights(model)
    merge(model[:3])
    with torch.no_grad():
        model[5].lora_A.fill_(float("nan"))
    with pytest.raises(LoRAError, match="layer '5'"):
        merge(model)
    assert not is_merged(model)
    assert {n: b for n, b in weights(model).items() if n != "5.lora_A"} == {
        n: b for n, b in before.items() if n != "5.lora_A"
    }


# --- memory ---


@pytest.mark.parametrize("fits", [True, False])
def test_plain_copies_are_kept_of_all_weights_or_of_none(monkeypatch, fits: bool):
    model = stack(size=64)
    randomise_(model, 1e-3)  # so that few values differ
    size = sum(layer.weight.nbytes for layer in model)
    monkeypatch.setattr(MERGE, "COPY_BUDGET", size if fits else size - 1)
    merge(model)
    held = sum(undo.nbytes() for layer in model if (undo := layer.lora.undo) is not None)
    assert held == size if fits else 0 < held < size / 2
