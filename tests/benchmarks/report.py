"""The table and plot in README.md, out of what run.py wrote.

python tests/benchmarks/run.py network --runs 5 --keep   # measures anew
python tests/benchmarks/report.py                        # of the results that are kept
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import against

HERE = Path(__file__).parent
RESULTS, PLOT, README = HERE / "results.json", HERE / "results.png", HERE / "README.md"
BEGIN, END = "<!-- benchmarks: written by tests/benchmarks/report.py -->\n", "<!-- end of benchmarks -->"
HEADER = "| work | sizes | ours | against peft | against loralib | against the least possible |"
LEAST = {
    "/ floor": "the floor",
    "/ untouched base": "untouched base",
    "/ the weight": "the weight",
}
SHOWN = [  # in the plot: the kind of work, its size, and its name there
    ("training step {}", "d=768", "training step"),
    ("training step {}, dropout 0.05", "d=768", "the same with\ndropout 0.05"),
    ("Trainer.fit with validation", "d=256", "Trainer.fit with\nvalidation"),
    ("merge and unmerge {}, 24 layers", "d=512", "merge and\nunmerge,\n24 layers"),
    ("merge and unmerge {}, one layer", "d=1024", "merge and\nunmerge,\none layer"),
    ("merge and unmerge {}, one layer", "d=4096", "merge and\nunmerge,\none layer"),
]
BARS = {"fp32": {"facecolor": "#2a78b8"}, "bf16": {"facecolor": "#b8690a"}}  # dark enough for white figures
BAR = 0.36  # how wide one is
GREY = "#7a7a7a"  # with the same contrast to a light page as to a dark one
DPI = 160
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


def as_json(content: dict[str, Any]) -> str:
    """Each row of the results in a line of its own."""
    lines = [*json.dumps({**content, "rows": []}, indent=1).splitlines()[:-2], ' "rows": [']
    return "\n".join([*lines, ",\n".join(f"  {json.dumps(row)}" for row in content["rows"]), " ]", "}", ""])


def markdown(content: dict[str, Any]) -> str:
    """A table, the sizes of one kind of work in one row."""
    work: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        work.setdefault(row["what"], []).append(row)
    lines = [HEADER, "|---|---|---|---|---|---|"]
    for what, rows in work.items():
        lines.append(f"| {what} | {_sizes(rows)} | {' | '.join(_cells(rows))} |")
    return "\n".join([f"{content['machine']}, {content['date']}; medians of {content['runs']} runs:", "", *lines])


def _sizes(rows: list[dict[str, Any]]) -> str:
    """The sizes of these rows, what their names share once: d=128, 256; or 20, 200 layers."""
    sizes = list(dict.fromkeys(row["at"] for row in rows))
    if all(size.startswith("d=") for size in sizes):
        return "d=" + ", ".join(size.removeprefix("d=") for size in sizes)
    if all(size.endswith(" layers") for size in sizes):
        return ", ".join(size.removesuffix(" layers") for size in sizes) + " layers"
    return ", ".join(sizes)


def _cells(rows: list[dict[str, Any]]) -> Iterator[str]:
    figures: dict[str, list[float]] = {}
    for row in rows:
        figures.setdefault(row["figure"], []).append(row["value"])
    ours = [f"{float(f'{value:.3g}'):g}" for value in figures.pop("ours", [])]
    yield f"{', '.join(ours)} {rows[0]['unit']}" if ours else ""
    for other in ("/ peft", "/ loralib"):
        yield ", ".join(map(against, figures.pop(other, [])))
    least = [f"{', '.join(f'{value:.2f}' for value in values)} of {LEAST[name]}" for name, values in figures.items()]
    yield "".join(least)


def plot(content: dict[str, Any]) -> Any:
    """A figure with bars of the time that ours takes over peft's, and the lowest and the highest run."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.transforms import blended_transform_factory

    rows = {(row["what"], row["at"]): row for row in content["rows"] if row["figure"] == "/ peft"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.5), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for number, (kind, at, _) in enumerate(SHOWN):
            dtypes = [*BARS][: 2 if "{}" in kind else 1]
            for place, dtype in enumerate(dtypes):
                row = rows[kind.format(dtype), at]
                x = number + (place - (len(dtypes) - 1) / 2) * BAR
                span = [[row["value"] - row["lowest"]], [row["highest"] - row["value"]]]
                error = {"elinewidth": 1, "capsize": 2}
                axes.bar(x, row["value"], BAR, yerr=span, ecolor=GREY, error_kw=error, **BARS[dtype])
                axes.text(x, 0.03, f"{row['value']:.2f}", ha="center", va="bottom", fontsize=8, color="white")
        axes.axhline(1.0, color=GREY, linewidth=1.2)
        beside = blended_transform_factory(axes.transAxes, axes.transData)
        axes.text(1.005, 1.0, "peft", va="center", transform=beside)
        axes.set_xticks(range(len(SHOWN)), [f"{name}\n{at}" for _, at, name in SHOWN], fontsize=8)
        axes.set_ylabel("our time / peft's")
        handles = [Patch(label=dtype, **style) for dtype, style in BARS.items()]
        axes.legend(handles=handles, frameon=False, loc="upper left")
        axes.set_title("Time relative to peft, lower is better", loc="left", fontweight="bold")
        figure.supxlabel(content["machine"], fontsize=7)
    return figure


def between(page: str, begin: str, end: str, text: str) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}"


def measure_or_redraw(program: Any, packages: tuple[str, ...], arguments: list[str] | None) -> None:
    """Measure what a program is for, and keep, print and draw it; with --redraw, take the results that are kept.

    Args:
        program: a module with measured(), markdown(content) and plot(content), the files RESULTS and PLOT, and BEGIN
            and END around its table in the page.
        packages: whose versions the page says.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=program.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="write table and picture of the results that are kept")
    if not parser.parse_args(arguments).redraw:
        torch.set_num_threads(1)
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        content = {"machine": f"CPU, 1 thread, {versions}", "date": date.today().isoformat(), **program.measured()}
        program.RESULTS.write_text(as_json(content))
    content = json.loads(program.RESULTS.read_text())
    table = program.markdown(content)
    README.write_text(between(README.read_text(), program.BEGIN, program.END, table))
    program.plot(content).savefig(program.PLOT)
    print(table)


def main() -> None:
    content = json.loads(RESULTS.read_text())
    README.write_text(between(README.read_text(), BEGIN, END, markdown(content)))
    plot(content).savefig(PLOT)


if __name__ == "__main__":
    main()
