"""Checks of all verbs that write: which outputs may be replaced, and which weights cannot be read as values."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import LoRAError
from ..files.atomic import check_output_path
from ..files.paths import PathLike, given_path, kind_of, real_path
from ..files.safetensors import SUFFIX
from ..files.torch_archive import read_torch_file
from ..files.weights import Weights
from ..formats.forms import CONFIG_FILE
from ..formats.peft_folder import TENSOR_FILE
from ..names import META

FILE_SUFFIXES = (SUFFIX, ".ckpt", ".pt")
IN_PYTHON = (  # what merges into quantised weights
    "Load the quantised model in Python, then load_adapter(model, adapter) and save_merged(model, path, "
    'dequantize="bfloat16")'
)


def refuse_quantised(verb: str, weights: Weights, modules: Collection[str] | None = None) -> None:
    """Refuse quantised weights: their bytes are no values.

    Args:
        verb: what the message begins with.
        weights: on disk.
        modules: the modules whose weights are needed, or None for all.

    Raises:
        LoRAError: a needed weight is quantised. The message names it and a way that works.
    """
    for module, name in weights.quantised().items():
        if modules is None or module in modules:
            raise LoRAError(
                f"{verb}: {weights.path}: the weight of {module!r} is quantised, as {name!r} shows, and files are "
                f"compared and merged by value. {IN_PYTHON}; or give the base that it was quantised from, with "
                "--strict-base=false where the adapter was trained on the quantised one."
            )


class OutputKind(NamedTuple):
    """A kind of output: a folder or a file, and the content by which an earlier result is recognised."""

    is_folder: bool
    content: str
    holds_content: Callable[[Path], bool]


def check_output(verb: str, kind: OutputKind, output: PathLike, inputs: Sequence[PathLike], overwrite: bool) -> None:
    """Refuse an output that must not or cannot be replaced, before any work is done.

    Raises:
        LoRAError: the output overlaps an input, cannot be written, has a wrong name, or exists and may not be replaced.
    """
    name, output, target = output, given_path(output), real_path(output)
    for path in map(real_path, map(given_path, inputs)):
        if target.is_relative_to(path) or path.is_relative_to(target):
            raise LoRAError(f"{verb}: {output} is, or is inside, or holds {path}; write somewhere else.")
    _refuse_name(verb, kind, name)
    check_output_path(output, folder=kind.is_folder)
    kind_there = kind_of(output)
    if kind_there == "nothing" or (kind_there == "folder" and not any(output.iterdir())):
        return
    if not overwrite:
        raise LoRAError(f"{verb}: {output} exists; choose another output, or pass --overwrite to replace it.")
    if not kind.holds_content(output):
        raise LoRAError(f"{verb}: {output} holds no {kind.content}, so it is no earlier result, and is not replaced.")


def _refuse_name(verb: str, kind: OutputKind, output: PathLike) -> None:
    """Raise LoRAError where the result would not be what its name says, or lie where nobody looks for it."""
    name = os.fspath(output)
    if name == "~" or name.startswith("~/"):
        raise LoRAError(
            f"{verb}: {output} begins with '~', which a shell replaces by your home folder at the beginning of a word "
            f"alone: write --output {name} with a space, or the whole path. A folder named '~' here is './~'."
        )
    if kind.is_folder and Path(output).suffix in FILE_SUFFIXES:
        raise LoRAError(f"{verb}: {output} is to be a folder, and its name is that of a file; give another name.")


def _holds_weights(folder: Path) -> bool:
    return any(file.name != TENSOR_FILE for file in folder.glob(f"*{SUFFIX}"))


def _holds_adapter(file: Path) -> bool:
    try:
        return META in read_torch_file(file, "meta")
    except LoRAError:
        return False


def _holds_picture(file: Path) -> bool:
    with open(file, "rb") as opened:
        head = opened.read(1000)
    return head.startswith((b"\x89PNG", b"%PDF")) or b"<svg" in head


MODEL_FOLDER = OutputKind(True, "safetensors of a model", _holds_weights)
MODEL_FILE = OutputKind(False, "model", Path.is_file)
ADAPTER_FOLDER = OutputKind(True, CONFIG_FILE, lambda folder: kind_of(folder / CONFIG_FILE) != "nothing")
PICTURE = OutputKind(False, "picture", _holds_picture)
ADAPTER_CHECKPOINT = OutputKind(False, "adapter", _holds_adapter)
