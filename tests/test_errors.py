"""Errors: what they say of another program's error."""

from __future__ import annotations

import pytest

from lightning_lora import LoRAError, read_adapter
from lightning_lora.errors import shown


def test_an_empty_file_is_refused_with_a_reason(tmp_path):
    """Python's EOFError has no text."""
    (tmp_path / "empty.pt").touch()
    with pytest.raises(LoRAError, match=r"empty\.pt: cannot be read as a checkpoint; it may be truncated: EOFError\.$"):
        read_adapter(tmp_path / "empty.pt")


def test_number_of_more_digits_than_python_writes_is_shown():
    assert shown(10**5000) in ("a number with more digits than Python writes", f"1{'0' * 5000}")  # by Python's version
    assert shown({"a": [object]}) == "{'a': [<class 'object'>]}"


def test_a_value_that_holds_itself_many_times_is_shown_short():
    value: object = 1
    for _ in range(60):
        value = [value, value]
    assert len(shown(value)) <= 200
