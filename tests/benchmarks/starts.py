"""Adapters that start from the weight or from data: how long that takes beside peft's, and what a training step costs.

    python tests/benchmarks/run.py starts --sides 512 1024 2048 --width 512 --seconds 10

The weights of the first table have singular values that fall as 1, 1/2, 1/3, ... to the power of 1/2. In the second,
`LoRA` is the same model with an adapter that starts as zero. The third is of a Llama whose adapters start from batches.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from measure import Times, interleaved, milliseconds, peak_bytes, ratio
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from stack import stack, step
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, initialize_from_data, inject
from lightning_lora.nn.adapted_weights import adapted_layers

R = 16
INITS = ("pissa", "pissa_niter_4", "olora")
START_HEADER = "| start | weight | ours | peft | of peft | off the best | peft's |"
DATA_HEADER = "| start | hidden | batches | ours | least | peft | least | of peft | apart |"
STEP_HEADER = "| model | dtype | rows | step | of peft's | of our LoRA | peft's of peft's LoRA | peak | of peft's |"


def make_weight(side: int) -> torch.Tensor:
    """A few large singular values, then a slow fall."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, side, generator=draw))[0] for _ in range(2))
    return (u / torch.arange(1, side + 1) ** 0.5) @ v


def with_ours(model: nn.Module, init: Any, targets: Any = "all-linear") -> nn.Module:
    inject(model, LoRAConfig(r=R, lora_alpha=R, target_modules=targets, init_lora_weights=init))
    return model


def with_peft(model: nn.Module, init: Any, targets: Any = "all-linear") -> nn.Module:
    config = LoraConfig(r=R, lora_alpha=R, target_modules=targets, init_lora_weights=init)
    return get_peft_model(model, config).base_model.model  # type: ignore[arg-type]


def started(
    adapt: Callable[..., nn.Module], init: str, weight: torch.Tensor, rounds: int
) -> tuple[float, torch.Tensor]:
    """Seconds of adapting one layer with this weight, the least of some rounds, and s * B0 @ A0."""
    seconds = []
    for _ in range(rounds):
        model = nn.Sequential(nn.Linear(*weight.shape, bias=False))
        model[0].weight = nn.Parameter(weight.clone())
        began = time.perf_counter()
        layer: Any = adapt(model, init, ["0"])[0]  # type: ignore[index]
        seconds.append(time.perf_counter() - began)
    a, b = layer.lora_A, layer.lora_B
    if isinstance(a, nn.ModuleDict):
        a, b = a["default"].weight, b["default"].weight
    return min(seconds), (b @ a).detach()


def start_rows(side: int, rounds: int) -> list[list[str]]:
    """The cells of a row for each start: seconds, and the distance from what it should be, over that one's norm."""
    weight = make_weight(side)
    u, s, vh = torch.linalg.svd(weight.double())
    best = {"pissa": (u[:, :R] * s[:R]) @ vh[:R]}
    best["pissa_niter_4"] = best["pissa"]
    q, upper = torch.linalg.qr(weight.double())
    best["olora"] = q[:, :R] @ upper[:R]
    rows = []
    for init in INITS:
        found = [started(adapt, init, weight, rounds) for adapt in (with_ours, with_peft)]
        off = [float((product.double() - best[init]).norm() / best[init].norm()) for _, product in found]
        times = [seconds for seconds, _ in found]
        cells = [f"{1e3 * seconds:.1f} ms" for seconds in times] + [f"{times[0] / times[1]:.2f}"]
        rows.append([init, f"{side} x {side}", *cells, *(f"{value:.0e}" for value in off)])
    return rows


def step_row(width: int, dtype: torch.dtype, rows: int, seconds: float) -> list[str]:
    """The cells of one row: medians of the rounds' ratios, and ratios of peaks."""
    base = stack(width, dtype, "cpu")
    models = {
        "ours": with_ours(copy.deepcopy(base), "pissa_niter_4"),
        "peft": with_peft(copy.deepcopy(base), "pissa_niter_4"),
        "ours, LoRA": with_ours(copy.deepcopy(base), True),
        "peft, LoRA": with_peft(copy.deepcopy(base), True),
    }
    x = torch.randn(1, rows, width).to(dtype)
    steps = {key: lambda model=model: step(model, x) for key, model in models.items()}
    times = interleaved(steps, seconds, "cpu")
    peaks = {key: peak_bytes(steps[key], "cpu") for key in ("ours", "peft")}
    return [
        f"4 blocks of {width}",
        str(dtype).removeprefix("torch."),
        str(rows),
        f"{milliseconds(times, 'ours'):.1f} ms",
        f"{ratio(times, ['ours'], ['peft']):.2f}",
        f"{ratio(times, ['ours'], ['ours, LoRA']):.2f}",
        f"{ratio(times, ['peft'], ['peft, LoRA']):.2f}",
        f"{peaks['ours'] / 2**20:.1f} MiB",
        f"{peaks['ours'] / peaks['peft']:.2f}",
    ]


Batches = list[dict[str, torch.Tensor]]


def llama(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(config).eval()


def make_batches(count: int, tokens: int) -> Batches:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1024, (4, tokens), generator=draw) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def from_data_by_ours(model: nn.Module, init: Any, batches: Batches) -> nn.Module:
    initialize_from_data(with_ours(model, init), batches, n=len(batches))
    return model


def from_data_by_peft(model: nn.Module, init: Any, batches: Batches) -> nn.Module:
    """Every batch is read once: peft, which else goes on until all converge, finds all converged after the last."""
    config = LoraConfig(
        r=R, lora_alpha=R, target_modules="all-linear", init_lora_weights=init, lora_ga_config=LoraGAConfig()
    )
    if init == "lora_ga":
        config.target_modules = adaptable(model)

        def train_step() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        preprocess_loraga(model, config, train_step)
        return get_peft_model(model, config).base_model.model  # type: ignore[arg-type]
    adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    similarity, reads = torch.tensor(2.0), 0

    def forward(model: Any, batch: Any) -> None:
        nonlocal reads
        reads += 1
        if reads == len(batches) + 1:  # the first batch was looked at for equal inputs before
            similarity.fill_(-2.0)
        model(**batch)

    adapted.peft_config["default"].eva_config = EvaConfig(rho=1.0)
    adapted.peft_config["default"].eva_config.tau = similarity
    initialize_lora_eva_weights(adapted, batches, forward_fn=forward, show_progress_bar=False)
    assert reads == len(batches) + 1
    result: nn.Module = adapted.base_model.model
    return result


def adaptable(model: nn.Module) -> list[str]:
    """Names of all linear layers but the head, as "all-linear" means them; peft's LoRA-GA wants names."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def farthest(ours: Any, theirs: Any) -> float:
    """The distance of A.T @ A from peft's over that one's norm, the largest of the layers."""
    layers = adapted_layers(ours)
    assert list(layers) == [name for name, module in theirs.named_modules() if hasattr(module, "base_layer")]
    found = 0.0
    for name, layer in layers.items():
        a, expected = (
            value.detach().double() for value in (layer.lora_A, theirs.get_submodule(name).lora_A["default"].weight)
        )
        found = max(found, float((a.T @ a - expected.T @ expected).norm() / (expected.T @ expected).norm()))
    return found


def data_row(init: str, hidden: int, batches: Batches, rounds: int) -> list[str]:
    """The cells of one row: medians and least of the rounds, the median of their ratios, and how far A are apart."""
    base, times, models = llama(hidden), Times(ours=[], peft=[]), {}
    starts = {"ours": from_data_by_ours, "peft": from_data_by_peft}
    for i in range(rounds):
        for name in list(starts)[:: 1 if i % 2 else -1]:
            model = copy.deepcopy(base)
            began = time.perf_counter()
            models[name] = starts[name](model, init, batches)
            times[name].append(time.perf_counter() - began)
    shape = batches[0]["input_ids"].shape
    cells = [f"{value:.0f} ms" for name in starts for value in (milliseconds(times, name), 1e3 * min(times[name]))]
    distance = farthest(models["ours"], models["peft"])
    return [
        init,
        str(hidden),
        f"{len(batches)} of {shape[0]} x {shape[1]}",
        *cells,
        f"{ratio(times, ['ours'], ['peft']):.2f}",
        f"{distance:.0e}",
    ]


def show(header: str, rows: Iterable[list[str]]) -> None:
    for number, row in enumerate(rows):
        if not number:
            print(header)
            print("|" + "---|" * (header.count("|") - 1))
        print("| " + " | ".join(row) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3, help="of each start")
    parser.add_argument("--width", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row of steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 512], help="sizes of the Llama")
    parser.add_argument("--batches", type=int, nargs=2, default=[16, 128], help="how many, and tokens of each row")
    parser.add_argument("--data-rounds", type=int, default=5, help="of each start from data")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    show(START_HEADER, (row for side in options.sides for row in start_rows(side, options.rounds)))
    print()
    cases = [(width, dtype, rows) for width in options.width for dtype in DTYPES for rows in options.rows]
    show(STEP_HEADER, (step_row(*case, options.seconds) for case in cases))
    print()
    batches = make_batches(*options.batches)
    cells = [(init, hidden) for init in ("eva", "lora_ga") for hidden in options.hidden]
    show(DATA_HEADER, (data_row(*cell, batches, options.data_rounds) for cell in cells))


DTYPES = (torch.float32, torch.bfloat16)

if __name__ == "__main__":
    main()
