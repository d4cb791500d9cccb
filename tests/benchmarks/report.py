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


def plot(content: dict[str, Any], path: Path) -> None:
    """Bars of the ratios to peft; less is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in content["rows"] if row["figure"] == "/ peft"]
    figure, axes = plt.subplots(figsize=(8, 0.22 * len(shown) + 1.2), layout="constrained")
    span = [[row["value"] - row["lowest"] for row in shown], [row["highest"] - row["value"] for row in shown]]
    names, values = [f"{row['what']}, {row['at']}" for row in shown], [row["value"] for row in shown]
    axes.barh(names, values, xerr=span, color="#4477aa", ecolor="#999999", error_kw={"linewidth": 1})
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("ours / peft's: time, and peak memory where said; less is better")
    axes.set_title(content["machine"], fontsize=6)
    figure.savefig(path, dpi=110)


def main() -> None:
    content = json.loads(RESULTS.read_text())
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{markdown(content)}\n\n{END}{after}")
    plot(content, PLOT)


if __name__ == "__main__":
    main()
