"""The arguments of each verb of the command, and their help."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .printing import one_line


class _Parser(ArgumentParser):
    """A parser whose errors are one line, and name the help of the verb."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:  # type: ignore[override]
        # Refused by the verb's own parser: the main parser would name its own help, which lacks the verb's options.
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def make_parser(verbs: Mapping[str, Callable[..., Any]]) -> ArgumentParser:
    """Make the parser of the command.

    Args:
        verbs: functions by name, which take the arguments by their names. The first line of a docstring says in the
            help what the verb does.
    """
    about = "Adapters and merged weights on disk, without building a model."
    parser = _Parser(prog="lightning-lora", description=about, allow_abbrev=False)
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    of: dict[str, ArgumentParser] = {}
    for verb, function in verbs.items():
        about = (function.__doc__ or "").partition("\n")[0]
        of[verb] = parsers.add_parser(verb, help=about, description=about, allow_abbrev=False)
    replace = "replace an earlier result"
    for_alpha = "for adapters that do not store it, as loralib's"

    add = of["info"].add_argument
    add("path", metavar="PATH", help="checkpoint, PEFT folder, safetensors file, state dict or model folder")

    add = of["merge"].add_argument
    add("--base", required=True, help="model folder, safetensors file, checkpoint or state dict")
    add("--adapter", required=True, help="PEFT folder, Lightning checkpoint or any other form of adapter")
    add("--output", required=True, help="file or folder to write, in the base's form; it appears whole, at the end")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    add("--dtype", choices=dtypes, help="of the result; without it that of the base")
    add("--overwrite", action="store_true", help=replace)
    other_base = "false makes another base than the adapter's a warning, and leaves out a head that it lacks"
    add("--strict-base", type=_truth, default=True, metavar="{true,false}", help=f"{other_base} (default: true)")
    add("--lora-alpha", type=float, help=for_alpha)

    add = of["export"].add_argument
    add("source", metavar="SOURCE", help="Lightning checkpoint, PEFT folder or any other form of adapter")
    add("output", metavar="OUTPUT", help="folder to write")
    add("--plain", action="store_true", help="write the form that every server and converter takes")
    add("--overwrite", action="store_true", help=replace)
    add("--lora-alpha", type=float, help=for_alpha)

    add = of["diff"].add_argument
    add("first", metavar="FIRST", help="adapter or weights, in any form")
    add("second", metavar="SECOND", help="another of the same kind")

    add = of["extract"].add_argument
    add("--base", required=True, help="weights before the fine-tune")
    add("--tuned", required=True, help="weights after it, under the same names")
    add("--rank", type=int, required=True, help="of the adapter")
    add("--output", required=True, help="PEFT folder to write")
    add("--exclude", nargs="+", default=(), help="modules to carry whole, by names or suffixes")
    by_name = "modules that are embeddings, beside those whose name says so"
    add("--embeddings", nargs="+", default=(), help=by_name)
    add("--fan-in-fan-out", action="store_true", help="linear weights are (in, out), as in GPT-2")
    rest = "leave out what else changed (norms, biases) instead of carrying it whole"
    add("--drop-rest", action="store_true", help=rest)
    add("--overwrite", action="store_true", help=replace)

    add = of["combine"].add_argument
    add("adapters", nargs="+", metavar="ADAPTERS", help="of one base, in any form")
    add("--output", required=True, help="PEFT folder to write")
    add("--weights", type=float, nargs="+", default=(), help="a number for each, of any sign; 1 for one adapter")
    methods = "linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune"
    add("--method", help=f"{methods}; by default svd with a rank, else linear")
    share = "each layer's lowest rank that keeps this share of its squared singular values"
    ranks = f"of the result, for methods that cut, or for svd a share such as 0.95: {share}"
    add("--rank", type=float, help=f"{ranks}; without it the adapters' largest")
    add("--density", type=float, help="share of values that ties, dare and prune keep; without it 0.5")
    add("--seed", type=int, default=0, help="of what dare draws (default: 0)")
    add("--overwrite", action="store_true", help=replace)
    other_bases = "false makes adapters of different bases a warning (default: true)"
    add("--strict-base", type=_truth, default=True, metavar="{true,false}", help=other_bases)

    add = of["plot"].add_argument
    add("path", metavar="PATH", help="adapter in any form")
    add("--output", required=True, help="picture to write: .png, .pdf or .svg")
    add("--overwrite", action="store_true", help=replace)

    for each in of.values():
        each.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ArgumentTypeError(f"expected true or false, found {text!r}")
    return text == "true"
