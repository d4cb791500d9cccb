"""Texts from files in messages: control characters are shown, and long names are cut."""

from __future__ import annotations

import pickle
import re
import time

import pytest

from lightning_lora import LoRAError, read_adapter
from lightning_lora.errors import MOST, NonFiniteError, UnknownOptionError, one_line, printable, shortened

KINDS = [LoRAError, NonFiniteError, UnknownOptionError]


@pytest.mark.parametrize("kind", KINDS)
def test_error_shows_control_characters_and_keeps_lines(kind: type[LoRAError]):
    said = str(kind("adapter: \x1b[31mred\x07 \ud800 \u202e\nsecond line: größe 'ü'."))
    assert said == "adapter: \\x1b[31mred\\x07 \\ud800 \\u202e\nsecond line: größe 'ü'."


NAMES = {  # of some length, as messages quote them
    "plain": lambda length: "n" * length,
    "dotted": lambda length: ("layers.0." * length)[:length],
    "with spaces": lambda length: ("a b " * length)[:length],
    "with slashes": lambda length: ("a/b/" * length)[:length],
    "with both quotes": lambda length: ("'\" " * length)[:length],
    "with backslashes": lambda length: ("\\" * length)[:length],
    "of control characters": lambda length: "\x1b" * length,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [10, 201, 10_000])
def test_error_quotes_a_part_of_a_long_name(kind: type[LoRAError], name: str, length: int):
    text = NAMES[name](length)
    said = str(kind(f"adapter: {text!r} is missing; there are 'a', {[text]!r}; the model's names differ."))
    whole = len(repr(text)) - 2 <= MOST
    assert said.endswith("; the model's names differ.")
    assert (repr(text) in said) == whole
    assert len(said) < 2 * (MOST + 30) + 80
    assert said.count(f"({len(repr(text)) - 2:,} characters)") == (0 if whole else 2)
    assert str(kind(said)) == said  # said again, around another error


@pytest.mark.parametrize("kind", KINDS)
def test_error_with_a_name_without_quotes_is_short_too(kind: type[LoRAError]):
    name = f"layers.{'n' * 1000}.weight"
    said = str(kind(f"layer {name}, {name}: is odd ({name})."))
    assert len(said) < 3 * (MOST + 30) + 30
    assert said.startswith("layer layers.nnn")
    assert said.endswith("nnn.weight (1,015 characters)).")  # with the bracket


def test_error_keeps_long_paths_numbers_and_lists_of_names():
    path = "/home/" + "/".join(["folder"] * 100)
    names = [f"layers.{i}.weight" for i in range(100)]
    message = f"{path}: {names} are missing, {10**400} is no rank."
    assert str(LoRAError(message)) == message


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_the_same_after_pickling(kind: type[LoRAError]):
    error = kind(f"adapter: {'n' * 1000!r} \x1b.")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))


def test_error_without_a_text_stays_as_it_is():
    assert LoRAError().args == ()
    assert LoRAError(3, "\x07").args == (3, "\\x07")


@pytest.mark.parametrize("text", ["'", "\\'", '"', "'\"", ".", "a", "' ", "\\", "'\n", "a'", "(", "\x1b", "é"])
def test_time_to_read_a_hostile_text_grows_with_its_length_alone(text: str):
    begin = time.process_time()
    assert len(str(LoRAError(text * 200_000))) <= 1_400_000
    assert time.process_time() - begin < 2


def test_an_empty_file_is_refused_with_a_reason(tmp_path):
    """Python's EOFError has no text."""
    (tmp_path / "empty.pt").touch()
    with pytest.raises(LoRAError, match=r"empty\.pt: cannot be read as a checkpoint; it may be truncated: EOFError\.$"):
        read_adapter(tmp_path / "empty.pt")


def test_line_has_no_breaks():
    assert one_line("a\nb\r\n\u2028c") == "a b\\r \\u2028c"


def test_printable_text_is_as_repr_shows_it():
    for code in [*range(0x3000), 0xD800, 0xE000, 0xFEFF, 0x1F600, 0xE0001]:
        if chr(code) not in "'\\":
            assert printable(chr(code)) == repr(chr(code))[1:-1]


def test_shortened_name_says_its_length():
    assert shortened("n" * MOST) == "n" * MOST
    assert re.fullmatch(r"n{137}\.\.\.n{60} \(201 characters\)", shortened("n" * (MOST + 1)))
