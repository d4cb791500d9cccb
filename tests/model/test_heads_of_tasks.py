"""A head that starts from random values: named at fit start, and saved where a task says that it is trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
import transformers

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    inject,
    load_adapter,
    save_adapter,
    unload,
)
from lightning_lora.config import Task
from lightning_lora.model.heads import new_heads, warn_of_new_heads
from lightning_lora.model.pretrained import base_name
from support.models.peers import SMALL, fill_
from support.models.pretrained import LABELS, Lit, answer, bert, classifier, save_body, token_loader
from support.runs.notices import quiet_peers
from support.runs.training import fit_model

pytestmark = quiet_peers
TARGETS = ["query", "value"]


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_body(tmp_path_factory.mktemp("body"))


def fit(module: Lit, path: Path, **options: Any) -> Any:
    return fit_model(path, module, LoRACallback(**{"r": 2, "target_modules": TARGETS} | options), data=token_loader())


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return found


# --- at fit start ---


def test_a_new_head_that_is_not_trained_whole_is_named_at_fit_start(tmp_path, body):
    remedy = r"\(classifier\) starts from random values.*modules_to_save=\['classifier'\] or task_type='SEQ_CLS'"
    with pytest.warns(UserWarning, match=remedy):
        fit(Lit(body), tmp_path)


def test_a_head_that_the_checkpoint_holds_is_not_new_in_a_class_that_fsdp_has_made(body):
    model = copy.deepcopy(transformers.AutoModelForSequenceClassification.from_pretrained(body))
    assert "classifier" in new_heads(model)
    model.config.architectures = [type(model).__name__]
    assert new_heads(model) == {}
    model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
    assert new_heads(model) == {}


NEW_POOLER = {
    "two": ({}, r"\(bert.pooler, classifier\).*modules_to_save=\['bert.pooler', 'classifier'\]\.$"),
    "one": (
        {"modules_to_save": ["classifier"]},
        r"\(bert.pooler\).*modules_to_save=\['classifier', 'bert.pooler'\]\.$",
    ),
    "beside a task": ({"task_type": "SEQ_CLS"}, r"\(bert.pooler\).*modules_to_save=\['bert.pooler'\]\.$"),
}


@pytest.mark.transformers_5
@pytest.mark.parametrize(("options", "said"), NEW_POOLER.values(), ids=NEW_POOLER)
def test_every_module_that_the_checkpoint_lacks_is_named_while_it_is_frozen(tmp_path, options, said: str):
    transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    inject(model := classifier(tmp_path), LoRAConfig(r=2, target_modules=TARGETS, **options))
    with pytest.warns(UserWarning, match=said):
        warn_of_new_heads(list(model.named_modules()), options.get("modules_to_save", ()))


@pytest.mark.transformers_5
def test_a_head_of_another_size_than_in_a_checkpoint_of_the_same_class_is_new(tmp_path, body):
    classifier(body).save_pretrained(tmp_path)
    kind = transformers.BertForSequenceClassification
    assert list(new_heads(kind.from_pretrained(tmp_path))) == []
    resized = kind.from_pretrained(tmp_path, num_labels=LABELS + 1, ignore_mismatched_sizes=True)
    assert list(new_heads(resized)) == ["classifier"]


def test_the_base_of_two_models_is_that_of_the_one_with_adapters():
    models = torch.nn.ModuleDict({name: bert() for name in ("teacher", "student")})
    for name, model in models.items():
        model.config.name_or_path = model.name_or_path = f"somebody/{name}"
    inject(models, LoRAConfig(r=2, target_modules=r"student\..*query"))
    assert base_name(list(models.named_modules())) == "somebody/student"


@pytest.mark.transformers_5
def test_a_new_part_of_the_body_is_not_called_a_head_and_an_adapter_on_it_is_named(tmp_path):
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)  # it has no pooler
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    inject(model, LoRAConfig(target_modules=["query"], modules_to_save=["classifier"]))
    said = r": a part of BertForSequenceClassification \(bert\.pooler\) starts .* and stays frozen: .*'bert\.pooler'"
    with pytest.warns(UserWarning, match=said):
        warn_of_new_heads(list(model.named_modules()))
    unload(model)
    inject(model, LoRAConfig(target_modules=["query", "dense"], modules_to_save=["classifier"]))
    with pytest.warns(UserWarning, match=r"\(bert\.pooler\) starts .* and stays frozen under its adapter: "):
        warn_of_new_heads(list(model.named_modules()))


@pytest.mark.slow
def test_a_model_whose_head_came_with_it_is_not_warned_of(tmp_path, body):
    classifier(body).save_pretrained(tmp_path / "tuned")
    transformers.BertForPreTraining(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path / "lm")
    without_a_head = transformers.BertModel.from_pretrained(body)
    language_model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "lm")
    for model in (classifier(tmp_path / "tuned"), without_a_head, bert(), language_model):
        inject(model, LoRAConfig(r=2, target_modules=TARGETS))
        warn_of_new_heads(list(model.named_modules()))  # warnings are errors


# --- task_type ---


@pytest.mark.parametrize("task", get_args(Task))
def test_task_type_adds_what_peft_adds(body, task: str):
    config = peft.LoraConfig(task_type=task, target_modules=TARGETS)
    net = classifier(body)
    for method in ("prepare_inputs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation"):
        setattr(net, method, None)  # of models for other tasks, which peft keeps
    peft.get_peft_model(net, config)
    ours = LoRAConfig(task_type=task, target_modules=TARGETS)
    assert set(ours.all_modules_to_save()) == set(config.modules_to_save or ())


def test_every_task_of_peft_is_taken_also_as_its_enum():
    assert set(get_args(Task)) == {task.value for task in peft.TaskType}
    for task in peft.TaskType:
        assert type(LoRAConfig(task_type=task).task_type) is str  # type: ignore[arg-type]


def test_a_config_that_peft_has_used_names_heads_that_are_not_there_without_an_error(body):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS)
    peft.get_peft_model(classifier(body), config)
    assert config.modules_to_save is not None
    assert "score" in config.modules_to_save
    inject(net := classifier(body), LoRAConfig.from_peft(config))
    assert net.classifier.weight.requires_grad


def test_task_type_and_the_bases_name_survive_every_way_out_and_in(tmp_path, body):
    net = classifier(body)
    inject(net, LoRAConfig(task_type="SEQ_CLS", target_modules=TARGETS))
    fill_(net)
    save_adapter(net, tmp_path / "a")
    load_adapter(again := Lit(body), tmp_path / "a")
    save_adapter(again, tmp_path / "b")
    wanted = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(body), "modules_to_save": ["classifier", "score"]}
    for folder in "ab":
        assert wanted.items() <= config_of(tmp_path / folder).items()
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=LABELS)
    torch.testing.assert_close(answer(theirs), answer(net), rtol=0, atol=1e-6)


def test_the_origin_that_peft_wrote_survives_on_a_model_without_a_name(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, revision="v2")
    other = peft.get_peft_model(bert(), config)
    config.base_model_name_or_path = "someone/bert"
    other.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    net = Lit(model=other.unload())
    load_adapter(net, tmp_path / "theirs")
    save_adapter(net, tmp_path / "ours")
    for name in ("task_type", "base_model_name_or_path", "revision"):
        assert config_of(tmp_path / "ours")[name] == config_of(tmp_path / "theirs")[name] is not None


def test_an_adapter_with_a_task_and_no_head_loads_and_keeps_its_task(tmp_path, body):
    """As transformers' own add_adapter makes it, which trains no head, whatever task_type says."""
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, init_lora_weights=False)
    theirs = peft.PeftModel(net := classifier(body), config)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again := classifier(body), tmp_path / "theirs")
    again.classifier.load_state_dict(net.classifier.state_dict())
    torch.testing.assert_close(answer(again), answer(theirs), rtol=0, atol=1e-6)
    save_adapter(again, tmp_path / "ours")
    assert config_of(tmp_path / "ours")["task_type"] == "SEQ_CLS"
