"""The table of peft.LoraConfig's options: what reading, writing and from_peft make of each.

Each option that the installed peft has is written into an adapter_config.json with a value that is not its default. One
that the table has not is a failing test; rows of options that another peft has stay as they are. WRITE_TABLE=1 in the
environment writes the table.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRAError, load_adapter, save_adapter
from lightning_lora.model.adapted_model import open_model
from support.models.peers import close, config_of, edit, fill_, seeded
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
TARGETS = ["first", "second"]


class Block(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.first, self.second = linear(8, 8), linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x).tanh())
        return result


class Net(nn.Module):
    """Numbered blocks and a head."""

    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(layers=nn.Sequential(Block(linear), Block(linear))))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


@dataclass(frozen=True)
class Option:
    """A value of an option that is not its default.

    Attributes:
        built: peft makes an adapter with it; else it is only written into the file of a plain one.
        beside: options that peft wants with it.
        linear: the class of the layers.
        named: the row says the value, because others fare otherwise.
    """

    name: str
    value: Any
    built: bool = False
    beside: dict[str, Any] = field(default_factory=dict)
    linear: Any = nn.Linear
    named: bool = False

    @property
    def label(self) -> str:
        return f"`{self.name}={self.value!r}`" if self.named else f"`{self.name}`"


def built(name: str, value: Any, **beside: Any) -> Option:
    return Option(name, value, built=True, beside=beside)


def init(value: Any, built: bool = False) -> Option:
    return Option("init_lora_weights", value, built=built, named=True)


OPTIONS = [
    built("r", 4),
    built("lora_alpha", 3),
    built("lora_dropout", 0.25),
    built("target_modules", ["second"]),
    built("exclude_modules", ["layers.0.first"]),
    built("modules_to_save", ["head"]),
    built("layers_to_transform", [1], layers_pattern=["layers"]),
    built("layers_pattern", ["layers"], layers_to_transform=[1]),
    built("rank_pattern", {"first": 4}),
    built("alpha_pattern", {"first": 3}),
    built("bias", "all"),
    built("use_rslora", True),
    *(init(value, built=True) for value in (False, "gaussian")),
    *(
        init(value)
        for value in ("orthogonal", "pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "eva", "mica")
    ),
    Option("ensure_weight_tying", True),
    Option("fan_in_fan_out", True, built=True, linear=Conv1D),
    Option("task_type", "CAUSAL_LM"),
    Option("base_model_name_or_path", "somebody/base"),
    Option("revision", "v2"),
    Option("peft_type", "IA3"),
    Option("peft_version", "0.15.0"),
    Option("auto_mapping", {"base_model_class": "Net", "parent_library": "net"}),
    Option("inference_mode", True),
    Option("runtime_config", {"ephemeral_gpu_offload": True}),
    Option("megatron_core", "other.core"),
    Option("megatron_config", {"hidden_size": 8}),
    Option("loftq_config", {"loftq_bits": 4}),
    Option("eva_config", {"rho": 1.5}),
    Option("corda_config", {"corda_method": "kpm"}),
    Option("lora_ga_config", {"direction": "ArB2r"}),
    Option("qalora_group_size", 8),
    Option("use_qalora", True),
    built("use_dora", True),
    Option("lora_bias", True),
    built("target_parameters", ["head.weight"]),
    built("trainable_token_indices", {"head": [1, 2]}),
    Option("layer_replication", [[0, 1], [0, 2]]),
    Option("alora_invocation_tokens", [1, 2]),
    Option("velora_config", {"num_groups": 2}),
    Option("monteclora_config", {"num_samples": 2}),
    Option("use_bdlora", {"nblocks": 2}),
    Option("arrow_config", {"top_k": 2}),
    Option("kasa_config", {"beta": 0.1}),
]
READ, WRITTEN, PASSED_OVER, NOT_WRITTEN = "read", "written", "ignored", "not written"


def net(option: Option) -> Any:
    return seeded(lambda: Net(option.linear))


def write_theirs(option: Option, folder: Path) -> nn.Module:
    """Write peft's adapter with the option, and return its model."""
    options = {"target_modules": TARGETS, **({option.name: option.value, **option.beside} if option.built else {})}
    model = peft.get_peft_model(net(option), peft.LoraConfig(**options))
    fill_(model).eval().save_pretrained(str(folder))  # type: ignore[operator]
    if not option.built:
        edit(folder, **{option.name: option.value})
    return model


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, (tuple, set)) else value


def loaded(option: Option, folder: Path) -> tuple[str, str]:
    """Say what load_adapter does with the option, and what save_adapter then writes of it."""
    model, wanted = net(option), write_theirs(option, folder / "theirs")
    try:
        load_adapter(model, folder / "theirs")
    except LoRAError as error:
        return reason(error, option), "-"
    x = torch.randn(3, 8)
    close(model(x), wanted(x))
    record = open_model(model, "load_adapter").injection
    has = {**record.config.to_dict(), **record.origin}.get(option.name, getattr(record.config, option.name, None))
    save_adapter(model, folder / "ours")
    again = config_of(folder / "ours").get(option.name)
    return (
        READ if plain(has) == option.value or _held_by_layers(option, model) else PASSED_OVER,
        WRITTEN
        if plain(again) == option.value or (again and option.name.endswith("_pattern"))
        else NOT_WRITTEN,  # by layer
    )


def _held_by_layers(option: Option, model: nn.Module) -> bool:
    return option.name == "fan_in_fan_out" and isinstance(model.body.layers[0].first, Conv1D)  # type: ignore[index, union-attr]


def taken(option: Option) -> str:
    """Say what from_peft does with the option."""
    theirs = (peft.IA3Config if option.name == "peft_type" else peft.LoraConfig)(target_modules=TARGETS)
    for name, value in {option.name: option.value, **option.beside}.items():
        setattr(theirs, name, value)
    try:
        config = LoRAConfig.from_peft(theirs)
    except LoRAError as error:
        return reason(error, option)
    return READ if plain(getattr(config, option.name, None)) == option.value else PASSED_OVER


def reason(error: LoRAError, option: Option) -> str:
    """The error without its place and without the value."""
    text = str(error).removeprefix("LoRAConfig.from_peft: ")
    text = (text.partition(option.name)[2] or text).removeprefix(f"={option.value!r}").strip()
    return f"refused: {re.split(r'; |, but it is |[.]( |$)', text)[0]}"


# --- the table ---

PAGE = Path(__file__).parents[2] / "lightning_lora" / "formats" / "peft.md"
BEGIN, END = (
    "<!-- peft's options: written by tests/tables/test_peft_options_table.py -->\n",
    "<!-- end of peft's options -->",
)
HEAD = ["| option of peft.LoraConfig | `load_adapter` | `save_adapter` after it | `from_peft` |", "|---|---|---|---|"]


Outcome = tuple[str, ...]  # the cells after an option's name


def table() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


def rendered(outcomes: dict[str, Outcome]) -> str:
    """The table: a line for all options that fare alike."""
    lines: dict[Outcome, list[str]] = {}
    for option in OPTIONS:
        lines.setdefault(outcomes[option.label], []).append(option.label)
    return "\n".join([*HEAD, *(f"| {', '.join(labels)} | {' | '.join(cells)} |" for cells, labels in lines.items())])


def known() -> dict[str, Outcome]:
    lines = [line.strip("| ").split(" | ") for line in table().splitlines()[len(HEAD) :]]
    return {label: tuple(cells) for labels, *cells in lines for label in labels.split(", ")}


def installed() -> list[str]:
    return [field.name for field in dataclasses.fields(peft.LoraConfig)]


def test_every_option_of_the_installed_peft_is_in_the_table():
    assert not set(installed()) - {option.name for option in OPTIONS}
    assert set(known()) == {option.label for option in OPTIONS}
    assert table() == rendered(known())


def test_values_are_not_the_defaults():
    defaults = peft.LoraConfig()
    for option in OPTIONS:
        assert option.value != getattr(defaults, option.name, None), option.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
def test_every_option_fares_as_the_table_says(tmp_path):
    found = {
        option.label: (*loaded(option, tmp_path / str(i)), taken(option))
        for i, option in enumerate(OPTIONS)
        if option.name in installed()
    }
    if os.environ.get("WRITE_TABLE"):
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{rendered(known() | found)}\n\n{END}{rest.split(END)[1]}")
    wanted = known()
    assert found == {label: wanted[label] for label in found}
