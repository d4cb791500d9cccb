"""Extract an adapter from a full fine-tune: the change of each weight, cut to its R largest singular values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapter.adapter import Adapter, Layer
from ..adapter.base_files import fingerprint_of_files
from ..adapter.products import truncated_svd
from ..config import LoRAConfig
from ..errors import LoRAError, sentence
from ..files.weights import Weights
from ..formats.peft_options import with_ranks_in_words
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
from .output import refuse_quantised

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

    Args:
        base: the weights before.
        tuned: the weights after, under the same names.
        rank: R. A weight whose smaller dimension is less gets that rank.
        exclude: modules to carry whole, by names or dotted suffixes.
        embeddings: modules that are nn.Embedding, in addition to those whose name says so.
        fan_in_fan_out: linear weights are stored (in, out), as in transformers' Conv1D.
        drop_rest: leave other tensors that changed out instead of carrying them whole.

    Raises:
        LoRAError: names or shapes differ, a change can be neither adapted nor carried, or an entry names no module.
    """
    _refuse_idle_entries(base, exclude=exclude, embeddings=embeddings)
    changed = _changed_names(base, tuned)
    names = [name for name in changed if _adaptable(name, base) and not _excluded(name, exclude)]
    if not names:
        raise LoRAError(f"extract: no weight of two dimensions or more differs between {base.path} and {tuned.path}.")
    kinds = {module: _kind(module, base, embeddings, fan_in_fan_out) for module in _modules_of(names)}
    tensors, kept, squares = _all_factors(base, tuned, names, kinds, rank)
    whole, options = ({}, {}) if drop_rest else _carried(base, tuned, changed, set(kinds))
    frozen = {name: each for name, each in base.tensors.items() if name not in whole}
    adapter = Adapter(
        tensors={**tensors, **whole},
        config=LoRAConfig(target_modules=list(kinds), **options),
        fingerprint=fingerprint_of_files(frozen),
        fan_in_fan_out=fan_in_fan_out,
    ).with_layers({module: Layer(scaling=1.0, kind=kind) for module, kind in kinds.items()})
    dropped = [name for name in changed if name not in names and name not in whole]
    return Extracted(with_ranks_in_words(adapter), kept, dropped, squares)


def _refuse_idle_entries(base: Weights, **entries_of: Sequence[str]) -> None:
    """Raise LoRAError for the first entry of an option that names no module with tensors of its own."""
    modules = list(dict.fromkeys(_modules_of(list(base.tensors))))
    for option, entries in entries_of.items():
        known = naming_some(entries, modules)
        for entry in entries:
            if entry not in known:
                found = f"--{option} {entry!r} names no module that has tensors{near_misses(entry, modules)}"
                raise LoRAError(f"extract: {base.path}: {sentence(found)}")


def _changed_names(base: Weights, tuned: Weights) -> list[str]:
    """Return the names of the tensors that differ.

    Raises:
        LoRAError: a file is damaged, weights are quantised, or names or shapes differ.
    """
    for weights in (base, tuned):
        refuse_quantised("extract", weights)
        weights.compare_check_sums()
    _same_names(base, tuned)
    changed = []
    with progress_bar("comparing", base.nbytes, "bytes") as advance:
        for name, before in base.tensors.items():
            changed += [name] if _differs(before, tuned.tensors[name]) else []
            advance(before.nbytes)
    return changed


def _modules_of(names: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names]


def _all_factors(
    base: Weights, tuned: Weights, names: Sequence[str], kinds: Mapping[str, str], rank: int
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Return A and B of each changed weight by name, and what share and how much of its change each module keeps."""
    tensors: dict[str, Any] = {}
    kept, squares = {}, {}
    with progress_bar("extracting", len(names)) as advance:
        for name, module in zip(names, _modules_of(names), strict=True):
            change = _change(name, base.tensors[name], tuned.tensors[name])
            a, b, kept[module], squares[module] = _factors(change, rank, kinds[module])
            tensors |= {f"{module}.{A}": a, f"{module}.{B}": b}
            advance(1)
    return tensors, kept, squares


def _same_names(base: Weights, tuned: Weights) -> None:
    in_only_one = sorted(set(base.tensors) ^ set(tuned.tensors))
    if in_only_one:
        name = in_only_one[0]
        path = base.path if name in base.tensors else tuned.path
        raise LoRAError(
            f"extract: {name!r} is only in {path} (in all {len(in_only_one)}); give two versions of one model."
        )
    for name, before in base.tensors.items():
        if tuned.tensors[name].shape != before.shape:
            raise LoRAError(
                f"extract: {name!r} has shape {tuple(before.shape)} in the base and "
                f"{tuple(tuned.tensors[name].shape)} in the tuned weights; give two versions of one model."
            )


def _differs(before: torch.Tensor, after: torch.Tensor) -> bool:
    after = after.to(before.dtype)
    same = before == after
    if before.is_floating_point():
        same |= before.isnan() & after.isnan()
    return not bool(same.all())


def _change(name: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return tuned - base, in float32 or in the wider dtype of the two.

    Raises:
        LoRAError: a value of the difference is not finite.
    """
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    change = after.to(dtype) - before.to(dtype)
    if not change.isfinite().all():
        raise LoRAError(
            f"extract: the change of {name!r} is not finite (NaN, Inf, or beyond the range of {dtype}), and no adapter "
            f"can carry it; leave it out with --exclude {name.rpartition('.')[0]}, which carries the weight whole."
        )
    return change


def _adaptable(name: str, base: Weights) -> bool:
    weight = base.tensors[name]
    if not name.endswith(".weight") or weight.dim() < 2 or weight.dtype not in MERGEABLE_DTYPES:
        return False
    return weight.dim() == 2 or not _transposed_convolution(name.removesuffix(".weight"), base)


def _transposed_convolution(module: str, base: Weights) -> bool:
    """Return whether a weight with a kernel is stored (in, out, k...): its bias tells, or else its name."""
    first, second, *_ = base.tensors[f"{module}.weight"].shape
    bias = base.tensors.get(f"{module}.bias")
    if bias is None or first == second:
        return bool(TRANSPOSED_NAMES.search(module))
    return tuple(bias.shape) != (first,)


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    return names_match(list(exclude), name.rpartition(".")[0])


def _kind(module: str, base: Weights, embeddings: Sequence[str], fan_in_fan_out: bool) -> str:
    if len(base.tensors[f"{module}.weight"].shape) > 2:
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
    a, b = root[:, None] * right, left * root
    shape_a, shape_b = factor_shapes(kind, change.shape, len(values))
    return (
        a.reshape(shape_a).contiguous(),
        b.reshape(shape_b).contiguous(),
        share,
        square * float(largest) * float(largest),
    )


def _carried(
    base: Weights, tuned: Weights, changed: Sequence[str], adapted: set[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the other tensors that changed, whole, and the options for them: `bias` and `modules_to_save`."""
    not_adapted = [name for name in changed if not (name.endswith(".weight") and name.rpartition(".")[0] in adapted)]
    containers = {module.rpartition(".")[0] for module in base.modules()}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in not_adapted)
    biases = any(owner in adapted for owner in owners)
    modules = [owner for owner in owners if owner not in adapted]
    for name in not_adapted:
        owner, _, leaf = name.rpartition(".")
        if owner in containers or not owner or (owner in adapted and leaf != "bias"):
            raise LoRAError(
                f"extract: {name!r} changed, and neither an adapter nor modules_to_save can carry it alone; pass "
                "--drop-rest to leave out all that is not an adapted weight."
            )
    names = [n for n in base.tensors if n.rpartition(".")[0] in modules]
    names += [f"{module}.bias" for module in adapted if biases and f"{module}.bias" in base.tensors]
    whole = {name: tuned.tensors[name].clone() for name in names}
    return whole, {"modules_to_save": modules, "bias": "lora_only" if biases else "none"}
