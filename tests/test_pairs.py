"""The table of pairs: each variant of LoRA with each precision, option, change and way to keep it, on a small model.

Every pair is run, and its outcome compared with pairs.md beside this file: right, or refused with how the message
begins. WRITE_TABLE=1 in the environment writes that page. Rows of what is not installed stay. What is right is said by
support/pairs.py, in float64, from the definitions.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    unload,
    unmerge,
)
from lightning_lora.adapter.lightning_checkpoint import convert_checkpoint, prepare_for_load
from support.notices import tiny_layers
from support.pairs import (
    Naive,
    Tensors,
    Variant,
    adapted,
    all_bits,
    assert_near,
    batch,
    dtype_of,
    fill_,
    filled,
    fresh,
    loss_of,
    naive_optimizer,
    naive_train_,
    optimizer_for,
    product,
    train_,
    trainable,
    wide,
)

pytestmark = [
    tiny_layers,
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs:UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]
PAGE = Path(__file__).parent / "pairs.md"
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
STEPS = range(4)
QKV = {"enable_lora": {"inner": [True, False, True]}}
ROWS = {"target_modules": ["inner"], "trainable_token_indices": {"embed": [1, 4, 9]}}
PARAMETERS = {"target_modules": [], "target_parameters": ["stack.weights", "head.weight"]}

VARIANTS = [
    Variant("LoRA"),
    Variant("rsLoRA", {"use_rslora": True}),
    Variant("DoRA", {"use_dora": True}),
    Variant("PiSSA", {"init_lora_weights": "pissa"}),
    Variant("PiSSA, by iteration", {"init_lora_weights": "pissa_niter_8"}),
    Variant("OLoRA", {"init_lora_weights": "olora"}),
    Variant("EVA", {"init_lora_weights": "eva"}),
    Variant("LoRA-GA", {"init_lora_weights": "lora_ga"}),
    Variant("orthogonal", {"init_lora_weights": "orthogonal"}),
    Variant("gaussian", {"init_lora_weights": "gaussian"}),
    Variant("A and B random", {"init_lora_weights": False}),
    Variant("DoRA, EVA", {"use_dora": True, "init_lora_weights": "eva"}),
    Variant("rows", ROWS, ("inner",)),
    Variant("rows, DoRA", ROWS | {"use_dora": True}, ("inner",)),
    Variant("parameters", PARAMETERS, ("stack.weights", "head.weight")),
    Variant("parameters, PiSSA", PARAMETERS | {"init_lora_weights": "pissa"}, ("stack.weights", "head.weight")),
    Variant("modules_to_save", {"modules_to_save": ["other"]}),
    Variant('bias="all"', {"bias": "all"}),
    Variant('bias="lora_only"', {"bias": "lora_only", "use_dora": True}),
    Variant("enable_lora", QKV),
    Variant("enable_lora, PiSSA", QKV | {"init_lora_weights": "pissa"}),
    Variant("LoRA+", lr_ratio=4),
    Variant(
        "DoRA, rsLoRA, gaussian, rows, modules_to_save, biases",
        ROWS
        | {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian"}
        | {"modules_to_save": ["other"], "bias": "all"},
        ("inner",),
    ),
    Variant("nf4", quantised="nf4"),
    Variant("int8", quantised="int8"),
]


@dataclass(frozen=True)
class Condition:
    """What a variant meets.

    Attributes:
        check: raises where the pair is not right.
        meaning: what it checks, for the page.
        with_quantised: whether there are such pairs with packed weights.
    """

    table: str
    label: str
    check: Callable[[Variant], None]
    meaning: str
    with_quantised: bool = True


def loose(variant: Variant, tolerance: float) -> float:
    """Return the tolerance of a comparison: int8 rounds the inputs of a layer too."""
    return max(tolerance, {"int8": 3e-2, "nf4": 1e-4}.get(variant.quantised, 0))


def assert_as_defined(model: nn.Module, naive: Naive, tolerance: float) -> None:
    """Compare outputs and every gradient with the definition's."""
    data, values = batch(3, dtype_of(model)), wide(model)
    model.zero_grad()
    assert_near(model(data[0]), naive.run(values, data[0]), tolerance, "output")
    loss_of(model, data).backward()
    naive.loss(values, data).backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        assert_near(parameter.grad, values[name].grad, tolerance, f"gradient of {name}")


def assert_merges(model: nn.Module, naive: Naive, tolerance: float) -> None:
    """Merged weights are W' rounded once, merged outputs fit, and every bit comes back."""
    before, expected = all_bits(model), naive.weights(wide(model))
    tokens, answer = batch(3)[0], naive.run(wide(model), batch(3)[0])
    merge(model)
    assert is_merged(model)
    for name in expected if not naive.variant.quantised else ():
        found, rounded = model.get_parameter(name), expected[name].detach().to(dtype_of(model))
        if found.dtype in HALF and not naive.options.get("use_dora"):  # DoRA's c is rounded before
            assert (found != rounded).double().mean() < 0.03, name
        assert_near(found, rounded, 4 * torch.finfo(found.dtype).eps, name)
    assert_near(model(tokens), answer, tolerance, "merged output")
    unmerge(model)
    assert all_bits(model) == before


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Compare all parameters and the answers bit for bit."""
    assert all_bits(found) == all_bits(expected)
    assert torch.equal(found(batch(3)[0]), expected(batch(3)[0]))


# --- precision ---


def precision(dtype: torch.dtype, keep: bool = True) -> Callable[[Variant], None]:
    def check(variant: Variant) -> None:
        model = filled(variant, dtype, options={"autocast_adapter_dtype": keep})
        kept = torch.float32 if (dtype in HALF and keep) or variant.quantised == "int8" else dtype  # int8 has no dtype
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {kept}
        naive, tolerance = Naive(variant, dtype), loose(variant, TOLERANCE[dtype])
        assert_as_defined(model, naive, tolerance)
        assert_merges(model, naive, tolerance)
        before = all_bits(model)
        train_(model, optimizer_for(variant, model), STEPS[:1])
        after = all_bits(model)
        moved = {name for name in before if after[name] != before[name]}
        assert moved == trainable(model).keys()

    return check


def cast_later(variant: Variant) -> None:
    """A merged model is cast to bfloat16: W is what casting it gives, and the factors stay in float32."""
    model, plain = filled(variant), fresh(variant).to(torch.bfloat16)
    merge(model)
    model.to(torch.bfloat16)
    unmerge(model)
    tables = {name: value for name, value in all_bits(plain).items() if name not in trainable(model)}
    assert tables.items() <= all_bits(model).items()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    naive = Naive(variant, torch.bfloat16)
    if variant.quantised:  # what was packed stays as it is
        naive.base |= {name: value for name, value in Naive(variant).base.items() if value.dim() == 2}
    assert_as_defined(model, naive, TOLERANCE[torch.bfloat16])
    assert_merges(model, naive, TOLERANCE[torch.bfloat16])


def unfrozen_in_half(variant: Variant) -> None:
    """W is unfrozen in bfloat16."""
    model, naive = filled(variant, torch.bfloat16), Naive(variant, torch.bfloat16)
    unfreeze_(variant, model)
    assert_as_defined(model, naive, TOLERANCE[torch.bfloat16])
    train_(model, optimizer_for(variant, model), STEPS[:1])
    assert_as_defined(model, naive, TOLERANCE[torch.bfloat16])
    assert_merges(model, naive, TOLERANCE[torch.bfloat16])


def under_autocast(variant: Variant) -> None:
    """Outputs and gradients in bfloat16; what merging writes is what it writes outside."""
    model, other = filled(variant), filled(variant)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch(3)[0]).dtype == other(batch(3)[0]).dtype == fresh(variant)(batch(3)[0]).dtype
        assert_as_defined(model, Naive(variant), TOLERANCE[torch.bfloat16])
        merge(model)
    merge(other)
    assert all_bits(model) == all_bits(other)
    with torch.autocast("cpu", torch.bfloat16):
        unmerge(model)
    unmerge(other)
    assert_same(model, other)


# --- starts and training ---


def start(variant: Variant) -> None:
    """A and B begin as the definition says, W' as W, and the user's random stream stands still."""
    plain = fresh(variant)
    stream = torch.get_rng_state()
    model = adapted(variant)
    assert torch.equal(torch.get_rng_state(), stream)
    naive, values = Naive(variant), wide(model)
    init = naive.options.get("init_lora_weights", True)
    tokens = batch(3)[0]
    if init is not False:
        assert_near(model(tokens), plain(tokens), 1e-6, "output before the first step")
    else:
        assert (model(tokens) - plain(tokens)).abs().max() > 1e-2
    for name in naive.variant.adapted:
        assert_starts(name, naive, values, init)


def assert_starts(name: str, naive: Naive, values: Tensors, init: Any) -> None:
    is_parameter = name in naive.base
    weight = naive.base[name if is_parameter else f"{name}.weight"]
    leaf = f"_{name.rpartition('.')[2]}" if is_parameter else ""
    module = name.rpartition(".")[0] if is_parameter else name
    a, b, *start = (
        values[key].detach()
        for factor in ("A", "B", "start_A", "start_B")
        if (key := f"{module}.lora_{factor}{leaf}".lstrip(".")) in values
    )
    parts = (naive.options.get("enable_lora") or {}).get(name)
    s, r = naive.scaling(name), naive.options["r"]
    matrices = list(weight) if weight.dim() == 3 else [weight]
    if parts is not None:
        matrices = [part for part, on in zip(weight.chunk(len(parts)), parts, strict=True) if on]
    pairs = list(zip(a.chunk(len(matrices)), b.chunk(len(matrices)), strict=True))
    if naive.options.get("use_dora"):
        assert_near(values[f"{name}.lora_magnitude"], weight.norm(dim=1), 1e-6, name)
    if start:
        assert torch.equal(a, start[0])
        assert torch.equal(b, start[1])
    for matrix, (a_i, b_i) in zip(matrices, pairs, strict=True):
        assert_pair_starts(matrix, a_i, b_i, init, s, r)
    if init == "eva":
        assert_principal(name, a, naive)
    if init == "lora_ga":
        assert_from_gradient(name, a, b, naive)
    assert product(a, b, weight.shape, parts).shape == weight.shape


def assert_pair_starts(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, init: Any, s: float, r: int) -> None:
    if str(init).startswith("pissa"):
        left, sizes, right = torch.linalg.svd(weight)
        best = left[:, :r] * sizes[:r] @ right[:r]
        if init == "pissa":
            assert_near(s * b @ a, best, 1e-5, init)
        assert (weight - s * b @ a).norm() < 1.05 * (weight - best).norm()
    elif init == "olora":
        q, upper = torch.linalg.qr(weight)
        assert_near(b @ a, q[:, :r] @ upper[:r], 1e-5, init)
    elif init == "orthogonal":
        assert (b @ a).abs().max() < 1e-6
        assert b.abs().min() > 0
        assert a.abs().min() > 0
    elif init == "gaussian":
        assert 0.6 < a.std() * r < 1.4
        assert not b.any()
    elif init in (True, False):
        bound = 1 / math.sqrt(a.shape[1])
        assert 0.8 * bound < a.abs().max() <= bound
        assert bool(b.any()) == (init is False)


def assert_principal(name: str, a: torch.Tensor, naive: Naive) -> None:
    """A's rows are the principal components of what the layer gets."""
    seen = inputs_of(name, naive)
    right = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)[2][: len(a)]
    assert_near((a @ right.T).abs(), torch.eye(len(a)).double(), 1e-3, name)


def assert_from_gradient(name: str, a: torch.Tensor, b: torch.Tensor, naive: Naive) -> None:
    weights = {key: value.clone() for key, value in naive.base.items()}
    weight = weights[f"{name}.weight"].requires_grad_()
    tokens, wanted = batch(0)
    answer = torch.func.functional_call(naive.shell, weights, (tokens,))
    (4 * (answer - wanted.double()).square().mean()).backward()
    left, sizes, right = torch.linalg.svd(weight.grad, full_matrices=False)
    r = len(a)
    assert_near(a.abs(), right[:r].abs(), 1e-3, name)
    assert_near(b.abs(), (left * sizes)[:, r : 2 * r].abs() * len(weight) ** 0.25 / 4, 1e-3, name)


def inputs_of(name: str, naive: Naive) -> torch.Tensor:
    found: list[torch.Tensor] = []
    layer = naive.shell.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, -2)))
    torch.func.functional_call(naive.shell, naive.base, (batch(0)[0],))
    handle.remove()
    return found[0]


def patterns(variant: Variant) -> None:
    """Another rank for the last of the layers, another alpha for the first and the last."""
    first, last = variant.adapted[0], variant.adapted[-1]
    options = {"rank_pattern": {last: 4}, "alpha_pattern": {first: 5, last: 7}}
    model, naive = filled(variant, options=options), Naive(variant, **options)
    ranks = {p.shape[1] for name, p in model.named_parameters() if name.startswith(last.split(".")[0] + ".lora_B")}
    assert ranks == {4} if first != last else ranks
    assert_as_defined(model, naive, loose(variant, 1e-5))
    assert_merges(model, naive, loose(variant, 1e-5))
    for again in (fresh(variant), adapted(variant, draw=9)):
        load_adapter(again, as_checkpoint(model))
        assert_same(again, model)


def training(variant: Variant, unfrozen: tuple[str, ...] = (), after: int = 0) -> None:
    """Some steps are those of the definition; with base tensors that the user unfreezes after some of them."""
    model, naive = filled(variant), Naive(variant)
    plain, values, steps = fresh(variant), wide(model), STEPS
    optimizer, reference = optimizer_for(variant, model), naive_optimizer(naive, values)
    train_(model, optimizer, steps[:after])
    naive_train_(naive, values, reference, steps[:after])
    for name in unfrozen:
        parameter = model.get_parameter(name).requires_grad_()
        held = any(parameter is each for group in optimizer.param_groups for each in group["params"])
        if not held:
            optimizer.add_param_group({"params": [parameter]})
            values[name] = parameter.detach().double().requires_grad_()
            reference.add_param_group({"params": [values[name]]})
    with noting(unfrozen, model):
        adapter_state_dict(model)
    train_(model, optimizer, steps[after:])
    naive_train_(naive, values, reference, steps[after:])
    tolerance = loose(variant, 2e-5)
    for name, parameter in trainable(model).items():
        assert_near(parameter, values[name], tolerance, name)
    assert_as_defined(model, naive, tolerance)
    assert_merges(model, naive, tolerance)
    assert_kept(variant, model, plain)


@contextmanager
def noting(unfrozen: tuple[str, ...], model: nn.Module) -> Iterator[None]:
    """Expect the warning of what was unfrozen, unless the options train it already."""
    from lightning_lora.model.injection import require_injection

    if set(unfrozen) <= require_injection(model, "").record.trained:
        yield
    else:
        with pytest.warns(UserWarning, match="base parameters were unfrozen"):
            yield


def assert_kept(variant: Variant, model: nn.Module, plain: nn.Module) -> None:
    """All that was trained is in the adapter's state, and the plain model comes back."""
    tokens, state = batch(3)[0], adapter_state_dict(model)
    again = adapted(variant, draw=9)
    load_adapter(again, {name: value.clone() for name, value in state.items()})
    assert all_bits(again) == all_bits(model)
    with disable_adapter(model):
        assert torch.equal(model(tokens), plain(tokens))
    unload(model)
    assert all_bits(model) == all_bits(plain)


def weight_of(variant: Variant) -> str:
    """Return the name of the first weight that is adapted."""
    first = variant.adapted[0]
    return first if variant.options.get("target_parameters") else f"{first}.weight"


def unfreeze_(variant: Variant, model: nn.Module) -> None:
    model.get_parameter(weight_of(variant)).requires_grad_()
    with pytest.warns(UserWarning, match="base parameters were unfrozen"):
        adapter_state_dict(model)


def unfreezing(*names: str, after: int = 0) -> Callable[[Variant], None]:
    def check(variant: Variant) -> None:
        training(variant, tuple(weight_of(variant) if name == "W" else name for name in names), after)

    return check


def frozen_again(variant: Variant) -> None:
    """W is trained for a while, and then belongs to the base that others are trained on."""
    model, naive = filled(variant), Naive(variant)
    unfreeze_(variant, model)
    weight, values = model.get_parameter(weight_of(variant)), wide(model)
    optimizer, reference = optimizer_for(variant, model), naive_optimizer(naive, values)
    for numbers in (STEPS[:2], STEPS[2:]):
        train_(model, optimizer, numbers)
        naive_train_(naive, values, reference, numbers)
        optimizer.zero_grad()
        reference.zero_grad()
        weight.requires_grad_(False)
        values[weight_of(variant)].requires_grad_(False)
    assert weight_of(variant) in adapter_state_dict(model)
    naive.base[weight_of(variant)] = weight.double()
    assert_near(weight, values[weight_of(variant)], 2e-5, "W")
    assert_as_defined(model, naive, 2e-5)
    assert_merges(model, naive, 2e-5)


def changed_by_hand(variant: Variant) -> None:
    """The base weights are changed in place, and then another base is loaded."""
    model, naive = filled(variant), Naive(variant)
    model(batch(3)[0])
    for name in ("embed.weight", weight_of(variant)):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.mul_(1.5)
        naive.base[name] = parameter.detach().double()
    assert_as_defined(model, naive, 1e-5)
    assert_merges(model, naive, 1e-5)


def another_base(variant: Variant) -> None:
    """Another base is loaded: an untrained adapter starts from that, a trained one stays."""
    base = fresh(variant, seed=8)
    model, trained = adapted(variant), filled(variant)
    before, keeps = wide(trained), variant.options.get("init_lora_weights") is False
    for each in (model, trained):
        each(batch(3)[0])
        each.load_state_dict(base.state_dict())
    if not keeps:
        assert_near(model(batch(3)[0]), base(batch(3)[0]), 1e-6, "untrained")
    merge(model)
    unmerge(model)
    naive = Naive(variant, seed=8)
    assert_as_defined(fill_(model, seed=12), naive, loose(variant, 1e-5))
    assert all(torch.equal(value, before[name]) for name, value in wide(trained).items() if "lora_" in name)
    assert_as_defined(trained, naive, loose(variant, 1e-5))
    assert_merges(trained, naive, loose(variant, 1e-5))


def inference(variant: Variant) -> None:
    """Answers and merges in inference mode, and trains after it."""
    model, naive = filled(variant), Naive(variant)
    values, before = wide(model), all_bits(model)
    expected = naive.run(values, batch(3)[0])
    for _ in range(2):
        with torch.inference_mode():
            assert_near(model(batch(3)[0]), expected, loose(variant, 1e-5), "in inference mode")
            merge(model)
            assert_near(model(batch(3)[0]), expected, loose(variant, 1e-5), "merged")
            unmerge(model)
        assert all_bits(model) == before
        assert_as_defined(model, naive, loose(variant, 1e-5))


def dropout(variant: Variant) -> None:
    """In evaluation the definition's outputs; in training others, twice as random, that reach every factor."""
    model, naive = filled(variant, options={"lora_dropout": 0.5}), Naive(variant)
    tokens = batch(3)[0]
    model.train()
    answers = [model(tokens) for _ in range(2)]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    loss_of(model, batch(3)).backward()
    assert all(parameter.grad.any() for parameter in trainable(model).values())
    assert_as_defined(model.eval(), naive, loose(variant, 1e-5))
    assert_merges(model.train().eval(), naive, loose(variant, 1e-5))


# --- files and state ---


def resume(kind: str, unfrozen: bool = False) -> Callable[[Variant], None]:
    """Two steps, a checkpoint in another program, two more: as four in one. W may be unfrozen in both."""

    def check(variant: Variant) -> None:
        whole, cut = filled(variant), filled(variant)
        if unfrozen:
            unfreeze_(variant, whole), unfreeze_(variant, cut)
        optimizer = optimizer_for(variant, cut)
        train_(whole, optimizer_for(variant, whole), STEPS)
        train_(cut, optimizer, STEPS[:2])
        checkpoint: dict[str, Any] = {"state_dict": cut.state_dict(), "optimizer": optimizer.state_dict()}
        if kind != "state":
            convert_checkpoint(cut, checkpoint, kind)  # type: ignore[arg-type]
        checkpoint = written_and_read(checkpoint)
        if kind == "merged":
            plain = fresh(variant, seed=8)
            plain.load_state_dict(checkpoint["state_dict"])
            naive = Naive(variant)
            assert_near(plain(batch(3)[0]), naive.run(wide(cut), batch(3)[0]), 1e-5, "merged checkpoint")
        again = adapted(variant, seed=8 if kind in ("full", "state") else 1, draw=9)
        if unfrozen:
            unfreeze_(variant, again)
        prepare_for_load(again, checkpoint)
        again.load_state_dict(checkpoint["state_dict"])
        assert_same(again, cut)
        optimizer = optimizer_for(variant, again)
        optimizer.load_state_dict(checkpoint["optimizer"])
        train_(again, optimizer, STEPS[2:])
        assert_same(again, whole)
        if kind != "state":  # which says nothing of the values before training
            with disable_adapter(again):
                assert torch.equal(again(batch(3)[0]), fresh(variant)(batch(3)[0]))

    return check


def written_and_read(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


def through_folder(variant: Variant) -> None:
    """What is saved as PEFT's folder comes back onto a plain model."""
    model, again = filled(variant), fresh(variant)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        load_adapter(again, folder)
    assert torch.equal(again(batch(3)[0]), model(batch(3)[0]))
    assert trainable(again).keys() == trainable(model).keys()
    train_(again, optimizer_for(variant, again), STEPS)
    train_(model, optimizer_for(variant, model), STEPS)
    assert torch.equal(again(batch(3)[0]), model(batch(3)[0]))


def swap(merged: bool) -> Callable[[Variant], None]:
    """An adapter of another rank and alpha is put in the place of the model's, and that one back."""

    def check(variant: Variant) -> None:
        model = filled(variant)
        options = {"r": 4, "lora_alpha": 9}
        other = fill_(adapted(variant, draw=9, options=options), seed=11)
        before, objects = all_bits(model), dict(model.named_parameters())
        sources = [as_checkpoint(other), as_checkpoint(model)]
        if merged:
            merge(model)
        load_adapter(model, sources[0])
        assert is_merged(model) == merged
        assert dict(model.named_parameters()).items() == objects.items()
        naive, tolerance = Naive(variant, **options), loose(variant, 1e-5)
        assert_near(model(batch(3)[0]), naive.run(wide(other), batch(3)[0]), tolerance, "swapped")
        if merged:
            unmerge(model)
        assert_same(model, other)
        assert_as_defined(model, naive, tolerance)
        model.zero_grad()
        if merged:
            merge(model)
        load_adapter(model, sources[1])
        if merged:
            unmerge(model)
        assert all_bits(model) == before
        assert_as_defined(model, Naive(variant), tolerance)

    return check


def as_checkpoint(model: nn.Module) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    convert_checkpoint(model, checkpoint, "adapter")
    return copy.deepcopy(checkpoint)


def copied(make: Callable[[nn.Module], nn.Module]) -> Callable[[Variant], None]:
    """A copy, also one of a merged model, answers and trains as the model does, and shares nothing with it."""

    def check(variant: Variant) -> None:
        model = filled(variant)
        before = all_bits(model)
        merge(model)
        other: Any = make(model)
        unmerge(model)
        assert is_merged(other)
        unmerge(other)
        assert_same(other, model)
        train_(other, optimizer_for(variant, other), STEPS)
        assert all_bits(model) == before
        train_(model, optimizer_for(variant, model), STEPS)
        assert_same(other, model)
        unload(other)
        assert all_bits(other) == all_bits(fresh(variant))

    return check


def by_pickle(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


# --- merging and taking out ---


def merge_cycles(variant: Variant) -> None:
    """Cycles with an adapter that is trained in between; a merged model's state dict holds W."""
    model, naive = filled(variant), Naive(variant)
    optimizer = optimizer_for(variant, model)
    for number in STEPS[:3]:
        assert_merges(model, naive, loose(variant, 1e-5))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        merge(model)
        merge(model)
        found = model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        unmerge(model)
        unmerge(model)
        train_(model, optimizer, [number])
    trained = all_bits(model)
    assert {name for name, value in all_bits(fresh(variant)).items() if trained[name] != value} <= {*trainable(model)}


def disabled(variant: Variant) -> None:
    """Inside, the plain model's bits and answers; outside, those of before, merged or not."""
    model, plain = filled(variant), fresh(variant)
    tokens = batch(3)[0]
    for merged in (False, True):
        if merged:
            merge(model)
        before, answer = all_bits(model), model(tokens)
        with disable_adapter(model):
            assert torch.equal(model(tokens), plain(tokens))
        assert is_merged(model) == merged
        assert all_bits(model) == before
        assert torch.equal(model(tokens), answer)
    unmerge(model)
    assert_as_defined(model, Naive(variant), loose(variant, 1e-5))


def unloaded(variant: Variant) -> None:
    """The model is the plain one again: bits, classes, requires_grad; merged before or not."""
    for merged in (False, True):
        model, plain = filled(variant), fresh(variant)
        if merged:
            merge(model)
        unload(model)
        assert all_bits(model) == all_bits(plain)
        assert trainable(model).keys() == trainable(plain).keys()
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def merged_for_good(variant: Variant) -> None:
    """A plain model with W', also from merged_state_dict."""
    model, plain, naive = filled(variant), fresh(variant), Naive(variant)
    expected = naive.weights(wide(model))
    state = merged_state_dict(model)
    merge_and_unload(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert state.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, value in expected.items():
        assert_near(model.get_parameter(name), value, 1e-6, name)
        assert torch.equal(state[name], model.get_parameter(name)), name


PRECISION, TRAINING, STATE, MERGING = "Precision", "Training", "State", "Merging"
CONDITIONS = [
    Condition(PRECISION, "float32", precision(torch.float32), "outputs, gradients, W' and a step in float32"),
    Condition(PRECISION, "float64", precision(torch.float64), "the same in float64, to twelve digits"),
    Condition(PRECISION, "bfloat16", precision(torch.bfloat16), "weights in bfloat16, factors in float32"),
    Condition(PRECISION, "bfloat16 factors", precision(torch.bfloat16, keep=False), "`autocast_adapter_dtype=False`"),
    Condition(PRECISION, "float16", precision(torch.float16), "weights in float16, factors in float32"),
    Condition(PRECISION, "float16 factors", precision(torch.float16, keep=False), "`autocast_adapter_dtype=False`"),
    Condition(PRECISION, "autocast", under_autocast, "to bfloat16; merging under it writes what it writes outside"),
    Condition(PRECISION, "cast while merged", cast_later, "a merged model is cast to bfloat16, then unmerged"),
    Condition(
        PRECISION,
        "W unfrozen, bfloat16",
        unfrozen_in_half,
        "the user trains an adapted weight in bfloat16",
        with_quantised=False,
    ),
    Condition(TRAINING, "start", start, "A and B begin as defined, W' as W, and torch's random stream stands still"),
    Condition(TRAINING, "steps", training, "four steps of SGD; then everything is saved, and taken out again"),
    Condition(TRAINING, "patterns", patterns, "`rank_pattern` and `alpha_pattern`, trained, merged and loaded"),
    Condition(
        TRAINING,
        "W unfrozen",
        unfreezing("W"),
        "the user trains an adapted weight from the first step on; it is saved, and goes back when the adapter does",
        with_quantised=False,
    ),
    Condition(TRAINING, "W unfrozen later", unfreezing("W", after=2), "from the third step on", with_quantised=False),
    Condition(TRAINING, "W frozen again", frozen_again, "after two steps, for two more", with_quantised=False),
    Condition(TRAINING, "other weight unfrozen", unfreezing("embed.weight", after=2), "the table, from the third step"),
    Condition(TRAINING, "biases unfrozen", unfreezing("inner.bias", "other.bias", after=1), "from the second step"),
    Condition(TRAINING, "base edited", changed_by_hand, "weights are changed in place", with_quantised=False),
    Condition(TRAINING, "another base", another_base, "load_state_dict with another base, before and after training"),
    Condition(TRAINING, "lora_dropout", dropout, "acts in training alone"),
    Condition(STATE, "adapter", resume("adapter"), "an adapter checkpoint: two steps more are the uninterrupted ones"),
    Condition(STATE, "merged", resume("merged"), "the same from a merged one, which a plain model loads too"),
    Condition(STATE, "full", resume("full"), "the same from a full one, on another base"),
    Condition(STATE, "state_dict", resume("state"), "the same from the model's own state dict"),
    *(
        Condition(
            STATE,
            f"{kind}, W unfrozen",
            resume(kind, unfrozen=True),
            "the same where the user trains an adapted weight",
            with_quantised=False,
        )
        for kind in ("adapter", "merged", "full")
    ),
    Condition(STATE, "PEFT folder", through_folder, "save_adapter and load_adapter, onto a plain model"),
    Condition(STATE, "swap", swap(merged=False), "load_adapter of another rank and alpha, and back"),
    Condition(STATE, "swap, merged", swap(merged=True), "the same with a merged model"),
    Condition(STATE, "deepcopy", copied(copy.deepcopy), "of a merged model; both train on"),
    Condition(STATE, "pickle", copied(by_pickle), "the same"),
    Condition(MERGING, "merge, unmerge", merge_cycles, "three cycles, training in between; state dicts hold W"),
    Condition(MERGING, "inference_mode", inference, "around answers and merging, then training"),
    Condition(
        MERGING, "disable_adapter", disabled, "merged and not: the plain model's bits inside, the old ones after"
    ),
    Condition(MERGING, "unload", unloaded, "bits, classes and requires_grad of the plain model"),
    Condition(MERGING, "merge_and_unload", merged_for_good, "plain weights W', as in merged_state_dict"),
]


ROW_OF = {variant.label: variant for variant in VARIANTS}
COLUMN_OF = {condition.label: condition for condition in CONDITIONS}
NO_PAIR = "-"
PAIRS = [
    (variant.label, condition.label)
    for condition in CONDITIONS
    for variant in VARIANTS
    if not variant.quantised
    or (condition.with_quantised and (variant.quantised, condition.label) != ("nf4", "float64"))
]
HEAD = """# Pairs of features

<!-- written by tests/test_pairs.py -->

Each variant meets each precision, change and way to keep it, on a small model. A test runs every pair, in a few
milliseconds each, and compares this page with what came of it; all of them together take some ten seconds of one core.

"right" means what [test_pairs.py](test_pairs.py) checks for the row, against [a few lines in
float64](support/pairs.py) that are written from the definitions: outputs, the gradient of every trained parameter, W'
rounded once, and every bit where bits must come back. "refused" shows how the error begins. "-" is a pair that there
is not, as gradients of weights that are packed in integers.
"""


def outcome(variant: Variant, condition: Condition) -> str:
    """Return right, or refused with how the error begins; anything else is a failure of the pair."""
    try:
        condition.check(variant)
    except LoRAError as error:
        return f"refused: {' '.join(str(error).split()[:8])} ..."
    return "right"


def render(outcomes: dict[tuple[str, str], str]) -> str:
    """Return the page: a table for each group of conditions, one line for each condition and what it means."""
    parts = [HEAD]
    for table in dict.fromkeys(condition.table for condition in CONDITIONS):
        columns = [condition for condition in CONDITIONS if condition.table == table]
        lines = [f"## {table}", ""]
        lines += [f"- **{condition.label}**: {condition.meaning}" for condition in columns]
        lines += [
            "",
            f"| | {' | '.join(condition.label for condition in columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in VARIANTS:
            cells = [outcomes.get((row.label, column.label), NO_PAIR) for column in columns]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


@functools.cache
def page_outcomes() -> dict[tuple[str, str], str]:
    """Return what the page says of each pair."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        columns, _, *rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        for label, *cells in rows:
            found |= {(label, column): cell for column, cell in zip(columns, cells, strict=True) if cell != NO_PAIR}
    return found


def test_the_page_has_all_pairs():
    if os.environ.get("WRITE_TABLE"):
        outcomes = page_outcomes() if PAGE.exists() else {}
        for row, column in PAIRS:
            try:
                outcomes[row, column] = outcome(ROW_OF[row], COLUMN_OF[column])
            except pytest.skip.Exception:  # of a package that is not installed
                continue
        PAGE.write_text(render({pair: outcomes[pair] for pair in PAIRS}))
        page_outcomes.cache_clear()
    assert PAGE.read_text() == render(page_outcomes())
    assert page_outcomes().keys() == set(PAIRS)


@pytest.mark.parametrize(("variant", "condition"), PAIRS)
def test_a_pair_gives_the_outcome_in_the_page(variant: str, condition: str):
    assert outcome(ROW_OF[variant], COLUMN_OF[condition]) == page_outcomes()[variant, condition]
