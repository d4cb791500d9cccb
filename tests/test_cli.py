"""LoRACLI's `lora:` block and the callback in any LightningCLI's config file."""

from __future__ import annotations

import inspect
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_lora import LoRACallback, LoRACLI, LoRAConfig, LoRAError, inject
from lightning_lora.nn.lora_layer import LoRALayer
from lightning_lora.trainer.lightning_packages import PACKAGES
from support.runs.training import Data, Net
from support.runs.with_callback import TARGETS

pytestmark = pytest.mark.usefixtures("as_program")

TRAINER = """
trainer:
  accelerator: cpu
  logger: false
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  num_sanity_val_steps: 0
"""


def parse(*args: str, cli: type[LightningCLI] = LoRACLI) -> LightningCLI:
    """Build everything that the arguments describe, and run nothing."""
    return cli(Net, Data, args=list(args), run=False, save_config_callback=None, seed_everything_default=1)


def fit(config: str, cli: type[LightningCLI] = LoRACLI) -> LightningCLI:
    Path("c.yaml").write_text(TRAINER + config)
    return cli(Net, Data, args=["fit", "--config", "c.yaml"], save_config_callback=None, seed_everything_default=1)


def callback(cli: LightningCLI) -> LoRACallback:
    found = [c for c in cli.trainer.callbacks if isinstance(c, LoRACallback)]
    assert len(found) == 1
    return found[0]


def options(**given: Any) -> LoRAConfig:
    return LoRAConfig(**given)


BLOCK = """
lora:
  r: 2
  lora_alpha: 4
  lora_dropout: 0.1
  target_modules: [body.0, head]
  exclude_modules: body\\.3
  layers_to_transform: [0, 3]
  layers_pattern: body
  modules_to_save: [body.1]
  rank_pattern: {head: 1}
  alpha_pattern: {head: 3.5}
  bias: lora_only
  use_rslora: true
  init_lora_weights: gaussian
  enable_lora: {body.0: [true, false]}
  autocast_adapter_dtype: false
  merged_eval: false
  save: merged
"""
IN_BLOCK = options(
    r=2,
    lora_alpha=4,
    lora_dropout=0.1,
    target_modules=["body.0", "head"],
    exclude_modules=r"body\.3",
    layers_to_transform=[0, 3],
    layers_pattern=["body"],
    modules_to_save=["body.1"],
    rank_pattern={"head": 1},
    alpha_pattern={"head": 3.5},
    bias="lora_only",
    use_rslora=True,
    init_lora_weights="gaussian",
    enable_lora={"body.0": [True, False]},
    autocast_adapter_dtype=False,
)


def as_init_args(block: str) -> str:
    """The same options as a LightningCLI's list of callbacks takes them."""
    lines = [line for line in block.splitlines() if line.startswith("  ")]
    entry = ["  callbacks:", "    - class_path: lightning_lora.LoRACallback", "      init_args:"]
    return "\n".join([*entry, *("      " + line for line in lines)]) + "\n"


def test_every_option_from_the_lora_block():
    Path("c.yaml").write_text(BLOCK)
    found = callback(parse("--config", "c.yaml"))
    assert found.config == IN_BLOCK
    assert (found.merged_eval, found.save) == (False, "merged")


def test_every_option_from_a_plain_lightning_cli():
    Path("c.yaml").write_text("trainer:\n" + as_init_args(BLOCK))
    found = callback(parse("--config", "c.yaml", cli=LightningCLI))
    assert found.config == IN_BLOCK
    assert (found.merged_eval, found.save) == (False, "merged")


@pytest.mark.parametrize(
    ("arguments", "expected", "own"),
    [
        (
            {"merged_eval": "false", "save": "full", "lora_alpha": "0.5", "target_modules": r"body\.(0|3)"},
            {"lora_alpha": 0.5, "target_modules": r"body\.(0|3)", "bias": "all"},
            {"merged_eval": False, "save": "full"},
        ),
        (
            {
                "quantize": "nf4",
                "target_modules": "[head, body.0]",
                "exclude_modules": "[head]",
                "layers_to_transform": "1",
                "rank_pattern.head": "4",
                "init_lora_weights": "false",
                "enable_lora": '{"head": [true, false]}',
            },
            {
                "lora_alpha": 2,
                "target_modules": ("head", "body.0"),
                "exclude_modules": ("head",),
                "layers_to_transform": (1,),
                "rank_pattern": {"head": 4},
                "bias": "all",
                "init_lora_weights": False,
                "enable_lora": {"head": (True, False)},
            },
            {"merged_eval": True, "save": "adapter", "quantize": "nf4"},
        ),
        (
            {"layers_to_transform": "[0, 2]", "rank_pattern": '{"head": 4}', "init_lora_weights": "pissa_niter_7"},
            {
                "lora_alpha": 2,
                "target_modules": ("body.3",),
                "layers_to_transform": (0, 2),
                "rank_pattern": {"head": 4},
                "bias": "all",
                "init_lora_weights": "pissa_niter_7",
            },
            {"dequantize": None},
        ),
    ],
)
def test_the_command_line_overrides_the_file_and_the_rest_is_at_its_default(
    arguments: dict[str, str], expected: dict[str, Any], own: dict[str, Any]
):
    Path("c.yaml").write_text("lora: {save: adapter, lora_alpha: 2, target_modules: [body.3], bias: all}")
    found = callback(parse("--config", "c.yaml", *(f"--lora.{name}={value}" for name, value in arguments.items())))
    assert found.config == options(**expected)
    assert {name: getattr(found, name) for name in own} == own


@pytest.mark.parametrize(("cli", "merged_eval"), [(LoRACLI, "true"), (LightningCLI, "false")])
def test_cli_fits_from_yaml(cli: type[LightningCLI], merged_eval: str):
    block = f"lora:\n  r: 2\n  target_modules: [body.0, body.3, head]\n  merged_eval: {merged_eval}\n"
    run = fit(block if cli is LoRACLI else as_init_args(block), cli=cli)
    assert callback(run).merged_eval is (merged_eval == "true")
    assert [name for name, m in run.model.named_modules() if isinstance(m, LoRALayer)] == TARGETS
    assert run.model.head.lora_B.abs().sum() > 0
    assert torch.equal(run.model.head.weight, Net().head.weight)
    assert "val_loss" in run.trainer.callback_metrics


def test_a_callback_beside_that_of_lora_cli_is_refused_with_the_one_to_leave_out():
    with pytest.raises(
        LoRAError, match=r"two LoRA callbacks.* LoRACLI brings its own with .* so trainer\.callbacks needs none"
    ):
        fit(as_init_args("lora:\n  r: 2\n  target_modules: [head]\n"))


def test_a_plain_cli_overrides_an_option_of_the_last_callback():
    ours = as_init_args("lora:\n  r: 2\n  target_modules: [head]\n")
    other = "    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
    Path("c.yaml").write_text(TRAINER + ours.replace("  callbacks:\n", f"  callbacks:\n{other}"))
    arguments = ["--config", "c.yaml", "--trainer.callbacks.init_args.merged_eval=false"]
    found = callback(parse(*arguments, cli=LightningCLI))
    assert (found.merged_eval, found.config) == (False, options(r=2, target_modules=["head"]))


class Injected(Net):
    def prepare(self) -> None:
        super().prepare()
        inject(self, LoRAConfig(r=4, target_modules=TARGETS))


@pytest.mark.parametrize(
    ("line", "differs", "cli"),
    [("r: 8", False, LoRACLI), ("r: 2", True, LoRACLI), ("save: adapter", False, LightningCLI)],
)
def test_a_cli_fills_in_defaults_which_adopt_what_was_injected(line: str, differs: bool, cli: type[LightningCLI]):
    block = f"lora:\n  {line}\n"
    Path("c.yaml").write_text(TRAINER + (block if cli is LoRACLI else as_init_args(block)))
    start = partial(cli, Injected, Data, args=["fit", "--config", "c.yaml"], save_config_callback=None)
    if differs:
        with pytest.raises(LoRAError, match="r is 2, but the model was injected with 4"):
            start(seed_everything_default=1)
    else:
        assert start(seed_everything_default=1).model.head.lora_A.shape[0] == 4


def test_what_is_saved_with_the_run_reads_back():
    """LightningCLI saves the config that it ran with; the same program runs from it."""
    Path("c.yaml").write_text(BLOCK)
    first = parse("--config", "c.yaml", "--lora.r=1")
    Path("saved.yaml").write_text(first.parser.dump(first.config))
    again = callback(parse("--config", "saved.yaml"))
    assert again.config == callback(first).config
    assert again.config.r == 1


@pytest.mark.parametrize(
    ("line", "named", "cli"),
    [
        ("rank: 4", ["rank"], LoRACLI),
        ("r: four", ["r", "four"], LoRACLI),
        ("r: 0", ["r", "0", "at least 1"], LoRACLI),
        ("save: adapters", ["save", "adapters"], LightningCLI),
        ("enable_lora: {qkv: [1, maybe]}", ["enable_lora", "maybe"], LightningCLI),
    ],
)
def test_unknown_keys_and_wrong_values_are_named(line: str, named: list[str], cli: type[LightningCLI], capsys):
    block = f"lora:\n  {line}\n"
    Path("c.yaml").write_text(block if cli is LoRACLI else "trainer:\n" + as_init_args(block))
    with pytest.raises((SystemExit, ValueError)) as failure:
        parse("--config", "c.yaml", cli=cli)
    message = str(failure.value) if not isinstance(failure.value, SystemExit) else capsys.readouterr().err
    assert all(word in message for word in named), message


def documented() -> dict[str, str]:
    """The first words of each option's text in the docstring."""
    lines = inspect.getdoc(LoRACallback).partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    return {line.split(":")[0].strip(): line.partition(": ")[2] for line in lines if line[4] != " "}


@pytest.mark.parametrize(
    ("cli", "argument", "prefix"),
    [
        (LoRACLI, "--help", "--lora."),
        (LightningCLI, "--trainer.callbacks.help=lightning_lora.LoRACallback", "--trainer.callbacks."),
    ],
)
def test_help_shows_each_option_with_its_text(capsys, cli: type[LightningCLI], argument: str, prefix: str):
    with pytest.raises(SystemExit) as leaving:
        cli(Net, Data, args=["fit", argument])
    assert leaving.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    texts = documented()
    assert texts.keys() == inspect.signature(LoRACallback).parameters.keys()
    assert texts.pop("config") not in shown  # for Python alone
    for name, text in texts.items():
        rest = re.split(rf"{re.escape(prefix)}{name}[, ]", shown)[-1]  # the first time is in the line of usage
        assert text in rest.partition(" (type:")[0], name


def test_callback_without_a_list_is_taken_from_the_command_line():
    run = parse("--trainer.callbacks=lightning_lora.LoRACallback", "--trainer.callbacks.r=2", cli=LightningCLI)
    assert callback(run).config == LoRAConfig(r=2)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_lora_block_goes_with_the_command_line_of_either_package(package: str):
    lightning, cli, boring = (import_module(package + part) for part in ("", ".cli", ".demos.boring_classes"))
    own = type("CLI", (cli.LightningCLI,), {"add_arguments_to_parser": LoRACLI.add_arguments_to_parser})
    program = own(boring.BoringModel, args=["--lora.r=2"], run=False, seed_everything_default=1)
    assert type(program.trainer) is lightning.Trainer
    assert callback(program).config == LoRAConfig(r=2)


def test_import_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "lightning_lora.cli")
    with pytest.raises(ModuleNotFoundError, match=r'LoRACLI: needs jsonargparse; pip install "lightning-lora\[cli\]"'):
        import_module("lightning_lora.cli")
