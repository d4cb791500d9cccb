"""Model folders as transformers writes them: safetensors shards, their index, and the files beside them.

Names in an index are names of files in the folder and nothing else.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoRAError
from .paths import PathLike, read_json
from .safetensors import Header, read_header

INDEX_SUFFIX = ".safetensors.index.json"

CONFIG = "config.json"

# Weights in other files or formats would stay unmerged beside the merged ones.
OTHER_WEIGHTS = (
    *("*.safetensors", f"*{INDEX_SUFFIX}", "pytorch_model*.bin*", "*.pth", "*.gguf"),
    *("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "*.onnx_data"),
)

NOT_COPIED = (".git", ".cache", "__pycache__")

HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


@dataclass(frozen=True)
class ModelFolder:
    """A folder's shards by file name, in order; its index, if it has one; and its config.json."""

    path: Path
    shards: dict[str, Header]
    index_name: str | None
    index: Mapping[str, Any]
    config: Mapping[str, Any]

    def tied_embeddings(self) -> bool:
        """Whether the output head is the input embedding: so it is in transformers unless the config says otherwise."""
        inner = self.config.get("text_config")
        for config in (self.config, inner):
            if isinstance(config, Mapping) and isinstance(config.get("tie_word_embeddings"), bool):
                return bool(config["tie_word_embeddings"])
        kinds = self.config.get("architectures")
        return any(str(kind).endswith(HEADS) for kind in kinds) if isinstance(kinds, list) else False

    def vocabulary(self) -> int | None:
        """Number of rows of the input embedding, as far as the config says."""
        inner = self.config.get("text_config")
        for config in (self.config, inner):
            if isinstance(config, Mapping) and isinstance(config.get("vocab_size"), int):
                return int(config["vocab_size"])
        return None


def open_folder(path: Path) -> ModelFolder:
    """Read index and headers, and check them against each other.

    Raises:
        LoRAError: there are no safetensors, several models, or an index that its shards contradict.
    """
    names = sorted(entry.name for entry in path.iterdir())
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(".safetensors")]
    if len(indexes) > 1 or (not indexes and len(files) != 1):
        found = ", ".join(indexes or files) or "none"
        raise LoRAError(
            f"{path}: expected one *{INDEX_SUFFIX} or one *.safetensors file, found {found}. Other formats can be "
            "saved as safetensors with transformers' save_pretrained."
        )
    index = read_json(path / indexes[0]) if indexes else {}
    places = _weight_map(path / indexes[0], index) if indexes else {}
    shards = {name: read_header(path / name) for name in (dict.fromkeys(places.values()) if indexes else files)}
    if indexes:
        _compare(path / indexes[0], places, shards)
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    return ModelFolder(path, shards, indexes[0] if indexes else None, index, config)


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise LoRAError(f"{path}: expected a weight_map of names and files, found {type(places).__name__}.")
    for name, file in places.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise LoRAError(f"{path}: {name!r} must be in a safetensors file of this folder, but it names {file!r}.")
        if not (path.parent / file).is_file():
            raise LoRAError(f"{path}: {file!r}, which holds {name!r}, is not there.")
    return places


def is_plain_name(name: Any) -> bool:
    """Whether a text can only mean a file in the folder at hand."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _compare(path: Path, places: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    for file, header in shards.items():
        for name in header.entries:
            if places.get(name) != file:
                raise LoRAError(f"{path}: {name!r} is in {file!r}, but the index says {places.get(name)!r}.")
    for name, file in places.items():
        if name not in shards[file].entries:
            raise LoRAError(f"{path}: {name!r} should be in {file!r} and is not there.")


def side_files(folder: ModelFolder) -> tuple[list[Path], list[Path]]:
    """Relative paths of what is beside the weights: to copy, and to leave out because it is weights too.

    Raises:
        LoRAError: a link leads out of the folder.
    """
    copied, left_out = [], []
    for path in _walk(folder.path):
        relative = path.relative_to(folder.path)
        ours = relative.parent == Path() and (relative.name in folder.shards or relative.name == folder.index_name)
        if ours:
            continue
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS):
            left_out.append(relative)
            continue
        if path.is_symlink() and not _stays(path, folder.path):
            raise LoRAError(
                f"{path}: is a link to {os.path.realpath(path)}, outside the model; replace it by a copy or remove it."
            )
        if path.is_file():
            copied.append(relative)
    return copied, left_out


def _walk(path: PathLike) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in NOT_COPIED)
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted([*files, *links]))


def _stays(link: Path, folder: Path) -> bool:
    """Inside the folder, or in the store beside it that Hugging Face's cache keeps."""
    target, root = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    return target.is_relative_to(root) or target.is_relative_to(root.parent.parent / "blobs")
