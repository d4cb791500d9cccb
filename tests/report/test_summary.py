"""summary: what is adapted, trained and saved, against the model's own tensors; both forms of text; reprs of layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject, is_merged, load_adapter, merge, save_adapter, summary, unload
from lightning_lora.names import group_of
from lightning_lora.report.summary import Memory, Summary
from lightning_lora.trainer.run_state import run_of
from support.models.networks import Zoo, zoo_config
from support.models.quantized import NAMES, quantized

LONG = "a_name_that_is_so_long_that_it_has_no_room_in_a_table_beside_the_other_columns"


class Mixed(nn.Module):
    """Layers of several kinds, single parameters, a norm with statistics, and a long name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(8, 16)
        self.body = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.add_module(LONG, nn.Linear(8, 8))


def words(found: Summary) -> str:
    """The plain text without its line breaks."""
    return " ".join(str(found).split())


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **options))


def test_groups_have_the_layers_of_one_name_class_r_and_alpha():
    model = Mixed()
    options: dict[str, Any] = {"rank_pattern": {r"body\.2": 2}, "alpha_pattern": {"weight_hh_l0": 3.5}}
    inject(
        model, LoRAConfig(r=4, target_modules=["0", "2"], target_parameters=["weight_ih_l0", "weight_hh_l0"], **options)
    )
    found = [(g.name, g.kind, g.count, g.r, g.alpha, g.parameters) for g in summary(model).groups]
    assert found == [
        ("encoder.weight_ih_l0", "LSTM", 1, 4, 8, 4 * (8 + 64)),
        ("encoder.weight_hh_l0", "LSTM", 1, 4, 3.5, 4 * (16 + 64)),
        ("body", "Linear", 1, 4, 8, 4 * (16 + 8)),
        ("body", "Linear", 1, 2, 8, 2 * (8 + 8)),
    ]
    inject(network := llama(), LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert [(g.name, g.count) for g in summary(network).groups] == [
        ("self_attn.q_proj", 2),
        ("mlp.down_proj", 2),
    ]


def test_numbers_are_those_of_the_models_tensors():
    inject(model := Zoo().bfloat16(), zoo_config())
    found, parameters = summary(model), dict(model.named_parameters())
    factors = {name: p for name, p in parameters.items() if "lora_" in name}
    trained = {name: p.numel() for name, p in parameters.items() if p.requires_grad and name not in factors}
    assert found.layers == len(factors) / 2
    assert found.trainable == sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert found.total == sum(p.numel() for p in parameters.values())
    assert found.adapter_parameters == sum(group.parameters for group in found.groups)
    assert found.adapter_parameters == sum(p.numel() for p in factors.values())
    assert found.adapter_bytes == 4 * found.adapter_parameters
    assert found.adapter_dtypes == ("float32",)
    assert found.also_trained == trained
    assert {"head.weight", "body.0.bias", "conv.bias"} < set(trained)
    assert found.also_saved == {f"body.1.{name}": buffer.numel() for name, buffer in model.body[1].named_buffers()}
    assert found.merged_eval is found.save is None


def test_expected_memory_is_what_a_step_of_adamw_takes():
    inject(model := Zoo(), zoo_config(r=3))
    expected = summary(model).memory
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.arange(10).view(2, 5)).sum().backward()
    optimizer.step()
    tensors = [p for name, p in model.named_parameters() if "lora_" not in name] + list(model.buffers())
    gradients = [p.grad.nbytes for p in model.parameters() if p.grad is not None]
    states = [s.nbytes for state in optimizer.state.values() for name, s in state.items() if name != "step"]
    assert expected == Memory(
        sum(tensor.nbytes for tensor in tensors), summary(model).adapter_bytes, sum(gradients), sum(states)
    )
    assert expected.total == sum((expected.weights, expected.adapter, expected.gradients, expected.optimizer))


def test_layers_that_all_linear_leaves_out_are_told_with_their_share():
    inject(model := llama(), LoRAConfig())
    found, total = summary(model), sum(p.numel() for p in llama().parameters())
    (head,) = found.left_out
    assert (head.names, head.reason) == (("lm_head",), "it is the output head")
    assert head.share == model.lm_head.weight.numel() / total
    assert f"leaves out lm_head ({head.share:.1%} of all, it is the output head)" in words(found)
    inject(tied := llama(tie_word_embeddings=True), LoRAConfig())
    assert summary(tied).left_out[0].share == 0  # the embedding's parameters, which are counted there
    assert "leaves out lm_head (it is the output head)" in words(summary(tied))
    inject(headed := llama(), LoRAConfig(modules_to_save=["lm_head"]))
    assert not summary(headed).left_out  # it is trained whole
    inject(named := llama(), LoRAConfig(target_modules=["q_proj"]))
    assert not summary(named).left_out
    assert "all-linear" not in str(summary(named))


def test_plain_text_is_this():
    inject(model := Zoo(), zoo_config(r=4, lora_alpha=2.5))
    assert str(summary(model)) == PLAIN


PLAIN = """\
LoRA: 4 adapted layers
  layers  class      count  r  alpha      s  parameters
  embed   Embedding      1  4    2.5  0.625          76
  conv    Conv1d         1  4    2.5  0.625         128
  body    OwnLinear      1  4    2.5  0.625          64
  body    Linear         1  4    2.5  0.625          64
  trainable     383 of 823 parameters (46.54%)
  adapter       1.33 kB in float32
  also trained  5 tensors, 51 values: conv.bias, body.0.bias, body.3.bias, ...
  also saved    3 tensors, 17 values: body.1.running_mean, body.1.running_var,
                body.1.num_batches_tracked
  memory        7.96 kB and activations: weights 2.04 kB, adapter 1.33 kB,
                gradients 1.53 kB, optimizer 3.06 kB (two states, as AdamW's)"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 64}, "s = 0.125: lora_alpha is 8, its default; 32 is usual"),
        ({"rank_pattern": {"up_proj": 32, "down_proj": 64}}, "s = 0.125 and 0.25: lora_alpha is 8"),
        ({"r": 16}, ""),  # s = 0.5
        ({"r": 64, "use_rslora": True}, ""),  # s = 1
        ({"r": 64, "lora_alpha": 16}, ""),  # somebody chose it
        ({"r": 64, "trainable_token_indices": [1]}, "s = 0.125:"),
    ],
)
def test_a_small_s_that_comes_from_the_default_alpha_is_told(options: dict[str, Any], said: str):
    inject(model := llama(), LoRAConfig(**options))
    found = summary(model)
    assert found.small_scaling.startswith(said)
    assert bool(found.small_scaling) == bool(said)
    assert ("scaling s = " in words(found)) == bool(said)
    assert found.small_scaling in found.short()


def test_the_s_of_a_loaded_adapter_is_its_own(tmp_path: Path):
    model = llama()
    other = copy.deepcopy(model)
    inject(model, LoRAConfig(r=64, init_lora_weights=False))
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert summary(other).groups[0].scaling == 0.125
    assert not summary(other).small_scaling


def with_all_there_is_to_say() -> nn.Module:
    """Many groups; a quantized layer; layers left out for two reasons; long names; large tables."""
    model = nn.ModuleDict({f"{LONG}_{i}": nn.Linear(16, 16, bias=False) for i in range(12)})
    model.update({"packed": quantized("nf4")[0], "net": llama(), "table": nn.Embedding(300, 32)})
    model["out"] = nn.Linear(32, 300, bias=False)
    model["out"].weight = model["table"].weight
    inject(model, LoRAConfig(r=2, modules_to_save=[f"{LONG}_{i}" for i in range(6)], use_rslora=True))
    return model


def with_layers_that_stay_factored() -> nn.Module:
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("a", "b", "tied", "tied_too")})
    model["other"], model["another"] = nn.Embedding(16, 16), nn.Embedding(16, 16)
    model["other"].weight, model["another"].weight = model["tied"].weight, model["tied_too"].weight
    inject(model, LoRAConfig(r=2, target_modules=["a", "b", "tied", "tied_too"]))
    return model


def test_the_short_form_says_all_that_there_is_in_one_line_each():
    model = with_all_there_is_to_say()
    run_of(model.lora_injection).merged_eval = True
    assert summary(model).short() == SHORTENED


SHORTENED = """\
LoRA with use_rslora: 21 adapted layers
  layers                               class   count  r  alpha     s  parameters
  ...table_beside_the_other_columns_6  Linear      1  2      8  5.66          64
  and 13 more groups of layers (20 layers)
  trainable     4,288 of 45,344 parameters (9.46%)
  adapter       11 kB in float32
  also trained  6 tensors, 1,536 values: ...
  all-linear    leaves out net.lm_head (4.8% of all, it is the output head); ...
  quantized     1 weight as nf4
  evaluation    merged, but for 1 layer (packed: its weight is quantized (nf4))"""


def test_adapted_layers_show_r_and_alpha_until_they_are_unloaded():
    model = Mixed()
    before = repr(model)
    targets: dict[str, Any] = {"target_modules": ["0", "attention", "out_proj"], "target_parameters": ["weight_ih_l0"]}
    inject(model, LoRAConfig(r=4, lora_alpha=2.5, rank_pattern={"out_proj": 2}, **targets))
    shown = repr(model)
    assert "LSTM(8, 16, weight_ih_l0: r=4, alpha=2.5)" in shown
    assert "(0): Linear(in_features=16, out_features=8, bias=True, r=4, alpha=2.5)" in shown
    assert "(2): Linear(in_features=8, out_features=8, bias=True)" in shown
    assert "(attention): MultiheadAttention(\n    r=4, alpha=2.5\n" in shown
    assert "in_features=8, out_features=8, bias=True, r=2, alpha=2.5" in shown
    unload(model)
    assert repr(model) == before


def test_trained_rows_of_a_table_are_told_without_r_and_alpha():
    inject(model := llama(), LoRAConfig(r=5, target_modules=["q_proj"], trainable_token_indices=[1, 2, 6]))
    table = summary(model).groups[0]
    width = model.model.embed_tokens.embedding_dim
    assert (table.name, table.kind, table.count, table.parameters) == (
        "model.embed_tokens",
        "Embedding, 3 rows",
        1,
        3 * width,
    )
    assert (table.r, table.alpha) == (0, 0)
    line = next(line for line in str(summary(model)).splitlines() if "embed_tokens" in line)
    assert line.split() == ["model.embed_tokens", "Embedding,", "3", "rows", "1", f"{3 * width:,}"]
    assert repr(model.model.embed_tokens).endswith("3 trained rows)")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("h.0.attn.c_proj", "attn.c_proj"),
        ("encoder.block.2.layer.0.SelfAttention.q", "SelfAttention.q"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("body.3", "body"),
        ("0.1", "layers"),
        ("", "model"),
    ],
)
def test_a_group_is_the_part_of_a_name_at_its_last_number(name: str, group: str):
    assert group_of(name) == group


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({"use_dora": True, "use_rslora": True}, "DoRA with use_rslora: 2 adapted layers"),
        ({"init_lora_weights": False}, "LoRA: 2 adapted layers, start: random"),
        ({"init_lora_weights": "pissa"}, "LoRA: 2 adapted layers, start: pissa"),
    ],
)
def test_the_title_names_variant_and_start(options: dict[str, Any], title: str):
    inject(model := nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoRAConfig(r=2, **options))
    assert str(summary(model)).splitlines()[0] == title


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "eva"])
def test_what_an_adapter_starts_from_is_memory_and_no_parameter(init: str):
    inject(model := Zoo(), zoo_config(init_lora_weights=init))
    inject(plain := Zoo(), zoo_config())
    found, expected = summary(model), summary(plain)
    for field in ("trainable", "total", "adapter_parameters", "groups", "also_trained"):
        assert getattr(found, field) == getattr(expected, field)
    is_frozen_start = [name for name, _ in model.named_parameters() if "lora_start" in name]
    assert found.total == sum(p.numel() for name, p in model.named_parameters() if name not in is_frozen_start)
    assert found.adapter_bytes == expected.adapter_bytes * (2 if is_frozen_start else 1)
    assert found.memory.adapter == found.adapter_bytes
    assert found.memory.optimizer == expected.memory.optimizer


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_told_and_not_called_merged(kind: str):
    inject(model := quantized(kind), LoRAConfig(r=2, target_modules=["0", "2"]))
    found = summary(model)
    assert found.quantized == {NAMES[kind]: 3}  # adapted or not
    assert [(stays.names, stays.reason) for stays in found.unmerged] == [
        (("0", "2"), f"its weight is quantized ({NAMES[kind]})")
    ]
    shown = f"quantized 3 weights as {NAMES[kind]} merging factored, as no layer can be merged (0, 2: "
    shown += f"its weight is quantized ({NAMES[kind]}))"
    assert shown in words(found)
    for merged_eval, said in ((True, "factored, as no layer can be merged ("), (False, "factored (merged_eval=False)")):
        run_of(model.lora_injection).merged_eval = merged_eval
        assert f"evaluation {said}" in words(summary(model))
    merge(model)
    assert is_merged(model)  # as it was called, and not undone
    assert summary(model) == summary(model)
    assert "evaluation merged" not in words(summary(model))


def test_layers_that_stay_factored_beside_merged_ones_are_told_with_their_reasons():
    model = with_layers_that_stay_factored()
    run_of(model.lora_injection).merged_eval = True
    reasons = "tied: its weight is also other.weight; tied_too: its weight"
    assert f"evaluation merged, but for 2 layers ({reasons}" in words(summary(model))
    inject(plain := Zoo(), zoo_config())
    run_of(plain.lora_injection).merged_eval = True
    assert "evaluation merged memory" in words(summary(plain))
