"""A weight that stands for W + left @ right: every operator gives what it gives on the sum, and so do the gradients.

The reference is the sum itself, in float64. transformers' experts are compared with the same model that holds the sum.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_lora.errors import LoRAError
from lightning_lora.nn import factored_weight
from lightning_lora.nn.factored_weight import FactoredWeight
from support.covering import covering
from support.models.families import LLAMA, QWEN, Family, causal

E, M, N, R = 3, 8, 12, 2
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # with the relative error that is allowed
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # no row for the second expert
NATIVE = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")

SPECIAL = ("grouped", "grouped, transposed", "grouped fallback", "grouped fallback, transposed")  # not in each release

Operator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fallback(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """transformers' operator for where torch has none."""
    import transformers.integrations.moe  # noqa: F401

    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=OFFSETS)


def grouped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """torch's operator, which knows no float64: the reference multiplies expert by expert."""
    if x.dtype == torch.float64:
        return torch.cat([rows @ w[e] for e, rows in enumerate(x.tensor_split(OFFSETS[:-1].tolist()))])
    return F.grouped_mm(x, w, offs=OFFSETS)


def picked(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.bmm(w[torch.tensor([2, 0, 2, 1])], x.unsqueeze(-1)).squeeze(-1)


# Shape of x, shape of the weight, and what is done with them, without ever building a sum.
FACTORED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Operator]] = {
    "linear": ((5, N), (M, N), F.linear),
    "linear with a bias": ((2, 5, N), (M, N), lambda x, w: F.linear(x, w, torch.arange(M).to(x.dtype))),
    "linear by names": ((5, N), (M, N), lambda x, w: F.linear(input=x, weight=w, bias=None)),
    "linear of a vector": ((N,), (M, N), F.linear),
    "x @ w": ((2, 5, M), (M, N), lambda x, w: x @ w),
    "w @ x": ((N, 5), (M, N), lambda x, w: w @ x),
    "vector @ w": ((M,), (M, N), lambda x, w: x @ w),
    "w @ vector": ((N,), (M, N), lambda x, w: w @ x),
    "x @ stack": ((E, 5, M), (E, M, N), lambda x, w: x @ w),
    "one x @ stack": ((5, M), (E, M, N), torch.matmul),
    "stack @ x": ((E, N, 5), (E, M, N), lambda x, w: w.matmul(x)),
    "mm": ((5, M), (M, N), torch.mm),
    "mm from the left": ((N, 5), (M, N), lambda x, w: w.mm(x)),
    "bmm": ((E, 5, M), (E, M, N), torch.bmm),
    "bmm from the left": ((E, N, 5), (E, M, N), lambda x, w: w.bmm(x)),
    "w @ w": ((5, M), (M, M), lambda x, w: x @ w @ w),
    "transpose": ((E, 5, N), (E, M, N), lambda x, w: torch.bmm(x, w.transpose(1, 2))),
    "transpose from the end": ((E, 5, N), (E, M, N), lambda x, w: torch.bmm(x, torch.transpose(w, -2, -1))),
    "swapaxes": ((E, 5, N), (E, M, N), lambda x, w: torch.bmm(x, w.swapaxes(2, 1))),
    "permute": ((E, 5, N), (E, M, N), lambda x, w: torch.bmm(x, w.permute(0, 2, 1))),
    "mT": ((E, 5, N), (E, M, N), lambda x, w: x @ w.mT),
    "T": ((5, N), (M, N), lambda x, w: x @ w.T),
    "t": ((5, N), (M, N), lambda x, w: x @ w.t()),
    "one expert": ((5, N), (E, M, N), lambda x, w: F.linear(x, w[1])),
    "the last expert": ((5, N), (E, M, N), lambda x, w: F.linear(x, w[-1])),
    "one expert by a tensor": ((5, M), (E, M, N), lambda x, w: x @ w[torch.tensor(2)]),
    "expert by expert": ((5, N), (E, M, N), lambda x, w: sum(F.linear(x, w[e]) for e in range(E))),
    "experts by number": ((4, N), (E, M, N), picked),
    "slice of experts": ((2, 5, M), (E, M, N), lambda x, w: torch.bmm(x, w[1:])),
    "view as a stack": ((5, N), (E * M, N), lambda x, w: x @ w.view(-1, M, N)[1].T),
    "reshape to a stack": ((5, N), (E * M, N), lambda x, w: x @ w.reshape((E, M, N))[torch.tensor(1)].T),
    "converted": ((5, N), (E, M, N), lambda x, w: F.linear(x.double(), w[1].double()).to(x.dtype)),
    "converted to": ((5, N), (M, N), lambda x, w: F.linear(x.double(), w.to(torch.float64)).to(x.dtype)),
    "contiguous": ((E, 5, N), (E, M, N), lambda x, w: torch.bmm(x, w.mT.contiguous())),
    "grouped fallback": ((5, M), (E, M, N), fallback),
    "grouped fallback, transposed": ((5, N), (E, M, N), lambda x, w: fallback(x, w.transpose(-2, -1))),
    "grouped": ((5, M), (E, M, 16), grouped),
    "grouped, transposed": ((5, M), (E, 16, M), lambda x, w: grouped(x, w.transpose(-2, -1))),
}

# What gets the sum.
DENSE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Operator]] = {
    "vector @ stack": ((M,), (E, M, N), lambda x, w: x @ w),
    "stack @ vector": ((N,), (E, M, N), lambda x, w: w @ x),
    "einsum": ((5, M), (E, M, N), lambda x, w: torch.einsum("tm,emn->etn", x, w)),
    "sum of both": ((E, M, N), (E, M, N), lambda x, w: x + w),
    "sum of both, reversed": ((M, N), (M, N), lambda x, w: w + x),
    "list": ((M, N), (M, N), lambda x, w: torch.cat([x, w])),
    "weight in the place of x": ((5, N), (M, N), lambda x, w: F.linear(w, x)),
    "other transposition": ((5, M), (E, M, N), lambda x, w: x @ w.transpose(0, 1)[:, 0]),
    "no transposition": ((5, M), (M, M), lambda x, w: x @ w.permute(0, 1)),
    "index of an element": ((5,), (E, M, N), lambda x, w: x * w[0, 1, 2]),
    "row of a matrix": ((N,), (M, N), lambda x, w: x * w[1]),
    "mask of experts": ((2, 5, M), (E, M, N), lambda x, w: x @ w[torch.tensor([True, False, True])]),
    "list of experts": ((2, 5, M), (E, M, N), lambda x, w: x @ w[[0, 2]]),
    "experts in a table": ((5, M), (E, M, N), lambda x, w: x @ w[torch.tensor([[0, 2], [1, 1]])]),
    "experts one after another": ((5, M), (E, M, N), lambda x, w: sum(x @ each for each in w)),
    "flat view": ((E * M * N,), (E, M, N), lambda x, w: x * w.view(-1)),
    "view of halves": ((2, M, N // 2), (M, N), lambda x, w: x * w.view(2, M, N // 2)),
    "mm by names": ((5, M), (M, N), lambda x, w: torch.mm(input=x, mat2=w)),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def parts(*shape: int, dtype: torch.dtype = torch.float64, rank: int = R) -> tuple[torch.Tensor, ...]:
    """W in a dtype, and factors that are at least float32, as adapters are."""
    wide = torch.promote_types(dtype, torch.float32)
    *stack, m, n = shape
    return leaf(*shape, dtype=dtype), leaf(*stack, m, rank, dtype=wide), leaf(*stack, rank, n, dtype=wide)


def plain(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return weight + left @ right


def compute(run: Operator, make: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the result on x and the made weight, and the gradients of x, W, left and right."""
    inputs = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs)
    x, *rest = inputs
    result = run(x, make(*rest))
    cotangent = torch.linspace(-1, 1, result.numel()).reshape(result.shape).to(result.dtype)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [result, *torch.autograd.grad((result * cotangent).sum(), wanted)]


def assert_like_the_sum(run: Operator, inputs: tuple[torch.Tensor, ...], tolerance: float) -> None:
    expected = compute(run, plain, tuple(tensor.double().detach().requires_grad_() for tensor in inputs))
    for found, right in zip(compute(run, FactoredWeight, inputs), expected, strict=True):
        assert found.shape == right.shape
        assert (found.double() - right).norm() <= tolerance * right.norm()


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The sums that were computed, each once."""
    found: list[torch.Tensor] = []
    compute_sum = factored_weight.dense_weight

    def noted(stand_in: FactoredWeight) -> torch.Tensor:
        result = compute_sum(stand_in)
        if not any(result is known for known in found):
            found.append(result)
        return result

    monkeypatch.setattr(factored_weight, "dense_weight", noted)
    return found


def assert_stays_factored(name: str, dtype: torch.dtype, sums: list[torch.Tensor]) -> None:
    x_shape, shape, run = FACTORED[name]
    assert_like_the_sum(run, (leaf(*x_shape, dtype=dtype), *parts(*shape, dtype=dtype)), DTYPES[dtype])
    assert not sums


@pytest.mark.parametrize(("name", "dtype"), covering([n for n in FACTORED if n not in SPECIAL], [*DTYPES], meet=1))
def test_operator_that_stays_factored_gives_result_and_gradients_of_the_sum(name, dtype, sums):
    assert_stays_factored(name, dtype, sums)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("grouped fallback", torch.float64, marks=pytest.mark.transformers_5),
        pytest.param("grouped fallback, transposed", torch.bfloat16, marks=pytest.mark.transformers_5),
        pytest.param("grouped", torch.float32, marks=NATIVE),
        pytest.param("grouped, transposed", torch.bfloat16, marks=NATIVE),
    ],
)
def test_grouped_product_stays_factored_and_gives_result_and_gradients_of_the_sum(name, dtype, sums):
    assert_stays_factored(name, dtype, sums)


@pytest.mark.parametrize(("name", "dtype"), covering([*DENSE], [*DTYPES], meet=1))
def test_any_other_operator_gives_result_and_gradients_of_the_sum(name, dtype, sums):
    x_shape, shape, run = DENSE[name]
    assert_like_the_sum(run, (leaf(*x_shape, dtype=dtype), *parts(*shape, dtype=dtype)), DTYPES[dtype])
    assert len(sums) == 1


# --- grouped_mm's own conditions ---

MULTIPLES = st.sampled_from([8, 16, 24])


@NATIVE
@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.integers(0, 3),
    MULTIPLES,
    MULTIPLES,
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_grouped_mm_takes_any_rank_empty_experts_and_rows_of_no_expert(rows, tail, m, n, rank, transposed, dtype):
    offs = torch.tensor(rows).cumsum(0).int()
    x = leaf(sum(rows) + tail, m, dtype=dtype)
    weight, left, right = parts(len(rows), m, n, dtype=dtype, rank=rank)
    if transposed:  # as most experts lie
        weight, left, right = (tensor.detach().mT.contiguous().requires_grad_() for tensor in (weight, right, left))

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        w = w.transpose(-2, -1) if transposed else w
        if x.dtype != torch.float64:
            return F.grouped_mm(x, w, offs=offs)[: len(x) - tail]  # the rest is not written
        return torch.cat([part @ expert for part, expert in zip(x[: len(x) - tail].split(rows), w, strict=True)])

    def compared(results: list[torch.Tensor]) -> list[torch.Tensor]:
        return [results[0], results[1][: sum(rows)], *results[2:]]

    inputs = (x, weight, left, right)
    found = compared(compute(run, FactoredWeight, inputs))
    expected = compared(compute(run, plain, tuple(tensor.double().detach().requires_grad_() for tensor in inputs)))
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= DTYPES[dtype] * other.norm()


@NATIVE
@pytest.mark.parametrize("n", [16, 6])
def test_grouped_mm_of_a_frozen_base_takes_gradients_in_any_layout(n):
    """The base has no backward of its own there, and its forward takes 6 columns where they lie in rows."""
    x, (weight, left, right) = torch.randn(5, M), parts(E, M, n, dtype=torch.float32)
    stacked = weight.detach().mT.contiguous().mT
    for gradient in (torch.ones(1, 1).expand(5, n), torch.randn(n, 5).T, torch.randn(5, n)):
        result = grouped(x, FactoredWeight(stacked, left, right))
        found = torch.autograd.grad(result, (left, right), gradient)
        reference = grouped(x.double(), stacked.double() + left.double() @ right.double())
        expected = torch.autograd.grad(reference, (left, right), gradient.double())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@NATIVE
@pytest.mark.parametrize("options", [{"bias": torch.ones(5, 16)}, {"out_dtype": torch.float32}])
def test_grouped_mm_with_other_options_gets_the_sum(options, sums, monkeypatch):
    """The CPU refuses these options, so a function takes the operator's place."""

    def on_cuda(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor, **given: Any) -> torch.Tensor:
        if isinstance(w, FactoredWeight):
            return FactoredWeight.__torch_function__(on_cuda, (), (x, w), {"offs": offs, **given})
        assert given == options
        return grouped(x, w).float() + given.get("bias", 0)

    monkeypatch.setitem(factored_weight.RULES, on_cuda, factored_weight.RULES[torch._grouped_mm])
    x, inputs = torch.randn(5, M), parts(E, M, 16, dtype=torch.float32)
    found = on_cuda(x, FactoredWeight(*inputs), OFFSETS, **options)
    assert len(sums) == 1
    torch.testing.assert_close(found, on_cuda(x, plain(*inputs), OFFSETS, **options))


# --- what is asked of it, and where operators are not asked ---


def test_facts_are_those_of_the_weight():
    weight, left, right = parts(E, M, N, dtype=torch.bfloat16)
    frozen = weight.detach().mT
    stand_in = FactoredWeight(frozen, right.mT, left.mT)
    assert isinstance(stand_in, torch.Tensor)
    for fact in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu"):
        assert getattr(stand_in, fact) == getattr(frozen, fact)
    for fact in ("size", "dim", "numel", "stride", "is_contiguous", "element_size", "is_floating_point", "data_ptr"):
        assert getattr(stand_in, fact)() == getattr(frozen, fact)()
    assert len(stand_in) == E
    assert stand_in.size(-1) == M
    assert stand_in.to(torch.bfloat16) is stand_in
    assert stand_in.dense is None
    assert stand_in.requires_grad
    assert not FactoredWeight(frozen, right.mT.detach(), left.mT.detach()).requires_grad


def test_the_sum_is_computed_once_and_again_only_where_it_has_to_have_a_gradient(sums):
    weight, left, right = parts(M, N)
    stand_in = FactoredWeight(weight.detach(), left, right)
    with torch.no_grad():
        total, norm = stand_in.sum(), stand_in.norm()
    assert len(sums) == 1
    (stand_in.sum() + stand_in.norm()).backward()
    assert len(sums) == 2
    assert weight.grad is None
    expected = torch.autograd.grad(plain(weight, left, right).sum() + plain(weight, left, right).norm(), (left, right))
    torch.testing.assert_close((left.grad, right.grad), expected)
    torch.testing.assert_close((total, norm), (sums[1].sum(), sums[1].norm()))


def test_the_sum_is_rounded_once_and_autocast_does_not_round_it_more():
    weight, left, right = parts(64, 64, dtype=torch.bfloat16)
    expected = (weight.float() + left @ right).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = FactoredWeight(weight, left, right).clone()
    assert torch.equal(found, expected)
    assert torch.equal(FactoredWeight(weight, left, right).to(torch.int32), expected.to(torch.int32))


@pytest.mark.parametrize("name", ["linear", "experts by number"])
def test_operator_under_autocast_has_its_dtype(name):
    x_shape, shape, run = FACTORED[name]
    x, weights = leaf(*x_shape, dtype=torch.float32), parts(*shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(x, FactoredWeight(*weights)), run(x, plain(*weights))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).float().norm() < 0.03 * expected.float().norm()


class Product(torch.autograd.Function):
    """Its arguments are unpacked in C++, which asks no __torch_function__; most kernels of experts are called so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.bmm(x, w)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.mT, x.mT @ grad


def without_torch_function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.bmm(x, w)


UNASKED: dict[str, Operator] = {
    "autograd.Function": Product.apply,
    "checkpoint": lambda x, w: checkpoint(torch.bmm, x, w, use_reentrant=False),
    "no __torch_function__": without_torch_function,
}


@pytest.mark.parametrize(("name", "dtype"), covering([*UNASKED], [*DTYPES], meet=1))
def test_where_no_operator_is_asked_result_and_gradients_are_those_of_the_sum(name, dtype):
    assert_like_the_sum(UNASKED[name], (leaf(E, 5, M, dtype=dtype), *parts(E, M, N, dtype=dtype)), DTYPES[dtype])


def test_where_no_operator_is_asked_the_sum_is_computed_once(sums):
    x, stand_in = leaf(E, 5, M), FactoredWeight(*parts(E, M, N))
    (without_torch_function(x, stand_in) + without_torch_function(x, stand_in)).sum().backward()
    assert len(sums) == 1


def test_reentrant_checkpoint_gives_the_gradients_of_the_sum():
    x, weights = leaf(E, 5, M), parts(E, M, N)
    checkpoint(torch.bmm, x, FactoredWeight(*weights), use_reentrant=True).square().sum().backward()
    expected = torch.autograd.grad(torch.bmm(x, plain(*weights)).square().sum(), (x, *weights))
    torch.testing.assert_close([tensor.grad for tensor in (x, *weights)], list(expected))


def add_without_torch_function(w: torch.Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        w.add_(1)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "w[0] =": lambda w: w.__setitem__(0, 1.0),
    "data =": lambda w: setattr(w, "data", torch.zeros(M, N)),
    "out": lambda w: torch.add(torch.ones(M, N), 1, out=w),
    "not asked for": add_without_torch_function,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_refused_by_its_name(name):
    stand_in = FactoredWeight(*(part.detach() for part in parts(M, N)))
    with pytest.raises(LoRAError, match=r"writes into an adapted weight"):
        WRITES[name](stand_in)


def test_a_stand_in_is_freed_without_the_garbage_collector():
    stand_in = FactoredWeight(*parts(E, M, N))
    result = F.linear(leaf(5, N), stand_in[0]) + stand_in.sum()
    alive = weakref.ref(stand_in.dense)
    del stand_in
    result.sum().backward()
    del result
    assert alive() is None


# --- transformers' experts ---

SPARSE: dict[str, Family] = {
    "mixtral": causal("Mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": causal("GptOss", {**QWEN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": causal("Llama4", {**QWEN, "num_local_experts": 4, "intermediate_size_mlp": 48}),
}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}


@pytest.mark.transformers_5
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "eager") for name in SPARSE]
    + [(name, way) for name in ("mixtral", "gpt_oss") for way in ("batched_mm", "grouped_mm")],
)
def test_experts_of_transformers_stay_factored_and_give_output_and_gradients_of_the_sum(name, way, sums):
    model = SPARSE[name].build().requires_grad_(False)
    model.config._experts_implementation = way
    inputs = SPARSE[name].inputs()
    weights = expert_parameters(model)
    factors = {}
    for weight_name, weight in weights.items():
        _, left, right = parts(*weight.shape, dtype=torch.float32)
        factors[weight_name] = [(0.1 * left).detach().requires_grad_(), (0.1 * right).detach().requires_grad_()]
    leaves = [factor for pair in factors.values() for factor in pair]

    summed = {name: plain(weight, *factors[name]) for name, weight in weights.items()}
    expected = functional_call(model, summed, kwargs=inputs).logits
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    base = model(**inputs).logits

    for weight_name, weight in weights.items():
        path, _, attribute = weight_name.rpartition(".")
        vars(model.get_submodule(path))[attribute] = FactoredWeight(weight, *factors[weight_name])
    found = model(**inputs).logits
    gradients = torch.autograd.grad(found.square().sum(), leaves)
    assert not sums
    tolerance = 1e-5
    assert (base - expected).norm() > 1e-3 * expected.norm()
    assert (found - expected).norm() <= tolerance * expected.norm()
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= tolerance * other.norm()


def test_an_expert_read_without_gradients_first_gets_its_gradient_later():
    left, right = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 2), (3, 2, 4)))
    stand_in = FactoredWeight(torch.randn(3, 5, 4), left, right)
    x = torch.randn(6, 4)
    with torch.no_grad():
        quiet = F.linear(x, stand_in[-1])
    recorded = F.linear(x, stand_in[-1])
    assert torch.equal(recorded, quiet)
    recorded.sum().backward()
    for factor in (left, right):
        assert factor.grad[2].any()
        assert not factor.grad[:2].any()


def test_the_sum_has_a_shape_on_the_meta_device():
    with torch.device("meta"):
        stand_in = FactoredWeight(torch.empty(2, 4, 3), torch.empty(2, 4, 1), torch.empty(2, 1, 3))
        assert (stand_in * 2).shape == (2, 4, 3)
