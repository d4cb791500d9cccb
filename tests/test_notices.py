"""Lines that the reference promises are shown where the summary is: on a terminal, or in Lightning's log."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import rich
import transformers
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from lightning_lora import LoRAConfig, inject, merge, merged_state_dict
from lightning_lora.notices import tell, terminal
from support.forks import DONE, run_in_forks
from support.notices import lightning_logger
from support.quantised import quantised

LINE = "lightning_lora: [bold]a line[/bold] of 100%."


def in_16_bits(**options: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    inject(model, LoRAConfig(r=2, init_lora_weights=False))
    return model


def quantised_base() -> nn.Module:
    inject(model := quantised("nf4"), LoRAConfig(r=2, init_lora_weights=False))
    return model


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))


PROMISED: dict[str, tuple[Callable[[], object], str]] = {
    "quantised weights stay factored": (
        lambda: merge(quantised_base()),
        "lightning_lora: merge: 3 layers have quantised weights (nf4) and stay factored",
    ),
    "what rounding costs": (lambda: merge(in_16_bits()), "lightning_lora: merged 16-bit weights: rounding costs"),
    "what rounding dequantised weights costs": (
        lambda: merged_state_dict(quantised_base(), dequantize="float32"),
        "lightning_lora: merged float32 weights, dequantised: rounding costs",
    ),
    "what all-linear leaves out": (
        lambda: inject(llama(), LoRAConfig(r=2)),
        "lightning_lora: lm_head is left out of 'all-linear': it is the output head",
    ),
    "what all-linear passes over": (
        lambda: inject(llama(), LoRAConfig(r=2)),
        "lightning_lora: 'all-linear' passes over",
    ),
    "a layer that is trained whole": (
        lambda: inject(llama(), LoRAConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])),
        "lightning_lora: lm_head is in target_modules and in modules_to_save",
    ),
}


@pytest.mark.parametrize("subject", PROMISED)
def test_what_the_reference_promises_is_in_lightnings_log_once(caplog, subject: str):
    act, expected = PROMISED[subject]
    with caplog.at_level(logging.INFO, lightning_logger()):
        act()
    assert sum(record.getMessage().startswith(expected) for record in caplog.records) == 1


@pytest.mark.parametrize("subject", PROMISED)
def test_what_the_reference_promises_is_shown_on_a_terminal(monkeypatch, subject: str):
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", rich.console.Console(file=out, force_terminal=True, width=10_000))
    monkeypatch.setattr(logging.getLogger(lightning_logger()), "level", logging.INFO)
    act, expected = PROMISED[subject]
    act()
    assert sum(line.startswith(expected) for line in out.getvalue().splitlines()) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("on_a_terminal", [True, False])
@pytest.mark.parametrize("silenced", [True, False])
def test_a_line_is_shown_as_it_is_on_rank_zero_alone_unless_lightnings_log_is_silenced(
    caplog, monkeypatch, on_a_terminal: bool, silenced: bool, rank: int
):
    out = io.StringIO()
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setattr(rich, "_console", rich.console.Console(file=out, force_terminal=on_a_terminal, width=80))
    with caplog.at_level(logging.WARNING if silenced else logging.INFO, lightning_logger()):
        tell(LINE)
    shown = rank == 0 and not silenced
    assert [record.getMessage() for record in caplog.records] == [LINE] * (shown and not on_a_terminal)
    assert out.getvalue().splitlines() == [LINE] * (shown and on_a_terminal)


def test_where_lightnings_log_is_silenced_this_packages_own_can_be_asked_for(caplog):
    with caplog.at_level(logging.INFO, "lightning_lora"):
        tell(LINE)
    assert [record.getMessage() for record in caplog.records] == [LINE]


WITHOUT_LIGHTNING = """
import contextlib, io, logging, sys, torch
{setup}
shown = io.StringIO()
with contextlib.redirect_stderr(shown):
    import lightning_lora
    net = torch.nn.ModuleDict({{"linear": torch.nn.Linear(8, 8), "table": torch.nn.Embedding(8, 8)}})
    lightning_lora.inject(net, lightning_lora.LoRAConfig(r=1))
assert not {{"lightning", "pytorch_lightning"}} & set(sys.modules)
assert shown.getvalue().count("'all-linear' passes over") == {times}, shown.getvalue()
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


@pytest.mark.parametrize(("is_terminal", "is_jupyter"), [(True, False), (False, True), (False, False)])
def test_the_summary_is_shown_by_rich_on_a_terminal_and_in_a_notebook(monkeypatch, is_terminal: bool, is_jupyter: bool):
    console = SimpleNamespace(is_terminal=is_terminal, is_jupyter=is_jupyter)
    monkeypatch.setattr("rich.get_console", lambda: console)
    assert terminal() is (console if is_terminal or is_jupyter else None)
