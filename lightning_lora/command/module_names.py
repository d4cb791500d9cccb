"""The names of a model's modules for the tensors of its files, where transformers stores them under others."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import LoRAError
from ..files.model_folder import CONFIG
from ..files.weights import Weights
from ..names import canonical, parent_names

HINT = (
    "If the modules have other names than the file's tensors: transformers 5, where it is installed, gives those of a "
    f"folder whose {CONFIG} names one of its classes; --rename OLD=NEW gives those of any base."
)
RUNS_CODE = re.compile("auto_map|.*_implementation")  # options with which transformers loads code


class ModuleNames(NamedTuple):
    """What a model calls the tensors of its files.

    Attributes:
        files: the name in the file, by the name in the model.
        built: tensors of the model that are made out of others in the file, or are a part or a turned copy of one.
        hint: what an error about names that do not fit says.
        network: the transformers model, without weights, where the names are its.
    """

    files: dict[str, str]
    built: frozenset[str] = frozenset()
    hint: str = HINT
    network: Any = None

    def modules(self) -> set[str]:
        """List every module on the way to a tensor."""
        return {module for name in (*self.files, *self.built) for module in parent_names(name)}


def own_names(base: Weights) -> ModuleNames:
    """Return the file's own names, without the segments of wrappers as torch.compile's."""
    return ModuleNames({canonical(name): name for name in base.locations})


def renamed(base: Weights, pairs: Sequence[str]) -> ModuleNames:
    """Return the names that regular expressions, replaced one after the other wherever they match, make of the file's.

    Args:
        base: the weights.
        pairs: each as "OLD=NEW"; groups of OLD are \\1, \\2, ... in NEW.

    Raises:
        LoRAError: a pair is not of that form or matches nothing, or two tensors get one name.
    """
    names = {name: canonical(name) for name in base.locations}
    for pair in pairs:
        old, separator, new = pair.rpartition("=")  # an expression may hold "=", a name does not
        try:
            after = {name: re.sub(old, new, module_name) for name, module_name in names.items()}
        except (re.error, IndexError) as error:
            raise LoRAError(f"merge: --rename {pair!r}: no regular expression and its replacement: {error}.") from error
        if not old or not separator:
            raise LoRAError(f"merge: --rename {pair!r} must be OLD=NEW, a regular expression and what replaces it.")
        if after == names:
            raise LoRAError(
                f"merge: --rename {pair!r} changes no name of {base.path}; there are "
                f"{', '.join(map(repr, list(names.values())[:3]))}, ..."
            )
        names = after
    return _by_module(base, names.items())


def names_in_transformers(base: Weights) -> ModuleNames:
    """Return the names that from_pretrained gives to a folder's tensors; the file's own for no model of transformers 5.

    The class that config.json names is built without weights. Code that a folder brings along is not run.
    """
    config = base.folder.config if base.folder else {}
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str):
        return own_names(base)
    try:
        transformers = importlib.import_module("transformers")
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return own_names(base)
    kind: Any = getattr(transformers, kinds[0], None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        return own_names(base)
    try:
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(_without_code(config)))
        transforms = mapping.get_model_conversion_mapping(model)
    except Exception as error:  # whatever a class raises for a configuration that is not its own
        hint = (
            f"transformers, which knows the modules' names, cannot build {kinds[0]}: {error!r}; see --rename OLD=NEW."
        )
        return own_names(base)._replace(hint=hint)
    return _converted(base, model, transforms, loading)


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_code(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not RUNS_CODE.fullmatch(name)
    }


def _converted(base: Weights, model: Any, transforms: Sequence[Any], loading: Any) -> ModuleNames:
    """Name each tensor as transformers' convert_and_load_state_dict_in_model does."""
    state, prefix = model.state_dict(), model.base_model_prefix
    renamings = [transform for transform in transforms if isinstance(transform, loading.WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, loading.WeightConverter)]
    targets = {source: converter.target_patterns for converter in converters for source in converter.source_patterns}
    names: list[tuple[str, str]] = []
    built: set[str] = set()
    for name in sorted(base.locations, key=loading.dot_natural_key):
        new, source = loading.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, source = loading.rename_source_key(name, [], [], prefix, state)
        if source is None:
            names.append((name, new if new in state else name))
        else:
            built |= {new.replace(targets[source][0], target) for target in targets[source]} & state.keys()
    return ModuleNames(_by_module(base, names).files, frozenset(built), network=model)


def _by_module(base: Weights, names: Iterable[tuple[str, str]]) -> ModuleNames:
    """Return names of the file by those of the model. Raises LoRAError where two become one."""
    files: dict[str, str] = {}
    for name, module_name in names:
        if module_name in files:
            raise LoRAError(f"{base.path}: {files[module_name]!r} and {name!r} both become {module_name!r}.")
        files[module_name] = name
    return ModuleNames(files)
