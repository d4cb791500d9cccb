"""Trained rows of tables: training steps, merge cycles and peak memory against peft's on the same model.

    python tests/benchmarks/run.py rows --seconds 8

The model is a Llama-like one with LoRA on its attention, of whose embeddings the last rows are trained as well: 16 new
tokens of a vocabulary 32 times as large as the model is wide. `floor` is the same model frozen, without adapters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from table import HEADER, print_table, step_and_cycle
from torch import nn

from lightning_lora import LoRAConfig, inject

NEW_TOKENS, BATCH = 16, (2, 128)
SUBJECTS = {"embeddings, head tied": True, "embeddings and head, not tied": False}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(width: int, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32 * width,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def adapted(width: int, tied: bool, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same base three times: with our adapters, with peft's, and frozen."""
    base = llama(width, tied).to(dtype).train().requires_grad_(False)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    new = list(range(32 * width - NEW_TOKENS, 32 * width))
    rows = dict.fromkeys(["embed_tokens"] if tied else ["embed_tokens", "lm_head"], new)
    inject(ours, LoRAConfig(r=8, target_modules=TARGETS, trainable_token_indices=rows))
    config = LoraConfig(r=8, target_modules=TARGETS, trainable_token_indices=rows)
    peft: Any = get_peft_model(theirs, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for model in (ours, peft):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
    return {"ours": ours, "peft": peft, "floor": base}


def step(model: nn.Module, tokens: torch.Tensor) -> None:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    if loss.requires_grad:  # not so in the floor, where all is frozen
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def measured(subject: str, width: int, dtype: torch.dtype, seconds: float) -> list[str]:
    models = adapted(width, SUBJECTS[subject], dtype)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32 * width - 2 * NEW_TOKENS, 32 * width, BATCH, generator=generator)  # half of them new
    return step_and_cycle(models, lambda model: step(model, tokens), seconds)


def main(arguments: list[str] | None = None) -> None:
    print_table(__doc__, HEADER, SUBJECTS, measured, arguments)


if __name__ == "__main__":
    main()
