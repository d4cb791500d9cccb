"""The table of other libraries' private parts in CONTRIBUTING.md names all that the code needs, and each name exists.

.ci/run runs this with the oldest and the newest versions.
"""

from __future__ import annotations

import ast
import pkgutil
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from packaging.version import Version
from torch import nn

import lightning_lora
from lightning_lora import LoRAError
from lightning_lora.model.patches import patch
from lightning_lora.private import lightning as private_lightning
from lightning_lora.private import torch as private_torch
from lightning_lora.private.deepspeed import what_is_unknown

PACKAGE = Path(lightning_lora.__file__).parent
PAGE = Path(__file__).parents[2] / ".github" / "CONTRIBUTING.md"
ROW = re.compile(r"\| `([\w.]+)`(?: from ([\d.]+))? \| (`.*`) \| [^|]+ \|")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
# Of Python, transformers and bitsandbytes, in files that say what they need; and endings of names.
OF_OTHERS = {
    "_getframe",
    *("_auto_class", "_commit_hash", "_gradient_checkpointing_func", "_is_hf_initialized", "_weight_conversions"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save", "_embeddings"),
    *("_Linear4bit", "_Linear8bitLt", "_convert_weight_packed_for_cpu_inverse", "_svd"),
}


class Row(NamedTuple):
    where: str
    since: str
    names: list[str]


ROWS = [Row(where, since, re.findall(r"`(\w+)`", names)) for where, since, names in ROW.findall(PAGE.read_text())]


def test_every_private_name_in_the_code_is_in_the_table():
    listed = {name for row in ROWS for name in row.names}
    found, own = set[str](), set[str]()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                is_of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                (own if is_of_self and isinstance(node.ctx, ast.Store) else found).add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names} | {*(node.module or "").split(".")}
    private = {name for name in found if PRIVATE.fullmatch(name)}
    modules = {part for row in ROWS for part in row.where.split(".")}
    assert private - own - OF_OTHERS - listed - modules == set()
    assert listed - found - own == set()  # nothing in the table is unneeded


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.where)
def test_each_name_exists_in_the_installed_version(row: Row):
    library = row.where.partition(".")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if row.since and Version(version(library)) < Version(row.since):
        return
    assert missing(row) == []


def missing(row: Row) -> list[str]:
    """The names that do not occur in the source of a module, or are no attributes of a module or class in C++."""
    try:
        spec = find_spec(row.where)
    except (ModuleNotFoundError, ValueError):  # a class, or a part of a module in C++
        spec = None
    if spec is not None and spec.origin and spec.origin.endswith(".py") and row.where != "torch":
        source = Path(spec.origin).read_text()
        return [
            name for name in row.names if not re.search(rf"\b{name}\b", source) and name != row.where.rpartition(".")[2]
        ]
    owner = pkgutil.resolve_name(row.where)
    return [name for name in row.names if not hasattr(owner, name)]


# --- what happens without them ---


def test_no_checkpoint_is_found_outside_of_lightnings_run():
    assert private_lightning.checkpoint_of(SimpleNamespace(ckpt_path="of the run before")) is None


def test_batches_cannot_be_read_where_lightning_has_other_names():
    loops = SimpleNamespace(epoch_loop=SimpleNamespace())
    assert not private_lightning.can_read_batches(SimpleNamespace(fit_loop=loops), nn.Module())


def test_steps_are_the_optimizers_where_lightning_has_another_name():
    loops = SimpleNamespace(epoch_loop=SimpleNamespace())
    assert private_lightning.logged_step(SimpleNamespace(fit_loop=loops, global_step=3)) == 3


def test_options_that_cannot_be_logged_are_a_warning():
    with pytest.warns(UserWarning, match="the options are not logged"):
        private_lightning.add_hyperparameters(nn.Module(), {"lora/r": 8})


def test_an_fsdp1_of_other_names_is_seen_in_setup(monkeypatch):
    import torch.distributed.fsdp._runtime_utils as runtime

    monkeypatch.setattr(runtime, "_lazy_init", lambda *_: None)
    handle: Any = SimpleNamespace(uses_sharded_strategy=True, **dict.fromkeys(private_torch.LATER[1:]))
    with pytest.raises(AttributeError, match=private_torch.LATER[0]):
        private_torch.FSDP1Unit(SimpleNamespace(_handle=handle))


@pytest.mark.parametrize(
    ("attributes", "lacking"),
    [
        ({}, "a SimpleNamespace"),
        ({"bit16_groups": []}, "without loss_scaler"),
        ({"bit16_groups": [], "loss_scaler": None, "optimizer": None}, "without float32 copies"),
        (
            {
                "bit16_groups": [[nn.Parameter()]],
                "loss_scaler": None,
                "optimizer": None,
                "single_partition_of_fp32_groups": [],
            },
            "parameters without float32 copies",
        ),
    ],
)
def test_an_optimizer_of_deepspeed_of_other_names_is_seen_when_it_is_built(attributes: dict[str, Any], lacking: str):
    assert lacking in what_is_unknown(SimpleNamespace(**attributes))


def test_a_method_that_lightning_lacks_is_an_error_with_the_remedy():
    for name in (private_lightning.SET_UP_FSDP, private_lightning.SET_UP_DEEPSPEED):
        with pytest.raises(LoRAError, match=f"no method '{name}'.*install an older one"):
            patch(nn.Module(), name, print)
