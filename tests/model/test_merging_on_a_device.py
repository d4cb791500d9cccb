"""merge and unmerge on a device that is not the CPU: what the device is asked to do, and every guarantee there."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, disable_adapter, inject, is_merged, merge, merged, unmerge
from lightning_lora.nn import exact_merge
from lightning_lora.nn.adapted_weights import adapted_layers
from lightning_lora.nn.exact_merge import merge_weight_, merged_weight, restored_weight, unmerge_weight_
from support.broken_off import BrokenOff, break_off
from support.launches import Count, count
from support.layers import exact_delta, make_pieces, make_weight, nearest, same_bits, scaling_for
from support.models import randomise_
from support.pretend_device import CAN_PRETEND, DEVICE, OBSERVERS, Observer, pretend_device

pytestmark = [
    pytest.mark.skipif(not CAN_PRETEND, reason="this torch takes no device in Python"),
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights"),
]
MERGE = sys.modules["lightning_lora.model.merging"]  # the package's attribute of that name is the function
HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32, torch.float64]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loha": {"variant": "loha"},
}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with pretend_device():
        yield


@pytest.fixture(params=[True, False], ids=["copies", "values"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)
    return bool(request.param)


def adapted(count: int, dtype: torch.dtype = torch.bfloat16, width: int = 16, **options: Any) -> nn.Sequential:
    """Layers of two shapes on the device, away from their start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width + width * (i % 3 == 2)) for i in range(count))).to(dtype)
    inject(model, LoRAConfig(r=2, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(DEVICE)


def values(model: nn.Module) -> dict[str, Any]:
    """All that merging changes, and nothing that it leaves."""
    layers = {name: (each.lora_active, each.lora.merged) for name, each in adapted_layers(model).items()}
    return {name: p.detach().cpu().view(torch.uint8).tolist() for name, p in model.named_parameters()} | layers


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call an observer after each operator on the device."""
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)


def cycle(model: nn.Module) -> None:
    merge(model)
    unmerge(model)


def counted(model: nn.Module) -> Count:
    return count(lambda: cycle(model))


# --- what the device is asked to do ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("variant", "numbers"), [("lora", (1, 4, 40)), ("dora", (1, 7)), ("loha", (1, 7))])
def test_the_host_waits_as_often_for_many_layers_as_for_one(
    variant: str, numbers: tuple[int, ...], dtype: torch.dtype, copies: bool
) -> None:
    first, later = [], []
    for layers in numbers:
        model = adapted(layers, dtype, **VARIANTS[variant])
        for layer in adapted_layers(model).values():
            layer.lora.training_checked = True  # otherwise the first merge looks at each B once
        first.append(counted(model).waits)  # also measures what rounding costs
        later.append(counted(model).waits)
    assert first == [2 + (dtype in HALF)] * len(numbers)
    assert later == [2] * len(numbers)


@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_are_merged_without_float64(dtype: torch.dtype, copies: bool) -> None:
    model = adapted(3, dtype)
    for _ in range(2):
        found = counted(model)
        assert found.float64 == 0, found.operators


def peft_cycle(layers: int, dtype: torch.dtype) -> Count:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers))).to(dtype).to(DEVICE)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[str(i) for i in range(layers)]))

    def cycle() -> None:
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()

    cycle()
    return count(cycle)


@pytest.mark.parametrize("layers", [1, 4, 12])
def test_a_cycle_of_bfloat16_touches_no_more_bytes_than_pefts(layers: int) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers))).bfloat16()
    inject(model, LoRAConfig(r=4))
    randomise_(model)
    cycle(model.to(DEVICE))
    found, theirs = counted(model), peft_cycle(layers, torch.bfloat16)
    assert found.bytes <= theirs.bytes
    assert found.launches <= theirs.launches or layers == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_one_shape_take_three_operators_each_in_a_cycle(variant: str, dtype: torch.dtype) -> None:
    few, many = (adapted(layers, dtype, **VARIANTS[variant]) for layers in (12, 48))
    for model in (few, many):
        cycle(model)
    difference = counted(many) - counted(few)
    norms = counted_norms(many) - counted_norms(few)  # of DoRA
    assert difference.launches - norms <= 3 * 36, difference.operators


def counted_norms(model: nn.Module) -> int:
    """What is launched for the factors themselves."""
    layers = list(adapted_layers(model).values())
    with torch.no_grad():
        return count(lambda: [each.blocks(each.adapted_weights()) for each in layers]).launches


# --- values ---


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back_after_cycles_with_changing_factors(
    variant: str, dtype: torch.dtype, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_lora.nn.exact_merge.GPU_CHUNK", 100)  # some rows
    model = adapted(4, dtype, **VARIANTS[variant])
    before = values(model)
    for turn in range(4):
        merge(model)
        assert all(each.lora.records for each in adapted_layers(model).values())
        assert values(model)["0.weight"] != before["0.weight"]
        unmerge(model)
        assert values(model) == before
        with torch.no_grad():
            model[0].lora_B.mul_(-3 + turn) if hasattr(model[0], "lora_B") else None
        before = values(model)


@pytest.mark.parametrize("r", [4, 64])
@pytest.mark.parametrize("share", [0.001, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("copied", [False, True])
def test_merged_weights_are_the_nearest_values(dtype: torch.dtype, share: float, r: int, copied: bool) -> None:
    before = make_weight((300, 400), dtype)
    pieces = make_pieces(before, r)
    scaling = scaling_for(before, pieces, share)
    wanted = before.double() + exact_delta(pieces, scaling, before.shape)
    there = [piece._replace(left=piece.left.to(DEVICE), right=piece.right.to(DEVICE)) for piece in pieces]
    weight = before.to(DEVICE)
    record = merge_weight_(weight, there, scaling, copy=copied)
    assert nearest(weight.cpu(), wanted).double().mean() >= 0.9999
    assert same_bits(merged_weight(before.to(DEVICE), there, scaling).cpu(), weight.cpu())
    assert same_bits(restored_weight(weight, record).cpu(), before)
    unmerge_weight_(weight, record)
    assert same_bits(weight.cpu(), before)


def test_a_layer_has_the_same_values_in_a_batch_and_by_itself(copies: bool) -> None:
    model = adapted(7)
    alone = copy.deepcopy(model)
    merge(model)
    for layer in alone:
        merge(layer)
    for one, other in zip(model, alone, strict=True):
        torch.testing.assert_close(one.weight.cpu(), other.weight.cpu(), rtol=2**-7, atol=0)
        assert (one.weight.cpu() != other.weight.cpu()).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapter_of_one_per_cent_keeps_less_than_a_tenth(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MERGE, "COPY_BUDGET", 0)
    model = nn.Sequential(nn.Linear(512, 512)).to(dtype)
    inject(model, LoRAConfig(r=4, **VARIANTS[variant]))
    with torch.no_grad():
        model[0].lora_B.normal_()
        delta = (model[0].lora_B @ model[0].lora_A).norm() * model[0].lora.spec.scaling
        model[0].lora_B.mul_(0.01 * model[0].weight.float().norm() / delta)
    merge(model.to(DEVICE))
    (record,) = model[0].lora.records.values()
    assert 0 < record.nbytes() < 0.1 * model[0].weight.nbytes


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_never_keeps_more_than_a_plain_copy(dtype: torch.dtype, scaled: bool) -> None:
    for share in (0.1, 0.3, 1.0, 30.0):
        weight = (0.02 * torch.randn(128, 128)).to(dtype)
        (piece,) = make_pieces(weight, r=8)
        scaling = scaling_for(weight, [piece], share)
        scale = (1 + 0.1 * torch.rand(128, 1)).to(DEVICE) if scaled else None
        piece = piece._replace(left=piece.left.to(DEVICE), right=piece.right.to(DEVICE), scale=scale)
        there = weight.to(DEVICE)
        record = merge_weight_(there, [piece], scaling)
        assert record.nbytes() <= weight.nbytes
        unmerge_weight_(there, record)
        assert same_bits(there.cpu(), weight)


@pytest.mark.parametrize("dtype", HALF)
def test_the_cost_of_rounding_is_that_of_the_cpu(dtype: torch.dtype, copies: bool, caplog) -> None:
    there = adapted(4, dtype)
    here = copy.deepcopy(there).to("cpu")
    with caplog.at_level("INFO"):
        merge(here)
        merge(there)
    said = [message for message in caplog.messages if "rounding costs" in message]
    assert len(said) == 2
    assert said[0] == said[1]


# --- surroundings ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_and_precision_of_products_change_nothing(dtype: torch.dtype, copies: bool) -> None:
    model = adapted(4, dtype, width=64)
    before = values(model)
    merge(model)
    plain = values(model)
    unmerge(model)
    precisions = []

    def note(operator: Any, given: Any, made: Any) -> None:
        if "mm" in operator.name():
            precisions.append(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16), observed(note):
            merge(model)
        assert set(precisions) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
        assert values(model) == plain
    finally:
        torch.set_float32_matmul_precision("highest")
    unmerge(model)
    assert values(model) == before


def test_two_threads_that_merge_two_models_leave_the_precision_of_products_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [adapted(1) for _ in range(2)]
    inside, both_inside, first_left = threading.Event(), threading.Event(), threading.Event()

    def write_later(*args: Any, original: Any = exact_merge.write_parts_) -> Any:
        if threading.current_thread().name == "first":
            inside.set()
            both_inside.wait(0.3)
        else:
            both_inside.set()
            first_left.wait(0.3)
        return original(*args)

    monkeypatch.setattr(exact_merge, "write_parts_", write_later)

    def work(model: nn.Module) -> None:
        with pretend_device():
            cycle(model)

    torch.set_float32_matmul_precision("medium")
    try:
        first = threading.Thread(target=work, args=(models[0],), name="first")
        first.start()
        assert inside.wait(10)
        second = threading.Thread(target=work, args=(models[1],), name="second")
        second.start()
        first.join(10)
        first_left.set()
        second.join(10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("form", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_merged_model_is_unmerged_by_itself(form: Any, copies: bool) -> None:
    model = adapted(4)
    before = values(model)
    merge(model)
    twin = form(model)
    for each in (twin, model):
        assert is_merged(each)
        unmerge(each)
        assert values(each) == before


def test_the_state_dict_holds_w_while_merged_and_disable_adapter_shows_it(copies: bool) -> None:
    model = adapted(4)
    before = {name: value.cpu() for name, value in model.state_dict().items()}
    with merged(model):
        assert all(same_bits(value.cpu(), before[name]) for name, value in model.state_dict().items())
        with disable_adapter(model):
            assert not is_merged(model)
            assert same_bits(model[0].weight.cpu(), before["0.weight"])
        assert is_merged(model)
    assert all(same_bits(value.cpu(), before[name]) for name, value in model.state_dict().items())


# --- all or nothing ---


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.bfloat16, math.nan),
        (torch.float32, math.inf),
        (torch.float16, 1e4),
        (torch.float64, math.nan),
    ],
)
def test_one_bad_adapter_of_seven_leaves_every_layer_unmerged(
    place: int, dtype: torch.dtype, value: float, copies: bool
) -> None:
    model = adapted(7, dtype)
    with torch.no_grad():
        model[place].lora_B[-1].fill_(value)
        model[place].lora_A[:, -1].fill_(value)
    before = values(model)
    for _ in range(2):
        with pytest.raises(LoRAError, match=rf"^merge: layer '{place}': .*not finite.*Every layer is unmerged"):
            merge(model)
        assert values(model) == before
        assert not any(each.lora.records or each.lora.unfinished for each in adapted_layers(model).values())


def test_of_two_bad_adapters_the_first_is_named(copies: bool) -> None:
    model = adapted(7)
    with torch.no_grad():
        for place in (2, 4):
            model[place].lora_B.fill_(math.nan)
    with pytest.raises(LoRAError, match=r"^merge: layer '2': "):
        merge(model)


def test_finite_values_whose_sum_overflows_are_merged(copies: bool) -> None:
    model = adapted(4)
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    before = values(model)
    merge(model)
    unmerge(model)
    assert values(model) == before


def test_a_bad_weight_beside_the_adapted_rows_is_left_alone(copies: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 48))
    inject(model, LoRAConfig(r=2, target_modules=["0"], enable_lora={"0": [True, False, True]}))
    with torch.no_grad():
        model[0].weight[20] = math.inf
        model[0].lora_B.normal_()
    before = values(model.to(DEVICE))
    merge(model)
    unmerge(model)
    assert values(model) == before


@pytest.mark.parametrize("place", [0, 3])
def test_a_weight_changed_while_merged_is_named_and_the_others_are_restored(place: int, copies: bool) -> None:
    model = adapted(5)
    with torch.no_grad():
        for layer in model:
            layer.lora_B.mul_(0.1)  # so small that single values are kept
    before = values(model)
    merge(model)
    with torch.no_grad():
        model[place].weight[0] += 1
    with pytest.raises(LoRAError, match=rf"^unmerge: layer '{place}': .*changed while it was merged"):
        unmerge(model)
    after = values(model)
    assert {key for key in before if after[key] != before[key]} == (set() if copies else {f"{place}.weight"})
    lost = [each.lora.restore_failed for each in adapted_layers(model).values()]
    assert lost == [not copies and i == place for i in range(5)]
    if not copies:
        with pytest.raises(LoRAError, match="could not be restored"):
            model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "dtype"), [("lora", torch.bfloat16), ("dora", torch.float32)])
@pytest.mark.parametrize("verb", ["merge", "unmerge"])
@pytest.mark.parametrize("step", [149, pytest.param(7, marks=pytest.mark.slow)])
def test_a_call_broken_off_anywhere_leaves_all_of_w_or_all_of_w_prime(
    variant: str, dtype: torch.dtype, verb: str, step: int, copies: bool
) -> None:
    model = adapted(4, dtype, width=8, **VARIANTS[variant])
    plain = values(model)
    merge(model)
    whole = values(model)
    unmerge(model)
    line, reached, seen = 11 + step, True, 0
    while reached:
        if verb == "unmerge":
            merge(model)
        reached = break_off(lambda: (merge if verb == "merge" else unmerge)(model), line)
        assert values(model) == (whole if is_merged(model) else plain), line
        unmerge(model)
        assert values(model) == plain, line
        line += step
        seen += 1
    assert seen > 3


@pytest.mark.parametrize("step", [97, pytest.param(7, marks=pytest.mark.slow)])
def test_a_merge_that_fails_and_is_broken_off_while_it_takes_that_back_leaves_all_of_w(step: int, copies: bool) -> None:
    model = adapted(4, width=8)
    with torch.no_grad():
        model[3].lora_B[0] = math.nan
    plain, line, reached = values(model), 0, True
    while reached and line < 3000:
        try:
            reached = break_off(lambda: merge(model), line)
        except LoRAError:
            reached = False
        assert not is_merged(model)
        assert values(model) == plain, line
        line += step
    assert line > 300


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "dtype"), [("lora", torch.bfloat16), ("dora", torch.float32)])
@pytest.mark.parametrize("verb", [merge, unmerge])
def test_an_exception_after_any_write_on_the_device_leaves_all_of_w(
    variant: str, dtype: torch.dtype, verb: Any, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_lora.nn.exact_merge.GPU_CHUNK", 40)
    model = adapted(3, dtype, width=8, **VARIANTS[variant])
    before, left, number = values(model), -1, 0

    def fail_later(operator: Any, given: Any, made: Any) -> None:
        nonlocal left
        left -= operator._schema.is_mutable
        if operator._schema.is_mutable and left == 0:
            raise BrokenOff

    while left <= 0:
        if verb is unmerge:
            merge(model)
        number, left = number + 1, number + 1
        with observed(fail_later), suppress(BrokenOff):
            verb(model)
        unmerge(model)
        assert values(model) == before, number
    assert number > 3
