"""What is checked where a variant of LoRA meets a condition, as a precision, a file or a change by the user.

Each check takes a variant, and raises where the pair is not right.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAWeightAveraging,
    adapter_state_dict,
    disable_adapter,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint, prepare_for_load
from lightning_lora.model.adapted_model import open_model
from support.models.pairs import (
    DELTAS,
    FROM_DATA,
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
    place,
    product,
    train_,
    trainable,
    wide,
)
from support.runs.lightning_versions import HAS_WEIGHT_AVERAGING

HALF = (torch.float16, torch.bfloat16)
RANKED = {"loha": "lora_hada_w1_a"}  # the tensor whose second dimension is the rank
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
STEPS = range(4)


def loose(variant: Variant, tolerance: float) -> float:
    """Return the tolerance of a comparison: int8 rounds the inputs of a layer too."""
    return max(tolerance, {"int8": 3e-2, "nf4": 1e-4}.get(variant.quantized, 0))


def assert_as_defined(model: nn.Module, naive: Naive, tolerance: float) -> None:
    """Compare outputs and every gradient with the definition's."""
    data, values = batch(3, dtype_of(model)), wide(model)
    model.zero_grad()
    assert_near(model(data[0]), naive.run(values, data[0]), tolerance, "output")
    loss_of(model, data).backward()  # type: ignore[no-untyped-call]
    naive.loss(values, data).backward()  # type: ignore[no-untyped-call]
    for name, parameter in trainable(model).items():
        found, expected = parameter.grad, values[name].grad
        assert found is not None, name
        assert expected is not None, name
        assert_near(found, expected, tolerance, f"gradient of {name}")


def assert_merges(model: nn.Module, naive: Naive, tolerance: float) -> None:
    """Merged weights are W' rounded once, merged outputs fit, and every bit comes back."""
    before, expected = all_bits(model), naive.weights(wide(model))
    tokens, answer = batch(3)[0], naive.run(wide(model), batch(3)[0])
    merge(model)
    assert is_merged(model)
    for name in expected if not naive.variant.quantized else ():
        found, rounded = model.get_parameter(name), expected[name].detach().to(dtype_of(model))
        if found.dtype in HALF and not naive.options.get("use_dora"):  # DoRA's c is rounded before
            assert (found.cpu() != rounded).double().mean() < 0.03, name
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
        kept = torch.float32 if (dtype in HALF and keep) or variant.quantized == "int8" else dtype  # int8 has no dtype
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
    if variant.quantized:  # what was packed stays as it is
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
    with torch.autocast(place(), torch.bfloat16):
        assert model(batch(3)[0]).dtype == other(batch(3)[0]).dtype == fresh(variant)(batch(3)[0]).dtype
        assert_as_defined(model, Naive(variant), TOLERANCE[torch.bfloat16])
        merge(model)
    merge(other)
    assert all_bits(model) == all_bits(other)
    with torch.autocast(place(), torch.bfloat16):
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
    if naive.options.get("variant") in DELTAS:
        assert not DELTAS[naive.options["variant"]](name, weight.shape, values).any()
        return
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
    tokens, wanted = (values.cpu() for values in batch(0))
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
    torch.func.functional_call(naive.shell, naive.base, (batch(0)[0].cpu(),))
    handle.remove()
    return found[0]


def patterns(variant: Variant) -> None:
    """Another rank for the last of the layers, another alpha for the first and the last."""
    first, last = variant.adapted[0], variant.adapted[-1]
    options: Any = {"rank_pattern": {last: 4}, "alpha_pattern": {first: 5, last: 7}}
    model, naive = filled(variant, options=options), Naive(variant, **options)
    leaf = RANKED.get(variant.options.get("variant", ""), "lora_B")
    ranks = {p.shape[1] for name, p in model.named_parameters() if name.startswith(f"{last.split('.')[0]}.{leaf}")}
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
            values[name] = parameter.detach().cpu().double().requires_grad_()
            reference.add_param_group({"params": [values[name]]})
    late = late_of(unfrozen, model)
    with naming("base parameters were unfrozen", late):
        adapter_state_dict(model)
    train_(model, optimizer, steps[after:])
    naive_train_(naive, values, reference, steps[after:])
    tolerance = loose(variant, 2e-5)
    for name, parameter in trainable(model).items():
        assert_near(parameter, values[name], tolerance, name)
    assert_as_defined(model, naive, tolerance)
    assert_merges(model, naive, tolerance)
    assert_kept(variant, model, plain, late)


def late_of(unfrozen: tuple[str, ...], model: nn.Module) -> list[str]:
    """Return which of the weights that were unfrozen have first values that nothing has kept."""
    known = open_model(model, "").initial_of()
    return [name for name in unfrozen if name not in known]


@contextmanager
def naming(message: str, names: list[str]) -> Iterator[None]:
    """Expect a warning where there are such names."""
    with pytest.warns(UserWarning, match=message) if names else nullcontext():
        yield


@contextmanager
def without_adapter(model: nn.Module, late: list[str]) -> Iterator[None]:
    """disable_adapter, with a warning where there are such names."""
    with ExitStack() as stack:
        with naming("disable_adapter cannot bring back", late):
            stack.enter_context(disable_adapter(model))
        yield


def assert_kept(variant: Variant, model: nn.Module, plain: nn.Module, late: list[str]) -> None:
    """All that was trained is in the adapter's state, and the plain model comes back, but for what is late."""
    tokens, state = batch(3)[0], adapter_state_dict(model)
    again = adapted(variant, draw=9)
    load_adapter(again, {name: value.clone() for name, value in state.items()})
    assert all_bits(again) == all_bits(model)
    trained = {name: model.get_parameter(name).detach().clone() for name in late}
    with without_adapter(model, late), torch.no_grad():
        assert all(torch.equal(model.get_parameter(name), value) for name, value in trained.items())
        for name in late:
            model.get_parameter(name).copy_(plain.get_parameter(name))
        assert torch.equal(model(tokens), plain(tokens))
    with naming("unload cannot bring back", late):
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
    naive.base[weight_of(variant)] = weight.cpu().double()
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
        naive.base[name] = parameter.detach().cpu().double()
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
    if variant.options.get("init_lora_weights") not in FROM_DATA:
        there = adapted(variant, seed=8)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in trainable(there).items())
    merge(model)
    unmerge(model)
    naive = Naive(variant, seed=8)
    assert_as_defined(fill_(model, seed=12), naive, loose(variant, 1e-5))
    assert all(torch.equal(value, before[name]) for name, value in wide(trained).items() if "lora_" in name)
    assert_as_defined(trained, naive, loose(variant, 1e-5))
    assert_merges(trained, naive, loose(variant, 1e-5))


def inference(variant: Variant) -> None:
    """Answers and is merged in inference mode, and is unmerged, trained and merged outside."""
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
        assert_merges(model, naive, loose(variant, 1e-5))


def dropout(variant: Variant) -> None:
    """In evaluation the definition's outputs; in training others, twice as random, that reach every factor."""
    model, naive = filled(variant, options={"lora_dropout": 0.5}), Naive(variant)
    tokens = batch(3)[0]
    model.train()
    answers = [model(tokens) for _ in range(2)]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    loss_of(model, batch(3)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable(model).values())
    assert_as_defined(model.eval(), naive, loose(variant, 1e-5))
    assert_merges(model.train().eval(), naive, loose(variant, 1e-5))


# --- files and state ---


def resume(kind: str, unfrozen: bool = False, merged: bool = False) -> Callable[[Variant], None]:
    """Two steps, a checkpoint in another program, two more: as four in one. W may be unfrozen, or merged, in both."""

    def check(variant: Variant) -> None:
        whole, cut = filled(variant), filled(variant)
        if unfrozen:
            unfreeze_(variant, whole)
            unfreeze_(variant, cut)
        optimizer = optimizer_for(variant, cut)
        train_(whole, optimizer_for(variant, whole), STEPS)
        train_(cut, optimizer, STEPS[:2])
        if merged:
            merge(cut)
        checkpoint: dict[str, Any] = {"state_dict": cut.state_dict(), "optimizer": optimizer.state_dict()}
        if kind != "state":
            convert_checkpoint(cut, checkpoint, kind)  # type: ignore[arg-type]
        checkpoint = written_and_read(checkpoint)
        if merged:
            unmerge(cut)
        if kind == "merged":
            plain = fresh(variant, seed=8)
            plain.load_state_dict(checkpoint["state_dict"])
            naive = Naive(variant)
            assert_near(plain(batch(3)[0]), naive.run(wide(cut), batch(3)[0]), 1e-5, "merged checkpoint")
        again = adapted(variant, seed=8 if kind in ("full", "state") else 1, draw=9)
        if unfrozen:
            unfreeze_(variant, again)
        if merged:
            merge(again)
        prepare_for_load(again, checkpoint)
        again.load_state_dict(checkpoint["state_dict"])
        if merged:
            unmerge(again)
        assert_same(again, cut)
        optimizer = optimizer_for(variant, again)
        optimizer.load_state_dict(checkpoint["optimizer"])
        train_(again, optimizer, STEPS[2:])
        assert_same(again, whole)
        if kind != "state":  # which says nothing of the values before training
            late = [weight_of(variant)] if unfrozen else []
            plain = fresh(variant)
            with without_adapter(again, late), torch.no_grad():
                for name in late:
                    again.get_parameter(name).copy_(plain.get_parameter(name))
                assert torch.equal(again(batch(3)[0]), plain(batch(3)[0]))

    return check


def written_and_read(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


def through_folder(with_patterns: bool = False) -> Callable[[Variant], None]:
    """What is saved as PEFT's folder comes back onto a plain model."""

    def check(variant: Variant) -> None:
        patterns = {"rank_pattern": {variant.adapted[0]: 4}, "alpha_pattern": {variant.adapted[-1]: 7}}
        model, again = filled(variant, options=patterns if with_patterns else {}), fresh(variant)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, folder)
            load_adapter(again, folder)
        assert_same(again, model)
        assert trainable(again).keys() == trainable(model).keys()
        train_(again, optimizer_for(variant, again), STEPS)
        train_(model, optimizer_for(variant, model), STEPS)
        assert_same(again, model)

    return check


def taken(merged: bool = False) -> Callable[[Variant], None]:
    """An adapter that was taken stays as it is while the model trains on, and comes back bit for bit."""

    def check(variant: Variant) -> None:
        model = filled(variant)
        before = all_bits(model)
        if merged:
            merge(model)
        adapter = take_adapter(model)
        unmerge(model)
        fill_(model, seed=11)
        assert all_bits(model) != before
        if merged:
            merge(model)
        load_adapter(model, adapter)
        assert is_merged(model) == merged
        unmerge(model)
        assert all_bits(model) == before
        fill_(model, seed=12)
        load_adapter(model, adapter)
        load_adapter(other := fresh(variant), adapter)
        assert all_bits(other) == before
        assert_same(model, other)

    return check


def swap(merged: bool = False, unfrozen: bool = False) -> Callable[[Variant], None]:
    """An adapter of another rank and alpha perhaps with a trained W, takes the place of the model's, and back."""

    def check(variant: Variant) -> None:
        model = filled(variant)
        options: Any = variant.swapped
        other = adapted(variant, draw=9, options=options)
        if unfrozen:
            unfreeze_(variant, other)
        fill_(other, seed=11)
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
        assert all_bits(model) == all_bits(other)
        naive.base |= {name: value for name, value in wide(other).items() if name in naive.base}
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


def averaged(variant: Variant) -> None:
    """An average over steps is that of the definition; a model that has it merges, and gets its bits back."""
    if not HAS_WEIGHT_AVERAGING:
        pytest.skip("needs Lightning 2.6")
    model, naive = filled(variant), Naive(variant)
    trainer: Any = SimpleNamespace(global_step=0)
    optimizer, average = optimizer_for(variant, model), LoRAWeightAveraging(0.75)
    average.on_train_start(trainer, model)
    values = {name: parameter.detach().cpu().double() for name, parameter in trainable(model).items()}
    for number in STEPS:
        train_(model, optimizer, [number])
        trainer.global_step += 1
        average.on_train_batch_end(trainer, model, None, None, number)
        share = 0.25 if trainer.global_step > 1 else 1.0  # the first update copies
        for name, parameter in trainable(model).items():
            values[name] += share * (parameter.detach().cpu().double() - values[name])
    before, tolerance = all_bits(model), loose(variant, 1e-5)
    average.on_validation_epoch_start(trainer, model)
    assert all_bits(model) != before
    for name, parameter in trainable(model).items():
        assert_near(parameter, values[name], tolerance, name)
    assert_as_defined(model, naive, tolerance)
    assert_merges(model, naive, tolerance)
    average.on_validation_epoch_end(trainer, model)
    assert all_bits(model) == before


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
    state = {name: value.clone() for name, value in merged_state_dict(model).items()}
    merge_and_unload(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert state.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, value in expected.items():
        assert_near(model.get_parameter(name), value, 1e-6, name)
        assert torch.equal(state[name], model.get_parameter(name)), name
