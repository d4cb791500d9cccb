"""The `lightning-lora` command: adapters and merged weights on disk, without building a model."""

from __future__ import annotations

import errno
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch

from ..adapter.adapter import Adapter
from ..adapter.combined_layer import Method
from ..errors import LoRAError
from ..exchange.combine import combine_adapters
from ..files.atomic import identity
from ..files.paths import reason_of
from ..files.weights import open_weights
from ..formats.peft_folder import write_folder
from ..report.figures import plot_adapter
from .convert import to_lightning, to_peft
from .extract import extract
from .info import diff, info
from .merge import merge_on_disk
from .output import ADAPTER_FOLDER, PICTURE, check_output
from .printing import (
    INTERRUPTED,
    combine_text,
    diff_text,
    extract_text,
    info_text,
    one_line,
    print_failure,
    print_lines,
    result_lines,
)

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = "can't allocate memory"  # in torch's RuntimeError


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb of the command. Return the exit status."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        print('lightning-lora: needs jsonargparse; pip install "lightning-lora[cli]".', file=sys.stderr)
        return 1
    parsed = _parser(_naming_options(ArgumentParser)).parse_args(args)
    with _as_a_program():
        return _run(parsed.verb, parsed[parsed.verb])


def _run(verb: str, options: Any) -> int:
    """Run a verb and print its result, or in one line what went wrong. Defects of this package are not caught."""
    output = options.get("output", "")
    before = identity(output)
    try:
        return print_lines(verb, VERBS[verb][1](options))
    except LoRAError as error:
        return print_failure(verb, str(error))
    except KeyboardInterrupt:
        return print_failure(verb, f"interrupted; {_outcome(output, before)}", INTERRUPTED)
    except OSError as error:
        place = output if error.errno in DISK_FULL else error.filename
        return print_failure(verb, f"{place or output}: {reason_of(error)}; {_outcome(output, before)}.")
    except UnicodeError as error:
        return print_failure(verb, f"a name that no file can hold: {error}; {_outcome(output, before)}.")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and NO_MEMORY not in str(error):
            raise
        return print_failure(verb, f"there is not enough memory; {_outcome(output, before)}.")


def _outcome(output: str, before: object) -> str:
    return "nothing was written" if identity(output) == before else f"{output} was written"


@contextmanager
def _as_a_program() -> Iterator[None]:
    """Show each warning in one line. Turn SIGTERM into an exception, so that unfinished files are removed."""
    format_before, handler_before = warnings.formatwarning, signal.getsignal(signal.SIGTERM)
    warnings.formatwarning = lambda message, *_, **__: f"{one_line(str(message))}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        signal.signal(signal.SIGTERM, handler_before)


def _naming_options(base: Any) -> Any:
    """Return a class of parsers that name missing options as a user types them, and tell the help of the verb."""

    class Parser(base):  # type: ignore[misc]
        of_verbs: ClassVar[dict[str, Any]] = {}

        def error(self, message: str, ex: Exception | None = None) -> None:
            beginning, required, missing = message.partition(" are required: ")
            verb = missing.partition(".")[0]
            if required and verb in self.of_verbs:
                typed = {each.dest: (each.option_strings or [each.dest])[-1] for each in self.of_verbs[verb]._actions}
                names = [name.removeprefix(f"{verb}.") for name in missing.split(", ")]
                message = f"{beginning}{required}{', '.join(typed.get(name, name) for name in names)}"
                if ex is not None:
                    setattr(ex, "subcommand_parser", self.of_verbs[verb])  # noqa: B010
            super().error(message, ex)

    return Parser


def _parser(make: Any) -> Any:
    parser = make(prog="lightning-lora", description=__doc__)
    verbs = parser.add_subcommands(dest="verb")
    for verb, (fill, run) in VERBS.items():
        parser_of_verb = make.of_verbs[verb] = make(description=run.__doc__)
        fill(parser_of_verb)
        verbs.add_subcommand(verb, parser_of_verb, help=run.__doc__)
    return parser


def _info_options(parser: Any) -> None:
    parser.add_argument("path", type=str, help="checkpoint, PEFT folder, safetensors, state dict or model folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(options: Any) -> list[str]:
    """Show what a file or folder holds: options, layers, ranks, norms, the base that it belongs to."""
    return result_lines(info(options.path), info_text, options.json)


def _merge_options(parser: Any) -> None:
    parser.add_argument("--base", type=str, required=True, help="model folder, safetensors, checkpoint or state dict")
    parser.add_argument("--adapter", type=str, required=True, help="PEFT folder, Lightning checkpoint or state dict")
    parser.add_argument(
        "--output",
        type=str,
        required=True,
        help="of the base's form (.safetensors, torch.save, a folder); appears whole at the end",
    )
    parser.add_argument("--dtype", type=Dtype | None, help="of the result; without it that of the base")
    _overwrite_option(parser)
    parser.add_argument("--strict-base", type=bool, default=True, help="false: another base is only a warning")
    _alpha_option(parser)


def _merge(options: Any) -> list[str]:
    """Merge an adapter into a base on disk; memory does not grow with the model."""
    left_out = merge_on_disk(
        options.base,
        options.adapter,
        options.output,
        lora_alpha=options.lora_alpha,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        strict_base=options.strict_base,
        overwrite=options.overwrite,
    )
    lines = [f"left out, because it holds weights that are not merged: {path}" for path in left_out]
    return [*lines, f"wrote {options.output}"]


def _convert_options(output: str, parser: Any) -> None:
    parser.add_argument("source", type=str, help="Lightning checkpoint, PEFT folder, or any other form of adapter")
    parser.add_argument("output", type=str, help=f"{output} to write")
    _overwrite_option(parser)
    _alpha_option(parser)


def _export_options(parser: Any) -> None:
    _convert_options("PEFT folder", parser)
    parser.add_argument("--plain", action="store_true", help="the form that every server and converter takes")


def _export(options: Any) -> list[str]:
    """Write an adapter as a PEFT folder, as it is or in the plain form that every server takes."""
    return _convert(partial(to_peft, plain=options.plain), options, tell_rank=options.plain)


def _import(options: Any) -> list[str]:
    """Write an adapter as a Lightning checkpoint."""
    return _convert(to_lightning, options)


def _convert(convert: Callable[..., Adapter], options: Any, *, tell_rank: bool = False) -> list[str]:
    adapter = convert(options.source, options.output, options.lora_alpha, overwrite=options.overwrite)
    rank = f" of rank {max(layer.r for layer in adapter.layers.values())}" if tell_rank else ""
    return [f"wrote {options.output}: {len(adapter.layers)} adapted layers{rank}"]


def _diff_options(parser: Any) -> None:
    parser.add_argument("first", type=str, help="adapter or weights, in any form")
    parser.add_argument("second", type=str, help="another of the same kind")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _diff(options: Any) -> list[str]:
    """Show what differs between two adapters or two models, layer by layer, also relative to the norm in the first."""
    return result_lines(diff(options.first, options.second), diff_text, options.json)


def _extract_options(parser: Any) -> None:
    parser.add_argument("--base", type=str, required=True, help="weights before the fine-tune")
    parser.add_argument("--tuned", type=str, required=True, help="weights after it, under the same names")
    parser.add_argument("--rank", type=int, required=True, help="of the adapter")
    parser.add_argument("--output", type=str, required=True, help="PEFT folder to write")
    parser.add_argument("--exclude", nargs="*", type=str, default=[], help="modules to carry whole: names or suffixes")
    parser.add_argument("--embeddings", nargs="*", type=str, default=[], help="modules that are embeddings too")
    parser.add_argument("--fan-in-fan-out", action="store_true", help="linear weights are (in, out), as in GPT-2")
    parser.add_argument("--drop-rest", action="store_true", help="leave out what else changed (norms, biases)")
    _overwrite_option(parser)


def _extract(options: Any) -> list[str]:
    """Make an adapter out of a full fine-tune by truncated singular value decomposition."""
    check_output("extract", ADAPTER_FOLDER, options.output, [options.base, options.tuned], options.overwrite)
    extracted = extract(
        open_weights(options.base),
        open_weights(options.tuned),
        options.rank,
        exclude=options.exclude,
        embeddings=options.embeddings,
        fan_in_fan_out=options.fan_in_fan_out,
        drop_rest=options.drop_rest,
    )
    write_folder(extracted.adapter, options.output)
    return extract_text(extracted, options.output)


def _plot_options(parser: Any) -> None:
    parser.add_argument("path", type=str, help="adapter in any form")
    parser.add_argument("--output", type=str, required=True, help="picture to write: .png, .pdf or .svg")
    _overwrite_option(parser)


def _plot(options: Any) -> list[str]:
    """Draw the norm of an adapter's updates by depth, and their singular values."""
    check_output("plot", PICTURE, options.output, [options.path], options.overwrite)
    pictures = plot_adapter(options.path, output=options.output)
    return [f"wrote {options.output}: {', '.join(pictures)}"]


def _combine_options(parser: Any) -> None:
    parser.add_argument("adapters", nargs="+", type=str, help="adapters of one base, in any form")
    parser.add_argument("--weights", nargs="+", type=float, required=True, help="a number for each, of any sign")
    parser.add_argument("--method", type=str, default="linear", help=f"one of {', '.join(get_args(Method))}")
    parser.add_argument("--output", type=str, required=True, help="PEFT folder to write")
    parser.add_argument("--rank", type=int | None, help="of the result, for methods that cut; else the largest")
    parser.add_argument(
        "--density", type=float | None, help="the share of values that ties, dare and prune keep; else 0.5"
    )
    parser.add_argument("--seed", type=int, default=0, help="what dare draws from")
    _overwrite_option(parser)
    parser.add_argument("--strict-base", type=bool, default=True, help="false: another base is only a warning")


def _combine(options: Any) -> list[str]:
    """Combine several adapters of one base into one."""
    check_output("combine", ADAPTER_FOLDER, options.output, options.adapters, options.overwrite)
    combined = combine_adapters(
        options.adapters,
        options.weights,
        method=options.method,
        rank=options.rank,
        density=options.density,
        seed=options.seed,
        strict_base=options.strict_base,
    )
    write_folder(combined.adapter, options.output)
    return combine_text(combined, options.output)


def _overwrite_option(parser: Any) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")


def _alpha_option(parser: Any) -> None:
    parser.add_argument("--lora-alpha", type=float | None, help="for adapters that do not store it, as loralib's")


VERBS: dict[str, tuple[Callable[[Any], None], Callable[[Any], list[str]]]] = {
    "info": (_info_options, _info),
    "merge": (_merge_options, _merge),
    "export": (_export_options, _export),
    "import": (partial(_convert_options, "Lightning checkpoint, NAME.ckpt,"), _import),
    "diff": (_diff_options, _diff),
    "extract": (_extract_options, _extract),
    "plot": (_plot_options, _plot),
    "combine": (_combine_options, _combine),
}
