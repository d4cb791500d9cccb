"""Small models that stand in for pretrained ones, and texts to train on. Nothing is downloaded.

Each model is trained at the first call, which takes a few seconds, and then kept in this folder. In a program of your
own, the name of a model on a hub takes its place.
"""

import ast
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

HERE = Path(__file__).parent


# --- texts ---


def manual_llama() -> Path:
    """The folder of a small Llama that has read Python's manual, character by character."""
    folder = HERE / "manual_llama"
    if not folder.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

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
            _save(folder, model)
    return folder


def encode(text: str) -> Tensor:
    """The tokens of manual_llama, which are characters."""
    return torch.tensor(list(text.encode("ascii", "replace")))


def manual_bert() -> Path:
    """The folder of a small BERT that tells the topics of Python's manual apart, with its tokenizer."""
    folder = HERE / "manual_bert"
    if not folder.exists():
        from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

        with torch.random.fork_rng(devices=[]):
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=_word_pieces(), pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
            )
            paragraphs = [
                (text, label)
                for label, topic in enumerate(topics.values())
                for text in topic.split("\n\n")
                if len(text) > 40
            ]
            texts, labels = zip(*paragraphs, strict=True)
            tokens = tokenizer([*texts], padding="max_length", truncation=True, max_length=48, return_tensors="pt")
            data = TensorDataset(tokens["input_ids"], torch.tensor(labels))
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=4000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
            )
            config.num_labels = len(topics)
            model = BertForSequenceClassification(config)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
            for _ in range(6):
                for batch, label in DataLoader(data, batch_size=32, shuffle=True):
                    optimizer.zero_grad()
                    model(input_ids=batch, attention_mask=(batch > 0).long(), labels=label).loss.backward()
                    optimizer.step()
            _save(folder, model, tokenizer)
    return folder


def _save(folder: Path, *parts: Any) -> None:
    """Write a folder that appears whole, wherever this program is broken off."""
    with TemporaryDirectory(prefix="manual_", dir=HERE) as partial:
        for part in parts:
            part.save_pretrained(Path(partial, "whole"))
        if not folder.exists():  # another program may have been faster
            Path(partial, "whole").rename(folder)


def _word_pieces() -> Any:
    """A BERT tokenizer of 4000 pieces of words from Python's manual."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = (splitter.pre_tokenize_str(normalizer.normalize_str(topic)) for topic in topics.values())
    counts = Counter(word for words in texts for word, _ in words)
    letters = sorted({letter for word in counts for letter in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))  # a trainer breaks ties anew in each process
    special, parts = ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), [f"##{letter}" for letter in letters]
    pieces = dict.fromkeys([*special, *letters, *parts, *words])
    vocabulary = {piece: number for number, piece in enumerate([*pieces][:4000])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def docstrings(package: str) -> list[str]:
    """The first paragraph of each docstring of functions and classes in a package of Python's library."""
    files = sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_bytes())))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return sorted({text.split("\n\n")[0] for text in found if len(text) > 20})


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


def preferences(held_out: bool = False) -> TensorDataset:
    """Heads of functions with the first words of their docstrings, descriptive (chosen) and imperative (rejected)."""
    library = Path(sysconfig.get_path("stdlib"))
    source = "".join(path.read_text("utf-8", "replace") for path in sorted(library.glob("*.py")))
    chosen, rejected = [], []
    for verb in HELD_OUT if held_out else TAUGHT:
        for head, rest in re.findall(rf'(def \w+\(.*\):\n +""")(?:{verb})( [^\n"]*)', source)[:20]:
            chosen.append(encode(f"{head}{verb}s{rest}"[-96:]))
            rejected.append(encode(f"{head}{verb}{rest}"[-96:]))
    padded = torch.nn.utils.rnn.pad_sequence([*chosen, *rejected], batch_first=True)
    return TensorDataset(padded[: len(chosen)], padded[len(chosen) :])


# --- images ---


def digits(mirrored: bool) -> TensorDataset:
    """The 1797 digits of scikit-learn as rows of 64 pixels, with their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return TensorDataset((images.flip(-1) if mirrored else images).flatten(1), torch.tensor(data.target))


def digits_mlp() -> nn.Sequential:
    """A network of linear layers that reads upright digits, from the last 900 of them."""
    path = HERE / "digits_mlp.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        if not path.exists():
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
            data = Subset(digits(mirrored=False), range(900, 1797))
            for _ in range(20):
                for images, labels in DataLoader(data, batch_size=32, shuffle=True):
                    optimizer.zero_grad()
                    F.cross_entropy(network(images), labels).backward()
                    optimizer.step()
            torch.save(network.state_dict(), partial := path.with_suffix(f".{os.getpid()}.pt"))
            partial.replace(path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network
