"""What a Lightning checkpoint of each kind holds, and the adapter in it.

    adapter  state_dict holds what training changes, and no base tensor
    merged   state_dict holds plain merged weights; checkpoint["lora"]["adapter"] what training changes
    full     state_dict holds base and adapter

checkpoint["lora"] describes the adapter in each kind. Its names have no segments of wrappers such as torch.compile's.
The state_dict of a merged or full checkpoint has the LightningModule's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from ..adapter.adapter import Adapter
from ..adapter.checks import check_factors
from ..adapter.metadata import check_format, from_metadata, to_metadata, without
from ..errors import LoRAError
from ..files.paths import reading
from ..names import META, canonical
from ..nn.foreign_entries import ForeignEntries
from ..nn.quantized import quantization_entries

CURRENT = "current_model_state"  # where WeightAveraging keeps the weights beside their average in state_dict
# In the metadata of a full checkpoint: the beginnings of the names of frozen copies of adapted modules in state_dict,
# such as a policy's baseline. They are no part of the adapter.
COPIES = "copies"
FOREIGN = "foreign"  # in the metadata: the names of foreign entries in state_dict, and the versions of their modules

Kind = Literal["adapter", "merged", "full"]


def check_kind(kind: object) -> None:
    """Raise LoRAError unless `kind` is a kind of checkpoint."""
    if kind not in get_args(Kind):
        raise LoRAError(f"LoRACallback: save must be one of {', '.join(get_args(Kind))}, but it is {kind!r}.")


def by_canonical_names(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state dict by names without the segments of wrappers."""
    return {canonical(str(name)): value for name, value in state.items()}


def checkpoint_metadata(kind: Kind, adapter: Adapter) -> dict[str, Any]:
    """Return what checkpoint["lora"] holds in each kind: the kind and the adapter's metadata."""
    foreign = {"names": list(adapter.foreign.values), "versions": dict(adapter.foreign.versions)}
    return {
        "kind": kind,
        **({FOREIGN: foreign} if adapter.foreign.values else {}),
        **to_metadata(adapter),
    }


def adapter_in_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[Adapter, Kind]:
    """Return the adapter in a checkpoint that this package wrote, and the checkpoint's kind.

    Raises:
        LoRAError: checkpoint["lora"] is missing or not of a known form.
    """
    meta = checkpoint.get(META)
    if not isinstance(meta, Mapping) or meta.get("kind") not in [*get_args(Kind)]:
        raise LoRAError(
            'checkpoint["lora"]: is missing or damaged; this is not a checkpoint of lightning_lora. One of plain '
            "Lightning, without an adapter, is loaded by its class's own load_from_checkpoint."
        )
    check_format(meta, 'checkpoint["lora"]')
    kind: Kind = meta["kind"]
    tensors = meta.get("adapter") if kind == "merged" else checkpoint.get("state_dict")
    if not isinstance(tensors, Mapping):
        raise LoRAError('checkpoint["lora"]: the tensors are missing; the file is damaged.')
    foreign = _foreign_in(checkpoint, meta.get(FOREIGN))
    tensors = without(by_canonical_names(tensors), foreign.values)
    copies = copies_in(meta)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(copies)}
    adapter = replace(from_metadata(tensors, meta, 'checkpoint["lora"]'), foreign=foreign)
    if kind == "full":
        base = adapter.fingerprint.keys() | quantization_entries(tensors, adapter.fingerprint)
        adapter = replace(adapter, tensors={n: value for n, value in tensors.items() if n not in base})
    check_factors(adapter, 'checkpoint["lora"]')
    return adapter, kind


def copies_in(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the beginnings of the names of frozen copies in a checkpoint's state_dict, from its metadata."""
    with reading(f'checkpoint["lora"]["{COPIES}"]', "names of frozen copies"):
        return tuple(map(str, meta.get(COPIES, ())))


def _foreign_in(checkpoint: Mapping[str, Any], described: Any) -> ForeignEntries:
    """Return the entries of a checkpoint's state_dict that its metadata names as foreign."""
    if described is None:
        return ForeignEntries()
    state = by_canonical_names(checkpoint.get("state_dict") or {})
    with reading(f'checkpoint["lora"]["{FOREIGN}"]', "names and versions of foreign entries"):
        return ForeignEntries({name: state[name] for name in described["names"]}, dict(described["versions"]))
