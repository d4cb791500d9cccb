"""Training steps and forwards on quantised bases: time and peak memory against peft on the same model.

    python tests/benchmarks/run.py quantised --width 512 --seconds 6

The network is stack.py's, quantised by bitsandbytes; `floor` is the same frozen, without adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from groups import inputs
from measure import interleaved, milliseconds, peak_bytes, ratio
from stack import CANDIDATES, stack, step
from table import COMPARED, print_table
from torch import nn

KINDS = {"bitsandbytes nf4, double quantisation": "nf4", "bitsandbytes int8": "int8"}
HEADER = "| base | dtype | step | against peft | against the floor | peak | against peft | against the floor |"


def quantise_(model: nn.Module, kind: str) -> nn.Module:
    """Put quantised layers in the place of all linear ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            layer: Any
            if kind == "int8":
                layer = bnb.nn.Linear8bitLt(child.in_features, child.out_features, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(child.in_features, child.out_features, quant_type=kind)
            layer.weight.data, layer.bias = child.weight.data, child.bias
            setattr(parent, name, layer)
    return model.to("cpu")


def measured(base: str, width: int, dtype: torch.dtype, seconds: float) -> list[str]:
    """The cells of one row: medians of the rounds' ratios, and ratios of peaks."""
    x = inputs(width, dtype, "cpu")
    models = {name: CANDIDATES[name](quantise_(stack(width, dtype, "cpu"), KINDS[base])).train() for name in COMPARED}

    def training(model: nn.Module) -> Callable[[], None]:
        return lambda: step(model, x)

    steps = {name: training(model) for name, model in models.items()}
    times = interleaved(steps, seconds, "cpu")
    peaks = {name: peak_bytes(function, "cpu") for name, function in steps.items()}
    return [
        f"{milliseconds(times, 'ours'):.0f} ms",
        f"{ratio(times, ['ours'], ['peft']):.2f}",
        f"{ratio(times, ['ours'], ['floor']):.2f}",
        f"{peaks['ours'] / 2**20:.1f} MiB",
        f"{peaks['ours'] / peaks['peft']:.2f}",
        f"{peaks['ours'] / peaks['floor']:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    logging.disable(logging.WARNING)  # bitsandbytes warns of each 8-bit product
    print_table(__doc__, HEADER, KINDS, measured, arguments)


if __name__ == "__main__":
    main()
