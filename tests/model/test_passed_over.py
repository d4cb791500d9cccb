""" "all-linear" says once what it leaves out: kinds of weights, and their shares of the parameters."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ConvNextV2Config, ConvNextV2Model, ViTConfig, ViTModel

from lightning_lora import LoRACallback, LoRAConfig, inject, load_adapter, save_adapter, summary
from support.training import Data, make_trainer, own_random_stream
from support.training import Net as Trained


class Linear(nn.Module):
    """As torch_geometric's, which is not torch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 5, 5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapted = nn.Linear(10, 10, bias=False)  # 100 parameters
        self.foreign = nn.ModuleList([Linear(10, 10), Linear(10, 10)])  # 200
        self.experts = Experts()  # 100
        self.conv = nn.Conv2d(5, 5, 2, bias=False)  # 100
        self.embed = nn.Embedding(10, 10)  # 100
        self.lstm = nn.LSTM(5, 5, bias=False)  # 200
        self.attention = nn.MultiheadAttention(5, 1, bias=False)  # 75 and out_proj, which is adapted, 25
        self.more = nn.Bilinear(5, 5, 4, bias=False)  # 100
        self.norm = nn.LayerNorm(50)  # 100


def logged(caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(Net(), LoRAConfig(r=1, **options))
    return [record.getMessage() for record in caplog.records if "passes over" in record.getMessage()]


def test_all_linear_says_once_what_it_passes_over_and_its_share(caplog):
    (line,) = logged(caplog)
    total = 1100
    assert line == (
        f"lightning_lora: 'all-linear' passes over {875 / total:.1%} of the parameters: "
        f"2 {Linear.__module__}.Linear {200 / total:.1%}, 1 LSTM {200 / total:.1%}, "
        f"1 Experts.down_proj {100 / total:.1%}, 1 Conv2d {100 / total:.1%}, 1 Embedding {100 / total:.1%}, "
        f"1 Bilinear {100 / total:.1%}, others {75 / total:.1%}; "
        "target_parameters=['down_proj', 'weight_ih_l0', 'weight_hh_l0'] adapts these too; "
        "target_modules='all-layers' adapts Conv2d, MultiheadAttention.in_proj too"
    )


def test_what_is_excluded_or_saved_whole_is_not_passed_over():
    options = {"exclude_modules": ["conv"], "modules_to_save": ["foreign", "experts", "embed", "lstm", "more"]}
    inject(model := Net(), LoRAConfig(r=1, **options))
    found = f"{75 / 1100:.1%} of the parameters: 1 MultiheadAttention.in_proj {75 / 1100:.1%}"
    action = "; target_modules='all-layers' adapts MultiheadAttention.in_proj too"
    assert summary(model).passed_over == found + action


@pytest.mark.parametrize(("rows", "is_said"), [(2, False), (3, True)])
def test_what_is_passed_over_is_said_above_a_tenth_and_once(tmp_path, caplog, rows: int, is_said: bool):
    """By inject in a line, or by the summary at fit start; a warning stands for both."""
    with own_random_stream(1):
        model = Tabled(rows)
        twin = copy.deepcopy(model)
    share = 8 * rows / sum(parameter.numel() for parameter in model.parameters())
    assert (share > 0.1) == is_said
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, LoRACallback(r=1), max_epochs=1).fit(model, Data())
        assert caplog.text.count("passes over") == is_said
        caplog.clear()
        inject(twin, LoRAConfig(r=1))
        assert caplog.text.count("passes over") == is_said
        make_trainer(tmp_path, LoRACallback(), max_epochs=1).fit(twin, Data())
        assert caplog.text.count("passes over") == is_said
    assert f"passes over {share:.1%} of the parameters: 1 Embedding" in str(summary(model))


class Tabled(Trained):
    """171 parameters and a table of 8 columns."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 8)


def test_a_list_of_targets_passes_over_nothing_and_neither_does_a_model_of_linear_layers(caplog):
    assert not logged(caplog, target_modules=["adapted"])
    with caplog.at_level(logging.INFO, logger="lightning_lora"):
        inject(nn.Sequential(nn.Linear(50, 50), nn.LayerNorm(2), nn.Bilinear(1, 1, 1)), LoRAConfig(r=1))
    assert "passes over" not in caplog.text


class LayerScale(nn.Module):
    """As ConvNeXt's blocks in torchvision and timm."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.pointwise = nn.Linear(8, 8)
        self.layer_scale = nn.Parameter(torch.ones(*shape))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (1, 8), (1, 1, 1)])
def test_a_vector_with_dimensions_of_one_is_no_weight_and_not_suggested(shape: tuple[int, ...]):
    inject(model := LayerScale(*shape), LoRAConfig(r=1))
    assert summary(model).passed_over == ""
    inject(model := LayerScale(2, 1, 4), LoRAConfig(r=1))
    assert "1 LayerScale.layer_scale" in summary(model).passed_over
    assert "target_parameters=['layer_scale'] adapts" in summary(model).passed_over
    model = LayerScale(2, 1, 4)
    model.layer_scale = nn.Parameter(model.layer_scale.detach().to(torch.uint8), requires_grad=False)
    inject(model, LoRAConfig(r=1))
    assert summary(model).passed_over.endswith("1 LayerScale.layer_scale 10.0%")


def test_class_tokens_positions_and_scales_of_transformers_models_are_not_suggested():
    vit = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    inject(model := ViTModel(vit), LoRAConfig(r=1))
    assert "cls_token" not in summary(model).passed_over
    assert "ViTEmbeddings.position_embeddings" in summary(model).passed_over
    assert "target_parameters" not in summary(model).passed_over
    inject(model := ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8] * 4, depths=[1] * 4)), LoRAConfig(r=1))
    assert model.encoder.stages[0].layers[0].grn.weight.dim() == 4
    assert "GRN" not in summary(model).passed_over


class MostlyConvolutions(Trained):
    """A classifier of 97 % convolutions that never run."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        with own_random_stream(3):
            self.stem = nn.Sequential(nn.Conv2d(size, 16, 3), nn.Conv2d(16, size, 3))
            self.table = nn.Embedding(size, 9)


NEARLY_ALL = r"lightning_lora: 'all-linear' passes over 9\d\.\d% of the parameters: 2 Conv2d 9\d\.\d%, 1 Embedding .*; "
NEARLY_ALL += r"target_modules='all-layers' adapts Conv2d too; "
NEARLY_ALL += (
    r"a list of target_modules can name Embedding \('table', \.\.\.\) too, and exclude_modules what is to stay"
)


def test_passing_over_nearly_all_warns_once_and_names_what_could_be_adapted(tmp_path):
    with pytest.warns(UserWarning, match=NEARLY_ALL):
        inject(model := MostlyConvolutions(), LoRAConfig(r=1))
    make_trainer(tmp_path, LoRACallback(r=1), max_epochs=1).fit(model, Data())  # that warning was given
    trainer = make_trainer(tmp_path, LoRACallback(r=1), max_epochs=1)
    with pytest.warns(UserWarning, match=NEARLY_ALL) as caught:
        trainer.fit(model := MostlyConvolutions(), Data())
    assert sum("passes over" in str(warning.message) for warning in caught) == 1
    trainer.fit(model, Data())
    save_adapter(model, tmp_path / "adapter")
    load_adapter(loaded := MostlyConvolutions(), tmp_path / "adapter")  # whoever trained it has chosen
    make_trainer(tmp_path, LoRACallback(), max_epochs=1).fit(loaded, Data())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: MostlyConvolutions(4), {}),  # passes over less
        (MostlyConvolutions, {"exclude_modules": ["stem.0", "stem.1", "table"]}),  # is meant
        (MostlyConvolutions, {"target_modules": ["head"]}),
        (lambda: nn.Sequential(nn.Linear(2, 2), Linear(30, 30)), {}),  # which cannot be adapted
        (lambda: BertModel(BertConfig(vocab_size=99, hidden_size=16, num_attention_heads=2, intermediate_size=16)), {}),
    ],
)
def test_what_is_less_meant_or_cannot_be_adapted_is_not_warned_of(model, options: dict[str, Any]):
    inject(model(), LoRAConfig(r=1, **options))


def test_recurrent_weights_are_what_a_model_of_them_can_adapt_by_name():
    with pytest.warns(UserWarning, match=r"1 LSTM 9\d\.\d%; target_parameters=\['weight_ih_l0', 'weight_hh_l0'\]"):
        inject(nn.ModuleDict({"rnn": nn.LSTM(16, 32), "head": nn.Linear(4, 4)}), LoRAConfig(r=1))


def test_dora_suggests_only_what_it_can_adapt():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2)
            self.head = nn.Linear(4, 4)
            self.conv = nn.Conv1d(64, 64, 16)

    with pytest.warns(UserWarning, match=r"; target_modules='all-layers' adapts Conv1d too\.$"):
        inject(Attends(), LoRAConfig(r=1, use_dora=True))


def test_a_weight_of_two_modules_counts_once():
    model = nn.ModuleDict({"one": nn.Embedding(10, 10), "two": nn.Embedding(10, 10), "body": nn.Linear(30, 10)})
    model["two"].weight = model["one"].weight
    inject(model, LoRAConfig(r=1))
    assert summary(model).passed_over.startswith("24.4% of the parameters: 1 Embedding 24.4%")  # 100 of 410


def test_a_share_that_rounds_to_nothing_is_not_told():
    model = nn.ModuleDict({"table": nn.Embedding(100, 100), "body": nn.Linear(100, 100), "tiny": nn.Conv1d(2, 2, 1)})
    inject(model, LoRAConfig(r=1))
    assert summary(model).passed_over.partition(";")[0] == "49.8% of the parameters: 1 Embedding 49.7%"
