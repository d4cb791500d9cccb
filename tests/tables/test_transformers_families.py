"""Families of transformers' models, each through what a user does with it; the outcomes are a table in a README.

Each family is a row, and its test compares that. A few are in the usual suite, and with the slow tests those that a
layer, a class or a refusal tells from these; LORA_FULL=1 runs all. `LORA_FULL=1 WRITE_TABLE=1 pytest -n 0 -m ""` on
this file writes the rows.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, merged, save_adapter, save_merged
from lightning_lora.command.main import main
from lightning_lora.model.targets import select
from lightning_lora.names import A, B
from support.files.expected_weights import check_merge_command
from support.models.families import FAMILIES, Family
from support.models.peers import fill_
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # told by the gradients
    # of what PEFT makes of its own options
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
]
OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 4}
RIGHT, NOT_THERE = "right", "-"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = (
    "<!-- families: written by tests/tables/test_transformers_families.py -->\n",
    "<!-- end of families -->",
)
EVERYDAY = ("llama", "mixtral", "vit", "whisper")
DIFFERENT = ("bert", "clip", "gpt2", "mamba", "albert", "convnextv2", "detr", "wav2vec2", "blip")
# The table is of transformers 5. In these columns older versions are others, and refused is less there.
IS_OLD = int(transformers.__version__.partition(".")[0]) < 5
OF_VERSION = ("attention", "reentrant", "reentrant, late")


FILL: dict[str, Any] = {"scale": 0.1, "seed": 3}


def ours(family: Family, attention: Any = None) -> Any:
    model = family.build(attention)
    inject(model, LoRAConfig(**OPTIONS))
    return fill_(model, **FILL)


def theirs(family: Family, targets: str = "all-linear") -> Any:
    options = {**OPTIONS, "target_modules": targets}
    return fill_(peft.get_peft_model(family.build(), peft.LoraConfig(**options)), **FILL).eval()


def floats(output: Any) -> list[torch.Tensor]:
    """Return the floating tensors of an output, first the one that the model is for."""
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def answer(family: Family, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return floats(model(**family.inputs()))[0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def continued(family: Family, model: Any) -> torch.Tensor:
    inputs = {name: value for name, value in family.inputs().items() if not name.startswith("decoder_")}
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return tokens


def gradients(family: Family, model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of the factors in training mode, of those that have one."""
    torch.manual_seed(4)  # for the base's dropout
    sum(tensor.square().sum() for tensor in floats(model.train()(**family.inputs()))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def peft_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not name.endswith(".base_layer")  # one parameter more of the same module
    }


class Models:
    """A family's models and files, each made once.

    Attributes:
        folder: an empty one for this family, with our adapter in "ours".
        adapted: with our adapter of all linear layers, the names of which are `layers`.
        wanted: its output.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family = family
        self.folder = folder
        self.adapted = ours(family)
        self.layers = inject(self.adapted, LoRAConfig(**OPTIONS))
        self.wanted = answer(family, self.adapted)
        base = answer(family, family.build())
        assert (self.wanted - base).abs().max() > 1e-3 * base.abs().max()
        save_adapter(self.adapted, folder / "ours")

    def from_pretrained(self, folder: Path) -> Any:
        model, info = type(self.adapted).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return model

    def read_by_peft(self, attention: Any = None) -> Any:
        return peft.PeftModel.from_pretrained(self.family.build(attention), self.folder / "ours").eval()

    @property
    def their_targets(self) -> str:
        """The layers that are adapted here, for PEFT."""
        return "|".join(map(re.escape, self.layers))


# --- the checks, one for a column: what they return is the cell ---


def all_linear(models: Models) -> str:
    """PEFT adapts the same layers."""
    try:
        found = peft_layers(theirs(models.family))
    except ValueError:
        return "PEFT refuses"
    left_out = select(list(models.family.build().named_modules()), LoRAConfig()).left_out
    assert not set(models.layers) - set(found)
    missing = [name for name in sorted(found) if name not in models.layers]
    reasons = {left_out.get(name, "PEFT makes `target_parameters` of them") for name in missing}
    return f"without {_endings(missing)}: {', '.join(reasons)}" if missing else RIGHT


def _endings(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in names))


def to_peft(models: Models) -> str:
    """PEFT reads the folder, and its outputs are the same."""
    try:
        model = models.read_by_peft()
    except ValueError:
        return "PEFT refuses"
    assert_close(answer(models.family, model), models.wanted)
    return RIGHT


def from_peft(models: Models) -> str:
    """The folder that PEFT writes of all linear layers is read, and the outputs are the same."""
    try:
        load_theirs(models, "all-linear", models.folder / "all-linear")
    except LoRAError as error:
        option = str(error).partition("adapter_config.json: ")[2].partition("=")[0]
        load_theirs(models, models.their_targets, models.folder / "by name")
        return f"`{option}` refused; right where layers are named"
    except ValueError:
        load_theirs(models, models.their_targets, models.folder / "by name")
        return "PEFT refuses; right where layers are named"
    return RIGHT


def load_theirs(models: Models, targets: str, folder: Path) -> None:
    family = models.family
    peft_model = theirs(family, targets)
    trained = gradients(family, theirs(family, targets))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_B." in name and name not in trained:  # put where nothing calls it, it keeps its first value
                parameter.zero_()
    try:
        peft_model.save_pretrained(str(folder))
    except NotImplementedError:  # peft asks for the embeddings of a model that has none
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    wanted = answer(family, peft_model)
    plain = family.build()
    injected = [ours(family)] if load_adapter(plain, folder) == models.layers else []
    for model in (plain, *injected):
        load_adapter(model, folder)
        assert_close(answer(family, model), wanted)


def attention(models: Models) -> str:
    """The implementations of attention with which the outputs are the same, factored, merged and after."""
    right = []
    for name in ("eager", "sdpa"):
        if name == "sdpa" and not models.adapted._supports_sdpa:
            continue
        model = ours(models.family, name)
        assert model.config._attn_implementation == name
        for context in (contextlib.nullcontext(), merged(model), contextlib.nullcontext()):
            with context:
                assert_close(answer(models.family, model), models.wanted)
        right.append(name)
    return ", ".join(right)


def saved_merged(models: Models) -> str:
    """What save_merged writes, from_pretrained loads, and the outputs are the same."""
    save_merged(models.adapted, models.folder / "merged")
    assert_close(answer(models.family, models.from_pretrained(models.folder / "merged")), models.wanted)
    return RIGHT


def command(models: Models) -> str:
    """What `lightning-lora merge` writes, from_pretrained loads, and the outputs are the same."""
    base, output = models.folder / "base", models.folder / "by command"
    models.family.build().save_pretrained(base)
    arguments = ["merge", "--base", base, "--adapter", models.folder / "ours", "--output", output]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        if main([str(argument) for argument in arguments]):
            assert "must fit" in errors.getvalue()
            return "refused: files have other names"
    check_merge_command(*arguments)
    assert_close(answer(models.family, models.from_pretrained(output)), models.wanted)
    return RIGHT


def generation(models: Models) -> str:
    """The same tokens as PEFT's model, and merged."""
    if not models.family.generates:
        return NOT_THERE
    try:
        wanted = continued(models.family, models.read_by_peft())
    except ValueError:  # PEFT refuses the adapter
        wanted = continued(models.family, models.from_pretrained(models.folder / "merged"))
    assert torch.equal(continued(models.family, models.adapted), wanted)
    with merged(models.adapted):
        assert torch.equal(continued(models.family, models.adapted), wanted)
    return RIGHT


def training(models: Models) -> str:
    """Every adapter gets a gradient that is not zero."""
    found = {name for name, gradient in gradients(models.family, ours(models.family)).items() if gradient.any()}
    names = [name for name in models.layers for leaf in (A, B) if f"{name}.{leaf}" not in found]
    if not names:
        return RIGHT
    model = ours(models.family)
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight.normal_()
    assert_close(answer(models.family, model), models.wanted)
    return f"right; no effect on the output: {_endings(names)}"


def checkpointing(models: Models, use_reentrant: bool, late: bool = False) -> str:
    """Adapters get the gradients that they get without it."""
    family = models.family
    if not models.adapted.supports_gradient_checkpointing:
        return NOT_THERE
    wanted = gradients(family, ours(family))
    model = family.build()
    if not late:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    inject(model, LoRAConfig(**OPTIONS))
    fill_(model, **FILL)
    if late:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    try:
        found = gradients(family, model)
    except RuntimeError as error:
        if "in-place" in str(error):
            return "torch stops at an in-place operation"
        if "does not require grad" in str(error):
            return "none trained: torch stops"
        raise
    if found.keys() != wanted.keys():
        return "not trained inside"
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    return RIGHT


CHECKS: dict[str, Callable[[Models], str]] = {
    "all-linear": all_linear,
    "to PEFT": to_peft,
    "from PEFT": from_peft,
    "attention": attention,
    "save_merged": saved_merged,
    "command": command,
    "generate": generation,
    "training": training,
    "checkpointing": lambda models: checkpointing(models, False),
    "reentrant": lambda models: checkpointing(models, True),
    "reentrant, late": lambda models: checkpointing(models, True, True),
}


# --- the table ---


def known_rows() -> dict[str, dict[str, str]]:
    _, *lines = [line for line in README.read_text().split(BEGIN)[1].split(END)[0].splitlines() if line.startswith("|")]
    cells = [line.strip("| ").split(" | ") for line in lines[1:]]
    return {name: dict(zip(CHECKS, row, strict=True)) for name, *row in cells}


def render(rows: dict[str, dict[str, str]]) -> str:
    lines = [["family", *CHECKS], *([name, *rows[name].values()] for name in FAMILIES if name in rows)]
    head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, "|" + "---|" * (1 + len(CHECKS)), *body])


def write_row(name: str, row: dict[str, str]) -> None:
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{render(known_rows() | {name: row})}\n\n{END}{after}")


def test_the_table_has_every_family_and_column():
    assert README.read_text().split(BEGIN)[1].split(END)[0].strip() == render(known_rows())
    assert list(known_rows()) == list(FAMILIES)
    assert len(FAMILIES) >= 30


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow)
        for name in (EVERYDAY if IS_OLD else FAMILIES if os.environ.get("LORA_FULL") else EVERYDAY + DIFFERENT)
    ],
)
def test_family_gives_the_outcomes_in_the_readme(tmp_path, name):
    models = Models(FAMILIES[name], tmp_path)
    row = {column: check(models) for column, check in CHECKS.items() if not IS_OLD or column not in OF_VERSION}
    if os.environ.get("WRITE_TABLE"):
        write_row(name, row)
    known = known_rows()[name]
    assert row == {column: RIGHT if IS_OLD and row[column] == RIGHT else known[column] for column in row}
