"""Find out what unpickling would cost, without unpickling.

A pickle is a program for a stack machine. This follows the program and keeps sizes in place of objects. Four things
can cost more than the size of a pickle: the hash of a tuple that holds another tuple twice, and so on; a memo with a
huge index; a text of a declared length; many names of classes.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import NamedTuple

from ..errors import LoRAError
from .limits import PICKLE_BYTES, PICKLE_DEPTH, PICKLE_HASHED, PICKLE_NAMES, check

WRITTEN_IN = (b"latin1", b"latin-1")  # pickles of protocol 2 hold bytes as text in this encoding
FIXED, LINE, LINES = range(3)
# By pickletools' number of an argument's form: how many bytes its length takes, and whether the length is signed.
LENGTHS = {-2: (1, False), -3: (4, True), -4: (4, False), -5: (8, False)}
PUT, GET = ("BINPUT", "LONG_BINPUT", "PUT"), ("BINGET", "LONG_BINGET", "GET")
NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4")
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
GROWING, CONTAINERS = ("APPEND", "APPENDS", "ADDITEMS"), ("EMPTY_LIST", "LIST", "EMPTY_SET")
NAMING = ("GLOBAL", "STACK_GLOBAL", "INST")
TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")


class _Value:
    """A value on the stack: the number of its parts, the depth of its tuples, and its kind where that matters."""

    __slots__ = ("depth", "grows", "kind", "parts")

    def __init__(self, parts: int = 1, depth: int = 0, kind: str = "", grows: bool = True) -> None:
        self.parts, self.depth, self.kind, self.grows = parts, depth, kind, grows


class _Operation(NamedTuple):
    name: str
    form: int  # of the argument
    size: int
    signed: bool
    pops: int
    to_mark: bool
    pushes: int


LEAF, MARK = _Value(), _Value()
NUMBER, LATIN, ENCODE, BYTEARRAY = (_Value(kind=kind) for kind in ("number", "latin", "encode", "bytearray"))
CONSTANTS = (LEAF, MARK, NUMBER, LATIN, ENCODE, BYTEARRAY)
NAMED = {
    b"_codecs\nencode\n": ENCODE,
    b"builtins\nbytearray\n": BYTEARRAY,
    b"__builtin__\nbytearray\n": BYTEARRAY,
}


def _table() -> dict[int, _Operation]:
    operations = {}
    for each in pickletools.opcodes:
        before = [item.name for item in each.stack_before]
        to_mark = "mark" in before
        pops = before.index("mark") if to_mark else len(before)
        form, size, signed = FIXED, 0, False
        if each.arg is not None:
            size = each.arg.n
            if size == -1:
                form, size = (LINES if each.arg.name == "stringnl_noescape_pair" else LINE), 0
            elif size < 0:
                form, (_, signed) = size, LENGTHS[size]
        operations[ord(each.code)] = _Operation(each.name, form, size, signed, pops, to_mark, len(each.stack_after))
    return operations


OPERATIONS = _table()


def check_pickle(content: bytes, where: object, start: int = 0) -> int:
    """Raise LoRAError where unpickling would take more memory or time than the size of the pickle explains.

    Args:
        content: bytes that hold the pickle.
        where: for messages.
        start: position of the pickle.

    Returns:
        The position of its end. A damaged pickle ends where it cannot be followed: unpickling stops there, too.
    """
    check(PICKLE_BYTES, len(content), where)
    try:
        return _Follower(content, where).run(start)
    except (pickle.UnpicklingError, LookupError):
        return len(content)


class _Follower:
    def __init__(self, content: bytes, where: object) -> None:
        self.content, self.where = content, where
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}
        self.hashed = self.named = 0

    def run(self, at: int) -> int:
        """Follow the operations up to the end."""
        content = self.content
        while True:
            operation = OPERATIONS.get(content[at])
            if operation is None:
                raise pickle.UnpicklingError("cut")
            at += 1
            argument, at = self._argument(operation, at)
            if operation.name == "STOP":
                return at
            self._act(operation, argument)

    def _argument(self, operation: _Operation, at: int) -> tuple[bytes, int]:
        form, content, where = operation.form, self.content, self.where
        if form == FIXED:
            end = at + operation.size
        elif form in (LINE, LINES):
            end = at
            for _ in range(form):
                end = content.find(b"\n", end) + 1
                if not end:
                    raise pickle.UnpicklingError("cut")
        else:
            width = LENGTHS[form][0]
            size = int.from_bytes(content[at : at + width], "little", signed=operation.signed)
            at, end = at + width, at + width + size
            if size < 0 or end > len(content):
                raise LoRAError(f"{where}: a pickle declares {size} bytes and has {len(content) - at}; it was cut.")
        if end > len(content):
            raise pickle.UnpicklingError("cut")
        return content[at:end], end

    def _act(self, operation: _Operation, argument: bytes) -> None:
        name, stack, where = operation.name, self.stack, self.where
        if name in GET:
            stack.append(self.memo[self._number(operation, argument)])
        elif name in PUT or name == "MEMOIZE":
            index = self._number(operation, argument) if name in PUT else len(self.memo)
            if index > len(self.content):
                raise LoRAError(f"{where}: a pickle of {len(self.content)} bytes numbers an object {index}.")
            self.memo[index] = stack[-1]
        elif name == "MARK":
            stack.append(MARK)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            items = self._taken(operation)
            stack.extend([self._made(name, argument, items)] * operation.pushes)

    def _number(self, operation: _Operation, argument: bytes) -> int:
        try:
            return int(argument) if operation.form == LINE else int.from_bytes(argument, "little")
        except ValueError:
            raise pickle.UnpicklingError("no number") from None

    def _taken(self, operation: _Operation) -> list[_Value]:
        """Pop the operands of an operation from the stack. The deepest comes first."""
        stack, above = self.stack, []
        if operation.to_mark:
            while stack[-1] is not MARK:
                above.append(stack.pop())
            stack.pop()
            above.reverse()
        if operation.pops > len(stack):
            raise pickle.UnpicklingError("cut")
        below = stack[len(stack) - operation.pops :]
        del stack[len(stack) - operation.pops :]
        if operation.name in ("SETITEM", "SETITEMS"):
            items = [*below[1:], *above]
            self._hash(items[::2])
        elif operation.name in ("ADDITEMS", "FROZENSET"):
            self._hash(above)
        elif operation.name in ("REDUCE", "BINPERSID"):
            self._hash(below[-1:])
        return [*below, *above]

    def _hash(self, values: list[_Value]) -> None:
        self.hashed += sum(value.parts for value in values)
        check(PICKLE_HASHED, self.hashed, self.where)

    def _made(self, name: str, argument: bytes, items: list[_Value]) -> _Value:
        """Return the value that an operation puts on the stack."""
        where = self.where
        if name in TUPLES:
            return self._tuple(items)
        if name in GROWING:
            if items[0] not in CONSTANTS:
                if not items[0].grows:
                    raise LoRAError(f"{where}: a list in a pickle goes on growing inside of a tuple.")
                items[0].parts += sum(item.parts for item in items[1:])
            return items[0]
        if name in CONTAINERS:
            return _Value(1 + sum(item.parts for item in items))
        if name in NUMBERS:
            return NUMBER
        if name in TEXTS:
            return LATIN if argument.rstrip(b"\n") in WRITTEN_IN else LEAF
        if name in NAMING:
            self.named += 1
            check(PICKLE_NAMES, self.named, where)
            return NAMED.get(argument, LEAF)
        if name == "REDUCE":
            self._refuse_growing_calls(*items)
        return LEAF

    def _tuple(self, items: list[_Value]) -> _Value:
        depth = 1 + max((item.depth for item in items), default=0)
        check(PICKLE_DEPTH, depth, self.where)
        for item in items:
            item.grows = item in CONSTANTS
        return _Value(1 + sum(item.parts for item in items), depth, items[-1].kind if items else "", grows=False)

    def _refuse_growing_calls(self, function: _Value, arguments: _Value) -> None:
        """Refuse a call whose result would be larger than its arguments, of the functions that torch.load calls."""
        where = self.where
        if function is BYTEARRAY and arguments.kind == NUMBER.kind:
            raise LoRAError(f"{where}: a pickle makes a bytearray of a size of its own choice.")
        if function is ENCODE and arguments.kind != LATIN.kind:
            raise LoRAError(f"{where}: a pickle encodes text in another way than bytes are written in.")
