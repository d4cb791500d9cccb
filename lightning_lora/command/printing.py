"""Print results and failures of the command.

Control characters that a file brings are shown as escapes. Where nobody reads the output any more, nothing is printed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import LoRAError
from ..names import listed
from ..units import size_text


def print_lines(lines: Sequence[str]) -> None:
    """Print a result, one line for each text.

    Raises:
        BrokenPipeError: nobody reads the output any more.
        LoRAError: it cannot be printed, as onto a full disk.
    """
    try:
        print("\n".join(map(printable, lines)), flush=True)
    except OSError as error:
        discard_output()
        if isinstance(error, BrokenPipeError):
            raise
        raise LoRAError(f"its result cannot be printed: {error.strerror}.") from error


def print_failure(verb: str, reason: str, status: int = 1) -> int:
    """Print in one line why a verb failed. Returns the exit code."""
    reason = one_line(reason.removeprefix(f"{verb}: "))
    with suppress(OSError):
        print(f"lightning-lora {verb}: {reason}", file=sys.stderr, flush=True)
    return status


def one_line(text: str) -> str:
    """Return a text in one line, with escapes for control characters."""
    return printable(" ".join(text.split("\n")))


def printable(text: str) -> str:
    """Return a text with escapes for control characters, which a name in a file may hold."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def discard_output() -> None:
    """Send the rest of the output nowhere. Otherwise Python complains of a closed pipe at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def json_text(result: Mapping[str, Any]) -> list[str]:
    """Write a result as JSON. Where a number is not finite, there is null."""
    written = json.dumps(_without_nan(result), indent=2, allow_nan=False)
    # dumps escapes all but printable ASCII, and leaves DEL, a control character, as it is.
    return written.replace("\x7f", "\\u007f").split("\n")


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None: JSON cannot write them."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def info_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of info for people."""
    head = [f"{result['path']}: {result['kind']}"]
    if result["kind"] == "weights":
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in result["dtypes"].items())
        files = f"{result['files']} file" + ("s" if result["files"] != 1 else "")
        size = f"{result['parameters']:,} parameters, {size_text(result['bytes'])}"
        return [*head, f"{result['tensors']} tensors ({dtypes}) in {files}, {size}"]
    scaled = all(layer["scaling"] is not None for layer in result["layers"].values())
    product = "s*B@A" if scaled else "B@A"
    head.append(
        f"{len(result['layers'])} adapted layers, {result['parameters']:,} parameters, {size_text(result['bytes'])}, "
        f"norm of {product} {_number(result['norm'])}{'' if scaled else ' without s, which is not stored'}"
    )
    options = result["config"] or {"options": "none stored; lora_alpha must come from whoever trained it"}
    head += [f"  {name}: {_option(value)}" for name, value in options.items() if value is not None]
    base = result["base"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in base["dtypes"].items()) or "not recorded"
    head.append(f"base: {base.get('base_model_name_or_path', 'no name')}; frozen tensors known: {dtypes}")
    for table, trained in result.get("tables", {}).items():
        head.append(f"trained rows of {table}: {listed(list(map(str, trained['rows'])), 10)}")
    if "attached" in result:
        attached = ", ".join(f"{name} (strength {_number(value)})" for name, value in result["attached"].items())
        head.append(f"trained with these attached, not in it: {attached}")
    if result["also_trained"]:
        also = list(result["also_trained"])
        head.append(f"also in it: {listed(also, 3)}" + (f" ({len(also)} in all)" if len(also) > 3 else ""))
    rows = [
        (name, layer["kind"] or "", str(layer["rank"]), _number(layer["scaling"]), _number(layer["norm_delta"]))
        for name, layer in result["layers"].items()
    ]
    return [*head, *_table(("layer", "kind", "rank", "scaling", f"norm of {product}"), rows)]


def diff_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of diff for people."""
    options = [f"{name} ({one}, {other})" for name, (one, other) in result.get("options", {}).items()]
    lines = [f"options that differ: {', '.join(options)}"] if options else []
    for which, prefix in zip(("first", "second"), result.get("without_prefix", ()), strict=False):
        lines += [f"names in the {which} begin with {prefix!r}, and are compared without it"] if prefix else []
    for key in ("only_in_first", "only_in_second"):
        lines += [f"{key.replace('_', ' ')}: {name}" for name in result[key]]
    if result.get("without_scaling"):
        lines.append(f"B@A is compared without s, which is not stored in {' and '.join(result['without_scaling'])}")
    changes = result["changes"]
    moved = {name: row for name, row in changes.items() if row.get("problem") or row["change"] or row.get("dtypes")}
    of_dtype = [" and ".join(row["dtypes"]) for row in moved.values() if row.get("dtypes") and not row["change"]]
    alone = f", {len(of_dtype)} in dtype alone ({', '.join(sorted(set(of_dtype)))})" if of_dtype else ""
    lines.append(f"{len(moved)} of {len(changes)} differ{alone}")
    rows = [
        (name, row.get("problem") or _number(row["change"]), "" if row.get("problem") else _number(row["relative"]))
        for name, row in moved.items()
    ]
    return [*lines, *_table(("name", "change", "relative"), rows)]


def merge_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of merge for people."""
    left_out = [f"left out, because it holds weights that are not merged: {path}" for path in result["left_out"]]
    return [*left_out, f"wrote {result['output']}"]


def export_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of export for people."""
    ranks = sorted({layer["rank"] for layer in result["layers"].values()})
    of_rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return [f"wrote {result['output']}: {len(result['layers'])} adapted layers of {of_rank}"]


def extract_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of extract for people."""
    rows = [(name, f"{layer['kept']:.2%}") for name, layer in result["layers"].items()]
    lines = _table(("layer", "kept"), rows)
    lines.append(f"kept {result['kept']:.2%} of the squared norm of the change of {len(rows)} layers")
    lines += [f"carried whole: {', '.join(result['carried_whole'])}"] if result["carried_whole"] else []
    lines += [f"left out: {', '.join(result['left_out'])}"] if result["left_out"] else []
    return [*lines, f"wrote {result['output']}"]


def combine_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of combine for people."""
    rows = [(name, str(layer["rank"]), f"{layer['kept']:.2%}") for name, layer in result["layers"].items()]
    lines = _table(("layer", "rank", "kept"), rows)
    lines += [f"weighted mean: {name}" for name in result["weighted_means"]]
    return [*lines, f"wrote {result['output']}"]


def plot_text(result: Mapping[str, Any]) -> list[str]:
    """Write the result of plot for people."""
    return [f"wrote {result['output']}: {', '.join(result['figures'])}"]


def _option(value: Any) -> str:
    """Write a whole number as one: YAML's readers make a float of it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    return ["  ".join(row).rstrip() for row in padded]


# What writes the result of each verb for people.
TEXTS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "info": info_text,
    "merge": merge_text,
    "export": export_text,
    "diff": diff_text,
    "extract": extract_text,
    "combine": combine_text,
    "plot": plot_text,
}
