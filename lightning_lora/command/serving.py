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
from ..formats.servers import (
    FolderView,
    Server,
    findings,
    is_of_another_architecture,
    servers,
    view_of_content,
    view_of_folder,
)
from ..formats.sources import adapter_with_options

Findings = list[dict[str, Any]]


def serving(path: PathLike, server: Server) -> dict[str, Any]:
    """Describe, as plain types, what a server makes of an adapter, and of its plain form where that differs.

    A PEFT folder is looked at as it is. Of any other source, what export would write is looked at, and `first` is the
    command that writes it. `other_architecture` is true where neither a form of it nor merged weights can be served.

    Args:
        path: an adapter in any form.
        server: a key of servers().

    Raises:
        LoRAError: the adapter is damaged.
    """
    about = {name: text for name, text in servers()[server].items() if name != "rules"}
    is_folder = form_of(path) == "PEFT folder"
    found, is_other = _of_view(view_of_folder(path), server) if is_folder else _of_export(path, server)
    result: dict[str, Any] = {"server": about, "findings": found}
    if not is_folder and all(each["id"] != "export" for each in found):
        result["first"] = f"lightning-lora export {shlex.quote(str(path))} FOLDER"
    if any(each["effect"] != "needs" for each in found):
        result["plain"], plain_is_other = _of_plain_form(path, server)
        is_other = is_other or plain_is_other
    return {**result, "other_architecture": True} if is_other else result


def _of_view(view: FolderView, server: Server) -> tuple[Findings, bool]:
    """Return the findings, and whether the network is one that the server cannot know."""
    found = findings(view, server)
    return found, is_of_another_architecture(view, server, found)


def _of_export(path: PathLike, server: Server) -> tuple[Findings, bool]:
    """Look at what export would write, or return as one finding why it would write nothing."""
    adapter = adapter_with_options(path)
    try:
        view = _view(adapter)
    except LoRAError as error:
        return [_finding(error, path)], False
    return _of_view(view, server)


def _of_plain_form(path: PathLike, server: Server) -> tuple[Findings, bool]:
    try:
        with warnings.catch_warnings():  # of the rounding of what is not written
            warnings.simplefilter("ignore")
            view = _view(plain_form(adapter_with_options(path), path), plain=True)
    except LoRAError as error:
        return [_finding(error, path)], False
    return _of_view(view, server)


def _view(adapter: Adapter, *, plain: bool = False) -> FolderView:
    return view_of_content(folder_content(adapter, plain=plain))


def _finding(error: LoRAError, path: PathLike) -> dict[str, Any]:
    says = str(error).removeprefix("save_adapter: ").removeprefix(f"{path}: ").removesuffix(".")
    return {"id": "export", "effect": "refuses", "says": says, "source": "lightning-lora export", "names": []}
