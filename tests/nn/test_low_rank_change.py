"""What a start from the weight adds, as one operation for autograd: against plain operators, and in layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn import starts
from lightning_lora.nn.low_rank_change import can_change, low_rank_change
from support.launches import Count, count
from support.layers import make_subject
from support.pretend_device import CAN_PRETEND, pretend_device

IN, OUT, R, S = 5, 6, 2, 1.5
NAMES = ("x", "dropped", "weight", "bias", "a", "b")
CASES: dict[str, dict[str, Any]] = {
    "rows": {"shape": (4,)},
    "three axes": {},
    "one vector": {"shape": ()},
    "no rows": {"shape": (0,)},
    "no bias": {"bias": False},
    "transposed weight": {"transposed": True},
    "dropped": {"drops": True},
    "scaling of 1": {"scaling": 1.0},
}
TRAINED = (NAMES, ("a", "b"), ("x", "dropped", "a"), ("b",), ("x",), ("dropped", "b"), ("weight", "bias"))


class Case:
    """Tensors for the operation, and both ways to make the sum of them."""

    def __init__(
        self,
        shape: tuple[int, ...] = (2, 5),
        *,
        drops: bool = False,
        bias: bool = True,
        transposed: bool = False,
        scaling: float = S,
        trained: tuple[str, ...] = NAMES,
    ) -> None:
        torch.manual_seed(0)
        self.transposed, self.scaling = transposed, scaling
        sizes = {"x": (*shape, IN), "dropped": (*shape, IN), "weight": (IN, OUT) if transposed else (OUT, IN)}
        sizes |= {"bias": (OUT,), "a": (R, IN), "b": (OUT, R)}
        left_out = {*([] if drops else ["dropped"]), *([] if bias else ["bias"])}
        self.tensors = {
            name: torch.randn(size, dtype=torch.float64).requires_grad_(name in trained)
            for name, size in sizes.items()
            if name not in left_out
        }
        self.start = torch.randn(R, IN, dtype=torch.float64), torch.randn(OUT, R, dtype=torch.float64)

    def given(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.tensors.values())

    def named(self, tensors: tuple[torch.Tensor, ...]) -> list[Any]:
        found = dict(zip(self.tensors, tensors, strict=True))
        x, dropped, weight, bias, a, b = (found.get(name) for name in NAMES)
        return [x, dropped, weight.t() if self.transposed and weight is not None else weight, bias, a, b]

    def as_one(self, *tensors: torch.Tensor) -> torch.Tensor:
        x, dropped, weight, bias, a, b = self.named(tensors)
        return low_rank_change(x, weight, bias, (a, b), self.start, self.scaling, dropped)

    def by_operators(self, *tensors: torch.Tensor) -> torch.Tensor:
        x, dropped, weight, bias, a, b = self.named(tensors)
        start_a, start_b = self.start
        return F.linear(x, weight, bias) + self.scaling * F.linear(
            x if dropped is None else dropped, b @ a - start_b @ start_a
        )


def trains(name: str, trained: tuple[str, ...]) -> bool:
    return any(tensor.requires_grad for tensor in Case(**CASES[name], trained=trained).given())


@pytest.mark.parametrize(("name", "trained"), [(name, t) for name in CASES for t in TRAINED if trains(name, t)])
def test_output_and_gradients_are_those_of_plain_operators(name: str, trained: tuple[str, ...]) -> None:
    found = []
    for way in ("as_one", "by_operators"):
        case = Case(**CASES[name], trained=trained)
        output = getattr(case, way)(*case.given())
        assert not output._is_view()
        torch.manual_seed(1)
        output.backward(torch.randn_like(output))
        found.append((output, [tensor.grad for tensor in case.given()]))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first jvp
@pytest.mark.parametrize("name", CASES)
def test_numerical_gradients_agree_forward_backward_twice_and_in_batches(name: str) -> None:
    case = Case(**CASES[name])
    options: Any = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(case.as_one, case.given(), check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(case.as_one, case.given(), check_fwd_over_rev=True, **options)


def loss_of(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *tensors: function(*tensors).square().sum()


def stacked(case: Case, *names: str) -> tuple[torch.Tensor, ...]:
    """The case's tensors, with three of each named one."""
    given = {name: tensor.detach() for name, tensor in case.tensors.items()}
    return tuple(torch.stack([t, 2 * t, 1 - t]) if name in names else t for name, t in given.items())


def over(case: Case, *names: str) -> tuple[int | None, ...]:
    return tuple(0 if name in names else None for name in case.tensors)


def each(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.tensors)))


TRANSFORMS: dict[str, Callable[[Any, Case], Any]] = {
    "grad": lambda f, case: torch.func.grad(loss_of(f), each(case))(*stacked(case)),
    "jvp": lambda f, case: torch.func.jvp(f, stacked(case), tuple(t + 1 for t in stacked(case))),
    "jacrev": lambda f, case: torch.func.jacrev(f, each(case))(*stacked(case)),
    "hessian": lambda f, case: torch.func.hessian(loss_of(f), each(case))(*stacked(case)),
    "vmap over x": lambda f, case: torch.vmap(f, over(case, "x", "dropped"))(*stacked(case, "x", "dropped")),
    "vmap over adapters": lambda f, case: torch.vmap(f, over(case, "a", "b"))(*stacked(case, "a", "b")),
    "gradients of each adapter": lambda f, case: torch.vmap(
        torch.func.grad(loss_of(f), each(case)), over(case, "a", "b")
    )(*stacked(case, "a", "b")),
    "gradient of a vmap": lambda f, case: torch.func.grad(
        lambda *tensors: torch.vmap(f, over(case, "a", "b"))(*tensors).square().sum(), each(case)
    )(*stacked(case, "a", "b")),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first jvp
@pytest.mark.parametrize("name", ["rows", "dropped", "one vector"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_transform_of_torch_func_gives_what_it_gives_of_plain_operators(transform: str, name: str) -> None:
    case = Case(**CASES[name])
    found, wanted = (TRANSFORMS[transform](f, case) for f in (case.as_one, case.by_operators))
    torch.testing.assert_close(found, wanted)


def test_start_gets_no_gradient_even_where_it_asks_for_one() -> None:
    case = Case()
    case.start = case.start[0].requires_grad_(), case.start[1].requires_grad_()
    first = torch.autograd.grad(case.as_one(*case.given()).square().sum(), case.given(), create_graph=True)
    sum(gradient.square().sum() for gradient in first).backward()
    assert case.tensors["a"].grad is not None
    assert case.start[0].grad is case.start[1].grad is None


def test_input_changed_in_place_after_the_forward_is_noticed_as_torch_does() -> None:
    case = Case(trained=("a", "b"))
    output = case.as_one(*case.given())
    case.tensors["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_under_autocast_of_a_forward_without_it_keeps_the_dtypes() -> None:
    case = Case()
    tensors = [tensor.detach().float().requires_grad_() for tensor in case.given()]
    case.start = case.start[0].float(), case.start[1].float()
    wanted = torch.autograd.grad(case.as_one(*tensors).sum(), tensors)
    output = case.as_one(*tensors).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output, tensors)
    torch.testing.assert_close(found, wanted)


# In layers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "a device"])
def device(request: Any) -> Iterator[str]:
    if request.param == "cpu":
        yield "cpu"
        return
    if not CAN_PRETEND:
        pytest.skip("this version of torch has no devices in Python")
    with pretend_device() as name:
        yield name


def step(model: nn.Module, x: torch.Tensor) -> list[Any]:
    output = model(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output))
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


def autocast(model: nn.Module, x: torch.Tensor) -> list[Any]:
    with torch.autocast(x.device.type, torch.bfloat16):
        output = model(x)
    assert output.dtype == (torch.float64 if x.dtype == torch.float64 else torch.bfloat16)
    output.float().square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


def trained_base(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model.requires_grad_(True), x)


def factors_in_16_bits(model: nn.Module, x: torch.Tensor) -> list[Any]:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return step(model, x)[:2]


def frozen_input(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model, x.detach())


def twice(model: nn.Module, x: torch.Tensor) -> list[Any]:
    (model(x) * model(x + 1)).square().sum().backward()
    return step(model, x)


def changed_in_place(model: nn.Module, x: torch.Tensor) -> list[Any]:
    output, seen = model(x), []
    output.register_hook(seen.append)
    output.mul_(2).add_(1)
    output.square().sum().backward()
    return [output, *seen, *(parameter.grad for parameter in model.parameters())]


def checkpointed(model: nn.Module, x: torch.Tensor) -> list[Any]:
    output = checkpoint(model, x, use_reentrant=False)
    output.square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


def checkpointed_reentrant(model: nn.Module, x: torch.Tensor) -> list[Any]:
    output = checkpoint(model, x, use_reentrant=True)
    output.square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in model.parameters())]


def by_keyword(model: nn.Module, x: torch.Tensor) -> list[Any]:
    name = "x" if hasattr(model.layer, "nf") else "input"
    output = model.layer(**{name: x})
    output.square().sum().backward()
    return [output, x.grad]


def not_contiguous(model: nn.Module, x: torch.Tensor) -> list[Any]:
    if hasattr(model.layer, "nf") or x.dim() == 1:  # Conv1D itself needs rows
        return []
    return step(model, x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_())


def no_rows(model: nn.Module, x: torch.Tensor) -> list[Any]:
    return step(model, x.detach()[:0].requires_grad_()) if x.dim() > 1 else []


def without_gradients(model: nn.Module, x: torch.Tensor) -> list[Any]:
    with torch.no_grad():
        return [model(x)]


def gradient_of_gradient(model: nn.Module, x: torch.Tensor) -> list[Any]:
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    first = torch.autograd.grad(model(x).square().sum(), trained, create_graph=True)
    sum(gradient.square().sum() for gradient in first).backward()
    return [*first, *(tensor.grad for tensor in trained)]


SITUATIONS: list[Callable[[Any, torch.Tensor], list[Any]]] = [
    *(
        step,
        autocast,
        factors_in_16_bits,
        trained_base,
        frozen_input,
        twice,
        changed_in_place,
        checkpointed,
        checkpointed_reentrant,
    ),
    *(by_keyword, not_contiguous, no_rows, without_gradients, gradient_of_gradient),
]
KINDS = ("linear", "linear, one vector", "linear, three axes", "transformers Conv1D", "fused, outer parts")
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the norm


def started(name: str, dtype: torch.dtype, device: str, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    subject = make_subject(name, dtype, fill=False, init_lora_weights="pissa", **options)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return subject.model.to(device), subject.x.to(device).requires_grad_()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_layer_does_what_it_does_by_the_factors_that_act(
    name: str, dtype: torch.dtype, situation: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if situation is gradient_of_gradient and dtype == torch.bfloat16:
        pytest.skip("16 bits leave nothing of it to compare")
    found = []
    for as_one in (True, False):
        if not as_one:
            monkeypatch.setattr(starts, "can_change", lambda *_: False)
        found.append(situation(*started(name, dtype, device)))
    close = CLOSE[torch.bfloat16] if situation is autocast and dtype != torch.float64 else CLOSE[dtype]
    for one, plain in zip(*found, strict=True):
        assert (one is None) == (plain is None)
        if one is not None:
            assert one.dtype == plain.dtype
            one, plain = one.detach().cpu().double(), plain.detach().cpu().double()
            assert (one - plain).norm() <= close * plain.norm()


@pytest.mark.parametrize("name", KINDS)
def test_which_layers_run_as_one_operation(name: str, device: str) -> None:
    model, x = started(name, torch.float32, device)
    assert ("LowRankChange" in type(model(x).grad_fn).__name__) == (
        name not in ("linear, one vector", "fused, outer parts")
    )


@pytest.mark.parametrize("keep", [True, False], ids=["factors in float32", "factors as the base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_first_step_changes_no_bit_of_the_output_nor_of_the_inputs_gradient(
    dtype: torch.dtype, keep: bool, device: str
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(16, 12).to(dtype).requires_grad_(False)
    model = nn.Sequential(nn.Linear(16, 12).to(dtype))
    model.load_state_dict({f"0.{name}": value for name, value in plain.state_dict().items()})
    inject(model, LoRAConfig(r=4, target_modules=["0"], init_lora_weights="pissa", autocast_adapter_dtype=keep))
    x, g = torch.randn(6, 16).to(dtype), torch.randn(6, 12).to(dtype)
    found = []
    for module in (plain.to(device), model.to(device)):
        given = x.to(device).requires_grad_()
        output = module(given)
        output.backward(g.to(device))
        found.append((output.detach().cpu(), given.grad.cpu()))
    (output, gradient), (wanted, expected) = found
    assert torch.equal(output, wanted)
    # B0 still meets A - A0 = 0, and B - B0 = 0 meets A: the sum that is added is exactly zero.
    assert torch.equal(gradient, expected)
    assert model[0].lora_A.grad.cpu().abs().max() > 0
    assert model[0].lora_B.grad.cpu().abs().max() > 0


def counted(adapted: bool, dtype: torch.dtype, device: str) -> Count:
    """A step of four layers after the first, so that gradients of inputs count in each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).to(dtype).requires_grad_(False)
    if adapted:
        inject(model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))
    model, x = model.to(device), torch.randn(8, 32).to(dtype).to(device).requires_grad_()

    def work() -> None:
        model.zero_grad()
        x.grad = None
        model(x).square().sum().backward()

    work()
    return count(work)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 11), (torch.bfloat16, 13)], ids=str)
def test_step_on_a_device_launches_no_more_than_it_did(dtype: torch.dtype, most: int) -> None:
    if not CAN_PRETEND:
        pytest.skip("this version of torch has no devices in Python")
    with pretend_device() as device:
        more = counted(True, dtype, device) - counted(False, dtype, device)
    assert more.launches <= 4 * most
    assert more.float64 == more.waits == 0


def test_compilers_other_classes_of_tensors_and_forwards_without_gradients_get_plain_operators() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    other = x.as_subclass(type("Other", (torch.Tensor,), {}))
    assert can_change(x, weight, nn.Parameter(weight))
    assert not can_change(x.t(), weight, weight)
    assert not can_change(other, weight, weight)
    assert not can_change(x, other, weight)
    assert not can_change(x, weight, other)
    with torch.no_grad():
        assert not can_change(x, weight, weight)
        assert can_change(x.to("meta"), weight.to("meta"), weight.to("meta"))
    assert not torch.compile(lambda x: can_change(x, weight, weight), backend="eager")(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:Converting a tensor to a Python boolean")
@pytest.mark.parametrize("how", ["compile", "export", "trace"])
def test_graph_of_a_layer_in_training_has_its_outputs_and_gradients(how: str) -> None:
    model, x = started("linear", torch.float64, "cpu")
    wanted = step(model, x)
    model.zero_grad()
    x.grad = None
    if how == "compile":
        graph: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif how == "export":
        graph = torch.export.export(model, (x,)).module()
    else:
        graph = torch.jit.trace(model, (x,))  # type: ignore[no-untyped-call]
    output = graph(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output))
    torch.testing.assert_close([output, x.grad], wanted[:2])


def test_jacobian_on_a_device_takes_no_memory_that_was_never_written() -> None:
    """vmap multiplies by 0 what a kernel would ignore; memory that was never written is NaN in this test."""
    if not CAN_PRETEND:
        pytest.skip("this version of torch has no devices in Python")
    with pretend_device() as device:
        case = Case((4,), trained=())
        x, *others = (tensor.to(device) for tensor in case.given())
        case.start = tuple(tensor.to(device) for tensor in case.start)  # type: ignore[assignment]
        torch.use_deterministic_algorithms(True)
        try:
            found = torch.func.jacrev(lambda b: case.as_one(x, *others[:-1], b))(others[-1])
        finally:
            torch.use_deterministic_algorithms(False)
        wanted = torch.func.jacrev(lambda b: case.by_operators(x, *others[:-1], b))(others[-1])
        torch.testing.assert_close(found.cpu(), wanted.cpu())
