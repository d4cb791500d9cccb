"""The shape of the package and of its tests: folders, imports in one direction, names, where a test is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora import names
from support.ranks.processes import DONE, run_in_forks

PACKAGE = Path(lightning_lora.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TESTS = Path(__file__).parents[1]
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

IMPORTED_BY_ALL = {  # files at the top that every folder may import
    "config",
    "errors",
    "matching",
    "metrics",
    "names",
    "notices",
    "progress",
    "units",
}
MAY_IMPORT = {  # besides itself and IMPORTED_BY_ALL; files at the top may import everything
    "private": set(),
    "distributed": {"private"},
    "files": set(),
    "nn": {"distributed", "private"},
    "model": {"nn", "distributed", "private"},
    "start": {"model", "nn", "distributed"},
    "adapter": {"nn", "distributed", "files"},
    "formats": {"adapter", "nn", "files"},
    "exchange": {"formats", "adapter", "model", "nn", "distributed", "files", "private"},
    "report": {"exchange", "formats", "adapter", "model", "nn", "distributed", "files"},
    "trainer": {"report", "exchange", "formats", "adapter", "start", "model", "nn", "distributed", "files", "private"},
    "command": {"report", "exchange", "formats", "adapter", "nn", "files"},
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

VARIANT_WORDS = {  # each with the file of the variant
    "dora": "nn/dora",
    r"magnitude(?!_prune)": "nn/dora",  # magnitude_prune is a method of combine, which has that name in PEFT
    "loha|hada": "nn/loha",
    "start_A": "nn/starts",
    "lora_rows": "nn/token_rows",
}
NAME_VARIANTS = {"nn/variants", "config", "callback"}  # the list of variants, and the options that ask for them

PUBLIC = {
    "LoRAConfig",
    "LoRACallback",
    "LoRACLI",
    "LoRAMonitor",
    "LoRAWeightAveraging",
    "inject",
    "initialize_from_data",
    "unload",
    "merge",
    "unmerge",
    "is_merged",
    "merged",
    "disable_adapter",
    "attach",
    "detach",
    "attached",
    "scaled",
    "set_strength",
    "merge_and_unload",
    "quantize_base",
    "adapter_state_dict",
    "adapter_stats",
    "merged_state_dict",
    "merged_tensors",
    "read_adapter",
    "take_adapter",
    "save_adapter",
    "save_merged",
    "export_adapter",
    "load_adapter",
    "load_from_checkpoint",
    "summary",
    "plot_adapter",
    "lora_param_groups",
    "combine",
    "LoRAError",
    "Variant",
}


def imported(name: str) -> set[str]:
    """What a file imports, inside functions and for type checking too: the package's own files as '/folder/file'."""
    here = name.split("/")[:-1]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            start = here[: len(here) - node.level + 1]
            module = [*start, *(node.module.split(".") if node.module else ())]
            whole = "/".join(module)
            found |= (
                {f"/{whole}"} if whole in FILES else {f"/{'/'.join([*module, alias.name])}" for alias in node.names}
            )
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


IMPORTS = {name: imported(name) for name in FILES}
GRAPH = {name: {i[1:] for i in found if i.startswith("/")} for name, found in IMPORTS.items()}


def folder_of(name: str) -> str:
    """The folder of a file, or "" at the top."""
    return name.rpartition("/")[0]


def test_imports_run_one_way():
    assert GRAPH["model/merging"] >= {"nn/adapted_weights", "errors"}  # the reader of imports sees them
    assert not any(i.startswith("lightning_lora") for found in IMPORTS.values() for i in found)
    assert all(target in FILES for targets in GRAPH.values() for target in targets)
    list(TopologicalSorter(GRAPH).static_order())  # a cycle is an error that shows it


def test_folders_import_only_the_folders_below_them():
    assert {folder_of(name) for name in FILES} == {"", *MAY_IMPORT}
    wrong = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if folder_of(name)
        and target not in IMPORTED_BY_ALL
        and folder_of(target) not in {folder_of(name), *MAY_IMPORT[folder_of(name)]}
    ]
    of_folders = [f"{name} imports {t}" for name in IMPORTED_BY_ALL for t in GRAPH[name] if t not in IMPORTED_BY_ALL]
    assert not wrong + of_folders


def test_a_folders_own_file_is_a_docstring_and_nothing_else():
    for name in MAY_IMPORT:
        (only,) = TREES[f"{name}/__init__"].body
        assert isinstance(only, ast.Expr)
        assert isinstance(only.value, ast.Constant)


# --- where a test is ---


TESTED_WITH_THEIR_USERS = {
    "": {"names", "units"},
    "private": {"deepspeed", "lightning", "torch"},  # what they give; tests/project/test_private_parts.py has the names
    "distributed": {"deepspeed_optimizer"},
    "files": {"paths"},
    "nn": {"conv", "embedding", "foreign_entries", "layer_kinds", "output_norms", "variants"},
    "model": {"initial_values", "live_state", "named_state", "patches", "token_tables"},
    "start": {"batches", "from_data"},
    "adapter": {"base_files", "checks", "identity", "measures", "own_options", "values", "weighted_means"},
    "formats": {"forms"},
    "exchange": {"export", "trained_with"},
    "report": {"depth", "figures"},
    "trainer": {"options", "strategies"},
    "command": {"parser"},
}


@pytest.mark.parametrize("of", ["", *MAY_IMPORT])
def test_the_tests_of_a_file_are_called_as_it_is(of: str):
    """test_FILE.py or test_FILE_TOPIC.py, in the folder of the file; what crosses folders is in tests/tables."""
    sources = {name.rpartition("/")[2] for name in FILES if folder_of(name) == of and "__" not in name}
    tests = {path.stem.removeprefix("test_") for path in (TESTS / of).glob("test_*.py")}
    assert [test for test in tests if not any(f"{test}_".startswith(f"{source}_") for source in sources)] == []
    own = tests & sources
    without = {source for source in sources if not any(f"{source}_".startswith(f"{test}_") for test in own)}
    assert without - TESTED_WITH_THEIR_USERS[of] == set()


# --- what is said once ---


def test_a_variants_words_are_in_its_own_file_the_list_and_the_options():
    """So that another variant is one file and one row: everybody else asks the class Variant."""
    for words, own in VARIANT_WORDS.items():
        users = {name for name, path in FILES.items() if re.search(words, path.read_text())}
        assert own in users  # the word is still its word
        assert users - {own, *NAME_VARIANTS} == set()


def test_files_on_disk_know_no_name_of_an_adapter():
    """Such names come in as arguments."""
    own = {name for name, value in vars(names).items() if isinstance(value, str) and "lora" in value}
    assert {"META", "PREFIX"} <= own
    for name in (name for name in FILES if folder_of(name) == "files"):
        assert not re.search("lora(?!Error)", FILES[name].read_text(), re.IGNORECASE), name
        taken = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.module == "names"]
        assert not own & {alias.name for node in taken for alias in node.names}, name


def test_only_the_callbacks_and_the_command_line_import_lightning():
    users = {name for name, found in IMPORTS.items() if any(i.split(".")[0] == "lightning" for i in found)}
    assert users == {"averaging", "callback", "monitor", "cli"}


def test_public_names_are_those_of_the_contract():
    assert {*lightning_lora.__all__, "LoRACLI"} == PUBLIC <= set(dir(lightning_lora))
    for name in PUBLIC:
        assert getattr(lightning_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_lora.nothing  # noqa: B018
    brought: dict[str, object] = {}
    exec("from lightning_lora import *", brought)
    assert {name for name in brought if name[:2] != "__"} == PUBLIC - {"LoRACLI"}  # which needs an extra
    assert issubclass(lightning_lora.LoRAError, ValueError)


def test_what_is_public_has_a_docstring():
    def lacking(tree: ast.Module) -> Iterator[str]:
        if not ast.get_docstring(tree):
            yield "the file"
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, *FUNCTION)) and node.name[0] != "_":
                parts = node.body if node.name in PUBLIC else ()
                methods = [part for part in parts if isinstance(part, FUNCTION) and part.name[0] != "_"]
                yield from (each.name for each in (node, *methods) if not ast.get_docstring(each))

    found = {name: list(lacking(tree)) for name, tree in TREES.items()}
    assert {name: lack for name, lack in found.items() if lack} == {}


EXTRAS = (
    "deepspeed",
    "huggingface_hub",
    "jsonargparse",
    "peft",
    "transformers",
    "loralib",
    "sklearn",
    "matplotlib",
    "tensorboard",
)
WITHOUT_LIGHTNING = """
import sys, tempfile, torch, lightning_lora
from lightning_lora.command.main import main
net = torch.nn.Sequential(torch.nn.Linear(2, 2))
with tempfile.TemporaryDirectory() as path:
    torch.save(net.state_dict(), f"{path}/base.pt")
    lightning_lora.inject(net, lightning_lora.LoRAConfig(r=1))
    lightning_lora.save_adapter(net, f"{path}/a")
    assert main(["info", f"{path}/a"]) == 0
    assert main(["merge", f"--base={path}/base.pt", f"--adapter={path}/a", f"--output={path}/o.pt"]) == 0
assert not {"lightning", "torchmetrics"} & set(sys.modules)
assert {"LoRACallback", "LoRACLI", "inject"} <= set(dir(lightning_lora))
"""
WITH_THE_CALLBACK = """
import sys, lightning_lora
from lightning_lora.command.main import main
assert "lightning" not in sys.modules
from lightning_lora import LoRACallback
assert "lightning" in sys.modules and "lightning.pytorch.cli" not in sys.modules
assert lightning_lora.LoRACallback is LoRACallback
"""
WITHOUT_EXTRAS = f"""
import sys, lightning.pytorch, torchmetrics
known = set(sys.modules)  # torchmetrics imports transformers
from lightning_lora import LoRACallback
brought = [name for name in {EXTRAS} if name in set(sys.modules) - known]
assert brought == [], brought
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, str]:
    return run_in_forks(
        {
            "without lightning": (["torch"], WITHOUT_LIGHTNING),
            "with the callback": (["torchmetrics", "torch._dynamo"], WITH_THE_CALLBACK),  # most of Lightning's time
            "without extras": (["lightning.pytorch"], WITHOUT_EXTRAS),
        }
    )


@pytest.mark.slow
def test_the_package_is_imported_without_its_extras(imports):
    assert imports["without extras"] == DONE
    users = {name for name, found in IMPORTS.items() if {i.split(".")[0] for i in found} & set(EXTRAS)}
    # inside their functions, with a message where they are missing, or without them
    drawing = {f"report/{name}" for name in ("pictures", "figures")}
    deepspeed = {"distributed/deepspeed_optimizer"}
    assert users == {"formats/hub"} | drawing | deepspeed


@pytest.mark.slow
def test_lightning_is_imported_for_the_callback_alone(imports):
    """Plain models and the command wait neither for it nor for torchmetrics; the callback is there all the same."""
    assert imports["without lightning"] == DONE
    assert imports["with the callback"] == DONE
