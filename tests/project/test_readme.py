"""Every block of every page runs, in order, and prints what the page says.

Each page has a folder and a namespace of its own. A page that says "With the files of [another page](...)" runs in a
folder with the files that the blocks of that page leave. A block whose first line is a comment with a file name is
written to that file. The lightning-lora command is run where the blocks before it left their files. Set-up commands
are not run again here: .ci/run runs them, letter for letter. Programs in examples/ are run in test_examples.py, and
those in tests/benchmarks/ in test_run.py there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_lora
from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    merge_and_unload,
    save_adapter,
    scaled,
)
from lightning_lora.command.main import VERBS, main
from lightning_lora.command.merge import merge_on_disk
from support.models.variants import variants_forgotten
from support.runs.examples import COMMANDS as COMMANDS_OF_EXAMPLES
from support.runs.examples import SHOWN
from support.runs.notices import PEER_NOTICES

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES)

OTHER_CALLBACKS = (  # Lightning's own: the page's Trainer has a ModelCheckpoint
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:The dirpath has changed",
)

ROOT = Path(__file__).parents[2]
CI = (ROOT / ".ci" / "run").read_text()
FRONT, REFERENCE, CONTRIBUTING = "README.md", "lightning_lora/README.md", ".github/CONTRIBUTING.md"
COMMAND, EXCHANGE = "lightning_lora/command/README.md", "lightning_lora/exchange/README.md"
ERRORS = "lightning_lora/errors.md"
REFERENCE_PAGES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "lightning_lora").rglob("*.md"))]
OTHER_PAGES = [str(path.relative_to(ROOT)) for folder in ("examples", "tests") for path in (ROOT / folder).rglob(FRONT)]
TEXTS = {name: (ROOT / name).read_text() for name in (FRONT, CONTRIBUTING, *REFERENCE_PAGES, *sorted(OTHER_PAGES))}
EVERY_PAGE = [  # those without blocks of code too
    str(path.relative_to(ROOT))
    for pages in (ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in (".github", "examples", "tests")))
    for path in sorted(pages)
] + REFERENCE_PAGES


class Block(NamedTuple):
    language: str
    code: str
    line: int

    @property
    def file(self) -> str | None:
        name = re.match(r"# (\S+\.(py|yaml))\n", self.code)
        return name.group(1) if name else None

    @property
    def is_statements(self) -> bool:
        return self.language == "python" and not self.file

    @property
    def is_ours(self) -> bool:
        return self.language == "bash" and self.code.startswith("lightning-lora ")

    @property
    def is_example(self) -> bool:
        return self.language == "bash" and self.code.startswith(("python examples/", "python tests/benchmarks/"))

    @property
    def is_program(self) -> bool:
        return self.language == "bash" and self.code.startswith("python ") and not self.is_example

    @property
    def is_set_up(self) -> bool:
        return self.language == "bash" and not (self.is_ours or self.is_program or self.is_example)


def find_blocks(text: str) -> list[Block]:
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(fence.group(1), fence.group(2), text[: fence.start()].count("\n") + 1) for fence in fences]


BLOCKS = {name: find_blocks(text) for name, text in TEXTS.items()}
NOTHING = Block("", "", 0)


def run_python(name: str, block: Block, namespace: dict[str, Any]) -> str:
    # The line numbers of an error are the README's.
    code = compile("\n" * block.line + block.code, name, "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def run_ours(commands: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for command in commands.splitlines():
            program, *arguments = shlex.split(command, comments=True)
            assert program == "lightning-lora"
            assert main(arguments) == 0
    return out.getvalue()


def run_program(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")


def pages_needed(name: str) -> list[str]:
    """The pages whose files the blocks of this page use: those that a line "With the files of [...](...)" links."""
    lines = re.findall(r"^With the files .*$", TEXTS[name], re.MULTILINE)
    paths = [(ROOT / name).parent / link for line in lines for link in re.findall(r"\]\(([^)]*\.md)\)", line)]
    return list(dict.fromkeys(str(path.resolve().relative_to(ROOT)) for path in paths))


class Run(NamedTuple):
    """What a page's blocks left behind: files in a folder, names, and what each printed, by the block's line."""

    folder: Path
    namespace: dict[str, Any]
    printed: dict[int, str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs the Python and the lightning-lora commands of a page, once for all tests."""

    @functools.cache
    def run(name: str) -> Run:
        result = Run(tmp_path_factory.mktemp("readme"), {"__name__": "readme"}, {})
        for needed in pages_needed(name):
            shutil.copytree(run(needed).folder, result.folder, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch, variants_forgotten():
            patch.chdir(result.folder)
            for block in BLOCKS[name]:
                if block.is_statements:
                    result.printed[block.line] = run_python(name, block, result.namespace)
                elif block.is_ours:
                    result.printed[block.line] = run_ours(block.code)
        return result

    return run


def table(name: str, header: str) -> list[list[str]]:
    """The rows of the one table with that header line, cell by cell."""
    (found,) = re.findall(rf"^{re.escape(header)}\n\|[-|]+\n((?:\|.*\n)+)", TEXTS[name], re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found.splitlines()]


def spans(cell: str) -> list[str]:
    """The inline code of a cell."""
    return re.findall(r"`([^`]+)`", cell)


RUNNING = [name for name, blocks in BLOCKS.items() if any(b.is_statements or b.is_ours for b in blocks)]


NEEDED = {"lightning_lora/nn/quantized.md": "torchao"}  # packages of extras that a page's blocks need


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_python_blocks_and_our_command_run_and_print_what_is_shown(ran, name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    printed = ran(name).printed
    for block, following in itertools.pairwise([*BLOCKS[name], NOTHING]):
        if block.line in printed:
            shown = following.code if following.language == "text" else ""
            found = printed[block.line]
            if "L.Trainer(max_epochs" in block.code and name == FRONT:
                found = ""  # the Trainer's own progress bar and table of modules
            assert shown == found, f"{name}, line {block.line}"


COMMANDS = [(name, block.code) for name, blocks in BLOCKS.items() for block in blocks if block.is_program]


@pytest.mark.slow
def test_commands_run_on_the_files_that_are_shown(tmp_path, monkeypatch):
    """Each adapts the layer, and its checkpoint is of the kind that the file or the command line names."""
    monkeypatch.chdir(tmp_path)
    kinds = []
    for name, command in COMMANDS:
        write_files(name, tmp_path)
        before = set(tmp_path.rglob("*.ckpt"))
        run_program(command, monkeypatch)
        (path,) = set(tmp_path.rglob("*.ckpt")) - before
        kinds.append(torch.load(path, weights_only=True)["lora"]["kind"])
    assert kinds == ["merged", "adapter"]


def write_files(name: str, folder: Path) -> None:
    for block in BLOCKS[name]:
        if block.file:
            (folder / block.file).write_text(block.code)


@pytest.mark.parametrize("name", TEXTS)
def test_no_block_is_of_a_kind_that_nothing_runs(name):
    for previous, block in itertools.pairwise([NOTHING, *BLOCKS[name]]):
        known = block.language in ("python", "bash", "diff") or (block.language == "yaml" and block.file)
        output = block.language == "text" and previous.language in ("python", "bash")
        assert known or output, f"{name}, line {block.line}"


@pytest.mark.parametrize(("name", "block"), [(n, b) for n, blocks in BLOCKS.items() for b in blocks if b.is_set_up])
def test_set_up_commands_are_those_of_ci(name, block):
    for command in block.code.splitlines():
        assert f"run '{command}'\n" in CI, f"{name}, line {block.line}"


@pytest.mark.parametrize("name", EVERY_PAGE)
def test_links_lead_to_files_and_headings_that_exist(name):
    links = re.findall(r"(?:\]\(|src=\")(?!https?:)([^)#\"]*)#?([^)\"]*)", (ROOT / name).read_text())
    for target, heading in links:
        if target.startswith("../../actions/workflows/"):  # GitHub's own page of a workflow
            assert (ROOT / ".github" / "workflows" / target.split("/")[4]).exists(), target
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not heading or heading in anchors(path.read_text()), heading


def anchors(text: str) -> list[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


# --- the front page ---


def test_the_first_screen_is_what_it_is_a_diff_and_numbers_and_the_page_is_short():
    screen = TEXTS[FRONT].partition("## Quick start")[0]
    assert screen.count("\n") < 40
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", screen, re.MULTILINE | re.DOTALL)
    assert diff.count("\n") <= 9  # all that PEFT needs to resume, see tests/benchmarks/test_peft_in_module.py
    assert TEXTS[FRONT].count("\n") < 130
    assert len(TEXTS[FRONT].split()) < 700


def test_the_front_page_has_one_program_that_is_loaded_and_served_in_a_few_lines():
    start, shown, vision, program, serving, output = BLOCKS[FRONT][1:7]
    languages = [block.language for block in (start, shown, vision, program, serving, output)]
    assert languages == ["bash", "text", "yaml", "python", "python", "text"]
    assert len([line for line in program.code.splitlines() if line]) <= 20
    assert len([line for line in serving.code.splitlines() if line]) <= 6
    assert len(vision.code.splitlines()) <= 5
    assert [block for block in BLOCKS[FRONT] if block.is_statements] == [program, serving]


def test_the_commands_of_the_front_page_set_up_what_they_need_and_show_what_the_examples_page_shows():
    start, *_, tests = (block for block in BLOCKS[FRONT] if block.language == "bash")
    assert start.code == f'pip install -e ".[examples]" && python {COMMANDS_OF_EXAMPLES["digits"]}\n'
    assert BLOCKS[FRONT][2].code == SHOWN["digits"]
    assert tests.code == 'pip install -e ".[test]" && pytest\n'


@pytest.mark.packages
@pytest.mark.usefixtures("as_program")
def test_the_vision_block_of_the_front_page_trains_the_adapter_and_the_head_of_a_timm_model(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    from lightning.pytorch.cli import LightningCLI

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
            return torch.utils.data.DataLoader([(torch.randn(3, 32, 32), label) for label in range(3)], batch_size=3)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    monkeypatch.chdir(tmp_path)
    write_files(FRONT, tmp_path)
    arguments = ["fit", "--config", "vit.yaml", "--trainer.max_epochs=1", "--trainer.logger=false"]
    cli = LightningCLI(Net, args=arguments, seed_everything_default=1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    layers = {name.partition(".lora_")[0] for name in saved if ".lora_" in name}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers == {f"model.blocks.{number}.{part}" for number in range(2) for part in parts}
    assert {name for name in saved if ".lora_" not in name} == {"model.head.weight", "model.head.bias"}
    assert cli.model.model.head.weight.requires_grad


def test_the_lines_of_the_diff_are_those_of_the_program_and_of_peft():
    removed, added = (re.findall(rf"^{re.escape(sign)} *(.*)$", BLOCKS[FRONT][0].code, re.MULTILINE) for sign in "-+")
    assert added[-1].partition("(")[2].rstrip(")") in BLOCKS[FRONT][4].code.replace("max_epochs=10, ", "")
    assert set(re.findall(r"\w*[pP]eft\w*|LoraConfig", " ".join(removed))) <= {*vars(peft)}


def test_the_front_page_says_the_version_and_the_defaults():
    assert f"Version {lightning_lora.__version__}, " in TEXTS[FRONT]
    config = LoRAConfig()
    assert f"with `r={config.r}` and `lora_alpha={config.lora_alpha}`" in TEXTS[FRONT].replace("\n", " ")
    assert '(`save="adapter"` is the default)' in TEXTS[FRONT]
    assert inspect.signature(LoRACallback).parameters["save"].default == "adapter"


def test_the_badges_say_what_the_project_says():
    project = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r"Python :: (3\.\d+)", project)
    oldest = {name: re.search(rf'"{name}>=([\d.]+)"', project)[1] for name in ("torch", "lightning")}
    assert re.search(r'requires-python = ">=([\d.]+)"', project)[1] == pythons[0]
    badges = re.findall(r"!\[([^\]]*)\]\(https://img.shields.io/badge/([^)]*)-blue\)", TEXTS[FRONT])
    assert [text for text, _ in badges] == [
        f"Python {pythons[0]} to {pythons[-1]}",
        f"torch {oldest['torch']} and newer",
        f"Lightning {oldest['lightning']} and newer",
        re.search('^license = "(.*)"', project, re.MULTILINE)[1],
    ]
    shown = [picture.replace("_", " ").replace("--", "~").replace("-", " ").replace("~", "-") for _, picture in badges]
    assert [text.removeprefix("license ") for text in shown] == [text for text, _ in badges]


def links_of(name: str) -> set[str]:
    """The files of the project that a page links, from the root."""
    targets = re.findall(r"\]\((?!https?:|\.\./\.\./actions/)([^)#]+)", TEXTS[name])
    return {str((ROOT / name).parent.joinpath(target).resolve().relative_to(ROOT)) for target in targets}


def test_the_front_page_links_every_other_page_but_the_references():
    assert set(TEXTS) - {FRONT, *REFERENCE_PAGES} <= links_of(FRONT)
    assert REFERENCE in links_of(FRONT)


def test_the_index_of_the_reference_links_each_of_its_pages_which_are_short():
    assert len(REFERENCE_PAGES) > 10
    assert set(REFERENCE_PAGES) - {REFERENCE} <= links_of(REFERENCE)
    assert [name for name in REFERENCE_PAGES if TEXTS[name].count("\n") >= 250] == []


@pytest.fixture
def front(ran: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the front page's blocks, in the folder with their files, and what its table takes for granted."""
    run = ran(FRONT)
    monkeypatch.chdir(run.folder)
    shutil.copy("adapter.ckpt", "best.ckpt")

    class Net(run.namespace["Net"]):  # type: ignore[misc]
        def validation_step(self, tokens: torch.Tensor) -> None:
            self.log("loss", self.training_step(tokens))

        test_step = validation_step

    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    data = torch.utils.data.DataLoader(run.namespace["texts"], batch_size=8)
    return {**run.namespace, "Net": Net, "data": data, "quiet": quiet, "epochs": run.namespace["trainer"].max_epochs}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`", *OTHER_CALLBACKS)
def test_calls_of_the_front_pages_table_run(front):
    exec("from lightning_lora import *", front)
    calls = {want: spans(call)[0] for want, call in table(FRONT, "| I want | call |")}
    front["trainer"] = make_trainer(front, epochs=front["epochs"] + 1)
    with contextlib.redirect_stdout(io.StringIO()):
        for want, call in calls.items():
            front["model"] = front["Net"]()
            front["result"] = eval(call, front)
            if "test" in want:
                assert front["result"][0]["loss"] < 0.1
            if "resume" in want:
                assert front["trainer"].callbacks[0].batches == len(front["data"])
    assert len(calls) == 3
    check_tuned(front, type(front["tuned"].model).from_pretrained("weights"), "weights")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`", *OTHER_CALLBACKS)
def test_calls_for_each_file_run_and_give_the_tuned_model(front):
    exec("from lightning_lora import *", front)
    prepare_files(front)
    rows = table(EXCHANGE, "| I have | I want | call |")
    assert len(rows) == 11
    front["checkpoint"] = ModelCheckpoint()
    front["checkpoint"].best_model_path = "best.ckpt"
    for have, _, call in rows:
        front["model"] = load_from_checkpoint(front["Net"], "adapter.ckpt") if "tuned model" in have else None
        run_call(front, spans(call)[: 1 + call.count("and then")])
    network = type(front["tuned"].model)
    for folder in ("weights", "merged"):
        check_tuned(front, network.from_pretrained(folder), folder)
    with pytest.raises(RuntimeError, match="Missing key"):  # what the pages say not to call
        front["Net"].load_from_checkpoint("adapter.ckpt")


def run_call(front: dict[str, Any], lines: list[str]) -> None:
    """Run the lines of a call, of the command or in Python, and check the model that they leave in `model`."""
    front["trainer"] = L.Trainer(max_epochs=front["epochs"] + 1, callbacks=[Counted()], **front["quiet"])
    if lines[0].startswith("lightning-lora"):
        run_ours(lines[0])
        return
    exec("\n".join(lines), front)
    if front["model"] is not None:
        check_tuned(front, front["model"].model, lines[0])
    if ".fit" in lines[0]:  # one epoch more
        assert front["trainer"].callbacks[0].batches == len(front["data"])
    if ".validate" in lines[-1]:
        assert front["trainer"].callback_metrics["loss"] < 0.1


def check_tuned(front: dict[str, Any], network: torch.nn.Module, what: str) -> None:
    """The outputs of the tuned model, but for the rounding of merged bfloat16 weights."""
    with torch.no_grad():
        found, base, tuned = (
            model(front["texts"]).logits for model in (network, front["Net"]().model, front["tuned"].model)
        )
    assert (found - tuned).norm() < 0.05 * (tuned - base).norm(), what


class Counted(LoRACallback):
    """Counts the batches of training."""

    batches = 0

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_start(*args, **kwargs)
        self.batches += 1


def make_trainer(front: dict[str, Any], epochs: int = 1, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[Counted(**{"r": 16, "lora_alpha": 32} | options)],
        **front["quiet"],
    )


def prepare_files(front: dict[str, Any]) -> None:
    """The files of the first column that no block has written."""
    shutil.copy("adapter.ckpt", "lora.ckpt")
    shutil.copy("adapter.ckpt", "best.ckpt")
    front["Net"]().model.save_pretrained("base")
    plain = L.Trainer(**front["quiet"])
    plain.validate(front["Net"](), front["data"], verbose=False)
    plain.save_checkpoint("pretrained.ckpt")
    merging = make_trainer(front, epochs=front["epochs"], save="merged")
    merging.fit(front["Net"](), front["data"], front["data"], ckpt_path="adapter.ckpt")
    merging.save_checkpoint("merged.ckpt")


@pytest.mark.slow
def test_common_errors_are_messages_that_come(front):
    net, data = front["Net"], front["data"]

    class Early(net):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = super().configure_optimizers()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    class Other(net):
        def __init__(self) -> None:
            super().__init__()
            self.model.lm_head.weight.data.zero_()

    def tied() -> None:
        model = net()
        model.model.lm_head.weight = model.model.model.embed_tokens.weight
        inject(model, LoRAConfig(target_modules=["embed_tokens"]))
        merge_and_unload(model)

    def trained_while_merged() -> None:
        inject(model := net(), LoRAConfig(r=2))
        merge(model)
        model.training_step(next(iter(data))).backward()

    class WithObject(net):
        def __init__(self, loss: Any = ...) -> None:
            super().__init__()
            self.save_hyperparameters()

    def resumed_without_adapter() -> None:
        plain = L.Trainer(**front["quiet"], max_steps=1)
        plain.fit(net(), data, data)
        plain.save_checkpoint("plain.ckpt")
        make_trainer(front).fit(net(), data, data, ckpt_path="plain.ckpt")

    with_object = make_trainer(front)
    with_object.fit(WithObject(loss=object()), data, data)
    with_object.save_checkpoint("object.ckpt")

    def with_head(size: int, width: int = 8) -> torch.nn.ModuleDict:
        body = torch.nn.ModuleDict({"fc": torch.nn.Linear(width, width)})
        return torch.nn.ModuleDict({"body": body, "head": torch.nn.Linear(width, size)})

    inject(tuned := with_head(3), LoRAConfig(r=2, target_modules=["fc"], modules_to_save=["head"]))
    save_adapter(tuned, "with_head")

    class Validated(net):
        def validation_step(self, tokens: torch.Tensor) -> None:
            self.training_step(tokens)

    def merged_without_its_head() -> None:
        torch.save(with_head(3)["body"].state_dict(), "body.pt")
        merge_on_disk("body.pt", "with_head", "merged.pt")

    mistakes = [
        lambda: inject(net(), LoRAConfig(target_modules=["q_prj"])),
        lambda: make_trainer(front).fit(Early(), data, data),
        lambda: net.load_from_checkpoint("adapter.ckpt"),
        resumed_without_adapter,
        lambda: load_from_checkpoint(WithObject, "object.ckpt"),
        lambda: load_from_checkpoint(Other, "adapter.ckpt"),
        lambda: make_trainer(front, lora_alpha=16).fit(net(), data, data, ckpt_path="adapter.ckpt"),
        lambda: load_adapter(with_head(10), "with_head"),
        lambda: load_adapter(with_head(3, width=16), "with_head"),
        lambda: scaled(tuned, 0.5).__enter__(),
        lambda: LoRAConfig(rank=4),
        lambda: make_trainer(front).validate(Validated(), data),
        merged_without_its_head,
        tied,
        trained_while_merged,
    ]
    rows = table(ERRORS, "| message | what to do |")
    for (message, _), mistake in zip(rows, mistakes, strict=True):
        with pytest.raises((LoRAError, RuntimeError, UserWarning)) as error:
            mistake()
        assert spans(message)[0] in " ".join(str(error.value).split())


def test_figures_of_the_first_screen_are_those_of_the_benchmark():
    content = json.loads((ROOT / "tests" / "benchmarks" / "peft_in_module.json").read_text())
    rows = {row["candidate"]: row for row in content["rows"]}
    alone, peft_, ours = (rows[name] for name in ("PEFT alone", "PEFT and both hooks", "LoRACallback"))
    size = {name: f"{row['bytes'] / 1e6:.1f} MB" for name, row in rows.items()}
    float32, bf16 = content["validation"]
    assert (float32["dtype"], bf16["dtype"]) == ("float32", "bf16")
    times = [
        f"{float32[f'{name} / plain']:.2f} in fp32, {bf16[f'{name} / plain']:.2f} in bf16"
        for name in ("PEFT", "LoRACallback")
    ]
    shown = {what: cells for what, *cells in table(FRONT, "| | PEFT (lines with -) | LoRACallback (lines with +) |")}
    assert shown.pop("lines for LoRA") == [f"{peft_['lines']}", f"{ours['lines']}"]
    assert shown.pop("a small Llama's checkpoint, with its optimizer") == [
        f"{size['PEFT and both hooks']}; {size['PEFT alone']} without the hooks",
        size["LoRACallback"],
    ]
    assert shown.pop("names of weights") == ["`base_model.model.…base_layer.weight`", "unchanged"]
    assert (peft_["names kept"], ours["names kept"]) == (0, ours["names"])
    assert shown.pop("validation time, plain model = 1") == times
    assert shown.pop("resuming with other pretrained weights") == ["no error", "an error"]
    assert (peft_["on another base"], ours["on another base"]) == ("another model, silently", "LoRAError")
    assert shown.pop("BatchNorm's statistics, in a checkpoint") == ["lost", "saved"]
    assert peft_["BatchNorm"] > ours["BatchNorm"] == 0
    assert not shown
    assert alone["names kept"] == 0


# --- the reference ---


def test_the_table_of_names_lists_every_public_name_with_its_arguments():
    rows = table(REFERENCE, "| name | what it does |")
    calls = [spans(name)[0] for name, _ in rows]
    assert {call.partition("(")[0] for call in calls} == {*lightning_lora.__all__, "LoRACLI"}
    for call in calls:
        name, _, arguments = call.rstrip(")").partition("(")
        known = inspect.signature(getattr(lightning_lora, name)).parameters if arguments else {}
        given = [argument.partition("=")[0] for argument in arguments.split(", ")]
        assert {argument.lstrip("*") for argument in given} - {"", "..."} <= {*known}, call


def test_the_tables_of_options_list_every_option_with_its_default():
    usual = table(REFERENCE, "| usual option | default | meaning |")
    config = [*usual[:6], *table(REFERENCE, "| option | default | meaning |")]
    callback = [*usual[6:], *table(REFERENCE, "| option of the callback | default | meaning |")]
    shown = {spans(name)[0]: spans(default)[0] for name, default, _ in [*config, *callback]}
    signature = dict(inspect.signature(LoRACallback).parameters)
    del signature["config"]  # all of them at once
    assert {
        name: f'"{p.default}"' if isinstance(p.default, str) else str(p.default) for name, p in signature.items()
    } == shown
    assert [spans(name)[0] for name, _, _ in config] == [field.name for field in fields(LoRAConfig)]


@pytest.mark.parametrize("verb", VERBS)
def test_the_table_of_the_command_names_every_option(verb):
    rows = {
        spans(name)[0].split()[1]: spans(name)[0] + options
        for name, _, options in table(COMMAND, "| command | what it does | options |")
    }
    assert set(rows) == set(VERBS)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main([verb, "--help"])
    assert set(re.findall(r"--[a-z][a-z-]*", out.getvalue())) - {"--help"} == set(
        re.findall(r"--[a-z][a-z-]*", rows[verb])
    )
