"""Merged weights written to disk as safetensors, one tensor at a time: no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial, reduce
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..distributed.rank_sync import RankSync, writes_files
from ..errors import LoRAError
from ..files.atomic import new_folder
from ..files.model_folder import CONFIG, INDEX_SUFFIX, STEM, index_of, plan_shards, weight_files
from ..files.paths import PathLike, write_json
from ..files.safetensors import NAMES, Writer, build_header
from ..model.adapted_model import Listing, find_adapted, open_model
from ..model.dequantize import dequantize_dtype
from ..model.foreign_state import foreign_entries
from ..model.gradients import warn_of_untrained
from ..model.recorded_layers import refuse_replaced_layers
from ..model.state_dict import refuse_quantized, refuse_unmergeable
from ..model.wrappers import unwrapped
from ..nn.adapted_module import injections_of, is_factor
from ..nn.claims import claimed
from ..nn.low_rank import MERGEABLE_DTYPES
from ..nn.quantized import how_quantized, shape_of
from ..nn.rounding import IN_FILES, Rounding
from ..progress import progress_bar
from .merged_tensors import merged_tensor
from .pretrained_folder import (
    Part,
    find_network,
    one_part_each,
    parts_in_files,
    refuse_adapter_beside,
    write_configuration,
)

T = TypeVar("T")
INDEX = f"{STEM}{INDEX_SUFFIX}"
PT = {"format": "pt"}


def save_merged(
    model: nn.Module,
    path: PathLike,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dequantize: torch.dtype | str | None = None,
) -> None:
    """Write merged weights under the base's names, as a folder in the layout of Hugging Face models.

    The folder of a transformers model, or of a LightningModule that holds one, is for from_pretrained: it has the
    network's configuration, and the tensor names of save_pretrained. Weights of the LightningModule outside of the
    network are left out. If any of these were trained, the folder holds all weights under the LightningModule's names.
    Tensors that modules write into state_dict() of their own go along.

    The live weights stay as they are, merged or not. Where the model is sharded every rank calls this: each tensor is
    merged on its shards, gathered, written by the first rank and dropped. Any other model is written by each process
    that calls this; under DDP one is enough.

    Args:
        model: an injected model, or a part of one.
        path: the folder. A new one appears when it is complete. In one that exists the weights are replaced, and other
            files stay.
        max_shard_bytes: what does not fit into one `model.safetensors` of this size goes into several and an index.
        dequantize: the dtype of plain weights in place of quantized ones, adapted or not; one is dequantized at a
            time. What rounding W' costs is logged, as for 16-bit weights.

    Raises:
        LoRAError: the model was not injected, a layer cannot be merged, a weight is quantized and `dequantize` is not
            given, the folder holds an adapter that from_pretrained would load instead, or another rank failed. Nothing
            is written.
        OSError: on the rank whose writing failed.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> save_merged(model, "merged")
        >>> from safetensors.torch import load_file
        >>> sorted(load_file("merged/model.safetensors"))
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    listing = Listing(unwrapped(model, "save_merged"))
    injections = injections_of(listing.all_layers.values()) or [open_model(model, "save_merged").injection]
    dtype = dequantize_dtype(dequantize, "save_merged")
    with claimed("save_merged", *[injection.claims for injection in injections]):
        refuse_replaced_layers(listing, "save_merged")
        warn_of_untrained(listing)
        refuse_unmergeable(listing, dtype)
        _write_merged(listing, dtype, path, max_shard_bytes)


def _write_merged(listing: Listing, dtype: torch.dtype | None, path: PathLike, max_shard_bytes: int) -> None:
    """Write a folder of merged weights. Collective where the model is sharded.

    Args:
        listing: of the model.
        dtype: of plain weights in place of quantized ones, or None.
        path: the folder.
        max_shard_bytes: the size of a file.
    """
    prefix, network = find_network(find_adapted(listing, attached=True) or listing) or (
        "",
        None,
    )  # of transformers
    state = _base_tensors(listing, prefix)
    quantized = {name: kind for name, entry in state.items() if (kind := how_quantized(*entry))}
    if quantized and dtype is None:
        refuse_quantized(*next(iter(quantized.items())))
    plain = dict.fromkeys(quantized, dtype)
    stored = {name: _stored(tensor, plain.get(name)) for name, (tensor, _) in state.items()}
    parts = one_part_each(stored) if network is None else parts_in_files(network, stored)
    writes = writes_files(module for _, module in listing.modules)
    sync = RankSync(tensor for tensor, _ in state.values())
    rounding = Rounding(sync, again=True)

    def step(what: object, action: Callable[[], T] | None) -> T | None:
        """Let the rank that writes act, and raise on all ranks where it failed."""
        result = sync.run(f"save_merged: {what}", action if writes else None)
        sync.raise_on_any_rank()
        return result

    files = plan_shards(parts, lambda part: part.nbytes, max_shard_bytes)
    with ExitStack() as on_leaving:  # moves the new folder to its place, or removes it after an error
        opening = new_folder(path, replaced=weight_files())
        here = step(path, partial(on_leaving.enter_context, opening)) or Path()
        if network is not None:
            step(path, partial(refuse_adapter_beside, path))
            step(CONFIG, partial(write_configuration, network, here, _widest(parts) if quantized else None))
        advance = on_leaving.enter_context(progress_bar("saving", sum(part.nbytes for part in parts), "bytes"))
        for file, in_file in files.items():
            # Wide dtypes first, so that all are aligned.
            in_file.sort(key=lambda part: max(tensor.dtype.itemsize for tensor in part.stored.values()), reverse=True)
            header = build_header([(name, t.dtype, tuple(t.shape)) for name, t in _stored_in(in_file)], PT)
            writer = step(file, partial(Writer, here / file, header, advance))
            if writer is not None:
                on_leaving.callback(writer.close)
            for part in in_file:
                # Every rank takes part in merging and gathering each tensor, also after the writer has failed: one that
                # stopped here would leave the others waiting for it. The end of the file tells them.
                tensors = {
                    name: merged_tensor("save_merged", name, *state[name], rounding, plain.get(name)).cpu()
                    for name in part.names
                }
                sync.run(f"save_merged: {file}", partial(_write, writer, part, tensors) if writer is not None else None)
                del tensors  # before the next ones are made
            step(file, writer.close if writer is not None else None)
        if len(files) > 1:
            sizes = {file: {n: t.nbytes for n, t in _stored_in(in_file)} for file, in_file in files.items()}
            step(INDEX, partial(write_json, here / INDEX, index_of(sizes, {})))
        step(path, on_leaving.close)
    rounding.tell(f"{path}: 16-bit weights", IN_FILES, stacklevel=3)


def _write(writer: Writer, part: Part, tensors: dict[str, torch.Tensor]) -> None:
    made = part.convert(tensors)
    for name in part.stored:
        writer.write(made.pop(name))


def _widest(parts: Iterable[Part]) -> torch.dtype:
    """Return the dtype that holds all that is stored: with another one from_pretrained would round."""
    dtypes = [tensor.dtype for _, tensor in _stored_in(parts)]
    return reduce(torch.promote_types, [dtype for dtype in dtypes if dtype in MERGEABLE_DTYPES])


def _stored_in(parts: Iterable[Part]) -> list[tuple[str, torch.Tensor]]:
    return [item for part in parts for item in part.stored.items()]


def _base_tensors(listing: Listing, prefix: str) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    tensors, nobody = {}, nn.Module()
    foreign = foreign_entries(listing).values.items()
    written = ((name, value if isinstance(value, torch.Tensor) else None, nobody) for name, value in foreign)
    for name, tensor, module in (*listing.state(), *written):
        if not name.startswith(prefix):
            continue
        if tensor is None or tensor.dtype not in NAMES:
            found = "no tensor" if tensor is None else f"of {tensor.dtype}"
            raise LoRAError(f"save_merged: {name!r} is {found}, so safetensors cannot hold it; save a checkpoint.")
        if not is_factor(name, module):
            tensors[name.removeprefix(prefix)] = (tensor, module)
    return tensors


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor with the shape and dtype that will be written; the dtype is given for a quantized one."""
    if dtype is None and tensor.shape == shape_of(tensor):  # a slice of a weight has another shape
        return tensor
    return torch.empty(shape_of(tensor), dtype=dtype or tensor.dtype, device="meta")
