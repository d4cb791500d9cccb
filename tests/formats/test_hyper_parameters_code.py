"""Checkpoints whose hyper-parameters name code in plain text: nothing is imported or called, whoever wrote them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_lora import LoRACallback, LoRACLI, LoRAError, export_adapter, load_adapter, load_from_checkpoint
from lightning_lora.command.info import info
from lightning_lora.command.merge import merge_on_disk
from support.covering import covering
from support.runs.lightning_versions import ANY_OBJECTS
from support.runs.training import CLASSES, FEATURES, Data, fit_model, make_trainer, own_random_stream

# Lightning advises against a loss among the hyper-parameters, which is how published packages are built.
pytestmark = pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")

CLI_FORM = "lightning.pytorch.cli.instantiate_module"
OPTIONS = ["accelerator=cpu", "logger=false", "enable_progress_bar=false", "enable_model_summary=false", "max_epochs=1"]
TRAINER = [f"--trainer.{option}" for option in (*OPTIONS, "enable_checkpointing=false", "num_sanity_val_steps=0")]


class Shade(Enum):
    DARK = "dark"
    LIGHT = "light"


@dataclass
class Steps:
    lr: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    names: list[str] = field(default_factory=list)


class Net(L.LightningModule):
    """Arguments of every form that a command line takes; none of them matters to the weights."""

    def __init__(
        self,
        width: int = 8,
        shade: Shade = Shade.DARK,
        steps: Steps | None = None,
        sizes: tuple[int, ...] = (1, 2),
        folder: Path = Path("a"),
        anything: Any = None,
        act: Callable[..., Any] | None = None,
        loss: nn.Module | None = None,
        backbone: nn.Module | str = "small",
        untyped=None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.got = {"width": width, "shade": shade, "steps": steps, "sizes": sizes, "folder": folder}
        self.got |= {"anything": anything, "act": act, "loss": loss, "backbone": backbone, "untyped": untyped}
        with own_random_stream(1):
            self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def trap(as_program: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that no test may import."""
    monkeypatch.syspath_prepend(tmp_path)
    lines = [
        "import torch",
        "class Loss(torch.nn.ReLU): pass",
        "def act(*args, **kwargs): pass",
        "def build(cls, k): pass",
    ]
    (tmp_path / "trap.py").write_text("\n".join(lines))
    yield
    assert sys.modules.pop("trap", None) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("trained")
    fit_model(path, Net(), LoRACallback(r=2), saved=path / "a.ckpt")
    found: dict[str, Any] = torch.load(path / "a.ckpt", weights_only=False)  # of our own, with members of an Enum
    return found | {"hyper_parameters": {}}


@pytest.fixture
def file(tmp_path: Path, trained: dict[str, Any]) -> Path:
    torch.save(trained, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def with_hyper_parameters(file: Path, key: str = "hyper_parameters", **values: Any) -> Path:
    content = torch.load(file, weights_only=True)
    content[key] = values
    torch.save(content, file.with_name("b.ckpt"))
    return file.with_name("b.ckpt")


NAMED = {"class_path": "trap.Loss", "init_args": {}}
HOSTILE: dict[str, dict[str, Any]] = {
    "a class in place of an object": {"loss": NAMED},
    "without an annotation": {"untyped": NAMED},
    "inside of lists": {"anything": [{"a": (NAMED,)}]},
    "a name for a function": {"act": "trap.act"},
    "in a dataclass": {"steps": {"lr": NAMED}},
    "beside honest values": {"width": 8, "shade": "LIGHT", "loss": "trap.Loss"},
}


FORMS = [{"_instantiator": CLI_FORM}, {"_instantiator": "trap.build"}]


@pytest.mark.parametrize(("case", "keys"), covering(HOSTILE, FORMS, meet=1))
def test_hyper_parameters_that_name_code_are_refused_by_name_with_each_remedy(file: Path, case: str, keys: Any):
    path = with_hyper_parameters(file, **keys, **HOSTILE[case])
    with pytest.raises(LoRAError, match="nothing that a file names is imported or called") as refused:
        load_from_checkpoint(Net, path)
    name = list(HOSTILE[case])[-1]
    for part in (f"['{name}'] names", "weights_only=False", f"({name}=...)", "model = Net(...); load_adapter(model, "):
        assert part in str(refused.value)
    given = load_from_checkpoint(Net, path, **{name: None})
    assert given.got[name] is None


def test_class_path_without_an_instantiator_and_under_other_keys_is_refused_too(file: Path):
    """A class may call Lightning's own instantiate_class on it."""
    with pytest.raises(LoRAError, match=r"\['anything'\] names 'trap.Loss'"):
        load_from_checkpoint(Net, with_hyper_parameters(file, anything=[{"a": NAMED}]))
    for key in ("hparams", "module_arguments"):  # which Lightning still reads
        with pytest.raises(LoRAError, match=r"\['loss'\] names 'trap.Loss'"):
            load_from_checkpoint(Net, with_hyper_parameters(file, key, _instantiator=CLI_FORM, loss=NAMED))


@pytest.mark.slow
def test_plain_values_build_the_given_class_whatever_the_instantiator_is(file: Path):
    for instantiator in (CLI_FORM, "trap.build", 3):
        loaded = load_from_checkpoint(Net, with_hyper_parameters(file, _instantiator=instantiator, width=5))
        assert (type(loaded), loaded.got["width"]) == (Net, 5)
    Path("h.yaml").write_text("_instantiator: trap.build\nwidth: 5\n")
    assert load_from_checkpoint(Net, file, hparams_file="h.yaml").got["width"] == 5


def test_hyper_parameters_as_class_path_and_init_args_build_the_given_class(file: Path):
    """As Lightning up to 2.3 saved them; the class may have been in a program of its own."""
    values = {"class_path": "__main__.Net", "init_args": {"width": 5, "shade": "LIGHT"}}
    loaded = load_from_checkpoint(Net, with_hyper_parameters(file, _instantiator=CLI_FORM, **values))
    assert (loaded.got["width"], loaded.got["shade"]) == (5, Shade.LIGHT)
    values["init_args"] = {"loss": NAMED}
    with pytest.raises(LoRAError, match=r"\['loss'\] names 'trap.Loss'"):
        load_from_checkpoint(Net, with_hyper_parameters(file, _instantiator=CLI_FORM, **values))
    for form in ({"_class_path": 3}, {"class_path": "trap.Loss", "init_args": {"width": 5}}):
        with pytest.raises(LoRAError, match=r"from the class .*, and Net was given"):
            load_from_checkpoint(Net, with_hyper_parameters(file, _instantiator=CLI_FORM, **form))


def test_other_doors_take_no_notice_of_hyper_parameters(file: Path, tmp_path: Path):
    path = with_hyper_parameters(file, _instantiator="trap.build", **HOSTILE["inside of lists"])
    assert info(path)["kind"] == "Lightning checkpoint of kind 'adapter'"
    load_adapter(Net(), path)
    export_adapter(path, tmp_path / "folder")
    torch.save(Net().state_dict(), tmp_path / "base.pt")
    merge_on_disk(tmp_path / "base.pt", path, tmp_path / "merged.pt")
    for run in ("validate", "test"):
        trainer = make_trainer(tmp_path, LoRACallback(r=2))
        getattr(trainer, run)(Net(), Data(), ckpt_path=path, verbose=False)


# --- checkpoints of LightningCLI and LoRACLI ---


class PlainCLI(LightningCLI):
    """Any LightningCLI, with the callback."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(LoRACallback, "lora")


def run(cli: type[LightningCLI], *arguments: str, model: Any = Net, **options: Any) -> LightningCLI:
    given = [*arguments, *TRAINER, "--lora.r=2"]
    return cli(model, Data, args=given, save_config_callback=None, seed_everything_default=1, **options)


RICH = ["--model.shade=LIGHT", "--model.steps.lr=1", "--model.sizes=[3,4]", "--model.folder=b", "--model.anything=[x]"]


@pytest.mark.slow
@pytest.mark.parametrize(("cli", "named"), [(LoRACLI, True), (PlainCLI, False)])
def test_honest_checkpoint_of_a_command_line_builds_what_the_command_line_built(cli: Any, named: bool):
    options = [option.replace("model.", "model.init_args.") for option in RICH] if named else RICH
    model = [f"--model={__name__}.Net"] if named else []
    trained = run(cli, "fit", *model, *options, model=Net, subclass_mode_model=named)
    trained.trainer.save_checkpoint("cli.ckpt")
    saved = torch.load("cli.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["_instantiator"] == CLI_FORM
    assert ("_class_path" in saved) == named
    loaded = load_from_checkpoint(Net, "cli.ckpt")
    assert loaded.got == trained.model.got
    assert {name: type(value) for name, value in loaded.got.items()} == {
        name: type(value) for name, value in trained.model.got.items()
    }
    x = torch.ones(2, FEATURES)
    assert torch.equal(loaded(x), trained.model(x))


TEXTS: dict[str, dict[str, Any]] = {
    "an object": {"loss": NAMED},
    "a dotted name": {"loss.class_path": "trap.Loss"},
    "a text where an object may be": {"backbone": "trap.Loss"},
    "a class": {"_class_path": "trap.Loss"},
    "a class as LightningCLI names objects": {"class_path": "trap.Loss"},
}


@pytest.mark.slow
@pytest.mark.parametrize("values", TEXTS.values(), ids=TEXTS)
def test_command_line_builds_what_the_config_says_whatever_a_checkpoint_names(
    file: Path, values: dict[str, Any], caplog
):
    caplog.set_level(logging.INFO, logger="lightning_lora")
    path = with_hyper_parameters(file, **values)
    tested = run(LoRACLI, "test", "--model.width=7", f"--ckpt_path={path}").model
    assert tested.got == Net(width=7).got
    if hasattr(LightningCLI, "_parse_ckpt_path"):  # before 2.6 Lightning itself reads none
        assert f"hyper-parameters in {path} are ignored. --weights_only=false uses them" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("trust", [f"--{name}=false" for name in ANY_OBJECTS])
def test_command_line_builds_what_a_checkpoint_names_where_it_is_trusted(trust: str):
    run(LoRACLI, "fit", "--model.loss=torch.nn.CrossEntropyLoss").trainer.save_checkpoint("cli.ckpt")
    tested = run(LoRACLI, "test", "--ckpt_path=cli.ckpt", trust).model
    assert type(tested.got["loss"]) is nn.CrossEntropyLoss


def test_instantiator_in_a_file_of_hyper_parameters_is_not_called(file: Path):
    Path("h.yaml").write_text("_instantiator: trap.build\nwidth: 5\n")
    assert load_from_checkpoint(Net, file, hparams_file="h.yaml").got["width"] == 5
