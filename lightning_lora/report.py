"""What the command prints, as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import LoRAError
from .extract import Extracted

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: str) -> int:
    """A number of bytes written as 5GB, 500MB or 123.

    Raises:
        LoRAError: it is not written like that, or is not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise LoRAError(f"merge: {size!r} is no size such as 5GB or 500MB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size_text(nbytes: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def info_text(found: Mapping[str, Any]) -> str:
    """The result of info."""
    head = [f"{found['path']}: {found['kind']}"]
    if found["kind"] == "weights":
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
        files = f"{found['files']} file" + ("s" if found["files"] != 1 else "")
        size = f"{found['parameters']:,} parameters, {size_text(found['bytes'])}"
        return "\n".join([*head, f"{found['tensors']} tensors ({dtypes}) in {files}, {size}"])
    head.append(
        f"{len(found['layers'])} adapted layers, {found['parameters']:,} parameters, {size_text(found['bytes'])}, "
        f"norm {found['norm']:.4g}"
    )
    options = found["config"] or {"options": "none stored; lora_alpha must come from whoever trained it"}
    head += [f"  {name}: {value}" for name, value in options.items() if value is not None]
    base = found["base"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in base["dtypes"].items()) or "not recorded"
    head.append(f"base: {base.get('base_model_name_or_path', 'no name')}; frozen tensors known: {dtypes}")
    if found["also_trained"]:
        head.append(f"also in it, whole: {', '.join(found['also_trained'])}")
    rows = [
        (name, layer["kind"] or "", str(layer["rank"]), _number(layer["scaling"]), _number(layer["norm_delta"]))
        for name, layer in found["layers"].items()
    ]
    return "\n".join([*head, *_table(("layer", "kind", "rank", "scaling", "norm of s*B@A"), rows)])


def diff_text(found: Mapping[str, Any]) -> str:
    """The result of diff."""
    lines = [f"options that differ: {', '.join(found['options'])}"] if found.get("options") else []
    for key in ("only_in_first", "only_in_second"):
        lines += [f"{key.replace('_', ' ')}: {name}" for name in found[key]]
    changes = found["changes"]
    moved = {name: row for name, row in changes.items() if row.get("problem") or row["change"] or row.get("dtypes")}
    lines.append(f"{len(moved)} of {len(changes)} differ")
    rows = [
        (name, row.get("problem") or _number(row["change"]), "" if row.get("problem") else _number(row["relative"]))
        for name, row in moved.items()
    ]
    return "\n".join([*lines, *_table(("name", "change", "relative"), rows)])


def extract_text(found: Extracted, output: str) -> str:
    """The result of extract."""
    rows = [(name, f"{share:.2%}") for name, share in found.kept.items()]
    lines = _table(("layer", "kept"), rows)
    lines.append(f"kept {found.total():.2%} of the squared norm of the change of {len(rows)} layers")
    whole = [name for name in found.adapter.tensors if name.rpartition(".")[2] not in ("lora_A", "lora_B")]
    lines += [f"carried whole: {', '.join(whole)}"] if whole else []
    lines += [f"left out: {', '.join(found.dropped)}"] if found.dropped else []
    return "\n".join([*lines, f"wrote {output}"])


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    return ["  ".join(row).rstrip() for row in padded]
