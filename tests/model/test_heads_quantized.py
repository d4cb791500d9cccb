"""A head that is to be trained whole in a quantized model: refused with the option that leaves it plain."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, LoRAError, inject
from lightning_lora.model.heads import warn_of_new_heads
from support.models.peers import SMALL
from support.models.pretrained import LABELS, tokens
from support.runs.notices import quiet_peers
from support.runs.training import make_trainer

pytestmark = quiet_peers


def a(name: str, package: str, base: type = nn.Linear) -> type:
    """A class by which a layer of a package is recognised, so that the package need not be there."""
    return type(name, (base,), {"__module__": f"{package}.layers"})


OF_BITSANDBYTES = [a(name, "bitsandbytes") for name in ("Linear4bit", "Linear8bitLt")]
OF_LIGHTNING = a("_Linear4bit", "lightning", OF_BITSANDBYTES[0])
SKIP = "BitsAndBytesConfig(..., llm_int8_skip_modules=['classifier', 'bert.pooler'])"


@pytest.mark.parametrize(
    ("kind", "option", "asked"),
    [
        (OF_BITSANDBYTES[0], SKIP, {"modules_to_save": ["classifier"]}),
        (OF_BITSANDBYTES[1], SKIP, {"task_type": "SEQ_CLS"}),
        (
            OF_LIGHTNING,
            "BitsandbytesPrecision(..., ignore_modules={'network.classifier'})",
            {"modules_to_save": ["classifier"]},
        ),
    ],
    ids=["4 bits", "8 bits", "Lightning"],
)
def test_a_head_that_bitsandbytes_never_quantized_is_refused_with_the_option_by_the_name_it_has_there(
    kind: type, option: str, asked: dict[str, Any]
):
    network = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    network.classifier = kind(network.config.hidden_size, LABELS)
    network.hf_quantizer = SimpleNamespace(modules_to_not_convert=["bert.pooler"])  # it is left out already
    model = nn.ModuleDict({"network": network})
    said = rf"{next(iter(asked))}.* 'network\.classifier', .* a {kind.__name__} .*: {re.escape(option)}\.$"
    with pytest.raises(LoRAError, match=said):
        inject(model, LoRAConfig(target_modules=["query"], **asked))
    assert [name for name, _ in model.named_parameters() if "lora_" in name] == []


@pytest.mark.transformers_5
def test_layers_that_bitsandbytes_never_quantized_are_trained_once_both_lists_of_the_warning_are_copied(tmp_path: Path):
    """The base has no pooler, and the head is left out already."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)

    def adapted(skipped: list[str], whole: list[str]) -> Any:
        quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=LABELS, quantization_config=quantization
        )
        inject(model, LoRAConfig(r=1, target_modules=["query"], modules_to_save=whole))
        return model

    model = adapted(["classifier"], ["classifier"])
    with pytest.warns(UserWarning, match="starts from random values") as caught:
        warn_of_new_heads(list(model.named_modules()), ["classifier"])
    found = re.findall(r"modules(?:_to_save)?=(\[.*?\])", str(caught[0].message))
    whole, skipped = map(ast.literal_eval, found)
    assert sorted(whole) == sorted(skipped) == ["bert.pooler", "classifier"]
    model = adapted(skipped, whole)
    warn_of_new_heads(list(model.named_modules()), whole)  # warnings are errors
    model(input_ids=tokens(), labels=torch.zeros(len(tokens()), dtype=torch.long)).loss.backward()
    assert model.classifier.weight.grad.norm() > 0
    assert model.bert.pooler.dense.weight.grad.norm() > 0
    with pytest.raises(LoRAError, match=r"llm_int8_skip_modules=\['bert.pooler', 'classifier'\]"):
        adapted(["classifier"], whole)  # what is plain already is named too, so that the list can be copied


@pytest.mark.transformers_5
def test_a_fit_with_a_new_pooler_in_4_bits_runs_once_both_lists_of_the_error_are_copied(tmp_path: Path):
    skipped, options, plain = ["classifier"], {"task_type": "SEQ_CLS"}, ["classifier", "bert.pooler"]
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)

    class Tuned(L.LightningModule):
        def __init__(self, skipped: list[str]) -> None:
            super().__init__()
            quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped or None)
            self.net = transformers.AutoModelForSequenceClassification.from_pretrained(
                tmp_path, num_labels=LABELS, quantization_config=quantization
            )

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(input_ids=batch, labels=torch.zeros(len(batch), dtype=torch.long)).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def fit(skipped: list[str], options: dict[str, Any]) -> None:
        trainer = make_trainer(tmp_path / "fit", LoRACallback(r=1, target_modules=["query"], **options))
        trainer.fit(Tuned(skipped).train(), torch.utils.data.DataLoader(tokens()))

    with pytest.raises(LoRAError, match="llm_int8_skip_modules=") as refused:
        fit(skipped, options)
    found = re.findall(r"(\w+_modules|modules_to_save)=(\[.*?\])", str(refused.value))
    lists = {name: ast.literal_eval(names) for name, names in found}
    assert lists.pop("llm_int8_skip_modules") == plain
    assert lists.get("modules_to_save") == ["bert.pooler"]
    fit(plain, {**options, **lists})  # warnings are errors
