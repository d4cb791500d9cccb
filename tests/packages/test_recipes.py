"""What examples/migrating.md says is so.

The programs that it links and both sides of its diffs run, each where the package is installed that it comes
from. Its tables name what both packages have, and options that are taken. The defaults that differ from PEFT's are the
ones it lists.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import peft
import pytest
import torch
from peft import PeftModel, helpers
from peft.tuners.lora import LoraModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora
from lightning_lora import LoRACallback, LoRAConfig, load_adapter
from support.runs.notices import PEER_NOTICES

PAGE = Path(__file__).parents[2] / "examples" / "migrating.md"
SECTIONS = {section.split("\n")[0]: section for section in re.split(r"^#{2,3} ", PAGE.read_text(), flags=re.M)[1:]}
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.M | re.S)
DIFFS = {title: DIFF.findall(section)[0] for title, section in SECTIONS.items() if "```diff" in section}
ROWS = re.findall(r"^\| (.+) \|$", PAGE.read_text(), re.M)
PROGRAMS = {path.stem.removeprefix("train_"): path for path in (Path(__file__).parent / "programs").glob("train_*.py")}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

NOTICES = (
    "ignore:The ``compute`` method of metric",  # of terratorch's metrics before the first batch
    "ignore:`torch.jit.script_method` is deprecated",  # of what NeMo imports
)

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES, *NOTICES)


class Old(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}  # as if it were trained
        self.model = peft.get_peft_model(
            LlamaForCausalLM(LlamaConfig(**SIZES)), peft.LoraConfig(r=8, lora_alpha=16, **options)
        )


class New(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**SIZES))


def test_a_checkpoint_with_a_peft_model_in_it_is_loaded_onto_an_injected_model(tmp_path):
    assert 'then `load_adapter(model, "old.ckpt")`' in SECTIONS["From PEFT"]
    old, new = Old().eval(), New().eval()
    torch.save({"state_dict": old.state_dict(), "hyper_parameters": {}}, tmp_path / "old.ckpt")
    lightning_lora.inject(new, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    load_adapter(new, tmp_path / "old.ckpt")
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(new.model(tokens).logits, old.model(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.packages
@pytest.mark.parametrize("package", PROGRAMS)
def test_program_of_another_package_runs(tmp_path, monkeypatch, package):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(PROGRAMS[package]))


def test_every_block_of_the_page_is_run_and_every_program_is_linked():
    languages = re.findall(r"^```(\w+)$", PAGE.read_text(), re.M)
    assert languages == ["diff"] * len(DIFFS)
    linked = re.findall(r"\]\(\.\./tests/packages/programs/train_(\w+)\.py\)", PAGE.read_text())
    assert sorted(linked) == sorted(PROGRAMS) == ["litgpt", "nemo", "terratorch"]


# --- both sides of a diff ---


class Module(L.LightningModule):
    """What the classes in the diffs leave out: a step on the layers that they build, and an optimizer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits if hasattr(self, "model") else self.out(self.qkv(x)[..., -16:])

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Task(Module):
    """Stands in for a framework's task."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def side(diff: str, sign: str) -> str:
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if line[0] in f" \n{sign}")


@pytest.mark.parametrize("title", DIFFS)
def test_both_sides_of_a_diff_run_and_leave_the_same_names(tmp_path, monkeypatch, title):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    names = []
    for sign in "-+":
        (folder := tmp_path / sign).mkdir()
        monkeypatch.chdir(folder)
        data: Any = torch.arange(8)[None] if "Llama" in DIFFS[title] else torch.randn(2, 16)
        namespace = {
            "__name__": "recipe",
            **{name: getattr(package, name) for package in (peft, lightning_lora) for name in package.__all__},
            "L": SimpleNamespace(LightningModule=Module, Trainer=functools.partial(L.Trainer, **quiet)),
            "LlamaForCausalLM": LlamaForCausalLM,
            "Task": Task,
            "config": LlamaConfig(**SIZES),
            "data": torch.utils.data.DataLoader(data),
            "loralib": pytest.importorskip("loralib"),
            "nn": nn,
            "torch": torch,
        }
        exec(compile(side(DIFFS[title], sign), title, "exec"), namespace)
        saved = folder / "tuned" / "model.safetensors"
        names.append(
            set(load_file(saved) if saved.exists() else (namespace.get("net") or namespace["task"]).state_dict())
        )
    assert names[0] == names[1]
    assert len(names[0]) > 3


# --- tables ---


def calls(cell: str) -> set[str]:
    """The names that the inline code of a cell calls."""
    return {name for code in re.findall(r"`([^`]+)`", cell) for name in re.findall(r"(\w+)\(", code)}


def test_rows_of_the_peft_table_name_what_each_package_has():
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", SECTIONS["From PEFT"], re.M)]
    theirs = set().union(*(calls(row[0]) for row in rows))
    ours = set().union(*(calls(row[1]) for row in rows))
    assert len(theirs) > 15
    owners = (peft, helpers, PeftModel, LoraModel)
    assert [name for name in theirs if not any(hasattr(owner, name) for owner in owners)] == []
    assert ours - set(lightning_lora.__all__) == {"print", "gradient_checkpointing_enable", "train"}


def options(code: str) -> dict[str, Any] | None:
    """The options in inline code, of LoRACallback(...) or by themselves; None where it is something else."""
    code = code.replace(", ...", "")
    try:
        call = ast.parse(code if code.startswith("LoRACallback(") else f"LoRACallback({code})", mode="eval").body
        return None if call.args else {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        return None


def test_options_in_the_tables_are_taken():
    codes = {code for row in ROWS for code in re.findall(r"`([^`]+)`", row.split(" | ")[-1])}
    for path in PROGRAMS.values():  # the table in its docstring
        right = [line[48:] for line in ast.get_docstring(ast.parse(path.read_text())).splitlines()]
        codes |= set(re.findall(r"LoRACallback\([^)]*\)|\w+=\[.*?\](?!})|\w+={.*?}", "\n".join(right)))
    found = [given for code in codes if (given := options(code))]
    assert len(found) > 10
    for given in found:
        LoRACallback(**given)


def defaults(config: type) -> dict[str, Any]:
    """The default of each option; an empty collection counts as None."""
    made = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(config)
    }
    return {name: None if value in ({}, []) else value for name, value in made.items()}


def test_defaults_that_differ_from_peft_are_the_ones_listed():
    theirs, ours = defaults(peft.LoraConfig), defaults(LoRAConfig)
    shared = theirs.keys() & ours.keys()
    differ = {name: (repr(theirs[name]), repr(ours[name])) for name in shared if theirs[name] != ours[name]}
    listed = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| `([^`]+)` \|", SECTIONS["From PEFT"], re.M)
    assert {name: (their, our) for name, their, our in listed} == differ
    (count,) = re.findall(r"^\*\*(\w+) defaults? differs?\.\*\*", SECTIONS["From PEFT"], re.M)
    assert count == {1: "One", 2: "Two", 3: "Three"}[len(differ)]
    assert len(shared) > 15
    assert json.dumps(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]) in SECTIONS["From PEFT"]


# --- torchtune ---


@pytest.mark.packages
def test_folder_of_torchtune_is_loaded_with_its_outputs(tmp_path):
    pytest.importorskip("torchtune")  # imports with torchao 0.10 and before
    from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_config, tune_to_peft_adapter_weights
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules.peft import get_adapter_params

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, rms_norm_eps=1e-5)).eval()
    sizes = {"vocab_size": 64, "num_layers": 2, "embed_dim": 32, "intermediate_dim": 64, "max_seq_len": 64}
    heads = {"num_heads": 4, "num_kv_heads": 4}
    attention = ["q_proj", "v_proj"]
    theirs = lora_llama3(attention, apply_lora_to_mlp=True, **sizes, **heads, lora_rank=8, lora_alpha=16).eval()
    theirs.load_state_dict(hf_to_tune(model.state_dict(), **heads, dim=32), strict=False)
    trained = {name: nn.init.normal_(parameter.data, std=0.1) for name, parameter in get_adapter_params(theirs).items()}
    # What torchtune's checkpointer writes
    weights = tune_to_peft_adapter_weights(trained, **heads, dim=32)
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    options = {"r": 8, "lora_alpha": 16, "peft_type": "LORA", "target_modules": [*attention, "w1", "w2", "w3"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(tune_to_peft_adapter_config(options)))
    tokens = torch.arange(16)[None]
    before = model(tokens).logits
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(tokens).logits, theirs(tokens), rtol=0, atol=1e-5)
    assert not torch.allclose(before, theirs(tokens), atol=0.1)
