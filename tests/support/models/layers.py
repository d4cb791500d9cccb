"""Every kind of layer with an input for it, and weights to merge: with float64 references that share no code with
the package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn.low_rank import LowRankBlock
from support.models.foreign import OtherLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
R, ALPHA = 3, 4.5


class UserLinear(nn.Linear):
    """A user's subclass without a forward of its own."""

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = 2 * self(x)
        return result


class ActivatedLinear(nn.Linear):
    """A layer whose output is no linear function, so that the adapter cannot be added to it."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = F.softplus(super().forward(features))
        return result


class PaddedConv(nn.Conv2d):
    """Pads by hand, on one side only, as causal and 'same' convolutions do."""

    def forward(self, image: torch.Tensor, *, side: int = 2) -> torch.Tensor:
        return super().forward(F.pad(image, (side, 0, side, 0)))


class OwnConvForward(nn.Conv2d):
    """Replaces the inner forward, as weight-standardised convolutions do."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = super()._conv_forward(input, 2 * weight, bias)
        return result


class Attention(nn.Module):
    """Whose keys and values are parts of the queries."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key, value = x[..., : self.attention.kdim], x[..., : self.attention.vdim]
        result: torch.Tensor = self.attention(x, key, value, need_weights=False)[0]
        return result


class Holder(nn.Module):
    """A model with one layer to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


@dataclass(frozen=True)
class Case:
    """A plain layer, an input for it, and the parts that enable_lora names. `merges`: its weight can be merged."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 8)
    tokens: int = 0
    parts: tuple[bool, ...] | None = None
    keyword: str = "input"
    options: dict[str, Any] = field(default_factory=dict)
    merges: bool = True

    def make_input(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(self.tokens, self.shape) if self.tokens else torch.randn(self.shape).to(dtype)


def _conv(kind: str, *args: Any, size: int, batch: tuple[int, ...] = (2,), **options: Any) -> Case:
    dims = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}[kind]
    return Case(lambda: getattr(nn, kind)(*args, **options), (*batch, args[0], *[size] * dims))


CASES = {
    "linear": Case(lambda: nn.Linear(8, 6)),
    "linear, one vector": Case(lambda: nn.Linear(8, 6), (8,)),
    "linear, three axes": Case(lambda: nn.Linear(8, 6, bias=False), (2, 5, 8)),
    "user's linear": Case(lambda: UserLinear(8, 6)),
    "activated linear": Case(lambda: ActivatedLinear(8, 6), keyword="features"),
    "linear of another library": Case(lambda: OtherLinear(8, 6), (2, 5, 8), keyword="inp", merges=False),
    "transformers Conv1D": Case(lambda: Conv1D(6, 8), (2, 5, 8), keyword="x"),
    "fused, outer parts": Case(lambda: nn.Linear(8, 12), (2, 5, 8), parts=(True, False, True)),
    "fused, inner parts": Case(lambda: nn.Linear(8, 12), parts=(False, True, True, False)),
    "fused, all parts": Case(lambda: nn.Linear(8, 12), parts=(True, True)),
    "fused Conv1D": Case(lambda: Conv1D(12, 8), (2, 5, 8), parts=(False, True, True), keyword="x"),
    "embedding": Case(lambda: nn.Embedding(11, 6), (4, 5), tokens=11),
    "embedding, padding": Case(lambda: nn.Embedding(11, 6, padding_idx=-3), (4, 5), tokens=11),
    "embedding, sparse": Case(lambda: nn.Embedding(11, 6, sparse=True), (20,), tokens=11),
    "embedding, by frequency": Case(
        lambda: nn.Embedding(11, 6, padding_idx=1, scale_grad_by_freq=True), (4, 5), tokens=11
    ),
    "conv1d": _conv("Conv1d", 8, 6, 3, size=9),
    "conv1d, unbatched": _conv("Conv1d", 8, 6, 3, size=9, batch=()),
    "conv1d, same": _conv("Conv1d", 8, 6, 4, padding="same", dilation=2, size=9),
    "conv1d, reflect": _conv("Conv1d", 8, 6, 3, padding=2, padding_mode="reflect", size=9),
    "conv1d, groups": _conv("Conv1d", 8, 12, 3, groups=2, stride=2, bias=False, size=9),
    "conv2d": _conv("Conv2d", 8, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), size=7),
    "conv2d, pointwise": _conv("Conv2d", 8, 6, 1, size=4),
    "conv2d, same": _conv("Conv2d", 8, 6, 3, padding="same", padding_mode="replicate", size=6),
    "conv2d, valid": _conv("Conv2d", 8, 6, 3, padding="valid", size=6),
    "conv2d, reflect": _conv("Conv2d", 8, 6, 3, padding=1, padding_mode="reflect", size=6),
    "conv2d, replicate": _conv("Conv2d", 8, 6, 3, padding=(2, 1), padding_mode="replicate", size=6),
    "conv2d, circular": _conv("Conv2d", 8, 6, 3, padding=1, padding_mode="circular", stride=2, size=6),
    "conv2d, groups": _conv("Conv2d", 8, 20, 3, groups=2, padding=1, padding_mode="circular", size=6),
    "conv2d, depthwise": _conv("Conv2d", 8, 8, 3, groups=8, padding=1, size=6),
    "conv2d, depthwise twice": _conv("Conv2d", 8, 16, 3, groups=8, padding=1, padding_mode="reflect", size=6),
    "conv3d": _conv("Conv3d", 4, 6, (1, 3, 2), stride=2, padding=1, size=5),
    "conv3d, circular": _conv("Conv3d", 4, 6, 2, padding=1, padding_mode="circular", dilation=2, size=5),
    "conv3d, groups": _conv("Conv3d", 4, 8, 2, groups=2, padding="same", padding_mode="replicate", size=4),
    "conv that pads": Case(lambda: PaddedConv(8, 6, 3), (2, 8, 6, 6), keyword="image"),
    "conv with an inner forward": Case(lambda: OwnConvForward(8, 6, 3), (2, 8, 6, 6)),
}
WITH_MAGNITUDES = (
    *("linear", "linear, three axes", "activated linear", "transformers Conv1D", "embedding, padding"),
    *("conv1d, groups", "conv2d", "conv2d, depthwise", "conv3d, circular", "conv that pads"),
)
CASES |= {f"dora, {name}": replace(CASES[name], options={"use_dora": True}) for name in WITH_MAGNITUDES}


@dataclass
class Subject:
    """An adapted model beside the plain one, with an input."""

    model: Holder
    plain: Holder
    x: torch.Tensor
    case: Case

    @property
    def layer(self) -> Any:
        return self.model.layer

    def reference(self, a: torch.Tensor, b: torch.Tensor, *, magnitudes: bool = False) -> torch.Tensor:
        """The plain model in float64 on W + s * B @ A, differentiable in A and B.

        With `magnitudes` compute it from absolute values: a bound on the sum of all terms, to which rounding errors are
        proportional.
        """
        size = torch.Tensor.abs if magnitudes else torch.clone
        wide = copy.deepcopy(self.plain).double()
        if isinstance(wide.layer, nn.Embedding):
            wide.layer.sparse = False  # a sparse gradient does not go on to A and B
        state = {name: size(value) for name, value in wide.named_parameters()}
        weight = state["layer.weight"]
        delta = ALPHA / R * matrix(self.plain.layer, size(a.double()), size(b.double()), self.case.parts)
        state["layer.weight"] = (weight + delta.reshape(weight.shape)) * self.scale()
        x = self.x if self.case.tokens else size(self.x.double())
        result: torch.Tensor = functional_call(wide, state, (x,))
        return result

    def scale(self) -> Any:
        """m / norm(V) of each output, in the shape in which it broadcasts with the weight; 1 without magnitudes."""
        if "use_dora" not in self.case.options:
            return 1.0
        layer, weight = self.layer, self.plain.layer.weight.detach().double()  # type: ignore[operator]
        factors = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        whole = weight + ALPHA / R * matrix(self.plain.layer, *factors, None).reshape(weight.shape)
        inputs = 0 if isinstance(self.plain.layer, (Conv1D, nn.Embedding)) else tuple(range(1, whole.dim()))
        norms = torch.linalg.vector_norm(whole, dim=inputs, keepdim=True)
        return layer.lora_magnitude.detach().double().view(norms.shape) / norms


def matrix(layer: nn.Module, a: torch.Tensor, b: torch.Tensor, parts: tuple[bool, ...] | None) -> torch.Tensor:
    """B @ A as the layer stores it, from the definitions."""
    if isinstance(layer, nn.Embedding):
        return torch.einsum("or,rn->no", b, a)
    if parts is None:
        product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1))
    else:
        rows = b.shape[0] // sum(parts)
        blocks = iter(zip(b.split(rows), a.split(R), strict=True))
        nothing = a.new_zeros(rows, a.shape[1])
        product = torch.cat([torch.mm(*next(blocks)) if part else nothing for part in parts])
    return product.T if isinstance(layer, Conv1D) else product


def make_subject(name: str, dtype: torch.dtype = torch.float32, *, fill: bool = True, **options: Any) -> Subject:
    """A model in evaluation mode. Its adapter is about as large as W, or as injection made it."""
    case = CASES[name]
    plain = Holder(case.build()).to(dtype).eval()
    model = copy.deepcopy(plain)
    plain.requires_grad_(False)  # as injection does; torch multiplies otherwise where a weight is trained
    if case.parts:
        options["enable_lora"] = {"layer": list(case.parts)}
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"], **case.options, **options))
    subject = Subject(model, plain, case.make_input(dtype), case)
    if fill:
        fill_factors_(subject)
    return subject


def rounding(dtype: torch.dtype, bound: torch.Tensor) -> torch.Tensor:
    """A bound on the error of eight roundings to a dtype: of W, A, B, their products, their sums and the scaling."""
    return 8 * torch.finfo(dtype).eps / 2 * bound.detach()


def fill_factors_(subject: Subject, share: float = 1.0) -> None:
    """Fill factors at random, so that the norm of s * B @ A is `share` times that of W."""
    layer: Any = subject.layer
    plain: Any = subject.plain.layer
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape))
        product = matrix(plain, layer.lora_A.double(), layer.lora_B.double(), subject.case.parts)
        layer.lora_B.mul_(share * plain.weight.double().norm() / (ALPHA / R * product.norm()))
        if "use_dora" in subject.case.options:
            spread = 0.9 + 0.2 * torch.rand(layer.lora_magnitude.shape)
            layer.lora_magnitude.mul_(spread / subject.scale().flatten())


# --- weights and factors to merge ---

SHARES = (0.001, 0.01, 0.1, 1.0)  # the adapter's norm over the weight's


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(as_bits(one), as_bits(other))


def make_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A weight of usual values and of delicate ones: -0.0, subnormals, the smallest normal number, 0."""
    weight = (0.02 * torch.randn(shape)).to(dtype)
    info = torch.finfo(dtype)
    delicate = [-0.0, 0.0, info.smallest_normal / 4, -info.smallest_normal / 2, info.smallest_normal, 1.0]
    flat = weight.view(-1)
    count = min(len(delicate), flat.numel())
    flat[torch.randperm(flat.numel())[:count]] = torch.tensor(delicate[:count], dtype=dtype)
    return weight


def make_pieces(weight: torch.Tensor, r: int = 4) -> list[LowRankBlock]:
    rows = weight.shape[0]
    return [LowRankBlock(0, 0, torch.randn(rows, r), torch.randn(r, weight.numel() // rows))]


def exact_delta(pieces: list[LowRankBlock], scaling: float, shape: torch.Size) -> torch.Tensor:
    delta = torch.zeros(shape[0], shape.numel() // shape[0], dtype=torch.float64)
    for row, col, left, right, *_ in pieces:
        part = scaling * (left.double() @ right.double())
        delta[row : row + part.shape[0], col : col + part.shape[1]] += part
    return delta.view(shape)


def scaling_for(weight: torch.Tensor, pieces: list[LowRankBlock], share: float) -> float:
    return float(share * weight.double().norm() / exact_delta(pieces, 1.0, weight.shape).norm())


def nearest(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A mask: True where no neighbour of `found` in its dtype is nearer to the float64 value `wanted`."""
    error = (found.double() - wanted).abs()
    neighbours = [(as_bits(found) + step).view(found.dtype).double() for step in (1, -1)]
    others = [torch.where(n.isnan(), math.inf, (n - wanted).abs()) for n in neighbours]
    return (error <= others[0]) & (error <= others[1])


def assert_rounded_sum(found: torch.Tensor, weight: torch.Tensor, pieces: list[LowRankBlock], scaling: float) -> None:
    """Check W + s * B @ A to half the spacing of its dtype, plus the rounding of the terms in float64."""
    info = torch.finfo(found.dtype)
    wanted = weight.double() + exact_delta(pieces, scaling, weight.shape)
    magnitudes = [p._replace(left=p.left.abs(), right=p.right.abs()) for p in pieces]
    terms = weight.double().abs() + exact_delta(magnitudes, abs(scaling), weight.shape)
    spacing = info.eps * torch.clamp(wanted.abs(), min=info.smallest_normal)
    assert ((found.double() - wanted).abs() <= spacing / 2 + 16 * torch.finfo(torch.float64).eps * terms).all()
