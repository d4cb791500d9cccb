"""Translate the names of tensors in a model's files to the names in the model.

transformers stores some models under other names than those of their modules.
"""

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
    "If the modules have other names than the file's tensors: transformers 5, if it is installed, gives the names of a "
    f"folder whose {CONFIG} names one of its classes; --rename OLD=NEW gives those of any base."
)
RUNS_CODE = re.compile("auto_map|.*_implementation")  # options that make transformers load code


class ModuleNames(NamedTuple):
    """Names of tensors in a model and in its files.

    Attributes:
        files: the name in the file, by the name in the model.
        built: tensors of the model that transformers makes when it loads the file: out of several tensors, out of a
            part of one, or by transposing one.
        hint: advice for errors about names that do not fit.
        network: the transformers model that gave the names, without weights; None where the names are of other origin.
    """

    files: dict[str, str]
    built: frozenset[str] = frozenset()
    hint: str = HINT
    network: Any = None

    def modules(self) -> set[str]:
        """Return the names of all modules that hold a tensor, at any depth."""
        return {module for name in (*self.files, *self.built) for module in parent_names(name)}


def own_names(base: Weights) -> ModuleNames:
    """Return the file's own names, without the segments of wrappers such as torch.compile's."""
    return ModuleNames({canonical(name): name for name in base.locations})


def renamed(base: Weights, pairs: Sequence[str]) -> ModuleNames:
    """Rename the tensors of a file by regular expressions, applied one after the other, wherever they match.

    Args:
        base: the weights.
        pairs: each "OLD=NEW". Groups of OLD are \\1, \\2, ... in NEW.

    Raises:
        LoRAError: a pair has another form or matches nothing, or two tensors get the same name.
    """
    names = {name: canonical(name) for name in base.locations}
    for pair in pairs:
        old, separator, new = pair.rpartition("=")  # the last "=": OLD may hold one, and a name does not
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
    """Return the names that from_pretrained gives to the tensors of a folder.

    Builds the class that config.json names, without weights, and runs no code from the folder. Without transformers 5,
    or for a class that it does not have, return the file's own names.
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
    except Exception as error:  # for a wrong configuration a class may raise anything
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
    """Name each tensor by the rules of transformers' convert_and_load_state_dict_in_model."""
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
    """Return names of the file by those of the model.

    Raises:
        LoRAError: two tensors of the file have one name in the model.
    """
    files: dict[str, str] = {}
    for name, module_name in names:
        if module_name in files:
            raise LoRAError(f"{base.path}: {files[module_name]!r} and {name!r} both become {module_name!r}.")
        files[module_name] = name
    return ModuleNames(files)
