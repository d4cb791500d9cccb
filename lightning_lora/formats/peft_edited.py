"""adapter_config.json that somebody edited, beside this package's own description in the header of the tensors.

PEFT reads the JSON alone. So the JSON counts where an option does not depend on the tensors: scalings (lora_alpha,
use_rslora, alpha_pattern), lora_dropout, and the base's name. Ranks, variant, layers, rows and modules that were
trained whole are in the tensors too. A JSON that contradicts the tensors is refused, because PEFT would leave tensors
out or make others. The header counts for what PEFT does not know: kinds of layers, enable_lora, start factors,
fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..adapter.adapter import Adapter
from ..adapter.file_options import check_options
from ..adapter.layer_options import with_exact_ranks
from ..config import TASK_HEADS, VARIANTS, LoRAConfig
from ..errors import LoRAError, shown
from ..matching import matcher
from ..nn.low_rank import ATTENTION_OUTPUT
from .peft_forms import config_in_peft
from .peft_options import from_peft_options, options_from_peft, options_to_peft, origin_of
from .peft_rows import OPTION
from .peft_saved_modules import entries_in, taken_by

RANKS = ("r", "rank_pattern")
LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SAVED = ("modules_to_save", "task_type")
NOTHING: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class _Fields:
    """adapter_config.json's fields as they are, and as they were written."""

    path: Path
    found: Mapping[str, Any]
    written: Mapping[str, Any]

    def differing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if _comparable(self.found, name) != _comparable(self.written, name)]

    def require(self, names: Sequence[str], fits: Any = None) -> None:
        """Raise LoRAError where fields differ, unless fits() says that both values fit the tensors."""
        changed = self.differing(names)
        if changed and not (fits and fits()):
            name = changed[0]
            raise LoRAError(
                f"{self.path}: {name}={shown(self.found.get(name))} does not go with the tensors beside it, which were "
                f"saved with {name}={shown(self.written.get(name))}. Set it back, or train an adapter with that option."
            )


def honour_options(adapter: Adapter, plain: Adapter, options: Mapping[str, Any], path: Path) -> Adapter:
    """Return the adapter with the options of adapter_config.json.

    Args:
        adapter: the adapter that the header describes.
        plain: the same adapter with the tensors that PEFT reads.
        options: the fields of the JSON, as a peft.LoraConfig has them.
        path: of the JSON.

    Raises:
        LoRAError: somebody changed a field so that it does not go with the tensors.
    """
    config = adapter.config or LoRAConfig()
    in_peft = replace(plain, config=config_in_peft(replace(plain, config=config)))
    _, written = from_peft_options(options_to_peft(in_peft), path)
    fields = _Fields(path, options, written)
    check_options(options, plain.module_layers, path)
    stated = options_from_peft(options, plain.module_layers, plain.beside_factors(), plain.tables, config.variant)
    fields.require(RANKS, lambda: _has_ranks(plain, stated))
    fields.require((*VARIANTS, "bias", OPTION))
    fields.require(LAYERS, lambda: options.get("target_modules") and _selects_layers(plain, stated))
    fields.require(("target_parameters",), lambda: _selects_parameters(plain, stated))
    fields.require(SAVED, lambda: _taken(plain, fields.found) == _taken(plain, fields.written))
    if plain.parameters or ATTENTION_OUTPUT in plain.kinds.values():
        fields.require(("fan_in_fan_out",))  # elsewhere PEFT sets it right by itself
    scalings = {name: stated.scaling(plain.options_name(name)) for name in adapter.layers()}
    config = replace(config, lora_dropout=stated.lora_dropout)
    if not all(math.isclose(scaling, adapter.scalings[name]) for name, scaling in scalings.items()):
        config = with_exact_ranks(replace(config, use_rslora=stated.use_rslora), adapter.ranks(), scalings)
    return replace(adapter, config=config, scalings=scalings, origin=origin_of(options))


def _comparable(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field's value in a form in which values that mean the same are equal. The order of rows counts."""
    value = fields.get(name)
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if item not in NOTHING}
    if isinstance(value, list):
        return sorted(map(repr, value)) or None
    return None if value in NOTHING else value


def _has_ranks(adapter: Adapter, stated: LoRAConfig) -> bool:
    return all(stated.rank(adapter.options_name(name)) == rank for name, rank in adapter.ranks().items())


def _selects_layers(adapter: Adapter, stated: LoRAConfig) -> bool:
    outputs = {name for name in adapter.module_layers if adapter.options_name(name) != name}
    layers = {n for n in adapter.module_layers if n not in outputs and adapter.kinds.get(n) != ATTENTION_OUTPUT}
    known = {name.rpartition(".")[0] for name in (*adapter.tensors, *adapter.fingerprint)} - {""}
    targeted, excluded = stated.target(), matcher(stated.exclude_modules)
    selected = {name for name in known if targeted(name) and not excluded(name)}
    return selected == layers


def _selects_parameters(adapter: Adapter, stated: LoRAConfig) -> bool:
    known = {*adapter.parameters, *adapter.fingerprint}
    return set(filter(matcher(stated.target_parameters), known)) == set(adapter.parameters)


def _taken(adapter: Adapter, options: Mapping[str, Any]) -> set[str]:
    """Return the tensors that PEFT would take from the file whole."""
    entries = [*entries_in(options), *TASK_HEADS.get(cast(str, options.get("task_type")), ())]
    return taken_by(entries, {*adapter.beside_factors(), *adapter.fingerprint})
