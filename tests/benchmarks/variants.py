"""Variants of LoRA: training steps, merge cycles and peak memory against peft's on the same model.

    python tests/benchmarks/run.py variants --only dora --seconds 8

`floor` is the same model frozen, without adapters, and `LoRA` our plain LoRA on it.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from groups import inputs
from measure import against, interleaved, milliseconds, peak_bytes, ratio, table
from peft import LoraConfig, get_peft_model
from stack import CANDIDATES, stack, step
from torch import nn

from lightning_lora import LoRAConfig, inject, merge, unmerge

DTYPES = (torch.float32, torch.bfloat16)
NAMES = {"floor": "the floor", "LoRA": "our LoRA"}
Models = dict[str, nn.Module]
Work = tuple[Models, Callable[[nn.Module], object]]  # models by the names of candidates, and a training step of one


@dataclass(frozen=True)
class Family:
    """A table: its rows by name, and the candidates beside ours and peft's.

    Attributes:
        rows: what makes the models and the step of a row, for a dtype.
        beside: of "floor" and "LoRA".
        merges: whether merge cycles are measured.
    """

    rows: dict[str, Callable[[torch.dtype], Work]]
    beside: Sequence[str] = ("floor",)
    merges: bool = True

    @property
    def header(self) -> str:
        names = ["model", "dtype", "step", "of peft", *("of " + NAMES[name] for name in self.beside), "peak", "of peft"]
        return f"| {' | '.join(names + ['merge cycle', 'of peft'] * self.merges)} |"

    def measured(self, seconds: float) -> Iterator[list[str]]:
        """Yield the cells of each row: medians of the rounds' ratios, and ratios of peaks."""
        for name, make in self.rows.items():
            for dtype in DTYPES:
                models, train = make(dtype)
                yield [name, str(dtype).removeprefix("torch."), *self._cells(models, train, seconds)]

    def _cells(self, models: Models, train: Callable[[nn.Module], object], seconds: float) -> list[str]:
        steps = {name: lambda model=model: train(model) for name, model in models.items()}
        times = interleaved(steps, seconds, "cpu")
        peaks = {name: peak_bytes(steps[name], "cpu") for name in ("ours", "peft")}
        cells = [
            f"{milliseconds(times, 'ours'):.1f} ms",
            against(ratio(times, ["ours"], ["peft"])),
            *(f"{ratio(times, ['ours'], [name]):.2f}" for name in self.beside),
            f"{peaks['ours'] / 2**20:.1f} MiB",
            against(peaks["ours"] / peaks["peft"]),
        ]
        if self.merges:
            ours, theirs = models["ours"], models["peft"]
            cycles: dict[str, Callable[[], Any]] = {
                "ours": lambda: (merge(ours), unmerge(ours)),
                "peft": lambda: (theirs.merge_adapter(), theirs.unmerge_adapter()),  # type: ignore[operator]
            }
            times = interleaved(cycles, seconds / 2, "cpu")
            cells += [f"{milliseconds(times, 'ours'):.1f} ms", against(ratio(times, ["ours"], ["peft"]))]
        return cells


def adapted(base: nn.Module, plain: dict[str, Any] | None = None, **options: Any) -> Models:
    """The same base with our adapters, with peft's, and frozen; with options for `plain`, with our plain LoRA too."""
    base.train().requires_grad_(False)
    models: Models = {"ours": copy.deepcopy(base), "peft": copy.deepcopy(base), "floor": base}
    inject(models["ours"], LoRAConfig(**options))
    models["peft"] = get_peft_model(models["peft"], LoraConfig(**options))  # type: ignore[arg-type]
    if plain is not None:
        models["LoRA"] = copy.deepcopy(base)
        inject(models["LoRA"], LoRAConfig(**plain))
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
    return models


def squared(x: torch.Tensor) -> Callable[[nn.Module], None]:
    """A training step on this input: the mean of squares of the output."""
    x.requires_grad_()

    def train(model: nn.Module) -> None:
        model(x).square().mean().backward()
        model.zero_grad()
        x.grad = None

    return train


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- DoRA ---


def dora(width: int, dtype: torch.dtype, tokens: int = 256) -> Work:
    torch.manual_seed(0)
    base = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.Tanh()))).to(dtype)
    plain = {"r": 16, "target_modules": ["0", "2", "4", "6"]}
    return adapted(base, plain, use_dora=True, **plain), squared(random(tokens, width).to(dtype))


# --- quantized bases ---


def quantized(kind: str, width: int, dtype: torch.dtype) -> Work:
    """The network of stack.py, quantized by bitsandbytes."""
    logging.disable(logging.WARNING)  # bitsandbytes warns of each 8-bit product
    x = inputs(width, dtype, "cpu")
    makers = {name: CANDIDATES[name] for name in ("ours", "peft", "floor")}
    models = {name: make(quantize_(stack(width, dtype, "cpu"), kind)).train() for name, make in makers.items()}
    return models, lambda model: step(model, x)


def quantize_(model: nn.Module, kind: str) -> nn.Module:
    """Put quantized layers in the place of all linear ones."""
    import bitsandbytes as bnb

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


# --- single parameters and rows ---


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.rnn(x)[0]
        return result


class Mixtral(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        config = transformers.MixtralConfig(num_local_experts=8, vocab_size=512, **sizes(width))
        self.network: Any = transformers.MixtralForCausalLM(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(inputs_embeds=x).logits
        return result


def sizes(width: int) -> dict[str, int]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, **heads}


def parameters(
    build: Callable[[int], nn.Module], shape: tuple[int, int], targets: list[str], width: int, dtype: torch.dtype
) -> Work:
    """Weights that belong to no layer which LoRA adapts, by target_parameters."""
    torch.manual_seed(0)
    models = adapted(build(width).to(dtype), r=16, target_modules=[], target_parameters=targets)
    return models, squared(random(*shape, width).to(dtype))


def rows(width: int, dtype: torch.dtype, new_tokens: int = 16) -> Work:
    """A Llama-like model with LoRA on its attention, of whose tied embeddings the last rows are trained as well."""
    torch.manual_seed(0)
    vocabulary = 32 * width
    config = transformers.LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes(width))
    models = adapted(
        transformers.LlamaForCausalLM(config).to(dtype),
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        trainable_token_indices={"embed_tokens": list(range(vocabulary - new_tokens, vocabulary))},
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary - 2 * new_tokens, vocabulary, (2, 128), generator=generator)  # half of them new

    def train(model: nn.Module) -> None:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        if loss.requires_grad:  # not so in the floor, where all is frozen
            loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return models, train


# --- PiSSA ---


def pissa(width: int, count: int, dtype: torch.dtype) -> Work:
    plain = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    models = adapted(stack(width, dtype, "cpu"), plain, init_lora_weights="pissa_niter_4", **plain)
    x = torch.randn(1, count, width).to(dtype)
    return models, lambda model: step(model, x)


RECURRENT = [f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")]


def families(scale: int = 1) -> dict[str, Family]:
    """The tables by name; `scale` divides all widths."""
    width = 512 // scale
    lstm = (Recurrent, (16, 32), RECURRENT)
    mixtral = (Mixtral, (2, 256), ["gate_up_proj", "down_proj"])
    return {
        "dora": Family(
            {f"4 layers of {d}": lambda dtype, d=d: dora(d // scale, dtype) for d in (256, 1024, 2048)},
            ("floor", "LoRA"),
        ),
        "quantized": Family(
            {
                "bitsandbytes nf4, double quantization": lambda dtype: quantized("nf4", width, dtype),
                "bitsandbytes int8": lambda dtype: quantized("int8", width, dtype),
            },
            merges=False,
        ),
        "parameters": Family(
            {
                "nn.LSTM, 2 layers": lambda dtype: parameters(*lstm, width, dtype),
                "Mixtral, 2 layers of 8 experts": lambda dtype: parameters(*mixtral, width, dtype),
                "16 rows of tied embeddings": lambda dtype: rows(width, dtype),
            }
        ),
        "pissa": Family(
            {f"{count} tokens": lambda dtype, count=count: pissa(256 // scale, count, dtype) for count in (64, 512)},
            ("LoRA",),
            merges=False,
        ),
    }


HEADERS = tuple(dict.fromkeys(family.header for family in families().values()))


def main(arguments: list[str] | None = None) -> None:
    names = [*families()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.only:
        family = families(options.scale)[name]
        table(family.header, family.measured(options.seconds))
        print()


if __name__ == "__main__":
    main()
