"""The options in a file: those that could take long to apply are refused, and none such is written.

A user's own code may have any pattern. readable_options makes sure that the saved options can be read again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..config import LoRAConfig
from ..errors import LoRAError
from ..files.limits import PATTERN_STEPS, PATTERNS, check, check_names
from ..files.pattern_cost import count_steps
from ..matching import matcher
from .adapter import Adapter
from .layer_options import exact_options

TOGETHER = 1000  # names in one pattern
EXPRESSIONS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")  # where they are one text
BY_LAYER = ("rank_pattern", "alpha_pattern")


def readable_options(adapter: Adapter) -> LoRAConfig | None:
    """Return an adapter's options for a file: patterns that its reader would refuse give way to the layers' names."""
    config, scalings = adapter.config, adapter.scalings
    if config is None or _can_be_read(config, scalings):
        return config
    ranks = adapter.ranks() or {name: config.rank(name) for name in scalings}  # a live model's come without tensors
    is_parameter = matcher(config.target_parameters)
    exact = exact_options(config, ranks, scalings, list(filter(is_parameter, ranks)))
    own = {name: getattr(config, name) for name in ("r", "lora_alpha", *BY_LAYER)}
    grouped: dict[str, Any] = {name: _grouped(getattr(exact, name) or {}) for name in BY_LAYER}
    choices = (replace(exact, **own), exact, replace(exact, **grouped))
    return next((choice for choice in choices if _can_be_read(choice, scalings)), exact)


def _can_be_read(config: LoRAConfig, names: Collection[str]) -> bool:
    try:
        check_options(config.to_dict(), names, "options")
    except LoRAError:
        return False
    return True


def _grouped(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Join patterns that have the same value, up to a thousand in one pattern. Each of them begins with ^."""
    by_value: dict[Any, list[str]] = {}
    for pattern, value in patterns.items():
        by_value.setdefault(value, []).append(pattern.removeprefix("^"))
    return {
        f"^(?:{'|'.join(names[start : start + TOGETHER])})": value
        for value, names in by_value.items()
        for start in range(0, len(names), TOGETHER)
    }


def check_options(options: Any, names: Collection[str], path: object) -> None:
    """Raise LoRAError where options in a file could take long to apply.

    Args:
        options: the options, as the file has them.
        names: the layers in the file.
        path: the file, for messages.
    """
    if not isinstance(options, Mapping):
        return
    check_names(names, path)
    steps = 0
    for option in EXPRESSIONS:
        value = options.get(option)
        if isinstance(value, str):
            steps += count_steps(value, names, f"{path}: {option}")
        elif isinstance(value, (list, tuple, set, frozenset)):
            check_names(filter(_is_text, value), f"{path}: {option}")
    for option in BY_LAYER:
        value = options.get(option)
        if isinstance(value, Mapping):
            check(PATTERNS, len(value), f"{path}: {option}")
            steps += sum(
                count_steps(k, names, f"{path}: {option}", of_suffix=True) for k in value if isinstance(k, str)
            )
    value = options.get("layers_pattern")
    patterns = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
    check(PATTERNS, len(patterns), f"{path}: layers_pattern")
    steps += sum(count_steps(entry, names, f"{path}: layers_pattern") for entry in filter(_is_text, patterns))
    check(PATTERN_STEPS, steps, path)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
