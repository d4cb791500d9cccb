"""The `lightning-lora` command: adapters and merged weights on disk, without building a model."""

from __future__ import annotations

import json
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from ..adapter.peft_folder import write_folder
from ..errors import LoRAError
from ..files.weights import open_weights
from .convert import to_lightning, to_peft
from .extract import Extracted, extract
from .info import diff, info
from .merge import merge_on_disk

Dtype = Literal["float16", "bfloat16", "float32", "float64"]


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        print("lightning-lora: needs jsonargparse; install lightning-lora[cli].", file=sys.stderr)
        return 1
    options = _parser(ArgumentParser).parse_args(args)
    with _as_a_program():
        try:
            print(VERBS[options.verb][1](options[options.verb]), flush=True)
        except LoRAError as error:
            print(f"lightning-lora {options.verb}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"lightning-lora {options.verb}: interrupted; nothing was written", file=sys.stderr)
            return 130
    return 0


@contextmanager
def _as_a_program() -> Iterator[None]:
    """Warnings in one line, and a termination that cleans up what was begun."""
    format_before, handler_before = warnings.formatwarning, signal.getsignal(signal.SIGTERM)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        signal.signal(signal.SIGTERM, handler_before)


def _parser(make: Callable[..., Any]) -> Any:
    parser = make(prog="lightning-lora", description=__doc__)
    verbs = parser.add_subcommands(dest="verb")
    for verb, (fill, run) in VERBS.items():
        parser_of_verb = make(description=run.__doc__)
        fill(parser_of_verb)
        verbs.add_subcommand(verb, parser_of_verb, help=run.__doc__)
    return parser


def _info_options(parser: Any) -> None:
    parser.add_argument("path", type=str, help="checkpoint, PEFT folder, safetensors, state dict or model folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(options: Any) -> str:
    """What a file or folder holds: options, layers, ranks, norms, the base that it belongs to."""
    found = info(options.path)
    return json.dumps(found, indent=2) if options.json else info_text(found)


def _merge_options(parser: Any) -> None:
    parser.add_argument("--base", type=str, required=True, help="model folder, safetensors, checkpoint or state dict")
    parser.add_argument("--adapter", type=str, required=True, help="PEFT folder, Lightning checkpoint or state dict")
    parser.add_argument("--output", type=str, required=True, help="of the base's form; appears whole at the end")
    parser.add_argument("--dtype", type=Dtype | None, help="of the result; without it that of the base")
    parser.add_argument("--max-shard-size", type=str | None, help="as 5GB; without it the base's own shards")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it in float64")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--strict-base", type=bool, default=True, help="false: another base is only a warning")
    _alpha_option(parser)


def _merge(options: Any) -> str:
    """Merge an adapter into a base on disk; memory does not grow with the model."""
    total = sum(location.nbytes for location in open_weights(options.base).locations.values())
    with _progress_bar("merging", total) as progress:
        left_out = merge_on_disk(
            options.base,
            options.adapter,
            options.output,
            lora_alpha=options.lora_alpha,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_shard_bytes=bytes_of(options.max_shard_size) if options.max_shard_size else None,
            check=options.verify,
            strict_base=options.strict_base,
            overwrite=options.overwrite,
            progress=progress,
        )
    lines = [f"left out, because it holds weights that are not merged: {path}" for path in left_out]
    return "\n".join([*lines, f"wrote {options.output}" + (", verified" if options.verify else "")])


def _export_options(parser: Any) -> None:
    parser.add_argument("source", type=str, help="Lightning checkpoint, or any other form of adapter")
    parser.add_argument("output", type=str, help="PEFT folder to write")
    _alpha_option(parser)


def _export(options: Any) -> str:
    """Write an adapter as a PEFT folder."""
    adapter = to_peft(options.source, options.output, options.lora_alpha)
    return f"wrote {options.output}: {len(adapter.layers())} adapted layers"


def _import_options(parser: Any) -> None:
    parser.add_argument("source", type=str, help="PEFT folder, or any other form of adapter")
    parser.add_argument("output", type=str, help="Lightning checkpoint to write, NAME.ckpt")
    _alpha_option(parser)


def _import(options: Any) -> str:
    """Write an adapter as a Lightning checkpoint."""
    adapter = to_lightning(options.source, options.output, options.lora_alpha)
    return f"wrote {options.output}: {len(adapter.layers())} adapted layers"


def _diff_options(parser: Any) -> None:
    parser.add_argument("first", type=str, help="adapter or weights, in any form")
    parser.add_argument("second", type=str, help="another of the same kind")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _diff(options: Any) -> str:
    """What differs between two adapters or two models, layer by layer."""
    found = diff(options.first, options.second)
    return json.dumps(found, indent=2) if options.json else diff_text(found)


def _extract_options(parser: Any) -> None:
    parser.add_argument("--base", type=str, required=True, help="weights before the fine-tune")
    parser.add_argument("--tuned", type=str, required=True, help="weights after it, under the same names")
    parser.add_argument("--rank", type=int, required=True, help="of the adapter")
    parser.add_argument("--output", type=str, required=True, help="PEFT folder to write")
    parser.add_argument("--exclude", nargs="*", type=str, default=[], help="modules to carry whole: names or suffixes")
    parser.add_argument("--embeddings", nargs="*", type=str, default=[], help="modules that are embeddings too")
    parser.add_argument("--fan-in-fan-out", action="store_true", help="linear weights are (in, out), as in GPT-2")
    parser.add_argument("--drop-rest", action="store_true", help="leave out what else changed (norms, biases)")


def _extract(options: Any) -> str:
    """Make an adapter out of a full fine-tune by truncated singular value decomposition."""
    base, tuned = open_weights(options.base), open_weights(options.tuned)
    with _progress_bar("comparing", sum(location.nbytes for location in base.locations.values())) as progress:
        found = extract(
            base,
            tuned,
            options.rank,
            exclude=options.exclude,
            embeddings=options.embeddings,
            fan_in_fan_out=options.fan_in_fan_out,
            drop_rest=options.drop_rest,
            progress=progress,
        )
    write_folder(found.adapter, options.output)
    return extract_text(found, options.output)


def _alpha_option(parser: Any) -> None:
    parser.add_argument("--lora-alpha", type=float | None, help="for adapters that do not store it, as loralib's")


@contextmanager
def _progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar where the standard error is a terminal; the standard output holds results alone."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done: None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


VERBS: dict[str, tuple[Callable[[Any], None], Callable[[Any], str]]] = {
    "info": (_info_options, _info),
    "merge": (_merge_options, _merge),
    "export": (_export_options, _export),
    "import": (_import_options, _import),
    "diff": (_diff_options, _diff),
    "extract": (_extract_options, _extract),
}

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
