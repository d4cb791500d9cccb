"""The `lightning-lora` command: adapters and merged weights on disk, without building a model."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from .convert import to_lightning, to_peft
from .errors import LoRAError
from .extract import extract
from .info import diff, info
from .merge_command import merge_on_disk
from .peft_format import write_folder
from .report import bytes_of, diff_text, extract_text, info_text
from .weights import open_weights

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
    total = sum(place.nbytes for place in open_weights(options.base).places.values())
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
    with _progress_bar("comparing", sum(place.nbytes for place in base.places.values())) as progress:
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
