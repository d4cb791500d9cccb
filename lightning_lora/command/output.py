"""Checks of all verbs that write: where they may write, and which weights cannot be read as values."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from ..errors import LoRAError
from ..files.atomic import check_output_path
from ..files.paths import PathLike
from ..files.weights import Weights

IN_PYTHON = (  # what merges into quantized weights
    "Load the quantized model in Python, then load_adapter(model, adapter) and save_merged(model, path, "
    'dequantize="bfloat16")'
)


def refuse_quantized(verb: str, weights: Weights, modules: Collection[str] | None = None) -> None:
    """Refuse quantized weights: their bytes are no values.

    Args:
        verb: what the message begins with.
        weights: on disk.
        modules: the modules whose weights are needed, or None for all.

    Raises:
        LoRAError: a needed weight is quantized. The message names it and a way that works.
    """
    for module, name in weights.quantized().items():
        if modules is None or module in modules:
            raise LoRAError(
                f"{verb}: {weights.path}: the weight of {module!r} is quantized, as {name!r} shows, and files are "
                f"compared and merged by value. {IN_PYTHON}; or give the base that it was quantized from, with "
                "--strict-base=false where the adapter was trained on the quantized one."
            )


def check_output(
    verb: str, kind: Literal["file", "folder"], output: PathLike, inputs: Sequence[PathLike], overwrite: bool
) -> None:
    """Refuse an output that must not or cannot be replaced, before any work is done.

    Raises:
        LoRAError: the output overlaps an input, exists and may not be replaced, or cannot be written.
    """
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if target.is_relative_to(source) or source.is_relative_to(target):
            relation = "is inside" if target.is_relative_to(source) else "holds"
            found = "is an input" if target == source else f"{relation} the input {path}"
            raise LoRAError(f"{verb}: {output} {found}; write somewhere else.")
    check_output_path(output, folder=kind == "folder")
    if not overwrite and (any(target.iterdir()) if target.is_dir() else target.exists()):
        raise LoRAError(f"{verb}: {output} exists; choose another output, or pass --overwrite to replace it.")
