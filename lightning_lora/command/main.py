"""The `lightning-lora` command: adapters and merged weights on disk, without building a model.

Each verb is a function: its parameters are the arguments, which parser.py describes, and --json prints what it returns.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import LoRAError
from ..exchange.combine import combine_adapters
from ..exchange.export import export_adapter
from ..files.weights import open_weights
from ..formats.peft_folder import write_folder
from ..report.figures import plot_adapter
from .extract import extract as extract_from_weights
from .info import diff, info
from .merge import merge_on_disk
from .output import check_output
from .parser import make_parser
from .printing import TEXTS, json_text, one_line, print_failure, print_lines

# Exit codes as a shell reports them: 128 plus the number of the signal.
INTERRUPTED = 130  # SIGINT
NOBODY_READS = 141  # SIGPIPE
TERMINATED = 143  # SIGTERM


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb of the command, and print its result, or in one line what went wrong. Return the exit status."""
    options = vars(make_parser(VERBS).parse_args(args))
    verb, as_json = options.pop("verb"), options.pop("json")
    with _as_a_program():
        try:
            result = VERBS[verb](**options)
            print_lines(json_text(result) if as_json else TEXTS[verb](result))
        except LoRAError as error:
            return print_failure(verb, str(error))
        except BrokenPipeError:
            return NOBODY_READS
        except OSError as error:
            return print_failure(verb, f"{error.filename or options.get('output')}: {error.strerror or error}.")
        except KeyboardInterrupt:
            return print_failure(verb, "interrupted.", INTERRUPTED)
    return 0


@contextmanager
def _as_a_program() -> Iterator[None]:
    """Show each warning in one line. Turn SIGTERM into an exception, so that unfinished files are removed."""
    format_before, handler_before = warnings.formatwarning, signal.getsignal(signal.SIGTERM)
    warnings.formatwarning = lambda message, *_, **__: f"{one_line(str(message))}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        signal.signal(signal.SIGTERM, handler_before)


def merge(
    *,
    base: str,
    adapter: str,
    output: str,
    dtype: str | None,
    overwrite: bool,
    strict_base: bool,
    lora_alpha: float | None,
) -> dict[str, Any]:
    """Merge an adapter into a base on disk; memory does not grow with the model."""
    left_out = merge_on_disk(
        base,
        adapter,
        output,
        lora_alpha=lora_alpha,
        dtype=getattr(torch, dtype) if dtype else None,
        strict_base=strict_base,
        overwrite=overwrite,
    )
    return {"output": output, "left_out": list(map(str, left_out))}


def export(source: str, output: str, *, plain: bool, overwrite: bool, lora_alpha: float | None) -> dict[str, Any]:
    """Write an adapter as a PEFT folder, as it is or in the plain form that every server takes."""
    check_output("export", "folder", output, [source], overwrite)
    adapter = export_adapter(source, output, plain=plain, lora_alpha=lora_alpha)
    return {"output": output, "layers": {name: {"rank": layer.r} for name, layer in adapter.layers.items()}}


def extract(
    *,
    base: str,
    tuned: str,
    rank: int,
    output: str,
    exclude: Sequence[str],
    embeddings: Sequence[str],
    fan_in_fan_out: bool,
    drop_rest: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Make an adapter out of a full fine-tune, by truncated singular value decomposition."""
    check_output("extract", "folder", output, [base, tuned], overwrite)
    extracted = extract_from_weights(
        open_weights(base),
        open_weights(tuned),
        rank,
        exclude=exclude,
        embeddings=embeddings,
        fan_in_fan_out=fan_in_fan_out,
        drop_rest=drop_rest,
    )
    write_folder(extracted.adapter, output, verb="extract")
    return {
        "output": output,
        "layers": {name: {"kept": share} for name, share in extracted.kept.items()},
        "kept": extracted.total(),
        "carried_whole": list(extracted.adapter.whole_tensors()),
        "left_out": extracted.dropped,
    }


def combine(
    adapters: Sequence[str],
    *,
    output: str,
    weights: Sequence[float],
    method: str | None,
    rank: float | None,
    density: float | None,
    seed: int,
    overwrite: bool,
    strict_base: bool,
) -> dict[str, Any]:
    """Combine several adapters of one base into one, or shrink one with --rank."""
    check_output("combine", "folder", output, adapters, overwrite)
    rank = int(rank) if rank is not None and rank.is_integer() else rank  # the parser makes a float of each
    combined = combine_adapters(
        adapters, weights or None, method=method, rank=rank, density=density, seed=seed, strict_base=strict_base
    )
    write_folder(combined.adapter, output, verb="combine")
    ranks = {name: layer.r for name, layer in combined.adapter.layers.items()}
    return {
        "output": output,
        "layers": {name: {"rank": ranks[name], "kept": share} for name, share in combined.kept.items()},
        "weighted_means": list(combined.averaged) if len(adapters) > 1 else [],
    }


def plot(path: str, *, output: str, overwrite: bool) -> dict[str, Any]:
    """Draw the root mean square of an adapter's updates by depth, and their singular values."""
    check_output("plot", "file", output, [path], overwrite)
    return {"output": output, "figures": list(plot_adapter(path, output=output))}


VERBS: dict[str, Callable[..., Mapping[str, Any]]] = {
    each.__name__: each for each in (info, merge, export, diff, extract, combine, plot)
}
