"""Messages that people meet, word for word; `pytest -s` prints them all, and the reference lists the most common.

A function provokes a message, and its docstring is what the message says, with PATH for the folder at hand.
"""

from __future__ import annotations

import inspect
import logging
import os
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
    merged_state_dict,
    save_adapter,
    unmerge,
)
from lightning_lora.command.merge import merge_on_disk
from support.lightning_versions import PLAIN_TYPES_ONLY
from support.peers import model
from support.runs import lora
from support.training import Data, Net, make_trainer

Provoke = Callable[[Path], Any]

MESSAGES: dict[str, Provoke] = {}
ON_THE_PAGE: list[str] = []


def message(when: str, *, on_the_page: bool = True) -> Callable[[Provoke], Provoke]:
    def listed(provoke: Provoke) -> Provoke:
        MESSAGES[when] = provoke
        if on_the_page:
            ON_THE_PAGE.append(when)
        return provoke

    return listed


@pytest.mark.parametrize("when", MESSAGES)
def test_message_says_what_was_found_and_what_to_do(tmp_path: Path, when: str):
    provoke = MESSAGES[when]
    with pytest.raises(LoRAError) as told:
        provoke(tmp_path)
    found = str(told.value).replace(str(tmp_path), "PATH")
    print(f"\n{when}:\n    {found}")
    expected = inspect.cleandoc(provoke.__doc__ or "").replace("\n", " ")
    found = re.sub(r"(?<=deserializing header: ).*", "[...]", found)  # the library's words, which differ by version
    assert re.sub(r"\[-?\d.*?\]", "[...]", found) == expected


BEGIN, END = "<!-- messages: written by tests/tables/test_messages.py -->", "<!-- end of messages -->"
PAGE = Path(__file__).parents[2] / "lightning_lora" / "errors.md"


def test_the_reference_lists_these_messages():
    """WRITE_TABLE=1 writes them there."""
    entries = []
    for when in ON_THE_PAGE:
        lines = inspect.cleandoc(MESSAGES[when].__doc__ or "").splitlines()
        entries.append("\n".join([f"**{when}**", "", *(f"> {line}" for line in lines), ""]))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written = f"{before}{BEGIN}\n\n" + "\n".join(entries) + f"\n{END}{rest.partition(END)[2]}"
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text(written)
    assert PAGE.read_text() == written


# --- loading ---


def saved(path: Path, *callbacks: Any, base: Path | None = None) -> Path:
    """Train, and save: with no callback as plain Lightning does."""
    model = Net.load_from_checkpoint(base, **PLAIN_TYPES_ONLY) if base else Net()
    trainer = make_trainer(path, *callbacks)
    trainer.fit(model, Data())
    file = path / ("lora.ckpt" if callbacks else "pretrained.ckpt")
    trainer.save_checkpoint(file)
    return file


@message("A fit resumed from a plain checkpoint")
def a_fit_resumed_from_a_plain_checkpoint(path: Path) -> None:
    """LoRACallback: the checkpoint at ckpt_path holds no adapter, only the weights of a training without one, whose
    optimizers and progress an adapter cannot go on with. To train an adapter on these weights, load them first and
    leave ckpt_path out: trainer.fit(Net.load_from_checkpoint("pretrained.ckpt"), ...). To resume that training, leave
    LoRACallback out.
    """
    make_trainer(path, lora()).fit(Net(), Data(), ckpt_path=saved(path), **PLAIN_TYPES_ONLY)


@message("`load_from_checkpoint` of a plain checkpoint")
def load_from_checkpoint_of_a_plain_checkpoint(path: Path) -> None:
    """checkpoint["lora"]: is missing or damaged; this is not a checkpoint of lightning_lora. One of plain Lightning,
    without an adapter, is loaded by its class's own load_from_checkpoint.
    """
    load_from_checkpoint(Net, saved(path))


@message("`load_from_checkpoint` where the base was pretrained")
def load_from_checkpoint_where_the_base_was_pretrained(path: Path) -> None:
    """adapter: belongs to another base: values of 'body.0.weight' were [...], here [...]. 8 of 8 frozen tensors
    differ ('body.0.weight', 'body.0.bias', 'body.1.weight', ...). Net built a base of its own. Build the module
    with the weights that it had in training, and then load the adapter: load_adapter(model, "PATH/lora.ckpt").
    strict_base=False makes this a warning.
    """
    load_from_checkpoint(Net, saved(path, lora(), base=saved(path)))


@message("A Trainer where the base was pretrained", on_the_page=False)
def a_trainer_where_the_base_was_pretrained(path: Path) -> None:
    """adapter: belongs to another base: values of 'body.0.weight' were [...], here [...]. 8 of 8 frozen tensors
    differ ('body.0.weight', 'body.0.bias', 'body.1.weight', ...). Build the module with the weights that it had in
    training. To use the adapter on this base all the same, in Python call load_adapter(model, path, strict_base=False)
    and leave ckpt_path out.
    """
    file = saved(path, lora(), base=saved(path))
    make_trainer(path, lora()).validate(Net(), Data(), ckpt_path=file, **PLAIN_TYPES_ONLY)


@message("`load_adapter` onto another base", on_the_page=False)
def load_adapter_onto_another_base(path: Path) -> None:
    """adapter: belongs to another base: values of 'body.0.weight' were [...], here [...]. 6 of 8 frozen tensors
    differ ('body.0.weight', 'body.0.bias', 'body.3.weight', ...). Load the adapter on the base that it was trained
    on, or pass strict_base=False, which makes this a warning.
    """
    load_adapter(Net(seed=2), saved(path, lora()))


@message("The command with another base", on_the_page=False)
def the_command_with_another_base(path: Path) -> None:
    """adapter: belongs to another base: values of 'body.0.weight' were [...], here [...]. 6 of 8 frozen tensors
    differ ('body.0.weight', 'body.0.bias', 'body.3.weight', ...). Give the base that it was trained on as --base,
    or pass --strict-base=false, which makes this a warning.
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


@message("`load_from_checkpoint` with an object in the hyper-parameters")
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


# --- injecting, training and merging ---


def small(**options: Any) -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3))
    inject(net, LoRAConfig(r=1, **options))
    return net


@message("A typo in `target_modules`", on_the_page=False)
def a_typo_in_target_modules(path: Path) -> None:
    """inject: LlamaForCausalLM: target_modules: 'q_prj' names no layer to adapt; did you mean 'q_proj', 'v_proj',
    'o_proj'?
    """
    inject(model("llama"), LoRAConfig(target_modules=["q_prj"]))


@message("`inject` with other options")
def inject_with_other_options(path: Path) -> None:
    """inject: Sequential was injected with other options (r was 1, now 2); unload it first."""
    inject(small(), LoRAConfig(r=2))


class EarlyOptimizer(Net):
    """Builds its optimizer before the Trainer calls setup."""

    def __init__(self) -> None:
        super().__init__()
        self.early = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self) -> Any:
        return self.early


@message("A fit whose optimizer was built too early")
def a_fit_whose_optimizer_was_built_too_early(path: Path) -> None:
    """LoRACallback: no optimizer holds the adapter parameter 'body.0.lora_A' (6 of 6 are in none), so it would never be
    trained. Build the optimizer in configure_optimizers from self.parameters() at that time, not from parameters
    collected in __init__. Where a library builds it earlier, call inject on the network before that. If it is meant for
    some layers only, adapt those alone: leave the others out with exclude_modules=['body.0', 'body.3', 'head'], or name
    those in target_modules.
    """
    make_trainer(path, lora()).fit(EarlyOptimizer(), Data())


@message("`merge` after a diverged run")
def merge_after_a_diverged_run(path: Path) -> None:
    """merge: layer '0': W + s * B @ A is not finite (NaN, Inf, or beyond the range of its dtype). Every layer is
    unmerged; look for a diverged training run (a lower learning rate, gradient clipping) or evaluate with
    merged_eval=False.
    """
    net = small()
    net.get_parameter("0.lora_B").data.fill_(torch.nan)
    merge(net)


@message("`unmerge` of a weight that was changed meanwhile", on_the_page=False)
def unmerge_of_a_weight_that_was_changed_meanwhile(path: Path) -> None:
    """unmerge: layer '0': the weight was changed while it was merged; the change was undone. Change weights while the
    model is unmerged.
    """
    merge(net := small(init_lora_weights=False))
    net.get_parameter("0.weight").data.add_(1)
    unmerge(net)


@message("Merged weights of a tied head")
def merged_weights_of_a_tied_head(path: Path) -> None:
    """merged weights: cannot express the adapter of 'lm_head': its weight is also model.embed_tokens.weight. Leave the
    layer out (exclude_modules=['lm_head']), untie the weight, or save the adapter instead.
    """
    net = model("llama")
    net.lm_head.weight = net.model.embed_tokens.weight
    inject(net, LoRAConfig(r=2, target_modules=["lm_head"]))
    merged_state_dict(net)


# --- files ---


@message("`load_adapter` of a file that was cut", on_the_page=False)
def load_adapter_of_a_file_that_was_cut(path: Path) -> None:
    """PATH/adapter_model.safetensors: cannot be read as safetensors; it may be truncated: Error while deserializing
    header: [...]
    """
    save_adapter(small(), path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    load_adapter(nn.Sequential(nn.Linear(3, 3)), path)


@message("`load_adapter` of a file of loralib")
def load_adapter_of_a_file_of_loralib(path: Path) -> None:
    """adapter: the source stores tensors and no options, as loralib's files do. Its factors have rank 1; lora_alpha is
    nowhere in it and must come from whoever trained it. Call inject(model, LoRAConfig(r=1, lora_alpha=...,
    target_modules=['0'])) first, then load_adapter again.
    """
    torch.save({"0.lora_A": torch.ones(1, 3), "0.lora_B": torch.ones(3, 1)}, path / "lora.pt")
    load_adapter(nn.Sequential(nn.Linear(3, 3)), path / "lora.pt")


def inject_llama(**options: Any) -> Callable[[Path], None]:
    return lambda path: (inject(model("llama"), LoRAConfig(**options)), None)[1]


def ask_the_network_of_what_is_adapted_around_it(path: Path) -> None:
    around = Around()
    inject(around, LoRAConfig(target_modules=["q_proj", "head"]))
    adapter_state_dict(around.model)


SAID: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer in target_modules and modules_to_save": (
        inject_llama(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
        "lightning_lora: lm_head is in target_modules and in modules_to_save, and so is trained whole, without an "
        "adapter",
    ),
    "all of them in both": (
        inject_llama(target_modules=["lm_head"], modules_to_save=["lm_head"]),
        "inject: LlamaForCausalLM: target_modules: ['lm_head'] leaves no layer to adapt: 'lm_head' is in "
        "target_modules and in modules_to_save, and so is trained whole, without an adapter.",
    ),
    "a part of what was adapted": (
        ask_the_network_of_what_is_adapted_around_it,
        "adapter_state_dict: LlamaForCausalLM holds 2 of the 3 layers that were adapted through Around, and not "
        "'head'; pass that Around, or a module that holds them all.",
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
        "Conv1D, nn.Embedding, nn.Conv1d/2d/3d and nn.MultiheadAttention and their subclasses can; leave it out "
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
        "adapters get no gradients: something called merge() before this training step; call unmerge(model) first, or "
        "merge in `with merged(model):` around the evaluation."
    )


def test_layers_that_a_loop_did_not_train_are_named_at_the_first_merge():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    inject(model, LoRAConfig(r=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model["used"](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="training has changed") as caught:
        merge(model)
    assert show(caught[0].message) == (
        "lightning_lora: training has changed other adapters, and not those of 1 of 2 layers: 'unused'. Either nothing "
        "has used these layers yet (parts that few inputs reach), or they are cut off from the loss (detach, no_grad), "
        "or the model reads their weight without calling them, which the adapter cannot follow. Leave out layers that "
        "are never trained: exclude_modules=['unused']."
    )
