"""Adapters beside the trained one in a model: attached, weakened, taken out, and what other verbs make of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    attach,
    attached,
    detach,
    disable_adapter,
    initialize_from_data,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    scaled,
    set_strength,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.model.adapted_model import open_model
from support.models.networks import bits

X = torch.linspace(-1, 1, 24).view(3, 8)


def net() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def filled(seed: int = 3, model: nn.Module | None = None, **options: Any) -> Any:
    model = net() if model is None else model
    inject(model, LoRAConfig(**{"r": 2, "init_lora_weights": False} | options), seed=seed)
    return model


def other(seed: int, rank: int = 3) -> Adapter:
    return take_adapter(filled(seed, r=rank))


def with_two(model: nn.Module) -> Any:
    attach(model, other(1), name="one", strength=0.5)
    attach(model, other(2, 1), name="two")
    return model


def update(model: nn.Module) -> list[torch.Tensor]:
    """What is added to each weight now."""
    state = merged_state_dict(model)
    return [state[f"{i}.weight"] - net()[i].weight for i in (0, 2)]


def weight_bits(model: nn.Module) -> list[bytes]:
    return [bits(value.detach()) for name, value in model.named_parameters() if name.endswith("weight")]


# --- what an attached adapter is ---


@pytest.mark.core
def test_it_is_no_parameter_no_buffer_and_in_no_state_dict():
    model, alone = with_two(filled()), filled()
    for names in ("parameters", "buffers"):
        assert [n for n, _ in getattr(model, f"named_{names}")()] == [n for n, _ in getattr(alone, f"named_{names}")()]
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert adapter_state_dict(model).keys() == adapter_state_dict(alone).keys()
    assert "attached=['one', 'two']" in repr(model)


def test_another_order_of_attaching_gives_the_same_names_and_bits():
    one, two = filled(), filled()
    for model, names in ((one, "ab"), (two, "ba")):
        assert attached(model) == {}
        for name in names:
            attach(model, other(ord(name)), name=name, strength=2 if name == "b" else 1)
    assert [*attached(one).items()] == [*attached(two).items()] == [("a", 1.0), ("b", 2.0)]
    assert torch.equal(one(X), two(X))
    merge(one)
    merge(two)
    assert weight_bits(one) == weight_bits(two)


@pytest.mark.parametrize(
    ("copied", "alone"), [(copy.deepcopy, False), (lambda model: pickle.loads(pickle.dumps(model)), True)]
)
def test_copies_have_their_own(copied: Callable[[Any], Any], alone: bool):
    model = with_two(net() if alone else filled())
    again = copied(model)
    assert torch.equal(again(X), model(X))
    set_strength(again, 0.0, "one")
    assert attached(model) == {"one": 0.5, "two": 1.0}
    assert not torch.equal(again(X), model(X))
    detach(again, "one")
    detach(again, "two")
    assert torch.equal(again(X), (net() if alone else filled())(X))


def test_a_cast_rounds_none_of_it_and_a_move_without_values_leaves_it():
    model = with_two(filled())
    before = model(X)
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model[0].lora.attached.b, with_two(filled())[0].lora.attached.b)
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(filled().state_dict())
    assert torch.equal(model(X), before)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(X.double()).float(), before)
    exact = torch.func.functional_call(net().double(), merged_state_dict(wide), X.double())
    torch.testing.assert_close(wide(X.double()), exact, rtol=1e-13, atol=1e-13)


def test_dropout_is_of_the_trained_adapter_alone():
    model = with_two(filled(lora_dropout=0.5)).train()
    assert not torch.equal(model(X), model(X))
    with scaled(model, 0.0):
        assert torch.equal(model(X), model(X))
    nn.init.zeros_(model[0].lora_B)
    nn.init.zeros_(model[2].lora_B)
    assert torch.equal(model(X), model(X))


# --- strength ---


@pytest.mark.core
def test_set_weight_is_exact_and_takes_several():
    model = with_two(filled())
    before, state = model(X), update(model)
    set_strength(model, {"one": 0.0, "two": 0.25})
    assert attached(model) == {"one": 0.0, "two": 0.25}
    own, two = update(filled()), update(with_two(net()))
    set_strength(changed := with_two(net()), 0.0, "two")
    for now, trained, both, one in zip(update(model), own, two, update(changed), strict=True):
        torch.testing.assert_close(now, trained + 0.25 * (both - one), rtol=1e-4, atol=1e-6)
    set_strength(model, {"one": 0.5, "two": 1.0})
    assert torch.equal(model(X), before)
    assert all(torch.equal(*each) for each in zip(update(model), state, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: set_strength(m, 0.5, "on"), "no adapter 'on' is attached.*'one'"),
        (lambda m: detach(m, "three"), "no adapter 'three' is attached"),
        (lambda m: scaled(m, {"one": 1, "three": 1}).__enter__(), "no adapter 'three' is attached"),
        (lambda m: set_strength(m, 0.5), "set_strength: changes attached adapters.*scaled"),
        (lambda m: set_strength(m, float("nan"), "one"), "a strength must be a finite number"),
        (lambda m: scaled(m, "much").__enter__(), "a strength must be a finite number"),
        (lambda m: attach(m, other(1), name="one"), "'one' is attached already; call detach"),
        (lambda m: detach(net(), "one"), "Sequential was not injected"),
    ],
)
def test_wrong_calls_change_nothing(call: Callable[[Any], Any], message: str):
    model = with_two(filled())
    before = model(X)
    with pytest.raises(LoRAError, match=message):
        call(model)
    assert torch.equal(model(X), before)
    assert attached(model) == {"one": 0.5, "two": 1.0}


@pytest.mark.core
def test_scaled_acts_inside_in_every_form_and_is_over_after():
    model = with_two(filled())
    before = model(X)
    own, beside = update(filled()), update(with_two(net()))
    with scaled(model, 0.25):
        for found, each, others in zip(update(model), own, beside, strict=True):
            torch.testing.assert_close(found, 0.25 * each + others, rtol=1e-4, atol=1e-6)
        inside = model(X)
        with merged(model):
            torch.testing.assert_close(model(X), inside)
        with scaled(model, {"": 1.0, "one": 0.0}), scaled(model, 0.5, "one"):
            assert torch.equal(model(X), before)
        assert torch.equal(model(X), inside)
    assert torch.equal(model(X), before)
    with pytest.raises(ZeroDivisionError), scaled(model, 0.0):
        1 / 0  # noqa: B018
    assert torch.equal(model(X), before)


def test_a_block_of_scaled_inside_another_keeps_the_strength_of_an_adapter_that_it_does_not_name():
    model = with_two(net())
    with scaled(model, {"one": 0.0, "two": -1.0}):
        both = model(X)
    with scaled(model, 0.0, "one"):
        outside = model(X)
        with scaled(model, -1.0, "two"):
            assert torch.equal(model(X), both)
        assert torch.equal(model(X), outside)


def test_scaled_writes_what_it_shows_and_saves_tensors_as_they_are(tmp_path: Path):
    model = filled()
    with scaled(model, 0.5):
        save_merged(model, tmp_path / "merged")
        save_adapter(model, tmp_path / "adapter")
        state = merged_state_dict(model)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["0.weight"], state["0.weight"])
    assert not torch.equal(state["0.weight"], merged_state_dict(model)["0.weight"])
    load_adapter(again := net(), tmp_path / "adapter")
    assert torch.equal(again(X), model(X))


def test_off_is_the_model_without_and_asks_for_no_gradient_nor_random_number():
    model, stream = filled(lora_dropout=0.5).train(), torch.get_rng_state()
    with scaled(model, 0.0):
        assert torch.equal(model(X), net()(X))
        assert not model(X).requires_grad
        assert torch.equal(torch.get_rng_state(), stream)
    attach(model, other(1), name="sft")
    with scaled(model, 0.0):  # the reference of DPO
        reference = net()
        load_adapter(reference, other(1))
        torch.testing.assert_close(model(X), reference(X))


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.body(x)))
        return result


@pytest.mark.core
def test_off_puts_initial_heads_biases_and_statistics_in_place(tmp_path: Path):
    plain = Headed().eval()
    model = filled(model=Headed(), target_modules=["body"], modules_to_save=["head", "norm"], bias="all")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(X).square().sum().backward()
    optimizer.step()
    model.eval()
    before, saved = model(X), take_adapter(model)
    with scaled(model, 0.0):
        assert torch.equal(model(X), plain(X))
        plain.load_state_dict(merged_state_dict(model))
        save_merged(model, tmp_path)
        assert all(torch.equal(v, plain.state_dict()[n]) for n, v in load_file(tmp_path / "model.safetensors").items())
        assert torch.equal(model(X), plain(X))
        with pytest.raises(LoRAError, match="refused inside"):
            save_adapter(model, "never")
        with pytest.raises(LoRAError, match="refused inside"):
            model.state_dict()
        with pytest.raises(LoRAError, match="stays off"), scaled(model, 1.0):
            pass
    assert torch.equal(model(X), before)
    assert all(torch.equal(value, saved.tensors[name]) for name, value in take_adapter(model).tensors.items())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "'body' is DoRA"),
        ({"modules_to_save": ["head"]}, "'head.weight' is fully trained"),
        ({"bias": "all"}, "'body.bias' is fully trained"),
    ],
)
def test_between_off_and_on_there_is_no_strength_of_what_is_no_sum(options: dict[str, Any], what: str):
    model = filled(model=Headed().eval(), target_modules=["body"], **options)
    before = model(X)
    with pytest.raises(LoRAError, match=f"{what}.*use 0 or 1"), scaled(model, 0.5):
        pass
    with scaled(model, 0.0):
        assert torch.equal(model(X), Headed().eval()(X))
    with scaled(model, 1.0):
        assert torch.equal(model(X), before)


def test_a_head_that_is_trained_whole_is_named_beside_trained_rows():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2))
    inject(model, LoRAConfig(r=2, target_modules=[], trainable_token_indices={"0": [1]}, modules_to_save=["1"]))
    with pytest.raises(LoRAError, match=r"'1\.weight' is fully trained"), scaled(model, 0.5):
        pass


def test_trained_rows_are_off_and_on():
    def table() -> Any:
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2))

    model = filled(model=table(), target_modules=["1"], trainable_token_indices={"0": [1, 3]})
    nn.init.ones_(model[0].lora_rows)
    tokens = torch.arange(5)
    with scaled(model, 0.0):
        assert torch.equal(model(tokens), table()(tokens))
        assert torch.equal(merged_state_dict(model)["0.weight"], table()[0].weight)
    with pytest.raises(LoRAError, match=r"rows of '0' are trained.*use 0 or 1"), scaled(model, 0.5):
        pass
    with pytest.raises(LoRAError, match="rows are trained here"):
        attach(model, take_adapter(filled(model=table(), target_modules=["0"])), name="table")


# --- merged ---


@pytest.mark.parametrize("change", ["attach", "detach", "set_strength", "scaled"])
def test_a_merged_model_is_merged_again(change: str):
    model, twin = with_two(filled()), with_two(filled())
    plain = weight_bits(model)
    merge(model)
    was = weight_bits(model)
    if change == "scaled":
        with scaled(model, 0.5, "one"), scaled(twin, 0.5, "one"):
            assert not is_merged(model)
            assert torch.equal(model(X), twin(X))
        assert weight_bits(model) == was
    for each in (model, twin):
        if change == "attach":
            attach(each, other(9), name="new")
        elif change == "detach":
            detach(each, "one")
        elif change == "set_strength":
            set_strength(each, -1.0, "two")
    assert is_merged(model)
    merge(twin)
    assert weight_bits(model) == weight_bits(twin)
    unmerge(model)
    assert weight_bits(model) == plain


def test_a_failed_change_of_a_merged_model_is_taken_back():
    model = with_two(filled().to(torch.float16))
    merge(model)
    before = weight_bits(model)
    with pytest.raises(LoRAError, match="not finite"):
        set_strength(model, 1e6, "one")
    assert attached(model) == {"one": 0.5, "two": 1.0}
    assert is_merged(model)
    assert weight_bits(model) == before
    with pytest.raises(LoRAError, match="not finite"):
        attach(model, other(5), name="much", strength=1e6)
    assert attached(model) == {"one": 0.5, "two": 1.0}
    assert weight_bits(model) == before


# --- beside the other verbs ---


def test_disable_adapter_turns_all_off():
    model = with_two(filled())
    before = model(X)
    for _ in range(2):
        with disable_adapter(model):
            assert torch.equal(model(X), net()(X))
        assert torch.equal(model(X), before)
        merge(model)
        before = model(X)


def test_merge_and_unload_leaves_plain_layers_with_all_of_them():
    for start in (net, filled):
        model = with_two(start())
        expected = merged_state_dict(model)
        plain = merge_and_unload(model)
        assert all(type(module) is type(one) for module, one in zip(plain.modules(), net().modules(), strict=True))
        assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())
        assert attached(plain) == {}


@pytest.mark.core
def test_unload_takes_the_trained_one_out_and_leaves_the_others():
    model = with_two(filled())
    unload(model)
    assert attached(model) == {"one": 0.5, "two": 1.0}
    assert torch.equal(model(X), with_two(net())(X))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(LoRAError, match="was not injected"):
        unload(model)
    assert torch.equal(filled(model=model)(X), with_two(filled())(X))


def merged_under_a_trained_head(**options: Any) -> Any:
    """A merged model in which the attached adapter alone has layers, one of them the head that is trained whole."""
    inject(model := net(), LoRAConfig(**{"target_modules": [], "modules_to_save": ["2"]} | options))
    attach(model, other(1), name="one")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    merge(model)
    return model


@pytest.mark.parametrize("options", [{}, {"bias": "all", "modules_to_save": None}], ids=["head", "with bias"])
def test_unload_unmerges_layers_in_which_an_attached_adapter_acts_alone(options: dict[str, Any]):
    model = merged_under_a_trained_head(**options)
    unload(model)
    assert not is_merged(model)
    assert attached(model) == {"one": 1.0}
    detach(model, "one")
    assert {name: bits(value) for name, value in model.state_dict().items()} == {
        name: bits(value) for name, value in net().state_dict().items()
    }


def test_load_adapter_onto_a_merged_model_in_which_an_attached_adapter_acts_alone_writes_into_w():
    model = merged_under_a_trained_head()
    adapter = take_adapter(merged_under_a_trained_head())
    adapter.tensors["2.weight"].mul_(2)
    load_adapter(model, adapter)
    assert is_merged(model)
    unmerge(model)
    assert torch.equal(model[2].weight, adapter.tensors["2.weight"])


def test_a_start_from_data_is_refused_where_attached_adapters_alone_are_merged():
    with pytest.raises(LoRAError, match="the model is merged; call unmerge"):
        initialize_from_data(merged_under_a_trained_head(), [X])


def test_inject_and_load_adapter_come_before_or_after():
    first = filled(model=with_two(net()), target_modules=["0"])
    last = with_two(filled(target_modules=["0"]))
    assert torch.equal(first(X), last(X))
    assert [n for n, p in first.named_parameters() if p.requires_grad] == [
        n for n, p in last.named_parameters() if p.requires_grad
    ]
    loaded = with_two(net())
    assert load_adapter(loaded, take_adapter(last)) == ["0"]
    assert torch.equal(loaded(X), last(X))
    assert load_adapter(loaded, other(7, 5)) == ["0", "2"]
    assert attached(loaded) == {"one": 0.5, "two": 1.0}
    expected = with_two(filled(7, r=5))
    assert torch.equal(loaded(X), expected(X))


def test_an_injection_that_is_refused_or_broken_off_leaves_what_is_attached(monkeypatch: pytest.MonkeyPatch):
    def break_off(*args: Any) -> None:
        raise KeyboardInterrupt

    model = with_two(net())
    before = model(X)
    with pytest.raises(LoRAError):
        load_adapter(model, take_adapter(filled(model=Headed(), target_modules=["body"])))
    assert attached(model) == {"one": 0.5, "two": 1.0}
    monkeypatch.setattr("lightning_lora.model.inject._create_tensors", break_off)
    with pytest.raises(KeyboardInterrupt):
        inject(model, LoRAConfig())
    monkeypatch.undo()
    assert attached(model) == {"one": 0.5, "two": 1.0}
    assert torch.equal(model(X), before)
    attach(third := net(), other(3), name="three")
    with pytest.raises(LoRAError, match="'three' is not attached here"):  # loads are still looked at
        model.load_state_dict(third.state_dict())
    detach(model, "one")
    detach(model, "two")
    assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("fault", ["no such layer", "broken off", "loaded elsewhere"])
def test_a_failed_injection_leaves_a_merged_model_merged(fault: str, monkeypatch: pytest.MonkeyPatch):
    def break_off(*args: Any) -> None:
        raise KeyboardInterrupt

    model = with_two(net())
    elsewhere = take_adapter(filled(model=Headed(), target_modules=["body"]))
    merge(model)
    before = weight_bits(model)
    if fault == "broken off":
        monkeypatch.setattr("lightning_lora.model.inject._create_tensors", break_off)
    fails = {
        "no such layer": lambda: inject(model, LoRAConfig(target_modules=["nowhere"])),
        "broken off": lambda: inject(model, LoRAConfig(target_modules=["0"])),
        "loaded elsewhere": lambda: load_adapter(model, elsewhere),
    }[fault]
    with pytest.raises((LoRAError, KeyboardInterrupt)):
        fails()
    monkeypatch.undo()
    assert is_merged(model)
    assert weight_bits(model) == before
    unmerge(model)
    assert weight_bits(model) == weight_bits(with_two(net()))


def test_a_merged_plain_model_is_injected_on_its_own_weights():
    model = with_two(net())
    merge(model)
    filled(model=model)
    assert weight_bits(filled()) == weight_bits(model)
    assert torch.equal(model(X), with_two(filled())(X))


class Around(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


def test_the_network_inside_and_the_module_around_it_are_both_handles():
    module = Around()
    with_two(module.net)
    assert attached(module) == attached(module.net) == {"one": 0.5, "two": 1.0}
    inject(module, LoRAConfig(r=2, init_lora_weights=False), seed=3)
    assert [*open_model(module, "test").injection.attached] == ["one", "two"]
    assert attached(module.net) == {"one": 0.5, "two": 1.0}
    set_strength(module.net, 0.25, "one")
    assert attached(module) == {"one": 0.25, "two": 1.0}
    unload(module)
    detach(module, "one")
    detach(module.net, "two")
    assert torch.equal(module(X), net()(X))
    partly = nn.ModuleDict({"a": net(), "b": net()})
    attach(partly["a"], other(1), name="one")
    inject(partly["b"], LoRAConfig())
    assert attached(partly["b"]) == {}


def test_starts_from_data_see_what_is_beside():
    model = with_two(net())
    inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
    before = model(X)
    initialize_from_data(model, [X] * 3, lambda m, batch: m(batch).square().mean())
    torch.testing.assert_close(model(X), before)


# --- state dicts ---


def test_a_state_dict_says_what_it_lacks_also_after_a_file():
    model = with_two(filled())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for strict in (True, False):
        with pytest.raises(LoRAError, match=r"'one', 'two' are not attached.*attach\(model, source, name='one'"):
            filled().load_state_dict(state, strict=strict)
    outer = nn.ModuleDict({"net": filled()})
    with pytest.raises(LoRAError, match="'one', 'two'"):
        outer.load_state_dict(nn.ModuleDict({"net": model}).state_dict())
    part = filled()
    attach(part, other(1), name="one")
    with pytest.raises(LoRAError, match="'two' is not attached"):
        part.load_state_dict(state)
    with_two(filled(9)).load_state_dict(state)
    filled().load_state_dict(dict(state))
    with pytest.raises(LoRAError, match="'one', 'two'"):
        filled().load_state_dict(adapter_state_dict(model), strict=False)


def test_a_part_of_what_adapters_were_attached_to_is_not_injected():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = net(), net()

    model = Two()
    attach(model, take_adapter(filled(model=Two())), name="one")
    with pytest.raises(LoRAError, match="is a part of the Two to which 'one' was attached"):
        inject(model.a, LoRAConfig())
