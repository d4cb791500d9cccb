"""One stack of experts: forward and backward of the frozen base, of W + left @ right, factored, and by peft.

    python tests/benchmarks/run.py experts --seconds 20

Beside each median: the bytes kept for backward that are not the weight itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleaved, milliseconds
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora.nn.factored_weight import FactoredWeight

HEADER = "| weight | step | kept for the backward |"

Step = Callable[[], None]


class Experts(nn.Module):
    """A stack (E, out, in), multiplied as transformers' experts do by default."""

    def __init__(self, experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stack = nn.Parameter((torch.randn(experts, outputs, inputs) / inputs**0.5).to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, self.stack.transpose(-2, -1), offs=offs)


class Wrapped(nn.Module):
    """peft does not adapt the outermost module."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return self.experts(x, offs)


def steps(shape: tuple[int, int, int], rank: int, tokens: int, dtype: torch.dtype) -> dict[str, Step]:
    """Return forward and backward of each candidate, on the same input, evenly spread over the experts."""
    torch.manual_seed(0)
    experts, outputs, inputs = shape
    layer = Experts(*shape, dtype)
    left = nn.Parameter(0.01 * torch.randn(experts, outputs, rank))
    right = nn.Parameter(0.01 * torch.randn(experts, rank, inputs))
    x = torch.randn(tokens, inputs).to(dtype).requires_grad_()
    offs = torch.arange(1, experts + 1, dtype=torch.int32) * (tokens // experts)
    gradient = torch.randn(tokens, outputs).to(dtype)
    config = LoraConfig(r=rank, target_modules=[], target_parameters=["experts.stack"])
    peft = get_peft_model(Wrapped(Experts(*shape, dtype)), config).base_model.model  # type: ignore[arg-type]

    def standing_in(make: Callable[[], torch.Tensor]) -> torch.Tensor:
        vars(layer)["stack"] = make()
        try:
            return layer(x, offs)
        finally:
            del vars(layer)["stack"]

    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "base": lambda: layer(x, offs),
        "W + left @ right": lambda: standing_in(lambda: layer._parameters["stack"] + (left @ right).to(dtype)),
        "factored": lambda: standing_in(lambda: FactoredWeight(layer._parameters["stack"], left, right)),
        "peft": lambda: peft(x, offs),
    }

    def step(forward: Callable[[], torch.Tensor]) -> None:
        forward().backward(gradient)
        for parameter in (x, left, right, *peft.parameters()):
            parameter.grad = None

    return {name: lambda forward=forward: step(forward) for name, forward in forwards.items()}


def kept_bytes(step: Step, shape: tuple[int, int, int]) -> int:
    """Return the bytes that a step keeps for backward, each storage once, without the base's own weight."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_weight = not tensor.requires_grad and tensor.numel() == math.prod(shape)
        kept[storage.data_ptr()] = 0 if is_weight else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--shape", type=int, nargs=3, default=(8, 2048, 1024), metavar=("E", "OUT", "IN"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    shape = tuple(options.shape)
    candidates = steps(shape, options.rank, options.tokens, getattr(torch, options.dtype))
    times = interleaved(candidates, options.seconds, "cpu")
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for name, step in candidates.items():
        print(f"| {name} | {milliseconds(times, name):.1f} ms | {kept_bytes(step, shape) / 1e6:.1f} MB |")


if __name__ == "__main__":
    main()
