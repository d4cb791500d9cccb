"""Adapters that are too large for their layers: named in one warning at fit start, and in a line by inject."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, load_adapter, save_adapter
from lightning_lora.model.large_adapters import describe_large_adapters
from lightning_lora.nn.adapted_weights import adapted_layers
from support.notices import lightning_logger
from support.quantised import layer_of_bitsandbytes
from support.training import Data, Net, make_trainer, own_random_stream


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(3, 24, 6))


# The largest r with which A and B are no larger than the weight.
KINDS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]] = {
    "Linear": (lambda: nn.Linear(24, 8), 6, {}),
    "Linear with DoRA": (lambda: nn.Linear(24, 8), 6, {"use_dora": True}),
    "Linear from its weight": (lambda: nn.Linear(24, 8), 6, {"init_lora_weights": "pissa"}),
    "Linear in 4 bits": (lambda: layer_of_bitsandbytes(nn.Linear(24, 8), "nf4").to("cpu"), 6, {}),
    "Linear of one output": (lambda: nn.Linear(24, 1), 1, {}),
    "Embedding": (lambda: nn.Embedding(24, 8), 6, {}),
    "Conv2d": (lambda: nn.Conv2d(4, 9, 3), 7, {}),
    "Conv2d, groups": (lambda: nn.Conv2d(8, 16, 3, groups=4), 8, {}),
    "Conv2d, depthwise": (lambda: nn.Conv2d(64, 64, 3, groups=64), 7, {}),
    "fused": (lambda: nn.Linear(12, 36), 6, {"enable_lora": {"layer": [True, False, True]}}),
    "attention's out_proj": (lambda: nn.MultiheadAttention(16, 2), 8, {}),
    "LSTM": (lambda: nn.LSTM(8, 6), 6, {"target_modules": [], "target_parameters": ["weight_ih_l0"]}),
    "experts": (Experts, 4, {"target_modules": [], "target_parameters": ["down"]}),
}


def described(module: nn.Module, **options: Any) -> str:
    model = nn.ModuleDict({"layer": module})
    inject(model, LoRAConfig(**{"target_modules": ["layer"], **options}))
    return describe_large_adapters(adapted_layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_too_large_where_it_has_more_parameters_than_its_layer(kind: str):
    build, largest, options = KINDS[kind]
    assert described(build(), r=largest, **options) == ""
    assert described(build(), r=largest + 1, **options).startswith("1 adapter is too large for its layer: 'layer")


def test_an_attention_whose_projections_have_other_inputs_is_measured_as_a_whole():
    apart = {"kdim": 4, "vdim": 4}  # r = 8 does for the first projection what it cannot for the others
    assert described(nn.MultiheadAttention(64, 2, **apart), r=8) == ""
    assert "'layer' (r = 18: 4,752 parameters for 4,608)" in described(nn.MultiheadAttention(64, 2, **apart), r=18)


def test_the_text_has_sizes_and_what_can_be_done():
    assert described(nn.Linear(24, 2), r=4) == (
        "1 adapter is too large for its layer: 'layer' (r = 4: 104 parameters for 48; no update has a rank above 2). "
        "Take a smaller r there, with rank_pattern, or train the layer whole, with modules_to_save=['layer']."
    )
    recurrent = {"target_modules": [], "target_parameters": ["weight_ih_l0", "weight_hh_l0"]}
    assert described(nn.LSTM(8, 6), r=7, **recurrent).endswith("Take a smaller r there, with rank_pattern.")


@pytest.mark.parametrize(("r", "is_useless"), [(7, False), (8, False), (9, True)])
def test_a_rank_beyond_the_smaller_side_alone_is_called_useless(r: int, is_useless: bool):
    assert ("no update has a rank above 8" in described(nn.Linear(24, 8), r=r)) == is_useless


def test_trained_rows_and_whole_modules_are_no_adapters():
    model = nn.ModuleDict({"table": nn.Embedding(4, 4), "body": nn.Linear(32, 32), "head": nn.Linear(32, 2)})
    inject(model, LoRAConfig(r=2, modules_to_save=["head"], trainable_token_indices={"table": [0, 1, 2, 3]}))
    assert describe_large_adapters(adapted_layers(model)) == ""


TOO_LARGE = r"lightning_lora: 3 adapters are too large for their layers: 'body\.0' \(r = 8: 112 parameters for 48; "


def large_warnings(caught: Any) -> int:
    return sum("too large" in str(warning.message) for warning in caught)


def test_one_warning_at_fit_start_names_them_all(tmp_path):
    trainer = make_trainer(tmp_path, LoRACallback(), max_epochs=1)
    with pytest.warns(UserWarning, match=TOO_LARGE) as caught:
        trainer.fit(Net(), Data())
    assert large_warnings(caught) == 1
    pattern = {r"body\.0": 3, r"body\.3": 4}
    callback = LoRACallback(rank_pattern=pattern, modules_to_save=["head"])  # what it says to do
    make_trainer(tmp_path, callback, max_epochs=1).fit(Net(), Data())


def test_loading_and_evaluating_say_nothing_and_training_on_warns_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, lightning_logger()):
        with own_random_stream(1):
            inject(model := Net(), LoRAConfig())
        assert sum("3 adapters are too large" in message for message in caplog.messages) == 1
        inject(model, LoRAConfig())
        save_adapter(model, tmp_path / "adapter")
        load_adapter(loaded := Net(), tmp_path / "adapter")
        make_trainer(tmp_path, LoRACallback()).test(loaded, Data(), verbose=False)
        assert sum("too large" in message for message in caplog.messages) == 1
    with pytest.warns(UserWarning, match=TOO_LARGE) as caught:
        make_trainer(tmp_path, LoRACallback(), max_epochs=1).fit(loaded, Data())
    assert large_warnings(caught) == 1
