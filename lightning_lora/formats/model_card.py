"""The model card of a PEFT folder: README.md, which a hub shows as the adapter's page.

Its last line holds a check sum of the rest. A card whose check sum is right is as it was written, and is replaced
together with the adapter. Any other README.md is somebody's own and stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter.adapter import Adapter
from ..config import TASK_HEADS
from ..errors import MOST
from ..files.paths import PathLike, kind_of

CARD_FILE = "README.md"
LONGEST = 2**20  # bytes; a longer file is no card of ours
MOST_METRICS = 50
MARKED_BY = "lightning_lora wrote this card, and writes it again with the adapter unless somebody edits it:"
MARK = re.compile(rf"^<!-- {MARKED_BY} ([0-9a-f]{{16}}) -->\n\Z", re.MULTILINE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


class Task(NamedTuple):
    """What a hub calls a task, and the class of transformers that loads a model for it."""

    pipeline_tag: str
    auto_class: str


CLASSIFIERS = {*TASK_HEADS["SEQ_CLS"], *TASK_HEADS["TOKEN_CLS"]}  # names of modules
TASKS = {
    "CAUSAL_LM": Task("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": Task("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": Task("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": Task("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": Task("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": Task("feature-extraction", "AutoModel"),
}

LOADING = """## How to load it

`folder` is where these files are: a path, or this page's name on the hub.

With [PEFT](https://github.com/huggingface/peft):

```python
from peft import PeftModel
{imports}
{base}
model = PeftModel.from_pretrained(base, folder)
```

With the package lightning_lora, which wrote it, to use it or to train on:

```python
from lightning_lora import load_adapter

load_adapter(base, folder)
```
"""
TO_BUILD = "# build base here: {}"


def may_write_card(folder: PathLike) -> bool:
    """Return whether a folder holds no README.md, or one that nobody edited since this package wrote it."""
    file = Path(folder) / CARD_FILE
    with suppress(OSError):
        if not os.path.lexists(file):
            return True
        if file.is_symlink() or kind_of(file) != "file" or file.stat().st_size > LONGEST:
            return False
        return _is_unedited(file.read_bytes().decode("utf-8", "replace"))
    return False


def _is_unedited(text: str) -> bool:
    mark = MARK.search(text)
    return mark is not None and mark[1] == _check_sum(text[: mark.start()])


def _check_sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def write_card(folder: Path, text: str) -> None:
    """Write the card into a new folder."""
    (folder / CARD_FILE).write_bytes(text.encode("utf-8"))


def model_card(options: Mapping[str, Any], adapter: Adapter, metrics: Mapping[str, float], network: str = "") -> str:
    """Return the text of a card.

    Args:
        options: the fields of adapter_config.json.
        adapter: the adapter.
        metrics: of the run that trained it, as last logged.
        network: the prefix, in the LightningModule that was saved, of the network whose names the folder has.
    """
    task = TASKS.get(str(options.get("task_type")))
    base = options.get("base_model_name_or_path")
    base = base if isinstance(base, str) else ""
    title = f"{adapter.variant.title} adapter" + (f" of {_code(base)}" if base else "")
    parts = [_front_matter(base, task), f"# {title}\n", _what_it_is(options, adapter)]
    if metrics:
        rows = [f"| {_cell(name)} | {value:.6g} |" for name, value in sorted(metrics.items())[:MOST_METRICS]]
        parts.append("\n".join(["## As the Trainer last logged\n", "| metric | value |", "|---|---|", *rows, ""]))
    parts.append(_loading(base, task, adapter, network))
    text = "\n".join(parts) + "\n"
    return f"{text}<!-- {MARKED_BY} {_check_sum(text)} -->\n"


def _front_matter(base: str, task: Task | None) -> str:
    """Return the fields that a hub reads. Texts are in quotes, so that no name can end its field."""
    lines = ["---", "library_name: peft"]
    tags = ["lora", "lightning"]
    if _is_hub_id(base):
        lines.append(f"base_model: {json.dumps(base)}")
        tags.insert(0, f"base_model:adapter:{base}")
    if task is not None:
        lines.append(f"pipeline_tag: {task.pipeline_tag}")
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""])


def _is_hub_id(name: str) -> bool:
    """Return whether a base's name can be that of a repository on the hub, and is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)


def _what_it_is(options: Mapping[str, Any], adapter: Adapter) -> str:
    values = sum(factor.numel() for factor in adapter.factors())
    counts = [f"| adapted layers | {len(adapter.layers):,} |", f"| values in their factors | {values:,} |"]
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in options.items() if _tells(name, value)]
    return "\n".join(["| | |", "|---|---|", *counts, *rows, ""])


def _tells(name: str, value: Any) -> bool:
    return value not in (None, False, "", [], {}) and name not in ("inference_mode", "base_model_name_or_path")


def _loading(base: str, task: Task | None, adapter: Adapter, network: str) -> str:
    if adapter.pretrained:
        part = adapter.pretrained.removeprefix(adapter.network).removesuffix(".")
        return LOADING.format(imports="", base=TO_BUILD.format(f"{module_in_words(adapter)}, not its {part} alone"))
    if network and (task is None or not base):
        why = "module is your LightningModule; given that itself, PEFT fails or runs the base"
        return LOADING.format(imports="", base=f"base = module.{network.removesuffix('.')}  # {why}")
    if task is None or not base:
        trained_on = "the model that the adapter was trained on, with the weights that it had before"
        return LOADING.format(imports="", base=TO_BUILD.format(trained_on))
    imports = f"from transformers import {task.auto_class}\n"
    call = f"base = {task.auto_class}.from_pretrained({json.dumps(base)}{_labels(adapter)})"
    return LOADING.format(imports=imports, base=call)


def _labels(adapter: Adapter) -> str:
    """Return the argument for the number of labels of a classifier that was trained whole, or ""."""
    of_heads = [name for name in adapter.tensors if name.endswith(".weight") and CLASSIFIERS & set(name.split("."))]
    return f", num_labels={len(adapter.tensors[of_heads[-1]])}" if of_heads else ""


def module_in_words(adapter: Adapter) -> str:
    """Name the module whose names a folder has, where the adapter holds more than a transformers model."""
    return (
        f"the LightningModule's {adapter.network.removesuffix('.')}" if adapter.network else "the whole LightningModule"
    )


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    text = text if len(text) <= MOST else f"{text[: MOST - 3]}..."
    return f"`{text.replace('`', chr(39))}`"


def finite_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among logged values."""
    numbers = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # no number, or a tensor of several values
            continue
        if math.isfinite(number):
            numbers[str(name)] = number
    return numbers
