"""The benchmark of experts.py at a small size: every candidate runs, and the factored one keeps no stack."""

from __future__ import annotations

import experts
import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")


def test_what_is_kept_for_backward_is_a_stack_on_the_sum_and_less_than_that_factored():
    shape = (4, 64, 32)
    kept = {name: experts.kept_bytes(step, shape) for name, step in experts.steps(shape, 4, 8, torch.float32).items()}
    stack = 4 * 64 * 32 * 4
    assert kept["base"] < kept["factored"] < stack <= min(kept["W + left @ right"], kept["peft"])
