"""Hyper-parameters as arguments: plain values get the annotated types, and values that name code are reported."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from torch import nn

from lightning_lora.formats.hyper_parameters import flat, plain_arguments

OF_A_CLI: dict[str, Any] = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}


class Base:
    def __init__(
        self, rate: int = 1, either: float | int = 1, share: float = 0.5, pair: tuple[int, int] = (1, 2)
    ) -> None:
        pass


class Derived(Base):
    def __init__(self, rate: float = 1.0, act: Annotated[nn.Module | str, "a layer"] = "relu", **rest: Any) -> None:
        super().__init__(**rest)


def test_annotations_of_the_class_itself_count_before_those_that_it_passes_on_to():
    arguments, refused = plain_arguments(Derived, OF_A_CLI | {"rate": 2, "share": 1})
    assert refused == {}
    assert {name: (value, type(value)) for name, value in arguments.items()} == {
        "rate": (2.0, float),
        "share": (1.0, float),
    }


def test_a_value_of_one_of_several_types_stays_what_it_is():
    (value,) = plain_arguments(Base, OF_A_CLI | {"either": 3})[0].values()
    assert (value, type(value)) == (3, int)


@pytest.mark.parametrize("value", [{"share": True}, {"pair": [1]}, {"pair": [1, 2, 3]}], ids=str)
def test_a_value_that_does_not_fit_its_annotation_is_told(value: dict[str, Any]):
    assert plain_arguments(Base, OF_A_CLI | value)[1].keys() == value.keys()


def test_a_class_path_of_the_users_own_beside_other_names_is_no_form_of_a_command_line():
    saved = OF_A_CLI | {"class_path": "mine", "width": 3}
    assert flat(saved) == saved
    form = OF_A_CLI | {"class_path": "some.Net", "init_args": {"width": 3}, "dict_kwargs": {"more": 4}}
    assert flat(form) == {"_instantiator": None, "width": 3, "more": 4}
