"""What drift costs a run that merges at every step, as RL trainers do: python tests/benchmarks/run.py loop

A small Llama in bf16 has read Python's manual (examples/small_models.py). An adapter teaches it Python's library. After
each step the model is merged and unmerged, as for a rollout. Both packages have the same seeds, data and first A and B.
Compared are the loss inside of the run and the loss of the saved adapter on a fresh base, both with merged weights.

Users of an RL trainer met this: https://github.com/huggingface/trl/issues/6688
"""

from __future__ import annotations

import json
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from groups import quiet_fidelity
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import report
from lightning_lora import LoRAConfig, inject, load_adapter, merged, take_adapter

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import small_models

OPTIONS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SEEDS = (0, 1, 2)
RATES = (1e-5, 1e-4, 1e-3)  # of AdamW; each gives an adapter of another size
STEPS = (10, 30, 100, 300, 1000)  # after which the losses are compared; the last ends the run
BATCH, TOKENS, HELD_OUT = 8, 128, 64  # a batch has 8 pieces of 128 characters, and 64 other pieces are judged
RESULTS, PLOT = report.HERE / "merge_each_step.json", report.HERE / "merge_each_step.png"
BEGIN, END = "<!-- loop: written by tests/benchmarks/merge_each_step.py -->\n", "<!-- end of loop -->"
HEADER = "| learning rate | size of the adapter | package | loss in the run | loss of the saved adapter | difference |"
COLOURS, OURS = {1e-5: "#c77b0a", 1e-4: "#d1495b", 1e-3: "#8a63d2"}, "#1a8a5a"  # of PEFT by rate; of ours


@dataclass(frozen=True)
class Candidate:
    """An adapted model: what merges it for a while, and what loads its adapter onto a fresh base."""

    model: Any
    merged: Callable[[], AbstractContextManager[Any]]
    saved: Callable[[], Candidate]


def ours(base: Callable[[], nn.Module]) -> Candidate:
    inject(model := base(), LoRAConfig(**OPTIONS))

    def saved() -> Candidate:
        load_adapter(fresh := base(), take_adapter(model))
        return Candidate(fresh, lambda: merged(fresh), saved)

    return Candidate(model, lambda: merged(model), saved)


def peft(base: Callable[[], nn.Module]) -> Candidate:
    model: Any = get_peft_model(base(), LoraConfig(**OPTIONS))  # type: ignore[arg-type]

    @contextmanager
    def merged_by_peft() -> Iterator[None]:
        model.merge_adapter()
        yield
        model.unmerge_adapter()

    def saved() -> Candidate:
        fresh = peft(base)
        set_peft_model_state_dict(fresh.model, get_peft_model_state_dict(model))
        return fresh

    return Candidate(model, merged_by_peft, saved)


CANDIDATES: dict[str, Callable[[Callable[[], nn.Module]], Candidate]] = {"ours": ours, "peft": peft}


def pieces() -> tuple[Tensor, Tensor]:
    """The modules of Python's library, cut into pieces of TOKENS characters: those that train, and those that judge."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = "\n".join(path.read_text("utf-8", "replace") for path in files)
    rows = small_models.encode(text).unfold(0, TOKENS, TOKENS)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def train(
    make: Callable[[Callable[[], nn.Module]], Candidate], rate: float, seed: int, steps: tuple[int, ...] = STEPS
) -> dict[str, Any]:
    """Return the losses after these numbers of steps, in the run and of the saved adapter, and the adapter's size."""
    folder = small_models.manual_llama()
    taught, judged = pieces()
    candidate = make(lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    factors = {name: value for name, value in candidate.model.named_parameters() if value.requires_grad}
    draw = torch.Generator().manual_seed(seed)
    for name, value in factors.items():  # in the same order in both packages; B is zero
        if "lora_A" in name:
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=draw)
    optimizer = torch.optim.AdamW(factors.values(), lr=rate, weight_decay=0)
    found: dict[str, Any] = {"in_run": [], "saved": []}
    for step in range(1, steps[-1] + 1):
        batch = taught[torch.randint(len(taught), (BATCH,), generator=draw)]
        optimizer.zero_grad()
        candidate.model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        with quiet_fidelity(), candidate.merged():  # a rollout would be here
            if step in steps:
                found["in_run"].append(loss(candidate.model, judged))
        if step in steps:
            fresh = candidate.saved()
            with quiet_fidelity(), fresh.merged():
                found["saved"].append(loss(fresh.model, judged))
    return {**found, "size": size(candidate.saved().model, factors)}


@torch.no_grad()
def loss(model: Any, batch: Tensor) -> float:
    return float(model(input_ids=batch, labels=batch).loss)


def size(model: nn.Module, factors: dict[str, Tensor]) -> float:
    """The norm of s * B @ A of all layers, over the norm of their weights."""
    scaling = OPTIONS["lora_alpha"] / OPTIONS["r"]
    products = weights = 0.0
    names = dict(model.named_parameters())
    for name, a in factors.items():
        if "lora_A" in name:
            layer = name.split(".lora_A")[0]
            weight = names.get(f"{layer}.weight", names.get(f"{layer}.base_layer.weight"))
            assert weight is not None
            b = factors[name.replace("lora_A", "lora_B")]
            products += float((scaling * (b @ a)).detach().square().sum())
            weights += float(weight.detach().float().square().sum())
    return float((products / weights) ** 0.5)


def measured(
    rates: tuple[float, ...] = RATES, seeds: tuple[int, ...] = SEEDS, steps: tuple[int, ...] = STEPS
) -> dict[str, Any]:
    rows = []
    for rate in rates:
        for seed in seeds:
            for package, make in CANDIDATES.items():
                rows.append({"rate": rate, "seed": seed, "package": package, **train(make, rate, seed, steps)})
                print(json.dumps(rows[-1]), flush=True)
    return {"steps": [*steps], "seeds": [*seeds], "rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """A table of the losses at the end, means over the seeds, and the least and largest difference."""
    lines = []
    for (rate, package), rows in groups(content).items():
        in_run, saved = (statistics.mean(row[name][-1] for row in rows) for name in ("in_run", "saved"))
        gaps = [row["saved"][-1] - row["in_run"][-1] for row in rows]
        difference = f"{min(gaps):+.4f} to {max(gaps):+.4f}" if any(gaps) else "0, every bit"
        sizes = f"{100 * statistics.mean(row['size'] for row in rows):.2g} %"
        lines.append(f"| {rate:g} | {sizes} | {package} | {in_run:.4f} | {saved:.4f} | {difference} |")
    return "\n".join([f"{content['machine']}, {content['date']}:", "", HEADER, "|---|---|---|---|---|---|", *lines])


def groups(content: dict[str, Any]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """The rows of all seeds, by learning rate and package."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        found.setdefault((row["rate"], row["package"]), []).append(row)
    return found


def plot(content: dict[str, Any]) -> Any:
    """A figure with the saved adapter's loss less the run's, over the number of steps."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = content["steps"]
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 3.5), dpi=report.DPI, layout="constrained")
        axes = figure.subplots()

        def label(text: str, at: float, colour: str) -> None:
            axes.annotate(text, (steps[-1], at), (10, 0), textcoords="offset points", va="center", color=colour)

        for (rate, package), rows in groups(content).items():
            of_seeds = [[s - r for s, r in zip(row["saved"], row["in_run"], strict=True)] for row in rows]
            at_steps = [*zip(*of_seeds, strict=True)]
            means = [statistics.mean(each) for each in at_steps]
            colour = OURS if package == "ours" else COLOURS[rate]
            axes.plot(steps, means, color=colour, lw=2, clip_on=False, zorder=4 if package == "ours" else 3)
            if package == "peft":
                least, largest = [min(each) for each in at_steps], [max(each) for each in at_steps]
                axes.fill_between(steps, least, largest, color=colour, alpha=0.2, lw=0)
                label(f"PEFT, learning rate {rate:g}", means[-1], colour)
        label("lightning_lora: 0 in each", 0, OURS)
        axes.set(xscale="log", xlim=(steps[0], steps[-1]), xlabel="steps, each with a merge and an unmerge, in bf16")
        axes.set_xticks(steps, [f"{count:,}" for count in steps])
        axes.set_title("Loss of the saved adapter, less the loss inside of the run", loc="left", fontweight="bold")
    return figure


def main(arguments: list[str] | None = None) -> None:
    report.measure_or_redraw(sys.modules[__name__], ("torch", "peft", "transformers"), arguments)


if __name__ == "__main__":
    main()
