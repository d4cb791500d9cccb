"""One thread at a time changes or saves a model; a second one is refused at once, and the base is never damaged."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
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
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.exchange import checkpoint_of_model, merged_folder, take
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint
from lightning_lora.formats.lightning_checkpoint import Kind
from lightning_lora.model import inject as inject_module
from lightning_lora.model import state_dict as state_dict_module
from support.covering import covering
from support.models.networks import bits, randomise_
from support.runs.broken_off import break_off

WAIT = 20  # seconds that no test needs


class Softplus(nn.Linear):
    """A user's layer: its forward runs on W'."""

    inside: Callable[[], None] | None = None  # called in the forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.weight
        if self.inside is not None:
            type(self).inside(self)
        assert self.weight is before
        return F.softplus(F.linear(x, self.weight, self.bias))


def network(*, saved: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), Softplus(8, 8), nn.Linear(8, 3)).eval()
    head = {"modules_to_save": ["2"], "target_modules": ["0", "1"]} if saved else {}
    inject(model, LoRAConfig(r=2, **head))
    randomise_(model)
    return model


def values(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def elsewhere(call: Callable[[], Any]) -> Any:
    """Call in another thread, and return or raise what comes of it."""
    with ThreadPoolExecutor(1, "other") as pool:
        return pool.submit(call).result(WAIT)


@contextmanager
def thread_inside(context: Callable[[], Any]) -> Iterator[None]:
    """Let another thread be in a `with` block."""
    entered, leave, failures = threading.Event(), threading.Event(), []

    def run() -> None:
        try:
            with context():
                entered.set()
                leave.wait(WAIT)
        except BaseException as error:
            failures.append(error)
            entered.set()

    thread = threading.Thread(target=run, name="holder")
    thread.start()
    entered.wait(WAIT)
    try:
        yield
    finally:
        leave.set()
        thread.join(WAIT)
        assert not failures


VERBS: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
    "merge": lambda model, state: merge(model),
    "unmerge": lambda model, state: unmerge(model),
    "merged": lambda model, state: merged(model).__enter__(),
    "disable_adapter": lambda model, state: disable_adapter(model).__enter__(),
    "load_adapter": lambda model, state: load_adapter(model, state),
    "unload": lambda model, state: unload(model),
    "merge_and_unload": lambda model, state: merge_and_unload(model),
    "load_state_dict": lambda model, state: model.load_state_dict(state, strict=False),
    "cast or move": lambda model, state: model.double(),
    "initialize_from_data": lambda model, state: initialize_from_data(
        model, [torch.randn(9, 8)], lambda net, batch: net(batch)
    ),
}


@pytest.mark.parametrize(("verb", "body"), covering([*VERBS], [merged, disable_adapter], meet=1))
def test_a_second_thread_that_changes_the_model_is_refused_at_once_and_told_by_whom(body, verb):
    model = network()
    if verb == "initialize_from_data":
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
    state = adapter_state_dict(model)
    before = values(model)
    with thread_inside(lambda: body(model)):
        found = values(model)
        message = rf"{verb}: {body.__name__} is under way on this model in the thread 'holder'. .*threading.Lock"
        refused_before = "initialize_from_data: the model is merged|load_state_dict: refused inside"
        with pytest.raises(LoRAError, match=f"{message}|{refused_before}"):
            VERBS[verb](model, state)
        assert values(model) == found
    assert values(model) == before
    VERBS["merge"](model, state)  # the claim has ended
    unmerge(model)
    assert values(model) == before


def as_checkpoint(model: nn.Module, kind: Kind) -> dict[str, Any]:
    """What a Trainer's checkpoint of this kind holds of a model."""
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    convert_checkpoint(model, checkpoint, kind)
    return checkpoint


READS: dict[str, Callable[[nn.Module], Any]] = {
    "adapter_state_dict": adapter_state_dict,
    "merged_state_dict": merged_state_dict,
    "take_adapter": take_adapter,
    "save_adapter": lambda model: save_adapter(model, "saved"),
    "save_merged": lambda model: save_merged(model, "saved"),
    "save_checkpoint": lambda model: as_checkpoint(model, "full"),  # with the memory of the base's weights
}
STATE_DICT = "^state_dict: refused inside `with disable_adapter"  # which as_checkpoint takes first


def in_between(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let another thread make a change while a model is read."""

    def refuse_replaced_layers(*args: Any) -> None:
        elsewhere(change)

    for module in (take, checkpoint_of_model, state_dict_module, merged_folder):
        monkeypatch.setattr(module, "refuse_replaced_layers", refuse_replaced_layers)


@pytest.mark.parametrize(
    ("read", "verb"),
    covering([*READS], ["merge", "load_adapter", "take_adapter"], meet=1),
)
def test_what_one_thread_saves_no_other_changes_or_saves_meanwhile(read, verb, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, refused = network(saved=True), []
    before, state = values(model), adapter_state_dict(model)
    calls = VERBS | {"take_adapter": lambda model, state: take_adapter(model)}

    def change() -> None:
        with pytest.raises(LoRAError, match=f"{verb}: {read} is under way on this model in the thread 'MainThread'"):
            calls[verb](model, state)
        refused.append(verb)

    with monkeypatch.context() as patch:
        in_between(patch, change)
        READS[read](model)
    assert refused
    assert values(model) == before
    calls[verb](model, state)  # the claim has ended


@pytest.mark.parametrize(("read", "body"), covering([*READS], [merged, disable_adapter], meet=1))
def test_inside_the_block_of_another_thread_nothing_is_saved(read, body, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = network(saved=True)
    with thread_inside(lambda: body(model)):
        named = f"{read}: {body.__name__} is under way on this model in the thread|{STATE_DICT}"
        with pytest.raises(LoRAError, match=named):
            READS[read](model)
        assert not list(tmp_path.rglob("*"))
    READS[read](model)


def test_a_save_that_an_exception_ends_locks_nobody_out(monkeypatch):
    model = network()

    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        in_between(patch, fail)
        with pytest.raises(KeyboardInterrupt):
            adapter_state_dict(model)
    elsewhere(lambda: merge(model))
    assert is_merged(model)


def test_a_call_that_is_broken_off_anywhere_locks_no_thread_out_of_other_models():
    model, other, line = network(), network(), 0
    while break_off(lambda: merge(model), line):
        line += 1
        unmerge(model)
    thread = threading.Thread(target=lambda: merge(other), daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert line > 20
    assert is_merged(other)


def test_two_threads_that_inject_at_once_make_one_injection(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8))

    def in_between(root: nn.Module, original: Any = inject_module.check_unadapted) -> None:
        original(root)
        monkeypatch.setattr(inject_module, "check_unadapted", original)
        elsewhere(lambda: inject(model, LoRAConfig(r=4)))

    monkeypatch.setattr(inject_module, "check_unadapted", in_between)
    with pytest.raises(LoRAError, match="inject: another thread has injected this Sequential meanwhile"):
        inject(model, LoRAConfig(r=2))
    assert model[0].lora_A.shape == (4, 8)


def test_threads_that_merge_and_unmerge_at_random_never_damage_the_base():
    model, x = network(), torch.randn(4, 8)
    before, refused, failures = values(model), [], []

    def cycle(seed: int) -> None:
        for _ in range(40):
            try:
                with merged(model):
                    model(x)
            except LoRAError as error:
                refused.append(str(error))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=cycle, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not failures
    assert all("is under way on this model" in message for message in refused)
    assert not is_merged(model)
    assert values(model) == before


# --- beside a forward that runs on W' ---


def in_forward(model: nn.Sequential, call: Callable[[], Any], *, same_thread: bool = False) -> Any:
    """Run the model, and call while the forward of its second layer runs: in another thread, or in that one."""
    results: list[Any] = []

    def run(layer: nn.Module) -> None:
        if same_thread:
            results.append(call())
            return
        thread = threading.Thread(target=lambda: results.append(call()))
        thread.start()
        thread.join(0.2)  # which waits for this forward
        results.append(thread)

    Softplus.inside = run
    try:
        model(torch.randn(4, 8))
    finally:
        Softplus.inside = None
    for thread in results:
        if isinstance(thread, threading.Thread):
            thread.join(WAIT)
            assert not thread.is_alive()
    return next(result for result in results if not isinstance(result, threading.Thread))


@pytest.mark.slow
def test_merge_beside_a_forward_on_w_plus_delta_waits_for_it_and_merges_w():
    model = network()
    expected = copy.deepcopy(model)
    merge(expected)
    before = values(model)
    in_forward(model, lambda: merge(model))
    assert values(model) == values(expected)
    unmerge(model)
    assert values(model) == before


@pytest.mark.slow
def test_state_dict_beside_a_forward_on_w_plus_delta_holds_w():
    model = network()
    before = {name: bits(value) for name, value in model.state_dict().items()}
    seen = in_forward(model, lambda: {name: bits(value) for name, value in model.state_dict().items()})
    assert seen == before


def test_merge_inside_a_forward_on_w_plus_delta_is_refused_and_says_so():
    model = network()
    before = values(model)
    with pytest.raises(LoRAError, match=r"merge: '1': called inside a forward of this layer"):
        in_forward(model, lambda: merge(model), same_thread=True)
    assert values(model) == before
    assert not is_merged(model)
    with merged(model):
        pass
    assert values(model) == before


# --- nesting, generators, copies ---


def stream(body: Callable[[nn.Module], Any], model: nn.Module) -> Iterator[None]:
    with body(model):
        yield


def test_calls_of_one_thread_nest():
    model, x = network(), torch.randn(4, 8)
    before, output = values(model), model(x)
    with merged(model), disable_adapter(model), merged(model):
        merge(model)
        unmerge(model)
    with merged(model), merged(model):
        load_adapter(model, adapter_state_dict(model))
    unmerge(model)
    assert values(model) == before
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("body", [merged, disable_adapter])
def test_a_generator_that_ends_in_another_thread_brings_the_model_back(body):
    model, x = network(saved=True), torch.randn(4, 8)
    before, output = values(model), model(x)

    generator = stream(body, model)
    next(generator)
    assert not torch.equal(model(x), output)
    elsewhere(generator.close)
    assert values(model) == before
    assert torch.equal(model(x), output)
    elsewhere(lambda: merge(model))
    unmerge(model)
    assert values(model) == before


def test_a_generator_cannot_end_beside_a_call_of_another_thread():
    model = network()
    before = values(model)

    generator = stream(merged, model)
    with merged(model):
        next(generator)
        with pytest.raises(LoRAError, match="merged: merged is under way"):
            elsewhere(generator.close)
    assert values(model) == before


def test_a_copy_made_inside_has_claims_of_its_own():
    model = network()
    with merged(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        elsewhere(lambda: [unmerge(other) for other in copies])
    for other in copies:
        assert not is_merged(other)
        assert values(other) == values(model)


def test_a_model_of_two_injected_models_waits_for_neither():
    pair = nn.ModuleList([network(), network()])
    with thread_inside(lambda: merged(pair[1])):
        with pytest.raises(LoRAError, match="merge: merged is under way"):
            merge(pair)
        assert not is_merged(pair[0])
        with merged(pair[0]):  # the claim on it has ended
            pass
    merge(pair)
    assert is_merged(pair[0])
