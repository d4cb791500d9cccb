"""The table and plot in README.md, out of what run.py wrote.

python tests/benchmarks/run.py --runs 5 --json tests/benchmarks/results.json
python tests/benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PLOT, README = HERE / "results.json", HERE / "results.png", HERE / "README.md"
BEGIN, END = "<!-- benchmarks: written by tests/benchmarks/report.py -->\n", "<!-- end of benchmarks -->"
COLUMNS = {
    "against peft": ["/ peft"],
    "against loralib": ["/ loralib"],
    "against": [
        *("/ floor", "/ untouched base", "/ one copy of the weights", "/ the weight", "/ its tensors' bytes"),
        "ms a step",
    ],
}
SHOWN = [  # in the plot: the kind of work, its size, and its name there
    ("training step {}", "d=768", "training step"),
    ("training step {}, dropout 0.05", "d=768", "the same with\ndropout 0.05"),
    ("Trainer.fit with validation", "d=256", "Trainer.fit with\nvalidation"),
    ("merge and unmerge {}, 24 layers", "d=512", "merge and\nunmerge, 24 layers"),
    ("merge and unmerge {}, one layer", "d=1024", "merge and\nunmerge, one layer"),
    ("merge and unmerge {}, one layer", "d=4096", "merge and\nunmerge, one layer"),
]
BARS = {"fp32": {"facecolor": "#0072b2"}, "bf16": {"facecolor": "#f0c987", "hatch": "///"}}
BAR = 0.36  # how wide one is
NAMES = {"/ floor": "the floor", "/ one copy of the weights": "one copy"}


def markdown(content: dict[str, Any]) -> str:
    """A table of ratios, the sizes of one kind of work in one row."""
    work: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        work.setdefault(row["what"], []).append(row)
    lines = [
        "| work | sizes | " + " | ".join([*COLUMNS][:2]) + " | against the least possible |",
        "|---|---|---|---|---|",
    ]
    for what, rows in work.items():
        cells = [_cell(rows, figures) for figures in COLUMNS.values()]
        if any(cells):
            sizes = list(dict.fromkeys(row["at"] for row in rows))
            lines.append(f"| {what} | {', '.join(sizes)} | {' | '.join(cells)} |")
    return "\n".join(
        [f"{content['machine']}; medians of {content['runs']} runs:", "", *lines, *_missed(content["rows"])]
    )


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as fast or as lean as it should be."""
    missed = [row for row in rows if row["verdict"] == "not reached"]
    lines = [
        f"- {row['what']}, {row['at']}: {row['value']:.2f} {row['figure']}; wanted at most {row['target']:g}, "
        f"found {row['lowest']:.2f} to {row['highest']:.2f}"
        for row in missed
    ]
    return ["", f"{len(missed)} of {sum(row['target'] is not None for row in rows)} goals are not reached:", "", *lines]


def _cell(rows: list[dict[str, Any]], figures: list[str]) -> str:
    chosen = [row for row in rows if row["figure"] in figures]
    if not chosen:
        return ""
    against = chosen[0]["figure"]
    if against == "ms a step":
        return ", ".join(f"{row['value']:.3f}" for row in chosen) + " ms"
    name = "" if against in ("/ peft", "/ loralib") else " of " + NAMES.get(against, against.removeprefix("/ "))
    return ", ".join(f"{row['value']:.2f}" for row in chosen) + name


def plot(content: dict[str, Any]) -> Any:
    """A figure with bars of the time that ours takes over peft's, and the lowest and the highest run."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.transforms import blended_transform_factory

    rows = {(row["what"], row["at"]): row for row in content["rows"] if row["figure"] == "/ peft"}
    figure = Figure(figsize=(8, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (kind, at, _) in enumerate(SHOWN):
        dtypes = [*BARS][: 2 if "{}" in kind else 1]
        for place, dtype in enumerate(dtypes):
            row = rows[kind.format(dtype), at]
            x = number + (place - (len(dtypes) - 1) / 2) * BAR
            span = [[row["value"] - row["lowest"]], [row["highest"] - row["value"]]]
            error = {"elinewidth": 1, "capsize": 2}
            axes.bar(x, row["value"], BAR, yerr=span, ecolor="0.3", error_kw=error, edgecolor="black", **BARS[dtype])
            label = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            axes.text(x, 0.04, f"{row['value']:.2f}", ha="center", va="bottom", fontsize=8, bbox=label)
    axes.axhline(1.0, color="black", linewidth=1.2)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(1.005, 1.0, "peft", va="center", transform=beside)
    axes.set_xticks(range(len(SHOWN)), [f"{name}\n{at}" for _, at, name in SHOWN], fontsize=8)
    axes.set_ylabel("our time / peft's")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(label=dtype, edgecolor="black", **style) for dtype, style in BARS.items()]
    axes.legend(handles=handles, frameon=False, loc="upper left")
    axes.set_title("Time relative to peft, lower is better", loc="left", fontweight="bold")
    figure.supxlabel(content["machine"], fontsize=6, color="0.35")
    return figure


def main() -> None:
    content = json.loads(RESULTS.read_text())
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{markdown(content)}\n\n{END}{after}")
    plot(content).savefig(PLOT)


if __name__ == "__main__":
    main()
