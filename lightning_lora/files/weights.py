"""A model's weights on disk, in any of the forms that the command line takes, as names and locations."""

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

# What bitsandbytes' layers, and transformers for torchao's tensors, save beside or in place of a weight.
QUANTISED = re.compile(r"(?P<module>.*)\.(SCB|weight\.absmax|_weight_qdata)")

Form = Literal["folder", "safetensors", "torch"]


@dataclass(frozen=True)
class Weights:
    """A model's tensors by name; `headers` by file name, none for torch.save's files; `folder` only for a folder."""

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
        """Say whether a tensor's name is one of an adapter, ours or PEFT's."""
        return any(part.startswith("lora_") for name in self.locations for part in name.split("."))

    def quantised(self) -> dict[str, str]:
        """Find the modules whose weight is quantised, by bitsandbytes or torchao; returns each with what shows it."""
        found = {name: QUANTISED.fullmatch(name) for name in self.locations}
        return {match["module"]: name for name, match in found.items() if match}

    def other_owners(self) -> dict[str, str]:
        """Find the tensors whose values something else uses too; returns each with that."""
        if self.form == "torch":
            return self._overlapping()
        if self.folder is None or not self.folder.tied_embeddings():
            return {}
        tied = "tied to the other end of the model (tie_word_embeddings in config.json)"
        rows = self.folder.vocabulary()
        tables = [name for name, location in self.locations.items() if location.shape[:1] == (rows,)]
        return dict.fromkeys((name for name in tables if not self._is_layer_or_norm(name)), tied)

    def _is_layer_or_norm(self, name: str) -> bool:
        """Say whether a tensor is of a numbered layer or a norm, which are no ends, however wide the model is."""
        weight = self.locations.get(f"{name.rpartition('.')[0]}.weight")
        in_layer = any(module.isdigit() for module in name.split(".")[:-2])
        return in_layer or (weight is not None and len(weight.shape) == 1)

    def compare_check_sums(self) -> None:
        """Raise LoRAError where the file has check sums, and is not what was written. All of it is read."""
        if self.form == "torch":
            compare_check_sums(self.path)

    def _overlapping(self) -> dict[str, str]:
        owners: dict[str, str] = {}
        reaching, end = "", 0  # of the tensors so far, the one whose bytes reach furthest
        for name, location in sorted(self.locations.items(), key=lambda item: item[1].start):
            if location.start < end and location.nbytes:
                owners.setdefault(name, repr(reaching))
                owners.setdefault(reaching, repr(name))
            if location.start + location.nbytes > end:
                reaching, end = name, location.start + location.nbytes
        return owners


def open_weights(path: PathLike) -> Weights:
    """Open a model's weights; of the tensors nothing is read.

    Args:
        path: a folder with safetensors, a safetensors file, a Lightning checkpoint, or a state dict that torch.save
            wrote.

    Raises:
        LoRAError: it is none of these, or damaged.
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
