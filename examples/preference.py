"""Preferences: DPO, with the model whose adapter is disabled as the reference, so that there is one model in memory.

pip install -e ".[examples]"
python examples/preference.py

Python's library mostly writes "Return the name" in docstrings. The model is taught to prefer "Returns the name", and is
judged by verbs that were not among those that it was taught with. Direct preference optimization: Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290.
"""

import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, disable_adapter

TAUGHT = ("Return", "Set", "Create", "Get", "Read", "Add", "Remove", "Convert", "Write", "Test", "Send", "Find")
HELD_OUT = (
    "Close",
    "Delete",
    "Format",
    "Open",
    "Run",
    "Generate",
    "Check",
    "Print",
    "Make",
    "Clear",
    "Decode",
    "Start",
)


class DPO(L.LightningModule):
    def __init__(self, beta: float = 0.5, learning_rate: float = 0.003) -> None:
        super().__init__()
        self.beta, self.learning_rate = beta, learning_rate
        self.model = LlamaForCausalLM.from_pretrained(pretrained())

    def log_ratio(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """How much more probable the chosen text is than the rejected one; (n, length) each, of the same prompts."""
        return self.log_probability(chosen) - self.log_probability(rejected)

    def log_probability(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, attention_mask=(tokens > 0).long()).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=0, reduction="none")
        return -losses.sum(1)  # of the prompt too, which is the same in both

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad(), disable_adapter(self):
            reference = self.log_ratio(*batch)
        return -F.logsigmoid(self.beta * (self.log_ratio(*batch) - reference)).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("prefers", (self.log_ratio(*batch) > 0).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def preferences(verbs: tuple[str, ...]) -> TensorDataset:
    """Heads of functions with the first words of their docstrings, descriptive (chosen) and imperative (rejected)."""
    library = Path(sysconfig.get_path("stdlib"))
    source = "".join(path.read_text("utf-8", "replace") for path in sorted(library.glob("*.py")))
    chosen, rejected = [], []
    for verb in verbs:
        for head, rest in re.findall(rf'(def \w+\(.*\):\n +""")(?:{verb})( [^\n"]*)', source)[:20]:
            chosen.append(encode(f"{head}{verb}s{rest}"[-96:]))
            rejected.append(encode(f"{head}{verb}{rest}"[-96:]))
    padded = torch.nn.utils.rnn.pad_sequence([*chosen, *rejected], batch_first=True)
    return TensorDataset(padded[: len(chosen)], padded[len(chosen) :])


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace")))


def pretrained() -> Path:
    """The folder of a small Llama that has read Python's manual, character by character; trained at the first call."""
    folder = Path(__file__).with_name("manual_llama")
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):  # what follows draws the same numbers, whether this trains or not
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
            )
            config.initializer_range, config.pad_token_id = 0.07, 0
            model = LlamaForCausalLM(config)
            pieces = encode("\n".join(topics.values())).unfold(0, 128, 128)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
            for _ in range(400):
                batch = pieces[torch.randint(len(pieces), (16,))]
                optimizer.zero_grad()
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                schedule.step()
            model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    L.seed_everything(0)
    model = DPO()
    taught, held_out = preferences(TAUGHT), preferences(HELD_OUT)
    print(f"pairs: {len(taught)} to learn from, {len(held_out)} of other verbs")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[LoRACallback(r=8, lora_alpha=16)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(held_out, batch_size=64)
    before = trainer.validate(model, data, verbose=False)[0]["prefers"]
    trainer.fit(model, DataLoader(taught, batch_size=16, shuffle=True))
    after = trainer.validate(model, data, verbose=False)[0]["prefers"]
    with disable_adapter(model):
        reference = (model.log_ratio(*held_out[:]) > 0).float().mean()
    print(f'prefers "Returns" to "Return": {before:.0%} before, {after:.0%} after')
    print(f"the reference, which is the same model without its adapter: {reference:.0%}")
