"""Single parameters: training steps, merge cycles and peak memory against peft's target_parameters on the same model.

    python tests/benchmarks/run.py parameters --seconds 8

`floor` is the same model frozen, without adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from table import HEADER, print_table, step_and_cycle
from torch import nn

from lightning_lora import LoRAConfig, inject


@dataclass(frozen=True)
class Subject:
    build: Callable[[int], nn.Module]
    x: Callable[[int], torch.Tensor]
    targets: list[str]


class Recurrent(nn.Module):
    def __init__(self, kind: Any, width: int) -> None:
        super().__init__()
        self.rnn = kind(width, width, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.rnn(x)[0]
        return result


class Mixtral(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        config = transformers.MixtralConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=8,
        )
        self.network: Any = transformers.MixtralForCausalLM(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(inputs_embeds=x).logits
        return result


def _inputs(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda width: torch.randn(*shape, width, generator=torch.Generator().manual_seed(1))


RECURRENT = [f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")]
SUBJECTS = {
    "nn.LSTM, 2 layers": Subject(lambda width: Recurrent(nn.LSTM, width), _inputs(16, 32), RECURRENT),
    "nn.GRU, 2 layers": Subject(lambda width: Recurrent(nn.GRU, width), _inputs(16, 32), RECURRENT),
    "Mixtral, 2 layers of 8 experts": Subject(Mixtral, _inputs(2, 256), ["gate_up_proj", "down_proj"]),
}


def adapted(subject: Subject, width: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same base three times: with our adapters, with peft's, and frozen."""
    torch.manual_seed(0)
    base = subject.build(width).to(dtype).train().requires_grad_(False)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    inject(ours, LoRAConfig(r=16, target_modules=[], target_parameters=subject.targets))
    config = LoraConfig(r=16, target_modules=[], target_parameters=subject.targets)
    peft: Any = get_peft_model(theirs, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for model in (ours, peft):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.01 * torch.randn_like(parameter))
    return {"ours": ours, "peft": peft, "floor": base}


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None


def measured(name: str, width: int, dtype: torch.dtype, seconds: float) -> list[str]:
    subject = SUBJECTS[name]
    x = subject.x(width).to(dtype).requires_grad_()
    return step_and_cycle(adapted(subject, width, dtype), lambda model: step(model, x), seconds)


def main(arguments: list[str] | None = None) -> None:
    print_table(__doc__, HEADER, SUBJECTS, measured, arguments)


if __name__ == "__main__":
    main()
