"""The model card of a PEFT folder: README.md, which a hub shows as the adapter's page. One that is there stays."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..adapter.adapter import Adapter, strengths_text
from ..config import TASK_HEADS
from ..errors import MOST

CARD_FILE = "README.md"
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


def model_card(options: Mapping[str, Any], adapter: Adapter, network: str = "") -> str:
    """Return the text of a card. It says nothing that another adapter of the same run would change.

    Args:
        options: the fields of adapter_config.json.
        adapter: the adapter.
        network: the prefix, in the LightningModule that was saved, of the network whose names the folder has.
    """
    task = TASKS.get(str(options.get("task_type")))
    base = options.get("base_model_name_or_path")
    base = base if isinstance(base, str) else ""
    title = f"{adapter.variant.title} adapter" + (f" of {_code(base)}" if _is_hub_id(base) else "")
    quantized = sorted({entry.quantized.partition(" ")[0] for entry in adapter.fingerprint.values()} - {""})
    parts = [_front_matter(base, task), f"# {title}\n"]
    if quantized:
        parts.append(f"It belongs to a base that is quantized ({', '.join(quantized)}): load that in the same way.\n")
    if adapter.attached:
        parts.append(
            f"It was trained with {strengths_text(adapter.attached)} attached, which is not in these files. "
            "Without that it computes something else.\n"
        )
    if heads := _heads(adapter):
        parts.append(
            f"It holds fully trained modules: {', '.join(heads)}. Build the base with these sizes, a classifier of "
            f"transformers with `num_labels={list(heads.values())[-1]}`.\n"
            if _labels(adapter)
            else f"It holds fully trained modules: {', '.join(heads)}. Build the base with these sizes.\n"
        )
    return "\n".join([*parts, _loading(base, task, adapter, network)])


def _heads(adapter: Adapter) -> dict[str, int]:
    """Return the linear layers that were fully trained, as text with their size, and the number of their outputs."""
    found = {}
    for name, value in adapter.whole_tensors().items():
        owner, _, leaf = name.removeprefix(adapter.network).rpartition(".")
        if leaf == "weight" and getattr(value, "ndim", 0) == 2:
            found[f"{_code(owner)} ({value.shape[1]} to {value.shape[0]})"] = value.shape[0]
    return found


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
    """Return the argument for the number of labels of a classifier that was fully trained, or ""."""
    of_heads = [name for name in adapter.tensors if name.endswith(".weight") and CLASSIFIERS & set(name.split("."))]
    return f", num_labels={len(adapter.tensors[of_heads[-1]])}" if of_heads else ""


def module_in_words(adapter: Adapter) -> str:
    """Name the module whose names a folder has, where the adapter holds more than a transformers model."""
    return (
        f"the LightningModule's {adapter.network.removesuffix('.')}" if adapter.network else "the whole LightningModule"
    )


def _code(text: str) -> str:
    text = text if len(text) <= MOST else f"{text[: MOST - 3]}..."
    return f"`{text.replace('`', chr(39))}`"
