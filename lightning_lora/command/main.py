"""The `lightning-lora` command: adapters and merged weights on disk, without building a model.

Each verb is a function: its parameters are the options, its docstring is the help, and --json prints what it returns.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

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
from .parser import parser_of
from .printing import TEXTS, json_text, one_line, print_failure, print_lines

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
# Exit codes as a shell reports them: 128 plus the number of the signal.
INTERRUPTED = 130  # SIGINT
NOBODY_READS = 141  # SIGPIPE
TERMINATED = 143  # SIGTERM

ABOUT = "Adapters and merged weights on disk, without building a model."


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb of the command, and print its result, or in one line what went wrong. Return the exit status."""
    options = vars(parser_of("lightning-lora", ABOUT, VERBS).parse_args(args))
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
    dtype: Dtype | None = None,
    overwrite: bool = False,
    strict_base: bool = True,
    lora_alpha: float | None = None,
) -> dict[str, Any]:
    """Merge an adapter into a base on disk; memory does not grow with the model.

    Args:
        base: model folder, safetensors file, checkpoint or state dict.
        adapter: PEFT folder, Lightning checkpoint or any other form of adapter.
        output: file or folder to write, in the base's form; it appears whole, at the end.
        dtype: of the result; without it that of the base.
        overwrite: replace an earlier result.
        strict_base: false makes another base than the adapter's a warning, and leaves out a head that it lacks.
        lora_alpha: for adapters that do not store it, as loralib's.
    """
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


def export(
    source: str, output: str, *, plain: bool = False, overwrite: bool = False, lora_alpha: float | None = None
) -> dict[str, Any]:
    """Write an adapter as a PEFT folder, as it is or in the plain form that every server takes.

    Args:
        source: Lightning checkpoint, PEFT folder or any other form of adapter.
        output: folder to write.
        plain: write the form that every server and converter takes.
        overwrite: replace an earlier result.
        lora_alpha: for adapters that do not store it, as loralib's.
    """
    check_output("export", "folder", output, [source], overwrite)
    adapter = export_adapter(source, output, plain=plain, lora_alpha=lora_alpha)
    return {"output": output, "layers": {name: {"rank": layer.r} for name, layer in adapter.layers.items()}}


def extract(
    *,
    base: str,
    tuned: str,
    rank: int,
    output: str,
    exclude: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    drop_rest: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make an adapter out of a full fine-tune, by truncated singular value decomposition.

    Args:
        base: weights before the fine-tune.
        tuned: weights after it, under the same names.
        rank: of the adapter.
        output: PEFT folder to write.
        exclude: modules to carry whole, by names or suffixes.
        embeddings: modules that are embeddings, beside those whose name says so.
        fan_in_fan_out: linear weights are (in, out), as in GPT-2.
        drop_rest: leave out what else changed (norms, biases) instead of carrying it whole.
        overwrite: replace an earlier result.
    """
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
    write_folder(extracted.adapter, output)
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
    weights: Sequence[float] = (),
    method: str | None = None,
    rank: float | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    strict_base: bool = True,
) -> dict[str, Any]:
    """Combine several adapters of one base into one, or shrink one with --rank.

    Args:
        adapters: of one base, in any form.
        output: PEFT folder to write.
        weights: a number for each, of any sign; 1 for one adapter.
        method: linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune; by default svd with a rank, else
            linear.
        rank: of the result, for methods that cut, or for svd a share such as 0.95: each layer's lowest rank that keeps
            this share of its squared singular values; without it the adapters' largest.
        density: share of values that ties, dare and prune keep; without it 0.5.
        seed: of what dare draws.
        overwrite: replace an earlier result.
        strict_base: false makes adapters of different bases a warning.
    """
    check_output("combine", "folder", output, adapters, overwrite)
    rank = int(rank) if rank is not None and rank.is_integer() else rank  # the parser makes a float of each
    combined = combine_adapters(
        adapters, weights or None, method=method, rank=rank, density=density, seed=seed, strict_base=strict_base
    )
    write_folder(combined.adapter, output)
    ranks = {name: layer.r for name, layer in combined.adapter.layers.items()}
    return {
        "output": output,
        "layers": {name: {"rank": ranks[name], "kept": share} for name, share in combined.kept.items()},
        "weighted_means": list(combined.averaged) if len(adapters) > 1 else [],
    }


def plot(path: str, *, output: str, overwrite: bool = False) -> dict[str, Any]:
    """Draw the root mean square of an adapter's updates by depth, and their singular values.

    Args:
        path: adapter in any form.
        output: picture to write: .png, .pdf or .svg.
        overwrite: replace an earlier result.
    """
    check_output("plot", "file", output, [path], overwrite)
    return {"output": output, "figures": list(plot_adapter(path, output=output))}


VERBS: dict[str, Callable[..., Mapping[str, Any]]] = {
    each.__name__: each for each in (info, merge, export, diff, extract, combine, plot)
}
