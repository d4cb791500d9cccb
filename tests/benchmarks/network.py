"""Benchmarks against peft, loralib and the floor: python tests/benchmarks/run.py network

Ratios are medians over interleaved rounds of one run, and with --runs over the runs. They are worth reading on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import groups
import torch
from fit import f_fit, g_hooks
from groups import Options, Row

import report

HEADER = report.HEADER
GROUPS = {
    "a": groups.a_training_step,
    "b": groups.b_forward,
    "c": groups.c_merge,
    "d": groups.d_memory,
    "e": groups.e_many_layers,
    "f": f_fit,
    "g": g_hooks,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, as a,c")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--runs", type=int, default=1, help="of everything, one after another; medians are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write rows and machine there")
    parser.add_argument("--keep", action="store_true", help="write the table, the plot and results.json of README.md")
    options = parser.parse_args(arguments)
    if options.keep and (options.quick or options.only != parser.get_default("only")):
        parser.error("--keep needs all groups at their full sizes")
    torch.set_num_threads(options.threads)
    print(machine := describe(options.threads))
    sizes = options_for(options.quick)
    runs = []
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}")
        runs.append(list(_measured(options.only.split(","), sizes)))
    rows = [_median(rows) for rows in zip(*runs, strict=True)]
    content = {"machine": machine, "date": date.today().isoformat(), "runs": options.runs, "rows": rows}
    text = report.as_json(content)
    if options.json:
        options.json.write_text(text)
    if options.keep:
        report.RESULTS.write_text(text)
        report.main()


def _measured(keys: list[str], options: Options) -> Iterator[Row]:
    for key in keys:
        for row in GROUPS[key](options):
            print(line(row), flush=True)
            yield row


def _median(rows: tuple[Row, ...]) -> dict[str, Any]:
    """One row of every run as one, with the lowest and the highest value."""
    values = [row.value for row in rows]
    return {**vars(rows[0]), "value": statistics.median(values), "lowest": min(values), "highest": max(values)}


def options_for(quick: bool) -> Options:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        return Options(device, 0.01, (32, 64), (torch.bfloat16,), (64,), 20, (20,))
    dtypes = (torch.float32, torch.bfloat16)
    return Options(device, 3.0, (128, 256, 512, 768), dtypes, (1024, 4096), 1000, (20, 200, 2000))


def describe(threads: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "peft", "loralib"))
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    cores = f"{threads} thread" + "s" * (threads != 1)
    return f"{chip}, {cores}, load {os.getloadavg()[0]:.2f}, Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(entry.split(":")[1].strip() for entry in lines if entry.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def line(row: Row) -> str:
    what = f"{', '.join(filter(None, (row.what, row.at)))}: {row.figure}"
    return f"{what:<72} {row.value:10.3f} {row.unit}"


if __name__ == "__main__":
    main()
