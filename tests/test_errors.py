"""Errors: what they say of another program's error."""

from __future__ import annotations

import pytest

from lightning_lora import LoRAError, read_adapter


def test_an_empty_file_is_refused_with_a_reason(tmp_path):
    """Python's EOFError has no text."""
    (tmp_path / "empty.pt").touch()
    with pytest.raises(LoRAError, match=r"empty\.pt: cannot be read as a checkpoint; it may be truncated: EOFError\.$"):
        read_adapter(tmp_path / "empty.pt")
