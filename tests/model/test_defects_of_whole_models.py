"""Defects on the side of the model and of checkpoints: what should hold of each."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merge,
    merged,
    unload,
    unmerge,
)
from lightning_lora.trainer.strategies import prepare_strategy
from support.lightning_versions import WeightAveraging, weight_averaging
from support.models import Zoo, base_zoo, bits, checkpoint, randomise_, state_bits, train, zoo_config
from support.runs import TARGETS, lora, trained
from support.training import BuiltInConfigureModel, Data, Net, assert_same_tensors, make_trainer, outputs, seen, weights

# --- an entry of the user's own in a checkpoint, with names and shapes of parameters ---

Entry = Callable[[nn.Module], dict[str, Any]]
ENTRIES: dict[str, Entry] = {
    "of one weight": lambda model: {"head.weight": torch.full_like(model.head.weight, 0.5).detach()},
    "of every parameter": lambda model: {n: torch.full_like(p, 0.5).detach() for n, p in model.named_parameters()},
    "nested": lambda model: {
        "tasks": {"first": {"body.3.weight": torch.full_like(model.body[3].weight, 0.5).detach()}}
    },
    "of what is trained": lambda model: {n: t.clone().fill_(1) for n, t in adapter_state_dict(model).items()},
}


class Remembers(Net):
    """Keeps an entry of its own, as for elastic weight consolidation."""

    def __init__(self, entry: str = "of one weight") -> None:
        super().__init__()
        self.entry = entry
        self.found: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fisher"] = ENTRIES[self.entry](self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["fisher"]


class RemembersBeside(L.Callback):
    """The same in a callback's state."""

    def __init__(self, entry: str, model: nn.Module) -> None:
        self.make = functools.partial(ENTRIES[entry], model)

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.make()}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_an_entry_that_the_module_adds_to_a_checkpoint_is_saved_and_comes_back_as_it_was(
    tmp_path, kind: str, entry: str
):
    model = trained(tmp_path, Remembers(entry), lora(save=kind))
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["fisher"], ENTRIES[entry](model))
    resumed = Remembers(entry)
    make_trainer(tmp_path, lora(save=kind), max_epochs=2).fit(resumed, Data(), ckpt_path=tmp_path / "own.ckpt")
    assert_same_tensors(resumed.found, ENTRIES[entry](model))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_an_entry_in_a_callbacks_state_is_saved_as_it_was(tmp_path, kind: str, entry: str):
    model = Net()
    trained(tmp_path, model, lora(save=kind), RemembersBeside(entry, model))
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["callbacks"]["RemembersBeside"]["fisher"], ENTRIES[entry](model))


@weight_averaging
def test_an_entry_stays_while_the_copies_of_weight_averaging_lose_their_frozen_weights(tmp_path):
    model = trained(tmp_path, Remembers(), lora(), WeightAveraging())
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["fisher"], ENTRIES["of one weight"](model))
    assert saved["current_model_state"].keys() == saved["state_dict"].keys()
    assert not saved["state_dict"].keys() & dict(Net().named_parameters()).keys()


# --- a load that was rolled back ---


class Picky(Zoo):
    """Refuses an extra state that it does not know."""

    note = "known"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        if state["note"] == "unknown":
            raise RuntimeError("an unknown note")


def picky() -> Picky:
    torch.manual_seed(1)
    return Picky().eval()


def trained_picky(unfreeze: bool) -> Picky:
    model = picky()
    inject(model, zoo_config())
    if unfreeze:
        model.norm.weight.requires_grad_(True)
        with pytest.warns(UserWarning, match="unfrozen"):
            adapter_state_dict(model)
    train(model)
    return model.eval()


def overflowing(state: dict[str, Any]) -> None:
    for name in ("body.0.lora_A", "body.0.lora_B"):
        state[name] = torch.full_like(state[name], 1e30)


def refused_by_its_owner(state: dict[str, Any]) -> None:
    state["_extra_state"] = {"note": "unknown"}


@pytest.mark.parametrize("spoil", [overflowing, refused_by_its_owner])
def test_after_a_load_that_was_rolled_back_the_next_adapter_loads_as_on_a_model_that_never_saw_the_first(spoil):
    spoiled = checkpoint(trained_picky(unfreeze=True), "adapter")
    spoil(spoiled["state_dict"])
    good = trained_picky(unfreeze=False)
    model = picky()
    inject(model, zoo_config())
    merge(model)
    before, keys = state_bits_of(model), list(adapter_state_dict(model))
    with pytest.raises((LoRAError, RuntimeError), match=r"not finite|unknown note"):
        load_adapter(model, spoiled)
    assert (state_bits_of(model), list(adapter_state_dict(model))) == (before, keys)
    load_adapter(model, checkpoint(good, "adapter"))
    assert is_merged(model)
    assert state_bits_of(model) == state_bits_of(good)
    unload(model)
    assert state_bits_of(model) == state_bits_of(picky())


def state_bits_of(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


# --- a full checkpoint of a model that was injected on a part ---


class AllInOne(Net):
    """Everything that it has is in one attribute."""

    def prepare(self) -> None:
        super().prepare()
        self.net = nn.Sequential(self.body, self.head)
        del self.body, self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


class Twofold(Net):
    """A second part has a layer of the same name."""

    def prepare(self) -> None:
        super().prepare()
        self.other = nn.Sequential(copy.deepcopy(self.body[3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.other(self.body(x)))
        return result


PARTS: dict[str, tuple[type[Net], str, Any]] = {
    "all, a list": (AllInOne, "net", ["0.0", "0.3"]),
    "all, an expression": (AllInOne, "net", r"0\.[03]|1"),
    "a part, a list": (Net, "body", ["0", "3"]),
    "a part, an expression": (Net, "body", "[03]"),
    "a part, names of more at the root": (Twofold, "body", ["0", "3"]),
}
TRAINED = {
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "nothing but buffers": {},
}


@pytest.mark.parametrize("what", TRAINED)
@pytest.mark.parametrize("part", PARTS)
def test_load_from_checkpoint_of_a_full_checkpoint_of_a_part_brings_back_the_base_of_the_part(
    tmp_path, part: str, what: str
):
    cls, name, targets = PARTS[part]
    model = cls()
    with torch.no_grad():  # a base that the class does not build: it comes from the file
        for parameter in model.parameters():
            parameter.mul_(1.25)
    net = model.get_submodule(name)
    before = weights(net)
    inject(net, LoRAConfig(r=2, target_modules=targets, **TRAINED[what]))
    trained(tmp_path, model, LoRACallback(save="full"))
    model.trainer.save_checkpoint(tmp_path / "full.ckpt")
    assert any(not torch.equal(net.state_dict()[n], value) for n, value in before.items() if "lora" not in n)

    loaded = load_from_checkpoint(cls, tmp_path / "full.ckpt")
    assert torch.equal(outputs(loaded), outputs(model))
    with disable_adapter(model), disable_adapter(loaded):
        assert torch.equal(outputs(loaded), outputs(model))
        found = seen(loaded.get_submodule(name))
        assert_same_tensors({n: found[n].detach() for n in before}, before)
    for trained_model in (model, loaded):
        unload(trained_model)
        assert_same_tensors(trained_model.get_submodule(name).state_dict(), before)
    assert_same_tensors(weights(loaded), weights(model))


# --- a full checkpoint without first values ---


def _put(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.update(initial=value)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta["initial"].update({name: value})


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda meta: meta.pop("initial"),
    "None": _put(None),
    "a list": _put([torch.zeros(8)]),
    "text": _put("initial"),
    "a value of another shape": _set("body.1.running_mean", torch.zeros(3)),
    "a value that is no tensor": _set("body.1.running_mean", [0.0] * 8),
    "a value too few": lambda meta: meta["initial"].pop("body.1.running_mean"),
}
READS: dict[str, Callable[[Path], Any]] = {
    "load_from_checkpoint": lambda path: load_from_checkpoint(Net, path),
    "resume": lambda path: make_trainer(path.parent, lora(), max_epochs=2).fit(Net(), Data(), ckpt_path=path),
    "test": lambda path: make_trainer(path.parent, lora()).test(Net(), Data(), ckpt_path=path, verbose=False),
}


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("case", SPOILED)
def test_a_full_checkpoint_without_proper_first_values_is_refused_by_name(tmp_path, case: str, way: str):
    path = tmp_path / "full.ckpt"
    trained(tmp_path, Net(), lora(save="full", bias="all")).trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    SPOILED[case](content["lora"])
    torch.save(content, path)
    with pytest.raises(LoRAError, match="initial"):
        READS[way](path)


# --- two threads in a layer that runs on W + delta ---


class Meeting:
    """Where two threads stand inside one layer's forward at a time: the second comes, the first leaves, it goes on.

    Each waits for a moment only, so that a layer which lets one thread in at a time passes too.
    """

    PATIENCE = 0.3

    def __init__(self) -> None:
        self.inside, self.both_inside, self.first_left = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> None:
        if threading.current_thread().name == "first":
            self.inside.set()
            self.both_inside.wait(self.PATIENCE)
        elif threading.current_thread().name == "second":
            self.both_inside.set()
            self.first_left.wait(self.PATIENCE)

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
        """What the two give."""
        results: list[Any] = [None, None]

        def keep(place: int, step: Callable[[], Any], done: threading.Event | None) -> None:
            try:
                results[place] = step()
            finally:
                if done is not None:
                    done.set()

        threads = [
            threading.Thread(target=keep, args=(0, first, self.first_left), name="first", daemon=True),
            threading.Thread(target=keep, args=(1, second, None), name="second", daemon=True),
        ]
        threads[0].start()
        assert self.inside.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        return results


class MeetingLinear(nn.Linear):
    meet: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meet()
        return super().forward(x).tanh()


class MeetingAttention(nn.MultiheadAttention):
    meet: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.meet()
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "build", [lambda: MeetingLinear(8, 8), lambda: MeetingAttention(8, 2)], ids=["linear", "attention"]
)
def test_two_threads_in_a_layer_that_runs_on_the_sum_are_both_right_and_leave_its_weight_alone(build):
    model = nn.ModuleDict({"layer": build()}).eval()
    inject(model, LoRAConfig(r=2, target_modules=["layer"]))
    randomise_(model, 0.5)
    layer = model["layer"]
    inputs = [torch.randn(3, 8), torch.randn(3, 8)]
    expected = [layer(x).detach() for x in inputs]
    parameters, before = dict(layer.named_parameters()), state_bits(layer)
    layer.meet = meeting = Meeting()
    found = meeting.run(*(functools.partial(layer, x) for x in inputs))
    left = dict(layer.named_parameters())
    assert {name for name in parameters if left.get(name) is not parameters[name]} == set()
    assert state_bits(layer) == before
    for output, wanted in zip(found, expected, strict=True):
        assert torch.equal(output.detach(), wanted)
    layer.meet = lambda: None
    assert all(torch.equal(layer(x).detach(), wanted) for x, wanted in zip(inputs, expected, strict=True))


# --- the memory of plain copies, which is used again ---

WIDTH = 37


@pytest.fixture
def _what_is_made_from_here_on() -> Iterator[None]:
    """held() sees what is made from here on, which is quicker than all there is."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def one_layer(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    return model


def held() -> int:
    """Bytes of all tensors that are alive and no parameters."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@pytest.mark.usefixtures("_what_is_made_from_here_on")
@pytest.mark.parametrize("end", ["unload", "forget"])
def test_the_memory_of_a_models_copies_is_given_back_when_its_adapters_are(end: str):
    empty = held()
    models = [one_layer(1), one_layer(2)]
    for _ in range(2):
        for model in models:
            merge(model)
        for model in models:
            unmerge(model)
    if end == "unload":
        for model in models:
            unload(model)
    del model
    models.clear()
    assert held() - empty < 1000


# --- an edit of a weight while it is merged ---

EDITS: dict[str, Callable[[nn.Linear], Any]] = {
    "every value": lambda layer: layer.weight.data.add_(0.5),
    "one value": lambda layer: layer.weight.data[3, 4].mul_(2),
    "initialised anew": lambda layer: nn.init.zeros_(layer.weight),
    "an optimizer's step": lambda layer: torch.optim.SGD([layer.weight], lr=1.0).step(),
}


@pytest.mark.parametrize("way", ["unmerge", "merged"])
@pytest.mark.parametrize("budget", [2**26, 0], ids=["kept as a copy", "kept as values"])
@pytest.mark.parametrize("edit", EDITS)
def test_unmerge_after_an_edit_of_a_merged_weight_raises_and_names_the_layer(
    monkeypatch, edit: str, budget: int, way: str
):
    monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", budget)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    plain = copy.deepcopy(model.state_dict())
    inject(model, LoRAConfig(r=2))
    randomise_(model)
    before = state_bits(model)
    model[1].weight.grad = torch.ones_like(model[1].weight)

    def edit_and_unmerge() -> None:
        if way == "unmerge":
            merge(model)
            EDITS[edit](model[1])
            unmerge(model)
        else:
            with merged(model):
                EDITS[edit](model[1])

    with pytest.raises(LoRAError, match=r"layer '1'.*changed while it was\s+merged"):
        edit_and_unmerge()
    assert not is_merged(model)
    for place in (0, 2):
        assert bits(model[place].weight) == bits(plain[f"{place}.weight"])
    model.load_state_dict(plain)  # the way out that the message gives
    assert state_bits(model) == before
    with merged(model):
        pass
    assert state_bits(model) == before


# --- the numbers that adapters start from ---


def drawn(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def injected(seed: int | None, stream: int, **options: Any) -> dict[str, bytes]:
    model = base_zoo()
    torch.manual_seed(stream)
    state = torch.get_rng_state()
    inject(model, zoo_config(**options), seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    return drawn(model)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_inject_with_a_seed_draws_the_same_adapters_whatever_the_random_stream(seed: int, init: Any):
    found = [injected(seed, stream, init_lora_weights=init) for stream in (1, 2)]
    assert found[0] == found[1]
    assert found[0]["body.0.lora_A"] != found[0]["body.3.lora_A"]  # of one shape


def test_inject_with_other_seeds_draws_other_adapters():
    """An ensemble of adapters: each layer of each differs."""
    found = [injected(seed, 1) for seed in (None, 0, 1, 2)]
    for name in ("conv.lora_A", "body.0.lora_A", "body.3.lora_A", "embed.lora_B"):
        assert len({values[name] for values in found}) == len(found), name


def test_inject_without_a_seed_draws_from_the_state_of_the_random_stream():
    assert injected(None, 1) == injected(None, 1)
    assert injected(None, 1) != injected(None, 2)
    model = base_zoo()
    torch.manual_seed(1)
    inject(model, zoo_config())
    assert drawn(model) == injected(None, 1)


def test_the_same_seed_injects_the_same_model_again_without_changing_it():
    model = base_zoo()
    inject(model, zoo_config(), seed=3)
    randomise_(model)
    before = state_bits(model)
    inject(model, zoo_config(), seed=3)
    assert state_bits(model) == before


class Starts(L.Callback):
    """Notes the factors before the first step, and the random stream in setup."""

    def __init__(self) -> None:
        self.streams: list[torch.Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.streams.append(torch.get_rng_state())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = drawn(pl_module)


def started(path: Path, seed: int | None, stream: int, cls: type[Net] = Net) -> dict[str, bytes]:
    torch.manual_seed(stream)
    before, after = Starts(), Starts()
    make_trainer(path, before, lora(seed=seed), after).fit(cls(), Data())
    assert torch.equal(before.streams[0], after.streams[0])
    return after.found


def test_a_callback_with_a_seed_starts_from_the_same_adapters_whatever_the_random_stream(tmp_path):
    found = started(tmp_path, 5, 1)
    assert started(tmp_path, 5, 2) == found
    assert started(tmp_path, 5, 2, BuiltInConfigureModel) == found
    assert started(tmp_path, 6, 1) != found
    model = Net()
    inject(model, LoRAConfig(r=2, target_modules=TARGETS), seed=5)
    assert drawn(model) == found


def test_a_callback_without_a_seed_starts_from_the_state_of_the_random_stream(tmp_path):
    assert started(tmp_path, None, 1) == started(tmp_path, None, 1)
    assert started(tmp_path, None, 1) != started(tmp_path, None, 2)


# --- the user's own strict_loading ---


class ModelParallelStrategy:
    """What Lightning's has that loading needs."""

    def __init__(self, module: L.LightningModule, fails: bool) -> None:
        self.lightning_module, self.fails = module, fails
        self.strict: list[bool] = []

    def broadcast(self, value: Any) -> Any:
        return value

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.strict.append(self.lightning_module.strict_loading)
        if self.fails:
            raise OSError("the disk is gone")
        content: dict[str, Any] = torch.load(checkpoint_path, weights_only=True)
        return content


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_a_load_through_model_parallel_strategy_leaves_strict_loading_as_the_user_set_it(
    tmp_path, kind: str, own: bool | None, fails: bool
):
    model = trained(tmp_path, Net(), lora(save=kind))
    model.trainer.save_checkpoint(tmp_path / "one.ckpt")
    if own is not None:
        model.strict_loading = own
    strategy = ModelParallelStrategy(model, fails)
    prepare_strategy(strategy)
    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            strategy.load_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    else:
        strategy.load_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert strategy.strict == [False]
    assert model._strict_loading is own
