"""Refuse unknown keywords of public functions with an error that names near misses.

Python's own TypeError names none. Signatures stay as they are: editors, type checkers and command lines read them.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from .errors import LoRAError, UnknownOptionError

SYNONYMS = {  # names of options in other libraries; spelling alone does not lead from these to ours
    **dict.fromkeys(["rank", "lora_r", "lora_rank", "lora_dim", "dim"], "r"),
    **dict.fromkeys(["scaling", "scale"], "lora_alpha"),
    **dict.fromkeys(["targets", "layers"], "target_modules"),
    **dict.fromkeys(["lr", "learning_rate"], "lr_ratio"),
    "init": "init_lora_weights",
}

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def names_near_misses(subject: str, elsewhere: Mapping[str, str] | None = None) -> Callable[[Decorated], Decorated]:
    """Decorate a function or a class so that an unknown keyword raises LoRAError with near misses.

    Args:
        subject: what the error begins with.
        elsewhere: advice for keywords that mean something in another place, by keyword.
    """

    def decorate(decorated: Decorated) -> Decorated:
        function: Any = vars(decorated)["__init__"] if isinstance(decorated, type) else decorated
        parameters = inspect.signature(function).parameters.values()
        keywords = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
        options = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        options = options or [name for name in keywords if name != "self"]
        by_position = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if by_position == ["self"]:
                _refuse_by_position(args[1:])
            refuse_unknown(subject, [name for name in kwargs if name not in keywords], options, elsewhere)
            return function(*args, **kwargs)

        if not isinstance(decorated, type):
            return checked  # type: ignore[return-value]
        setattr(decorated, "__init__", checked)  # noqa: B010
        return decorated

    return decorate


def refuse_unknown(
    subject: str, given: Iterable[str], options: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raise LoRAError, which is a TypeError too, where one of the given names is not an option."""
    unknown = [name for name in given if name not in options]
    if unknown:
        hints = [f"{name!r} ({_hint(name, options, elsewhere or {})})" for name in unknown]
        raise UnknownOptionError(f"{subject}: there is no option {', '.join(hints)}.")


def require_module(model: object, verb: str) -> None:
    """Raise LoRAError, which begins with the verb, where `model` is not a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise LoRAError(f"{verb}: expected a model (torch.nn.Module), found {found}.")


def _refuse_by_position(given: Sequence[Any]) -> None:
    if given:
        hint = "; LoRAConfig.from_peft takes a config of peft" if hasattr(given[0], "peft_type") else ""
        raise UnknownOptionError(f"LoRAConfig: expected options by their names, found {type(given[0]).__name__}{hint}.")


def _hint(name: str, options: Collection[str], elsewhere: Mapping[str, str]) -> str:
    every = [*options, *elsewhere]
    close = [SYNONYMS.get(name, name)]
    if close[0] not in every:
        close = difflib.get_close_matches(name, every, n=3, cutoff=0.6)
    if close and close[0] in elsewhere:
        return elsewhere[close[0]]
    close = [each for each in close if each in options]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(options)}"
