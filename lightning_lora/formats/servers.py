"""What servers and other readers of PEFT's folders drop, run wrongly or refuse of an adapter, and what they need.

The rules are data, in servers.json: of each server the version whose source was read, and for each rule where it stands
in that source. A rule has one condition of the kinds in CONDITIONS, which looks at a folder as a server does: at the
fields of adapter_config.json, and at the names and shapes of the tensors.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from ..adapter.file_options import check_options
from ..errors import LoRAError, shown
from ..files.paths import PathLike, kind_of, read_json
from ..files.safetensors import read_header
from ..files.torch_archive import read_torch_file
from ..matching import pattern_matches
from .forms import CONFIG_FILE
from .peft_folder import OLD_TENSOR_FILE, OUTSIDE_FILE, TENSOR_FILE, FolderContent
from .peft_names import PREFIX

Server = Literal["vllm", "sglang", "llama.cpp", "peft", "diffusers"]
RULES = Path(__file__).with_name("servers.json")
FACTOR = re.compile(r"\.(?:lora_(?P<leaf>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))$")


@dataclass(frozen=True)
class FolderView:
    """A PEFT folder as a server sees it.

    Attributes:
        options: the fields of adapter_config.json.
        shapes: of the tensors, by PEFT's names.
        outside: the names of tensors in the file that this package writes beside PEFT's.
    """

    options: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    outside: Collection[str] = ()

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module that has factors of LoRA, by its name in the network."""
        found = {}
        for name, shape in self.shapes.items():
            factor = FACTOR.search(name)
            if factor is not None and "A" in factor.groups() and shape:
                found[name[: factor.start()].removeprefix(PREFIX)] = shape[0]
        return found

    def number(self, name: str, default: float = 0) -> float:
        """Return an option that should be a number."""
        value = self.options.get(name)
        return value if isinstance(value, (int, float)) else default

    def scale(self, module: str) -> float:
        """Return the scale that PEFT gives a module."""
        given = self.options.get("alpha_pattern")
        patterns = given.items() if isinstance(given, Mapping) else ()
        alphas = [value for key, value in patterns if isinstance(value, (int, float)) and pattern_matches(key, module)]
        alpha = alphas[0] if alphas else self.number("lora_alpha")
        rank = self.ranks[module] or 1
        try:
            return alpha / (rank**0.5 if self.options.get("use_rslora") else rank)
        except OverflowError:  # JSON's whole numbers have no limit
            return math.inf


def view_of_content(content: FolderContent) -> FolderView:
    """Return what a server would see of a folder that is not written yet."""
    shapes = {name: tuple(tensor.shape) for name, tensor in content.tensors.items()}
    return FolderView(content.options, shapes, list(content.outside))


def view_of_folder(path: PathLike) -> FolderView:
    """Read what a server sees of a folder, whoever wrote it and whether or not this package can apply it.

    Raises:
        LoRAError: a file is missing or damaged.
    """
    folder = Path(path)
    options = read_json(folder / CONFIG_FILE)
    if kind_of(folder / TENSOR_FILE) != "nothing" or kind_of(folder / OLD_TENSOR_FILE) == "nothing":
        shapes = {name: location.shape for name, location in read_header(folder / TENSOR_FILE).locations.items()}
    else:
        content = read_torch_file(folder / OLD_TENSOR_FILE, "meta")
        shapes = {str(name): tuple(getattr(value, "shape", ())) for name, value in content.items()}
    outside = folder / OUTSIDE_FILE
    names = list(read_header(outside).locations) if kind_of(outside) == "file" else []
    view = FolderView(options, shapes, names)
    check_options(options, view.ranks, folder / CONFIG_FILE)
    _check_patterns(options.get("alpha_pattern"), folder / CONFIG_FILE)
    return view


def _check_patterns(patterns: Any, path: Path) -> None:
    for key in patterns if isinstance(patterns, Mapping) else ():
        try:
            pattern_matches(key, "")
        except re.error as error:
            raise LoRAError(f"{path}: alpha_pattern: {shown(key)} is no regular expression: {error}.") from None


# --- conditions: each returns the names of what a rule is about, and nothing where the rule does not hold ---


def _missing_options(view: FolderView, names: Sequence[str], rule: Mapping[str, Any]) -> list[str]:
    return [name for name in names if view.options.get(name) is None]


def _option(view: FolderView, name: str, rule: Mapping[str, Any]) -> list[str]:
    value = view.options.get(name)
    return [f"{name}={shown(value)}"] if value and value not in rule.get("besides", ()) else []


def _text(view: FolderView, name: str, rule: Mapping[str, Any]) -> list[str]:
    value = view.options.get(name)
    named = isinstance(value, str) and value.lower() not in rule.get("besides", ())
    return [f"{name}={shown(value)}"] if named else []


def _entries(view: FolderView, name: str, rule: Mapping[str, Any]) -> list[str]:
    value = view.options.get(name)
    entries = [str(entry) for entry in value] if isinstance(value, list) else []
    allowed, pattern = rule.get("besides", ()), rule.get("besides_pattern")
    return [e for e in entries if e not in allowed and not (pattern and re.search(pattern, e))]


def _tensors(view: FolderView, pattern: str, rule: Mapping[str, Any]) -> list[str]:
    besides, unless = rule.get("besides_pattern"), rule.get("unless")
    if unless and any(re.search(unless, name) for name in view.shapes):
        return []
    names = [name for name in view.shapes if re.search(pattern, name)]
    return [name for name in names if not (besides and re.search(besides, name))]


def _tensors_besides(view: FolderView, pattern: str, rule: Mapping[str, Any]) -> list[str]:
    return [name for name in view.shapes if not re.search(pattern, name)]


def _rank_above(view: FolderView, most: int, rule: Mapping[str, Any]) -> list[str]:
    largest = max(view.ranks.values(), default=0)
    return [f"rank {largest}"] if largest > most else []


def _ranks_besides_r(view: FolderView, _: Any, rule: Mapping[str, Any]) -> list[str]:
    return [module for module, rank in view.ranks.items() if rank != view.number("r")]


def _convolutions(view: FolderView, _: Any, rule: Mapping[str, Any]) -> list[str]:
    return [name for name, shape in view.shapes.items() if FACTOR.search(name) and len(shape) > 2]


def _layer_without(view: FolderView, layer: str, rule: Mapping[str, Any]) -> list[str]:
    heads = {name.rpartition(".")[0] for name in view.ranks if name.rpartition(".")[2] == rule["without"]}
    own = [name for name in view.ranks if name.rpartition(".")[2] == layer]
    return [name for name in own if name.rpartition(".")[0] not in heads]


def _scale_besides(view: FolderView, scale: float, rule: Mapping[str, Any]) -> list[str]:
    return [module for module in view.ranks if abs(view.scale(module) - scale) > 1e-9]


def _outside(view: FolderView, _: Any, rule: Mapping[str, Any]) -> list[str]:
    return list(view.outside)


CONDITIONS: dict[str, Callable[[FolderView, Any, Mapping[str, Any]], list[str]]] = {
    "missing_options": _missing_options,
    "option": _option,
    "text": _text,
    "entries": _entries,
    "tensors": _tensors,
    "tensors_besides": _tensors_besides,
    "rank_above": _rank_above,
    "ranks_besides_r": _ranks_besides_r,
    "factors_of_convolutions": _convolutions,
    "layer": _layer_without,
    "scale_besides": _scale_besides,
    "outside": _outside,
}


@lru_cache(maxsize=1)
def servers() -> dict[str, dict[str, Any]]:
    """Return servers.json: of each server its name, the version that was read, and its rules."""
    found: dict[str, dict[str, Any]] = json.loads(RULES.read_text(encoding="utf-8"))
    return found


def server_named(name: str) -> Server:
    """Return the server of a name that a user gave.

    Raises:
        LoRAError: there is none. The message has the nearest name, and all.
    """
    known: tuple[Server, ...] = get_args(Server)
    for server in known:
        if name == server:
            return server
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise LoRAError(f"info: --for: {name!r} is no server that is known{hint} There are {', '.join(known)}.")


def findings(view: FolderView, server: Server) -> list[dict[str, Any]]:
    """Return what a server would drop, run wrongly or refuse of a folder, or needs for it, as plain types.

    Returns:
        Of each rule that holds: id, effect, names (of options, tensors or layers), says, source, `before` where only
        versions before that one do it, and `architecture` where the names are not those of a network that it knows.
    """
    found = []
    for rule in servers()[server]["rules"]:
        when = rule["when"]
        kind = next(iter(when))
        names = CONDITIONS[kind](view, when[kind], when)
        if names:
            told = {name: value for name, value in rule.items() if name != "when"}
            found.append({**told, "names": names})
    return found


def is_of_another_architecture(view: FolderView, server: Server, found: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the network cannot be one that a server of language models knows, whatever the adapter's form.

    Args:
        view: the folder.
        server: a key of servers().
        found: what findings() returned.
    """
    if "serves" not in servers()[server]:
        return False
    foreign = {name for each in found if each.get("architecture") for name in each["names"]}
    return bool(_convolutions(view, True, {})) or (bool(view.shapes) and foreign >= view.shapes.keys())
