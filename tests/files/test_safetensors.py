"""Files of safetensors: read as the library reads them, wherever bytes begin, and refused where it refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_lora import LoRAError
from lightning_lora.files.safetensors import build_header, open_safetensors, read_safetensors
from support.models.networks import bits, same
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 1], 8, 12)}


BAD_FILES = {
    "empty": b"",
    "a header longer than the file": safetensors_bytes({}, length=10**6),
    "a huge header": safetensors_bytes({}, length=2**63),
    "deep nesting": safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "truncated": safetensors_bytes(GOOD, bytes(11)),
    "overlap": safetensors_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "gap": safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "wrong size": safetensors_bytes({"a": entry([3], 0, 8)}, bytes(8)),
    "negative shape": safetensors_bytes({"a": entry([-2], 0, 8)}, bytes(8)),
    "overflowing shape": safetensors_bytes({"a": entry([2**63 - 1, 2], 0, 8)}, bytes(8)),
    "backward offsets": safetensors_bytes({"a": entry([2], 8, 0)}, bytes(8)),
    "fractional shape": safetensors_bytes({"a": entry([1.5], 0, 6)}, bytes(6)),
    "metadata that is not text": safetensors_bytes({"__metadata__": {"x": 1}, **GOOD}, bytes(12)),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_safetensors_file_is_refused_where_safetensors_refuses_it(tmp_path, case: str):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(LoRAError, match=r"a\.safetensors"):
        open_safetensors(path)
    with pytest.raises((SafetensorError, RuntimeError)):
        safe_open(path, "pt")


def test_a_good_file_is_read_as_it_was_written(tmp_path):
    dtypes = (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    tensors = {f"t{i}": torch.zeros(i, 3).to(dtype) for i, dtype in enumerate(dtypes)} | {"scalar": torch.tensor(5)}
    save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    found, metadata = open_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"x": "y"}
    assert found.keys() == tensors.keys()
    assert all(same(tensor, tensors[name]) for name, tensor in found.items())


def test_tensors_are_read_wherever_their_bytes_begin(tmp_path: Path):
    values = {
        "a": torch.tensor([3], dtype=torch.int8),
        "b": torch.randn(3),
        "c": torch.randn(2, 0),
        "d": torch.ones(()),
    }
    values |= {"e": torch.tensor([True, False, True]), "f": torch.randn(2, 3, dtype=torch.float64).to(torch.bfloat16)}
    header = build_header([(name, value.dtype, tuple(value.shape)) for name, value in values.items()], {})
    (tmp_path / "odd.safetensors").write_bytes(header + b"".join(map(bits, values.values())))
    found, _ = read_safetensors(tmp_path / "odd.safetensors")
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        name: (value.dtype, value.tolist()) for name, value in values.items()
    }
