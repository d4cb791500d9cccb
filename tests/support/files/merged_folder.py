"""A folder of merged weights, read as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers reads it: one file, or an index that says which file holds a name."""
    if (folder / FILE).exists():
        assert [path.name for path in folder.glob("model*")] == [FILE]
        return load_file(folder / FILE)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    assert {path.name for path in folder.glob("model*")} == {INDEX, *places.values()}
    return {name: load_file(folder / file)[name] for name, file in places.items()}
