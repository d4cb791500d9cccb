"""Find out from the code of a class which of its methods read the weights of other modules, and of which modules."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .low_rank import IN_PROJ

ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")  # the search begins here
# Code of these is not searched. torch's transformer layers read weights on their fast paths only, which are switched
# off while an adapter is active.
LIBRARIES = ("torch.nn.modules.module", "torch.nn.modules.transformer", "lightning", "pytorch_lightning")
GETTERS = {  # attributes of nn.Module that lead to the modules inside
    *("_modules", "__dict__", "__getattr__"),
    *("apply", "children", "get_submodule", "modules", "named_children", "named_modules"),
}
WEIGHTS = {"weight", IN_PROJ}
# Attributes of a weight that are the same for W + delta; and `data`, which code writes to and autograd does not follow.
FACTS = {"data", "dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta"}
LOADS = ("LOAD_ATTR", "LOAD_METHOD")

Path = tuple[str, ...]  # attribute names that lead from a module to a module inside it


@dataclass(frozen=True)
class Use:
    """An attribute that the code of a method takes from self.

    Attributes:
        path: attribute names, beginning at self; () for self itself.
        is_called: whether the code calls the attribute right away.
    """

    path: Path
    is_called: bool


@dataclass(frozen=True)
class WeightReads:
    """The weights that the methods of a class read, in methods that a forward or a step calls, directly or not.

    Attributes:
        methods: paths to the modules whose weights a method reads, by the name of the method. The path is () if the
            code does not show the module, which may be an argument. The result then also has the entry methods, with no
            paths: the argument may come from there.
        uses: what the code takes from self. A read with the path () may be of any of these. Empty if there is no such
            read.
    """

    methods: Mapping[str, set[Path]]
    uses: frozenset[Use]

    def in_reach(self, module: nn.Module, paths: Iterable[Path]) -> list[Path]:
        """Return those of the paths from a module to layers at which a read with the path () may end.

        Args:
            module: an instance of the class.
            paths: paths to layers inside it.
        """
        starts = {start for start in (_start(module, use) for use in self.uses) if start is not None}
        return [path for path in paths if any(path[: len(start)] == start[: len(path)] for start in starts)]


@functools.cache
def weight_reads(cls: type[nn.Module]) -> WeightReads:
    """Return the reads of other modules' weights by the methods of a class."""
    reads: dict[str, set[Path]] = {}
    by_function: list[list[CodeType]] = []
    pending, followed = set(ENTRIES), set()
    while pending:
        name = pending.pop()
        followed.add(name)
        functions = [_codes(vars(parent).get(name)) for parent in cls.__mro__]  # super() may call any of them
        codes = [code for function in functions for code in function]
        by_function += filter(None, functions)
        pending |= {called for code in codes for called in code.co_names} - followed
        found = {path for code in codes for path in _reads(code)}
        if found:
            reads[name] = found
    if not any(() in found for found in reads.values()):
        return WeightReads(reads, frozenset())
    for entry in ENTRIES:  # a module that is read may be an argument from there
        if any(_codes(vars(parent).get(entry)) for parent in cls.__mro__):
            reads.setdefault(entry, set())
    uses = {use for codes in by_function for code in codes for use in _uses(code)}
    uses |= {Use((), False) for codes in by_function if not _takes_self(codes[0])}
    return WeightReads(reads, frozenset(uses))


def _codes(function: Any) -> list[CodeType]:
    """Return the code of a function, of functions that it wraps or defines, and of functions of its file that it names.

    The function's own code comes first.
    """
    if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function) or _is_of_library(function):
        return []
    codes: list[CodeType] = []
    pending: list[Any] = [function]
    seen: set[int] = set()
    while pending:
        item = pending.pop(0)  # the function itself comes first
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, CodeType):
            codes.append(item)
            pending += [constant for constant in item.co_consts if isinstance(constant, CodeType)]
        elif isinstance(item, FunctionType):
            pending += [item.__code__, getattr(item, "__wrapped__", None)]
            pending += [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
            named = (item.__globals__.get(name) for name in item.__code__.co_names)
            pending += [f for f in named if isinstance(f, FunctionType) and f.__module__ == function.__module__]
    return codes


def _is_of_library(function: Any) -> bool:
    return f"{getattr(function, '__module__', '')}.".startswith(tuple(f"{library}." for library in LIBRARIES))


def _is_filled(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, FunctionType)
    except ValueError:
        return False


def _reads(code: CodeType) -> Iterator[Path]:
    """Yield the path from self for each read of `<path>.weight`, or () if the path does not begin at self."""
    if WEIGHTS.isdisjoint(code.co_names):
        return
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        if instruction.opname not in LOADS or instruction.argval not in WEIGHTS:
            continue
        after = instructions[i + 1]
        start = i
        while instructions[start - 1].opname in LOADS:
            start -= 1
        source, before = instructions[start - 1], instructions[start - 2]
        if (after.opname in LOADS and after.argval in FACTS) or before.argval in ("isinstance", "hasattr"):
            continue
        path, from_self = tuple(each.argval for each in instructions[start:i]), _loaded(source)[-1:] == ("self",)
        if path or not from_self:
            yield path if from_self else ()


def _uses(code: CodeType) -> Iterator[Use]:
    """Yield what code takes from self: a path of attributes, or () for self itself."""
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        loaded = _loaded(instruction)
        if "self" in loaded[:-1]:
            yield Use((), False)
        if loaded[-1:] != ("self",):
            continue
        end = i + 1
        while instructions[end].opname in LOADS:
            end += 1
        path = tuple(each.argval for each in instructions[i + 1 : end])
        if path or instructions[end].opname not in ("STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR"):
            yield Use(path, bool(path) and _is_call(instructions[end - 1]))


def _loaded(instruction: dis.Instruction) -> tuple[str, ...]:
    """Return the names of the variables that an instruction puts on the stack. From Python 3.13 on it may be two."""
    if not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD_FAST")):
        return ()
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return names[1:] if instruction.opname.startswith("STORE") else names


def _is_call(instruction: dis.Instruction) -> bool:
    """Return whether an instruction loads an attribute to call it right away.

    Python before 3.12 has an instruction of its own for that; later versions have a flag.
    """
    by_flag = sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)
    return instruction.opname == "LOAD_METHOD" or by_flag


def _takes_self(code: CodeType) -> bool:
    return code.co_argcount > 0 and code.co_varnames[0] == "self"


def _start(module: nn.Module, use: Use) -> Path | None:
    """Return the path to the module that code obtains by a use, () if it may be any, or None if it is none.

    Calling something does not count as obtaining it. A called module runs its own forward, and the code of a called
    method is searched anyway.
    """
    current = module
    for depth, name in enumerate(use.path):
        child = current._modules.get(name)
        if child is not None:
            current = child
            continue
        if depth and use.is_called and depth == len(use.path) - 1:  # a method of a module inside, such as a ModuleList
            return use.path[:depth]
        return () if _may_lead_to_modules(current, name) else None
    return None if use.is_called else use.path


def _may_lead_to_modules(module: nn.Module, name: str) -> bool:
    """Return whether a plain attribute of a module may lead to a module inside it, for which a view can stand in.

    A list or an object that holds a layer does not count: it holds the layer itself, and no view takes its place there.
    """
    value = vars(module).get(name, inspect.getattr_static(type(module), name, None))
    if isinstance(value, property):
        return not _is_of_library(value.fget)
    if isinstance(value, FunctionType):
        return name in GETTERS or not (_is_of_library(value) or _codes(value))  # code that can be read is searched
    return name in GETTERS
