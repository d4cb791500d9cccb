"""Collect every message in the package's source, raised, warned, logged or printed, as text with {placeholders}."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
SPEAKERS = {  # what says something to a user, and the kind of message that it is
    "warnings.warn": "warning",
    "rank_zero_warn": "warning",
    "log.info": "log",
    "tell": "log",
    "print": "printed",
    "console.print": "printed",
}
SAYS = re.compile(
    r"(^|\.)(rank_zero_(?!only)\w+|warn|warn_explicit|warning|print|add_note)$|"
    r"^(log|logger|logging)\.(?!get|log_metrics|experiment)"
)
RESULTS = {  # what is shown is no message, but what was asked for
    "command/printing, print_lines": "what a verb returns",
}
UNWRAPPED = {"list", "tuple", "str", "repr", "map", "sorted", "next", "iter", "join", "listed", "Path", "escape"}

Scope = ast.FunctionDef | ast.Module


class CannotRenderError(AssertionError):
    """A message is written in a form that this file cannot read."""


@dataclass
class Message:
    """A message in the source.

    Attributes:
        kind: the class of an error, or "warning", "log", "printed".
        place: file and function.
        text: the template.
        holes: by placeholder, the texts that it may stand for, where the source has them.
    """

    kind: str
    place: str
    text: str
    holes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class File:
    """A file: its syntax tree, the tree's nodes, the parent of each node, and the imported module."""

    name: str
    tree: ast.Module
    module: ModuleType
    nodes: list[ast.AST] = field(default_factory=list)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = list(ast.walk(self.tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def scope(self, node: ast.AST) -> Scope:
        """The function that a node is in, or the module."""
        while not isinstance(node := self.parents[node], (ast.FunctionDef, ast.Module)):
            pass
        return node

    def called(self, node: ast.keyword) -> ast.expr:
        """The last segment of what is called with a keyword."""
        call = self.parents[node]
        assert isinstance(call, (ast.Call, ast.ClassDef))
        function = call.func if isinstance(call, ast.Call) else ast.Name(call.name)
        return ast.Name(function.attr) if isinstance(function, ast.Attribute) else function


def read_file(path: Path) -> File:
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    parts = ["lightning_lora", *(part for part in name.split("/") if part != "__init__")]
    module = importlib.import_module(".".join(parts)) if name != "__main__" else ModuleType(name)
    return File(name, ast.parse(path.read_text()), module)


def _held(file: File, node: ast.AST) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """What a node assigns to an attribute: the attribute's name, key and value. Of a plain field both are the same."""
    if isinstance(node, ast.AnnAssign) and node.value and isinstance(file.scope(node), ast.Module):
        yield dotted(node.target), node.value, node.value
    elif isinstance(node, ast.keyword) and node.arg and dotted(file.called(node)) == "_replace":
        yield node.arg, node.value, node.value
    elif isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Subscript):
        yield dotted(target.value).rpartition(".")[2], target.slice, node.value
    elif isinstance(node, ast.AugAssign) and isinstance(node.value, ast.DictComp):
        yield dotted(node.target).rpartition(".")[2], node.value.key, node.value.value


@cache  # each scope is asked many times
def assignments_in(scope: ast.AST) -> list[ast.AST]:
    """The nodes in a scope that may give a name its texts."""
    kinds = (ast.Assign, ast.Call, ast.For, ast.NamedExpr, ast.AugAssign)
    return [node for node in ast.walk(scope) if isinstance(node, kinds)]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):  # by far the most; ast.unparse takes long
        return node.id
    return ast.unparse(node) if isinstance(node, ast.Attribute) else ""


class Source:
    """The files of a package and their messages."""

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.held: dict[str, list[tuple[File, Scope, ast.expr, ast.expr]]] = {}  # keys and values, by attribute
        self.calls: dict[str, list[tuple[File, ast.Call]]] = {}  # by the last segment of what is called
        for file in files:
            for node in file.nodes:
                if isinstance(node, ast.Call):
                    self.calls.setdefault(dotted(node.func).rpartition(".")[2], []).append((file, node))
                for name, key, value in _held(file, node):
                    self.held.setdefault(name, []).append((file, file.scope(node), key, value))

    def calls_of(self, file: File, function: ast.FunctionDef) -> Iterator[tuple[File, ast.Call]]:
        """The calls of a function, by its name in the files that know it, or of a method, by any object."""
        defined = getattr(file.module, function.name, None)
        for other, call in self.calls.get(function.name, []):
            if isinstance(call.func, ast.Attribute):
                if isinstance(file.parents[function], ast.ClassDef) and dotted(call.func) not in SPEAKERS:
                    yield other, call
            elif getattr(other.module, function.name, defined) is defined:
                yield other, call

    def messages(self) -> Iterator[Message]:
        for file in self.files:
            for node in file.nodes:
                said = self._said(file, node)
                if said:
                    yield self._message(file, node, *said)

    def _said(self, file: File, node: ast.AST) -> tuple[str, list[ast.expr]] | None:
        """What kind of message a node says, and the text with what is put into it; None where it says none."""
        if isinstance(node, ast.Raise):
            plain = dotted(node.exc) if node.exc else ""
            if node.exc is None or isinstance(node.exc, ast.Call) or plain == "NotImplementedError":
                return None  # what is raised again, or seen as a call, or for subclasses to define
            if _is_exception(file, plain) or not isinstance(node.exc, ast.Name):
                raise CannotRenderError(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
            return None  # an exception that was made before
        if isinstance(node, ast.Assign) and dotted(node.targets[0]).endswith(".args"):
            assert isinstance(node.value, ast.Tuple)
            return "added to torch's error", node.value.elts[:1]
        if not isinstance(node, ast.Call):
            return None
        called = dotted(node.func)
        if file.name == "notices":
            return None  # a line is read where it is told
        if (_is_exception(file, called) and node.args) or isinstance(file.parents[node], ast.Raise):
            return called.rpartition(".")[2], node.args
        if called in SPEAKERS:
            return SPEAKERS[called], node.args
        if SAYS.search(called):
            raise CannotRenderError(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
        return None

    def _message(self, file: File, node: ast.AST, kind: str, args: list[ast.expr]) -> Message:
        scope = file.scope(node)
        reader = Reader(self, file, scope)
        if not args:
            raise CannotRenderError(f"{file.name}:{getattr(node, 'lineno', 0)}: no text")
        where = file.name if isinstance(scope, ast.Module) else f"{file.name}, {scope.name}"
        texts = reader.texts(args[0]) or ([f"{{{RESULTS[where]}}}"] if where in RESULTS else [])
        if not texts:
            raise CannotRenderError(f"{file.name}:{args[0].lineno}: {ast.unparse(args[0])}")
        if kind == "log":
            values = iter(args[1:])
            texts = [re.sub(r"%(\.\d+)?[sdf]", lambda _: reader.placeholder(next(values)), text) for text in texts]
            texts = [text.replace("%%", "%") for text in texts]
        text = texts[0] if len(texts) == 1 else "{message}"
        if len(texts) > 1:
            reader.holes["message"] = texts
        return Message(kind, where, text, reader.holes)


def _is_exception(file: File, name: str) -> bool:
    value: Any = getattr(file.module, name, getattr(builtins, name, None))
    return isinstance(value, type) and issubclass(value, BaseException)


@dataclass
class Reader:
    """Turns expressions in one function into templates. `holes` collects the texts that placeholders stand for."""

    source: Source
    file: File
    scope: Scope
    holes: dict[str, list[str]] = field(default_factory=dict)
    seen: set[tuple[str, str, str]] = field(default_factory=set)

    def texts(self, node: ast.expr) -> list[str]:
        """The templates that an expression may become; none where its text is not in the source."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            return ["".join(self._part(part) for part in node.values)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [self._text(node.left) + self._text(node.right)]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body) + self.texts(node.orelse)
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self.texts(value)]
        if isinstance(node, ast.Name):
            return self._of_name(node.id)
        if isinstance(node, ast.Attribute):
            return self._of_attribute(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            if isinstance(joined := node.args[0], ast.Call) and list(map(dotted, joined.args[:1])) == ["sentence"]:
                return [f"{text}." for text in self.texts(joined.args[1])]
            return self.texts(joined) if isinstance(joined, (ast.Name, ast.Attribute)) else []
        return self._of_call(node) if isinstance(node, ast.Call) else []

    def _text(self, node: ast.expr) -> str:
        texts = self.texts(node)
        if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)) and texts:
            return texts[0]
        if isinstance(node, ast.IfExp) and texts:
            return _choice(texts)
        return self.placeholder(node)

    def _part(self, part: ast.expr) -> str:
        if isinstance(part, ast.Constant):
            return str(part.value)
        assert isinstance(part, ast.FormattedValue)
        constant = getattr(self.file.module, part.value.id, None) if isinstance(part.value, ast.Name) else None
        if isinstance(constant, str):
            return repr(constant) if part.conversion == ord("r") else constant
        texts = self.texts(part.value) if isinstance(part.value, ast.IfExp) else []
        return _choice(texts) if texts else self.placeholder(part.value)

    def placeholder(self, node: ast.expr) -> str:
        """The placeholder for an expression, whose texts are kept where they are in the source."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "removeprefix":
            return self.placeholder(node.func.value)
        if isinstance(node, ast.Call) and dotted(node.func) == "sentence":
            return f"{self.placeholder(node.args[0])}."
        name = name_of(node)
        texts = [text for text in self.texts(node) if re.search("[a-z]", re.sub(r"{.*?}", "", text))]
        if texts:
            self.holes[name] = list(dict.fromkeys([*self.holes.get(name, []), *texts]))
        return f"{{{name}}}"

    def _elsewhere(self, file: File, scope: Scope, key: str) -> Reader | None:
        place = (file.name, getattr(scope, "name", ""), key)
        if place in self.seen:
            return None
        self.seen.add(place)  # each place once, for all the readers of a message
        return Reader(self.source, file, scope, self.holes, self.seen)

    def _of_name(self, name: str) -> list[str]:
        """The texts of a local name, where it is assigned or passed."""
        if isinstance(constant := getattr(self.file.module, name, None), str):
            return [constant]
        if not isinstance(self.scope, ast.FunctionDef) or not (reader := self._elsewhere(self.file, self.scope, name)):
            return []
        texts: list[str] = []
        for node in assignments_in(self.scope):
            if isinstance(node, ast.Assign) and name in map(dotted, node.targets):
                texts += reader.texts(node.value)
            elif isinstance(node, ast.Call) and dotted(node.func) == f"{name}.append":
                texts += reader.texts(node.args[0])
            elif isinstance(node, ast.For) and name in map(dotted, ast.walk(node.target)):
                texts += reader.of_items(node.target, name, node.iter)
            elif isinstance(node, ast.NamedExpr) and node.target.id == name:
                texts += reader.texts(node.value)
            elif isinstance(node, ast.AugAssign) and dotted(node.target) == name:
                texts = [text + _choice(["", *reader.texts(node.value)]) for text in texts]
        parameters = [arg.arg for arg in (*self.scope.args.args, *self.scope.args.kwonlyargs)]
        return texts + (self._of_parameter(self.scope, name, parameters) if name in parameters else [])

    def _of_parameter(self, function: ast.FunctionDef, name: str, parameters: list[str]) -> list[str]:
        """The texts that callers pass."""
        position = parameters.index(name) - (parameters[0] in ("self", "cls"))
        texts: list[str] = []
        for file, call in self.source.calls_of(self.file, function):
            passed = [word.value for word in call.keywords if word.arg == name] or call.args[position : position + 1]
            if passed and (reader := self._elsewhere(file, file.scope(call), ast.unparse(call))):
                texts += reader.texts(passed[0]) or [f"{{{name_of(passed[0])}}}"]
        return texts

    def of_items(self, target: ast.expr, name: str, items: ast.expr) -> list[str]:
        """The texts that a name of a loop's target stands for."""
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Attribute) and items.func.attr == "items":
            is_key = isinstance(target, ast.Tuple) and dotted(target.elts[0]) == name
            return self._of_attribute(dotted(items.func.value).rpartition(".")[2], values=not is_key)
        return self.texts(items)

    def _of_attribute(self, name: str, *, values: bool = False) -> list[str]:
        """The texts that an attribute of this name holds, anywhere: as a field, or as keys or values of a mapping."""
        texts: list[str] = []
        for file, scope, *put in self.source.held.get(name, []):
            reader = self._elsewhere(file, scope, f"{name} {ast.unparse(put[values])}")
            texts += reader.texts(put[values]) if reader else []
        return texts

    def _of_call(self, node: ast.Call) -> list[str]:
        """The texts that a function of this package returns."""
        function = getattr(self.file.module, dotted(node.func), None)
        for file in self.source.files:
            if getattr(function, "__module__", None) != file.module.__name__:
                continue
            for defined in file.tree.body:
                if isinstance(defined, ast.FunctionDef) and defined.name == function.__name__:  # type: ignore[union-attr]
                    reader = self._elsewhere(file, defined, "return")
                    returned = [each.value for each in ast.walk(defined) if isinstance(each, ast.Return) and each.value]
                    return [text for value in returned for text in reader.texts(value)] if reader else []
        return []


def _choice(texts: list[str]) -> str:
    """Several texts as one template: an optional part, or a choice."""
    first, *others = dict.fromkeys(texts)
    if not others:
        return f"[{first}]" if first else ""
    return (
        f"[{first or others[0]}]" if "" in (first, *others) and len(others) == 1 else f"({'|'.join([first, *others])})"
    )


def name_of(node: ast.expr) -> str:
    """A short name for an expression in a message."""
    if isinstance(node, ast.Attribute):
        if node.attr == "__name__" and isinstance(node.value, ast.Call) and dotted(node.value.func) == "type":
            return f"type of {name_of(node.value.args[0])}"
        return f"{node.attr} of {name_of(node.value)}" if node.attr in ("shape", "dtype", "device") else node.attr
    if isinstance(node, ast.BoolOp):
        return name_of(node.values[0])
    if isinstance(node, (ast.Subscript, ast.Starred, ast.FormattedValue)):
        return name_of(node.value)
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) == 1:
        return name_of(node.elts[0])
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return name_of(node.generators[0].iter)
    if isinstance(node, ast.Call):
        called = dotted(node.func).rpartition(".")[2] or getattr(node.func, "attr", "")
        if called == "len":
            return f"number of {name_of(node.args[0])}"
        if called in UNWRAPPED and node.args:
            return name_of(node.args[-1] if called == "map" else node.args[0])
        return name_of(node.func)
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def package_source() -> Source:
    return Source([read_file(path) for path in sorted(PACKAGE.rglob("*.py"))])
