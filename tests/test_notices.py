"""Lines that the reference promises go to the log of the package, as the summary does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import transformers
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from lightning_lora import LoRAConfig, combine, inject, merge, merged_state_dict, take_adapter
from lightning_lora.notices import tell
from support.models.quantized import quantized
from support.ranks.processes import DONE, run_in_forks

LINE = "lightning_lora: a line of 100%."


def in_16_bits(**options: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    return model


def quantized_base() -> nn.Module:
    inject(model := quantized("nf4"), LoRAConfig(r=2, init_lora_weights=False))
    return model


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))


def linear(r: int) -> nn.Module:
    torch.manual_seed(1)
    inject(model := nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=r, init_lora_weights=False))
    return model


PROMISED: dict[str, tuple[Callable[[], object], str]] = {
    "quantized weights stay factored": (
        lambda: merge(quantized_base()),
        "lightning_lora: 3 layers have quantized weights (nf4) and stay factored, also in merged evaluation",
    ),
    "what rounding costs": (lambda: merge(in_16_bits()), "lightning_lora: merged 16-bit weights: rounding costs"),
    "what rounding dequantized weights costs": (
        lambda: merged_state_dict(quantized_base(), dequantize="bfloat16"),
        "lightning_lora: merged 16-bit weights, dequantized: rounding costs",
    ),
    "what all-linear leaves out": (
        lambda: inject(llama(), LoRAConfig(r=2)),
        "lightning_lora: lm_head is left out of 'all-linear': it is the output head",
    ),
    "a layer that is trained whole": (
        lambda: inject(llama(), LoRAConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])),
        "lightning_lora: lm_head is in target_modules and in modules_to_save",
    ),
    "what is left of a combination": (
        lambda: combine([take_adapter(linear(2))], [1.0], method="svd", rank=1),
        "lightning_lora: combine: the rank keeps 62.5% or more of each squared norm (0)",
    ),
}


@pytest.mark.parametrize("subject", PROMISED)
def test_what_the_reference_promises_is_logged_once_by_the_log_that_is_set_up(caplog, subject: str):
    act, expected = PROMISED[subject]
    with caplog.at_level(logging.INFO, "lightning_lora"):
        act()
    assert [each.name for each in caplog.records if each.getMessage().startswith(expected)] == ["lightning_lora"]


@pytest.mark.parametrize(("level", "rank"), [(logging.WARNING, 0), (logging.INFO, 0), (logging.INFO, 1)])
def test_a_line_is_logged_on_rank_zero_alone_unless_the_log_is_silenced(caplog, monkeypatch, level: int, rank: int):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    with caplog.at_level(level, "lightning_lora"):
        tell(LINE)
    assert [record.getMessage() for record in caplog.records] == [LINE] * (rank == 0 and level == logging.INFO)


WITHOUT_LIGHTNING = """
import contextlib, io, logging, sys, torch
{setup}
shown = io.StringIO()
with contextlib.redirect_stderr(shown):
    import lightning_lora
    net = torch.nn.ModuleDict({{"linear": torch.nn.Linear(8, 8), "table": torch.nn.Embedding(8, 8)}})
    net["tied"] = torch.nn.Linear(8, 8)
    net["tied"].weight = net["table"].weight
    lightning_lora.inject(net, lightning_lora.LoRAConfig(r=1))
assert not {{"lightning", "pytorch_lightning"}} & set(sys.modules)
assert shown.getvalue().count("tied is left out of 'all-linear'") == {times}, shown.getvalue()
"""


@pytest.mark.slow
def test_a_program_without_lightning_shows_lines_unless_it_has_set_up_logging_itself():
    cases = {
        "by default": ("", 1),
        "silenced": ("logging.getLogger('lightning_lora').setLevel(logging.WARNING)", 0),
        "set up": ("logging.basicConfig(stream=sys.stdout)", 0),
    }
    programs = {name: (["torch"], WITHOUT_LIGHTNING.format(setup=s, times=n)) for name, (s, n) in cases.items()}
    assert run_in_forks(programs) == dict.fromkeys(cases, DONE)
