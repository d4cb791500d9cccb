"""The fingerprint tells how a base was quantized: an adapter is not loaded onto one whose values are others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, take_adapter
from support.models.quantized import inputs, network

bnb = pytest.importorskip("bitsandbytes")

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"compress_statistics": False},
    "nf4 double": {"compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nf4 in blocks of 128": {"compress_statistics": False},
}


def base(kind: str) -> Any:
    """A base whose layers are quantized with these options."""
    model = network()
    for i in (0, 2, 4):
        plain = model[i]
        model[i] = bnb.nn.Linear4bit(plain.in_features, plain.out_features, **{"quant_type": "nf4"} | KINDS[kind])
        model[i].weight.data, model[i].bias = plain.weight.data, plain.bias
        if kind.endswith("128"):
            model[i].weight.blocksize = 128
    return model.to("cpu")


def trained(kind: str) -> Any:
    inject(model := base(kind), LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_of_4_bits_are_in_the_fingerprint_of_adapted_and_other_layers(kind: str):
    found = take_adapter(trained(kind)).fingerprint
    assert {name: entry.quantized for name, entry in found.items() if entry.quantized} == {
        f"{i}.weight": kind for i in (0, 2, 4)
    }


@pytest.mark.parametrize(
    ("there", "here"),
    [("fp4", "fp4"), ("fp4", "nf4"), ("nf4", "nf4 double"), ("nf4", "nf4 in blocks of 128")],
)
def test_an_adapter_goes_onto_a_base_that_was_quantized_alike(there: str, here: str):
    adapter, model = take_adapter(trained(there)), base(here)
    if there == here:
        load_adapter(model, adapter)
        return
    with pytest.raises(LoRAError, match=rf"was quantized \({there}\), here it is quantized \({here}\)"):
        load_adapter(model, adapter)
    with pytest.warns(UserWarning, match="belongs to another base"):
        load_adapter(model, adapter, strict_base=False)


@pytest.mark.filterwarnings("ignore:lightning_lora. 3 4-bit layers were evaluated without an adapter")
def test_an_evaluation_which_may_pack_the_weights_for_a_cpu_changes_nothing():
    adapter, model = take_adapter(trained("nf4 double")), base("nf4 double").eval()
    with torch.no_grad():
        model(inputs())
    load_adapter(model, adapter)
