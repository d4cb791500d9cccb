"""Model folders as transformers writes them: safetensors shards, their index, and the files beside them.

An index may name only files in its folder: a path that leads out of the folder is refused.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ..errors import LoRAError, sentence
from .paths import PathLike, kind_of, read_json, reason_of
from .safetensors import SUFFIX, TensorFile, open_safetensors

STEM = "model"  # how the names of shards and index begin, unless the folder has another stem
INDEX_SUFFIX = f"{SUFFIX}.index.json"
CONFIG = "config.json"
# Weights in other files or formats would stay unmerged beside the merged ones.
OTHER_WEIGHTS = (
    *(f"*{SUFFIX}", f"*{INDEX_SUFFIX}", "pytorch_model*.bin*", "*.pth", "*.gguf"),
    *("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "*.onnx_data"),
)
NOT_COPIED = (".git", ".cache", "__pycache__")
HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class ModelFolder:
    """A model folder: its shards by file name, in order; its index, if there is one; its config.json."""

    path: Path
    shards: dict[str, TensorFile]
    index_name: str | None
    index: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """How the names of the shards begin."""
        return (self.index_name or STEM).removesuffix(INDEX_SUFFIX)

    def tied_embeddings(self) -> bool:
        """Return whether the output head shares the weight of the input embedding.

        Where the config does not say, language models count as tied: that is transformers' default.
        """
        tied = self._option("tie_word_embeddings", bool)
        kinds = self.config.get("architectures")
        if tied is None and isinstance(kinds, list):
            return any(str(kind).endswith(HEADS) for kind in kinds)
        return bool(tied)

    def vocabulary(self) -> int | None:
        """Return the number of rows of the input embedding, or None where the config does not say it."""
        return self._option("vocab_size", int)

    def _option(self, name: str, kind: type[Value]) -> Value | None:
        """Return an option of the model, or of its text part."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, Mapping) and isinstance(config.get(name), kind):
                return cast(Value, config[name])
        return None


def open_folder(path: Path) -> ModelFolder:
    """Open a model folder: its shards, which are compared with the index, and its config.

    Raises:
        LoRAError: the folder holds no safetensors, holds several models, or its shards contradict its index.
    """
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise LoRAError(f"{path}: cannot be read: {sentence(reason_of(error))}") from error
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(indexes) > 1 or (not indexes and len(files) != 1):
        present = ", ".join(indexes or files) or "none"
        raise LoRAError(
            f"{path}: expected one *{INDEX_SUFFIX} or one *{SUFFIX} file, found {present}. Other formats can be "
            "saved as safetensors with transformers' save_pretrained."
        )
    index = read_json(path / indexes[0]) if indexes else {}
    file_of = _weight_map(path / indexes[0], index) if indexes else {}
    shards = {name: open_safetensors(path / name) for name in (dict.fromkeys(file_of.values()) if indexes else files)}
    if indexes:
        _compare(path / indexes[0], file_of, shards)
    config = read_json(path / CONFIG) if kind_of(path / CONFIG) != "nothing" else {}
    return ModelFolder(path, shards, indexes[0] if indexes else None, index, config)


def weight_files(stem: str = STEM) -> tuple[str, ...]:
    """Return patterns of the names that the files of a model's weights have."""
    return (f"{stem}{SUFFIX}", f"{stem}-*-of-*{SUFFIX}", f"{stem}{INDEX_SUFFIX}")


def side_files(folder: ModelFolder) -> tuple[list[Path], list[Path]]:
    """List the files beside the weights, as relative paths.

    Returns:
        Files to copy, and files to leave out: weights in other formats, which are not merged.
    """
    copied, left_out = [], []
    for path in _walk(folder.path):
        relative = path.relative_to(folder.path)
        if relative.parent == Path() and (relative.name in folder.shards or relative.name == folder.index_name):
            continue
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS):
            left_out.append(relative)
            continue
        if path.is_file():
            copied.append(relative)
    return copied, left_out


def plan_shards(
    items: Iterable[Item], size_of: Callable[[Item], int], most: int, stem: str = STEM
) -> dict[str, list[Item]]:
    """Distribute tensors over files in the given order, and name the files.

    Args:
        items: the tensors, or groups of tensors that are stored together.
        size_of: returns the size of one in bytes.
        most: bytes of all tensors in one file. A larger item gets a file of its own.
        stem: how the names of the files begin.

    Returns:
        The items by file.
    """
    groups: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        size = size_of(item)
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    if len(groups) == 1:
        return {f"{stem}{SUFFIX}": groups[0]}
    return {f"{stem}-{i:05}-of-{len(groups):05}{SUFFIX}": group for i, group in enumerate(groups, 1)}


def index_of(files: Mapping[str, Mapping[str, int]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Make the index of some shards.

    Args:
        files: by file, the bytes of each of its tensors.
        before: an earlier index. Its other entries are kept.
    """
    metadata = before.get("metadata")
    total = sum(sum(sizes.values()) for sizes in files.values())
    metadata = {**(metadata if isinstance(metadata, Mapping) else {}), "total_size": total}
    file_of = {name: file for file, sizes in files.items() for name in sizes}
    return {**before, "metadata": metadata, "weight_map": dict(sorted(file_of.items()))}


def is_plain_name(name: Any) -> bool:
    """Return whether a text is a file name and no path that could lead out of a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    file_of = index.get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise LoRAError(f"{path}: expected a weight_map of names and files, found {type(file_of).__name__}.")
    for name, file in file_of.items():
        if not is_plain_name(file) or not file.endswith(SUFFIX):
            raise LoRAError(f"{path}: {name!r} must be in a safetensors file of this folder, but it names {file!r}.")
        if not (path.parent / file).is_file():
            raise LoRAError(f"{path}: {file!r}, which holds {name!r}, is not there.")
    return file_of


def _compare(path: Path, file_of: Mapping[str, str], shards: Mapping[str, TensorFile]) -> None:
    for file, shard in shards.items():
        for name in shard.tensors:
            if file_of.get(name) != file:
                raise LoRAError(f"{path}: {name!r} is in {file!r}, but the index says {file_of.get(name)!r}.")
    for name, file in file_of.items():
        if name not in shards[file].tensors:
            raise LoRAError(f"{path}: {name!r} should be in {file!r} and is not there.")


def _walk(path: PathLike) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in NOT_COPIED)
        yield from (Path(folder, name) for name in sorted(files))
