"""save_pretrained of a transformers model: a warning where the files would not be the tuned model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    merge_and_unload,
    merged,
    merged_state_dict,
    unload,
)
from support.notices import TORCH_NOTICES, quiet_peers
from support.peers import fill_
from support.pretrained import Lit, answer, bert

pytestmark = [*quiet_peers, *TORCH_NOTICES]


def adapted(network: nn.Module, **options: Any) -> Lit:
    module = Lit(model=network)
    inject(module, LoRAConfig(r=2, **{"target_modules": "all-linear"} | options))
    fill_(module)
    return module


def _as_it_is(module: Lit) -> Lit:
    return module


def _through_pickle(module: Lit) -> Lit:
    result: Lit = pickle.loads(pickle.dumps(module))
    return result


@pytest.mark.parametrize("way", [_as_it_is, copy.deepcopy, _through_pickle], ids=lambda way: way.__name__)
def test_save_pretrained_of_an_adapted_model_warns_merged_or_not(tmp_path, way):
    module = way(adapted(bert()))
    for network in (module.model, module.model.bert):
        with pytest.warns(UserWarning, match=r"save_pretrained of .*save_merged.*save_adapter.*merge_and_unload"):
            network.save_pretrained(tmp_path / "a")
    with merged(module), pytest.warns(UserWarning, match="so that it loads the base"):
        module.model.save_pretrained(tmp_path / "b")


def test_save_pretrained_of_merged_weights_is_right_without_a_warning(tmp_path):
    module = adapted(bert())
    module.model.save_pretrained(tmp_path, state_dict=merged_state_dict(module.model))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(answer(again), answer(module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("leave", [unload, merge_and_unload])
@pytest.mark.parametrize(
    "handle", [lambda m: m, lambda m: m.model, lambda m: m.model.bert], ids=["root", "model", "body"]
)
def test_save_pretrained_of_a_plain_model_says_nothing(tmp_path, leave, handle):
    module = adapted(bert(), target_modules=["query"])
    leave(handle(module))
    assert not [name for m in module.modules() for name in vars(m) if name == "save_pretrained"]
    module.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(again), answer(module))
