"""Messages that were rewritten because they did not help, word for word; `pytest -s` prints them all.

A function provokes a message, and its docstring is what the message says, with PATH for the folder at hand.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_lora.command.merge import merge_on_disk
from support.lightning_versions import PLAIN_TYPES_ONLY
from support.peers import fill_, model
from support.runs import lora
from support.training import Data, Net, make_trainer

MESSAGES: list[Callable[[Path], Any]] = []


def message(provoke: Callable[[Path], Any]) -> Callable[[Path], Any]:
    MESSAGES.append(provoke)
    return provoke


@pytest.mark.parametrize("provoke", MESSAGES, ids=lambda provoke: provoke.__name__)
def test_message_says_what_was_found_and_what_to_do(tmp_path: Path, provoke: Callable[[Path], Any]):
    with pytest.raises(LoRAError) as told:
        provoke(tmp_path)
    found = str(told.value).replace(str(tmp_path), "PATH")
    print(f"\n{provoke.__name__.replace('_', ' ')}:\n    {found}")
    expected = inspect.cleandoc(provoke.__doc__ or "").replace("\n", " ")
    assert re.sub(r"\[-?\d.*?\]", "[...]", found) == expected


# --- loading ---


def saved(path: Path, *callbacks: Any, base: Path | None = None) -> Path:
    """Train, and save: with no callback as plain Lightning does."""
    model = Net.load_from_checkpoint(base, **PLAIN_TYPES_ONLY) if base else Net()
    trainer = make_trainer(path, *callbacks)
    trainer.fit(model, Data())
    file = path / ("lora.ckpt" if callbacks else "pretrained.ckpt")
    trainer.save_checkpoint(file)
    return file


@message
def a_fit_resumed_from_a_plain_checkpoint(path: Path) -> None:
    """LoRACallback: the checkpoint at ckpt_path holds no adapter, only the weights of a training without one, whose
    optimizers and progress an adapter cannot go on with. To train an adapter on these weights, load them first and
    leave ckpt_path out: trainer.fit(Net.load_from_checkpoint("pretrained.ckpt"), ...). To resume that training, leave
    LoRACallback out.
    """
    make_trainer(path, lora()).fit(Net(), Data(), ckpt_path=saved(path), **PLAIN_TYPES_ONLY)


@message
def load_from_checkpoint_of_a_plain_checkpoint(path: Path) -> None:
    """checkpoint["lora"] is missing or damaged; this is not a checkpoint of lightning_lora. One of plain Lightning,
    without an adapter, is loaded by its class's own load_from_checkpoint.
    """
    load_from_checkpoint(Net, saved(path))


@message
def load_from_checkpoint_where_the_base_was_pretrained(path: Path) -> None:
    """the adapter belongs to another base: values of 'body.0.weight' were [...], here [...]. Net built a base of its
    own. Where the base is a checkpoint, load that first: load_adapter(model :=
    Net.load_from_checkpoint("pretrained.ckpt"), "PATH/lora.ckpt"). strict_base=False makes this a warning.
    """
    load_from_checkpoint(Net, saved(path, lora(), base=saved(path)))


@message
def a_trainer_where_the_base_was_pretrained(path: Path) -> None:
    """the adapter belongs to another base: values of 'body.0.weight' were [...], here [...]. Give the Trainer the model
    with the base that the adapter was trained on, as trainer.fit(Net.load_from_checkpoint("pretrained.ckpt"),
    ckpt_path=...). To use the adapter on this base all the same, call load_adapter(model, path, strict_base=False) and
    leave ckpt_path out.
    """
    file = saved(path, lora(), base=saved(path))
    make_trainer(path, lora()).validate(Net(), Data(), ckpt_path=file, **PLAIN_TYPES_ONLY)


@message
def load_adapter_onto_another_base(path: Path) -> None:
    """the adapter belongs to another base: values of 'body.0.weight' were [...], here [...]. Load the adapter on the
    base that it was trained on, or pass strict_base=False, which makes this a warning.
    """
    load_adapter(Net(seed=2), saved(path, lora()))


@message
def the_command_with_another_base(path: Path) -> None:
    """the adapter belongs to another base: values of 'body.0.weight' were [...], here [...]. Give the base that it was
    trained on as --base, or pass --strict-base=false, which makes this a warning.
    """
    torch.save(Net(seed=2).state_dict(), path / "base.pt")
    merge_on_disk(path / "base.pt", saved(path, lora()), path / "merged.pt")


class WithObject(Net):
    """A Net with an object among its hyper-parameters."""

    def __init__(self, loss: object, width: int = 8) -> None:
        super().__init__(width)
        self.save_hyperparameters()


class Loss:
    """A user's loss."""


@message
def load_from_checkpoint_with_an_object_in_the_hyper_parameters(path: Path) -> None:
    """PATH/lora.ckpt: checkpoint['hyper_parameters']['loss'] is of test_messages.Loss, and objects are not unpickled,
    because that may run any code. If you trust the file, pass weights_only=False; otherwise pass what they are as
    keyword arguments (loss=...), or build the module yourself: load_adapter(model := WithObject(...),
    "PATH/lora.ckpt").
    """
    trainer = make_trainer(path, lora())
    trainer.fit(WithObject(Loss()), Data())
    trainer.save_checkpoint(path / "lora.ckpt")
    load_from_checkpoint(WithObject, path / "lora.ckpt")


# --- from PEFT, and to it ---


class Around(nn.Module):
    """A network, and a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = model("llama"), nn.Linear(64, 2)


def inject_llama(**options: Any) -> Callable[[Path], None]:
    return lambda path: (inject(model("llama"), LoRAConfig(**options)), None)[1]


def ask_the_network_of_what_is_adapted_around_it(path: Path) -> None:
    around = Around()
    inject(around, LoRAConfig(target_modules=["q_proj", "head"]))
    adapter_state_dict(around.model)


def load_what_was_trained_in_bfloat16(path: Path) -> None:
    net = model("llama").bfloat16()
    inject(net, LoRAConfig(target_modules=["q_proj"]))
    save_adapter(fill_(net), path)
    load_adapter(model("llama"), path)


SAID: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer in target_modules and modules_to_save": (
        inject_llama(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
        "lightning_lora: lm_head is in target_modules and in modules_to_save, and so is trained whole, without an "
        "adapter",
    ),
    "all of them in both": (
        inject_llama(target_modules=["lm_head"], modules_to_save=["lm_head"]),
        "LoRA on LlamaForCausalLM: target_modules: ['lm_head'] leaves no layer to adapt: 'lm_head' is in "
        "target_modules and in modules_to_save, and so is trained whole, without an adapter.",
    ),
    "a part of what was adapted": (
        ask_the_network_of_what_is_adapted_around_it,
        "adapter_state_dict: LlamaForCausalLM holds 2 of the 3 layers that were adapted through Around, and not "
        "'head'; pass that Around, or a module that holds them all.",
    ),
    "an adapter of another dtype": (
        load_what_was_trained_in_bfloat16,
        "lightning_lora: the adapter was trained on a base in bfloat16, and this one is in float32, with other digits "
        "('model.embed_tokens.weight': [...], here [...]): outputs differ a little from those in training. Cast the "
        "model to bfloat16 before loading to have the same.",
    ),
}


@pytest.mark.parametrize("subject", SAID)
def test_messages_say_what_happened(tmp_path, caplog, subject: str):
    act, expected = SAID[subject]
    said = []
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, "lightning_lora"):
        warnings.simplefilter("always")
        try:
            act(tmp_path / "adapter")
        except LoRAError as error:
            said.append(str(error))
    said += [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
    said = [re.sub(r"\[-?\d[^\]]*\]", "[...]", message) for message in said]  # values of a weight
    print(f"{subject}: {said}")
    assert expected in said


# --- layers and training ---


def show(message: object) -> str:
    print(f"\n{message}\n")
    return str(message)


class Linear(nn.Module):
    """As torch_geometric's, which is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))


def test_a_layer_that_cannot_be_adapted_is_named_with_its_module_and_what_can_be():
    with pytest.raises(LoRAError) as caught:
        inject(nn.ModuleDict({"norm": nn.LayerNorm(3)}), LoRAConfig(target_modules=["norm"]))
    assert show(caught.value) == (
        "inject: 'norm': a torch.nn.modules.normalization.LayerNorm cannot be adapted, only nn.Linear, transformers' "
        "Conv1D, nn.Embedding, nn.Conv1d/2d/3d and nn.MultiheadAttention and their subclasses can, or leave it out "
        "with exclude_modules=['norm']."
    )
    with pytest.raises(LoRAError) as caught:
        inject(nn.ModuleDict({"conv": Linear()}), LoRAConfig(target_modules=["conv"]))
    assert f"a {__name__}.Linear cannot be adapted, only nn.Linear" in show(caught.value)


def test_training_while_merged_names_merged(tmp_path):
    class Merges(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            merge(self)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError) as caught:
        make_trainer(tmp_path, LoRACallback(r=2)).fit(Merges(), Data())
    assert show(caught.value) == (
        "element 0 of tensors does not require grad and does not have a grad_fn. The adapters are merged, and merged "
        "they get no gradients: something called merge() before this training step; call unmerge(model) first, or "
        "merge in `with merged(model):` around the evaluation."
    )


def test_an_optimizer_built_before_inject_is_named_at_the_first_merge():
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inject(model, LoRAConfig(r=1))
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="gradients reach") as caught:
        merge(model)
    assert show(caught[0].message) == (
        "lightning_lora: gradients reach the adapters, but none of them has changed. An optimizer that was built "
        "before inject does not hold them: build it afterwards, from model.parameters(). Where no step was taken yet, "
        "all is well."
    )
