"""Backbones in eval mode, as from_pretrained leaves them: adapters train, with their dropout."""

from __future__ import annotations

import contextlib

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject
from support.runs.training import assert_same_tensors, make_trainer, own_random_stream

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")

WIDTH, CLASSES = 16, 3


def gpt2() -> nn.Module:
    return GPT2Model(
        GPT2Config(n_layer=1, n_embd=WIDTH, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
    )


def bert() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": 20, "max_position_embeddings": 8}
    return BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes), add_pooling_layer=False)


BACKBONES = {"gpt2": (gpt2, ["c_attn", "c_fc"]), "bert": (bert, ["query", "dense"])}


class Classifier(L.LightningModule):
    """A backbone in eval mode under a head in training mode; `noise` notes where the backbone is random, and how."""

    def __init__(self, kind: str = "gpt2") -> None:
        super().__init__()
        with own_random_stream(1):
            self.backbone = BACKBONES[kind][0]().eval()
            self.head = nn.Linear(WIDTH, CLASSES)
        self.noise: list[tuple[str, bool, bool]] = []
        self.losses: list[torch.Tensor] = []

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.backbone(tokens)[0]

    def look(self, where: str) -> None:
        """Twice the same input gives twice the same output, but for dropout."""
        x = torch.arange(12).view(2, 6)
        random = not torch.equal(self.features(x), self.features(x))
        self.noise.append((where, torch.is_grad_enabled(), random))

    def loss(self, batch):
        return nn.functional.cross_entropy(self.head(self.features(batch[0]).mean(1)), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.look("validation_step")
        self.losses.append(self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.look("test_step")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader:
    with own_random_stream(2):
        examples = [(torch.randint(20, (6,)), i % CLASSES) for i in range(8)]
    return DataLoader(examples, batch_size=4)


def fit(path, model: Classifier, *callbacks: L.Callback, epochs: int = 2, **options) -> L.Trainer:
    kind = "bert" if isinstance(model.backbone, BertModel) else "gpt2"
    options = {"r": 2, "target_modules": BACKBONES[kind][1], "init_lora_weights": False, **options}
    trainer = make_trainer(path, LoRACallback(**options), *callbacks, max_epochs=epochs)
    torch.manual_seed(0)
    trainer.fit(model, loader(), loader())
    return trainer


@pytest.mark.parametrize(("kind", "dropout"), [("gpt2", 0.0), ("bert", 0.5)])
def test_adapters_in_an_eval_mode_backbone_train_and_modes_stay(tmp_path, kind, dropout):
    model, before = Classifier(kind), Classifier(kind)
    modes = [module.training for module in model.modules()]
    inject(before, LoRAConfig(r=2, target_modules=BACKBONES[kind][1], init_lora_weights=False))
    fit(tmp_path, model, epochs=4, lora_dropout=dropout)
    assert [module.training for module in model.modules()] == modes
    torch.manual_seed(0)
    start = dict(adapter_state_dict(before))
    moved = dict(adapter_state_dict(model))
    assert all(not torch.equal(moved[name], start[name]) for name in moved if "lora_" in name)
    assert model.losses[-1] < model.losses[0]


def test_a_backbone_in_training_mode_drops_the_same(tmp_path):
    """With the backbone's own dropout at 0, its mode makes no difference."""
    results = []
    for mode in (True, False):
        model = Classifier()
        for module in model.backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.backbone.train(mode)
        fit(tmp_path, model, lora_dropout=0.5)
        results.append(dict(adapter_state_dict(model)))
    assert_same_tensors(results[0], results[1])


def test_dropout_acts_where_the_training_step_records_gradients_or_sets_training_mode(tmp_path):
    class Evaluating(Classifier):
        def training_step(self, batch, batch_idx):
            for mode in (False, True):
                self.train(mode)
                for recording in (True, False):
                    with torch.set_grad_enabled(recording):
                        self.look(f"{mode or recording}")
            return self.loss(batch)

    model = Evaluating()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    fit(tmp_path, model, lora_dropout=0.5)
    assert all(random is (where == "True") for where, _, random in model.noise)
    assert len(model.noise) > 8


class Checkpointed(Classifier):
    """Activation checkpointing of an eval-mode part; the input needs a gradient, so that both kinds train it."""

    use_reentrant: bool | None = None

    def features(self, tokens):
        embedded = self.backbone.wte(tokens).requires_grad_()
        if self.use_reentrant is None:
            return self.backbone(inputs_embeds=embedded)[0]
        return checkpoint(lambda x: self.backbone(inputs_embeds=x)[0], embedded, use_reentrant=self.use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in evaluation too
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_segment_drops_the_same_in_both_of_its_passes(tmp_path, use_reentrant):
    results = []
    for how in (None, use_reentrant):
        model = Checkpointed()
        model.use_reentrant = how
        fit(tmp_path, model, lora_dropout=0.5)
        results.append(dict(adapter_state_dict(model)))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError, None])
def test_a_batch_that_is_broken_off_leaves_no_dropout_behind(tmp_path, error):
    class Stopping(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx else None

        def training_step(self, batch, batch_idx):
            if error:
                raise error
            return super().training_step(batch, batch_idx)

    model = Stopping()
    with pytest.raises(error) if error else contextlib.nullcontext():
        fit(tmp_path, model, lora_dropout=0.5)
    x = torch.arange(12).view(2, 6)
    assert torch.equal(model.features(x), model.features(x))


def test_a_trainer_inside_a_hook_leaves_dropout_as_it_was(tmp_path):
    class Inner(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            lora = next(callback for callback in trainer.callbacks if isinstance(callback, LoRACallback))
            make_trainer(tmp_path, lora).test(pl_module, loader(), verbose=False)

    class Recording(Classifier):
        def training_step(self, batch, batch_idx):
            self.look("training_step")
            return self.loss(batch)

    model = Recording()
    fit(tmp_path, model, Inner(), lora_dropout=0.5)
    assert [random for where, _, random in model.noise if where == "training_step"] == [True] * 4
    assert not any(random for where, _, random in model.noise if where != "training_step")
