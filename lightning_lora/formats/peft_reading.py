"""PEFT's tensors as an adapter: the same steps in the same order for a folder, a lone file and a state dict.

Sources differ in how much they tell beside their tensors. A Source holds that:

    description           in the header of a file that this package wrote: options, kinds, fingerprint
    options               adapter_config.json
    nothing               ranks are in the shapes; other options have to come from an injected model

A folder that this package wrote has a description and options. The description counts. If somebody edited the options,
peft_edited.py decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from ..adapter.adapter import Adapter
from ..adapter.checks import check_factors
from ..adapter.file_options import check_options
from ..adapter.layer_options import exact_options
from ..adapter.metadata import from_metadata
from ..config import LoRAConfig
from ..errors import LoRAError, shown
from ..names import A, B, parent_names
from ..nn.variant import Variant
from .equal_tables import ties_of
from .peft_attention import refuse_file_beside_conv1d
from .peft_edited import honour_options
from .peft_equivalents import idle_attention, with_enable_lora
from .peft_forms import config_in_peft, from_peft_form
from .peft_kinds import kinds_of
from .peft_names import PeftNames, read_names
from .peft_options import options_from_peft, origin_of
from .peft_parameters import (
    Nesting,
    Order,
    nesting_in_peft,
    nesting_of,
    nesting_of_metadata,
    usual_order,
)
from .peft_rows import rows_from_peft
from .peft_saved_modules import entries_in
from .peft_stacks import stacks_from_peft, with_kinds_of_stacks

FROZEN = "frozen"  # in the description: the tensors that were not trained, and are in the file because PEFT wants them
IDLE = "idle"  # in the description: the attention layers that add_idle_attention added

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, which training changes

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """What is known of PEFT's tensors beside names and values.

    Attributes:
        where: the file or folder, for messages.
        options_path: adapter_config.json, for messages.
        options: its fields, as a peft.LoraConfig has them.
        variant: the variant of the options.
        description: what this package wrote into the header of the tensor file.
        order: the order in which modules register parameters. Only the model tells it.
    """

    where: object
    options_path: Path | None = None
    options: Mapping[str, Any] | None = None
    variant: Variant | None = None
    description: Mapping[str, Any] | None = None
    order: Order = usual_order

    def nesting(self, wrapped: Mapping[str, int]) -> Nesting:
        """Return which parameters the adapters of each module belong to, given how many adapters it has."""
        if self.description is not None:
            return nesting_of_metadata(self.description, self.where)
        if self.options is not None:
            return nesting_in_peft(self.options, wrapped, self.order, self.where)
        return {}


def read_peft(tensors: Tensors, source: Source) -> Adapter:
    """Make an adapter of tensors under PEFT's names, those of a file or of a live PeftModel's state dict.

    Args:
        tensors: by PEFT's names.
        source: what else is known of them.

    Raises:
        LoRAError: tensors and options are damaged or do not go together, or this package cannot apply them.
    """
    names = read_names(tensors, source.where, source.nesting, written_here=source.description is not None)
    ours = {ours: tensors[theirs] for theirs, ours in names.ours.items()}
    if source.description is not None:
        adapter = from_metadata(ours, source.description, str(source.where))
    elif source.options is not None:
        adapter = _described_by_options(ours, names, source)
    else:
        adapter = _described_by_names(ours, names, source)
    in_peft = _with_our_stacks(adapter, source.where)
    adapter = _without_additions(in_peft, source) if source.description is not None else in_peft
    adapter = from_peft_form(with_enable_lora(adapter))
    check_factors(adapter, str(source.where))
    refuse_file_beside_conv1d(adapter, source.where)
    if source.options is None:
        return adapter
    if source.description is None:
        return _without_idle_attention(with_kinds_of_stacks(adapter, source.where))
    return honour_options(adapter, in_peft, source.options, cast(Path, source.options_path))


def _described_by_options(tensors: Tensors, names: PeftNames, source: Source) -> Adapter:
    """Return the adapter that adapter_config.json describes, unchecked and in PEFT's form."""
    options, variant = cast(Mapping[str, Any], source.options), cast(Variant, source.variant)
    bare = rows_from_peft(Adapter(tensors), options, source.where)
    layers = bare.layers()
    whole = bare.beside_factors()
    kinds = kinds_of(tensors, names.bare, options.get("peft_version"), source.where)
    check_options(options, layers, source.options_path)
    config = options_from_peft(options, bare.module_layers, whole, bare.tables, variant.name)
    several = [leaves for leaves in nesting_of(bare.parameters).values() if len(leaves) > 1]
    return replace(
        bare,
        config=config,
        scalings={name: config.scaling(bare.options_name(name)) for name in layers},
        kinds=kinds,
        perhaps_base=_perhaps_base_in_folder(whole, names, options, config.bias),
        origin=origin_of(options),
        fan_in_fan_out=options.get("fan_in_fan_out") is True,
        peft_version=str(options.get("peft_version") or ""),
        assumed_order=several if source.order is usual_order else (),
    )


def _perhaps_base_in_folder(
    whole: Mapping[str, Any], names: PeftNames, options: Mapping[str, Any], bias: str
) -> frozenset[str]:
    """Return the names of whole tensors in a folder that may have the base's values.

    PEFT saves embeddings beside the adapter where they are adapted, as they are, and where they were resized. The other
    end of a tied weight that was trained is not in modules_to_save either.
    """
    ends = tuple(entries_in(options))
    saved = {name for name in whole if ends and any(module.endswith(ends) for module in parent_names(names.bare[name]))}
    base_leaves = ("weight", "bias") if bias == "none" else ("weight",)
    dumped = {name for name in whole if name.rpartition(".")[2] in base_leaves and name not in saved}
    return frozenset(dumped - ties_of(saved, whole))


def _described_by_names(tensors: Tensors, names: PeftNames, source: Source) -> Adapter:
    """Return the adapter that names and shapes describe, without options."""
    rows = Adapter(tensors).rows()
    if rows:
        raise LoRAError(
            f"{source.where}: holds trained rows of {next(iter(rows))!r}, and not which rows these are: that is in "
            "adapter_config.json alone. Write a folder with PeftModel.save_pretrained(path), and give that."
        )
    kinds = kinds_of(tensors, names.bare, None, source.where)
    adapter = Adapter(tensors, kinds=kinds, network=names.network, peft_version="")
    return replace(adapter, perhaps_base=_perhaps_base_in_state(adapter.beside_factors(), names))


def _perhaps_base_in_state(whole: Mapping[str, Any], names: PeftNames) -> frozenset[str]:
    """Return the names of whole tensors that may have the base's values, where no options say what was trained."""
    if not names.live:
        return frozenset(name for name in whole if name in names.of_layers and name.endswith(".weight"))
    trained = {name for name in whole if names.saved.intersection(parent_names(name))}
    return frozenset(name for name in whole if name not in trained and name.rpartition(".")[2] not in STATISTICS)


def _with_our_stacks(adapter: Adapter, where: object) -> Adapter:
    """Return the adapter with the factors of each single parameter laid out as ours."""
    config = config_in_peft(adapter) or LoRAConfig()
    return replace(adapter, tensors=stacks_from_peft(adapter.tensors, factor_names(adapter), config, where))


def factor_names(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of each parameter that is adapted by itself."""
    return {name: (adapter.factor_name(name, A), adapter.factor_name(name, B)) for name in adapter.parameters}


def _without_additions(adapter: Adapter, source: Source) -> Adapter:
    """Return the adapter without what the description lists as written for PEFT alone: idle attention, frozen tensors.

    Raises:
        LoRAError: the description is damaged, or the factors of idle attention are not zero any more.
    """
    description, where = cast(Mapping[str, Any], source.description), source.where
    idle, frozen = description.get(IDLE, []), description.get(FROZEN, [])
    if not isinstance(idle, list):
        raise LoRAError(f"{where}: the adapter's description is damaged: {IDLE} is {shown(idle)}.")
    changed = [name for name in idle if name not in idle_attention(adapter)]
    if changed:
        raise LoRAError(f"{where}: the factors of {changed[0]!r} must be zero; something changed them after saving.")
    in_both = adapter.tensors.keys() & adapter.fingerprint.keys()  # the fingerprint is of frozen tensors
    if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen) or set(frozen) != in_both:
        raise LoRAError(f"{where}: the adapter's description is damaged: {FROZEN} is {shown(frozen, 80)}.")
    kept = {name: value for name, value in adapter.tensors.items() if name not in in_both}
    return replace(adapter, tensors=kept).without_layers(idle)


def _without_idle_attention(adapter: Adapter) -> Adapter:
    """Return an adapter of PEFT's without attention that does nothing, where its out_proj alone does something."""
    idle = [name for name in idle_attention(adapter) if f"{name}.out_proj" in adapter.kinds]
    if not idle:
        return adapter
    adapter = adapter.without_layers(idle)
    config = cast(LoRAConfig, adapter.config)
    return replace(adapter, config=exact_options(config, adapter.ranks(), adapter.scalings, adapter.parameters))
