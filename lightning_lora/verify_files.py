"""Reading a merged model again and comparing it with base and adapter, apart from the code that wrote it."""

from __future__ import annotations

import torch

from .errors import LoRAError
from .merge_files import Job
from .places import Place, read_rows
from .plan import Change, within
from .weights import Weights


def verify(job: Job, result: Weights) -> None:
    """Compare every tensor: merged ones with W + s * B @ A in float64, others with the base, names too.

    Raises:
        LoRAError: names the first difference.
    """
    odd = sorted(set(result.places) ^ set(job.base.places))
    if odd:
        raise LoRAError(f"verify: {odd[0]!r} is in only one of base and result.")
    for name, place in job.base.places.items():
        found = result.places[name]
        if (found.dtype, found.shape) != (job.result_dtype(name), place.shape):
            raise LoRAError(f"verify: {name!r} is {found.dtype} {found.shape}, expected {place.dtype} {place.shape}.")
        if place.in_order:
            _compare(name, place, found, job.changes.get(name))


def _compare(name: str, place: Place, found: Place, change: Change | None) -> None:
    with open(place.file, "rb") as before, open(found.file, "rb") as after:
        for first, count in place.chunks():
            old, new = read_rows(before, place, first, count), read_rows(after, found, first, count)
            if change is None and old.dtype == new.dtype:
                same = torch.equal(_bits(old), _bits(new))
            elif old.is_floating_point():
                same = _close(new, *_reference(old, change, first))
            else:
                same = torch.equal(change.applied(old, first) if change else old, new)
            if not same:
                raise LoRAError(
                    f"verify: {name!r} differs from what base and adapter give, in rows {first} to "
                    f"{first + count - 1}; the disk or the memory may be faulty. Nothing was written."
                )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _reference(old: torch.Tensor, change: Change | None, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result in float64, and the sum of all that took part in each element."""
    exact = old.double()
    if change is None:
        return exact, exact.abs()
    if change.value is not None:
        exact = (change.value[first : first + len(old)] if old.dim() else change.value).double()
        return exact, exact.abs()
    total = exact.abs()
    for piece in within(change.pieces, first, len(old)):
        left, right = piece.left.double() * change.scaling, piece.right.double()
        at = slice(piece.row, piece.row + left.shape[0]), slice(piece.col, piece.col + right.shape[1])
        exact.view(len(old), -1)[at] += left @ right
        total.view(len(old), -1)[at] += left.abs() @ right.abs()
    return exact, total


def _close(new: torch.Tensor, exact: torch.Tensor, total: torch.Tensor) -> bool:
    """Within half a unit of the dtype's last place, and the rounding of arithmetic in float32 or better."""
    info = torch.finfo(new.dtype)
    arithmetic = torch.finfo(torch.float64 if new.dtype == torch.float64 else torch.float32).eps * 8
    allowed = exact.abs() * (info.eps / 2 * 1.001) + total * arithmetic + info.tiny * info.eps
    found = new.double()
    return bool((((found - exact).abs() <= allowed) | (found == exact) | (found.isnan() & exact.isnan())).all())
