"""Starts from the weight: A and B start as A0 and B0, and B0 @ A0 is subtracted again, so that W' starts as W.

pissa          s * B0 @ A0 is the weight's best approximation of rank r (arXiv:2404.02948)
pissa_niter_n  the same approximately, by n steps of subspace iteration from a random start
olora          B0 @ A0 is Q[:, :r] @ R[:r] for W = Q @ R, without division by s (arXiv:2406.01775, as in PEFT)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ..config import LoRAConfig, starts_from_weight
from ..distributed.sharding import full_tensor
from ..errors import LoRAError
from ..names import A, B
from . import low_rank
from .autocast import without_autocast
from .lora import LoRA
from .random_stream import leading_basis, stream
from .variant import START_OPTION, EffectiveFactors, LayerInfo, Stored, Weight

Pair = tuple[torch.Tensor, torch.Tensor]

LEAST_BLOCKS = 10  # a Krylov space must be able to grow to so many blocks to be worth a search
SPARE = 8  # a block of the Krylov space has so many vectors more than are wanted

PISSA, STEPS, OLORA = "pissa", "pissa_niter_", "olora"

START_A, START_B = "lora_start_A", "lora_start_B"  # leaf names of A0 and B0


class Started(LoRA):
    """LoRA whose A and B start from the weight or from data. The weight gets s * (B @ A - B0 @ A0) added."""

    name, asked_by = "", START_OPTION
    frozen = (START_A, START_B)
    split_like: ClassVar[Mapping[str, str]] = {A: A, B: B, START_A: A, START_B: B}
    follows_weight = True
    peft_type = "LORA"

    def shapes(self, info: LayerInfo) -> dict[str, tuple[int, ...]]:
        return dict(zip((A, B, START_A, START_B), 2 * info.factor_shapes(), strict=True))

    def start(self, info: LayerInfo, weight: Weight) -> dict[str, torch.Tensor]:
        if not starts_from_weight(info.init):
            plain = super().start(info, weight)
            return {**plain, START_A: plain[A], START_B: plain[B]}
        if info.kind not in low_rank.STARTED:
            raise LoRAError(
                f"{info.name!r}: init_lora_weights={info.init!r} cannot start a layer of the kind {info.kind!r}: its A "
                f"and B are no factors of a matrix. Leave it out with exclude_modules=[{info.name!r}], or choose "
                "another init_lora_weights."
            )
        try:
            pairs = [
                start_factors(part, info.rank, info.scaling, str(info.init), info.seed)
                for part in low_rank.adapted_parts(info.kind, full_tensor(weight()), info.enabled)
            ]
        except LoRAError as error:
            raise LoRAError(f"{info.name!r}: {error}.") from None
        shape_a, shape_b = info.factor_shapes()
        a = torch.cat([a for a, _ in pairs]).reshape(shape_a)
        b = torch.cat([b for _, b in pairs]).reshape(shape_b)
        return {A: a, B: b, START_A: a, START_B: b}

    def is_initial(self, stored: Stored, info: LayerInfo) -> bool:
        pairs = ((stored[A], stored[START_A]), (stored[B], stored[START_B]))
        return all(not now.is_meta and torch.equal(now, start) for now, start in pairs)

    def effective_factors(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> EffectiveFactors:
        """Return [A; A - A0] and [B - B0, B0], whose product is B @ A - B0 @ A0.

        Before training the product is exactly zero. Later no large terms cancel, in any dtype.
        """
        a, b, start_a, start_b = stored[A], stored[B], stored[START_A].detach(), stored[START_B].detach()
        if a.dtype in low_rank.HALF:  # 16 bits would round the differences
            a, b = a.float(), b.float()
        return EffectiveFactors(*low_rank.stack_ranks(a, b - start_b, a - start_a, start_b.to(b.dtype)))

    def options(self) -> dict[str, Any]:
        return {"init_lora_weights": PISSA}  # A0 and B0 are stored, so any start serves

    def to_peft(self, stored: Stored, info: LayerInfo) -> dict[str, torch.Tensor]:
        """Return plain LoRA of twice the rank that adds the same to the unchanged base: [B, -B0] @ [A; A0].

        PEFT converts such adapters in the same way. Each part of a fused projection and each expert of a stack is
        converted by itself.
        """
        a, b = low_rank.stack_ranks(stored[A], stored[B], stored[START_A], -stored[START_B])
        return {A: a, B: b}

    def from_peft(self, found: Stored, info: LayerInfo) -> dict[str, torch.Tensor]:
        a, b = found[A], found[B]
        if b.shape[1] % 2 or a.shape[0] % b.shape[1]:
            raise LoRAError(
                f"adapter: {info.name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} should have twice the rank of "
                f"init_lora_weights={info.init!r}; something changed them after they were saved."
            )
        (a, b), (start_a, negative_b) = low_rank.halve_ranks(a, b)
        return {A: a, B: b, START_A: start_a, START_B: -negative_b}

    def config_in_peft(self, config: LoRAConfig) -> LoRAConfig:
        """Return the options with twice the rank. lora_alpha grows too, so that the scalings stay."""
        growth = config.divisor(2)  # sqrt(2) with use_rslora: s = lora_alpha / divisor(r), and r doubles
        return replace(
            config,
            r=2 * config.r,
            lora_alpha=growth * config.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
            alpha_pattern={key: growth * alpha for key, alpha in (config.alpha_pattern or {}).items()},
            init_lora_weights=True,
        )


@torch.no_grad()
def start_factors(weight: torch.Tensor, rank: int, scaling: float, init: str, seed: int) -> Pair:
    """Return A0 (rank, in) and B0 (out, rank) for a weight (out, in), in float32 or float64.

    Args:
        weight: a floating point matrix.
        rank: r.
        scaling: s.
        init: LoRAConfig's init_lora_weights: "pissa", "pissa_niter_<n>" or "olora".
        seed: of the random start of subspace iteration. torch's own random stream is not advanced.

    Raises:
        LoRAError: the weight has no values, is not finite, or has fewer rows or columns than the rank.
    """
    check_decomposable(weight, rank, f"init_lora_weights={init!r}")
    with without_autocast(weight.device.type):
        if init == OLORA:
            values = _at_least_float32(weight)
            # The first r columns of Q depend on the first r columns of W only, so only these are decomposed.
            q = torch.linalg.qr(values[:, :rank])[0]
            return q.T @ values, q
        if init == PISSA:
            left, projected = _leading_exactly(weight, rank, seed)
        else:
            left, projected = _leading_by_iteration(weight, rank, int(init.removeprefix(STEPS)), seed)
        # A0 = sqrt(S / s) @ V.T and B0 = U @ sqrt(S / s), so that s * B0 @ A0 = U @ S @ V.T.
        dtype, singular = _at_least_float32(weight[:0]).dtype, projected.norm(dim=1)
        a = projected / _positive((singular * scaling).sqrt())[:, None]  # S over this root is sqrt(S / s)
        return a.to(dtype), (left * (singular / scaling).sqrt()).to(dtype)


def check_decomposable(weight: torch.Tensor, rank: int, option: str) -> None:
    """Refuse a weight whose `rank` largest singular values cannot be computed.

    The message starts with `option` and has no full stop. The caller puts the layer's name before it.

    Raises:
        LoRAError: the weight has no values, is not finite, or has fewer rows or columns than the rank.

    Example::

        >>> check_decomposable(torch.ones(4, 4), 8, "variant='square'")
        Traceback (most recent call last):
        lightning_lora.errors.LoRAError: variant='square' needs r of at most 4 for a weight of 4 by 4, but r is 8...
    """
    if weight.is_meta:
        raise LoRAError(
            f"{option} needs the values of the weight, which is on the meta device; inject after the weights are "
            "loaded (in configure_model: build the layers, load them, then call inject), or choose another "
            f"{option.partition('=')[0]}"
        )
    if rank > min(weight.shape):
        raise LoRAError(
            f"{option} needs r of at most {min(weight.shape)} for a weight of {weight.shape[0]} by {weight.shape[1]}, "
            f"but r is {rank}; give it another in rank_pattern"
        )
    if not torch.isfinite(weight).all():
        raise LoRAError(f"{option} needs finite weights, and this one holds NaN or Inf")


def _at_least_float32(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _leading_exactly(weight: torch.Tensor, rank: int, seed: int) -> Pair:
    """Return U (out, rank) and U.T @ W for the leading left singular vectors U, to the precision of W's dtype.

    U are the leading eigenvectors of the Gram matrix of W's smaller side, in float64. For a large matrix, a search in a
    Krylov space finds them in a fraction of the time, unless the singular values are as flat as those of a random
    matrix.
    """
    tolerance = torch.finfo(_at_least_float32(weight[:0]).dtype).eps
    wide = (weight.cpu() if weight.device.type == "mps" else weight).double()  # mps has no float64
    is_tall = wide.shape[0] > wide.shape[1]
    wide = wide.T if is_tall else wide
    found = _leading_in_krylov_space(wide, rank, tolerance, seed)
    if found is None:
        vectors = torch.linalg.eigh(wide @ wide.T)[1][:, -rank:].flip(1)
        found = vectors, vectors.T @ wide
    return _turned(*found) if is_tall else found


def _leading_in_krylov_space(wide: torch.Tensor, rank: int, tolerance: float, seed: int) -> Pair | None:
    """Search for the leading left singular vectors of W in a Krylov space (arXiv:1504.05477).

    Measured against eigh on two cores, r = 16, singular values that fall as i^-0.25 to i^-0.5: 4 to 6 times as fast for
    2048 x 2048, 11 to 16 times for 4096 x 4096 (1.1 s instead of 12.5 s a layer). Below 960 rows nothing is searched.

    The space is spanned by X, G @ X, G @ G @ X, ... for a random block X and G = W @ W.T.

    Returns:
        U and U.T @ W, or None if a space with a quarter of the dimensions of G does not contain them. The angle between
        U and the exact vectors is below the tolerance: it is at most the residual over the gap between the eigenvalues
        of U and the others.
    """
    size = rank + SPARE
    if wide.shape[0] < 4 * LEAST_BLOCKS * size:
        return None
    block = torch.linalg.qr(wide @ _draw(wide.shape[1], size, seed).to(wide))[0]
    basis, projected = wide.new_empty(wide.shape[0], 0), wide.new_empty(0, wide.shape[1])
    while 4 * (basis.shape[1] + size) <= wide.shape[0]:
        rows = block.T @ wide
        basis, projected = torch.cat([basis, block], 1), torch.cat([projected, rows])
        values, inside = torch.linalg.eigh(projected @ projected.T)
        vectors, leading = basis @ inside[:, -rank:], inside[:, -rank:].T @ projected
        residual = torch.linalg.matrix_norm(wide @ leading.T - vectors * values[-rank:])
        if residual <= tolerance * (values[-rank] - values[-rank - 1]):
            return vectors.flip(1), leading.flip(0)
        block = wide @ rows.T
        for _ in range(2):  # one pass leaves rounding errors behind
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return None


def _leading_by_iteration(weight: torch.Tensor, rank: int, steps: int, seed: int) -> Pair:
    """Return an approximation of U and U.T @ W by torch.svd_lowrank's method.

    The random start is drawn on the CPU, so that it is the same for each device.
    """
    weight = _at_least_float32(weight)
    if weight.shape[0] < weight.shape[1]:
        return _turned(*_leading_by_iteration(weight.T, rank, steps, seed))
    basis = leading_basis(weight, _draw(weight.shape[1], rank, seed).to(weight), steps)
    inside = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ inside.U, inside.S[:, None] * inside.Vh


def _draw(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=stream(seed), device="cpu")


def _turned(left: torch.Tensor, projected: torch.Tensor) -> Pair:
    """Return U and U.T @ W of a weight, for U and U.T @ W of its transpose."""
    values = projected.norm(dim=1)
    return projected.T / _positive(values), values[:, None] * left.T


def _positive(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)
