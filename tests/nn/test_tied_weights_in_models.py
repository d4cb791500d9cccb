"""Tied embeddings and heads, in all combinations of targets: trained, evaluated, saved and resumed."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    merged,
)
from support.covering import covering
from support.models.networks import bits, randomise_
from support.runs.training import assert_same_tensors, make_trainer, own_random_stream

VOCABULARY, WIDTH = 20, 16


class Plain(nn.Module):
    """As a user ties: one Parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)).tanh())


def gpt2() -> nn.Module:
    quiet = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=8, **quiet))


def llama(tie: bool = True) -> nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, tie_word_embeddings=tie))


MODELS = {  # how to build it, and the names of embedding, head and a layer between
    "plain": (Plain, "embed", "head", "body"),
    "gpt2": (gpt2, "transformer.wte", "lm_head", "c_attn"),
    "llama": (llama, "model.embed_tokens", "lm_head", "v_proj"),
}
CHOICES = ["neither", "embedding", "head", "both"]


def build(kind: str) -> nn.Module:
    with own_random_stream(1):
        model = MODELS[kind][0]()
    with torch.no_grad():  # large enough for the adapters to matter
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.train()


def targets(kind: str, choice: str) -> list[str]:
    _, embedding, head, between = MODELS[kind]
    return [between] + [embedding] * (choice in ("embedding", "both")) + [head] * (choice in ("head", "both"))


def tokens(seed: int = 4) -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(seed))


def logits(output) -> torch.Tensor:
    return getattr(output, "logits", output)


def by_hand(plain: nn.Module, factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the plain model in float64 with W + s * B @ A under each name by itself, as if nothing were tied."""
    weights = {name: p.double() for name, p in plain.named_parameters(remove_duplicate=False)}
    for path in {name.rpartition(".")[0] for name in factors}:
        product = 1.5 * factors[f"{path}.lora_B"] @ factors[f"{path}.lora_A"]
        weight = weights[f"{path}.weight"]
        stored_in_out = isinstance(plain.get_submodule(path), nn.Embedding) or path.endswith("c_attn")
        weights[f"{path}.weight"] = weight + (product.T if stored_in_out else product)
    wide = copy.deepcopy(plain).double()  # its buffers too
    return logits(functional_call(wide, weights, (tokens(),), tie_weights=False))


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize(("kind", "choice"), covering([*MODELS], CHOICES, meet=1))
def test_tied_owners_with_adapters_of_their_own_agree_with_float64(kind, choice):
    plain = build(kind)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(r=2, lora_alpha=3, target_modules=targets(kind, choice)))
    randomise_(model, 0.5)
    own = {name: p.detach().double().requires_grad_() for name, p in factors_of(model).items()}
    expected = by_hand(plain, own)
    pull = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * pull.double()).sum(), list(own.values()))

    def check() -> None:
        torch.testing.assert_close(logits(model(tokens())).double(), expected.detach(), rtol=1e-4, atol=1e-4)

    (logits(model(tokens())) * pull).sum().backward()
    for gradient, (name, factor) in zip(wanted, factors_of(model).items(), strict=True):
        torch.testing.assert_close(factor.grad.double(), gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
        assert gradient.abs().max() > 0.01, name
    before = base_bits(model)
    tied = MODELS[kind][1] + ".weight"
    for mode in (True, False):
        model.train(mode)
        check()
        with merged(model):
            check()
            changed = {name for name, value in base_bits(model).items() if value != before[name]}
            assert len(changed) == 1
            assert tied not in changed
        assert base_bits(model) == before


# --- in a Trainer ---


class Language(L.LightningModule):
    """Next-token loss; `seen` holds the validation losses."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.seen = build(kind), []

    def step(self, batch):
        scores = logits(self.model(batch))[:, :-1]
        return nn.functional.cross_entropy(scores.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.step(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class SaveEachEpoch(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


def fit(path, kind: str, choice: str, ckpt_path=None, **options):
    model = Language(kind)
    loader = DataLoader([tokens(seed)[0] for seed in range(8)], batch_size=4)
    lora = LoRACallback(**{"r": 2, "target_modules": targets(kind, choice)} | options)
    trainer = make_trainer(path, lora, SaveEachEpoch(), max_epochs=3)
    torch.manual_seed(0)
    trainer.fit(model, loader, loader, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize(("kind", "choice"), [("plain", "head"), ("gpt2", "embedding"), ("gpt2", "both")])
def test_a_fit_with_tied_weights_is_saved_resumed_and_loaded(tmp_path, kind, choice):
    model = fit(tmp_path, kind, choice)
    result = dict(adapter_state_dict(model))
    assert model.seen[-1] < model.seen[0]
    assert base_bits(model) == base_bits(Language(kind))
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == result.keys()
    assert all("lora_" in name for name in saved)
    resumed = fit(tmp_path / "resumed", kind, choice, ckpt_path=tmp_path / "0.ckpt")
    assert_same_tensors(dict(adapter_state_dict(resumed)), result)
    load_adapter(loaded := Language(kind), tmp_path / "2.ckpt")
    with merged(loaded), torch.no_grad():
        torch.testing.assert_close(logits(loaded.model(tokens())), logits(model.model(tokens())))


def test_a_fit_that_would_save_merged_weights_is_refused_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(Language, "training_step", lambda *args: pytest.fail("it trained before"))
    with pytest.raises(LoRAError, match=r"its weight is also .*exclude_modules=.*save the adapter instead"):
        fit(tmp_path, "gpt2", "both", save="merged")


def test_trained_head_tied_to_an_adapted_embedding_is_saved_and_resumed(tmp_path):
    options = {"target_modules": ["c_attn", "wte"], "modules_to_save": ["lm_head"]}
    model = fit(tmp_path, "gpt2", "", **options)
    head = model.model.lm_head.weight
    assert head.requires_grad
    assert not torch.equal(head, Language("gpt2").model.lm_head.weight)
    loaded = Language("gpt2")
    load_adapter(loaded, tmp_path / "2.ckpt")
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert_same_tensors(dict(adapter_state_dict(loaded)), dict(adapter_state_dict(model)))
    resumed = fit(tmp_path / "resumed", "gpt2", "", ckpt_path=tmp_path / "0.ckpt", **options)
    assert_same_tensors(dict(adapter_state_dict(resumed)), dict(adapter_state_dict(model)))
