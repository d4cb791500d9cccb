"""A model's weights on disk, in any form that the command takes: names of tensors and where each lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import LoRAError
from ..names import parent_names
from .model_folder import ModelFolder, open_folder
from .paths import PathLike, given_path, kind_of
from .records import compare_check_sums
from .safetensors import SUFFIX, Header, TensorLocation, read_header
from .torch_archive import torch_locations

# Entries that show a quantised weight: bitsandbytes' layers save them beside it, transformers in place of torchao's.
QUANTISED = re.compile(r"(?P<module>.*)\.(SCB|weight\.absmax|_weight_qdata)")

Form = Literal["folder", "safetensors", "torch"]


@dataclass(frozen=True)
class Weights:
    """A model's weights on disk.

    Attributes:
        path: of the file or folder.
        form: how they are stored.
        locations: where each tensor lies, by name.
        headers: of safetensors files, by file name; files of torch.save have none.
        folder: the model folder, if it is one.
    """

    path: Path
    form: Form
    locations: Mapping[str, TensorLocation]
    headers: Mapping[str, Header]
    folder: ModelFolder | None = None

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(location.nbytes for location in self.locations.values())

    def modules(self) -> set[str]:
        """List every module on the way to a tensor."""
        return {module for name in self.locations for module in parent_names(name)}

    def holds_factors(self) -> bool:
        """Return whether a tensor has the name of an adapter's, ours or PEFT's."""
        return any(part.startswith("lora_") for name in self.locations for part in name.split("."))

    def quantised(self) -> dict[str, str]:
        """Find the modules whose weight is quantised by bitsandbytes or torchao.

        Returns:
            By module, the name of the entry that shows it.
        """
        found = {name: QUANTISED.fullmatch(name) for name in self.locations}
        return {match["module"]: name for name, match in found.items() if match}

    def other_owners(self) -> dict[str, str]:
        """Find the tensors whose values something else uses too.

        Returns:
            By tensor, the other user: a tensor's name, or a text for messages.
        """
        if self.form == "torch":
            return self._overlapping()
        if self.folder is None or not self.folder.tied_embeddings():
            return {}
        tied = "tied to the other end of the model (tie_word_embeddings in config.json)"
        rows = self.folder.vocabulary()
        tables = [name for name, location in self.locations.items() if location.shape[:1] == (rows,)]
        return dict.fromkeys((name for name in tables if not self._is_layer_or_norm(name)), tied)

    def _is_layer_or_norm(self, name: str) -> bool:
        """Return whether a tensor belongs to a numbered layer or to a norm, and so is no embedding and no head."""
        weight = self.locations.get(f"{name.rpartition('.')[0]}.weight")
        in_layer = any(module.isdigit() for module in name.split(".")[:-2])
        return in_layer or (weight is not None and len(weight.shape) == 1)

    def compare_check_sums(self) -> None:
        """Raise LoRAError where bytes do not match the file's check sums, if it has any. Reads the whole file."""
        if self.form == "torch":
            compare_check_sums(self.path)

    def _overlapping(self) -> dict[str, str]:
        owners: dict[str, str] = {}
        reaching, end = "", 0  # the tensor so far whose bytes reach furthest, and where these end
        for name, location in sorted(self.locations.items(), key=lambda item: item[1].start):
            if location.start < end and location.nbytes:
                owners.setdefault(name, repr(reaching))
                owners.setdefault(reaching, repr(name))
            if location.start + location.nbytes > end:
                reaching, end = name, location.start + location.nbytes
        return owners


def open_weights(path: PathLike) -> Weights:
    """Open a model's weights without reading the tensors.

    Args:
        path: a folder with safetensors, a safetensors file, a Lightning checkpoint, or a state dict that torch.save
            wrote.

    Raises:
        LoRAError: the path leads to none of these, or the file is damaged.
    """
    path = given_path(path)
    kind = kind_of(path)
    if kind == "folder":
        folder = open_folder(path)
        locations = {name: where for header in folder.shards.values() for name, where in header.locations.items()}
        return Weights(path, "folder", locations, folder.shards, folder)
    if kind != "file":
        raise LoRAError(f"{path}: there is no such file or folder.")
    if path.suffix == SUFFIX:
        header = read_header(path)
        return Weights(path, "safetensors", header.locations, {path.name: header})
    return Weights(path, "torch", torch_locations(path), {})
