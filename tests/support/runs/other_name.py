"""Run test files and their helpers a second time, with `pytorch_lightning` in place of `lightning`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pytorch_lightning.cli import LightningCLI

import lightning_lora

SUPPORT = Path(__file__).parents[1]
HELPERS = "support_under_pytorch_lightning"
NAMES = {
    "import lightning as L": "import pytorch_lightning as L",
    "lightning.pytorch": "pytorch_lightning",
    "from support.": f"from {HELPERS}.",
    "from lightning_lora import": f"from {HELPERS}.lightning_lora import",
}


class LoRACLI(LightningCLI):
    """What the docstring of LoRACLI says for the package that is not the first one in the process."""

    __module__ = HELPERS
    add_arguments_to_parser = lightning_lora.LoRACLI.add_arguments_to_parser  # type: ignore[assignment]


def _public(name: str) -> Any:
    return LoRACLI if name == "LoRACLI" else getattr(lightning_lora, name)


PUBLIC = ModuleType(f"{HELPERS}.lightning_lora")
PUBLIC.__getattr__ = _public  # type: ignore[method-assign]


def under_pytorch_lightning(path: Path, name: str) -> ModuleType:
    """Import a test file and its helpers as a module of this name that uses only `pytorch_lightning`."""
    source = path.read_text()
    for lightning, other in NAMES.items():
        source = source.replace(lightning, other)
    sys.modules.setdefault(HELPERS, ModuleType(HELPERS))
    sys.modules.setdefault(PUBLIC.__name__, PUBLIC)
    for helper in re.findall(rf"^from ({HELPERS}\.[\w.]+) import", source, re.MULTILINE):
        if helper not in sys.modules:
            room = helper.rpartition(".")[0]
            sys.modules.setdefault(room, ModuleType(room))
            file = helper.removeprefix(f"{HELPERS}.").replace(".", "/")
            under_pytorch_lightning(SUPPORT / f"{file}.py", helper)
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source, path, "exec"), vars(module))
    return module
