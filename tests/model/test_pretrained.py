"""Methods of a transformers model that adapters need patched: save_pretrained and gradient checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAConfig, inject, merge_and_unload, merged, merged_state_dict, unload
from support.models.peers import SMALL
from support.models.pretrained import adapted, answer, bert
from support.runs.notices import TORCH_NOTICES, quiet_peers

pytestmark = [*quiet_peers, *TORCH_NOTICES]


@pytest.mark.parametrize("way", [lambda module: module, copy.deepcopy])
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


@pytest.mark.parametrize(
    ("leave", "handle"), [(unload, lambda module: module), (merge_and_unload, lambda module: module.model.bert)]
)
def test_save_pretrained_of_a_plain_model_says_nothing(tmp_path, leave, handle):
    module = adapted(bert(), target_modules=["query"])
    leave(handle(module))
    assert not [name for m in module.modules() for name in vars(m) if name == "save_pretrained"]
    module.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(again), answer(module))


# --- gradient checkpointing that is enabled after injection ---


class OldForm(transformers.BertForSequenceClassification):
    """A model from the Hub: its method has the form of transformers before 4.35, which that recognises by `value`."""

    def _set_gradient_checkpointing(self, module: nn.Module, value: bool = False) -> None:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = value


def test_checkpointing_of_a_model_with_the_old_form_of_the_method_is_enabled_after_injection():
    model = OldForm(transformers.BertConfig(**SMALL)).train()
    inject(model, LoRAConfig(r=2, target_modules=["query"]))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert model.is_gradient_checkpointing
