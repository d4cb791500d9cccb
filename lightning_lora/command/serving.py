"""`lightning-lora info PATH --for SERVER`: what a server would drop, run wrongly or refuse of an adapter."""

from __future__ import annotations

import shlex
import warnings
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..files.paths import PathLike
from ..formats.forms import form_of
from ..formats.peft_folder import folder_content
from ..formats.plain import plain_form
from ..formats.servers import FolderView, Server, findings, servers, view_of_content, view_of_folder
from ..formats.sources import adapter_with_options

Findings = list[dict[str, Any]]


def serving(path: PathLike, server: Server) -> dict[str, Any]:
    """Describe, as plain types, what a server makes of an adapter, and of its plain form where that differs.

    A PEFT folder is looked at as it is. Of any other source, what export would write is looked at, and `first` is the
    command that writes it.

    Args:
        path: an adapter in any form.
        server: a key of servers().

    Raises:
        LoRAError: the adapter is damaged.
    """
    about = {name: text for name, text in servers()[server].items() if name != "rules"}
    is_folder = form_of(path) == "PEFT folder"
    found = findings(view_of_folder(path), server) if is_folder else _of_export(path, server)
    plain = {"plain": _of_plain_form(path, server)} if any(each["effect"] != "needs" for each in found) else {}
    writes = not is_folder and all(each["id"] != "export" for each in found)
    first = {"first": f"lightning-lora export {shlex.quote(str(path))} FOLDER"} if writes else {}
    return {"server": about, **first, "findings": found, **plain}


def _of_export(path: PathLike, server: Server) -> Findings:
    """Return the findings in what export would write, or as one finding why it would write nothing."""
    adapter = adapter_with_options(path)
    try:
        view = _view(adapter)
    except LoRAError as error:
        return [_finding(error, path)]
    return findings(view, server)


def _of_plain_form(path: PathLike, server: Server) -> Findings:
    try:
        with warnings.catch_warnings():  # of the rounding of what is not written
            warnings.simplefilter("ignore")
            view = _view(plain_form(adapter_with_options(path), path), plain=True)
    except LoRAError as error:
        return [_finding(error, path)]
    return findings(view, server)


def _view(adapter: Adapter, *, plain: bool = False) -> FolderView:
    return view_of_content(folder_content(adapter, plain=plain))


def _finding(error: LoRAError, path: PathLike) -> dict[str, Any]:
    says = str(error).removeprefix("save_adapter: ").removeprefix(f"{path}: ").removesuffix(".")
    return {"id": "export", "effect": "refuses", "says": says, "source": "lightning-lora export", "names": []}
