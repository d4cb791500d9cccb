"""Quantized bases on the real kernels of bitsandbytes and torchao: steps, merging, files, a Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora import LoRAConfig, inject, is_merged, load_adapter, merge, save_adapter, unmerge
from support.covering import covering
from support.models.pairs import assert_near
from support.models.quantized import (
    NF4,
    inputs,
    network,
    packed_bits,
    quantize_,
    reference,
    run_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
TOLERANCE = {"int8": 3e-2, "Float8WeightOnlyConfig": 1e-4}  # int8 rounds the inputs of a layer too
KINDS = ["nf4", "int8", "Float8WeightOnlyConfig", NF4]


def adapted(kind: str, device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """A quantized model whose factors A and B are both random."""
    model = quantize_(network(dtype), kind, device=device)
    inject(model, LoRAConfig(r=4, lora_alpha=8, init_lora_weights=False))
    return model


@pytest.mark.parametrize(("kind", "dtype"), covering(KINDS, [torch.float32, torch.bfloat16], meet=1))
def test_a_quantized_model_steps_as_in_float64_is_evaluated_factored_saved_and_loaded(
    kind: str, dtype: torch.dtype, compiling_device: str, tmp_path: Path
):
    model, x = adapted(kind, compiling_device, dtype), inputs(dtype=dtype)
    before, tolerance = packed_bits(model), 5e-2 if dtype == torch.bfloat16 else TOLERANCE.get(kind, 1e-4)
    exact = reference(model)
    wanted = run_reference(exact, x.double())
    out = model(x.to(compiling_device))
    assert_near(out, wanted, tolerance, "output")
    wanted.square().sum().backward()
    out.double().square().sum().backward()
    for position in (0, 2, 4):
        for factor in "AB":
            found = model[position].get_parameter(f"lora_{factor}").grad
            assert found.device.type == compiling_device
            assert_near(found, getattr(exact[position], factor).grad, 2 * tolerance, f"{position}.{factor}")

    x = x.to(compiling_device)
    answer = model.eval()(x).detach()
    merge(model)
    assert is_merged(model)
    torch.testing.assert_close(model(x).detach(), answer)
    unmerge(model)
    assert before == packed_bits(model) != []
    save_adapter(model, tmp_path)
    load_adapter(other := quantize_(network(dtype), kind, device=compiling_device).eval(), tmp_path)
    torch.testing.assert_close(other(x).detach(), answer)
