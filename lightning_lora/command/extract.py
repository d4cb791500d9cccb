"""Extract an adapter from a full fine-tune: the change of each weight, cut to its R largest singular values."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapter.adapter import Adapter, Layer
from ..adapter.base_files import fingerprint_of_files
from ..adapter.products import truncated_svd
from ..config import LoRAConfig
from ..errors import LoRAError, sentence
from ..files.weights import Weights
from ..formats.peft_options import with_ranks_in_options
from ..matching import names_match, naming_some, near_misses
from ..names import A, B
from ..nn.low_rank import (
    ATTENTION_OUTPUT,
    CONV,
    CONV1D,
    EMBEDDING,
    IN_PROJ,
    LINEAR,
    MERGEABLE_DTYPES,
    factor_shapes,
    matrix_view,
)
from ..progress import progress_bar
from .output import refuse_quantized

EMBEDDING_NAMES = re.compile(r"(?!embed_out$)(.*emb.*|wte|wpe|shared)", re.IGNORECASE)
TRANSPOSED_NAMES = re.compile(r"deconv|conv_?transpose|transposed?_?conv", re.IGNORECASE)


@dataclass
class Extracted:
    """An adapter from a full fine-tune, and how much of the change it keeps.

    Attributes:
        adapter: of the base.
        kept: by layer, the share of the squared norm of the change that the adapter keeps, between 0 and 1.
        dropped: changed tensors that the adapter does not hold.
        squares: by layer, the squared norm of the change.
    """

    adapter: Adapter
    kept: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)

    def total(self) -> float:
        """Return the kept share of the squared norm of all adapted layers' changes."""
        whole = sum(self.squares.values())
        return sum(self.kept[name] * self.squares[name] for name in self.kept) / whole if whole else 1.0


def extract(
    base: Weights,
    tuned: Weights,
    rank: int,
    *,
    exclude: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    drop_rest: bool = False,
) -> Extracted:
    """Make the adapter of the given rank that is closest to the change from `base` to `tuned`.

    Weights of two and more dimensions are adapted. Other tensors that changed are carried whole. So are transposed
    convolutions, which the size of the bias tells, or else the name; exclude those that neither tells.

    The arguments are those of the command.

    Raises:
        LoRAError: names or shapes differ, a change can be neither adapted nor carried, or an entry names no module.
    """
    _refuse_other_model(base, tuned)
    _refuse_idle_entries(base, exclude=exclude, embeddings=embeddings)
    changed = _changed_names(base, tuned)
    modules = [name.removesuffix(".weight") for name in changed if _is_adaptable(name, base)]
    adapted = [module for module in modules if not names_match(list(exclude), module)]
    if not adapted:
        raise LoRAError(f"extract: no weight of two dimensions or more differs between {base.path} and {tuned.path}.")
    kinds = {module: _kind(module, base, embeddings, fan_in_fan_out) for module in adapted}
    whole, options = ({}, {}) if drop_rest else _carried(base, tuned, changed, adapted)
    config = LoRAConfig(r=rank, target_modules=adapted, **options)
    tensors: dict[str, Any] = {}
    kept, squares = {}, {}
    with progress_bar("extracting", len(kinds)) as advance:
        for module, kind in kinds.items():
            a, b, kept[module], squares[module] = _factors(_change(f"{module}.weight", base, tuned), rank, kind)
            tensors |= {f"{module}.{A}": a, f"{module}.{B}": b}
            advance(1)
    frozen = {name: each for name, each in base.tensors.items() if name not in whole}
    adapter = Adapter(
        tensors={**tensors, **whole},
        config=config,
        fingerprint=fingerprint_of_files(frozen),
        fan_in_fan_out=fan_in_fan_out,
    ).with_layers({module: Layer(scaling=1.0, kind=kind) for module, kind in kinds.items()})
    dropped = [name for name in changed if name.removesuffix(".weight") not in kinds and name not in whole]
    return Extracted(with_ranks_in_options(adapter), kept, dropped, squares)


def _refuse_other_model(base: Weights, tuned: Weights) -> None:
    for weights in (base, tuned):
        refuse_quantized("extract", weights)
        weights.compare_check_sums()
    for name in sorted({*base.tensors, *tuned.tensors}):
        shapes = [tuple(each.tensors[name].shape) if name in each.tensors else None for each in (base, tuned)]
        if shapes[0] == shapes[1]:
            continue
        found = f"has shape {shapes[0]} in {base.path} and {shapes[1]} in {tuned.path}"
        if None in shapes:
            found = f"is only in {tuned.path if shapes[0] is None else base.path}"
        raise LoRAError(f"extract: {name!r} {found}; give two versions of one model.")


def _refuse_idle_entries(base: Weights, **entries_of: Sequence[str]) -> None:
    """Raise LoRAError for the first entry of an option that names no module with tensors of its own."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in base.tensors))
    for option, entries in entries_of.items():
        for entry in entries:
            if not naming_some([entry], modules):
                found = f"--{option} {entry!r} names no module that has tensors{near_misses(entry, modules)}"
                raise LoRAError(f"extract: {base.path}: {sentence(found)}")


def _changed_names(base: Weights, tuned: Weights) -> list[str]:
    """Return the names of the tensors that differ in the dtype of the base. NaN is equal to NaN."""
    changed = []
    with progress_bar("comparing", base.nbytes, "bytes") as advance:
        for name, before in base.tensors.items():
            after = tuned.tensors[name].to(before.dtype)
            if not ((before == after) | (before.isnan() & after.isnan())).all():
                changed.append(name)
            advance(before.nbytes)
    return changed


def _change(name: str, base: Weights, tuned: Weights) -> torch.Tensor:
    """Return tuned - base, in float32 or in the wider dtype of the two.

    Raises:
        LoRAError: a value of the difference is not finite.
    """
    before, after = base.tensors[name], tuned.tensors[name]
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    change = after.to(dtype) - before.to(dtype)
    if not change.isfinite().all():
        raise LoRAError(
            f"extract: the change of {name!r} is not finite (NaN, Inf, or beyond the range of {dtype}), and no adapter "
            f"can carry it; leave it out with --exclude {name.rpartition('.')[0]}, which carries the weight whole."
        )
    return change


def _is_adaptable(name: str, base: Weights) -> bool:
    weight = base.tensors[name]
    if not name.endswith(".weight") or weight.dim() < 2 or weight.dtype not in MERGEABLE_DTYPES:
        return False
    return weight.dim() == 2 or not _is_transposed_convolution(name.removesuffix(".weight"), base)


def _is_transposed_convolution(module: str, base: Weights) -> bool:
    """Return whether a weight with a kernel is stored (in, out, k...): its bias tells, or else its name."""
    first, second, *_ = base.tensors[f"{module}.weight"].shape
    bias = base.tensors.get(f"{module}.bias")
    if bias is None or first == second:
        return bool(TRANSPOSED_NAMES.search(module))
    return tuple(bias.shape) != (first,)


def _kind(module: str, base: Weights, embeddings: Sequence[str], fan_in_fan_out: bool) -> str:
    if base.tensors[f"{module}.weight"].dim() > 2:
        return CONV
    parent, _, leaf = module.rpartition(".")
    if leaf == "out_proj" and f"{parent}.{IN_PROJ}" in base.tensors:  # of nn.MultiheadAttention
        return ATTENTION_OUTPUT
    if names_match(list(embeddings), module) or EMBEDDING_NAMES.fullmatch(leaf):
        return EMBEDDING
    return CONV1D if fan_in_fan_out else LINEAR


def _factors(change: torch.Tensor, rank: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return A, B, the share of the change's squared norm that B @ A keeps, and that squared norm.

    The change is divided by its largest value first. Otherwise the square of a small change would be zero.
    """
    matrix = matrix_view(kind, change)
    largest = matrix.abs().max()
    matrix = matrix / largest
    left, values, right = truncated_svd(matrix, rank)
    square = float(matrix.double().square().sum())
    share = min(1.0, float(values.double().square().sum()) / square)
    root = values.sqrt() * largest.sqrt()  # half of the scale for A, half for B
    shape_a, shape_b = factor_shapes(kind, change.shape, len(values))
    a, b = (root[:, None] * right).reshape(shape_a), (left * root).reshape(shape_b)
    return a.contiguous(), b.contiguous(), share, square * float(largest) * float(largest)


def _carried(
    base: Weights, tuned: Weights, changed: Sequence[str], adapted: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the other tensors that changed, whole, and the options for them: `bias` and `modules_to_save`."""
    containers = {"", *(module.rpartition(".")[0] for module in base.modules())}
    modules: list[str] = []
    biases = False
    for name in changed:
        owner, _, leaf = name.rpartition(".")
        if owner in adapted and leaf == "weight":
            continue
        if owner in containers or (owner in adapted and leaf != "bias"):
            raise LoRAError(
                f"extract: {name!r} changed, and neither an adapter nor modules_to_save can carry it alone; pass "
                "--drop-rest to leave out all that is not an adapted weight."
            )
        biases |= owner in adapted
        modules += [owner] if owner not in (*adapted, *modules) else []
    names = [name for name in base.tensors if name.rpartition(".")[0] in modules]
    names += [f"{module}.bias" for module in adapted if biases and f"{module}.bias" in base.tensors]
    whole = {name: tuned.tensors[name].clone() for name in names}
    return whole, {"modules_to_save": modules, "bias": "lora_only" if biases else "none"}
