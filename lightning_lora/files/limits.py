"""Limits of what reading a file may cost, each with the reason for it.

A malicious file has a few hundred bytes and declares billions. Honest files stay far below each limit. The reference's
page on safety shows this list as a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LoRAError, shown


@dataclass(frozen=True)
class Limit:
    """The largest number that a file may ask for: `what` is counted, `why` says what happens without the limit."""

    most: int
    what: str
    why: str


JSON_BYTES = Limit(2**23, "bytes of JSON", "Python needs up to twenty times a JSON file's size")
INDEX_BYTES = Limit(2**25, "bytes of an index of shards", "an index of 100,000 tensors has a third of that")
HEADER_BYTES = Limit(2**25, "bytes of a safetensors header", "a header of 100,000 tensors has a third of that")
JSON_PARTS = Limit(1_000_000, "commas and brackets in JSON", "each may become an object of 64 bytes")
PICKLE_BYTES = Limit(2**26, "bytes of a pickle", "one byte may become an object of 64; tensors lie beside the pickle")
PICKLE_DEPTH = Limit(200, "tuples inside each other in a pickle", "to hash a deeper one as a key ends the process")
PICKLE_HASHED = Limit(10_000_000, "parts of a pickle's keys", "a tuple that holds another twice doubles each time")
COPIES = Limit(16, "times the bytes that a file stores for its tensors", "views repeat what is stored when copied")
PICKLE_NAMES = Limit(10_000, "names of classes and functions in a pickle", "each becomes a class of a kilobyte")
NAME_LENGTH = Limit(1000, "characters of a name", "each module around a tensor is named by a part of it")
NAME_PARTS = Limit(100, "parts between dots of a name", "each is a module that is looked up by itself")
NAMES_TEXT = Limit(
    2**27, "characters of all names and of the modules around them", "matching names makes this much text"
)
FREE_BYTES = 2**26  # tensors of this size in all are read without comparing them with the file's size


def check(limit: Limit, found: int, path: object) -> None:
    """Raise LoRAError where a file asks for more than a limit."""
    if found > limit.most:
        raise LoRAError(f"{path}: has {found} {limit.what}; at most {limit.most} are read. No honest file needs more.")


def check_names(names: Iterable[str], path: object) -> None:
    """Raise LoRAError where names in a file are longer or deeper than those of any model, one alone or all together."""
    total = 0
    for name in names:
        if len(name) > NAME_LENGTH.most:
            check(NAME_LENGTH, len(name), f"{path}: {shown(name, 60)}")
        parts = name.count(".") + 1
        if parts > NAME_PARTS.most:
            check(NAME_PARTS, parts, f"{path}: {shown(name, 60)}")
        total += len(name) * parts
    check(NAMES_TEXT, total, path)


def every_limit() -> list[tuple[str, Limit]]:
    """List the limits by name."""
    return [(name, value) for name, value in globals().items() if isinstance(value, Limit)]
