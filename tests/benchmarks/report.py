"""The table and plot in README.md, out of what run.py wrote.

python tests/benchmarks/run.py network --runs 5 --keep   # measures anew
python tests/benchmarks/report.py                        # of the results that are kept
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
HEADER = "| work | sizes | against peft | against loralib | against the least possible |"
TO_PEFT = (
    "of peft",
    "of peft's",
    "against peft",
    "of peft's hotswap",
    "of peft's loading anew",
    "of peft's from memory",
)
TO_OTHERS = ("of the floor", "against the floor", "of LoRA", "of our LoRA", "of our loading anew", "least", "peft")
SUBJECTS = ("base", "model", "dtype", "d", "ranks", "the model is", "start", "weight", "rows", "hidden")
BEGIN_SLOWER, END_SLOWER = "<!-- slower: written by tests/benchmarks/report.py -->\n", "<!-- end of slower -->"
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
NAMES = {"/ floor": "the floor", "/ one copy of the weights": "one copy"}


def markdown(content: dict[str, Any]) -> str:
    """A table of ratios, the sizes of one kind of work in one row."""
    work: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        work.setdefault(row["what"], []).append(row)
    lines = [
        HEADER,
        "|---|---|---|---|---|",
    ]
    for what, rows in work.items():
        cells = [_cell(rows, figures) for figures in COLUMNS.values()]
        if any(cells):
            sizes = list(dict.fromkeys(row["at"] for row in rows))
            lines.append(f"| {what} | {', '.join(sizes)} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"{content['machine']}, {content['date']}; medians of {content['runs']} runs:",
            "",
            *lines,
            "",
            _merges_in_words(content["rows"]),
            *_missed(content["rows"]),
        ]
    )


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as fast or as lean as it should be."""
    missed = [row for row in rows if row["verdict"] == "not reached"]
    lines = [
        f"- {', '.join(filter(None, (row['what'], row['at'])))}: {row['value']:.2f} {row['figure']}; "
        f"wanted at most {row['target']:g}, found {row['lowest']:.2f} to {row['highest']:.2f}"
        for row in missed
    ]
    return ["", f"{len(missed)} of {sum(row['target'] is not None for row in rows)} goals are not reached:", "", *lines]


def _merges_in_words(rows: list[dict[str, Any]]) -> str:
    """The milliseconds of the merges of 24 small layers, which the table has as ratios."""
    work = [row for row in rows if row["what"] == "merge and unmerge fp32, 24 layers"]
    ours = {row["at"]: row for row in work if row["figure"] == "ours"}
    shares = {row["at"]: row["value"] for row in work if row["figure"] == "/ peft"}
    texts = [
        f"{row['value']:.2g} ms at {at} ({row['lowest']:.2g} to {row['highest']:.2g}; peft about "
        f"{row['value'] / shares[at]:.2g})"
        for at, row in ours.items()
    ]
    return (
        "In plain words: a validation merges once and unmerges once. With the 24 float32 layers of this network that "
        f"takes {', '.join(texts)}."
    )


def read_tables(page: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return each table of a page in Markdown: the heading above it, its header, and its rows."""
    tables: list[tuple[str, list[str], list[list[str]]]] = []
    heading, lines = "", page.splitlines()
    for number, line in enumerate(lines):
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|---"):
            header = [cell.strip() for cell in lines[number - 1].strip("|").split("|")]
            tables.append((heading, header, []))
        elif line.startswith("|") and tables and number and lines[number - 1].startswith("|"):
            tables[-1][2].append(cells)
    return tables


def slower(page: str) -> str:
    """A list of the ratios to peft that are above 1, in the tables that are of single variants."""
    found: dict[str, dict[str, list[str]]] = {}  # by heading, by what was measured
    for heading, header, rows in read_tables(page):
        subjects = [column for column, name in enumerate(header) if name in SUBJECTS]
        ratios = [column for column, name in enumerate(header) if name in TO_PEFT]
        for row, column in ((row, column) for row in rows for column in ratios if 0 in subjects):
            if float(row[column]) > 1:
                what = next(name for name in header[column::-1] if name not in (*TO_PEFT, *TO_OTHERS))
                named = (f"{header[i]} {row[i]}" if row[i].isdigit() else row[i] for i in subjects)
                texts = found.setdefault(heading, {}).setdefault("start" if what == "ours" else what, [])
                texts.append(f"{row[column]} ({', '.join(named)})")
    return "\n".join(
        f"- [{heading}](#{heading.lower().replace(' ', '-')}), {what}: {', '.join(texts)}"
        for heading, of_heading in found.items()
        for what, texts in of_heading.items()
    )


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
        axes.legend(handles=handles, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.88))
        axes.set_title("Time relative to peft, lower is better", loc="left", fontweight="bold")
        figure.supxlabel(content["machine"], fontsize=7)
    return figure


def between(page: str, begin: str, end: str, text: str) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    content = json.loads(RESULTS.read_text())
    page = between(README.read_text(), BEGIN, END, markdown(content))
    README.write_text(between(page, BEGIN_SLOWER, END_SLOWER, slower(page)))
    plot(content).savefig(PLOT)


if __name__ == "__main__":
    main()
