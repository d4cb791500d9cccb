"""Make the parser of a command out of typed functions."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from .printing import one_line


def parser_of(name: str, about: str, verbs: Mapping[str, Callable[..., Any]]) -> ArgumentParser:
    """Make the parser of a command.

    Args:
        name: of the command.
        about: what it does.
        verbs: functions by name. Their parameters are the arguments, and those that are keyword-only the options;
            their docstrings are the help. Each verb has the option --json too.
    """
    parser = _Parser(prog=name, description=about, allow_abbrev=False)
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for verb, function in verbs.items():
        about, texts = _described(function)
        of_verb = parsers.add_parser(verb, help=about, description=about, allow_abbrev=False)
        types = get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            _add_argument(of_verb, parameter, types[parameter.name], texts[parameter.name])
        of_verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


class _Parser(ArgumentParser):
    """A parser whose errors are one line, and name the help of the verb."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:  # type: ignore[override]
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def _described(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of the function, and of each argument."""
    about, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    arguments = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", rest.partition("\n\n")[0], re.MULTILINE)
    return " ".join(about.split()), {name: " ".join(text.split()).rstrip(".") for name, text in arguments}


def _add_argument(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    """Add a parameter of a function as an argument. One that is keyword-only is an option."""
    name, default = parameter.name, parameter.default
    kind = next(each for each in get_args(hint) or (hint,) if each is not NoneType)
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind is bool and default is False:
        options["action"] = "store_true"
    elif kind is bool:
        options |= {"type": _truth, "metavar": "{true,false}"}
    elif get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    else:
        options["type"] = kind
    if get_origin(hint) is Sequence:
        options["nargs"] = "+"
    if parameter.kind is not parameter.KEYWORD_ONLY:
        parser.add_argument(name, metavar=name.upper(), **options)
        return
    if default is parameter.empty:
        options["required"] = True
    else:
        options["default"] = default
        options["help"] += "" if default in (None, ()) or default is False else f" (default: {str(default).lower()})"
    parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ArgumentTypeError(f"expected true or false, found {text!r}")
    return text == "true"
