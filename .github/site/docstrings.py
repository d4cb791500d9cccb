"""Let griffe show examples in colours, and the values of constants and types instead of their names."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import griffe


class Shown(griffe.Extension):
    """Make the lines below Example:: a section, and write out constants and types that are no public names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\bExample::\n\n", "Examples:\n", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name in pkg.exports or ():
            public = pkg[str(name)]
            for each in public.members.values() if public.is_class else [public]:
                if each.is_function:
                    for parameter in each.parameters:
                        parameter.default = written_out(parameter.default)
                        parameter.annotation = written_out(parameter.annotation)
                elif each.is_attribute:  # of a dataclass, whose arguments are made of them
                    each.value, each.annotation = written_out(each.value), written_out(each.annotation)


def written_out(value: Any) -> Any:
    """Return an expression with the values of the package's constants and types in the place of their names."""
    if isinstance(value, list):
        return [written_out(part) for part in value]
    if isinstance(value, griffe.ExprName):
        found = value.parent.module.members.get(value.name) if isinstance(value.parent, griffe.Object) else None
        if found is not None and found.is_alias and found.target_path.startswith("lightning_lora."):
            try:
                found = found.final_target
            except griffe.AliasResolutionError:
                griffe.logger.warning(f"{found.target_path} has no value to show; give it one on a line of its own")
        return written_out(found.value) if isinstance(found, griffe.Attribute) else value
    if isinstance(value, griffe.Expr):
        for field in fields(value):
            if field.name != "parent":
                setattr(value, field.name, written_out(getattr(value, field.name)))
    return value
